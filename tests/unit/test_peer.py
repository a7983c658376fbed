"""Two processes' networks on loopback: who is let in, and what a call comes to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hmac
import logging
import os
import random
import socket
from typing import TYPE_CHECKING

import pytest

from aiordt import _peer, _wire
from aiordt._errors import (
    AiordtError,
    AuthenticationError,
    ClosedError,
    InvalidValueError,
    OwnerDiedError,
    PeerLostError,
    ProtocolViolationError,
    TensorFreedError,
    TransferError,
)
from aiordt._peer import RemotePeer
from aiordt._sockets import listen
from aiordt._wire import Cancel, Failure, Hello, Message, Pull, PullReply, Seen
from aiordt.abc import PeerAddress
from aiordt.testing import TcpProxy, eventually
from tests.network import PULL, SECRET, Intruder, MakeEnd, hello_to, made_ends

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SETTLE = 0.03  # how long to wait for what must not happen


@pytest.fixture
async def ends() -> AsyncIterator[MakeEnd]:
    async with made_ends() as make:
        yield make


# --- calls --------------------------------------------------------------------------------------


async def test_calls_in_both_directions(ends: MakeEnd) -> None:
    left, right = ends(), ends()
    assert await left.peer(right).call(PULL) == PullReply(b"echo")
    assert await right.peer(left).call(PULL) == PullReply(b"echo")
    assert right.seen == [(PULL, left.runtime_id)], "the caller is who it proved to be"
    assert left.seen == [(PULL, right.runtime_id)]


async def test_many_calls_share_one_connection_and_keep_apart(ends: MakeEnd) -> None:
    left, right = ends(), ends()

    async def slow_first(message: Message) -> Message:
        assert isinstance(message, Pull)
        await asyncio.sleep(0.02 if message.nbytes % 2 else 0)
        return PullReply(str(message.nbytes).encode())

    right.answer = slow_first
    peer = left.peer(right)
    replies = await asyncio.gather(*(peer.call(Pull([], number, [])) for number in range(50)))
    assert replies == [PullReply(str(number).encode()) for number in range(50)]
    assert len(right.network._connections) == 1


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (TensorFreedError("gone"), TensorFreedError),
        (InvalidValueError("size"), InvalidValueError),
        (ClosedError("over"), ClosedError),
        (ProtocolViolationError("what"), ProtocolViolationError),
        (TransferError("x", transport="t", peer="p", nbytes=1), ProtocolViolationError),
        (ZeroDivisionError("bug"), ProtocolViolationError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_errors_come_back(
    ends: MakeEnd, raised: Exception, expected: type[AiordtError]
) -> None:  # RPC-1
    left, right = ends(), ends()

    async def fail(_: Message) -> Message:
        raise raised

    right.answer = fail
    with pytest.raises(expected, match=str(raised)):
        await left.peer(right).call(PULL)
    right.answer = right.echo
    assert await left.peer(right).call(PULL) == PullReply(b"echo"), "RPC-2: it ended alone"


async def test_an_unknown_request_is_refused(ends: MakeEnd) -> None:
    left, right = ends(), ends()
    with pytest.raises(ProtocolViolationError, match="unknown request"):
        await left.peer(right).call(Failure("kind", "text"))


async def test_notes_have_no_reply(ends: MakeEnd) -> None:
    left, right = ends(), ends()
    peer = left.peer(right)
    await peer.note(Seen([b"k" * 16]))
    assert await peer.call(PULL) == PullReply(b"echo")
    await eventually(lambda: len(right.seen) == 2, what="note and request have come")
    assert right.seen[0][0] == Seen([b"k" * 16])


async def test_a_cancelled_call_is_cancelled_over_there(ends: MakeEnd) -> None:
    left, right = ends(), ends()  # CAN-1, RPC-2
    started, stopped = asyncio.Event(), asyncio.Event()

    async def hang(_: Message) -> Message:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError

    right.answer = hang
    peer = left.peer(right)
    task = asyncio.create_task(peer.call(PULL))
    await asyncio.wait_for(started.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(stopped.wait(), 5)
    right.answer = right.echo
    assert await peer.call(PULL) == PullReply(b"echo"), "RPC-2: the connection goes on"
    assert len(right.network._connections) == 1


async def test_cancelling_one_of_two_first_callers(ends: MakeEnd) -> None:
    left, right = ends(), ends()  # ISO-1
    peer = left.peer(right)
    first = asyncio.create_task(peer.call(PULL))
    second = asyncio.create_task(peer.call(PULL))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == PullReply(b"echo")


@pytest.mark.parametrize("lives", [True, False])
async def test_a_lost_connection_ends_pending_calls(
    ends: MakeEnd,
    lives: bool,  # noqa: FBT001
) -> None:  # RPC-1, DTH-1
    left, right = ends(), ends()
    started = asyncio.Event()

    async def hang(_: Message) -> Message:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    right.answer = hang
    peer = left.peer(right)
    tasks = [asyncio.create_task(peer.call(PULL)) for _ in range(5)]
    await asyncio.wait_for(started.wait(), 5)
    if lives:
        for connection in list(right.network._connections):
            await connection.aclose()
    else:
        await right.network.aclose()
    done, _ = await asyncio.wait(tasks, timeout=2)
    assert len(done) == 5, "DTH-1: within 2 s"
    expected = PeerLostError if lives else OwnerDiedError
    assert all(isinstance(task.exception(), expected) for task in tasks)
    assert left.lost == [right.runtime_id]
    assert right.lost == [left.runtime_id]


async def test_a_peer_is_reached_again_after_its_connection_broke(ends: MakeEnd) -> None:
    left, right = ends(), ends()
    peer = left.peer(right)
    await peer.call(PULL)
    for connection in list(right.network._connections):
        await connection.aclose()
    await eventually(lambda: left.lost, what="the loss was noticed")
    assert await peer.call(PULL) == PullReply(b"echo")


async def test_closing_a_connection_can_be_cancelled(ends: MakeEnd) -> None:
    left, right = ends(), ends()  # CAN-1, CLS-1
    await left.peer(right).call(PULL)
    (connection,) = left.network._connections
    task = asyncio.create_task(connection.aclose())
    await asyncio.sleep(0)
    if task.cancel():
        await asyncio.wait({task})
        assert task.cancelled(), "CAN-1"
    assert connection.closed.is_set(), "CLS-1: closes even when cancelled"
    await connection.aclose()


async def test_a_closed_network_refuses_and_ends_calls(ends: MakeEnd) -> None:
    left, right = ends(), ends()  # CLS-1, CLS-2
    started = asyncio.Event()

    async def hang(_: Message) -> Message:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    right.answer = hang
    task = asyncio.create_task(left.peer(right).call(PULL))
    await asyncio.wait_for(started.wait(), 5)
    await left.network.aclose()
    await left.network.aclose()
    done, _ = await asyncio.wait({task}, timeout=2)
    assert done, "CLS-2: pending calls end"
    assert isinstance(task.exception(), AiordtError)


# --- who is let in ------------------------------------------------------------------------------


async def test_another_secret_is_refused_both_ways(
    ends: MakeEnd, caplog: pytest.LogCaptureFixture
) -> None:  # AUTH-1
    left, right = ends(), ends(b"another secret")
    for one, other in ((left, right), (right, left)):
        with pytest.raises(AuthenticationError, match="share the cluster's secret") as info:
            await one.peer(other).call(PULL)
        assert info.value.peer == str(other.address)
        assert other.seen == [], "AUTH-1"
        with pytest.raises(AuthenticationError):
            await one.peer(other).open_stream(bytes(16))
        assert other.streams == {}
    assert left.network._connections == right.network._connections == set()
    gc.collect()  # a task that failed unseen says so when it is garbage
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("purpose", [_wire.CONTROL, _wire.STREAM])
@pytest.mark.parametrize("guess", ["nothing", "random", "reflected", "the server's own"])
async def test_without_the_secret_nobody_is_let_in(
    ends: MakeEnd, purpose: str, guess: str
) -> None:  # AUTH-1, WIRE-3
    end = ends()
    intruder = await Intruder.connect(end)
    hello = hello_to(end, purpose=purpose, stream=b"s" * 16 if purpose == _wire.STREAM else b"")
    await intruder.frame(_wire.pack_hello(hello))
    challenge = _wire.unpack_challenge(await intruder.body())
    assert hmac.compare_digest(
        challenge.proof, _wire.proof(SECRET, b"server", hello, challenge.nonce)
    )
    answers = {
        "nothing": b"\0",
        "random": os.urandom(32),
        "reflected": challenge.proof,
        "the server's own": _wire.proof(b"guess", b"client", hello, challenge.nonce),
    }
    await intruder.frame(answers[guess])
    assert _peer._WELCOME not in await intruder.rest()
    assert end.seen == []
    assert end.streams == {}
    assert end.network._connections == set()


async def test_replayed_handshakes_are_refused(ends: MakeEnd) -> None:  # AUTH-1, WIRE-3
    """All that an honest client said, said again, opens nothing."""
    end = ends()
    honest = await Intruder.connect(end)
    hello = hello_to(end)
    await honest.frame(_wire.pack_hello(hello))
    challenge = _wire.unpack_challenge(await honest.body())
    proof = _wire.proof(SECRET, b"client", hello, challenge.nonce)
    await honest.frame(proof)
    assert await honest.body() == _peer._WELCOME
    sealer, _ = _wire.sealers(SECRET, hello, challenge.nonce)
    request = sealer.seal(_wire.encode(_wire.KIND_REQUEST, 1, PULL))
    await honest.send(request)
    await eventually(lambda: len(end.seen) == 1, what="the honest request was served")

    replay = await Intruder.connect(end)
    await replay.frame(_wire.pack_hello(hello))
    await replay.frame(proof)
    await replay.send(request)
    assert _peer._WELCOME not in await replay.rest()

    await honest.send(request)  # the same frame once more, on the same connection
    await honest.rest()
    assert len(end.seen) == 1, "WIRE-1"


async def test_a_server_without_the_secret_is_refused(ends: MakeEnd) -> None:
    client = ends()  # AUTH-1
    listener = listen("127.0.0.1")
    heard: list[bytes] = []

    async def impostor() -> None:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        hello = _wire.unpack_hello(await _peer._receive_frame(sock))
        nonce = os.urandom(16)
        proof = _wire.proof(b"guess", b"server", hello, nonce)
        await _peer._send_frame(sock, _wire.pack_challenge(_wire.Challenge(nonce, proof)))
        with contextlib.suppress(OSError):
            heard.append(await _peer._receive_frame(sock))
        sock.close()

    task = asyncio.create_task(impostor())
    address = PeerAddress("127.0.0.1", listener.getsockname()[1], os.urandom(16), 1, bytes(16), 0)
    with pytest.raises(AuthenticationError):
        await client.network.connect(address, _wire.CONTROL)
    await task
    listener.close()
    assert heard == [], "AUTH-1: it is told nothing, not even a proof"


def garbage() -> dict[str, bytes]:
    noise = random.Random(7).randbytes(5000)  # noqa: S311  (a fixed seed)
    header = _wire.pack_header
    odd = bytes([0x97, 1, 0x90]) + b"\xc4\x10" + bytes(16)  # a purpose that is a list
    odd += (b"\xc4\x10" + bytes(16)) * 2 + b"\xc4\x00\x80"
    return {
        "noise": noise,
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "an empty frame": header(0),
        "an oversized frame": header(0xFFFFFFFF) + noise,
        "a frame of noise": header(1000) + noise[:1000],
        "a hello with an odd purpose": header(len(odd)) + odd,
        "half a header": b"\0\0",
        "half a hello": header(80) + bytes(10),
        "a garbled length": _wire.HEADER.pack(1000, 1000) + noise[:1000],
        "nothing": b"",
    }


@pytest.mark.parametrize("name", garbage())
async def test_garbage_is_cut_off_and_the_service_goes_on(
    ends: MakeEnd, name: str, caplog: pytest.LogCaptureFixture
) -> None:  # AUTH-1
    end, other = ends(), ends()
    intruder = await Intruder.connect(end)
    await intruder.send(garbage()[name])
    with contextlib.suppress(OSError):
        intruder.sock.shutdown(socket.SHUT_WR)
    assert await intruder.rest() == b""
    await eventually(lambda: not end.network._handshakes, what="the handshake has ended")
    assert await other.peer(end).call(PULL) == PullReply(b"echo")
    assert end.seen == [(PULL, other.runtime_id)]
    gc.collect()  # a task that failed unseen says so when it is garbage
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("frame", ["altered", "oversized", "garbage", "truncated", "odd kind"])
async def test_bad_frames_end_one_connection_only(
    ends: MakeEnd, frame: str, caplog: pytest.LogCaptureFixture
) -> None:  # WIRE-1, WIRE-2, RPC-2
    end, bystander = ends(), ends()
    peer = bystander.peer(end)
    await peer.call(PULL)
    member = await Intruder.connect(end)
    hello = hello_to(end)
    await member.frame(_wire.pack_hello(hello))
    challenge = _wire.unpack_challenge(await member.body())
    await member.frame(_wire.proof(SECRET, b"client", hello, challenge.nonce))
    assert await member.body() == _peer._WELCOME
    sealer, _ = _wire.sealers(SECRET, hello, challenge.nonce)
    sealed = sealer.seal(_wire.encode(_wire.KIND_REQUEST, 1, PULL))
    odd = bytes([0x96, 1, 0x90, 1, 4, 0x92]) + b"\xa1k\xa1t\x80"  # a kind that is a list
    data = {
        "altered": sealed[:-1] + bytes([sealed[-1] ^ 1]),
        "oversized": _wire.pack_header(_wire.MAX_FRAME + 1) + bytes(64),
        "garbage": os.urandom(4096),
        "truncated": sealed[:-3],
        "odd kind": _wire.sealers(SECRET, hello, challenge.nonce)[0].seal(odd),
    }
    await member.send(data[frame])
    if frame == "truncated":
        member.sock.shutdown(socket.SHUT_WR)
    await member.rest()
    await eventually(lambda: b"c" * 16 in end.lost, what="the connection was given up")
    assert await peer.call(PULL) == PullReply(b"echo")
    assert [who for _, who in end.seen] == [bystander.runtime_id] * 2
    gc.collect()  # a task that failed unseen says so when it is garbage
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_replies_to_nothing_and_stray_cancels_are_ignored(ends: MakeEnd) -> None:
    left, right = ends(), ends()
    peer = left.peer(right)
    await peer.call(PULL)
    (connection,) = left.network._connections
    await connection._write(_wire.KIND_REPLY, 99, PullReply(b"nobody asked"))
    await connection.note(Cancel(99))
    assert await peer.call(PULL) == PullReply(b"echo")


async def test_slow_handshakes_are_ended(
    ends: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:  # AUTH-2
    monkeypatch.setattr(_peer, "HANDSHAKE_SECONDS", 0.1)
    end = ends()
    intruder = await Intruder.connect(end)
    await intruder.send(b"\0\0")
    assert await intruder.rest() == b""


async def test_a_flood_of_handshakes_is_bounded(
    ends: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:  # AUTH-2
    monkeypatch.setattr(_peer, "MAX_HANDSHAKES", 4)
    end, other = ends(), ends()
    intruders = [await Intruder.connect(end) for _ in range(12)]
    await eventually(lambda: len(end.network._handshakes) == 4, what="four handshakes have begun")
    surplus = await asyncio.gather(*(intruder.rest() for intruder in intruders[:8]))
    assert surplus == [b""] * 8, "the oldest make room at once"
    assert await other.peer(end).call(PULL) == PullReply(b"echo"), "and a real one gets in"
    for intruder in intruders[8:]:
        intruder.sock.close()
    await eventually(lambda: not end.network._handshakes, what="the flood is over")


# --- who is there -------------------------------------------------------------------------------


async def test_another_process_on_the_port_means_the_owner_died(ends: MakeEnd) -> None:
    client, server = ends(), ends()
    stale = PeerAddress("127.0.0.1", server.port, os.urandom(16), 1, bytes(16), 0)
    with pytest.raises(OwnerDiedError, match="another process has its port"):
        await RemotePeer(stale, client.network).call(PULL)
    assert server.seen == []


async def test_an_id_that_was_garbled_on_the_way_does_not(
    ends: MakeEnd,
) -> None:
    client, server = ends(), ends()
    async with TcpProxy("127.0.0.1", server.port) as proxy:
        hello = _wire.pack_hello(
            Hello(_wire.CONTROL, client.runtime_id, server.runtime_id, bytes(16), b"")
        )
        proxy.corrupt(after=_wire.HEADER.size + hello.index(server.runtime_id), towards="server")
        address = dataclasses.replace(client.peer(server).address, port=proxy.port)
        with pytest.raises(PeerLostError):
            await RemotePeer(address, client.network).call(PULL)
        proxy.heal()
        assert await RemotePeer(address, client.network).call(PULL) == PullReply(b"echo")


async def test_who_comes_when_the_network_is_whole_again_is_not_told_how_it_was(
    ends: MakeEnd,
) -> None:
    client, server = ends(), ends()
    async with TcpProxy("127.0.0.1", server.port) as proxy:
        address = dataclasses.replace(client.peer(server).address, port=proxy.port)
        peer = RemotePeer(address, client.network)
        proxy.reset(towards="server")
        earlier = asyncio.create_task(peer.call(PULL))
        await eventually(lambda: proxy.num_connections > 2, what="it looks whether it lives")
        proxy.heal()
        assert not earlier.done()
        async with asyncio.timeout(10):
            assert await peer.call(PULL) == PullReply(b"echo")
        with pytest.raises(PeerLostError, match="cannot be reached"):
            await earlier


async def test_a_refused_port_means_the_owner_died(ends: MakeEnd) -> None:
    client, server = ends(), ends()
    await server.aclose()
    with pytest.raises(OwnerDiedError, match="nobody listens there") as info:
        await client.peer(server).call(PULL)
    assert info.value.owner == str(server.address)


async def test_a_silent_host_is_lost(ends: MakeEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peer, "HANDSHAKE_SECONDS", 0.1)
    client = ends()
    silent = listen("127.0.0.1")  # accepts, in the kernel, and never says a word
    port = silent.getsockname()[1]
    address = PeerAddress("127.0.0.1", port, os.urandom(16), 1, bytes(16), 0)
    with pytest.raises(PeerLostError, match="cannot be reached"):
        await client.network.connect(address, _wire.CONTROL)
    silent.close()


async def test_streams_are_handed_over_blocking_and_authenticated(
    ends: MakeEnd,
) -> None:  # AUTH-1
    left, right = ends(), ends()
    name = os.urandom(16)
    sock = await left.peer(right).open_stream(name)
    await eventually(lambda: name in right.streams, what="the stream was handed over")
    there = right.streams[name]
    assert sock.getblocking()
    assert there.getblocking()
    sock.sendall(b"payload")
    assert await asyncio.to_thread(there.recv, 7) == b"payload"
    sock.close()


async def test_a_verdict_tells_death_from_failure(ends: MakeEnd) -> None:  # DTH-1
    left, right = ends(), ends()
    peer = left.peer(right)
    await peer.call(PULL)
    cause = ConnectionResetError("stream broke")
    verdict = await peer.verdict(cause, transport="tcp", nbytes=7)
    assert isinstance(verdict, TransferError)
    assert (verdict.transport, verdict.nbytes, verdict.peer) == ("tcp", 7, str(right.address))
    await right.aclose()
    await eventually(lambda: left.lost, what="the loss was noticed")
    verdict = await peer.verdict(cause, transport="tcp", nbytes=7)
    assert isinstance(verdict, OwnerDiedError)


def test_the_listener_is_on_one_address_only() -> None:
    with contextlib.closing(listen("127.0.0.1")) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError, match="assign"):
        listen("203.0.113.1")
