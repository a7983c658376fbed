"""A read of more than 4 GiB in one part, with a few MiB of memory here: DAT-3."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiordt._errors import UnavailableError
from aiordt._memory import view_memory
from aiordt._types import GIB, KIB, MIB
from aiordt.testing._checks import Target, made, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiordt.abc import Link
    from aiordt.testing._pair import Exported, MakePair

_HUGE: Final = 4 * GIB + 3 * MIB + 5
#: What repeats in the target.
_PERIOD: Final = 32 * MIB
#: Where there are bytes of their own: around every multiple, and at the end.
_STEP: Final = 256 * MIB
_MARK_NBYTES: Final = 16 * KIB
#: What must be free beside a copy of it in shared memory.
_SPARE: Final = 1 * GIB
_CANARY: Final = 0xA5
#: mmap(2); Python's own mmap can neither choose an address nor repeat a file.
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def _load_mmap() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    mapping: Callable[..., int] = function
    return mapping


class _Sink:
    """Addresses to write to of which most are the same few pages again and again.

    Pages of their own are those of the marks, and at the end.
    """

    def __init__(self, nbytes: int, offsets: list[int]) -> None:
        self.nbytes = -(-(nbytes + 1) // _PERIOD) * _PERIOD
        self._mmap = _load_mmap()
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.address = self._map(None, self.nbytes, anonymous)
        self._fd = os.memfd_create("aiordt-huge")
        os.ftruncate(self._fd, _PERIOD)
        for start in range(0, self.nbytes, _PERIOD):
            address = self.address + start
            self._map(address, _PERIOD, mmap.MAP_SHARED | _MAP_FIXED, self._fd)
        view_memory(self.address, _PERIOD, writable=True)[:] = bytes([_CANARY]) * _PERIOD
        for offset in [*offsets, nbytes]:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            size = -(-(offset + _MARK_NBYTES - start) // mmap.PAGESIZE) * mmap.PAGESIZE
            size = min(size, self.nbytes - start)
            address = self.address + start
            self._map(address, size, anonymous | _MAP_FIXED)
            view_memory(address, size, writable=True)[:] = bytes([_CANARY]) * size

    def _map(self, address: int | None, nbytes: int, flags: int, fd: int = -1) -> int:
        mapped = self._mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if mapped == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return mapped

    def at(self, offset: int, nbytes: int) -> bytes:
        """What is there now."""
        return bytes(view_memory(self.address + offset, nbytes))

    def close(self) -> None:
        """Give the addresses back."""
        os.close(self._fd)
        if ctypes.CDLL(None).munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes)):
            raise OSError(errno.EINVAL, "munmap")


def _check_memory(nbytes: int) -> None:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines()}
    available = int(sizes["MemAvailable"]) * KIB
    if available < nbytes + _SPARE:
        reason = f"{available >> 20} MiB of memory are available, {(nbytes + _SPARE) >> 20} needed"
        raise UnavailableError(f"more than 4 GiB: {reason}", reason=reason, transport="any")


async def check_huge_part(make_pair: MakePair, *, nbytes: int = _HUGE) -> None:
    """Check that one part may have more than 4 GiB (DAT-3).

    The source is memory that was never written, the target the same pages many times over, but
    for 16 KiB at every 256 MiB that differ, each in its own way: so it costs time, but little
    memory, except of a `aiordt.abc.SharedLink`, where the owner has all of the bytes.

    Args:
        make_pair: Makes a connected pair; called once.
        nbytes: How many bytes.

    Raises:
        AssertionError: Something did not arrive, or not there.
        UnavailableError: There is too little free memory to try; ``reason`` says how much.

    Cost:
        The time that the transport takes to move them: 1 to 10 s.
    """
    _check_memory(nbytes)
    offsets = [max(0, start - _MARK_NBYTES // 2) for start in range(0, nbytes, _STEP)]
    offsets.append(nbytes - _MARK_NBYTES)
    marks = {
        offset: bytes((number * 7 + byte * 13 + 1) % 251 for byte in range(_MARK_NBYTES))
        for number, offset in enumerate(offsets)
    }
    async with made(make_pair) as pair:
        exported = await pair.export_sparse(nbytes, marks)
        await _check_far_cuts(pair.link, exported, offsets)
        sink = _Sink(nbytes, offsets)
        try:
            await pair.link.read([exported.part(sink.address)])
            for offset, mark in marks.items():
                assert sink.at(offset, _MARK_NBYTES) == mark, (
                    f"DAT-3: of {nbytes} bytes those from {offset} on are wrong"
                )
            between = 2 * _MARK_NBYTES  # any page of the period, but for those of the first mark
            rest = sink.at(between, _PERIOD - between)
            assert rest == bytes(len(rest)), f"DAT-3: of {nbytes} bytes others are wrong"
            after = sink.at(nbytes, mmap.PAGESIZE)
            assert after == bytes([_CANARY]) * len(after), "DAT-3: written beyond the target"
        finally:
            await pair.link.aclose()
            sink.close()


async def _check_far_cuts(link: Link, exported: Exported, offsets: list[int]) -> None:
    """Small cuts that begin, or end, beyond 4 GiB."""
    like, last = exported.like, offsets[-1]
    for view, what in (
        (like[last + 9 : last + 5000], "bytes beyond 4 GiB"),
        (like[last : last + 6000 : 3], "every third byte beyond 4 GiB"),
        (like[offsets[1] + 5 :: _STEP], "bytes that are 256 MiB apart"),
        (like[offsets[1] :: last - offsets[1]], "two bytes, more than 3 GiB apart"),
        (like.as_strided((2, 900), (last, 2), 7), "two rows, 4 GiB apart"),
    ):
        await read(link, [Target(exported.cut(view))], f"a cut ({what})", promise="DAT-3")
