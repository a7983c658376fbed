"""What a publisher's process has of it: the buffers, what is exported, and who waits."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aiordt import _device
from aiordt._errors import ClosedError, TensorFreedError
from aiordt._progress import finish, post, settle
from aiordt._wait import wait_tensor_freed
from aiordt.weights._versions import Versions

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from aiordt._runtime import Runtime
    from aiordt.weights._layout import Laid
    from aiordt.weights._names import Record
    from aiordt.weights._versions import Holder, Slot


@dataclass(slots=True, eq=False)
class _Buffer:
    """The memory of a slot, and what is said of it.

    Attributes:
        tensors: It.
        skeleton: Of the tree that was written last.
        described: That tree, and where its tensors are.
        generation: How often `described` has changed.
        key: Of the export of the version in it.
        leases: ... which hold that.
    """

    tensors: list[torch.Tensor]
    skeleton: bytes
    described: bytes
    generation: int = 0
    key: bytes = b""
    leases: tuple[object, ...] = ()


class Offer(NamedTuple):
    """A version that is held for a reader; travels as a list.

    Attributes:
        version: Its number.
        slot: The number of its buffer.
        generation: Of the buffer's description.
        key: Of its export.
        nbytes: Of the buffer's description.
    """

    version: int
    slot: int
    generation: int
    key: bytes
    nbytes: int


class Stream:
    """See above. Any thread, unless said otherwise.

    Args:
        runtime: This process's.
        record: How others find it.
        limit: How many buffers there may be.
        label: What it is, for people.
    """

    def __init__(self, runtime: Runtime, record: Record, limit: int, label: str) -> None:
        self.record = record
        self.closed = False
        self._runtime = runtime
        self._label = label
        self._lock = threading.Lock()
        self._versions = Versions(limit)
        self._buffers: dict[int, _Buffer] = {}
        self._readers: set[asyncio.Future[None]] = set()  # on the io loop
        self._writers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def in_use(self) -> bool:
        """Whether somebody still reads a version."""
        with self._lock:
            return any(slot.holders for slot in self._versions.slots.values())

    # --- the publisher, on its loop --------------------------------------------------------

    async def write(self, laid: Laid, version: int, *, wait: bool) -> bool:
        """Publish a version; ``False``: readers have all buffers, and it was not to ``wait``.

        Cancelled, it ends when the tree is read no more, and nothing is published (OWN-1).

        Raises:
            ClosedError: The stream was closed.
            OutOfMemoryError: There is no room for another buffer.
        """
        ready = _device.record(laid.tensors)
        slot = await self._begin(laid, wait=wait)
        if slot is None:
            return False
        try:
            buffer = self._buffer(slot, laid)
            await wait_tensor_freed(buffer.tensors)  # a broken transfer may still be ending
            if not ready.done():
                await ready.wait()  # DEV-1
            await finish(self._runtime.workers.run(laid.copier(buffer.tensors)))
            sums = None
            if self._runtime.config.checksums:
                sums = await self._runtime.checks.sums_of(buffer.tensors)
            self._commit(slot, buffer, version, sums)
        except BaseException:
            with self._lock:
                self._versions.abandon(slot)
            self._wake_writers()
            raise
        return True

    async def _begin(self, laid: Laid, *, wait: bool) -> Slot | None:
        loop = asyncio.get_running_loop()
        while True:
            future: asyncio.Future[None] = loop.create_future()
            with self._lock:
                if self.closed:
                    raise ClosedError(f"{self._label} was closed")
                slot, ended = self._versions.begin(laid.signature)
                leases = self._leases(ended)
                if slot is None and wait:
                    self._writers.append((loop, future))
            self._runtime.registry.drop(leases)
            if slot is not None or not wait:
                return slot
            await future

    def _buffer(self, slot: Slot, laid: Laid) -> _Buffer:
        for number in self._buffers.keys() - self._versions.slots.keys():
            del self._buffers[number]
        buffer = self._buffers.get(slot.number)
        if buffer is None:
            tensors = laid.buffers()
            buffer = _Buffer(tensors, laid.skeleton, laid.describe(tensors))
            self._buffers[slot.number] = buffer
        elif buffer.skeleton != laid.skeleton:
            buffer.skeleton = laid.skeleton
            buffer.described = laid.describe(buffer.tensors)
            buffer.generation += 1
        return buffer

    def _commit(self, slot: Slot, buffer: _Buffer, version: int, sums: list[bytes] | None) -> None:
        registry = self._runtime.registry
        export = registry.begin(buffer.tensors, f"{self._label}, version {version}", _device.DONE)
        export.sums = sums
        buffer.key = export.key
        buffer.leases = tuple((export.key, number) for number in range(len(export.groups)))
        registry.commit(export, buffer.leases)
        with self._lock:
            if self.closed:
                leases = buffer.leases
                self._versions.abandon(slot)
            else:
                leases = self._leases(self._versions.commit(slot, version))
        registry.drop(leases)
        if self.closed:
            raise ClosedError(f"{self._label} was closed")
        post(self._runtime.io.loop, self._wake_readers)
        self._wake_writers()

    def _leases(self, ended: Iterable[Slot]) -> tuple[object, ...]:
        """Of versions that have ended: to be dropped, without the lock."""
        return tuple(lease for slot in ended for lease in self._buffers[slot.number].leases)

    def close(self) -> None:
        """Give out no version any more; those that are being read stay until they have been."""
        with self._lock:
            self.closed = True
            leases = self._leases(self._versions.close())
        self._runtime.registry.drop(leases)
        post(self._runtime.io.loop, self._wake_readers)
        self._wake_writers()

    # --- readers, on the io loop -----------------------------------------------------------

    async def take(self, holder: Holder, after: int) -> Offer | None:
        """The newest version, held, once it is later than ``after``; ``None``: it has closed."""
        while True:
            with self._lock:
                if self.closed:
                    return None
                slot = self._versions.take(holder, after)
                if slot is not None:
                    buffer = self._buffers[slot.number]
                    return Offer(
                        slot.version,
                        slot.number,
                        buffer.generation,
                        buffer.key,
                        len(buffer.described),
                    )
            future = asyncio.get_running_loop().create_future()
            self._readers.add(future)
            try:
                await future
            finally:
                self._readers.discard(future)

    def described(self, number: int, generation: int) -> bytes:
        """The description of a buffer whose version is held.

        Raises:
            TensorFreedError: It is not.
        """
        with self._lock:
            buffer = self._buffers.get(number)
            if buffer is None or buffer.generation != generation:
                raise TensorFreedError(f"{self._label} has let go of that version")
            return buffer.described

    def tensors(self, number: int) -> list[torch.Tensor]:
        """The tensors of a version that is held."""
        return self._buffers[number].tensors

    def done(self, holder: Holder) -> bool:
        """A reader lets go; whether it has held a version until now."""
        with self._lock:
            held, ended = self._versions.done(holder)
            leases = self._leases(ended)
        self._let_go(leases, held)
        return held

    def lost(self, reader: bytes) -> None:
        """A reader is gone."""
        with self._lock:
            leases = self._leases(self._versions.lost(reader))
        self._let_go(leases, True)  # noqa: FBT003

    def _let_go(self, leases: tuple[object, ...], held: bool) -> None:  # noqa: FBT001
        self._runtime.registry.drop(leases)
        if held:
            self._wake_writers()

    def _wake_readers(self) -> None:
        for future in self._readers:
            settle(future, None, None)

    def _wake_writers(self) -> None:
        with self._lock:
            writers, self._writers = self._writers, []
        for loop, future in writers:
            post(loop, settle, future, None, None)


def fields(offer: Offer | None) -> Any:  # noqa: ANN401
    """An offer as what msgpack takes."""
    return None if offer is None else list(offer)
