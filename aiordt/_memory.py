"""Host memory: warm buffers to receive into, and the bytes behind a tensor.

Fresh memory costs page faults worth seven times the copy, so what a tensor was received
into is kept and lent again once nothing can reach it any more (`Pool`).

Invariants:
    MEM-1  A pool block is lent once at a time, to one storage or to those of one tray: it
           comes back when they are all gone, whatever views and tensors of them there were.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from aiordt._types import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

HUGE_PAGE: Final = 2 * MIB
#: Bytes to which tensors are aligned where several lie in one piece of memory (a cache line).
ALIGNMENT: Final = 64
#: Smaller tensors are left to malloc, which keeps such memory warm by itself.
MIN_BLOCK: Final = 1 * MIB

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.restype = ctypes.py_object
_memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_PYBUF_READ: Final = 0x100
_PYBUF_WRITE: Final = 0x200


def view_memory(address: int, nbytes: int, *, writable: bool = False) -> memoryview:
    """The ``nbytes`` bytes at ``address``, which the caller keeps alive."""
    if nbytes == 0:
        return memoryview(bytearray())
    flags = _PYBUF_WRITE if writable else _PYBUF_READ
    view: memoryview = _memory_view(address, nbytes, flags)
    return view


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def storage_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and size in bytes of the storage behind ``tensor``."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def dense_stride(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The strides that `torch.clone` gives a tensor of this shape and these strides."""
    return torch.empty_strided(tuple(shape), tuple(stride), device="meta").clone().stride()


