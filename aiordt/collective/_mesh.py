"""A socket between each two members of a group, and the thread that reads them.

Frames are small, and keep their order between two members. They are sent from whatever thread
has something to say, so that a call costs no hop before its words are out; one thread sleeps
until something arrives, and acts on it.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from aiordt._types import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_log = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("!IBqQ")
_RECEIVE_NBYTES: Final = 256 * KIB
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

    def pack(self) -> bytes:
        """As bytes."""
        return (
            _HEADER.pack(_HEADER.size + len(self.body), self.kind, self.lane, self.number)
            + self.body
        )


class Listener(ABC):
    """What the thread of a mesh reports to. All but the deadline is called on that thread."""

    @abstractmethod
    def received(self, rank: int, frame: Frame) -> None:
        """A frame has come."""

    @abstractmethod
    def lost(self, rank: int, why: str) -> None:
        """The connection to a member has ended."""

    @abstractmethod
    def deadline(self) -> float | None:
        """For how many seconds nothing is due; ``None``: for ever."""

    @abstractmethod
    def due(self) -> None:
        """Called after each turn, and when that time has passed."""


class _Line:
    """The connection to one member."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank = rank
        self.sock = sock
        self.incoming = bytearray()
        self.outgoing: deque[memoryview] = deque()
        self.lock = threading.Lock()
        self.waiting = False  # for room to send; known to the selector

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
        self._poll = select.epoll()
        self._files: dict[int, _Line | None] = {}
        for sock in (self._wake_reader, self._wake_writer, *socks.values()):
            sock.settimeout(0)
        self._watch(self._wake_reader, None)
        for line in self._lines.values():
            self._watch(line.sock, line)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _watch(self, sock: socket.socket, line: _Line | None) -> None:
        self._files[sock.fileno()] = line
        self._poll.register(sock, select.EPOLLIN)

    def start(self, listener: Listener) -> None:
        """Read until closed."""
        self._listener = listener
        self._thread.start()

    @property
    def on_thread(self) -> bool:
        """Whether the caller is the mesh's thread."""
        return threading.current_thread() is self._thread

    def send(self, rank: int, data: bytes) -> None:
        """Send packed frames to a member; any thread. Lost if the member is."""
        line = self._lines.get(rank)
        if line is None:
            return
        with line.lock:
            if not line.outgoing:
                try:
                    sent = line.sock.send(data)
                except (BlockingIOError, InterruptedError):
                    sent = 0
                except OSError:
                    return  # the reading thread sees it, too
                if sent == len(data):
                    return
                line.outgoing.append(memoryview(data)[sent:])
            else:
                line.outgoing.append(memoryview(data))
        self.run(lambda: self._want_room(line))

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

    # --- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self.turn(self._listener.deadline())
        except Exception:  # noqa: BLE001  (the group ends, and says so)
            _log.exception("the thread of a group failed")
            self._listener.lost(-1, "the thread of the group failed")
        finally:
            for line in self._lines.values():
                self._flush(line)
                line.close()
            self._lines = {}
            self._poll.close()
            with self._jobs_lock:
                self._ended = True
            while self._jobs:
                self._jobs.popleft()()
            self._listener.due()
            self._wake_reader.close()
            self._wake_writer.close()

    def turn(self, timeout: float | None) -> None:
        """Sleep until something happens, and act on it. On the thread."""
        for number, events in self._poll.poll(timeout):
            line = self._files.get(number)
            if line is None:
                self._woken = False  # before looking, so that later jobs wake again
                with suppress(BlockingIOError):
                    self._wake_reader.recv(64)
                continue
            if events & select.EPOLLOUT:
                self._flush(line)
            if events & ~select.EPOLLOUT:
                self._read(line)
        while self._jobs:
            self._jobs.popleft()()
        self._listener.due()

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
        if line.incoming:
            line.incoming += memoryview(self._buffer)[:got]
            used = self._parse(line, line.incoming)
            del line.incoming[:used]
        else:
            chunk = bytes(memoryview(self._buffer)[:got])
            used = self._parse(line, chunk)
            if used < got:
                line.incoming += chunk[used:]

    def _parse(self, line: _Line, data: bytes | bytearray) -> int:
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
