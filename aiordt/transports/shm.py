"""Same-host reads of tensors in shared memory: a copy at memory speed, or none at all.

The owner's segments (`aiordt._arena`) are mapped here, read-only, when first needed, and
stay mapped for as long as the owner has them. Their file descriptors come over a local
socket, authenticated as any payload stream: the consumer writes the number of a segment,
the owner answers with its place, size and descriptor, and says when a segment is gone.

Invariants:
    SHM-1  Memory is read only through a mapping of the segment whose number the ref names.
    SHM-2  A mapping outlives every tensor that was made on it.
    SHM-3  Nothing here can write to an owner's memory: a write to what was mapped to be
           written to (`ShmLink.copy_on_write`) makes copies of the pages, for this process.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

import numpy as np
import torch
from typing_extensions import override

from aiordt._arena import arena
from aiordt._errors import (
    ClosedError,
    OwnerDiedError,
    PeerLostError,
    ProtocolViolationError,
    TransferError,
    UnavailableError,
)
from aiordt._memory import ALIGNMENT, lent_tensor
from aiordt._progress import Workers, finish, post, settle
from aiordt._types import MIB
from aiordt._wire import KEY_NBYTES
from aiordt.abc import Availability, DrawingLink, SharedLink, Transport
from aiordt.transports._job import CHUNK_NBYTES, GATHER_NBYTES, Job, Piece, copy_piece, pieces
from aiordt.transports.cma import host_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from aiordt.abc import Context, Io, Part, Peer

#: Up to here a copy on the caller's own thread (50 µs) costs about as much as a thread hop.
INLINE_NBYTES: Final = 1 * MIB
NUM_READERS: Final = 2
#: What the consumer writes: the number of a segment.
_ASK: Final = struct.Struct("!Q")
#: What the owner writes: number, address and size; size 0: it is gone.
_TELL: Final = struct.Struct("!QQQ")
#: A chunk: source, target, bytes; or a strided source and its target.
_Chunk: TypeAlias = "Piece | tuple[torch.Tensor, torch.Tensor]"


class _Mapping:
    """An owner's segment, mapped here. Unmapped when nothing refers to it any more."""

    def __init__(self, fd: int, base: int, nbytes: int) -> None:
        if os.fstat(fd).st_size < nbytes:
            raise ProtocolViolationError("a shared segment is smaller than its owner says")
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)  # SHM-3
        self._fd = os.dup(fd)
        weakref.finalize(self, os.close, self._fd).atexit = False
        if hasattr(mmap, "MADV_DONTFORK"):
            self._map.madvise(mmap.MADV_DONTFORK)
        self.base = base
        self.nbytes = nbytes
        self._here: int = np.frombuffer(self._map, dtype=np.uint8).ctypes.data

    def translate(self, address: int, nbytes: int) -> int:
        """Where bytes of the owner are here.

        Raises:
            TransferError: They are not all in this segment.
        """
        offset = address - self.base
        if not 0 <= offset <= self.nbytes - nbytes:
            raise TransferError(
                "a tensor is not in the shared segment that its ref names",
                transport="shm",
                peer="",
                nbytes=nbytes,
            )
        return self._here + offset

    def copy_on_write(self, address: int, nbytes: int, keep: object) -> torch.Tensor:
        """See `ShmLink.copy_on_write`. A mapping of its own: written pages must not be seen later.

        Raises:
            TransferError: They are not all in this segment.
        """
        offset = self.translate(address, nbytes) - self._here
        start = offset - offset % mmap.PAGESIZE
        pages = mmap.mmap(
            self._fd,
            offset - start + nbytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
        )
        here: int = np.frombuffer(pages, dtype=np.uint8).ctypes.data
        return lent_tensor(here + offset - start, nbytes, torch.uint8, self, (pages, keep))

    def take_back(self, block: object) -> None:
        """See `aiordt._memory.Home`: the tensor's end is the end of its hold on the mapping."""


