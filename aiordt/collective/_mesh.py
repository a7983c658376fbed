"""A socket between each two members of a group, and the thread that reads them.

Frames are small, and keep their order between two members. They are sent from whatever thread
has something to say, so that a call costs no hop before its words are out; one thread sleeps
until something arrives, and acts on it. While a loop only waits for what comes here, it reads
by itself, which saves the way over the thread: 50 of some 300 µs on 2 cores. It keeps the sockets
between its calls, too: who is ahead speaks while we are between two, and a thread that wakes up
for that wants the GIL just when the loop needs it (8 B, 2 members: 62 µs instead of 200). A loop
that has become busy meanwhile loses the sockets to the thread again.

To wake a process that sleeps costs 50 to 100 µs more. So a loop that did not have to wait for long
the last time looks again and again at first, between whatever else it has to do, and lets others
have its core where they want it.

The sockets are in one epoll descriptor, which two others watch: that of the thread, and that
of the loop. Who reads is changed by a system call that wakes nobody.

Invariants:
    MSH-1  Frames of a member are read by one thread at a time, in their order.
    MSH-2  While a loop has the sockets, the thread looks after them every `_LOOK_SECONDS`, and
           takes them back from one that has not begun a call for so long.
    MSH-3  A loop looks without sleeping for `_SPIN_SECONDS` at most in a wait, only if the last
           wait was no longer, and only while nobody else wants its core.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from aiordt._progress import post, yield_core
from aiordt._types import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_log = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("!IBqQ")
_RECEIVE_NBYTES: Final = 256 * KIB
#: How long a loop may have the sockets without a look of the thread ...
_LOOK_SECONDS: Final = 0.01
#: ... which goes on looking for so long after the last time: the next one may come soon.
_LOOKING_SECONDS: Final = 1.0
#: How long a loop looks without sleeping.
_SPIN_SECONDS: Final = 300e-6
#: Yielding a core that nobody else wants takes less.
_YIELDED_SECONDS: Final = 20e-6
#: No frame is longer: payloads travel in pieces.
MAX_FRAME: Final = 8 * MIB


class Frame(NamedTuple):
    """What one member tells another.

    Attributes:
        kind: What about.
        lane: Which sequence of calls.
        number: Which call of it.
        body: The rest.
    """

    kind: int
    lane: int
    number: int
    body: bytes

    def head(self) -> bytes:
        """What goes before the body."""
        return _HEADER.pack(_HEADER.size + len(self.body), self.kind, self.lane, self.number)


class Listener(ABC):
    """What a mesh reports to, on its thread or on the loop that reads."""

    @abstractmethod
    def received(self, rank: int, frame: Frame) -> None:
        """A frame has come."""

    @abstractmethod
    def lost(self, rank: int, why: str) -> None:
        """The connection to a member has ended."""

    @abstractmethod
    def deadline(self) -> float | None:
        """For how many seconds nothing is due; ``None``: for ever. On the thread."""

    @abstractmethod
    def due(self) -> None:
        """Called after each turn of the thread, and when that time has passed."""

    @abstractmethod
    def due_here(self) -> None:
        """Called on the loop after it has read."""


class _Line:
    """The connection to one member."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank = rank
        self.sock = sock
        self.incoming = bytearray()
        self.outgoing: deque[memoryview] = deque()
        self.lock = threading.Lock()
        self.waiting = False  # for room to send; known to the selector

    def send(self, head: bytes, body: bytes) -> bool:
        """Send what there is room for; any thread. Whether that was all, or the end is gone."""
        with self.lock:
            sent = 0
            if not self.outgoing:
                try:
                    sent = self.sock.sendmsg((head, body))
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    return True  # the reading thread sees it, too
                if sent == len(head) + len(body):
                    return True
            self.outgoing.append(memoryview(head + body)[sent:])
            return False

    def close(self) -> None:
        """End it. Under the lock: another thread may be sending, and the number be used again."""
        with self.lock:
            self.outgoing.clear()
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()


