"""Tensors on pages of a known size, and raw reads of another process's memory.

The raw reads are written down here once more, by themselves, so that aiordt is measured
against the system call and not against its own code.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import struct
import threading
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import torch
from typing_extensions import override

from benchmarks._measure import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

_HUGE_PAGE: Final = 2 * MIB
_CHUNK: Final = MIB
_IOVEC: Final = struct.Struct("QQ")

#: The kinds of memory that a producer's tensor may be in.
ORDINARY: Final = "4 KiB pages"
HUGE: Final = "huge pages"
#: aiordt's arena, on the pages that this kernel gives to shared memory.
SHARED: Final = "shared memory"


def quiet() -> None:
    """Make an actor's process measurable: one torch thread, nothing old for the collector."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def pages_for(nbytes: int) -> tuple[str, ...]:
    """The kinds of memory worth telling apart at this size."""
    return (ORDINARY, HUGE) if nbytes >= _HUGE_PAGE else (ORDINARY,)


def make_tensor(nbytes: int, pages: str) -> torch.Tensor:
    """A touched uint8 tensor: torch's own memory, or memory advised to be on huge pages."""
    if pages == ORDINARY:
        tensor = torch.empty(nbytes, dtype=torch.uint8)
    else:
        # Python's default is MAP_SHARED, for which the kernel gives no huge pages on advice.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=private)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        offset = -base % _HUGE_PAGE
        tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset)
    return tensor.fill_(1)


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Give each place of a uint8 tensor something of its own; returns ``tensor``."""
    whole = tensor.nbytes // 8
    tensor[: whole * 8].view(torch.int64).copy_(torch.arange(1, whole + 1))
    tensor[whole * 8 :] = 7
    return tensor


def is_filled(tensor: torch.Tensor) -> bool:
    """Whether a tensor has what `fill` wrote."""
    return torch.equal(tensor, fill(torch.empty(tensor.nbytes, dtype=torch.uint8)))


def receive_tensor(nbytes: int) -> torch.Tensor:
    """Warm memory of the kind that aiordt's pool lends at this size."""
    return make_tensor(nbytes, HUGE if nbytes >= _HUGE_PAGE else ORDINARY)


def huge_share(tensor: torch.Tensor) -> float:
    """The part of a tensor's mapping that the kernel put on huge pages; from smaps."""
    address = tensor.data_ptr()
    inside = False
    resident = huge = 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            low, _, high = head.partition("-")
            inside = int(low, 16) < address + tensor.nbytes and address < int(high, 16)
        elif inside and head == "Rss:":
            resident += int(rest.split()[0]) * KIB
        elif inside and head in {"AnonHugePages:", "ShmemPmdMapped:"}:
            huge += int(rest.split()[0]) * KIB
    return huge / resident if resident else 0.0


class RawReader:
    """``process_vm_readv`` by the calling thread, alone or with one other."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        function = ctypes.CDLL(None, use_errno=True).process_vm_readv
        function.restype = ctypes.c_ssize_t
        unsigned = ctypes.c_ulong
        function.argtypes = (
            ctypes.c_int,
            ctypes.c_char_p,
            unsigned,
            ctypes.c_char_p,
            unsigned,
            unsigned,
        )
        self._readv: Callable[[int, bytes, int, bytes, int, int], int] = function
        self._jobs: SimpleQueue[deque[tuple[int, int, int]] | None] = SimpleQueue()
        self._done = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def read(self, address: int, target: int, nbytes: int) -> None:
        """Read by one system call; several only if the kernel stops short."""
        while nbytes:
            local, remote = _IOVEC.pack(target, nbytes), _IOVEC.pack(address, nbytes)
            got = self._readv(self._pid, local, 1, remote, 1, 0)
            if got <= 0:
                code = ctypes.get_errno()
                raise OSError(code, f"process_vm_readv of pid {self._pid} failed")
            address, target, nbytes = address + got, target + got, nbytes - got

    def read_by_two(self, address: int, target: int, nbytes: int) -> None:
        """Read by this thread and one other, in chunks of 1 MiB from a common pile."""
        chunks = deque(
            (address + start, target + start, min(_CHUNK, nbytes - start))
            for start in range(0, nbytes, _CHUNK)
        )
        self._jobs.put(chunks)
        self._drain(chunks)
        self._done.acquire()

    def _drain(self, chunks: deque[tuple[int, int, int]]) -> None:
        while True:
            try:
                chunk = chunks.popleft()
            except IndexError:
                return
            self.read(*chunk)

    def _work(self) -> None:
        while (chunks := self._jobs.get()) is not None:
            try:
                self._drain(chunks)
            finally:
                self._done.release()

    def close(self) -> None:
        """End the other thread."""
        self._jobs.put(None)
        self._thread.join()


class Copier(RawReader):
    """``memcpy`` by the calling thread, alone or with one other."""

    def __init__(self) -> None:
        super().__init__(0)

    @override
    def read(self, address: int, target: int, nbytes: int) -> None:
        """Copy at once."""
        ctypes.memmove(target, address, nbytes)
