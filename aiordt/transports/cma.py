"""Same-host reads of another process's memory, by the kernel's cross-memory attach.

``process_vm_readv`` copies straight from the producer's pages to ours: one copy, no agent,
no registration, no wire-up, and nothing asked of the producer, which may be busy or hold
its GIL. It needs the same uid (or CAP_SYS_PTRACE), and under Yama's ``ptrace_scope`` 1 the
producer's consent, which `allow_readers` gives.

Invariants:
    CMA-1  A link exists only if a 16-byte random token was read at the advertised address
           of the advertised pid: pids of other namespaces and recycled ones do not match.
    CMA-2  A read counts only if the pidfd that was open when the token was proved still
           shows a living process afterwards, since a pid may be used again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

import numpy as np
from typing_extensions import override

from aiordt._errors import ClosedError, OwnerDiedError, TransferError, UnavailableError
from aiordt._progress import Workers, finish
from aiordt._types import MIB
from aiordt.abc import Availability, DrawingLink, Transport
from aiordt.transports._job import CHUNK_NBYTES, GATHER_NBYTES, Job, cuts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aiordt.abc import Context, Part, Peer

#: Up to here a read on the caller's own thread (70 µs) costs about as much as a thread hop.
INLINE_NBYTES: Final = 1 * MIB
NUM_READERS: Final = 2
_IOV_MAX: Final = 1024
_IOVEC: Final = struct.Struct("QQ")
_TOKEN_NBYTES: Final = 16
_YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")

_Readv: TypeAlias = "Callable[[int, bytes, int, bytes, int, int], int]"
# A chunk: its bytes, and the (address, bytes) pairs here and there.
_Chunk: TypeAlias = tuple[int, bytes, bytes]


def _load() -> _Readv | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is None:
        return None
    function.restype = ctypes.c_ssize_t
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    readv: _Readv = function
    return readv


_readv = _load()


def host_id() -> bytes:
    """16 bytes that are the same for processes on one booted kernel, and differ elsewhere."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def yama_scope() -> int:
    """Yama's ``ptrace_scope``; 0 where there is no Yama."""
    try:
        return int(_YAMA.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def allow_readers() -> None:
    """Let processes of the same user read this one's memory under Yama's scope 1."""
    if _readv is None or yama_scope() != 1:
        return
    # prctl(2): PR_SET_PTRACER ("Yama"), PR_SET_PTRACER_ANY (-1)
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1 & (2**64 - 1)), 0, 0, 0)


def _advice(code: int) -> str:
    if code in {errno.EPERM, errno.EACCES}:
        scope = yama_scope()
        if scope >= 2:
            return (
                f"the kernel forbids it (kernel.yama.ptrace_scope={scope}); 0 or 1 would allow it"
            )
        return (
            "the kernel does not permit it: the two processes run as different users, or one is "
            "in a container without CAP_SYS_PTRACE"
        )
    if code == errno.ESRCH:
        return "there is no process with its id here (another pid namespace)"
    if code == errno.EFAULT:
        return (
            "that memory is not there any more: did the owner resize or free the storage of an "
            "exported tensor?"
        )
    return f"reading its memory failed: {os.strerror(code)}"


def _chunks(parts: Iterable[Part]) -> Iterator[_Chunk]:
    """Cut parts into reads of about `CHUNK_NBYTES`, none with more than IOV_MAX pieces.

    Small contiguous parts are gathered, up to `GATHER_NBYTES`: a call costs as much as reading
    10 KiB, a piece in it 0.1 µs.
    """
    local: list[int] = []
    remote: list[int] = []
    gathered = 0
    for part in parts:
        nbytes = part.nbytes
        if not part.contiguous:
            yield from _strided_chunks(part)
        elif nbytes > CHUNK_NBYTES:
            for start, some in cuts(nbytes):
                yield (
                    some,
                    _IOVEC.pack(part.target + start, some),
                    _IOVEC.pack(part.address + start, some),
                )
        elif nbytes:
            if gathered + nbytes > GATHER_NBYTES or len(local) == 2 * _IOV_MAX:
                yield gathered, _iovecs(local), _iovecs(remote)
                local, remote, gathered = [], [], 0
            local += (part.target, nbytes)
            remote += (part.address, nbytes)
            gathered += nbytes
    if gathered:
        yield gathered, _iovecs(local), _iovecs(remote)