class Mesh:
    """The connections of one member.

    Args:
        socks: To each other rank; taken over.
        name: Of the thread.
    """

    def __init__(self, socks: Mapping[int, socket.socket], name: str) -> None:
        self._lines = {rank: _Line(rank, sock) for rank, sock in socks.items()}
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._jobs_lock = threading.Lock()
        self._woken = False
        self._closing = False
        self._ended = False
        self._buffer = bytearray(_RECEIVE_NBYTES)
        self._reading = threading.Lock()  # MSH-1
        self._files = {line.sock.fileno(): line for line in self._lines.values()}
        for sock in (self._wake_reader, self._wake_writer, *socks.values()):
            sock.settimeout(0)
        self._poll = select.epoll()
        for number in self._files:
            self._poll.register(number, select.EPOLLIN)
        self._of_thread, self._of_loop = select.epoll(), select.epoll()
        self._of_thread.register(self._wake_reader, select.EPOLLIN)
        self._of_thread.register(self._poll.fileno(), select.EPOLLIN)
        self._of_loop.register(self._poll.fileno(), 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._borrowing = threading.Lock()
        self._borrowers = 0
        self._borrowed_at: float | None = None
        self._looks_until = 0.0
        self._looks_at = math.inf  # the thread, the next time
        self._waits_since = 0.0  # of the first borrower
        self._spins_until = 0.0
        self._spinning = False
        self._soon = False  # whether the last wait was short
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, listener: Listener) -> None:
        """Read until closed."""
        self._listener = listener
        self._thread.start()

    @property
    def on_thread(self) -> bool:
        """Whether the caller is the mesh's thread."""
        return threading.current_thread() is self._thread

    def send(self, ranks: Sequence[int], frame: Frame) -> None:
        """Send a frame to members; any thread. Lost if a member is."""
        head, body = frame.head(), frame.body
        for rank in ranks:
            line = self._lines.get(rank)
            if line is not None and not line.send(head, body):
                self.run(functools.partial(self._want_room, line))

    def is_there(self, rank: int) -> bool:
        """Whether a member's end is open, as far as is known here; costs a system call."""
        line = self._lines.get(rank)
        if line is None:
            return False
        with line.lock:
            if line.sock.fileno() < 0:
                return False
            poll = select.poll()
            poll.register(line.sock, select.POLLRDHUP)
            return not poll.poll(0)

    def run(self, job: Callable[[], None]) -> None:
        """Let the thread do ``job``; once it has ended, do it here."""
        with self._jobs_lock:
            ended = self._ended
            if not ended:
                self._jobs.append(job)
        if ended:
            job()
        else:
            self.wake()

    def wake(self) -> None:
        """Let the thread take a turn."""
        if not self._woken:
            self._woken = True
            with suppress(OSError):
                self._wake_writer.send(b"\0")

    def close(self) -> None:
        """End the thread, which sends what it can at once and closes the sockets."""
        self._closing = True
        self.wake()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end."""
        if self._thread.ident is not None and not self.on_thread:
            self._thread.join(timeout)

    # --- a loop that reads -------------------------------------------------------------------

    def look(self) -> bool:
        """Act on what has arrived, if the running loop may read; whether it may."""
        if self._loop is None:
            return True  # not yet known
        if self._ended or self._loop is not asyncio.get_running_loop():
            return False
        self._read_here()
        return True

    def borrow(self) -> bool:
        """Let the running loop read while it waits, unless it becomes busy.

        Returns:
            Whether it may; if so `give_back` ends the wait.
        """
        now = time.monotonic()
        self._looks_until = now + _LOOKING_SECONDS
        with self._borrowing:
            if self._ended or self._closing:
                return False
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
                self._loop.add_reader(self._of_loop.fileno(), self._read_here)
            elif self._loop is not asyncio.get_running_loop():
                return False
            if self._looks_at > now + 2 * _LOOK_SECONDS:  # MSH-2: from the next time on
                self.wake()
                return False
            if not self._borrowers:
                self._waits_since = now
            self._borrowers += 1
            if self._soon:
                self._spins_until = now + _SPIN_SECONDS
                if not self._spinning:
                    self._spinning = True
                    self._loop.call_soon(self._spin)
            if self._borrowed_at is None:
                self._of_loop.modify(self._poll.fileno(), select.EPOLLIN)
                self._of_thread.modify(self._poll.fileno(), 0)
            self._borrowed_at = now
        return True

    def give_back(self, *, keep: bool) -> None:
        """End a `borrow`; with ``keep`` the loop has the sockets until MSH-2, or `reclaim`."""
        with self._borrowing:
            self._borrowers -= 1
            if not self._borrowers:
                self._soon = time.monotonic() - self._waits_since < _SPIN_SECONDS
                if not keep:
                    self._take_back()

    def reclaim(self) -> None:
        """Let the thread read from now on, unless a loop waits."""
        if self._borrowed_at is not None:
            with self._borrowing:
                if not self._borrowers:
                    self._take_back()

    def _take_back(self) -> None:
        """Let the thread read. Under the lock."""
        if self._borrowed_at is not None and not self._ended:
            self._borrowed_at = None
            self._of_thread.modify(self._poll.fileno(), select.EPOLLIN)
            self._of_loop.modify(self._poll.fileno(), 0)

    def _spin(self) -> None:
        """Look, and again in the loop's next turn (MSH-3)."""
        now = time.monotonic()
        if self._borrowed_at is None or self._ended or now > self._spins_until:
            self._spinning = False
            return
        if not self._read_here():  # else those who wait come next
            yield_core()
            if time.monotonic() - now > _YIELDED_SECONDS:
                # Another had the core. Who sleeps is woken up on a core that is idle.
                self._spins_until = now
        assert self._loop is not None  # noqa: S101  (for the type checker)
        self._loop.call_soon(self._spin)

    def _read_here(self) -> bool:
        """Act on what has arrived; whether anything had."""
        if not self._reading.acquire(blocking=False):
            return False  # the thread does, at this moment
        some = False
        try:
            if not self._ended:
                some = self._read_all()
        except Exception:  # noqa: BLE001  (the group ends, and says so)
            self._failed()
        finally:
            self._reading.release()
        self._listener.due_here()
        return some

    def _failed(self) -> None:
        _log.exception("reading the messages of a group failed")
        self._listener.lost(-1, "reading its messages failed")

    def _leave_loop(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._of_loop.fileno())
            self._of_loop.close()  # not earlier: the loop may take its number for another file's

    # --- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self.turn(self._listener.deadline())
        except Exception:  # noqa: BLE001  (the group ends, and says so)
            self._failed()
        finally:
            with self._reading:
                for line in self._lines.values():
                    self._flush(line)
                    line.close()
                self._lines = {}
                with self._borrowing, self._jobs_lock:
                    self._ended = True
                self._poll.close()
                self._of_thread.close()
            if self._loop is None:
                self._of_loop.close()
            else:
                post(self._loop, self._leave_loop)
            while self._jobs:
                self._jobs.popleft()()
            self._listener.due()
            self._wake_reader.close()
            self._wake_writer.close()

    def turn(self, timeout: float | None) -> None:
        """Sleep until something happens, and act on it. On the thread."""
        now = time.monotonic()
        self._looks_at = math.inf  # before it is decided: `borrow` looks at it last
        if self._borrowed_at is not None or now < self._looks_until:
            timeout = _LOOK_SECONDS if timeout is None else min(timeout, _LOOK_SECONDS)
            self._looks_at = now + timeout
        for number, _ in self._of_thread.poll(timeout):
            if number == self._poll.fileno():
                with self._reading:
                    self._read_all()
                continue
            with suppress(BlockingIOError):
                self._wake_reader.recv(64)
            # After it, lest it takes the byte of a later wake-up that then is lost; before
            # looking for jobs, so that later ones wake again.
            self._woken = False
        self._look()
        while self._jobs:
            self._jobs.popleft()()
        self._listener.due()

    def _look(self) -> None:
        """Take the sockets back from a loop that has not called for long: it may be busy."""
        with self._borrowing:
            since = self._borrowed_at
            if since is not None and time.monotonic() - since > _LOOK_SECONDS:
                self._take_back()

    def _read_all(self) -> bool:
        """Act on what has arrived; whether anything had."""
        found = self._poll.poll(0)
        for number, events in found:
            line = self._files.get(number)
            if line is None:
                continue
            if events & select.EPOLLOUT:
                self._flush(line)
            if events & ~select.EPOLLOUT:
                self._read(line)
        return bool(found)

    def _want_room(self, line: _Line) -> None:
        with line.lock:
            if not line.outgoing or line.waiting or line.rank not in self._lines:
                return
            if self._ended:
                return
            line.waiting = True
            self._poll.modify(line.sock, select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, line: _Line) -> None:
        with line.lock:
            while line.outgoing:
                try:
                    sent = line.sock.send(line.outgoing[0])
                except (BlockingIOError, InterruptedError):
                    return
                except OSError:
                    line.outgoing.clear()
                    break
                if sent < len(line.outgoing[0]):
                    line.outgoing[0] = line.outgoing[0][sent:]
                    return
                line.outgoing.popleft()
            if line.waiting:
                line.waiting = False
                self._poll.modify(line.sock, select.EPOLLIN)

    def _read(self, line: _Line) -> None:
        try:
            got = line.sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._drop(line, exc.strerror or str(exc))
            return
        if not got:
            self._drop(line, "its connection ended")
            return
        chunk = memoryview(self._buffer)[:got]
        if line.incoming:
            line.incoming += chunk
            used = self._parse(line, line.incoming)
            del line.incoming[:used]
        else:
            used = self._parse(line, chunk)
            line.incoming += chunk[used:]

    def _parse(self, line: _Line, data: memoryview | bytearray) -> int:
        """Report the frames in ``data``; how many bytes they were."""
        start = 0
        while len(data) - start >= _HEADER.size:
            length, kind, lane, number = _HEADER.unpack_from(data, start)
            if not _HEADER.size <= length <= MAX_FRAME:
                self._drop(line, f"it sent a frame of {length} bytes")
                return len(data)
            if len(data) - start < length:
                break
            body = bytes(data[start + _HEADER.size : start + length])
            start += length
            self._listener.received(line.rank, Frame(kind, lane, number, body))
        return start

    def _drop(self, line: _Line, why: str) -> None:
        if self._lines.pop(line.rank, None) is None:
            return
        self._files.pop(line.sock.fileno(), None)
        self._poll.unregister(line.sock)
        line.close()
        self._listener.lost(line.rank, why)
