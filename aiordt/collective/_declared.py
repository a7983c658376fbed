"""One collective on refs: what takes part, who is asked, and what comes back.

The caller compares shapes and dtypes, finds or makes the group of the owners, and asks each member
over its control connection. What comes out stays on the members; the refs to it come back with one
Ray call for each member, which counts them, or in the answer where they are small.

Invariants:
    REF-1  Nothing moves before all refs are known to fit: owners, group, shapes, dtypes.
    REF-2  Inputs stay as they are, and valid, whatever happens; but for ``inplace=True``.
"""

from __future__ import annotations

import asyncio
import functools
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from aiordt import _ray, _runtime, _wire
from aiordt._errors import (
    AiordtError,
    ClosedError,
    GroupError,
    InvalidTypeError,
    InvalidValueError,
    TensorFreedError,
    UsageError,
)
from aiordt._export import export, export_blocking
from aiordt._get import fetch_objects
from aiordt._into import is_tensor_ref
from aiordt._landing import dtype_of, num_bytes
from aiordt._progress import run_all
from aiordt._ref import TensorRef, header_of
from aiordt._relay import MIN_NBYTES
from aiordt._tree import Flat, match, place
from aiordt.collective import _rules
from aiordt.collective._made import made_by
from aiordt.collective._requests import BY_VALUE, FIRST_LANE, GONE, IN_PLACE, Request
from aiordt.collective._service import groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from aiordt._landing import Header
    from aiordt._runtime import Runtime
    from aiordt.collective.group import Group


class _Inputs(NamedTuple):
    """What takes part.

    Attributes:
        flat: Of the first tree.
        leaves: The refs of each tree, in the order of the first.
    """

    flat: Flat
    leaves: list[list[TensorRef]]

    def tree(self, values: Sequence[Any]) -> Any:  # noqa: ANN401
        """A tree like the first."""
        return self.flat.rebuild(values)


class _GoneError(Exception):
    """A member has no such group any more; nothing has moved."""


