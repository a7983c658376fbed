"""The connection between the two ends of a channel, read and written on a user's own loop.

An end that waits lets its loop watch the socket; nothing else does, so that an item costs no
way over another thread. While an end does not wait, what arrives stays in the socket: there is
credit for all of it.

Invariants:
    LIN-1  Frames go out whole and in order, whoever is cancelled meanwhile.
    LIN-2  A socket is watched by one loop at a time, and closed when none does.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiordt._errors import ProtocolViolationError
from aiordt._progress import post
from aiordt._types import KIB
from aiordt._wire import Sealer
from aiordt.channels._frames import Parser

if TYPE_CHECKING:
    from collections.abc import Callable

_RECEIVE_NBYTES: Final = 64 * KIB


class Line:
    """One connection. Its methods are called by one thread at a time, but for `shut`.

    Args:
        sock: Connected; taken over.
        outgoing: Key for what is sent.
        incoming: Key for what is received.

    Attributes:
        ended: Why nothing more will come; empty: something may.
    """

    def __init__(self, sock: socket.socket, outgoing: bytes, incoming: bytes) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._fd = sock.fileno()
        self._sealer = Sealer(outgoing)
        self._parser = Parser(Sealer(incoming))
        self._unsent: deque[bytes | memoryview] = deque()
        self._reading: asyncio.AbstractEventLoop | None = None
        self._writing: asyncio.AbstractEventLoop | None = None
        self._flushed: list[asyncio.Future[None]] = []
        self._closing = False
        self.ended = ""

    # --- reading -----------------------------------------------------------------------------

    def receive(self) -> list[tuple[int, bytes]]:
        """The frames that are here now; never waits. Says in `ended` if they are the last."""
        if self._fd < 0:
            return []
        try:
            data = self._sock.recv(_RECEIVE_NBYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as exc:
            self._over(exc.strerror or str(exc))
            return []
        if not data:
            self._over("its connection ended")
            return []
        frames: list[tuple[int, bytes]] = []
        try:
            frames.extend(self._parser.feed(data))
        except ProtocolViolationError as exc:
            self._over(str(exc))
        return frames

    def _over(self, why: str) -> None:
        self.ended = self.ended or why
        self.unwatch()

    def watch(self, ready: Callable[[], object]) -> None:
        """Call ``ready`` on the running loop while there is something to read. Idempotent."""
        loop = asyncio.get_running_loop()
        if self._fd < 0 or self._reading is loop:
            return
        self.unwatch()
        self._reading = loop
        loop.add_reader(self._fd, ready)

    def unwatch(self) -> None:
        """Stop that."""
        loop, self._reading = self._reading, None
        if loop is not None:
            _on(loop, loop.remove_reader, self._fd)

    # --- writing -----------------------------------------------------------------------------

    def send(self, payload: bytes) -> None:
        """Send a frame, now or as soon as the other end takes it (LIN-1). Lost if it is gone."""
        data: bytes | memoryview = self._sealer.seal(payload)
        if self._fd < 0:
            return
        if not self._unsent:
            data = self._sent(data)
            if not data:
                return
        self._unsent.append(data)
        if self._writing is None:
            self._writing = asyncio.get_running_loop()
            self._writing.add_writer(self._fd, self._flush)

    def _sent(self, data: bytes | memoryview) -> bytes | memoryview:
        """Send what the socket takes; the rest."""
        try:
            count = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return data
        except OSError:
            return b""  # whoever reads sees it, too
        return b"" if count == len(data) else memoryview(data)[count:]

    def _flush(self) -> None:
        while self._unsent:
            rest = self._sent(self._unsent[0])
            if rest:
                self._unsent[0] = rest
                return
            self._unsent.popleft()
        self._stop_writing()
        if self._closing:
            self._close()

    def _stop_writing(self) -> None:
        loop, self._writing = self._writing, None
        if loop is not None:
            _on(loop, loop.remove_writer, self._fd)
        flushed, self._flushed = self._flushed, []
        for future in flushed:
            if not future.done():
                future.set_result(None)

    @property
    def congested(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._unsent)

    async def flushed(self) -> None:
        """Wait until all has been sent, or the line is closed."""
        if self._unsent:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._flushed.append(future)
            await future

    # --- the end -----------------------------------------------------------------------------

    def shut(self) -> None:
        """The other process is lost: let whoever reads or writes see it. Any thread."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, once all has been sent. Idempotent."""
        self._closing = True
        self.unwatch()
        if not self._unsent:
            self._close()

    def _close(self) -> None:
        """LIN-2: the loop forgets the number before somebody else's socket gets it."""
        self._unsent.clear()
        self.unwatch()
        self._stop_writing()
        self._fd = -1
        self.ended = self.ended or "it was closed"
        self._sock.close()

    def abandon(self) -> None:
        """Close it at once. Idempotent."""
        self._close()

    def hand_over(self) -> None:
        """Let another loop have it: no loop watches it from here on."""
        self.unwatch()
        if self._writing is not None:
            loop, self._writing = self._writing, None
            _on(loop, loop.remove_writer, self._fd)

    def take_over(self) -> None:
        """Go on with what `hand_over` left, on the running loop."""
        if self._unsent and self._fd >= 0:
            self._writing = asyncio.get_running_loop()
            self._writing.add_writer(self._fd, self._flush)


def _on(loop: asyncio.AbstractEventLoop, function: Callable[[int], object], number: int) -> None:
    """Call a loop's function on that loop; at once, if it is the running one."""
    if loop.is_closed():
        return
    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        function(number)
    else:
        post(loop, function, number)
