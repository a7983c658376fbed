"""TLS for control connections, by Ray's settings: who gets in, and that nothing goes beside."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trustme

from aiordt import _tls, _wire
from aiordt._errors import AuthenticationError, OwnerDiedError, UsageError
from aiordt._wire import PullReply
from aiordt.testing import TcpProxy, eventually
from aiordt.transports.tcp import TcpTransport
from tests.network import PULL, SECRET, Intruder, MakeEnd, hello_to, made_ends

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiordt._tls import Tls


@pytest.fixture
async def ends() -> AsyncIterator[MakeEnd]:
    async with made_ends() as make:
        yield make


@dataclass
class Authority:
    """Somebody who gives out certificates, and where they lie."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        self._authority = trustme.CA(organization_name=self.name)
        self._authority.cert_pem.write_to_path(self.folder / f"{self.name}.pem")

    def settings(self, node: str = "127.0.0.1") -> dict[str, str]:
        """Ray's variables, for a node."""
        certificate, key = (self.folder / f"{self.name}-{node}.{end}" for end in ("crt", "key"))
        if not key.exists():
            made = self._authority.issue_cert(node)
            made.private_key_pem.write_to_path(key)
            made.cert_chain_pems[0].write_to_path(certificate)
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_CA_CERT": str(self.folder / f"{self.name}.pem"),
            "RAY_TLS_SERVER_CERT": str(certificate),
            "RAY_TLS_SERVER_KEY": str(key),
        }

    def tls(self, node: str = "127.0.0.1") -> Tls:
        return loaded(self.settings(node))


def loaded(settings: dict[str, str]) -> Tls:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        tls = _tls.load()
    assert tls is not None
    return tls


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority("ray", tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority("another", tmp_path_factory.mktemp("others"))


async def test_calls_go_both_ways_inside_tls(ends: MakeEnd, authority: Authority) -> None:
    left, right = ends(tls=authority.tls("10.0.0.1")), ends(tls=authority.tls("10.0.0.2"))
    assert await left.peer(right).call(PULL) == PullReply(b"echo")
    assert await right.peer(left).call(PULL) == PullReply(b"echo")
    big = PullReply(bytes(1 << 20))

    async def much(_: object) -> PullReply:
        return big

    right.answer = much
    assert await left.peer(right).call(PULL) == big


async def test_streams_stay_as_they_are(ends: MakeEnd, authority: Authority) -> None:
    left, right = ends(tls=authority.tls()), ends(tls=authority.tls())
    name = os.urandom(16)
    sock = await left.peer(right).open_stream(name)
    await eventually(lambda: name in right.streams, what="the stream was handed over")
    sock.sendall(b"payload")
    assert await asyncio.to_thread(right.streams[name].recv, 7) == b"payload"
    sock.close()


async def _overheard(left_tls: Tls | None, ends: MakeEnd) -> bytes:
    """All that goes over the wire when one end asks the other for something."""
    left, right = ends(tls=left_tls), ends(tls=left_tls)
    heard = b""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)

        async def pass_on(source: socket.socket, target: socket.socket) -> None:
            nonlocal heard
            with contextlib.suppress(OSError):
                while data := await loop.sock_recv(source, 1 << 16):
                    heard += data
                    await loop.sock_sendall(target, data)

        async def listen() -> None:
            near, _ = await loop.sock_accept(listener)
            with near, socket.socket() as far:
                far.settimeout(0)
                await loop.sock_connect(far, ("127.0.0.1", right.port))
                await asyncio.gather(pass_on(near, far), pass_on(far, near))

        task = asyncio.create_task(listen())
        peer = left.peer(right, port=listener.getsockname()[1])
        await peer.call(PULL)
        for end in (left, right):
            for connection in list(end.network._connections):
                await connection.aclose()
        task.cancel()
        await asyncio.wait({task})
    return heard


async def test_who_listens_on_the_way_reads_nothing(ends: MakeEnd, authority: Authority) -> None:
    for tls, shown in ((None, True), (authority.tls(), False)):
        heard = await _overheard(tls, ends)
        assert (b"echo" in heard) is shown
        assert (b"k" * 16 in heard) is shown, "the key of an export"


@pytest.mark.parametrize("which", ["client", "server"])
async def test_only_one_end_with_tls(
    ends: MakeEnd, authority: Authority, which: str
) -> None:  # TLS-1
    client = ends(tls=authority.tls() if which == "client" else None)
    server = ends(tls=authority.tls() if which == "server" else None)
    with pytest.raises(AuthenticationError, match=r"one of .* uses TLS"):
        await client.peer(server).call(PULL)
    assert server.seen == []
    network = server.network
    await eventually(
        lambda: not (network._handshakes or network._connections), what="it was given up"
    )


