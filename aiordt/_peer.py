"""Other processes: authenticated connections and a symmetric, typed RPC over them.

Everything here runs on the io loop. A control connection carries requests, replies and
notes in both directions; a payload stream is handed, once authenticated, to its transport.

Invariants:
    AUTH-1  Nothing of a peer is acted on before it has proved that it knows the secret, but
            that the process at an address says it is another one.
    AUTH-2  At most `MAX_HANDSHAKES` unauthenticated connections are open, and never more than a
            quarter of the files that this process may have open; each ends within
            `HANDSHAKE_SECONDS`, and the oldest makes room for a new one.
    AUTH-3  However many connect, those that are let in go on meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import os
import resource
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from aiordt import _tls, _wire
from aiordt._errors import (
    AiordtError,
    AuthenticationError,
    OwnerDiedError,
    PeerLostError,
    ProtocolViolationError,
    TransferError,
)
from aiordt._metrics import phase
from aiordt._rpc import Connection
from aiordt._sockets import family, local_name, tune
from aiordt.abc import Peer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiordt._tls import Tls
    from aiordt._wire import Message, Sealer
    from aiordt.abc import PeerAddress

_log = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 5.0
MAX_HANDSHAKES: Final = 1024
#: How long a connection that broke is watched for its peer's death before a verdict.
_VERDICT_SECONDS: Final = 1.0

_BAD_SECRET: Final = b"secret"
_STALE: Final = b"stale"
_WELCOME: Final = b"welcome"
#: ... to go on by TLS.
_WELCOME_TLS: Final = b"welcome to tls"
_WELCOMES: Final = (_WELCOME, _WELCOME_TLS)


async def _send_frame(sock: socket.socket, body: bytes) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, _wire.pack_header(len(body)) + body)


async def _receive_frame(sock: socket.socket) -> bytes:
    header = await _receive_exactly(sock, _wire.HEADER.size)
    length = _wire.frame_length(header, limit=_wire.MAX_HANDSHAKE)
    return await _receive_exactly(sock, length)


async def _receive_exactly(sock: socket.socket, nbytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < nbytes:
        got = await loop.sock_recv(sock, nbytes - len(data))
        if not got:
            raise ConnectionResetError(errno.ECONNRESET, "closed during the handshake")
        data += got
    return data


class Network:
    """This process's listeners, and its connections to and from others.

    Args:
        listener: Where others reach it over the network.
        local: Where others of this host reach it, to be handed file descriptors; or ``None``.
        runtime_id: Who this process is.
        secret: Gives the cluster's secret.
        handle: Answers requests.
        accept: Takes payload streams.
        lost: Is told when the last connection to a peer has ended.
        tls: Gives what control connections use beside; or ``None``.
    """

    def __init__(
        self,
        listener: socket.socket,
        local: socket.socket | None,
        runtime_id: bytes,
        *,
        secret: Callable[[], Awaitable[bytes]],
        handle: Callable[[Message, bytes], Awaitable[Message | None]],
        accept: Callable[[bytes, bytes, socket.socket], bool],
        lost: Callable[[bytes], None],
        tls: Callable[[], Tls | None],
    ) -> None:
        self.runtime_id = runtime_id
        self._listeners = [listener] if local is None else [listener, local]
        self._secret = secret
        self._handle = handle
        self._accept = accept
        self._lost = lost
        self._tls = tls
        self._connections: set[Connection] = set()
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._room = _room()
        self._serving: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Accept connections until closed. On the io loop."""
        loop = asyncio.get_running_loop()
        self._serving = [loop.create_task(self._serve(each)) for each in self._listeners]

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as exc:
                if self._closed or exc.errno == errno.EBADF:
                    return
                _log.warning("accepting a connection failed: %s", exc)
                await asyncio.sleep(0.1)  # out of file descriptors: let some be closed
                continue
            if len(self._handshakes) >= self._room:
                oldest = next(iter(self._handshakes))  # a real one takes some 2 ms
                del self._handshakes[oldest]
                oldest.cancel()
            name = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "this host"
            task = loop.create_task(self._greet(sock, name))
            self._handshakes[task] = None
            task.add_done_callback(lambda task: self._handshakes.pop(task, None))
            await asyncio.sleep(0)  # AUTH-3: while connections wait, `sock_accept` does not

    async def _greet(self, sock: socket.socket, name: str) -> None:
        sock.settimeout(0)
        taken = False
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                hello = _wire.unpack_hello(await _receive_frame(sock))
                tune(sock, impatient=hello.purpose == _wire.CONTROL)
                if hello.server != self.runtime_id:
                    await _send_frame(sock, _STALE + hello.server)
                    return
                sealers = await self._authenticate(sock, hello)
                taken = await self._take(sock, hello, sealers)
        except TimeoutError:
            _log.warning("handshake with %s took over %s s", name, HANDSHAKE_SECONDS)
        except AiordtError as exc:
            _log.warning("handshake with %s refused: %s", name, exc)
        except OSError as exc:
            _log.debug("handshake with %s broke off: %s", name, exc)
        finally:
            if not taken:
                sock.close()

    async def _authenticate(self, sock: socket.socket, hello: _wire.Hello) -> tuple[Sealer, Sealer]:
        secret = await self._secret()
        nonce = os.urandom(_wire.NONCE_NBYTES)
        proof = _wire.proof(secret, b"server", hello, nonce)
        await _send_frame(sock, _wire.pack_challenge(_wire.Challenge(nonce, proof)))
        answer = await _receive_frame(sock)
        if not hmac.compare_digest(answer, _wire.proof(secret, b"client", hello, nonce)):
            await _send_frame(sock, _BAD_SECRET)
            raise AuthenticationError("it does not know the cluster's secret", peer="")
        phase("peer.authenticated")
        await _send_frame(sock, self._welcome(hello.purpose))
        return _wire.sealers(secret, hello, nonce)

    def _welcome(self, purpose: str) -> bytes:
        """What a server says to whom it lets in, and a client waits for (TLS-1)."""
        return _WELCOME_TLS if purpose == _wire.CONTROL and self._tls() is not None else _WELCOME

    async def _take(
        self, sock: socket.socket, hello: _wire.Hello, sealers: tuple[Sealer, Sealer]
    ) -> bool:
        incoming, outgoing = sealers
        if hello.purpose == _wire.STREAM:
            sock.settimeout(None)
            return self._accept(hello.stream, hello.client, sock)
        tls = self._tls()
        if tls is None:
            streams = await asyncio.open_connection(sock=sock)
        else:
            streams = await _tls.serve(tls, sock, outgoing)
        self._start(streams, hello.client, (outgoing, incoming))
        return True

    def _start(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        peer_id: bytes,
        sealers: tuple[Sealer, Sealer],
    ) -> Connection:
        connection = Connection(
            *streams,
            peer_id=peer_id,
            sealers=sealers,
            handle=self._handle,
            ended=self._ended,
        )
        self._connections.add(connection)
        return connection

    def _ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if all(other.peer_id != connection.peer_id for other in self._connections):
            self._lost(connection.peer_id)

    async def connect(
        self, address: PeerAddress, purpose: str, stream: bytes = b"", *, local: bool = False
    ) -> tuple[socket.socket, tuple[Sealer, Sealer]]:
        """Open and authenticate a connection; ``local``: to its socket on this host.

        Raises:
            OwnerDiedError: Nobody, or another process, listens there.
            PeerLostError: It cannot be reached.
            AuthenticationError: The two ends do not share the secret.
        """
        loop = asyncio.get_running_loop()
        secret = await self._secret()
        hello = _wire.Hello(
            purpose, self.runtime_id, address.runtime_id, os.urandom(_wire.NONCE_NBYTES), stream
        )
        kind = socket.AF_UNIX if local else family(address.host)
        where = local_name(address.runtime_id) if local else (address.host, address.port)
        sock = socket.socket(kind, socket.SOCK_STREAM)
        sock.settimeout(0)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                phase("peer.connecting")
                await loop.sock_connect(sock, where)
                tune(sock, impatient=purpose == _wire.CONTROL)
                await _send_frame(sock, _wire.pack_hello(hello))
                answer = await _receive_frame(sock)
                if answer == _STALE + address.runtime_id:  # else what was asked had been garbled
                    raise OwnerDiedError(
                        f"{address} died: another process has its port now", owner=str(address)
                    )
                challenge = _wire.unpack_challenge(answer)
                expected = _wire.proof(secret, b"server", hello, challenge.nonce)
                if not hmac.compare_digest(challenge.proof, expected):
                    raise _unproved(address)
                await _send_frame(sock, _wire.proof(secret, b"client", hello, challenge.nonce))
                welcome = await _receive_frame(sock)
                if welcome != self._welcome(purpose):
                    raise _unlike(address) if welcome in _WELCOMES else _unproved(address)
        except BaseException as exc:
            sock.close()
            if isinstance(exc, ConnectionRefusedError) or (
                isinstance(exc, ConnectionResetError) and await _refuses(address)
            ):
                raise _nobody(address) from exc
            if isinstance(exc, TimeoutError | OSError | ProtocolViolationError):
                raise PeerLostError(
                    f"{address} cannot be reached: {exc!r}; check that this host may "
                    "connect to that address",
                    peer=str(address),
                ) from exc
            raise
        return sock, _wire.sealers(secret, hello, challenge.nonce)

    async def control(self, address: PeerAddress) -> Connection:
        """Open a control connection; raises as `connect`."""
        sock, sealers = await self.connect(address, _wire.CONTROL)
        tls = self._tls()
        if tls is None:
            streams = await asyncio.open_connection(sock=sock)
        else:
            try:
                async with asyncio.timeout(HANDSHAKE_SECONDS):
                    streams = await _tls.join(tls, sock, sealers[1])
            except (OSError, EOFError, ProtocolViolationError) as exc:
                sock.close()
                if await _refuses(address):
                    raise _nobody(address) from exc
                raise AuthenticationError(
                    f"{address} and this process cannot agree on TLS: {exc!r}; do both have "
                    "certificates of one authority (RAY_TLS_CA_CERT)?",
                    peer=str(address),
                ) from exc
        return self._start(streams, address.runtime_id, sealers)

    async def aclose(self) -> None:
        """Stop listening and end all connections. Idempotent."""
        self._closed = True
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)
        for listener in self._listeners:
            listener.close()
        for task in list(self._handshakes):
            task.cancel()
        for connection in list(self._connections):
            await connection.aclose()