class Declared:
    """One call."""

    def __init__(
        self,
        kind: str,
        *,
        op: str = "",
        root: int = -1,
        inplace: bool = False,
        dim: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self._kind = kind
        self._op = op
        self._root = root
        self._inplace = inplace
        self._dim = dim
        self._timeout = timeout
        self._name = f"{kind}_refs"
        self._runtime = _runtime.current()

    async def run(self, refs: Sequence[Any], group: Group | None) -> list[Any]:
        """With refs of every member."""
        if not isinstance(refs, list | tuple):
            raise InvalidTypeError(
                f"{self._name} takes a list with a ref of each member, not a {type(refs).__name__}"
            )
        inputs = self._inputs(await run_all([fetch_objects(each) for each in refs]))
        owners = [self._owner(leaves, number) for number, leaves in enumerate(inputs.leaves)]
        self._check_owners(owners)
        self._check_alike(inputs)
        if group is not None:
            inputs = self._in_rank_order(inputs, owners, group)
            return await self._in_group(group, inputs)
        headers = [header for header, _ in owners]
        made = made_by(self._runtime)
        return await self._in_made(lambda: made.of_owners(headers), inputs)

    async def run_from(
        self,
        ref: Any,  # noqa: ANN401
        actors: Sequence[Any] | None,
        group: Group | None,
    ) -> list[Any]:
        """With refs of one member, to all of them."""
        if (actors is None) == (group is None):
            raise InvalidTypeError(f"{self._name} takes either actors or a group")
        inputs = self._inputs([await fetch_objects(ref)])
        header, _ = self._owner(inputs.leaves[0], None)
        self._check_alike(inputs)
        if group is not None:
            self._root = self._rank(group, header, self._name)
            return await self._in_group(group, inputs)
        ids = [_ray.actor_id_of(actor) for actor in actors or ()]
        if None in ids or len(set(ids)) < len(ids):
            raise InvalidTypeError(f"{self._name}: actors must be handles of different actors")
        made = made_by(self._runtime)
        return await self._in_made(lambda: made.with_owner(header, actors or ()), inputs)

    async def _in_made(
        self, using: Callable[[], AbstractAsyncContextManager[Group]], inputs: _Inputs
    ) -> list[Any]:
        """In a group that is made if need be."""
        for _ in range(2):
            async with using() as group:
                if self._kind in _rules.FROM_ROOT:
                    self._root = self._rank(group, inputs.leaves[0][0].header, self._name)
                with suppress(_GoneError):
                    return await self._in_group(group, inputs)
                await made_by(self._runtime).discard(group)  # it had ended since the last call
        raise GroupError(f"{self._name}: its group ended as soon as it was made")

    def _inputs(self, trees: Sequence[Any]) -> _Inputs:
        if not trees:
            raise InvalidValueError(f"{self._name}: no refs")
        like = trees[0]
        flat = Flat(like, is_tensor_ref, every=True)
        if not flat.leaves:
            raise InvalidTypeError(f"{self._name}: there is no TensorRef in refs[0]")
        leaves = [flat.leaves]
        for number, tree in enumerate(trees[1:], start=1):
            found = match(like, tree, is_tensor_ref, is_tensor_ref, f"refs[{number}]")
            if len(found) != len(flat.leaves):
                raise InvalidTypeError(
                    f"{self._name}: refs in dicts, lists, tuples and dataclasses only"
                )
            leaves.append(found)
        for each in leaves:
            for ref in each:
                self._runtime.check(ref)
        return _Inputs(flat, leaves)

    def _owner(self, leaves: Sequence[TensorRef], number: int | None) -> tuple[Header, str]:
        """Whose these refs are, and how an error calls them."""
        where = self._name if number is None else f"refs[{number}]"
        header = leaves[0].header
        for ref in leaves:
            if ref.header.address.runtime_id != header.address.runtime_id:
                raise UsageError(
                    f"{where} has refs of {header.owner} and of {ref.header.owner}: a member "
                    "brings its own only"
                )
        if header.owner.actor_id is None:
            raise UsageError(f"{where} is of {header.owner}: only actors can be members of a group")
        return header, where

    def _check_owners(self, owners: Sequence[tuple[Header, str]]) -> None:
        seen: dict[bytes, str] = {}
        for header, where in owners:
            other = seen.setdefault(header.address.runtime_id, where)
            if other is not where:
                raise UsageError(
                    f"{other} and {where} are both of {header.owner}: a member brings one"
                )

    def _check_alike(self, inputs: _Inputs) -> None:
        """Shapes and dtypes fit each other and the operation (REF-1)."""
        first = inputs.leaves[0]
        for number, leaves in enumerate(inputs.leaves):
            for one, other in zip(first, leaves, strict=True):
                if (one.meta.shape, one.meta.dtype) != (other.meta.shape, other.meta.dtype):
                    path = place(inputs.tree(first), one, "")
                    raise UsageError(
                        f"{self._name}: refs[{number}]{path} is {_spec(other)}, but "
                        f"refs[0]{path} is {_spec(one)}"
                    )
                if self._inplace and other.inline is not None:
                    raise UsageError(
                        f"{self._name}: refs[{number}] carries its tensor by value, and there is "
                        "nothing to overwrite: export it with transport=..., or without inplace"
                    )
        for ref in first:
            shape = ref.meta.shape
            if self._op:
                _rules.check_reduction(self._op, dtype_of(ref.meta.dtype))
            if self._kind in _rules.CUTTING and not shape:
                raise UsageError(f"{self._name}: a scalar cannot be cut along dimension 0")
            if self._dim is not None and not -len(shape) <= self._dim < len(shape):
                raise UsageError(f"{self._name}: dim={self._dim} of a tensor {list(shape)}")

    @staticmethod
    def _rank(group: Group, header: Header, where: str) -> int:
        """The rank of a ref's owner.

        Raises:
            UsageError: It is not a member.
        """
        for rank in range(group.size):
            if group.member(rank).address.runtime_id == header.address.runtime_id:
                return rank
        raise UsageError(f"{where} is of {header.owner}, which is not in {group!r}")

    def _in_rank_order(
        self, inputs: _Inputs, owners: Sequence[tuple[Header, str]], group: Group
    ) -> _Inputs:
        ranks = {self._rank(group, *owner): number for number, owner in enumerate(owners)}
        missing = [rank for rank in range(group.size) if rank not in ranks]
        if missing:
            raise UsageError(
                f"{self._name}: no ref of rank {missing[0]} of {group!r}: every member brings one"
            )
        return _Inputs(inputs.flat, [inputs.leaves[ranks[rank]] for rank in range(group.size)])

    async def _in_group(self, group: Group, inputs: _Inputs) -> list[Any]:
        if self._root >= group.size or self._root < -1:
            raise InvalidValueError(f"{self._name}: no rank {self._root} in {group!r}")
        runtime = self._runtime
        lane = FIRST_LANE | random.getrandbits(61)
        pulled = self._is_pulled(group, inputs)
        requests = [self._request(lane, rank, inputs, pulled=pulled) for rank in range(group.size)]
        asking = asyncio.run_coroutine_threadsafe(
            _ask_all(runtime, group, requests, self._name), runtime.io.loop
        )
        asked = asyncio.wrap_future(asking)
        try:
            answers = await asyncio.shield(asked)
            if any(code == GONE for code, *_ in answers):
                raise _GoneError if group.bound else GroupError(f"{group!r} has ended")
            results = [
                self._result(runtime, group, rank, lane, answer, inputs)
                for rank, answer in enumerate(answers)
            ]
            return await run_all(results)
        except asyncio.CancelledError:
            if asked.cancelled():
                raise ClosedError("aiordt's runtime was closed") from None
            asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
            asking.add_done_callback(lambda _: self._drop(runtime, group, lane))
            raise  # it goes on for the others
        except Exception:
            self._drop(runtime, group, lane)
            raise

    @staticmethod
    def _drop(runtime: Runtime, group: Group, lane: int) -> None:
        """Let the members drop what nobody will fetch (REQ-2). Any thread."""

        async def drop() -> None:
            asks = [group.ask(runtime, rank, "drop", lane) for rank in range(group.size)]
            await asyncio.gather(*asks, return_exceptions=True)

        with suppress(RuntimeError):  # its loop has ended
            runtime.io.loop.call_soon_threadsafe(lambda: runtime.io.spawn(drop()))

    def _is_pulled(self, group: Group, inputs: _Inputs) -> bool:
        """Whether members pull what one of them has: once for each host, which serve each other."""
        if self._kind != "broadcast":
            return False
        hosts = {group.member(rank).address.host for rank in range(group.size)}
        metas = [ref.meta for ref in inputs.leaves[0]]
        in_host_memory = not any(meta.device for meta in metas)
        return len(hosts) > 1 and in_host_memory and sum(map(num_bytes, metas)) >= MIN_NBYTES

    def _request(self, lane: int, rank: int, inputs: _Inputs, *, pulled: bool) -> list[object]:
        from_root = self._kind in _rules.FROM_ROOT
        brings = not from_root or rank == self._root
        described = brings or pulled
        leaves = inputs.leaves[0 if from_root else rank]
        brought = [
            (ref.header.key, ref.index, _wire.pack_meta(ref.meta), ref.inline) for ref in leaves
        ]
        wanted = [(ref.meta.shape, ref.meta.dtype, ref.meta.flags) for ref in leaves]
        inplace = self._inplace or (self._kind == "broadcast" and brings)
        return list(
            Request(
                lane,
                self._kind,
                self._op,
                self._root,
                inplace,
                self._dim,
                self._timeout,
                brought if described else None,
                [] if described else wanted,
                pulled,
            )
        )

    async def _result(  # noqa: PLR0917  (one caller)
        self,
        runtime: Runtime,
        group: Group,
        rank: int,
        lane: int,
        answer: Any,  # noqa: ANN401
        inputs: _Inputs,
    ) -> Any:  # noqa: ANN401
        """The refs of one member."""
        code, *rest = answer
        if code == IN_PLACE:
            return inputs.tree(inputs.leaves[0 if self._kind in _rules.FROM_ROOT else rank])
        member = group.member(rank)
        if code == BY_VALUE:
            header = header_of(member.address, member.owner, _wire.new_key())
            values = [
                TensorRef(header, number, packed, None, data)
                for number, (packed, data) in enumerate(rest[0])
            ]
            return inputs.tree(values) if values else None
        if member.address.runtime_id == runtime.address.runtime_id:
            leaves = groups_of(runtime).requests.take(lane)
            refs = await export(leaves, f"{self._name}()", transport=None, snapshot=False)
        else:
            fetch = functools.partial(_fetched, lane=lane, name=self._name)
            refs = await _ray.ask_actor(_ray.weak_handle(member.state), fetch)
        return inputs.tree(refs)


def _fetched(_actor: object, *, lane: int, name: str) -> list[Any]:
    """On a member, by Ray's call: refs to the results of a request."""
    leaves = groups_of(_runtime.current()).requests.take(lane)
    refs: list[Any] = export_blocking(leaves, f"{name}()", transport=None, snapshot=False)
    return refs


def _spec(ref: TensorRef) -> str:
    return f"{_rules.dtype_name(dtype_of(ref.meta.dtype))}{list(ref.meta.shape)}"


async def _ask_all(
    runtime: Runtime, group: Group, requests: Sequence[object], name: str
) -> list[Any]:
    """Ask every member, and wait for all answers. On the io loop; never cancelled.

    Raises:
        AiordtError: What a member could not do, or `GroupError`.
    """

    async def ask(rank: int, request: object) -> Any:  # noqa: ANN401
        try:
            return await group.ask(runtime, rank, "collect", request)
        except (UsageError, GroupError, ClosedError, TensorFreedError):
            raise  # the others hear of it by themselves
        except AiordtError as exc:
            why = f"{name}: rank {rank} ({group.member(rank).label}) could not be asked: {exc}"
            # The others may wait for it for ever.
            await group.end(runtime, f"{group!r}: {why}", closed=False)
            raise GroupError(f"{group!r}: {why}") from exc

    asks = [ask(rank, request) for rank, request in enumerate(requests)]
    answers = await asyncio.gather(*asks, return_exceptions=True)
    if any(answer == [GONE] for answer in answers):
        return [[GONE]]  # so nothing has moved, whatever the others say
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    # Where one member has its own reason, the others say that it did not take part.
    for kind in (TensorFreedError, ClosedError, GroupError, UsageError, BaseException):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    return answers