def memory_order(stride: Sequence[int]) -> list[int]:
    """Dimensions of a dense tensor from the outermost in memory to the innermost."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def in_memory_order(tensor: torch.Tensor, stride: Sequence[int] | None = None) -> torch.Tensor:
    """A view of ``tensor`` whose elements in C order are the bytes that travel.

    Broadcast dimensions (stride 0) shrink to one; the rest are put in the order in which
    the receiver's dense copy has them in memory.

    Args:
        tensor: A tensor of any layout.
        stride: Strides that say that order, where ``tensor`` is a copy of one that has them.
    """
    if stride is None:
        if tensor.is_contiguous():
            return tensor
        stride = tensor.stride()
    view = tensor.detach()
    for dim, (size, step) in enumerate(zip(view.shape, stride, strict=True)):
        if step == 0 and size > 1:
            view = view.narrow(dim, 0, 1)
    return view.permute(memory_order(dense_stride(view.shape, stride)))


class _Block:
    """Anonymous memory, on huge pages where the kernel has them to give."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # Private: of a shared mapping, Python's default, the kernel makes no huge pages.
        self._map = mmap.mmap(
            -1,
            nbytes + (HUGE_PAGE if nbytes >= HUGE_PAGE else 0),
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = base
        if nbytes >= HUGE_PAGE:
            self.address = -(-base // HUGE_PAGE) * HUGE_PAGE
            if hasattr(mmap, "MADV_HUGEPAGE"):
                start = self.address - base
                self._map.madvise(mmap.MADV_HUGEPAGE, start - start % mmap.PAGESIZE, nbytes)
        _blocks[self.address] = self


_blocks: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()


def block_at(address: int) -> _Block | None:
    """The pool's block that starts at ``address``; it outlives the storages made on it."""
    return _blocks.get(address)


class Home(Protocol):
    """Where lent memory comes from, and goes back to."""

    def take_back(self, block: Any) -> None:  # noqa: ANN401
        """Nothing can reach ``block`` any more. Called on any thread, at any moment."""
        ...


class Lent(ctypes.Array[ctypes.c_ubyte]):
    """The buffer under storages that were made on lent memory; gone when they are.

    Attributes:
        home: Who is told then.
        block: What it is told.
    """

    _type_ = ctypes.c_ubyte
    _length_ = (1 << 62) - 1  # whoever makes a storage on it says how much it needs
    home: Home
    block: object

    def __del__(self) -> None:
        block = self.__dict__.pop("block", None)
        if block is not None:
            self.home.take_back(block)


def lend(address: int, home: Home, block: object) -> Lent:
    """A buffer at ``address``, which ``home`` takes back when nothing uses it any more."""
    lent = Lent.from_address(address)
    lent.home = home
    lent.block = block
    return lent


def lent_tensor(
    address: int, numel: int, dtype: torch.dtype, home: Home, block: object
) -> torch.Tensor:
    """A flat tensor on lent memory, which ``home`` takes back when the storage dies."""
    return torch.frombuffer(lend(address, home, block), dtype=dtype, count=numel)


def laid_out(
    flat: torch.Tensor, shape: Sequence[int], stride: Sequence[int] | None
) -> torch.Tensor:
    """A flat tensor in this shape; ``stride``: of a dense one, ``None``: contiguous."""
    if stride is None:
        return flat.view(tuple(shape))
    return flat.as_strided(tuple(shape), tuple(stride))


class Pool:
    """Memory to receive into, lent as tensors and taken back when their storage dies.

    Blocks come in sizes of 1, 1.25, 1.5, 1.75 times a power of two. All lists change by
    single atomic operations, because a block may come back at any moment on any thread,
    the garbage collector's turn in the middle of `empty` included.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[int, list[_Block]] = {}
        self._closed = False

    @property
    def idle_nbytes(self) -> int:
        """Bytes kept for the next tensors."""
        return sum(nbytes * len(blocks) for nbytes, blocks in list(self._free.items()))

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """An uninitialised tensor, from warm memory where there is some.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            stride: Strides of a dense tensor; ``None``: contiguous.

        Cost:
            ~1 µs for warm memory; an ``mmap``, and page faults at first touch, otherwise.
        """
        numel = 1
        for size in shape:
            numel *= size
        nbytes = numel * dtype.itemsize
        if nbytes < MIN_BLOCK or nbytes > self._limit or self._closed:
            if stride is None:
                return torch.empty(shape, dtype=dtype)
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype)
        block = self._block(nbytes)
        return laid_out(lent_tensor(block.address, numel, dtype, self, block), shape, stride)

    def tray(self, nbytes: int) -> Lent | None:
        """Warm memory for several small tensors: the buffer to make their storages on.

        Returns:
            The buffer; ``None`` where those are better made one by one.

        Cost:
            As `empty`.
        """
        if nbytes < MIN_BLOCK or nbytes > self._limit or self._closed:
            return None
        block = self._block(nbytes)
        return lend(block.address, self, block)

    def _block(self, nbytes: int) -> _Block:
        size = block_nbytes(nbytes)
        try:
            return self._free.setdefault(size, []).pop()
        except IndexError:
            return _Block(size)

    def take_back(self, block: _Block) -> None:
        """See `Home`."""
        if self._closed:
            return
        self._free.setdefault(block.nbytes, []).append(block)
        while self.idle_nbytes > self._limit:  # the oldest of the largest other size goes
            sizes = [size for size, blocks in list(self._free.items()) if blocks]
            others = [size for size in sizes if size != block.nbytes]
            with suppress(IndexError, ValueError):  # taken meanwhile
                self._free[max(others or sizes)].pop(0)

    def close(self) -> None:
        """Give idle memory back to the system; what is lent follows when its storage dies."""
        self._closed = True
        self._free = {}


def block_nbytes(nbytes: int) -> int:
    """The size of the block that ``nbytes`` bytes are put in: at most a quarter more."""
    power = max(MIN_BLOCK, 1 << (nbytes.bit_length() - 1))
    step = power // 4
    return power if nbytes <= power else -(-nbytes // step) * step


def raw_bytes(tensor: torch.Tensor, stride: Sequence[int] | None = None) -> bytes:
    """The bytes of a small tensor, in the order of `in_memory_order`."""
    view = in_memory_order(tensor, stride).contiguous()
    return bytes(view_memory(view.data_ptr(), view.nbytes))


def from_raw_bytes(
    data: bytes | memoryview, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A new contiguous tensor with these bytes."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    if data:
        view_memory(tensor.data_ptr(), len(data), writable=True)[:] = data
    return tensor
