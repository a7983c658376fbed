"""The receiving end: items are looked at in their sender's memory, or read from there.

On the sender's host an item's tensors are that memory itself, mapped read-only; they are good
until the next item is asked for, or for as long as they exist if they are held. From farther
away, and where copies are asked for, an item is read into memory of this process, some ahead.

Invariants:
    RCV-1  An item that was cancelled while it was waited for is the next one that comes.
    RCV-2  What arrived before the end is given out first; what arrived before the sender's
           death, too, as far as its bytes are here or its memory was looked at before.
    RCV-3  Memory that is held is not written to for as long as a tensor on it exists.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from aiordt._errors import (
    AiordtError,
    ClosedError,
    OwnerDiedError,
    PeerLostError,
    ProtocolViolationError,
    TransferError,
)
from aiordt._layout import Cut
from aiordt._memory import lend, view_memory
from aiordt._progress import post
from aiordt.abc import Part
from aiordt.channels import _frames
from aiordt.channels._end import End
from aiordt.channels._items import in_memory, num_bytes, on_memory, rebuilt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import torch

    from aiordt._runtime import Runtime
    from aiordt.abc import Link, Peer
    from aiordt.channels._frames import Item, Place
    from aiordt.channels._line import Line

#: Items that are read before anybody asks for them.
_AHEAD: Final = 4


class _Shown:
    """An item that is looked at in its sender's memory: the home of its tensors."""

    __slots__ = ("buffer", "gone", "held", "let_go", "number")

    def __init__(self, number: int, buffer: torch.Tensor, let_go: Callable[[int], object]) -> None:
        self.number = number
        self.buffer = buffer  # its mapping outlives every tensor on it
        self.let_go = let_go
        self.held = False
        self.gone = False

    def take_back(self, block: object) -> None:  # noqa: ARG002
        """See `aiordt._memory.Home`: no tensor of the item is left."""
        self.gone = True
        if self.held:
            self.let_go(self.number)


class _Waiting:
    """An item that has arrived, and whose bytes may be under way."""

    __slots__ = ("buffer", "here", "item", "task", "tensors")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.buffer: torch.Tensor | None = None  # that it can be looked at in
        self.tensors: list[torch.Tensor] = []  # that it is read into
        self.here = item.place is None  # nothing is to be read
        self.task: asyncio.Task[None] | None = None  # that reads it


