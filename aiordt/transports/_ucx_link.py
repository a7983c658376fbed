"""The consumer's end of UCX: a session with an owner, and what is asked in it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgpack
from typing_extensions import override

from aiordt._errors import AiordtError, ClosedError, ProtocolViolationError
from aiordt._memory import view_memory
from aiordt._metrics import phase
from aiordt._progress import finish, post, run_all, track
from aiordt._types import KIB
from aiordt._wire import pack_items
from aiordt.abc import Link, TransportMessage
from aiordt.transports._ucp import UcxError
from aiordt.transports._ucx_devices import local_host
from aiordt.transports._ucx_worker import Incoming, UcxWorker, Unwanted, memory_to_receive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.abc import Part, Peer
    from aiordt.transports._ucp import Endpoint
    from aiordt.transports.ucx import UcxTransport

#: Up to here the payload is in the reply: one round trip.
REPLY_NBYTES: Final = 64 * KIB
#: A larger read is asked for in several requests, so that the first bytes come soon.
_REQUEST_COUNT: Final = 256
#: The first message on a new endpoint, to prove that messages come through ...
GREETING: Final = b"aiordt"
#: ... within this time; over TCP it is some milliseconds.
_CONTACT_SECONDS: Final = 5.0

# Kinds of requests: open a session, close it, send in the reply, send messages.
OPEN, CLOSE, REPLY, SEND = range(4)


def fields(body: bytes, types: Sequence[type]) -> list[Any]:
    """A request's or a reply's fields, checked; what a newer peer appended is ignored."""
    try:
        values = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.UnpackException) as exc:
        raise ProtocolViolationError(f"not a message of ucx: {type(exc).__name__}") from exc
    if (
        type(values) is not list
        or len(values) < len(types)
        or any(type(value) is not kind for value, kind in zip(values, types, strict=False))
        or any(isinstance(value, int) and value < 0 for value in values[: len(types)])
    ):
        raise ProtocolViolationError("not a message of ucx")
    return values[: len(types)]


def packed(*values: object) -> bytes:
    body: bytes = msgpack.packb(values)
    return body


class _Session:
    """A consumer's end of the endpoints of a link (UCX-5)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.endpoint: Endpoint | None = None
        self.busy = 0  # reads whose messages are not all received
        self.unwanted = False  # to be closed when nothing is busy


