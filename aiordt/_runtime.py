"""One runtime per process: it exports, serves, finds the way to others, and pulls.

It starts with the first use in a Ray session and ends with the process or the session.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import logging
import os
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import torch

from aiordt import _claims, _config, _copies, _integrity, _ray, _tls, _wire
from aiordt._admission import Admission
from aiordt._claims import Claims
from aiordt._errors import (
    AiordtError,
    ClosedError,
    PeerLostError,
    UnavailableError,
)
from aiordt._exports import warn_if_shared
from aiordt._landing import as_seen, confirm, dense_stride_of, dress, dtype_of
from aiordt._layout import span
from aiordt._markers import Markers
from aiordt._memory import Pool, laid_out
from aiordt._metrics import Counters
from aiordt._peer import Network
from aiordt._progress import Inbox, IoThread, Workers, post
from aiordt._pull import STALE_REF, Puller
from aiordt._registry import Registry
from aiordt._relay import Relay
from aiordt._route import Routes, check_shared
from aiordt._sockets import listen, listen_locally
from aiordt.abc import Context, PeerAddress, SharedLink, TransportMessage
from aiordt.transports import Transports
from aiordt.transports.cma import allow_readers, host_id

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from aiordt._config import Config
    from aiordt._landing import Header, Pullable
    from aiordt._ray import Session
    from aiordt._types import Explanation, Owner
    from aiordt._wire import Message

_log = logging.getLogger(__name__)


#: Notes to owners ("I pulled this") are gathered for so long.
_NOTE_SECONDS: Final = 0.05
#: How often a runtime looks whether its Ray session goes on (2 µs).
_SESSION_SECONDS: Final = 1.0


class Service(ABC):
    """A part that a layer above has in every runtime. Lives on the io loop.

    Attributes:
        name: Its requests come in a `TransportMessage` of this name.
    """

    name: ClassVar[str]

    @abstractmethod
    async def serve(self, request: TransportMessage, peer_id: bytes) -> Message:
        """Answer a peer's request."""

    @abstractmethod
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        """Take over an authenticated stream that a peer opened, if it is this service's."""

    @abstractmethod
    def lost(self, peer_id: bytes) -> None:
        """The connection to a peer has ended, and perhaps the peer."""

    @abstractmethod
    async def aclose(self) -> None:
        """End everything."""


_Serve: TypeAlias = "Callable[[TransportMessage, bytes], Awaitable[Message | None]]"

_services: Final[list[Callable[[Runtime], Service]]] = []


def add_service(make: Callable[[Runtime], Service]) -> None:
    """Let every runtime that starts from now on have such a service."""
    _services.append(make)