def _iovecs(fields: list[int]) -> bytes:
    return struct.pack(f"{len(fields)}Q", *fields)


def _strided_chunks(part: Part) -> Iterator[_Chunk]:
    run, runs = part.runs()
    if run > CHUNK_NBYTES:
        for number, offset in enumerate(runs.tolist()):
            for start, nbytes in cuts(run):
                target = part.target + number * run + start
                remote = _IOVEC.pack(part.address + offset + start, nbytes)
                yield nbytes, _IOVEC.pack(target, nbytes), remote
        return
    per_chunk = min(_IOV_MAX, CHUNK_NBYTES // run)
    for first in range(0, len(runs), per_chunk):
        offsets = runs[first : first + per_chunk]
        pairs = np.empty((len(offsets), 2), dtype=np.uint64)
        pairs[:, 0] = offsets + part.address
        pairs[:, 1] = run
        nbytes = len(offsets) * run
        yield nbytes, _IOVEC.pack(part.target + first * run, nbytes), pairs.tobytes()


class CmaLink(DrawingLink):
    """Reads one process's memory. Made by `CmaTransport.connect`."""

    nowait_nbytes = INLINE_NBYTES

    def __init__(self, pid: int, pidfd: int, *, name: str, workers: Workers) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self.death_fd = pidfd
        self._name = name
        self._workers = workers
        self._jobs: set[Job[_Chunk]] = set()
        self._closed = False

    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        if len(parts) == 1:
            (part,) = parts
            if part.nbytes > INLINE_NBYTES or not part.contiguous:
                return False
            if part.nbytes == 0:
                return True
            self._check_open()
            nbytes = part.nbytes
            local, remote = _IOVEC.pack(part.target, nbytes), _IOVEC.pack(part.address, nbytes)
            self._read_chunk((nbytes, local, remote))
            self._check_alive()
            return True
        total = sum(part.nbytes for part in parts)
        if total > INLINE_NBYTES or not all(part.contiguous for part in parts):
            return False
        self._check_open()
        for chunk in _chunks(parts):
            self._read_chunk(chunk)
        self._check_alive()
        return True

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        total = sum(part.nbytes for part in parts)
        await self._read(parts, NUM_READERS if total > CHUNK_NBYTES else 1, total)

    @override
    async def read_drawn(self, parts: Iterator[Part], segments: Iterable[int]) -> None:
        await self._read(parts, NUM_READERS)

    async def _read(self, parts: Iterable[Part], readers: int, total: int = 0) -> None:
        self._check_open()
        job = Job(_chunks(parts), lambda chunk: self._read_chunk(chunk, total), "cma.chunk")
        self._jobs.add(job)
        try:
            await finish(job.start(self._workers, readers), job.stop)
        finally:
            self._jobs.discard(job)
        self._check_alive()
        self._check_open()

    def copy(self, address: int, target: int, nbytes: int) -> None:
        """Read so many bytes there into ours here; blocks, without the GIL.

        Whether the process still lives is for the caller to ask, once, after the last one (CMA-2).

        Raises:
            OwnerDiedError: The other process is gone.
            TransferError: The memory is not there.
        """
        local, remote = _IOVEC.pack(target, nbytes), _IOVEC.pack(address, nbytes)
        self._read_chunk((nbytes, local, remote))

    def _read_chunk(self, chunk: _Chunk, total: int = 0) -> None:
        """One system call, usually; it may stop short between two pieces.

        Args:
            chunk: What to read.
            total: Bytes of the transfer that it is of, for errors, where that is known.
        """
        left, local, remote = chunk
        nbytes = total or left
        readv = _readv
        assert readv is not None  # noqa: S101  (for the type checker: probe() said so)
        while True:
            got = readv(self._pid, local, len(local) // 16, remote, len(remote) // 16, 0)
            if got == left:
                return
            if got <= 0:
                code = ctypes.get_errno() if got < 0 else errno.EFAULT
                if code == errno.EINTR:
                    continue
                self._check_alive()
                if code == errno.ESRCH:
                    raise OwnerDiedError(f"{self._name} died", owner=self._name)
                raise TransferError(
                    f"reading {nbytes} bytes from {self._name} failed: {_advice(code)}",
                    transport="cma",
                    peer=self._name,
                    nbytes=nbytes,
                )
            left -= got
            local, remote = _skip(local, got), _skip(remote, got)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the link to {self._name} was closed")

    def _check_alive(self) -> None:
        if not self.alive:  # CMA-2
            raise OwnerDiedError(f"{self._name} died, and its tensors with it", owner=self._name)

    @property
    def alive(self) -> bool:
        """Whether the process is still there."""
        death = select.poll()  # one for each call: it refuses two threads at once
        death.register(self._pidfd, select.POLLIN)
        return not death.poll(0)

    @override
    async def aclose(self) -> None:
        self._closed = True
        for job in list(self._jobs):
            job.stop()

    def __del__(self) -> None:
        os.close(self._pidfd)  # not earlier: a reader may still look at it


def _skip(vectors: bytes, nbytes: int) -> bytes:
    """The pieces that are left after ``nbytes`` bytes of them were read."""
    pieces = list(_IOVEC.iter_unpack(vectors))
    while pieces and nbytes >= pieces[0][1]:
        nbytes -= pieces.pop(0)[1]
    if pieces and nbytes:
        address, length = pieces[0]
        pieces[0] = (address + nbytes, length - nbytes)
    return b"".join(_IOVEC.pack(*piece) for piece in pieces)


class CmaTransport(Transport):
    """The consumer's end; producers have nothing to do."""

    name: ClassVar[str] = "cma"

    @override
    def __init__(self, context: Context) -> None:
        self._workers = Workers("cma", NUM_READERS)
        self._host_id = host_id()

    @classmethod
    @override
    def probe(cls) -> Availability:
        if _readv is None:
            return Availability(usable=False, reason="this system has no process_vm_readv")
        if not hasattr(os, "pidfd_open"):
            return Availability(usable=False, reason="this Python has no os.pidfd_open")
        return Availability(usable=True)

    @override
    async def connect(self, peer: Peer) -> CmaLink:
        address = peer.address
        if address.host_id != self._host_id:
            raise self._unavailable("the owner is on another host")
        try:
            pidfd = os.pidfd_open(address.pid)
        except OSError as exc:
            # ENOENT, and EINVAL of older kernels: the id is that of a thread here.
            if exc.errno in {errno.ESRCH, errno.ENOENT, errno.EINVAL}:
                raise self._unavailable(_advice(errno.ESRCH)) from exc
            raise self._unavailable(f"cannot watch the owner: {exc.strerror}") from exc
        token = ctypes.create_string_buffer(_TOKEN_NBYTES)
        local = _IOVEC.pack(ctypes.addressof(token), _TOKEN_NBYTES)
        remote = _IOVEC.pack(address.token_address, _TOKEN_NBYTES)
        assert _readv is not None  # noqa: S101  (for the type checker: probe() said so)
        got = _readv(address.pid, local, 1, remote, 1, 0)
        code = ctypes.get_errno()
        if got != _TOKEN_NBYTES or token.raw != address.runtime_id:  # CMA-1
            os.close(pidfd)
            if got >= 0 or code == errno.EFAULT:
                reason = "the process with the owner's id here is another one"
            else:
                reason = _advice(code)
            raise self._unavailable(reason)
        return CmaLink(address.pid, pidfd, name=str(address), workers=self._workers)

    @staticmethod
    def _unavailable(reason: str) -> UnavailableError:
        return UnavailableError(f"cma: {reason}", reason=reason, transport="cma")

    @override
    async def aclose(self) -> None:
        self._workers.close()