class UcxLink(Link):
    """Reads from one peer. Made by `UcxTransport.connect`."""

    packs = True

    def __init__(self, transport: UcxTransport, peer: Peer) -> None:
        self._transport = transport
        self._peer = peer
        self._io = transport.io
        self._session: _Session | None = None
        self._sessions: set[_Session] = set()  # with those that are about to end
        self._opening: asyncio.Task[_Session] | None = None
        self._closed = False
        self._reads: set[asyncio.Task[object]] = set()

    @property
    def peer_id(self) -> bytes:
        """Runtime id of the owner."""
        return self._peer.address.runtime_id

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self._check_open()
        if parts:
            await self._io.run(self._read(parts))

    async def _read(self, parts: Sequence[Part]) -> None:
        track(self._reads)
        self._check_open()
        nbytes = sum(part.nbytes for part in parts)
        on_host = all(
            part.device == "cpu" and (part.tensor is None or part.tensor.is_cpu) for part in parts
        )
        try:
            if on_host and nbytes <= REPLY_NBYTES:
                await self._read_reply(parts, nbytes)
            else:
                session = await self.opened()
                starts = range(0, len(parts), _REQUEST_COUNT)
                requests = (parts[start : start + _REQUEST_COUNT] for start in starts)
                await run_all(
                    [self._read_messages(some, session, shared=on_host) for some in requests]
                )
        except (UcxError, ProtocolViolationError) as exc:
            self._check_open()
            raise await self._peer.verdict(exc, transport="ucx", nbytes=nbytes) from exc

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the link to {self._peer.address} was closed")

    async def _ask(self, *body: object) -> bytes:
        reply = await self._peer.call(TransportMessage("ucx", packed(*body)))
        if not isinstance(reply, TransportMessage):
            raise ProtocolViolationError("not a reply of ucx")
        return reply.body

    async def _read_reply(self, parts: Sequence[Part], nbytes: int) -> None:
        payload = await self._ask(REPLY, pack_items([part.item for part in parts]), nbytes)
        if len(payload) != nbytes:
            raise ProtocolViolationError("the owner sent another number of bytes than was asked")
        position = 0
        for part in parts:
            view = view_memory(part.target, part.nbytes, writable=True)
            view[:] = payload[position : position + len(view)]
            position += len(view)

    async def _read_messages(
        self, parts: Sequence[Part], session: _Session, *, shared: bool
    ) -> None:
        endpoint, worker = session.endpoint, self._transport.worker
        assert endpoint is not None  # noqa: S101  (it is open)
        tag = self._transport.next_tag()
        items = pack_items([part.item for part in parts])
        nbytes = sum(part.nbytes for part in parts)
        transfer = Incoming(endpoint, tag, memory_to_receive(parts, shared=shared))
        asking = asyncio.ensure_future(self._ask(SEND, items, nbytes, session.number, tag, shared))
        receiving = asyncio.ensure_future(self._transport.run(worker.carry_out(transfer)))
        session.busy += 1
        try:
            phase("ucx.asking")
            await asyncio.shield(asking)  # its answer says whether there is something to receive
            phase("ucx.receiving")
            await finish(receiving, receiving.cancel)
        except BaseException:
            receiving.cancel()
            try:
                await finish(asyncio.gather(receiving, return_exceptions=True))  # OWN-1
            finally:
                self._transport.spawn(self._finish(session, asking, tag, transfer))
            raise
        session.busy -= 1
        await self._end(session)

    async def _finish(
        self, session: _Session, asking: asyncio.Future[bytes], tag: int, transfer: Incoming
    ) -> None:
        """Receive what a read left behind (UCX-4); its memory is the caller's already."""
        try:
            await asking
            if transfer.num_left and session.endpoint is not None:
                unwanted = Unwanted(session.endpoint, tag, transfer.num_left)
                await self._transport.run(self._transport.worker.carry_out(unwanted))
        except ProtocolViolationError:
            self._leave(session)  # the owner does not know it, perhaps
        except (AiordtError, UcxError):
            pass  # nothing was sent, or nothing more will come
        finally:
            if session.endpoint is None or not session.endpoint.alive:
                self._leave(session)
            session.busy -= 1
            await self._end(session)

    async def opened(self) -> _Session:
        """The session of this link, made when there is none."""
        if self._session is None:
            if self._opening is None:
                self._opening = asyncio.ensure_future(self._open())
                self._opening.add_done_callback(self._did_open)
            # Shared by all callers: one that is cancelled must not cancel it for the others.
            return await asyncio.shield(self._opening)
        return self._session

    def _did_open(self, task: asyncio.Task[_Session]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._session = task.result()
            if self._closed:
                self._leave(self._session)

    async def _open(self) -> _Session:
        transport, host = self._transport, self._peer.address.host
        worker = await transport.started(local_host(host))
        session = _Session(transport.next_number())
        self._sessions.add(session)
        tag = transport.next_tag()
        try:
            reply = await self._ask(OPEN, session.number, worker.address, host, tag)
            (address,) = fields(reply, [bytes])
            endpoint = session.endpoint = await transport.run(connect_endpoint(worker, address))
            greeting = bytearray(len(GREETING))
            hello = Incoming(endpoint, tag, [[memoryview(greeting)]])
            await self._contact(worker, hello, endpoint)
            if greeting != GREETING:
                raise ProtocolViolationError("the owner's greeting is another one")
        except BaseException:
            session.unwanted = True
            transport.spawn(self._end(session))
            raise
        return session

    async def _contact(self, worker: UcxWorker, hello: Incoming, endpoint: Endpoint) -> None:
        """Prove that messages come through."""
        hanging = self._io.loop.call_later(
            _CONTACT_SECONDS, self._transport.post, worker.disconnect, endpoint
        )
        try:
            await self._transport.run(worker.carry_out(hello))
        finally:
            hanging.cancel()

    async def _end(self, session: _Session) -> None:
        """Close a session at both ends, if it is wanted no more and nothing of it is left."""
        if not session.unwanted or session.busy or session not in self._sessions:
            return
        self._sessions.discard(session)
        try:
            with suppress(AiordtError):
                await self._ask(CLOSE, session.number)
        finally:
            self._disconnect(session)

    def _disconnect(self, session: _Session) -> None:
        if session.endpoint is not None:
            self._transport.post(self._transport.worker.disconnect, session.endpoint)

    def _leave(self, session: _Session) -> None:
        """Use a session no more."""
        if self._session is session:
            self._session = None
        session.unwanted = True
        self._transport.spawn(self._end(session))

    def lose(self) -> None:
        """The other process is gone: what is pending fails."""
        self._session = None
        for session in self._sessions:
            self._disconnect(session)
        self._sessions.clear()

    @override
    async def aclose(self) -> None:
        self._closed = True
        post(self._io.loop, self._close)

    def _close(self) -> None:
        for task in list(self._reads):
            task.cancel()  # its `Io.run` raises ClosedError (CLS-2)
        if self._session is not None:
            self._leave(self._session)


async def connect_endpoint(worker: UcxWorker, address: bytes) -> Endpoint:
    """As `UcxWorker.connect`, to be run on its thread."""
    return worker.connect(address)
