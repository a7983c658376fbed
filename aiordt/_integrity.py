"""Checksums of what is pulled: with the setting ``checksums`` of the process that exports.

The owner keeps the sums of an export's blocks (`aiordt._checksums`), and a flag in the refs asks
whoever pulls to check: it hashes what has come, and asks the owner what is true of that. For a
whole tensor the owner only compares; for a part it hashes the blocks that the part is in, and the
part, converted as it was sent.

Not checked are `TensorRef.view` and the owner's own await, which give the memory itself, and
what travels inside a ref, which is in Ray's objects.

Invariants:
    SUM-1  A checked pull gives the bytes that were exported, or raises `ChecksumError`.
    SUM-2  ... also when they come from a copy that others keep, which is then asked no more.
    SUM-3  What was written over at its owner is told from what was changed on its way.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final, TypeVar

import msgpack

from aiordt import _device
from aiordt._config import missing_for_checksums
from aiordt._errors import (
    ChecksumError,
    InvalidValueError,
    ProtocolViolationError,
    UnavailableError,
)
from aiordt._landing import describe
from aiordt._memory import in_memory_order, view_memory
from aiordt._metrics import phase
from aiordt._progress import finish
from aiordt._types import KIB
from aiordt._wire import pack_items, unpack_items
from aiordt.abc import TransportMessage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    import torch

    from aiordt._batch import Batch
    from aiordt._landing import Name
    from aiordt._layout import Cut
    from aiordt._progress import IoThread, Workers
    from aiordt._registry import Registry
    from aiordt._relay import Relay
    from aiordt._route import Routes
    from aiordt._wire import Item, Message
    from aiordt.abc import Part

_T = TypeVar("_T")

NAME: Final = "checksums"
INTACT: Final = 0
OVERWRITTEN: Final = 1
GARBLED: Final = 2
#: More are hashed on a worker thread: 30 µs of the loop's time.
_ON_LOOP_NBYTES: Final = 256 * KIB
#: Parts in one question, so that it fits into a frame.
_MAX_PARTS: Final = 8192


def _load() -> ModuleType:
    """`aiordt._checksums`; blocks for about 1 ms, once.

    Raises:
        UnavailableError: Its package is not installed.
    """
    if reason := missing_for_checksums():
        raise UnavailableError(reason, reason=reason, transport="any")
    from aiordt import _checksums  # noqa: PLC0415  (optional)

    return _checksums


def is_whole(tensor: torch.Tensor, cut: Cut | None) -> bool:
    """Whether a cut selects all of an exported tensor, in the order in which its bytes travel."""
    if cut is None:
        return True
    if cut.offset or cut.dtype is not None:
        return False
    if tensor.is_contiguous():
        return cut.contiguous and cut.span == tensor.nbytes
    source = in_memory_order(tensor)
    return (cut.shape, cut.stride, cut.itemsize) == (
        tuple(source.shape),
        source.stride(),
        tensor.itemsize,
    )


def _span_of(tensor: torch.Tensor, cut: Cut | None) -> tuple[int, int]:
    """Where a part is among the bytes of an exported tensor: from which, and how many."""
    if cut is None or not tensor.is_contiguous():
        return 0, tensor.nbytes  # of a strided one the packed bytes have sums: all are looked at
    return cut.offset, cut.span


def _memory(tensor: torch.Tensor) -> memoryview:
    return view_memory(tensor.data_ptr(), tensor.nbytes)


class Checks:
    """The checksums of one runtime, as owner and as consumer. Any loop, unless said otherwise.

    Args:
        io: The io thread.
        registry: What this process exports.
        routes: The ways to others.
        relay: Copies of what others export.
        workers: Threads that hash.
    """

    def __init__(
        self, io: IoThread, registry: Registry, routes: Routes, relay: Relay, workers: Workers
    ) -> None:
        self._io = io
        self._registry = registry
        self._routes = routes
        self._relay = relay
        self._workers = workers
        self._loaded: ModuleType | None = None

    async def _sums(self) -> ModuleType:
        if self._loaded is None:
            self._loaded = await self._workers.run(_load)
        return self._loaded

    async def _run(self, nbytes: int, work: Callable[[], _T]) -> _T:
        """Do what hashes so many bytes; many on a worker thread, to its end (OWN-1)."""
        if nbytes <= _ON_LOOP_NBYTES:
            return work()
        return await finish(self._workers.run(work))

    async def _packed(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors as their bytes travel: contiguous, in host memory, copied where they are not."""
        ordered = [in_memory_order(tensor) for tensor in tensors]
        return await _device.stage(ordered, [tensor.dtype for tensor in ordered], self._workers)

    # --- the owner -------------------------------------------------------------------------

    async def sums_of(self, tensors: Sequence[torch.Tensor]) -> list[bytes]:
        """The sums of these tensors' blocks, to be kept in their `Export`.

        The work that makes them must have finished. Cancelled, it ends when they are read no more.
        """
        sums = await self._sums()
        packed = await self._packed(tensors)
        nbytes = sum(tensor.nbytes for tensor in packed)
        return await self._run(nbytes, lambda: [sums.block_sums(_memory(one)) for one in packed])

    async def serve(self, request: TransportMessage, _peer_id: bytes) -> Message:
        """Say what is true of parts that somebody has pulled. On the io loop.

        Raises:
            TensorFreedError: One is not exported any more.
            ProtocolViolationError: The request is malformed.
        """
        try:
            items, sizes, theirs = msgpack.unpackb(request.body)
            asked = list(zip(unpack_items(items), map(operator.index, sizes), theirs, strict=True))
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise ProtocolViolationError("not a question about checksums") from exc
        sums = await self._sums()
        verdicts = bytearray(len(asked))  # INTACT
        suspects = []
        for number, ((key, index, cut), _, their) in enumerate(asked):
            export, tensor = self._registry.local(key, index)
            if export.sums is None:
                raise InvalidValueError(f"{export.label} exported a tensor without checksums")
            kept = export.sums[index]
            if not (is_whole(tensor, cut) and sums.joint_sum(kept) == their):
                suspects.append((number, tensor, kept))
        if suspects:
            some = [asked[number] for number, _, _ in suspects]
            found = await self._look(some, *zip(*[row[1:] for row in suspects], strict=True))
            for (number, *_), verdict in zip(suspects, found, strict=True):
                verdicts[number] = verdict
        return TransportMessage(NAME, bytes(verdicts))

    async def _look(
        self,
        asked: Sequence[tuple[Item, int, bytes]],
        tensors: Sequence[torch.Tensor],
        kept: Sequence[bytes],
    ) -> list[int]:
        """As `serve`, of what takes another look at the memory."""
        items = [item for item, _, _ in asked]
        async with self._registry.open(items, sum(size for _, size, _ in asked)) as served:
            sums = await self._sums()
            packed = await self._packed(tensors)

            def look() -> list[int]:
                found = []
                rows = zip(asked, served.views, tensors, packed, kept, strict=True)
                for (item, _, their), view, tensor, whole, before in rows:
                    same = sums.sum_of(view) == their  # first: what is intact later was so now
                    span = _span_of(tensor, item[2])
                    if not sums.intact(before, _memory(whole), *span):
                        found.append(OVERWRITTEN)
                    else:
                        found.append(INTACT if same else GARBLED)
                return found

            nbytes = sum(map(len, served.views)) + sum(tensor.nbytes for tensor in packed)
            return await self._run(nbytes, look)

    # --- the consumer ----------------------------------------------------------------------

    async def check(
        self, batch: Batch, parts: Sequence[Part], transport: str, name: Name | None
    ) -> None:
        """See that what was pulled is what was exported (SUM-1).

        Args:
            batch: What was pulled.
            parts: What was read for that.
            transport: By which transport.
            name: Gives a ref's place in the caller's tree, for errors.

        Raises:
            ChecksumError: It is something else; names the first tensor of which that is so.
            UnavailableError: It cannot be checked here.
            OwnerDiedError: The owner can't be asked any more; and so on, as of `Peer.call`.
        """
        sums = await self._sums()
        mine = [view_memory(part.target, part.nbytes) for part in parts]
        total = sum(part.nbytes for part in parts)
        found = await self._run(total, lambda: [sums.sum_of(memory) for memory in mine])
        phase("pull.checking")
        peer = self._routes.peer(batch.refs[0].header.address)
        for start in range(0, len(parts), _MAX_PARTS):
            some = parts[start : start + _MAX_PARTS]
            body = msgpack.packb(
                (
                    pack_items([part.item for part in some]),
                    [part.nbytes for part in some],
                    found[start : start + _MAX_PARTS],
                )
            )
            reply = await self._io.run(peer.call(TransportMessage(NAME, body)))
            verdicts = reply.body if isinstance(reply, TransportMessage) else b""
            if len(verdicts) != len(some):
                raise ProtocolViolationError("not an answer about checksums")
            for part, verdict in zip(some, verdicts, strict=True):
                if verdict != INTACT:
                    self._relay.distrust(part.key)  # SUM-2
                    written = verdict == OVERWRITTEN
                    raise _error(batch, part, transport, name, overwritten=written)


def _error(
    batch: Batch, part: Part, transport: str, name: Name | None, *, overwritten: bool
) -> ChecksumError:
    ref = batch.ref_of(part)
    where = f"{name(ref)}, " if name is not None and len(batch.refs) > 1 else ""
    if overwritten:
        why = (
            "its owner wrote over it while refs to it were out, and its checksum is another now. "
            "There, await wait_tensor_freed() before the write, or export with snapshot=True; "
            "this export cannot be pulled any more"
        )
    else:
        why = (
            f"other bytes arrived than it has there, by {transport}: they were changed on the way, "
            "or it was written over for a moment. Pull again; if that happens again, suspect the "
            "network, or the memory of one of the hosts"
        )
    owner = ref.header.owner
    return ChecksumError(
        f"{where}{describe(ref)} of {owner}: {why}",
        transport=transport,
        peer=str(owner),
        nbytes=part.nbytes,
        overwritten=overwritten,
    )