class Runtime(Puller):
    """aiordt in this process. Made by `current`."""

    def __init__(self, session: Session, config: Config) -> None:
        self.session = session
        self.config = config
        self.pid = os.getpid()
        self.counters = Counters()
        self.pool = Pool(config.pool_nbytes)
        self.workers = Workers("worker", 4)
        self._ray_questions = Workers("ray", 2)  # may block for long when the network is cut
        self.registry = Registry(self.workers, config.max_exported_bytes)
        self.closed = False
        self._admission = Admission(config.max_in_flight_bytes)
        self._owner: Owner | None = None
        self._inline_nbytes = 0
        self._secret: asyncio.Task[bytes] | None = None
        runtime_id = os.urandom(_wire.NONCE_NBYTES)
        self._token = ctypes.create_string_buffer(runtime_id, len(runtime_id))
        host = _ray.node_ip()
        listener = listen(host)
        self.io = IoThread()
        self.address = PeerAddress(
            host,
            listener.getsockname()[1],
            runtime_id,
            self.pid,
            host_id(),
            ctypes.addressof(self._token),
        )
        allow_readers()
        self.transports = Transports(Context(self.io, self.registry, config), self.workers)
        dropped = Inbox(self.io.loop, self.registry.drop)
        self.markers = Markers(self.workers, dropped.put)
        self._unsent: list[Header] = []
        self._notes = Inbox(self.io.loop, self._send_notes)
        self._network = Network(
            listener,
            listen_locally(runtime_id),
            runtime_id,
            secret=self.secret,
            handle=self._handle,
            accept=self._accept,
            lost=self._lost,
            tls=functools.cache(_tls.load),
        )
        self.routes = Routes(self.io, self._network, self.transports, config.transports)
        self.relay = Relay(
            self.address,
            self.io,
            registry=self.registry,
            routes=self.routes,
            counters=self.counters,
            workers=self.workers,
            limit=config.relay_nbytes if "shm" in config.transports else 0,
        )
        self.claims = Claims(
            self.address,
            self.io,
            registry=self.registry,
            routes=self.routes,
            is_gone=lambda holder: self._ray_says(
                lambda: holder.host not in _ray.nodes_by_address()
            ),
        )
        self.checks = _integrity.Checks(
            self.io, self.registry, self.routes, self.relay, self.workers
        )
        self.services = [make(self) for make in _services]
        self._serving: dict[str, _Serve] = {
            _copies.NAME: self.relay.serve,
            _claims.NAME: self.claims.serve,
            _integrity.NAME: self.checks.serve,
            **{service.name: service.serve for service in self.services},
        }
        post(self.io.loop, self._network.start)
        post(self.io.loop, lambda: self.io.spawn(self._watch_session()))

    @property
    def owner(self) -> Owner:
        """Who this process is, as it stands in its refs."""
        if self._owner is None:
            self._owner = _ray.identity()
        return self._owner

    async def secret(self) -> bytes:
        """The cluster's secret, read once. On the io loop.

        Raises:
            PeerLostError: Ray does not answer.
        """
        if self._secret is None or (self._secret.done() and self._secret.exception()):

            async def read() -> bytes:
                try:
                    return await self.workers.run(lambda: _ray.read_secret(self.session))
                except AiordtError:
                    raise
                except Exception as exc:
                    raise PeerLostError(
                        f"the cluster's secret could not be read from Ray's GCS: {exc}",
                        peer="GCS",
                    ) from exc

            if _ray.is_driver() and not _ray.is_guarded():
                _log.warning(
                    "this Ray cluster has no token authentication (RAY_AUTH_MODE=token): whoever "
                    "reaches it can read aiordt's secret, and run code in it"
                )
            self._secret = asyncio.get_running_loop().create_task(read())
        return await asyncio.shield(self._secret)

    async def _watch_session(self) -> None:
        """End with the session, even if nobody asks for anything any more."""
        while not self.session.over:  # noqa: ASYNC110  (Ray tells nobody)
            await asyncio.sleep(_SESSION_SECONDS)
        threading.Thread(target=close, args=(self,), daemon=True).start()

    # --- serving: on the io loop -----------------------------------------------------------

    async def _handle(self, message: Message, peer_id: bytes) -> Message | None:
        if isinstance(message, _wire.Seen):
            for key in message.keys:
                export = self.registry.seen(key, peer_id)
                if export is not None:
                    warn_if_shared(export)
            return None
        if isinstance(message, _wire.Ready):
            await self.registry.wait_ready(message.keys)
            return message
        if isinstance(message, TransportMessage) and message.transport in self._serving:
            return await self._serving[message.transport](message, peer_id)
        return await self.transports.serve(message, peer_id)

    def _accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        if any(service.accept(stream, peer_id, sock) for service in self.services):
            return True
        return self.transports.accept(stream, peer_id, sock)

    def _lost(self, peer_id: bytes) -> None:
        for service in self.services:
            service.lost(peer_id)
        self.relay.forget(peer_id)
        self.transports.forget(peer_id)
        self.routes.forget(peer_id)
        self.claims.lost(peer_id)

    def _send_notes(self, headers: list[Header]) -> None:
        self._unsent += headers
        if len(self._unsent) > len(headers):
            return  # a sender is waiting already

        async def send() -> None:
            await asyncio.sleep(_NOTE_SECONDS)
            headers, self._unsent = self._unsent, []
            keys: dict[bytes, tuple[Header, list[bytes]]] = {}
            for header in headers:
                keys.setdefault(header.address.runtime_id, (header, []))[1].append(header.key)
            for header, noted in keys.values():
                await self.routes.peer(header.address).note(_wire.Seen(noted))

        self.io.spawn(send())

    async def explain(self, ref: Pullable) -> Explanation:
        """See `aiordt.explain`."""
        self.check(ref)
        return await self.routes.explain(ref, self.address.runtime_id, self.suited(ref))

    # --- looking ---------------------------------------------------------------------------

    async def view(self, ref: Pullable) -> Any:  # noqa: ANN401
        """See `aiordt.TensorRef.view`."""
        self.check(ref)
        tensor = self.here(ref)
        if tensor is not None:
            self.came_along(ref)
            return tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
        check_shared(ref, "shm")
        link, stride, nbytes = await self._shared(ref)
        flat = await link.view(ref.meta.segment, ref.meta.address, nbytes)
        return as_seen(laid_out(flat.view(dtype_of(ref.meta.dtype)), ref.meta.shape, stride), ref)

    async def copy_on_write(self, ref: Pullable) -> Any:  # noqa: ANN401
        """As a pull; but a page of the tensor is copied only when it is written to.

        The lease is held until nothing uses the memory. ``None`` for what does not lie, in one
        piece, in shared memory of another process of this host.
        """
        self.check(ref)
        if ref.inline is not None or self.here(ref) is not None:
            return None
        if ref.meta.stride is not None or self.suited(ref) != "shm":
            return None
        lease = ref.lease
        try:
            link, stride, nbytes = await self._shared(ref)
        except UnavailableError:
            return None
        meta = ref.meta
        flat = await link.copy_on_write(meta.segment, meta.address, nbytes, lease)
        self.arrived([ref])
        return dress(laid_out(flat.view(dtype_of(meta.dtype)), meta.shape, stride), ref)

    async def _shared(self, ref: Pullable) -> tuple[SharedLink, tuple[int, ...], int]:
        """The link to a tensor in shared memory, its strides, and the bytes that it spans."""
        await confirm([ref], None)
        stride = dense_stride_of(ref.meta)
        nbytes = span(ref.meta.shape, stride, dtype_of(ref.meta.dtype).itemsize)
        _, link = await self.reached(ref.header, self.find(ref.header, "shm", None))
        await self.reached(ref.header, self.routes.wait_ready([ref.header]))  # DEV-1
        assert isinstance(link, SharedLink)  # noqa: S101  (what `shm` is)
        return link, stride, nbytes

    # --- the end ---------------------------------------------------------------------------

    def close(self, timeout: float = 1.0) -> None:
        """End this runtime; every pending wait ends. Blocks for ``timeout`` s at most."""
        if self.closed:
            return
        self.closed = True
        self.markers.close()
        self.registry.close()

        async def cleanup() -> None:
            for service in self.services:
                await service.aclose()
            await self.relay.aclose()
            await self._network.aclose()
            await self.routes.aclose()
            await self.transports.aclose()

        if self.pid == os.getpid():
            self.io.close(cleanup(), timeout)
        self.workers.close()
        self._ray_questions.close()
        self.pool.close()


