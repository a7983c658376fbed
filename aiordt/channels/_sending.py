"""The sending end: an item is copied into a buffer, and its receivers are told where it is.

Invariants:
    SND-1  An item is sent to all receivers or, if `send` is cancelled, to none.
    SND-2  Items are sent in the order of the calls.
    SND-3  A receiver that died ends the channel; one that left does not, as long as there are
           others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from aiordt import _device
from aiordt._errors import AiordtError, ClosedError, ProtocolViolationError
from aiordt._progress import finish, post
from aiordt._types import KIB, MIB
from aiordt.channels import _frames
from aiordt.channels._end import End
from aiordt.channels._frames import Item
from aiordt.channels._items import Packed, copy
from aiordt.channels._line import Line
from aiordt.channels._ring import Ring, Slot
from aiordt.transports._job import Job, copy_piece, pieces

if TYPE_CHECKING:
    import socket

    import torch

    from aiordt._exports import Export
    from aiordt._runtime import Runtime
    from aiordt.abc import Peer

_log = logging.getLogger(__name__)

#: Up to here an item is copied on the caller's loop (0.1 ms).
_COPY_ON_LOOP_NBYTES: Final = 1 * MIB
#: Up to here an item goes with its frame to a receiver that does not see the sender's memory.
_PAYLOAD_NBYTES: Final = 16 * KIB
_WARN_SECONDS: Final = 10.0
#: The receivers are not listened to for each item, as long as so little credit is in use ...
_UNHEARD_NBYTES: Final = 256 * KIB
#: ... for so long; to look costs 5 µs. Places just given back are used first, for the caches.
_UNHEARD_SECONDS: Final = 0.001


class _Receiver:
    """One of the receivers, as the sender knows it."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.label = "not there yet"
        self.peer: Peer | None = None  # ... and that process
        self.peer_id = b""
        self.far = False  # it does not see the sender's memory
        self.by_key = False  # it asks for buffers by key
        self.left = False
        self.error: AiordtError | None = None
        self.holds: set[int] = set()  # numbers of items that it has not done with


