"""A read in chunks, on worker threads: fair to other reads, and to the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

from aiordt._errors import ClosedError
from aiordt._metrics import phase
from aiordt._progress import post, settle, yield_core
from aiordt._types import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiordt._progress import Workers

#: Chunks that one reader does before it lets another read's have its turn.
_TURN: Final = 8

#: Larger pieces of a copy would keep a loop that woke up on the same core waiting.
CHUNK_NBYTES: Final = 1 * MIB
#: From here on there are chunks enough for all readers, and twice as large ones cost half as many
#: turns at the GIL: 9.3 in place of 10.2 ms for 256 MiB on huge pages, and 0.1 ms more lag.
_LARGE_NBYTES: Final = 16 * MIB
#: Of small pieces, so many bytes go in one: preparing them is what readers wait for each other's
#: end of. A dict of 64 KiB tensors comes a sixth sooner than in chunks of 1 MiB; in chunks of 4 MiB
#: the last one is waited for (2 cores).
GATHER_NBYTES: Final = 2 * MIB

_C = TypeVar("_C")
#: Source, target and size of a piece of memory in this process.
Piece: TypeAlias = tuple[int, int, int]


def cuts(nbytes: int) -> Iterator[tuple[int, int]]:
    """Where the chunks of so many bytes begin, and how many bytes each has."""
    size = CHUNK_NBYTES if nbytes < _LARGE_NBYTES else 2 * CHUNK_NBYTES
    for start in range(0, nbytes, size):
        yield start, min(size, nbytes - start)


def pieces(source: int, target: int, nbytes: int) -> Iterator[Piece]:
    """Cut a copy into pieces."""
    for start, some in cuts(nbytes):
        yield source + start, target + start, some


def copy_piece(piece: Piece) -> None:
    """Copy one; the GIL is released meanwhile."""
    source, target, nbytes = piece
    ctypes.memmove(target, source, nbytes)


_getcpu: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
#: The core that each thread with a chunk was last seen on.
_cores: dict[int, int] = {}


def _give_way() -> None:
    """Between two chunks, let a loop that woke up on this core have it.

    The scheduler lets a reader finish its slice of 3 ms before that; asking after each chunk
    brings the loop's lag from 2 ms to 0.5 ms (p99, 2 cores), and costs nothing when idle.

    Where another reader is on this core, leave it: the two would only give way to each other,
    and since what ran in the last 0.5 ms counts as cache-hot and is not moved to an idle core,
    they would share this one for all of 256 MiB (seen in every second read on 2 cores).
    """
    me, core = threading.get_ident(), _getcpu()
    _cores[me] = core
    if list(_cores.values()).count(core) == 1:
        yield_core()
        return
    allowed = os.sched_getaffinity(0)  # of this thread
    if others := allowed.difference(_cores.values()):
        os.sched_setaffinity(0, others)  # moves it at once
        os.sched_setaffinity(0, allowed)
        _cores[me] = _getcpu()


class Job(Generic[_C]):
    """One read, done by a few workers that take chunks from a common pile in turns.

    Args:
        chunks: The pile; drawn from under a lock.
        read: Reads one chunk; must release the GIL for long copies.
        name: Of the phase that is announced before each chunk.
    """

    def __init__(self, chunks: Iterator[_C], read: Callable[[_C], object], name: str) -> None:
        self._chunks = chunks
        self._read = read
        self._name = name
        self._lock = threading.Lock()
        self._stopped = False
        self._errors: list[Exception] = []

    def start(self, workers: Workers, readers: int) -> asyncio.Future[None]:
        """Let so many workers read; once.

        Returns:
            Done when no worker is at it any more; raises the first error.
        """
        self._workers = workers
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = self._loop.create_future()
        self._future: asyncio.Future[None] | None = future
        self._active = [None] * readers  # popped when a reader ends; the last one completes
        for _ in range(readers):
            try:
                workers.submit(self._turn)
            except ClosedError as exc:
                self._errors.append(exc)
                self._stopped = True
                self._end()  # the readers that did start are waited for
        return future

    def _turn(self) -> None:
        try:
            for _ in range(_TURN):
                chunk = self._next()
                if chunk is None:
                    break
                phase(self._name)
                self._read(chunk)
                _give_way()
            else:
                self._workers.submit(self._turn)  # to the end of the queue: others get their turn
                return
        except Exception as exc:  # noqa: BLE001  (handed to the waiter)
            self._errors.append(exc)
            self._stopped = True
        finally:
            _cores.pop(threading.get_ident(), None)
        self._end()

    def _end(self) -> None:
        self._active.pop()
        if self._active:
            return
        error = self._errors[0] if self._errors else None
        future, self._future = self._future, None  # ERR-1
        self._errors.clear()
        assert future is not None  # noqa: S101  (only the last one comes here)
        post(self._loop, settle, future, None, error)

    def _next(self) -> _C | None:
        with self._lock:
            return None if self._stopped else next(self._chunks, None)

    def stop(self) -> None:
        """Start no further chunk."""
        self._stopped = True