class _Current:
    """The one runtime of this process."""

    runtime: Runtime | None = None


_lock = threading.Lock()


def current() -> Runtime:
    """The runtime of this process, started if need be (about 0.3 ms, once).

    Raises:
        UsageError: Ray is not initialized here.
    """
    session = _ray.session()
    runtime = _Current.runtime
    if runtime is not None and runtime.session is session and runtime.pid == os.getpid():
        return runtime
    with _lock:
        runtime = _Current.runtime
        if runtime is not None and runtime.session is session and runtime.pid == os.getpid():
            return runtime
        if runtime is not None:
            _config.release()
            threading.Thread(target=runtime.close, daemon=True).start()
        _Current.runtime = Runtime(session, _config.take())
        return _Current.runtime


def current_for(ref: Pullable) -> Runtime:
    """The runtime that may pull a ref.

    Raises:
        ClosedError: The ref belongs to a session that has ended.
        UsageError: Ray is not initialized here.
    """
    session = ref.header.session
    if isinstance(session, _ray.Session) and not session.alive:
        raise ClosedError(STALE_REF)
    return current()


def current_or_none() -> Runtime | None:
    """The runtime, if it has been started and its session goes on."""
    runtime = _Current.runtime
    if runtime is None or runtime.pid != os.getpid() or not runtime.session.alive:
        return None
    return runtime


def close(only: Runtime | None = None) -> None:
    """End the runtime of this process, if there is one (and it is ``only``)."""
    with _lock:
        runtime = _Current.runtime
        if runtime is None or (only is not None and runtime is not only):
            return
        _Current.runtime = None
        _config.release()
    runtime.close()


def _end() -> None:
    _ray.end_session()
    close()


_ray.before_shutdown(_end)