async def test_a_peer_without_tls_is_cut_off(ends: MakeEnd, authority: Authority) -> None:  # TLS-1
    """It has the secret, and goes on as if there were no TLS."""
    server = ends(tls=authority.tls())
    member = await Intruder.connect(server)
    hello = hello_to(server)
    challenge = await member.challenged(hello)
    await member.frame(_wire.proof(SECRET, b"client", hello, challenge.nonce))
    await member.body()
    sealer, _ = _wire.sealers(SECRET, hello, challenge.nonce)
    await member.send(sealer.seal(_wire.encode(_wire.KIND_REQUEST, 1, PULL)))
    await member.rest()
    await eventually(lambda: not server.network._handshakes, what="it was cut off")
    assert server.seen == []
    assert server.network._connections == set()


@pytest.mark.parametrize("which", ["client", "server"])
async def test_a_certificate_of_another_authority_is_refused(
    ends: MakeEnd, authority: Authority, another: Authority, which: str
) -> None:  # TLS-2
    """The secret alone is not enough."""
    theirs = {**another.settings(), "RAY_TLS_CA_CERT": authority.settings()["RAY_TLS_CA_CERT"]}
    ours, odd = authority.tls(), loaded(theirs)
    client, server = ends(tls=odd if which == "client" else ours), ends(tls=ours)
    if which == "server":
        server = ends(tls=odd)
    with pytest.raises(AuthenticationError, match="cannot agree on TLS"):
        await client.peer(server).call(PULL)
    assert server.seen == []
    assert client.network._connections == set()
    await eventually(lambda: not server.network._connections, what="the server gave it up")


async def test_nobody_stands_between_by_a_certificate_of_another_node(
    ends: MakeEnd, authority: Authority
) -> None:  # TLS-2
    """It ends TLS itself, with a certificate of the authority, and passes on what is inside."""
    ours, theirs = authority.tls("10.0.0.1"), authority.tls("10.0.0.66")
    client, server = ends(tls=ours), ends(tls=ours)
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)

        async def between() -> None:
            near, _ = await loop.sock_accept(listener)
            far = socket.socket()
            far.settimeout(0)
            await loop.sock_connect(far, ("127.0.0.1", server.port))
            for source, target in ((near, far), (far, near), (near, far), (far, near)):
                header = await loop.sock_recv(source, _wire.HEADER.size)
                body = await loop.sock_recv(source, _wire.frame_length(header))
                await loop.sock_sendall(target, header + body)
            reader, writer = await asyncio.open_connection(
                sock=far, ssl=theirs.client, server_hostname=""
            )
            said = await reader.readexactly(_wire.HEADER.size + 16 + 32)
            protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, near, ssl=theirs.server
            )
            transport.write(said)
            writer.transport.abort()
            transport.close()

        task = asyncio.create_task(between())
        with pytest.raises(AuthenticationError, match="not the one that the server shows"):
            await client.peer(server, port=listener.getsockname()[1]).call(PULL)
        await task
    assert server.seen == []


async def test_a_server_that_dies_at_that_moment_is_dead(
    ends: MakeEnd, authority: Authority
) -> None:  # DTH-1
    client, server = ends(tls=authority.tls()), ends(tls=authority.tls())
    original = _tls.serve

    async def dies(tls: Tls, sock: socket.socket, outgoing: _wire.Sealer) -> None:
        await server.network.aclose()
        raise ConnectionResetError

    _tls.serve = dies  # type: ignore[assignment]
    try:
        with pytest.raises(OwnerDiedError, match="nobody listens"):
            await client.peer(server).call(PULL)
    finally:
        _tls.serve = original


async def test_a_connection_that_breaks_inside_tls_is_opened_again(
    ends: MakeEnd, authority: Authority
) -> None:
    left, right = ends(tls=authority.tls()), ends(tls=authority.tls())
    async with TcpProxy("127.0.0.1", right.port) as proxy:
        peer = left.peer(right, port=proxy.port)
        assert await peer.call(PULL) == PullReply(b"echo")
        proxy.cut()
        await eventually(lambda: left.lost, what="the loss was noticed")
        proxy.heal()
        assert await peer.call(PULL) == PullReply(b"echo")


# --- settings -----------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    for name, value in authority.settings().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("value", "used"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_ray_says_whether(
    environment: None, monkeypatch: pytest.MonkeyPatch, value: str, *, used: bool
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", value)
    assert (_tls.load() is not None) is used
    assert ("outside TLS" in TcpTransport.probe().reason) is used


def test_what_is_missing_is_named(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TLS_CA_CERT")
    with pytest.raises(UsageError, match="RAY_TLS_CA_CERT is not"):
        _tls.load()


def test_files_that_cannot_be_used(
    environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="No such file"):
        _tls.load()
    odd = tmp_path / "odd"
    odd.write_text("no certificate", encoding="ascii")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(odd))
    with pytest.raises(UsageError, match="cannot be used"):
        _tls.load()


def test_no_key_is_logged(environment: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        tls = _tls.load()
    assert "PRIVATE" not in caplog.text + repr(tls)