async def _refuses(address: PeerAddress) -> bool:
    """Whether nobody listens there any more: tells a death from a refusal in a handshake.

    A process that is being killed loses its sockets one by one, so it is watched for a while.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _VERDICT_SECONDS
    while loop.time() < deadline:
        with socket.socket(family(address.host), socket.SOCK_STREAM) as sock:
            sock.settimeout(0)
            try:
                async with asyncio.timeout_at(deadline):
                    await loop.sock_connect(sock, (address.host, address.port))
            except ConnectionRefusedError:
                return True
            except (OSError, TimeoutError):
                return False
        await asyncio.sleep(0.05)
    return False


def _nobody(address: PeerAddress) -> OwnerDiedError:
    return OwnerDiedError(f"{address} died: nobody listens there any more", owner=str(address))


def _unlike(address: PeerAddress) -> AuthenticationError:
    return AuthenticationError(
        f"one of {address} and this process uses TLS, and the other does not: set RAY_USE_TLS "
        "for all processes of the cluster, or for none",
        peer=str(address),
    )


def _unproved(address: PeerAddress) -> AuthenticationError:
    return AuthenticationError(
        f"{address} and this process do not share the cluster's secret: do they belong to the "
        "same Ray cluster?",
        peer=str(address),
    )


def _room() -> int:
    """How many unauthenticated connections may be open (AUTH-2)."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_HANDSHAKES if files == resource.RLIM_INFINITY else min(MAX_HANDSHAKES, files // 4)


