"""Shared memory for tensors: what lies in it, other processes of this host see without a copy.

Memory comes in segments, each an anonymous file in memory (memfd) that has no name anywhere
and is gone with the last process that has it, however that ends. A segment keeps its number
and its place for life; tensors get ranges of it, which come back when their storage dies.

Invariants:
    ARN-1  A range is lent to one storage at a time.
    ARN-2  A segment's number is never used again in this process, so nobody can mistake
           other memory at the same address for it.
    ARN-3  Other processes can map a segment, but not write to it.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from aiordt import _config
from aiordt._errors import InvalidValueError, OutOfMemoryError
from aiordt._memory import HUGE_PAGE, aligned, dense_stride, laid_out, lent_tensor
from aiordt._types import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiordt._config import Config

#: Tensors up to this size share segments ...
SHARED_NBYTES: Final = 16 * MIB
#: ... of this size; a larger one has its own.
SEGMENT_NBYTES: Final = 64 * MIB
# fcntl(2); FUTURE_WRITE lets nobody make another writable mapping. Python has no names for it.
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 0x0002 | 0x0004 | 0x0010  # SHRINK, GROW, FUTURE_WRITE


class Extents:
    """The free ranges of a segment: best fit, and neighbours grow together again. Pure."""

    def __init__(self, nbytes: int) -> None:
        self.free = nbytes
        self._nbytes = nbytes
        self._sizes: dict[int, int] = {0: nbytes}  # start -> size
        self._starts: dict[int, int] = {nbytes: 0}  # end -> start
        self._by_size: list[tuple[int, int]] = [(nbytes, 0)]

    @property
    def unused(self) -> bool:
        """Whether nothing is taken."""
        return self.free == self._nbytes

    def take(self, nbytes: int) -> int | None:
        """The start of ``nbytes`` free bytes, which are taken now; ``None`` if there are none."""
        position = bisect.bisect_left(self._by_size, (nbytes, 0))
        if position == len(self._by_size):
            return None
        size, start = self._by_size[position]
        self._remove(start)
        if size > nbytes:
            self._add(start + nbytes, size - nbytes)
        self.free -= nbytes
        return start

    def give(self, start: int, nbytes: int) -> None:
        """These bytes are free again."""
        self.free += nbytes
        before = self._starts.get(start)
        if before is not None:
            nbytes += self._remove(before)
            start = before
        after = start + nbytes
        if after in self._sizes:
            nbytes += self._remove(after)
        self._add(start, nbytes)

    def _add(self, start: int, nbytes: int) -> None:
        self._sizes[start] = nbytes
        self._starts[start + nbytes] = start
        bisect.insort(self._by_size, (nbytes, start))

    def _remove(self, start: int) -> int:
        nbytes = self._sizes.pop(start)
        del self._starts[start + nbytes]
        del self._by_size[bisect.bisect_left(self._by_size, (nbytes, start))]
        return nbytes


class Segment:
    """A piece of shared memory.

    Attributes:
        number: Its number, from 1.
        fd: Its file descriptor.
        address: Where it is mapped here.
        nbytes: Its size.
        shared: Whether many tensors have it together.
        extents: What of it is free.
    """

    def __init__(self, number: int, nbytes: int, *, shared: bool) -> None:
        self.number = number
        self.shared = shared
        self.nbytes = nbytes
        self.extents = Extents(nbytes)
        self.fd = os.memfd_create("aiordt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            self._map = mmap.mmap(self.fd, nbytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages for shared memory
                    self._map.madvise(mmap.MADV_HUGEPAGE)
            if hasattr(mmap, "MADV_DONTFORK"):
                self._map.madvise(mmap.MADV_DONTFORK)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)  # ARN-3
        except BaseException:
            os.close(self.fd)
            raise
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        weakref.finalize(self, os.close, self.fd).atexit = False


class _Range(NamedTuple):
    segment: Segment
    start: int
    nbytes: int


class Arena:
    """All shared memory of this process. Safe from any thread."""

    def __init__(self, settings: Callable[[], Config] = _config.peek) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._numbers = 0
        self._segments: dict[int, Segment] = {}
        self._places: list[tuple[int, int]] = []  # (address, number), sorted
        self._returned: deque[_Range] = deque()
        self._watchers: list[Callable[[int], None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in list(self._segments.values()))

    @property
    def used_nbytes(self) -> int:
        """Bytes that tensors have now."""
        self._settle()
        segments = list(self._segments.values())
        return sum(segment.nbytes - segment.extents.free for segment in segments)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """An uninitialised tensor in shared memory.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            stride: Strides of a dense tensor; ``None``: contiguous.

        Raises:
            OutOfMemoryError: ``arena_nbytes`` are used up, or the system has no more.
        """
        numel = 1
        for size in shape:
            numel *= size
        nbytes = numel * dtype.itemsize
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        place = self._take(aligned(nbytes))
        flat = lent_tensor(place.segment.address + place.start, numel, dtype, self, place)
        return laid_out(flat, shape, stride)

    def _take(self, nbytes: int) -> _Range:
        self._settle()
        shared = nbytes <= SHARED_NBYTES
        with self._lock:
            for segment in self._segments.values():
                if segment.shared is shared and segment.extents.free >= nbytes:
                    # An own segment is used again for what fills at least half of it.
                    fits = shared or (segment.extents.unused and segment.nbytes <= 2 * nbytes)
                    start = segment.extents.take(nbytes) if fits else None
                    if start is not None:
                        return _Range(segment, start, nbytes)
            segment = self._grow(nbytes, shared=shared)
            start = segment.extents.take(nbytes)
            assert start is not None  # noqa: S101  (it was made for it)
        self._settle()
        return _Range(segment, start, nbytes)

    def _grow(self, nbytes: int, *, shared: bool) -> Segment:
        limit = self._settings().arena_nbytes
        least = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
        size = max(SEGMENT_NBYTES, least) if shared else least
        if self.nbytes + size > limit:
            size = least
        unused = [segment for segment in self._segments.values() if segment.extents.unused]
        while unused and self.nbytes + size > limit:
            self._drop(unused.pop())
        if self.nbytes + size > limit:
            raise OutOfMemoryError(
                f"{nbytes} bytes of shared memory were asked for; {self.nbytes} of the "
                f"{limit} of the setting arena_nbytes are in use: let tensors made by "
                "aiordt.empty() go, or allow more"
            )
        try:
            segment = Segment(self._numbers + 1, size, shared=shared)
        except OSError as exc:
            raise OutOfMemoryError(
                f"the system gives no {size} bytes of shared memory: {exc.strerror}"
            ) from exc
        self._numbers += 1  # ARN-2
        self._segments[segment.number] = segment
        bisect.insort(self._places, (segment.address, segment.number))
        return segment

    def _drop(self, segment: Segment) -> None:
        del self._segments[segment.number]
        self._places.remove((segment.address, segment.number))
        for watcher in list(self._watchers):
            watcher(segment.number)

    def take_back(self, block: _Range) -> None:
        """See `aiordt._memory.Home`."""
        self._returned.append(block)
        self._settle()

    def _settle(self) -> None:
        """Put back what was returned, unless somebody is at it (he looks again when done)."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    place = self._returned.popleft()
                    place.segment.extents.give(place.start, place.nbytes)
                self._trim()
            finally:
                self._lock.release()

    def _trim(self) -> None:
        """Give unused segments back to the system, but for some warm ones."""
        idle = [segment for segment in self._segments.values() if segment.extents.unused]
        excess = sum(segment.nbytes for segment in idle) - self._settings().pool_nbytes
        for segment in idle:
            if excess <= 0:
                return
            self._drop(segment)
            excess -= segment.nbytes

    def locate(self, address: int) -> int:
        """The number of the segment that an address is in; 0 if it is in none."""
        places = self._places
        if not places:
            return 0
        position = bisect.bisect_right(places, (address, self._numbers)) - 1
        if position < 0:
            return 0
        base, number = places[position]
        segment = self._segments.get(number)
        inside = segment is not None and address < base + segment.nbytes
        return number if inside else 0

    def segment(self, number: int) -> Segment | None:
        """The segment with a number, if it is there."""
        return self._segments.get(number)

    def watch(self, watcher: Callable[[int], None]) -> None:
        """Call ``watcher`` with the number of each segment that goes, on any thread."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[int], None]) -> None:
        """Stop that."""
        with suppress(ValueError):
            self._watchers.remove(watcher)


arena: Final = Arena()


def _is_host(device: torch.device | str | None) -> bool:
    return torch.device("cpu" if device is None else device).type == "cpu"


def _sizes(shape: tuple[int | Sequence[int], ...]) -> tuple[int, ...]:
    first = shape[0] if len(shape) == 1 else None
    given = tuple(first) if isinstance(first, Sequence) and not isinstance(first, str) else shape
    sizes = tuple(size for size in given if isinstance(size, int) and size >= 0)
    if len(sizes) < len(given):
        raise InvalidValueError(f"a shape is non-negative integers, not {given}")
    return sizes


def empty(
    *shape: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """An uninitialised tensor in aiordt's shared memory.

    Processes of the same host read it without a copy (`TensorRef.view`) or with the fastest
    one, and RDMA devices know it already. It is an ordinary tensor otherwise, except that its
    storage cannot grow (``resize_``). Its memory comes back when its storage dies.

    Args:
        *shape: Sizes, or one sequence of them.
        dtype: Its dtype; PyTorch's default if not given.
        device: ``"cpu"``, or a device whose own memory others can read (CUDA).

    Raises:
        OutOfMemoryError: The setting ``arena_nbytes`` is used up, or the system has no more.
        UsageError: The shape is none.

    Cost:
        A few µs where memory is warm; first touch of new memory runs at about 1 GB/s.
    """
    sizes = _sizes(shape)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not _is_host(device):
        return torch.empty(sizes, dtype=dtype, device=device)
    return arena.empty(sizes, dtype)


def zeros(
    *shape: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """As `empty`, filled with zeros."""
    return empty(*shape, dtype=dtype, device=device).zero_()


def empty_like(
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """As `empty`, with the shape, strides and dtype of ``tensor``, as ``torch.empty_like``."""
    dtype = tensor.dtype if dtype is None else dtype
    if not _is_host(tensor.device if device is None else device):
        return torch.empty_like(tensor.detach(), dtype=dtype, device=device)
    return arena.empty(tensor.shape, dtype, dense_stride(tensor.shape, tensor.stride()))
