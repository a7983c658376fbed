"""What is fuzzed, and real bytes to begin with.

A target takes any bytes. It raises if these did what they must not: an error that is none of
aiordt's, a task that failed, a stranger let in. Each keeps one network over all its inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgpack
import pytest
import torch

from aiordt import _copies, _peer, _wire
from aiordt._config import Config
from aiordt._errors import AiordtError, ProtocolViolationError
from aiordt._layout import Cut
from aiordt._peer import Network
from aiordt._progress import Workers
from aiordt._registry import Registry
from aiordt._sockets import listen, listen_locally
from aiordt._wire import Challenge, Hello, Message, Sealer
from aiordt.abc import Context, PeerAddress
from aiordt.channels import _frames
from aiordt.transports import Transports

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_T = TypeVar("_T")

SECRET = b"the cluster's secret"
SERVER, CLIENT, NONCE, KEY = b"s" * 16, b"c" * 16, b"n" * 16, b"k" * 16
CUT = Cut(0, (2, 2), (2, 1), 4, None)
HELLOS = (
    Hello(_wire.CONTROL, CLIENT, SERVER, NONCE, b""),
    Hello(_wire.STREAM, CLIENT, SERVER, NONCE, KEY),
    Hello(_wire.CONTROL, CLIENT, CLIENT, NONCE, b""),
)
MESSAGES: tuple[Message, ...] = (
    _wire.Pull([(KEY, 0, None), (KEY, 1, CUT)], 16, []),
    _wire.Pull([(KEY, 0, None)], 16, [NONCE]),
    _wire.PullReply(b"payload"),
    _wire.Seen([KEY]),
    _wire.Failure("UsageError", "text"),
    _wire.Cancel(1),
    _wire.TransportMessage("tcp", b"\x93\x01\x02\x03"),
    _wire.Ready([KEY]),
)
ADDRESS = PeerAddress("127.0.0.1", 4711, SERVER, 99, bytes(16), 1 << 40)


@dataclass(frozen=True)
class Target:
    """What takes any bytes, and real ones."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def framed(body: bytes) -> bytes:
    return _wire.pack_header(len(body)) + body


def encoded(kind: int = _wire.KIND_REQUEST) -> list[bytes]:
    return [_wire.encode(kind, number, message) for number, message in enumerate(MESSAGES, 1)]


# --- decoders -----------------------------------------------------------------------------------

_DECODERS: tuple[Callable[[bytes], object], ...] = (
    _wire.decode,
    _wire.unpack_hello,
    _wire.unpack_challenge,
    _wire.unpack_items,
    _copies.unpack_address,
    _frames.unpack_numbers,
    lambda data: list(_frames.Parser(Sealer(KEY)).feed(data)),
)


def decode(data: bytes) -> None:
    """WIRE-2: what is decoded can be used and, sent again, means the same."""
    for decoder in _DECODERS:
        with contextlib.suppress(ProtocolViolationError):
            found = decoder(data)
            if isinstance(found, tuple) and len(found) == 3 and isinstance(found[2], Message):
                kind, number, message = found
                if _fits(number):
                    assert _wire.decode(_wire.encode(kind, number, message)) == found
            elif isinstance(found, Hello):
                assert _wire.unpack_hello(_wire.pack_hello(found)) == found
            elif isinstance(found, PeerAddress):
                assert _copies.unpack_address(_copies.pack_address(found)) == found