class RemotePeer(Peer):
    """Another process, connected to when first needed. Its methods run on the io loop."""

    def __init__(self, address: PeerAddress, network: Network) -> None:
        self.address = address
        self._network = network
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None

    async def _connected(self) -> Connection:
        earlier = self._connecting
        if earlier is not None:
            with suppress(PeerLostError):  # as it was before this caller came
                return await asyncio.shield(earlier)
        if self._connection is not None and not self._connection.closed.is_set():
            return self._connection
        if self._connecting is None or self._connecting is earlier:
            self._connecting = asyncio.get_running_loop().create_task(
                self._network.control(self.address)
            )
            self._connecting.add_done_callback(self._did_connect)
        # Shared by all callers: one that is cancelled must not cancel it for the others.
        return await asyncio.shield(self._connecting)

    def _did_connect(self, task: asyncio.Task[Connection]) -> None:
        if self._connecting is task:
            self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._connection = task.result()

    @override
    async def reach(self) -> None:
        await self._connected()

    @override
    async def call(self, request: Message) -> Message:
        connection = await self._connected()
        try:
            return await connection.call(request)
        except OSError as exc:
            raise await self.verdict(exc, transport="control", nbytes=0) from exc

    async def note(self, message: Message) -> None:
        """Send a message that has no reply; lost if the peer is."""
        with suppress(AiordtError, OSError):
            await (await self._connected()).note(message)

    @override
    async def open_stream(self, stream: bytes) -> socket.socket:
        await self._connected()  # its end tells the other side that the stream is orphaned
        try:
            sock, _ = await self._network.connect(self.address, _wire.STREAM, stream)
        except PeerLostError as exc:
            raise await self.verdict(exc, transport="stream", nbytes=0) from exc
        sock.settimeout(None)
        return sock

    @override
    async def open_local(self, stream: bytes) -> socket.socket:
        await self._connected()
        sock, _ = await self._network.connect(self.address, _wire.STREAM, stream, local=True)
        sock.settimeout(None)
        return sock

    @override
    async def verdict(self, cause: Exception, *, transport: str, nbytes: int) -> Exception:
        connection = self._connection
        if connection is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_VERDICT_SECONDS):
                    await connection.closed.wait()
        if connection is not None and connection.unreachable:
            return PeerLostError(
                f"{self.address} cannot be reached any more: {cause}", peer=str(self.address)
            )
        if connection is None or connection.closed.is_set():
            return await self._fate(cause)
        return TransferError(
            f"{transport}: receiving {nbytes} bytes from {self.address} failed: {cause}",
            transport=transport,
            peer=str(self.address),
            nbytes=nbytes,
        )

    async def _fate(self, cause: Exception) -> Exception:
        """What became of a process whose connection has ended: that is said by its port only."""
        try:
            await self._connected()
        except OwnerDiedError:
            return OwnerDiedError(
                f"{self.address} died (its connection ended), and its tensors with it",
                owner=str(self.address),
            )
        except AiordtError as exc:
            return exc
        return PeerLostError(
            f"the connection to {self.address} broke: {cause}; it lives and can be reached "
            "again: await the ref once more",
            peer=str(self.address),
        )