class Sending(End):
    """The sending end of one channel.

    Args:
        runtime: This process's.
        channel: The channel's id.
        name: Its name.
        capacity: Bytes of credit.
        count: How many receivers there are.
        maker: The process that brings them together.
    """

    def __init__(
        self,
        runtime: Runtime,
        channel: bytes,
        name: str,
        *,
        capacity: int,
        count: int,
        maker: bytes,
    ) -> None:
        super().__init__(runtime, name)
        self.channel = channel
        self.maker = maker
        self._receivers = [_Receiver() for _ in range(count)]
        self._ring = Ring(capacity, self._export, self._unexport)
        self._exports: dict[bytes, Export] = {}
        self._slots: dict[int, Slot] = {}
        self._number = 0
        self._order = asyncio.Lock()
        self._heard_at = -math.inf
        self._ready = False  # all receivers are there

    # --- who is there: on the io loop ------------------------------------------------------

    def expect(self, index: int, label: str, peer: Peer, way: str) -> None:
        """A receiver is about to connect."""
        receiver = self._receivers[index]
        receiver.label, receiver.peer = label, peer
        receiver.peer_id = peer.address.runtime_id
        receiver.far = way != "shm"
        receiver.by_key = way not in {"shm", "cma"}

    def attach(self, index: int, peer_id: bytes, sock: socket.socket, secret: bytes) -> bool:
        """A receiver has connected; whether it may."""
        receiver = self._receivers[index]
        if receiver.peer_id != peer_id or receiver.line is not None or self.over is not None:
            return False
        items, credits_ = _frames.keys(secret, self.channel, index + 1)
        receiver.line = Line(sock, items, credits_)
        self.wake_from_afar()
        return True

    def miss(self, index: int, error: AiordtError) -> None:
        """A receiver will not come."""
        receiver = self._receivers[index]
        if receiver.line is None and receiver.error is None:
            receiver.error = error
            self.wake_from_afar()

    @override
    def peer_lost(self, peer_id: bytes) -> None:
        for index, receiver in enumerate(self._receivers):
            if receiver.line is not None:
                if receiver.peer_id == peer_id:
                    receiver.line.shut()
            elif peer_id in {self.maker, receiver.peer_id}:
                gone = "a receiver" if peer_id == receiver.peer_id else "the process that made it"
                error = ClosedError(
                    f"channel {self.name!r}: {gone} died before all its ends were there"
                )
                self.miss(index, error)

    # --- buffers ---------------------------------------------------------------------------

    def _export(self, buffer: torch.Tensor) -> bytes:
        if not any(receiver.by_key for receiver in self._receivers):
            return b""
        export = self._runtime.registry.begin([buffer], f"channel {self.name!r}")
        self._exports[export.key] = export
        return export.key

    def _unexport(self, key: bytes) -> None:
        self._runtime.registry.abandon(self._exports.pop(key))

    def buffer(self, number: int) -> torch.Tensor:
        """A buffer, for a receiver in this process."""
        return self._ring.buffers[number].tensor

    # --- sending -----------------------------------------------------------------------------

    async def send(self, tree: object) -> None:
        """See `aiordt.channels.Sender.send`."""
        self.check()
        packed = Packed(tree)
        self.enter()
        try:
            async with self._order:  # SND-2
                await self.fair()
                slot = await self._room(packed)
                try:
                    if slot.buffer is not None:
                        await self._fill(packed, slot.buffer.tensor, slot.offset)
                    self.check()
                except BaseException:
                    if self.over is None:
                        self._ring.give(slot)
                    raise
                self._tell(packed, slot)
        finally:
            self.leave()

    async def _room(self, packed: Packed) -> Slot:
        """Wait for all receivers, for their sockets, and for credit."""
        now = time.monotonic()
        if self._ring.used > _UNHEARD_NBYTES or now - self._heard_at > _UNHEARD_SECONDS:
            self._heard_at = now
            self._hear()
        await self._check()
        return self._taken(packed) or await self._awaited(packed)

    def _taken(self, packed: Packed) -> Slot | None:
        if not self._ready or self._congested:
            return None
        return self._ring.take(packed.nbytes, len(packed.rest))

    async def _awaited(self, packed: Packed) -> Slot:
        loop = asyncio.get_running_loop()
        warning = loop.call_later(_WARN_SECONDS, self._warn)
        try:
            while True:
                self.check()  # once it is over, another thread hears
                self._hear()
                await self._check()
                slot = self._taken(packed)
                if slot is not None:
                    return slot
                for receiver in self._receivers:
                    if receiver.line is not None and not receiver.line.ended:
                        receiver.line.watch(self.wake)
                await self._wait_for_change()
        finally:
            warning.cancel()
            self._unwatch()

    async def _wait_for_change(self) -> None:
        congested = [
            receiver.line
            for receiver in self._receivers
            if receiver.line is not None and receiver.line.congested
        ]
        if congested:
            await congested[0].flushed()
        else:
            await self.wait()

    @property
    def _congested(self) -> bool:
        return any(
            receiver.line is not None and receiver.line.congested for receiver in self._receivers
        )

    def _unwatch(self) -> None:
        for receiver in self._receivers:
            if receiver.line is not None:
                receiver.line.unwatch()

    def _warn(self) -> None:
        waiting = [
            receiver.label
            for receiver in self._receivers
            if (receiver.holds or receiver.line is None) and not receiver.left
        ]
        _log.warning(
            "channel %r: send() has waited %d s for credit: %d of %d bytes are in use by items "
            "that these receivers have not taken, or hold: %s",
            self.name, _WARN_SECONDS, self._ring.used, self._ring.capacity, "; ".join(waiting),
        )  # fmt: skip

    async def _check(self) -> None:
        """See who is there.

        Raises:
            AiordtError: Nobody is any more, or one has died (SND-3).
        """
        self.check()
        ready = True
        for receiver in self._receivers:
            line = receiver.line
            if receiver.left:
                continue
            if receiver.error is None and line is not None and line.ended:
                receiver.error = await self.verdict(
                    receiver.peer, receiver.label, "receiver", line.ended
                )
            if receiver.error is not None:
                self._end(receiver.error)
                raise receiver.error
            ready = ready and line is not None
        if all(receiver.left for receiver in self._receivers):
            error = ClosedError(f"channel {self.name!r}: nobody receives any more: all have closed")
            self._end(error)
            raise error
        self._ready = ready

    async def _fill(self, packed: Packed, target: torch.Tensor, start: int) -> None:
        """Copy the tensors; no thread is at it any more when this returns or raises."""
        if not packed.on_host:
            tensors = packed.tensors
            await _device.record(tensors).wait()
            dtypes = [tensor.dtype for tensor in tensors]
            packed.tensors = await _device.stage(tensors, dtypes, self._runtime.workers)
        moves = packed.pieces(target, start)
        if packed.nbytes <= _COPY_ON_LOOP_NBYTES:
            copy(moves)
            if len(moves) < len(packed.tensors):
                packed.lay_out(target, start)
            return
        job = Job((piece for move in moves for piece in pieces(*move)), copy_piece, "channel.copy")
        await finish(job.start(self._runtime.workers, 2), job.stop)
        if len(moves) < len(packed.tensors):
            await finish(self._runtime.workers.run(lambda: packed.lay_out(target, start)))

    def _tell(self, packed: Packed, slot: Slot) -> None:
        """SND-1: from here on nothing is awaited."""
        self._number = number = self._number + 1
        buffer = slot.buffer
        place = None if buffer is None else buffer.place
        item = Item(number, slot.offset, tuple(packed.metas), packed.rest, place)
        near = far = None
        for index, receiver in enumerate(self._receivers):
            if receiver.left or receiver.line is None:
                continue
            if receiver.far and buffer is not None and packed.nbytes <= _PAYLOAD_NBYTES:
                if far is None:
                    bytes_ = buffer.tensor[slot.offset : slot.offset + packed.nbytes]
                    far = _frames.pack_item(
                        item._replace(place=None, payload=bytes_.numpy().tobytes())
                    )
                frames = far
            else:
                if near is None:
                    near = _frames.pack_item(item)
                frames = near
            slot.waiting.add(index)
            receiver.holds.add(number)
            for frame in frames:
                receiver.line.send(frame)
        self._slots[number] = slot

    # --- hearing -----------------------------------------------------------------------------

    def _hear(self) -> None:
        """Act on what the receivers have said."""
        for index, receiver in enumerate(self._receivers):
            line = receiver.line
            while line is not None and not line.ended:
                frames = line.receive()
                if not frames:
                    break
                try:
                    for kind, body in frames:
                        self._heard(index, receiver, kind, body)
                except ProtocolViolationError as exc:
                    line.ended = str(exc)

    def _heard(self, index: int, receiver: _Receiver, kind: int, body: bytes) -> None:
        numbers = _frames.unpack_numbers(body)
        if kind == _frames.CREDIT:
            self._done(index, receiver, numbers)
        elif kind == _frames.LEAVE:
            receiver.left = True
            self._done(index, receiver, receiver.holds.difference(numbers))
        else:
            raise ProtocolViolationError(f"unknown frame {kind} of a receiver")

    def _done(self, index: int, receiver: _Receiver, numbers: list[int] | set[int]) -> None:
        for number in numbers:
            slot = self._slots.get(number)
            receiver.holds.discard(number)
            if slot is None:
                continue
            slot.waiting.discard(index)
            if not slot.waiting:
                del self._slots[number]
                self._ring.give(slot)

    # --- the end -----------------------------------------------------------------------------

    async def aclose(self, error: BaseException | None = None) -> None:
        """See `aiordt.channels.Sender.aclose`."""
        if self.over is not None:
            return
        self.enter()
        try:
            why = "" if error is None else f"{type(error).__name__}: {error}"
            self._end(ClosedError(f"channel {self.name!r} was closed here"), why)
        finally:
            self.leave()

    def _end(self, error: AiordtError, why: str | None = None) -> None:
        """Refuse what comes now, and tell the receivers; ``why`` is ``None`` if one has died."""
        if self.over is not None:
            return
        self.over = error
        said = str(error) if why is None else why
        for receiver in self._receivers:
            if receiver.line is not None and not receiver.line.ended:
                receiver.line.send(_frames.pack_end(said))
            if receiver.line is not None:
                receiver.line.hand_over()
        self.wake()
        post(self._runtime.io.loop, self._linger)

    def give_up(self, error: AiordtError) -> None:
        """It is over, as the process that made it says. On the io loop."""
        for index in range(len(self._receivers)):
            self.miss(index, error)
        for receiver in self._receivers:
            if receiver.line is not None:
                receiver.line.shut()

    @override
    def _leave_loop(self) -> None:
        for receiver in self._receivers:
            if receiver.line is not None:
                receiver.line.hand_over()
                receiver.line.take_over()
        self._order = asyncio.Lock()  # a lock is of one loop

    def _linger(self) -> None:
        """Keep the buffers for as long as a receiver may look at them. On the io loop."""
        for receiver in self._receivers:
            if receiver.line is not None:
                receiver.line.take_over()
        self._listen()

    def _listen(self) -> None:
        self._hear()
        waiting = False
        for receiver in self._receivers:
            line = receiver.line
            if line is None:
                continue
            if line.ended or (not receiver.holds and (receiver.left or not line.congested)):
                line.close() if not line.ended else line.abandon()
            else:
                waiting = True
                line.watch(self._listen)
        if not waiting:
            self._ring.close()
            self._slots.clear()

    def close(self) -> None:
        """The runtime ends. On the io loop."""
        if self.over is None:
            self.over = ClosedError(f"channel {self.name!r}: aiordt's runtime was closed")
        for receiver in self._receivers:
            if receiver.line is not None:
                receiver.line.shut()
        self.wake_from_afar()
