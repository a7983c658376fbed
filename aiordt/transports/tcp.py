"""Plain TCP, which always works: from the owner's memory to the target's, no copy between.

A pull is a request over the control connection. Up to `REPLY_NBYTES` come back in the
reply; more goes over payload streams, each one blocking ``recvmsg_into`` here and one
blocking ``sendmsg`` there, on threads: a busy interpreter at either end costs one wait for
its GIL, not one for each segment. A stream serves one transfer at a time, so breaking it
(that is how a transfer is cancelled) harms no other (ISO-1).

What is authenticated: every control frame, and each stream when it is opened. The payload
on a stream is neither authenticated nor encrypted.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final

from typing_extensions import override

from aiordt import _tls
from aiordt._errors import AiordtError, ClosedError, ProtocolViolationError
from aiordt._memory import view_memory
from aiordt._metrics import phase
from aiordt._progress import Workers, finish, post, track
from aiordt._types import KIB, MIB
from aiordt._wire import KEY_NBYTES, Item, Message, Pull, PullReply
from aiordt.abc import Availability, Link, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt.abc import Context, Io, Part, Peer

#: Up to here the payload is in the reply: one round trip and no thread.
REPLY_NBYTES: Final = 64 * KIB
#: From here on a pull is spread over several streams.
STRIPED_NBYTES: Final = 8 * MIB
_MAX_RECEIVERS: Final = 64
#: As many senders as there are streams: a consumer that stands still must not hold up others.
_MAX_SENDERS: Final = 1 << 16
#: Pulls by streams that one link runs at once; the others wait their turn. Of striped ones few:
#: more bring no more bytes, and as many threads at either end that want to run.
_MAX_PULLS: Final = 8
_MAX_STRIPED: Final = 4
_MAX_IDLE_STREAMS: Final = 2 * _MAX_PULLS
_IOV_MAX: Final = 1024
_PLAIN: Final = "more than 64 KiB at a time travel outside TLS: neither encrypted nor authenticated"


def _stripes(nbytes: int, count: int) -> list[tuple[int, int]]:
    """How a payload is spread over ``count`` streams: (start, stop) of each, in bytes.

    Both ends compute it. Cuts fall on 4 KiB, so that no page is written by two threads.
    """
    step = -(-nbytes // count)
    step = -(-step // 4096) * 4096
    return [(min(i * step, nbytes), min((i + 1) * step, nbytes)) for i in range(count)]


def _advance(views: list[memoryview], nbytes: int) -> None:
    """Drop the first ``nbytes`` bytes of ``views``, in place."""
    while views and nbytes >= len(views[0]):
        nbytes -= len(views.pop(0))
    if views and nbytes:
        views[0] = views[0][nbytes:]


def _send(sock: socket.socket, views: list[memoryview]) -> None:
    """Send all of ``views``; blocks."""
    while views:
        _advance(views, sock.sendmsg(views[:_IOV_MAX]))


def _receive(sock: socket.socket, views: list[memoryview]) -> None:
    """Fill all of ``views``; blocks.

    Raises:
        ConnectionResetError: The other end closed before all had come.
    """
    while views:
        got = sock.recvmsg_into(views[:_IOV_MAX], 0, socket.MSG_WAITALL)[0]
        if got == 0:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        _advance(views, got)


def _cut(views: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes ``start`` to ``stop`` of ``views`` laid end to end."""
    pieces = []
    position = 0
    for view in views:
        low, high = max(start - position, 0), min(stop - position, len(view))
        if low < high:
            pieces.append(view[low:high])
        position += len(view)
    return pieces


