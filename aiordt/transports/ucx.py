"""UCX, two-sided: cross-memory attach, RDMA, CUDA, or TCP, as UCX finds them.

A consumer asks over the control connection. The owner posts all messages of the answer at
once and replies; of a large message only its announcement travels until the consumer posts
the receive, and it does so a few at a time. So the consumer sets the pace, the owner has
nothing to do in between, and what a cancelled read does not want any more ends, unmoved, by
receives that are too short (nothing that was sent can be taken back). Small parts are packed
by the owner, as the consumer takes them. Up to `REPLY_NBYTES` come in the reply.

The control requests are authenticated; the messages of UCX are not, nor are they encrypted.

Invariants:
    UCX-4  A read's messages have a tag of their own, and each one that the owner posted is
           received, into its target or into nothing: no later read can meet it.
    UCX-5  A link has endpoints of its own at both ends, made together, and closed when the
           link or the other process has ended; those that failed are made anew.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from typing_extensions import override

from aiordt._errors import (
    AiordtError,
    ClosedError,
    ProtocolViolationError,
    TransferError,
    UnavailableError,
)
from aiordt._metrics import phase
from aiordt._progress import IoThread, post, settle
from aiordt._wire import unpack_items
from aiordt.abc import Availability, Transport, TransportMessage
from aiordt.transports import _ucx_link
from aiordt.transports._ucp import UcxError
from aiordt.transports._ucx_devices import missing_rdma, network_device
from aiordt.transports._ucx_link import UcxLink, connect_endpoint, fields, packed
from aiordt.transports._ucx_worker import Outgoing, UcxWorker, memory_to_send

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiordt._wire import Item, Message
    from aiordt.abc import Context, Peer
    from aiordt.transports._ucp import Endpoint

_T = TypeVar("_T")

#: What ending UCX may take.
_CLOSE_SECONDS: Final = 2.0


async def _start(device: str | None) -> UcxWorker:
    return UcxWorker(device)


class UcxTransport(Transport):
    """Both ends."""

    name: ClassVar[str] = "ucx"

    def __init__(self, context: Context) -> None:
        self.io = context.io
        self._source = context.source
        self._closed = False
        self._thread: IoThread | None = None
        self._starting: asyncio.Task[UcxWorker] | None = None
        self._links: weakref.WeakSet[UcxLink] = weakref.WeakSet()
        self._served: dict[tuple[bytes, int], Endpoint] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._tags = itertools.count(int.from_bytes(os.urandom(7), "big"))

    @classmethod
    @override
    def probe(cls) -> Availability:
        return Availability(usable=True, reason=missing_rdma())

    # --- for links, on the io loop -------------------------------------------------------------

    def next_tag(self) -> int:
        """A tag that no message to this process had (UCX-4)."""
        return next(self._tags)

    def next_number(self) -> int:
        """A number for a session of this process's."""
        return next(self._numbers)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start ``coroutine``."""
        task = self.io.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def started(self, host: str | None) -> UcxWorker:
        """The UCX worker, made when first needed.

        Args:
            host: This node's address, whose network interface is to be used.

        Raises:
            UcxError: UCX cannot start.
        """
        if self._closed:
            raise ClosedError("ucx was closed")
        if self._starting is None:
            self._thread = IoThread("ucx")
            self._starting = self.io.loop.create_task(
                self._thread.run(_start(network_device(host)))
            )
        return await asyncio.shield(self._starting)

    @property
    def worker(self) -> UcxWorker:
        """The UCX worker, which was started."""
        if self._starting is None:
            raise ClosedError("ucx was closed")
        return self._starting.result()

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run ``coroutine`` on the thread of UCX, to its end."""
        if self._thread is None:
            coroutine.close()
            raise ClosedError("ucx was closed")
        return await self._thread.run(coroutine)

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Call ``function`` there by and by."""
        if self._thread is not None:
            post(self._thread.loop, function, *args)

    # --- the consumer's end --------------------------------------------------------------------

    @override
    async def connect(self, peer: Peer) -> UcxLink:
        return await self.io.run(self._connect(peer))

    async def _connect(self, peer: Peer) -> UcxLink:
        link = UcxLink(self, peer)
        self._links.add(link)
        try:
            await link.opened()
        except (UcxError, ProtocolViolationError) as exc:
            error = await peer.verdict(exc, transport="ucx", nbytes=0)
            if not isinstance(error, TransferError):
                raise error from exc
            reason = f"UCX makes no contact between the two processes: {exc}"
            raise UnavailableError(f"ucx: {reason}", reason=reason, transport="ucx") from exc
        return link

    # --- the owner's end -----------------------------------------------------------------------

    @override
    async def serve(self, request: Message, peer_id: bytes) -> Message | None:
        if not isinstance(request, TransportMessage):
            return None
        try:
            return TransportMessage("ucx", await self._answer(request.body, peer_id))
        except UcxError as exc:
            raise ProtocolViolationError(f"UCX: {exc}") from exc

    async def _answer(self, body: bytes, peer_id: bytes) -> bytes:
        (kind,) = fields(body, [int])
        match kind:
            case _ucx_link.OPEN:
                _, number, address, host, tag = fields(body, [int, int, bytes, str, int])
                return await self._serve_open((peer_id, number), address, host, tag)
            case _ucx_link.CLOSE:
                _, number = fields(body, [int, int])
                self._let_go((peer_id, number))
            case _ucx_link.REPLY:
                _, items, nbytes = fields(body, [int, bytes, int])
                return await self._serve_reply(items, nbytes)
            case _ucx_link.SEND:
                _, items, nbytes, number, tag, shared = fields(
                    body, [int, bytes, int, int, int, bool]
                )
                await self._serve_send(items, nbytes, (peer_id, number), tag, shared=shared)
            case _:
                raise ProtocolViolationError(f"unknown request {kind} of ucx")
        return b""

    async def _serve_open(
        self, key: tuple[bytes, int], address: bytes, host: str, tag: int
    ) -> bytes:
        worker = await self.started(host)
        self._let_go(key)
        endpoint = self._served[key] = await self.run(connect_endpoint(worker, address))
        greeting = Outgoing(endpoint, tag, [[memoryview(_ucx_link.GREETING)]])
        self.spawn(self._greet(greeting))
        return packed(worker.address)

    async def _greet(self, greeting: Outgoing) -> None:
        with suppress(UcxError, ClosedError):  # the other end sees that it does not come
            await self.run(self.worker.carry_out(greeting))

    async def _serve_reply(self, items: bytes, nbytes: int) -> bytes:
        if nbytes > _ucx_link.REPLY_NBYTES:
            raise ProtocolViolationError("that is too large for a reply")
        async with self._source.open(unpack_items(items), nbytes) as served:
            return b"".join(served.views)

    async def _serve_send(
        self, items: bytes, nbytes: int, key: tuple[bytes, int], tag: int, *, shared: bool
    ) -> None:
        endpoint = self._served.get(key)
        if endpoint is None:
            raise ProtocolViolationError("there is no such session of ucx")
        started: asyncio.Future[None] = self.io.loop.create_future()
        self.spawn(self._send(unpack_items(items), nbytes, (endpoint, tag, shared), started))
        await started  # a refusal is the reply; after it come the messages

    async def _send(
        self,
        items: list[Item],
        nbytes: int,
        way: tuple[Endpoint, int, bool],
        started: asyncio.Future[None],
    ) -> None:
        endpoint, tag, shared = way
        try:
            async with self._source.open(items, nbytes) as served:  # held until UCX lets go (OWN-1)
                phase("ucx.sending")
                transfer = Outgoing(endpoint, tag, memory_to_send(served.views, shared=shared))
                await self.run(
                    self.worker.carry_out(
                        transfer, lambda: post(self.io.loop, settle, started, None, None)
                    )
                )
        except Exception as exc:
            if not started.done():
                started.set_exception(exc)
            elif not isinstance(exc, AiordtError | UcxError):  # the consumer has gone
                raise
        except BaseException:
            started.cancel()
            raise

    def _let_go(self, key: tuple[bytes, int]) -> None:
        endpoint = self._served.pop(key, None)
        if endpoint is not None:
            self.post(self.worker.disconnect, endpoint)

    @override
    def forget(self, peer_id: bytes) -> None:
        for key in [key for key in self._served if key[0] == peer_id]:
            self._let_go(key)
        for link in list(self._links):
            if link.peer_id == peer_id:
                link.lose()

    @override
    async def aclose(self) -> None:
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is None or self._starting is None:
            return
        await asyncio.wait({self._starting})
        failed = self._starting.cancelled() or self._starting.exception() is not None
        cleanup = asyncio.sleep(0) if failed else self._starting.result().aclose()
        thread.close(cleanup, _CLOSE_SECONDS)
