"""A group as its members use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from aiordt._device import layer
from aiordt._errors import AiordtError, InvalidTypeError, InvalidValueError, UsageError
from aiordt._leaves import as_array, as_tensor, is_target
from aiordt._tree import Flat
from aiordt.collective import _call, _message, _rules
from aiordt.collective._engine import TO_RECEIVER, TO_SENDER, UNTAGGED
from aiordt.collective._steps import Ended

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import torch

    from aiordt.collective._call import Call
    from aiordt.collective._service import Membership


class MemberGroup:
    """A group, in one of its members: the operations. From `AsyncActor.group`.

    Every member makes the same calls, in the same order; calls with a ``tag`` are matched with
    those of the same tag only. Any number may be pending, from any coroutine. Members whose
    calls differ all raise `UsageError`, and the next call works.

    ``t`` is a tensor, a numpy array, or a tree of them: such a call is few operations, however
    many tensors there are. With ``inplace`` results go into ``t``, which is also what the call
    returns.

    A caller that is cancelled leaves, but its operation goes on for the others: ``t`` belongs to
    it until they are through, or the group ends. A ``timeout`` in seconds that runs out ends the
    group. When a member dies, calls on all others raise `GroupError` within 2 s.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    @property
    def name(self) -> str:
        """Its name."""
        return self._membership.name

    @property
    def rank(self) -> int:
        """This member's rank."""
        return self._membership.rank

    @property
    def size(self) -> int:
        """How many members it has."""
        return len(self._membership.members)

    @property
    def backend(self) -> str:
        """How host memory is moved, ``"shm"``, ``"gloo"`` or ``"mpi"``; or ``"nccl"``."""
        return self._membership.backend

    @override
    def __repr__(self) -> str:
        return f"<group {self.name!r}: rank {self.rank} of {self.size}, {self.backend}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """An exception in the body ends the group, so that nobody waits for this member."""
        if exc is not None and not isinstance(exc, AiordtError):
            self.fail(f"{type(exc).__name__}: {exc}")

    def fail(self, why: str) -> None:
        """End the group: every pending and later call on every member raises `GroupError`.

        Args:
            why: What they are told, with this member's name.
        """
        engine = self._membership.engine
        if engine is not None:
            label = engine.label(engine.rank)
            engine.end(Ended(closed=False, why=engine.said(f"{label} failed: {why}")))

    async def allreduce(
        self,
        t: Any,  # noqa: ANN401
        op: str = "sum",
        *,
        inplace: bool = True,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """Reduce over all members; every one gets the result, the same bits.

        Half precision and below is computed in float32 and rounded once.

        Args:
            t: What to reduce.
            op: ``"sum"``, ``"product"``, ``"min"``, ``"max"``, ``"avg"``; of integers and
                booleans ``"band"``, ``"bor"``, ``"bxor"``.
            inplace: Write the result into ``t``.
            tag: Match with calls of this tag only.
            timeout: After so many seconds the group ends.

        Raises:
            UsageError: The members' calls differ, or ``op`` has no meaning for a dtype.
            GroupError: The group has ended.
            ClosedError: It was closed.
        """
        return await self._run("allreduce", t, op=op, inplace=inplace, tag=tag, timeout=timeout)

    async def reduce(
        self,
        t: Any,  # noqa: ANN401
        dst: int,
        op: str = "sum",
        *,
        inplace: bool = True,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """As `allreduce`, but only rank ``dst`` gets the result.

        The others' tensors stay as they are; with ``inplace=False`` they get ``None``.
        """
        return await self._run(
            "reduce", t, op=op, root=dst, inplace=inplace, tag=tag, timeout=timeout
        )

    async def broadcast(
        self,
        t: Any,  # noqa: ANN401
        src: int,
        *,
        inplace: bool = True,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """Copy what rank ``src`` has to all members. Their ``t`` have its shapes and dtypes."""
        return await self._run("broadcast", t, root=src, inplace=inplace, tag=tag, timeout=timeout)

    async def allgather(
        self,
        t: Any,  # noqa: ANN401
        *,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> list[Any]:
        """Give every member what all of them have: a list in rank order."""
        found: list[Any] = await self._run("allgather", t, tag=tag, timeout=timeout)
        return found

    async def gather(
        self,
        t: Any,  # noqa: ANN401
        dst: int,
        *,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> list[Any] | None:
        """As `allgather`, for rank ``dst`` only; the others get ``None``."""
        found: list[Any] | None = await self._run("gather", t, root=dst, tag=tag, timeout=timeout)
        return found

    async def reducescatter(
        self,
        t: Any,  # noqa: ANN401
        op: str = "sum",
        *,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """Reduce over all members, and give each its piece along dimension 0.

        Pieces are as `torch.tensor_split` cuts them: the first ones are a row longer where the
        rows cannot be divided evenly.
        """
        return await self._run("reducescatter", t, op=op, tag=tag, timeout=timeout)

    async def scatter(
        self,
        t: Any,  # noqa: ANN401
        src: int,
        *,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """Give each member its piece along dimension 0 of what rank ``src`` has.

        The other members' ``t`` may be ``None``. Pieces are cut as in `reducescatter`.
        """
        return await self._run("scatter", t, root=src, tag=tag, timeout=timeout)

    async def alltoall(
        self,
        t: Any,  # noqa: ANN401
        *,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """Send piece i along dimension 0 to rank i; what comes is laid end to end, by rank.

        All members' tensors have the same shape; pieces are cut as in `reducescatter`.
        """
        return await self._run("alltoall", t, tag=tag, timeout=timeout)

    async def barrier(self, *, tag: int | None = None, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait until all members have come here."""
        await self._run("barrier", None, tag=tag, timeout=timeout)

    async def send(
        self,
        t: Any,  # noqa: ANN401
        dst: int,
        *,
        tag: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        """Send to one member, which calls `recv`; independent of all other calls.

        Up to 16 KiB are sent at once; more waits for the receiver.

        Args:
            t: What to send.
            dst: To whom.
            tag: Messages of a tag arrive in their order; other tags are independent.
            timeout: After so many seconds the group ends.
        """
        tensors, _ = self._tensors(t)
        self._check_peer(dst, tag)
        carrier = self._membership.carrier
        await self._engine.call(
            f"send(dst={dst}, tag={tag})",
            _message.send(tensors, dst, carrier),
            lane=tag,
            kind=TO_RECEIVER,
            other=dst,
            timeout=timeout,
            light=carrier is None,  # a backend may block
        )

    async def recv(
        self,
        t: Any,  # noqa: ANN401
        src: int,
        *,
        tag: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:  # noqa: ANN401
        """Receive into ``t`` what one member sends by `send`, and return it."""
        tensors, flat = self._tensors(t)
        _check_writable("recv", flat)
        self._check_peer(src, tag)
        engine = self._engine
        way = self._membership.carrier or self._membership.links.get(src)
        await engine.call(
            f"recv(src={src}, tag={tag})",
            _message.receive(tensors, src, engine, way),
            lane=tag,
            kind=TO_SENDER,
            other=src,
            timeout=timeout,
        )
        return t

    # --- how ---------------------------------------------------------------------------------

    @property
    def _engine(self) -> Any:  # noqa: ANN401
        return self._membership.engine

    def _check_peer(self, rank: int, tag: int) -> None:
        if not 0 <= rank < self.size or rank == self.rank:
            raise InvalidValueError(f"rank {rank}: a message goes to another rank of {self.size}")
        _check_tag(tag)

    @staticmethod
    def _tensors(t: Any) -> tuple[list[torch.Tensor], Flat]:  # noqa: ANN401
        flat = Flat(t, is_target, strict=True)
        return [as_tensor(leaf).detach() for leaf in flat.leaves], flat

    def _call(
        self,
        kind: str,
        t: Any,  # noqa: ANN401
        op: str,
        root: int,
        *,
        inplace: bool,
    ) -> tuple[Call, Flat | None]:
        call = _call.Call(kind, self.rank, self.size, op, root, inplace=inplace)
        call.pool = self._membership.pool
        if kind == "barrier" or (kind == "scatter" and self.rank != root):
            call.check()
            return call, None
        tensors, flat = self._tensors(t)
        if not tensors:
            raise InvalidTypeError(f"{kind}: there is no tensor in {type(t).__qualname__}")
        if inplace and kind in {"allreduce", "reduce", "broadcast"}:
            _check_writable(kind, flat)
        call.tensors = tensors
        if kind == "scatter":
            places = {id(leaf): place for place, leaf in enumerate(flat.leaves)}
            arrays = [isinstance(leaf, np.ndarray) for leaf in flat.leaves]
            call.extra = [_rules.structure(t, lambda leaf: places.get(id(leaf))), arrays]
        call.check()
        return call, flat

    async def _run(
        self,
        kind: str,
        t: Any,  # noqa: ANN401
        *,
        op: str = "",
        root: int = -1,
        inplace: bool = False,
        tag: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        lane: int = UNTAGGED,
    ) -> Any:  # noqa: ANN401
        engine = self._engine
        if tag is not None:
            lane = _check_tag(tag)
        flat: Flat | None = None
        try:
            if root != -1 and not 0 <= root < self.size:
                raise InvalidValueError(f"{kind}: no rank {root} in a group of {self.size}")
            call, flat = self._call(kind, t, op, root, inplace=inplace)
            mover = self._membership.movers.get(call.device.type)
            if mover is None:
                raise InvalidValueError(
                    f"{kind}: tensors on {call.device.type}, but the group's backend is "
                    f"{self.backend!r}"
                )
            mover.check(call)
            if call.device.type != "cpu":
                call.ready = layer(call.device).record(call.device)
            steps = _call.collective(call, mover)
        except UsageError as exc:
            await self.refuse(kind, str(exc), lane, timeout)
            raise
        call.lane = lane
        outcome = await engine.call(
            call,
            steps,
            lane=lane,
            timeout=timeout,
            light=call.light,
            numbered=lambda number: setattr(call, "number", number),
        )
        if call.done is not None:
            layer(call.device).wait_on_stream(call.device, call.done)
        if outcome is None:
            return None
        return _result(call, flat, t, *outcome)

    async def refuse(
        self,
        kind: str,
        why: str,
        lane: int,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        """Tell the others, who wait for this call, that it fails; and stay in step (internal)."""
        steps = _call.refusal(_call.Call(kind, self.rank, self.size), why)
        await self._engine.call(kind, steps, lane=lane, timeout=timeout, light=True)


def _check_writable(kind: str, flat: Flat) -> None:
    """Refuse to write where that cannot be right."""
    for leaf in flat.leaves:
        if isinstance(leaf, np.ndarray):
            if not leaf.flags.writeable:
                raise InvalidValueError(f"{kind}: a read-only array cannot be written to")
        elif leaf.is_inference():
            raise InvalidValueError(f"{kind}: an inference tensor cannot be written to")
        tensor = as_tensor(leaf)
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in strides):
            raise InvalidValueError(f"{kind}: an expanded tensor, whose elements share memory")


def _check_tag(tag: int) -> int:
    if type(tag) is not int or not 0 <= tag < 1 << 62:
        raise InvalidValueError(f"tag={tag!r}: an integer from 0 up")
    return tag


def _result(call: Call, flat: Flat | None, t: Any, extra: Any, found: Any) -> Any:  # noqa: ANN401
    """The tree of results."""
    if call.kind == "scatter":
        described, arrays = extra
        values = [
            as_array(each) if as_np else each for each, as_np in zip(found, arrays, strict=True)
        ]
        return _rules.restore(described, values)
    if call.inplace and call.kind in {"allreduce", "reduce", "broadcast"}:
        return t
    if found is None or flat is None:
        return None
    arrays = [isinstance(leaf, np.ndarray) for leaf in flat.leaves]

    def tree(values: list[torch.Tensor]) -> Any:  # noqa: ANN401
        return flat.rebuild(
            [as_array(each) if array else each for each, array in zip(values, arrays, strict=True)]
        )

    if call.kind in {"allgather", "gather"}:
        return [tree(values) for values in found]
    return tree(found)
