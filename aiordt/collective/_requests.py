"""Collectives on exported tensors: what a member does when somebody asks for one.

Whoever has the refs tells every member which of its tensors take part; each such request is a
lane of its own, so any number may be under way, from anywhere, in any order.

Invariants:
    REQ-1  A request that a member cannot take part in fails on all of them, by the exchange that
           compares their calls: nothing has moved, and the group goes on.
    REQ-2  Results that nobody fetches are dropped: when their asker says so, and when it is gone.
    REQ-3  An asker that is gone before it asked all members ends the group: some wait for others
           that will never come.
    REQ-4  What members pull from the root it holds until all have it: the barrier is its end.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from aiordt import _wire
from aiordt._errors import AiordtError, GroupError, UsageError
from aiordt._landing import dtype_of, unpack_plain
from aiordt._leaves import as_array, as_tensor
from aiordt._memory import raw_bytes
from aiordt._progress import finish
from aiordt._ref import TensorRef, header_of, held_ref
from aiordt._slices import view_of
from aiordt._types import DTYPE_CODES, MIB
from aiordt.collective._member import MemberGroup
from aiordt.collective._steps import Ended

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt._landing import Header
    from aiordt._runtime import Runtime
    from aiordt.collective._members import Member
    from aiordt.collective._service import Membership

#: Lanes of requests: above all tags.
FIRST_LANE: Final = 1 << 62
#: What a member answers: it has no such group; results by value; results to be fetched; the
#: tensors that came are the results.
GONE: Final = 0
BY_VALUE: Final = 1
KEPT: Final = 2
IN_PLACE: Final = 3
_COPY_ON_LOOP_NBYTES: Final = MIB
#: So long after an asker is gone, what it asked of others must have come to them.
_GRACE_SECONDS: Final = 1.0


class _Kept(NamedTuple):
    """Results that wait to be fetched, and whose they are."""

    peer_id: bytes
    leaves: list[Any]


class Request(NamedTuple):
    """What a member is asked to do; travels as a list.

    Attributes:
        lane: Of this request, in all members.
        kind: The collective.
        op: The reduction.
        root: The member that it is to or from; -1: none.
        inplace: Whether results go into the tensors.
        dim: Gathered tensors are stacked (``None``) or concatenated along it.
        timeout: In seconds, after which the group ends.
        brought: Its tensors: key, number, description and bytes by value of each; or ``None``.
        wanted: Shape, dtype and flags of what a member that brings none gets.
        pulled: Whether ``brought`` are the root's, which the others pull.
    """

    lane: int
    kind: str
    op: str
    root: int
    inplace: bool
    dim: int | None
    timeout: float | None
    brought: list[tuple[bytes, int, bytes, bytes | None]] | None
    wanted: list[tuple[tuple[int, ...], int, int]]
    pulled: bool


class Requests:
    """The requests that this process serves. On the io loop, but for `take`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._kept: dict[int, _Kept] = {}
        self._askers: dict[int, bytes] = {}
        self._served: dict[int, tuple[Membership, asyncio.Task[object]]] = {}

    async def serve(self, membership: Membership, body: Any, peer_id: bytes) -> object:  # noqa: ANN401
        """Take part in a collective; what became of it.

        Cancelled, since the asker is gone, it goes on for the others.
        """
        request = Request(*body)
        lane = request.lane
        self._askers[lane] = peer_id
        task = asyncio.ensure_future(self._serve(membership, request))
        self._served[lane] = membership, task

        def served(task: asyncio.Task[object]) -> None:
            self._askers.pop(lane, None)
            self._served.pop(lane, None)
            if not task.cancelled():
                task.exception()  # told already, if somebody is there

        task.add_done_callback(served)
        return await asyncio.shield(task)

    async def _serve(self, membership: Membership, request: Request) -> object:
        group = MemberGroup(membership)
        with contextlib.ExitStack() as stack:
            try:
                if request.pulled and group.rank != request.root:
                    leaves = await self._pull(membership.members[request.root], request)
                else:
                    leaves = await self._leaves(request, stack)
            except AiordtError as exc:
                with contextlib.suppress(UsageError):  # what all members raise
                    await group.refuse(request.kind, str(exc), request.lane)  # REQ-1
                raise exc.said(f"rank {group.rank}") from exc
            if request.pulled:  # REQ-4
                timeout = request.timeout
                await group._run("barrier", None, timeout=timeout, lane=request.lane)  # noqa: SLF001
                found = leaves
            else:
                found = await group._run(  # noqa: SLF001
                    request.kind,
                    leaves,
                    op=request.op,
                    root=request.root,
                    inplace=request.inplace or request.brought is None,
                    timeout=request.timeout,
                    lane=request.lane,
                )
        if request.inplace:
            return [IN_PLACE]
        if found is None:
            return [BY_VALUE, []]
        if request.kind in {"allgather", "gather"}:
            found = await self._off_loop(found[0], lambda: _joined(found, request.dim))
        return self._answer(request, found)

    async def _leaves(self, request: Request, stack: contextlib.ExitStack) -> list[Any]:
        """This member's tensors and arrays; held until the stack is unwound."""
        if request.brought is None:
            if request.kind == "scatter":
                return []
            made = [torch.empty(shape, dtype=dtype_of(code)) for shape, code, _ in request.wanted]
            numpy = [bool(flags & _wire.FLAG_NUMPY) for _, _, flags in request.wanted]
            return [as_array(t) if array else t for t, array in zip(made, numpy, strict=True)]
        registry = self._runtime.registry
        leaves: list[Any] = []
        held = []
        for key, number, packed, inline in request.brought:
            meta = _wire.unpack_meta(packed)
            if inline is not None:
                part = unpack_plain(meta, inline)
            else:
                export, tensor = registry.local(key, number)
                held.append(tensor)
                if not export.ready.done():
                    await export.ready.wait()  # DEV-1
                part = view_of(tensor.detach(), meta)
            leaves.append(as_array(part) if meta.flags & _wire.FLAG_NUMPY else part)
        stack.enter_context(registry.holding(held))
        return leaves

    async def _pull(self, root: Member, request: Request) -> list[Any]:
        """The root's tensors, which it holds until all members have them (REQ-4)."""
        headers: dict[bytes, Header] = {}
        refs = []
        for key, number, packed, inline in request.brought or ():
            header = headers.setdefault(key, header_of(root.address, root.owner, key))
            header.noted = True
            if inline is None:
                refs.append(held_ref(header, number, packed, _wire.unpack_meta(packed)))
            else:
                refs.append(TensorRef(header, number, packed, None, inline))
        return await self._runtime.pull_all(refs)

    async def _off_loop(self, leaves: Sequence[Any], work: Callable[[], list[Any]]) -> list[Any]:
        """Run ``work``, which copies these, on a worker thread if they are large."""
        if sum(as_tensor(leaf).nbytes for leaf in leaves) <= _COPY_ON_LOOP_NBYTES:
            return work()
        return await finish(self._runtime.workers.run(work))

    def _answer(self, request: Request, leaves: list[Any]) -> object:
        tensors = [as_tensor(leaf) for leaf in leaves]
        config = self._runtime.config
        sizes = [tensor.nbytes for tensor in tensors]
        small = max(sizes) <= config.inline_nbytes and sum(sizes) <= config.inline_result_nbytes
        if not small or not all(tensor.is_cpu for tensor in tensors):
            asker = self._askers.get(request.lane)
            if asker is not None:
                self._kept[request.lane] = _Kept(asker, leaves)
            return [KEPT]
        values = []
        for leaf, tensor in zip(leaves, tensors, strict=True):
            flags = _wire.FLAG_NUMPY if isinstance(leaf, np.ndarray) else 0
            shape = tuple(tensor.shape)
            meta = _wire.TensorMeta(DTYPE_CODES[tensor.dtype], flags, shape, None, 0)
            values.append((_wire.pack_meta(meta), raw_bytes(tensor.contiguous())))
        return [BY_VALUE, values]

    def take(self, lane: int) -> list[Any]:
        """The results of a request, once. Any thread.

        Raises:
            GroupError: They are not there.
        """
        kept = self._kept.pop(lane, None)
        if kept is None:
            raise GroupError("the results of this collective are not there (any more)")
        return kept.leaves

    def drop(self, lane: int) -> None:
        """Nobody will fetch these."""
        self._kept.pop(lane, None)

    def forget(self, peer_id: bytes) -> None:
        """An asker is gone (REQ-2)."""
        for lane in [lane for lane, asker in self._askers.items() if asker == peer_id]:
            del self._askers[lane]
            asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._give_up, lane)
        for lane in [lane for lane, kept in self._kept.items() if kept.peer_id == peer_id]:
            del self._kept[lane]

    def _give_up(self, lane: int) -> None:
        """End the group if not all of its members were asked (REQ-3)."""
        membership, _ = self._served.get(lane, (None, None))
        engine = None if membership is None else membership.engine
        if engine is not None and engine.unheard(lane):
            why = (
                "the process that asked for a collective on refs ended before it asked all members"
            )
            engine.end(Ended(closed=False, why=engine.said(why)))


def _joined(found: Sequence[Sequence[Any]], dim: int | None) -> list[Any]:
    """What all ranks brought, tensor by tensor, as one along a dimension."""
    joined = []
    for leaves in zip(*found, strict=True):
        tensors = [as_tensor(leaf) for leaf in leaves]
        one = _as_one(tensors) if dim in {None, 0} else None
        if one is None:
            one = torch.stack(tensors) if dim is None else torch.cat(tensors, dim)
        elif dim == 0:
            one = one.flatten(0, 1)
        joined.append(as_array(one) if isinstance(leaves[0], np.ndarray) else one)
    return joined


def _as_one(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors that lie end to end in one storage, and fill it, stacked without a copy."""
    first = tensors[0]
    storage = first.untyped_storage()
    step = first.numel()
    ends = [first.data_ptr() + rank * first.nbytes for rank in range(len(tensors))]
    if (
        step == 0
        or first.dim() == 0
        or storage.nbytes() != len(tensors) * first.nbytes
        or ends != [tensor.data_ptr() for tensor in tensors]
    ):
        return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