def _fits(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 64


def decode_seeds() -> tuple[bytes, ...]:
    sealed = Sealer(KEY)
    return (
        *encoded(),
        *map(_wire.pack_hello, HELLOS),
        _wire.pack_challenge(Challenge(NONCE, bytes(32))),
        _wire.pack_items([(KEY, 0, None), (KEY, 3, CUT)]),
        _copies.pack_address(ADDRESS),
        msgpack.packb([1, 2, 3]),
        sealed.seal(_frames.pack_credit([1, 2])) + sealed.seal(_frames.pack_end("")),
    )


# --- networks -----------------------------------------------------------------------------------


class Here:
    """Everything on one loop, step by step (`aiordt.abc.Io`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return await coroutine


class Harness:
    """A network that exports a tensor under `KEY`, on a loop of its own."""

    current: ClassVar[Harness | None] = None

    def __init__(self) -> None:
        self.loop = asyncio.SelectorEventLoop()
        self.wrong: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.wrong.append(context))
        self.seen: list[Message] = []
        self.streams = 0
        self.workers = Workers("fuzz", 1)
        self.registry = Registry(self.workers)
        export = self.registry.begin([torch.arange(4)], "fuzz")
        self.registry._exports[KEY] = self.registry._exports.pop(export.key)
        config = Config(transports=("tcp",))
        context = Context(Here(self.loop), self.registry, config)
        self.transports = Transports(context, self.workers)
        listener = listen("127.0.0.1")
        name = os.urandom(16)  # so that several may run on a host
        local = listen_locally(name)
        assert local is not None
        self.listener = local
        self.address = replace(ADDRESS, port=listener.getsockname()[1], runtime_id=name)
        self.network = Network(
            listener,
            local,
            SERVER,
            secret=self.secret,
            handle=self.handle,
            accept=self.accept,
            lost=self.transports.forget,
            tls=lambda: None,
        )

    @classmethod
    def get(cls) -> Harness:
        if cls.current is None:
            cls.current = Harness()
        return cls.current

    @classmethod
    def end(cls) -> None:
        harness, cls.current = cls.current, None
        if harness is not None:
            harness.loop.run_until_complete(harness.network.aclose())
            harness.loop.run_until_complete(harness.transports.aclose())
            harness.loop.close()
            harness.registry.close()
            harness.workers.close()

    async def secret(self) -> bytes:
        return SECRET

    async def handle(self, message: Message, peer_id: bytes) -> Message | None:
        self.seen.append(message)
        return await self.transports.serve(message, peer_id)

    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        self.streams += 1
        return False

    async def settled(self) -> None:
        """Let all tasks end, and the network be as it was."""
        for connection in list(self.network._connections):
            await connection.aclose()
        mine = asyncio.current_task()
        rest = [task for task in asyncio.all_tasks() if task is not mine]
        if rest:
            await asyncio.wait(rest)
        assert not self.network._connections
        assert not self.wrong, self.wrong


def _pair(data: bytes) -> tuple[socket.socket, socket.socket]:
    """A socket from which ``data`` comes, and its other end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.settimeout(0)
    theirs.send(data[: 64 << 10])
    theirs.shutdown(socket.SHUT_WR)
    return ours, theirs


def handshake(data: bytes) -> None:
    """AUTH-1: a stranger who says this to a process hears a challenge, and is not let in."""
    harness = Harness.get()

    async def greet() -> bytes:
        ours, theirs = _pair(data)
        with theirs:
            await harness.network._greet(ours, "a stranger")
            await harness.settled()
            with contextlib.suppress(ConnectionResetError):
                return theirs.recv(1 << 16)
            return b""

    said = harness.loop.run_until_complete(greet())
    assert not harness.seen
    assert not harness.streams
    assert _peer._WELCOME not in said
    assert SECRET not in said


def client(data: bytes) -> None:
    """AUTH-1: who answers this to a process that connects is no peer of it."""
    harness = Harness.get()

    async def answer() -> None:
        sock, _ = await harness.loop.sock_accept(harness.listener)
        with sock:
            sock.send(data[: 64 << 10])
            sock.shutdown(socket.SHUT_WR)
            while await harness.loop.sock_recv(sock, 1 << 16):
                pass

    async def connect() -> None:
        answering = harness.loop.create_task(answer())
        with pytest.raises(AiordtError):
            await harness.network.connect(harness.address, _wire.CONTROL, local=True)
        with contextlib.suppress(ConnectionError):
            await answering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_peer, "_VERDICT_SECONDS", 0)  # whether it died is no question here
        harness.loop.run_until_complete(connect())


def connection(data: bytes) -> None:
    """WIRE-2, RPC-2: what a peer with the secret says, however odd, is served or ends it.

    The bytes are frames, each with its length; they are sealed as they should be.
    """
    harness = Harness.get()
    sealer, _ = _wire.sealers(SECRET, HELLOS[0], NONCE)
    sealed = b""
    while len(data) > 2:
        length = int.from_bytes(data[:2], "big")
        sealed += sealer.seal(data[2 : 2 + length])
        data = data[2 + length :]

    async def serve() -> None:
        ours, theirs = _pair(sealed)
        with theirs:
            incoming, outgoing = _wire.sealers(SECRET, HELLOS[0], NONCE)
            streams = await asyncio.open_connection(sock=ours)
            made = harness.network._start(streams, CLIENT, (outgoing, incoming))
            await made._task
            await harness.settled()

    harness.loop.run_until_complete(serve())
    harness.seen.clear()


def connection_seeds() -> tuple[bytes, ...]:
    def sized(body: bytes) -> bytes:
        return len(body).to_bytes(2, "big") + body

    each = [sized(body) for kind in range(3) for body in encoded(kind)]
    return (*each, b"".join(each))


def handshake_seeds() -> tuple[bytes, ...]:
    hellos = [framed(_wire.pack_hello(hello)) for hello in HELLOS]
    proofs = [framed(_wire.proof(SECRET, b"client", hello, NONCE)) for hello in HELLOS]
    return (*hellos, *map(bytes.__add__, hellos, proofs))


CHALLENGE = framed(_wire.pack_challenge(Challenge(NONCE, bytes(32))))
TARGETS = {
    "decode": Target(decode, decode_seeds()),
    "handshake": Target(handshake, handshake_seeds()),
    "client": Target(client, (framed(_peer._STALE), framed(_peer._WELCOME), CHALLENGE)),
    "connection": Target(connection, connection_seeds()),
}