class Receiving(End):
    """The receiving end of one channel.

    Args:
        runtime: This process's.
        name: The channel's name.
        line: To the sender.
        label: Who that is.
        peer: That process; ``None``: this one.
        way: Name of the transport by which its memory is seen or read.
        link: To that memory.
        opened: Gives a buffer of the sender, where it can be seen; else ``None``.
    """

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        line: Line,
        *,
        label: str,
        peer: Peer | None,
        way: str,
        link: Link | None,
        opened: Callable[[Place], Awaitable[torch.Tensor]] | None,
    ) -> None:
        super().__init__(runtime, name)
        self._line = line
        self._label = label
        self._peer = peer
        self._way = way
        self._link = link
        self._opened = opened
        self._pieces = bytearray()
        self._items: deque[_Waiting] = deque()
        self._buffers: dict[int, torch.Tensor] = {}
        self._last: _Shown | None = None
        self._holding: set[int] = set()
        self._end: AiordtError | None = None
        self._clean = False  # it ended as it should
        self._order = asyncio.Lock()

    # --- receiving -------------------------------------------------------------------------

    async def recv(self) -> Any:  # noqa: ANN401
        """See `aiordt.channels.Receiver.recv`."""
        self.check()
        self.enter()
        try:
            async with self._order:
                await self.fair()
                self._release()
                waiting = await self._next()
                await self._made_ready(waiting)
                self.check()
                self._items.popleft()  # RCV-1: nothing is awaited from here on
                return self._given(waiting)
        finally:
            self.leave()

    @property
    def ended_well(self) -> bool:
        """Whether the sender closed the channel, and all it sent has been received."""
        return self._clean and not self._items

    async def _next(self) -> _Waiting:
        while not self._items:
            if self._end is None and not self._hear():
                if self._line.ended:
                    self._end = await self.verdict(
                        self._peer, self._label, "sender", self._line.ended
                    )
                else:
                    self._line.watch(self._arrived)
                    await self.wait()
            self.check()
            if self._end is not None and not self._items:  # RCV-2
                self._finish(self._end)
                self.check()
        if self._opened is None:
            self._read_ahead()
        return self._items[0]

    def _arrived(self) -> None:
        """The loop sees something to read."""
        if self._waiter is None:
            self._line.unwatch()  # nobody waits: it may stay in the socket
            return
        self._hear()
        self.wake()

    def _hear(self) -> bool:
        """Take in what has arrived; whether there was anything."""
        try:
            frames = self._line.receive()
            for kind, body in frames:
                self._heard(kind, body)
        except ProtocolViolationError as exc:
            self._line.ended = str(exc)
            return False
        return bool(frames)

    def _heard(self, kind: int, body: bytes) -> None:
        if kind == _frames.MORE:
            self._pieces += body
        elif kind == _frames.ITEM:
            item = _frames.unpack_item(body, bytes(self._pieces))
            self._pieces.clear()
            self._items.append(_Waiting(item))
        elif kind == _frames.END:
            why = body.decode(errors="replace")
            self._clean = not why
            said = f"its sender, {self._label}, " + (f"ended it: {why}" if why else "closed it")
            self._end = ClosedError(f"channel {self.name!r}: {said}")
        else:
            raise ProtocolViolationError(f"unknown frame {kind} of a sender")

    async def _made_ready(self, waiting: _Waiting) -> None:
        """Have the bytes where tensors can be made of them."""
        place = waiting.item.place
        if place is not None and self._opened is not None:
            waiting.buffer = self._buffers.get(place.number)
            if waiting.buffer is None:
                try:
                    waiting.buffer = await self._opened(place)
                except AiordtError as exc:
                    raise await self._failed(exc) from exc
                self._keep(place.number, waiting.buffer)
        if self._opened is not None or waiting.here:
            return
        if waiting.task is None:
            waiting.task = asyncio.get_running_loop().create_task(self._read(waiting))
        await asyncio.wait({waiting.task})  # cancelled, the task goes on (RCV-1)
        self.check()  # it may have been closed, and the task cancelled
        try:
            waiting.task.result()
        except AiordtError as exc:
            raise await self._failed(exc) from exc

    async def _failed(self, exc: AiordtError) -> AiordtError:
        """The sender's memory cannot be seen or read: it is over."""
        error = exc
        if isinstance(exc, OwnerDiedError | PeerLostError | TransferError):
            error = await self.verdict(self._peer, self._label, "sender", str(exc))
        self.check()
        self._finish(error)
        return error

    def _keep(self, number: int, buffer: torch.Tensor) -> None:
        """Remember a buffer, and forget those that have been replaced by it."""
        self._buffers[number] = buffer
        while len(self._buffers) > 8:  # buffers for one item each come and go
            del self._buffers[next(other for other in self._buffers if other != number)]

    def _given(self, waiting: _Waiting) -> Any:  # noqa: ANN401
        """The item itself."""
        item, buffer = waiting.item, waiting.buffer
        if buffer is not None:
            shown = _Shown(item.number, buffer, self._let_go_from_afar)
            room = buffer.nbytes - item.offset
            lent = lend(buffer.data_ptr() + item.offset, shown, item.number)
            self._last = shown
            return rebuilt(item.rest, item.metas, on_memory(item.metas, lent, room), seen=True)
        tensors = waiting.tensors
        if item.place is None:
            tensors = self._unpacked(item, item.payload or b"")
            self._credit([item.number])
        return rebuilt(item.rest, item.metas, tensors, seen=False)

    def _unpacked(self, item: Item, payload: bytes) -> list[torch.Tensor]:
        tensors, reads = in_memory(item.metas, self._runtime.pool.empty)
        for offset, nbytes, tensor in reads:
            target = view_memory(tensor.data_ptr(), nbytes, writable=True)
            target[:] = payload[offset : offset + nbytes]
        if payload:
            self._runtime.counters.pulled(self._way, len(tensors), len(payload))
        return tensors

    # --- reading from afar -------------------------------------------------------------------

    def _read_ahead(self) -> None:
        """Have the first items' bytes on their way."""
        for number in range(min(_AHEAD, len(self._items))):
            waiting = self._items[number]
            if not waiting.here and waiting.task is None and not self._read_at_once(waiting):
                waiting.task = asyncio.get_running_loop().create_task(self._read(waiting))

    def _parts(self, waiting: _Waiting) -> list[Part]:
        item = waiting.item
        place = item.place
        assert place is not None  # noqa: S101  (else it is here)
        waiting.tensors, reads = in_memory(item.metas, self._runtime.pool.empty)
        return [
            Part(
                place.key,
                0,
                place.address + item.offset + offset,
                tensor.data_ptr(),
                nbytes,
                Cut(item.offset + offset, (nbytes,), (1,), 1),
                place.segment,
                "cpu",
                tensor,
            )
            for offset, nbytes, tensor in reads
        ]

    def _read_at_once(self, waiting: _Waiting) -> bool:
        """Read what takes only microseconds."""
        place, link = waiting.item.place, self._link
        if place is None or link is None or not link.nowait_nbytes:
            return False
        if num_bytes(waiting.item.metas) > link.nowait_nbytes:
            return False
        parts = self._parts(waiting)
        try:
            if not link.read_nowait(parts):
                return False
        except AiordtError:
            return False  # the task says it
        self._has_read(waiting, parts)
        return True

    async def _read(self, waiting: _Waiting) -> None:
        link = self._link
        assert link is not None  # noqa: S101  (there is one where nothing is seen)
        parts = self._parts(waiting)
        await link.read(parts)
        self._has_read(waiting, parts)

    def _has_read(self, waiting: _Waiting, parts: list[Part]) -> None:
        waiting.here = True
        nbytes = sum(part.nbytes for part in parts)
        self._runtime.counters.pulled(self._way, len(parts), nbytes)
        self._credit([waiting.item.number])

    # --- giving back -------------------------------------------------------------------------

    def _credit(self, numbers: list[int]) -> None:
        if not self._line.ended:
            self._line.send(_frames.pack_credit(numbers))

    def _release(self) -> None:
        """The item before is not looked at any more, unless it is held."""
        last, self._last = self._last, None
        if last is not None and not last.held:
            self._credit([last.number])

    def hold(self) -> None:
        """See `aiordt.channels.Receiver.hold`."""
        last = self._last
        if last is None or last.held:
            return
        self._holding.add(last.number)
        last.held = True
        if last.gone:
            self._let_go(last.number)

    def _let_go_from_afar(self, number: int) -> None:
        """No tensor of a held item is left: any thread, at any moment."""
        loop = self._loop
        if loop is None or loop.is_closed():
            loop = self._runtime.io.loop
        post(loop, self._let_go, number)

    def _let_go(self, number: int) -> None:
        if number in self._holding:
            self._holding.discard(number)
            self._credit([number])
            if self.over is not None and not self._holding:
                self._line.close()

    # --- the end -----------------------------------------------------------------------------

    async def aclose(self) -> None:
        """See `aiordt.channels.Receiver.aclose`."""
        if self.over is not None:
            return
        self.enter()
        self.leave()
        self._finish(ClosedError(f"channel {self.name!r} was closed here"))

    def _finish(self, error: AiordtError) -> None:
        self.over = error
        self._last = None if self._last is None or not self._last.held else self._last
        for waiting in self._items:
            if waiting.task is not None:
                waiting.task.cancel()
        self._items.clear()
        self._buffers.clear()
        self.wake()
        if not self._line.ended:
            self._line.send(_frames.pack_leave(sorted(self._holding)))
        if self._holding and not self._line.ended:
            self._line.hand_over()
            self._loop = self._runtime.io.loop
            post(self._loop, self._line.take_over)
        else:
            self._line.close()

    @override
    def peer_lost(self, peer_id: bytes) -> None:
        if self._peer is not None and self._peer.address.runtime_id == peer_id:
            self._line.shut()

    @override
    def _leave_loop(self) -> None:
        self._line.hand_over()
        self._line.take_over()
        self._order = asyncio.Lock()  # a lock is of one loop

    def give_up(self, error: AiordtError) -> None:
        """It is over, as the process that made it says. On the io loop."""
        self._end = self._end or error
        self._line.shut()

    def close(self) -> None:
        """The runtime ends. On the io loop."""
        self.over = self.over or ClosedError(f"channel {self.name!r}: aiordt's runtime was closed")
        self._line.shut()
        self.wake_from_afar()
