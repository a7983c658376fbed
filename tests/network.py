"""What the tests of a network share: its ends, and somebody who breaks the rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from aiordt import _peer, _wire
from aiordt._peer import Network, RemotePeer
from aiordt._sockets import listen, listen_locally
from aiordt._wire import Challenge, Hello, Message, Pull, PullReply, Sealer
from aiordt.abc import PeerAddress
from aiordt.testing import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiordt._tls import Tls

SECRET = b"the cluster's secret"
PULL = Pull([(b"k" * 16, 0, None)], 4, [])


class End:
    """One process: a network, and what came to it."""

    def __init__(self, secret: bytes = SECRET, tls: Tls | None = None) -> None:
        self.secret = secret
        self.listener = listen("127.0.0.1")
        self.port = self.listener.getsockname()[1]
        self.runtime_id = os.urandom(16)
        self.seen: list[tuple[Message, bytes]] = []
        self.streams: dict[bytes, socket.socket] = {}
        self.lost: list[bytes] = []
        self.answer: Callable[[Message], Awaitable[Message | None]] = self.echo
        self.network = Network(
            self.listener,
            listen_locally(self.runtime_id),
            self.runtime_id,
            secret=self.read_secret,
            handle=self.handle,
            accept=self.accept,
            lost=self.lost.append,
            tls=lambda: tls,
        )
        self.network.start()
        self.peers: list[RemotePeer] = []

    @property
    def address(self) -> PeerAddress:
        return PeerAddress("127.0.0.1", self.port, self.runtime_id, os.getpid(), bytes(16), 0)

    async def read_secret(self) -> bytes:
        return self.secret

    async def echo(self, message: Message) -> Message | None:
        return PullReply(b"echo") if isinstance(message, Pull) else None

    async def handle(self, message: Message, peer_id: bytes) -> Message | None:
        self.seen.append((message, peer_id))
        return await self.answer(message)

    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        self.streams[stream] = sock
        return True

    def peer(self, other: End, *, port: int = 0) -> RemotePeer:
        """Another end, by its own port or that of somebody between."""
        made = RemotePeer(replace(other.address, port=port or other.port), self.network)
        self.peers.append(made)
        return made

    async def aclose(self) -> None:
        await self.network.aclose()
        for sock in self.streams.values():
            sock.close()


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class MakeEnd(Protocol):
    """See `made_ends`."""

    def __call__(self, secret: bytes = SECRET, *, tls: Tls | None = None) -> End: ...


@asynccontextmanager
async def made_ends() -> AsyncIterator[MakeEnd]:
    """Makes ends; afterwards every file descriptor of theirs must be closed."""
    made: list[End] = []
    before = num_fds()

    def make(secret: bytes = SECRET, *, tls: Tls | None = None) -> End:
        made.append(End(secret, tls))
        return made[-1]

    yield make
    for end in made:
        await end.aclose()
    await eventually(lambda: num_fds() <= before, what="every file descriptor is closed")


class Intruder:
    """Speaks the handshake byte by byte, without the secret or with it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @staticmethod
    async def connect(end: End) -> Intruder:
        sock = socket.socket()
        sock.setblocking(False)  # noqa: FBT003  (its signature)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", end.port))
        return Intruder(sock)

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def frame(self, body: bytes) -> None:
        await self.send(_wire.pack_header(len(body)) + body)

    async def rest(self) -> bytes:
        """What comes until the other end closes, which must be soon."""
        data = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while got := await asyncio.get_running_loop().sock_recv(self.sock, 4096):
                    data += got
        self.sock.close()
        return data

    async def body(self) -> bytes:
        async with asyncio.timeout(5):
            return await _peer._receive_frame(self.sock)

    async def challenged(self, hello: Hello) -> Challenge:
        """Say hello; what it is asked."""
        await self.frame(_wire.pack_hello(hello))
        return _wire.unpack_challenge(await self.body())


async def admitted(end: End, client: bytes = b"c" * 16) -> tuple[Intruder, Sealer]:
    """One that knows the secret; and what its requests are sealed with."""
    member = await Intruder.connect(end)
    hello = hello_to(end, client=client)
    challenge = await member.challenged(hello)
    await member.frame(_wire.proof(SECRET, b"client", hello, challenge.nonce))
    assert await member.body() == _peer._WELCOME
    return member, _wire.sealers(SECRET, hello, challenge.nonce)[0]


def hello_to(end: End, **changes: object) -> Hello:
    fields: dict[str, object] = {
        "purpose": _wire.CONTROL,
        "client": b"c" * 16,
        "server": end.runtime_id,
        "nonce": os.urandom(16),
        "stream": b"",
        **changes,
    }
    return Hello(**fields)  # type: ignore[arg-type]