def _break(*socks: socket.socket) -> None:
    """End streams; threads that are blocked on them return."""
    for sock in socks:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class TcpLink(Link):
    """Pulls from one peer. Made by `TcpTransport.connect`."""

    packs: ClassVar[bool] = True

    def __init__(self, peer: Peer, io: Io, workers: Workers, num_streams: int) -> None:
        self._peer = peer
        self._io = io
        self._workers = workers
        self._num_streams = num_streams
        self._idle: list[tuple[bytes, socket.socket]] = []
        self._turns = asyncio.Semaphore(_MAX_PULLS)
        self._striped_turns = asyncio.Semaphore(_MAX_STRIPED)
        self._closed = False
        self._reads: set[asyncio.Task[object]] = set()

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self._check_open()
        if parts:
            await self._io.run(self._read(parts))

    async def _read(self, parts: Sequence[Part]) -> None:
        track(self._reads)
        self._check_open()
        nbytes = sum(part.nbytes for part in parts)
        views = [view_memory(part.target, part.nbytes, writable=True) for part in parts]
        items = [part.item for part in parts]
        try:
            if nbytes <= REPLY_NBYTES:
                await self._read_reply(items, nbytes, views)
            else:
                async with self._striped_turns if nbytes >= STRIPED_NBYTES else self._turns:
                    await self._read_streams(items, nbytes, views)
        except (OSError, ProtocolViolationError) as exc:
            self._check_open()
            raise await self._peer.verdict(exc, transport="tcp", nbytes=nbytes) from exc

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the link to {self._peer.address} was closed")

    async def _read_reply(self, items: list[Item], nbytes: int, views: list[memoryview]) -> None:
        reply = await self._peer.call(Pull(items, nbytes, []))
        if not isinstance(reply, PullReply) or len(reply.payload) != nbytes:
            raise ProtocolViolationError("the owner sent another number of bytes than was asked")
        position = 0
        for view in views:
            view[:] = reply.payload[position : position + len(view)]
            position += len(view)

    async def _read_streams(self, items: list[Item], nbytes: int, views: list[memoryview]) -> None:
        count = self._num_streams if nbytes >= STRIPED_NBYTES else 1
        idle = [self._idle.pop() for _ in range(min(count, len(self._idle)))]
        streams: list[tuple[bytes, socket.socket]] = []
        works: list[asyncio.Future[None]] = []
        whole = False
        try:
            try:
                await self._ask(items, nbytes, count, idle, streams)
            except ProtocolViolationError:
                if not idle:
                    raise
                # They are closed: the owner has taken this process for lost, and forgot it.
                for _, sock in (*streams, *self._idle):
                    sock.close()
                streams.clear()
                self._idle.clear()
                await self._ask(items, nbytes, count, [], streams)
            phase("tcp.receiving")
            for (_, sock), (start, stop) in zip(streams, _stripes(nbytes, count), strict=True):
                pieces = _cut(views, start, stop)
                works.append(self._workers.run(lambda s=sock, p=pieces: _receive(s, p)))  # type: ignore[misc]
            for work in works:
                await finish(work, lambda: _break(*(sock for _, sock in streams)))
            whole = True
        finally:
            if not whole:
                _break(*(sock for _, sock in streams))
            await _settled(works)  # OWN-1
            for name, sock in streams:
                if whole and not self._closed and len(self._idle) < _MAX_IDLE_STREAMS:
                    self._idle.append((name, sock))
                else:
                    sock.close()

    async def _ask(
        self,
        items: list[Item],
        nbytes: int,
        count: int,
        idle: list[tuple[bytes, socket.socket]],
        streams: list[tuple[bytes, socket.socket]],
    ) -> None:
        """Have the owner send on ``streams``: the ``idle`` ones, and new ones up to ``count``."""
        streams += idle
        while len(streams) < count:
            name = os.urandom(KEY_NBYTES)
            streams.append((name, await self._peer.open_stream(name)))
        phase("tcp.asking")
        await self._peer.call(Pull(items, nbytes, [name for name, _ in streams]))

    @override
    async def aclose(self) -> None:
        self._closed = True
        post(self._io.loop, self._close)

    def __del__(self) -> None:
        for _, sock in self._idle:
            sock.close()

    def _close(self) -> None:
        for task in list(self._reads):
            task.cancel()  # its `IoThread.run` raises ClosedError (CLS-2)
        while self._idle:
            self._idle.pop()[1].close()


async def _settled(works: Sequence[asyncio.Future[None]]) -> None:
    """Wait until all of ``works`` have ended; their outcomes were or will be told elsewhere."""
    if works:
        await finish(asyncio.gather(*works, return_exceptions=True))