class ShmLink(DrawingLink, SharedLink):
    """Reads one process's shared memory. Made by `ShmTransport.connect`."""

    nowait_nbytes = INLINE_NBYTES

    def __init__(self, peer: Peer, sock: socket.socket, io: Io, workers: Workers) -> None:
        self._peer = peer
        self._sock = sock
        self._io = io
        self._workers = workers
        self._mappings: dict[int, _Mapping] = {}
        self._asked: dict[int, asyncio.Future[_Mapping]] = {}
        self._jobs: set[Job[_Chunk]] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._closed = False
        io.loop.add_reader(sock, self._told)

    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        total = 0
        for part in parts:
            total += part.nbytes
            if not part.contiguous or part.segment not in self._mappings:
                return False
        if total > INLINE_NBYTES or len(parts) > 16:
            return False
        self._check_alive()
        for part in parts:
            source = self._mappings[part.segment].translate(part.address, part.nbytes)
            ctypes.memmove(part.target, source, part.nbytes)
        return True

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        parts = [part for part in parts if part.nbytes]  # the others are in no segment
        total = sum(part.nbytes for part in parts)
        segments = dict.fromkeys(part.segment for part in parts)
        await self._read(parts, segments, NUM_READERS if total > CHUNK_NBYTES else 1)

    @override
    async def read_drawn(self, parts: Iterator[Part], segments: Iterable[int]) -> None:
        await self._read(parts, segments, NUM_READERS)

    async def _read(self, parts: Iterable[Part], segments: Iterable[int], readers: int) -> None:
        self._check_alive()
        mappings = {}  # SHM-2: held until no worker reads any more
        for number in segments:
            mappings[number] = await self._mapping(number)
        job = Job(self._chunks(parts, mappings), _copy, "shm.chunk")
        self._jobs.add(job)
        try:
            await finish(job.start(self._workers, readers), job.stop)
        finally:
            self._jobs.discard(job)
        self._check_alive()

    @staticmethod
    def _chunks(parts: Iterable[Part], mappings: dict[int, _Mapping]) -> Iterator[_Chunk]:
        """Pieces of `CHUNK_NBYTES`; small neighbours there that are neighbours here are one.

        Between two on one tray (`aiordt._batch`) a few bytes are nobody's: they may be copied.
        """
        start = end = shift = segment = 0
        tray = None
        for part in parts:
            address, nbytes = part.address, part.nbytes
            if (
                part.tensor is tray
                and tray is not None
                and part.segment == segment
                and part.cut is None
                and part.target - address == shift
                and 0 <= address - end < ALIGNMENT
                and address + nbytes - start <= GATHER_NBYTES
            ):
                end = address + nbytes
                continue
            if tray is not None:
                source = mappings[segment].translate(start, end - start)
                yield source, start + shift, end - start
                tray = None
            segment = part.segment
            mapping = mappings[segment]  # SHM-1
            if part.cut is not None and not part.cut.contiguous:
                yield from _strided_chunks(part, mapping.translate(address, part.cut.span))
            elif nbytes > CHUNK_NBYTES or part.tensor is None:
                yield from pieces(mapping.translate(address, nbytes), part.target, nbytes)
            else:
                start, end, shift = address, address + nbytes, part.target - address
                tray = part.tensor
        if tray is not None:
            source = mappings[segment].translate(start, end - start)
            yield source, start + shift, end - start

    @override
    async def view(self, segment: int, address: int, nbytes: int) -> torch.Tensor:
        await self._mapping(segment)
        self._check_alive()
        seen = self.view_nowait(segment, address, nbytes)
        if seen is None:
            raise self._failed("the owner has no such shared segment any more")
        return seen

    @override
    async def copy_on_write(
        self, segment: int, address: int, nbytes: int, keep: object
    ) -> torch.Tensor:
        mapping = await self._mapping(segment)
        self._check_alive()
        try:
            return mapping.copy_on_write(address, nbytes, keep)
        except OSError as exc:
            raise self._failed(f"mapping it: {exc.strerror}") from exc

    def view_nowait(self, segment: int, address: int, nbytes: int) -> torch.Tensor | None:
        """As `view`, but ``None`` if the segment is not mapped yet; any thread."""
        mapping = self._mappings.get(segment)
        if mapping is None:
            return None
        here = mapping.translate(address, nbytes)
        return lent_tensor(here, nbytes, torch.uint8, mapping, mapping)  # SHM-2

    async def _mapping(self, segment: int) -> _Mapping:
        """A segment, mapped if need be; from any loop."""
        mapping = self._mappings.get(segment)
        return await self._io.run(self._mapped(segment)) if mapping is None else mapping

    async def _mapped(self, segment: int) -> _Mapping:
        """Map a segment, once for all who ask. On the io loop."""
        mapping = self._mappings.get(segment)
        if mapping is not None:
            return mapping
        future = self._asked.get(segment)
        if future is None:
            self._check_alive()
            future = self._asked[segment] = self._io.loop.create_future()
            future.add_done_callback(lambda future: future.cancelled() or future.exception())
            try:
                self._sock.send(_ASK.pack(segment), socket.MSG_DONTWAIT)
            except OSError as exc:
                self._fail(exc)
        return await asyncio.shield(future)

    def _told(self) -> None:
        """The owner wrote something, or is gone. On the io loop."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _TELL.size, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            self._fail(exc)
            return
        if len(data) < _TELL.size:
            self._fail(OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
            return
        number, base, nbytes = _TELL.unpack(data)
        future = self._asked.pop(number, None)
        try:
            if fds:
                mapping = self._mappings[number] = _Mapping(fds[0], base, nbytes)
                if future is not None:
                    settle(future, mapping, None)
            else:  # tensors on it keep it mapped (SHM-2)
                self._mappings.pop(number, None)
                if future is not None:
                    raise self._failed("the owner has no such shared segment any more")
        except (OSError, ValueError, TransferError) as exc:
            if future is not None:
                cause = (
                    exc if isinstance(exc, TransferError) else self._failed(f"mapping it: {exc}")
                )
                settle(future, None, cause)
        finally:
            for fd in fds:
                os.close(fd)

    def _failed(self, why: str) -> TransferError:
        return TransferError(
            f"shm: shared memory of {self._peer.address} cannot be read: {why}",
            transport="shm",
            peer=str(self._peer.address),
            nbytes=0,
        )

    def _fail(self, exc: OSError) -> None:
        """The socket has ended, and with it what is asked."""
        self._io.loop.remove_reader(self._sock)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        asked, self._asked = self._asked, {}
        for future in asked.values():
            task = self._io.loop.create_task(self._settle(future, exc))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def _settle(self, future: asyncio.Future[_Mapping], exc: OSError) -> None:
        error: Exception = ClosedError(f"the link to {self._peer.address} was closed")
        if not self._closed:
            error = await self._peer.verdict(exc, transport="shm", nbytes=0)
        settle(future, None, error)

    @property
    @override
    def mapped_nbytes(self) -> int:
        return sum(mapping.nbytes for mapping in list(self._mappings.values()))

    def _check_alive(self) -> None:
        if self._closed:
            raise ClosedError(f"the link to {self._peer.address} was closed")
        death = select.poll()  # one for each call: it refuses two threads at once
        with suppress(ValueError):  # closed at this moment
            death.register(self._sock, select.POLLRDHUP)
        if death.poll(0):
            name = str(self._peer.address)
            raise OwnerDiedError(f"{name} died, and its tensors with it", owner=name)

    @override
    async def aclose(self) -> None:
        self._closed = True
        for job in list(self._jobs):
            job.stop()
        post(self._io.loop, self._close)
        self._mappings = {}

    def _close(self) -> None:
        if self._sock.fileno() >= 0:
            self._fail(OSError(errno.ECONNABORTED, "closed"))
            self._sock.close()

    def __del__(self) -> None:
        self._sock.close()


def _copy(chunk: _Chunk) -> None:
    if len(chunk) == 3:
        copy_piece(chunk)
    else:
        chunk[1].copy_(chunk[0])


class _Borrowed:
    """The home of memory that somebody else keeps alive."""

    def take_back(self, block: object) -> None:
        """See `aiordt._memory.Home`."""


_BORROWED: Final = _Borrowed()
_UNSIGNED: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _strided_chunks(part: Part, source: int) -> Iterator[_Chunk]:
    """Slabs of a strided part, of about `CHUNK_NBYTES`, cut along its outermost dimension."""
    cut = part.cut
    assert cut is not None  # noqa: S101  (the caller's case)
    shape, stride = cut.shape, cut.stride
    dtype = _UNSIGNED.get(cut.itemsize)
    if dtype is None:  # complex128: two elements of 8 bytes
        dtype, pair = torch.int64, cut.itemsize // 8
        shape, stride = (*shape, pair), (*(step * pair for step in stride), 1)
    whole = lent_tensor(source, cut.span // dtype.itemsize, dtype, _BORROWED, None)
    view = whole.as_strided(shape, stride)
    target = lent_tensor(part.target, part.nbytes // dtype.itemsize, dtype, _BORROWED, None)
    target = target.view(shape)
    while view.dim() > 1 and view.shape[0] == 1:
        view, target = view[0], target[0]
    rows = max(1, CHUNK_NBYTES * view.shape[0] // part.nbytes)
    for start in range(0, view.shape[0], rows):
        yield view[start : start + rows], target[start : start + rows]


class ShmTransport(Transport):
    """Both ends."""

    name: ClassVar[str] = "shm"

    @override
    def __init__(self, context: Context) -> None:
        self._io = context.io
        self._workers = Workers("shm", NUM_READERS)
        self._host_id = host_id()
        self._accepted: dict[socket.socket, bytes] = {}  # -> the peer at its other end
        self._shown: dict[int, set[socket.socket]] = {}  # segment -> where it was asked for
        arena.watch(self._gone)

    @classmethod
    @override
    def probe(cls) -> Availability:
        if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
            return Availability(usable=False, reason="this system has no memfd_create")
        return Availability(usable=True)

    @override
    async def connect(self, peer: Peer) -> ShmLink:
        if peer.address.host_id != self._host_id:
            raise _unavailable("the owner is on another host")
        return await self._io.run(self._connect(peer))

    async def _connect(self, peer: Peer) -> ShmLink:
        await peer.reach()
        try:
            sock = await peer.open_local(os.urandom(KEY_NBYTES))
        except (OwnerDiedError, PeerLostError) as exc:
            await peer.reach()
            raise _unavailable(
                "the owner's local socket is not here: it is in another network namespace"
            ) from exc
        return ShmLink(peer, sock, self._io, self._workers)

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        if sock.family != socket.AF_UNIX:
            return False
        self._accepted[sock] = peer_id
        self._io.loop.add_reader(sock, self._asked, sock)
        return True

    def _asked(self, sock: socket.socket) -> None:
        """A consumer asks for a segment, or has gone."""
        try:
            data = sock.recv(_ASK.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if len(data) < _ASK.size:
            self._hung_up(sock)
            return
        (number,) = _ASK.unpack(data)
        segment = arena.segment(number)
        try:
            if segment is None:
                self._tell(sock, _TELL.pack(number, 0, 0), [])
            else:
                self._shown.setdefault(number, set()).add(sock)
                self._tell(sock, _TELL.pack(number, segment.address, segment.nbytes), [segment.fd])
        except OSError:
            self._hung_up(sock)

    @staticmethod
    def _tell(sock: socket.socket, data: bytes, fds: list[int]) -> None:
        socket.send_fds(sock, [data], fds, socket.MSG_DONTWAIT)

    def _gone(self, number: int) -> None:
        """A segment was given up; on any thread."""
        post(self._io.loop, self._tell_gone, number)

    def _tell_gone(self, number: int) -> None:
        for sock in self._shown.pop(number, ()):
            if sock in self._accepted:
                try:
                    self._tell(sock, _TELL.pack(number, 0, 0), [])
                except OSError:  # it does not read: it must map everything anew
                    self._hung_up(sock)

    def _hung_up(self, sock: socket.socket) -> None:
        self._io.loop.remove_reader(sock)
        self._accepted.pop(sock, None)
        for shown in self._shown.values():
            shown.discard(sock)
        sock.close()

    @override
    def forget(self, peer_id: bytes) -> None:
        for sock in [sock for sock, peer in self._accepted.items() if peer == peer_id]:
            self._hung_up(sock)

    @override
    async def aclose(self) -> None:
        arena.unwatch(self._gone)
        for sock in list(self._accepted):
            self._hung_up(sock)
        self._workers.close()


def _unavailable(reason: str) -> UnavailableError:
    return UnavailableError(f"shm: {reason}", reason=reason, transport="shm")