class TcpTransport(Transport):
    """Both ends."""

    name: ClassVar[str] = "tcp"

    @override
    def __init__(self, context: Context) -> None:
        self._io = context.io
        self._source = context.source
        self._num_streams = context.config.tcp_streams
        self._receivers = Workers("tcp-receive", _MAX_RECEIVERS)
        self._senders = Workers("tcp-send", _MAX_SENDERS)
        self._accepted: dict[tuple[bytes, bytes], socket.socket] = {}
        self._busy: dict[socket.socket, asyncio.Event] = {}
        self._sending: set[asyncio.Task[None]] = set()

    @classmethod
    @override
    def probe(cls) -> Availability:
        return Availability(usable=True, reason=_PLAIN if _tls.in_use() else "")

    @override
    async def connect(self, peer: Peer) -> TcpLink:
        await self._io.run(peer.reach())
        return TcpLink(peer, self._io, self._receivers, self._num_streams)

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        key = (peer_id, stream)
        if key in self._accepted:
            return False  # else nobody would close the one that has the name
        self._accepted[key] = sock
        self._io.loop.add_reader(sock, self._hung_up, key)
        return True

    def _hung_up(self, key: tuple[bytes, bytes]) -> None:
        """The consumer closed a stream (it never sends on one)."""
        sock = self._accepted.pop(key)
        self._io.loop.remove_reader(sock)
        _break(sock)
        if sock not in self._busy:  # else whoever sends on it closes it
            sock.close()

    @override
    async def serve(self, request: Message, peer_id: bytes) -> Message | None:
        if not isinstance(request, Pull):
            return None
        if not request.streams:
            return await self._serve_reply(request)
        keys = [(peer_id, name) for name in request.streams]
        while earlier := [
            self._busy[self._accepted[key]]
            for key in keys
            if key in self._accepted and self._accepted[key] in self._busy
        ]:
            await earlier[0].wait()  # its bytes have arrived; the sender is about to see that
        socks = [self._accepted[key] for key in keys if key in self._accepted]
        if len(set(socks)) < len(keys):
            raise ProtocolViolationError("a pull names a stream that is not open, or twice")
        self._busy.update((sock, asyncio.Event()) for sock in socks)
        opened: asyncio.Future[None] = self._io.loop.create_future()
        task = self._io.loop.create_task(self._send_streams(request, socks, opened))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        try:
            await opened  # refusals are the reply; once it is sent, bytes follow
        except asyncio.CancelledError:
            task.cancel()  # it may wait for a device, for long
            raise
        return PullReply(b"")

    async def _serve_reply(self, request: Pull) -> Message:
        if request.nbytes > REPLY_NBYTES:
            raise ProtocolViolationError("a pull over the size of a reply names no stream")
        async with self._source.open(request.items, request.nbytes) as served:
            return PullReply(b"".join(served.views))

    async def _send_streams(
        self, request: Pull, socks: list[socket.socket], opened: asyncio.Future[None]
    ) -> None:
        works: list[asyncio.Future[None]] = []
        try:
            async with self._source.open(request.items, request.nbytes) as served:
                if not opened.done():
                    opened.set_result(None)
                phase("tcp.sending")
                cuts = _stripes(request.nbytes, len(socks))
                works = [
                    self._senders.run(_sender(sock, _cut(served.views, start, stop)))
                    for sock, (start, stop) in zip(socks, cuts, strict=True)
                ]
                try:
                    await asyncio.wait(works, return_when=asyncio.FIRST_EXCEPTION)
                finally:
                    if not all(_succeeded(work) for work in works):
                        _break(*socks)  # the reader and the other stripes end at once
                    await _settled(works)  # OWN-1: the tensors are held until here
        except Exception as exc:
            if not opened.done():
                opened.set_exception(exc)
            elif not isinstance(exc, AiordtError):
                raise
        except BaseException:
            opened.cancel()
            raise
        finally:
            for sock in socks:
                self._busy.pop(sock).set()
            kept = set(self._accepted.values())
            for sock in socks:
                if sock not in kept:  # it hung up meanwhile
                    sock.close()

    @override
    def forget(self, peer_id: bytes) -> None:
        for key in [key for key in self._accepted if key[0] == peer_id]:
            self._hung_up(key)

    @override
    async def aclose(self) -> None:
        for key in list(self._accepted):
            self._hung_up(key)
        self._receivers.close()
        self._senders.close()


def _succeeded(work: asyncio.Future[None]) -> bool:
    return work.done() and not work.cancelled() and work.exception() is None


def _sender(sock: socket.socket, views: list[memoryview]) -> Callable[[], None]:
    return lambda: _send(sock, views)
