"""What a stranger, and a peer that breaks the rules, can do to a process: nothing that lasts.

The threat model is in docs/explanation/security.md, which names these tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import os
import random
import resource
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from aiordt import _peer, _wire
from aiordt._errors import AuthenticationError, OwnerDiedError
from aiordt._sockets import listen, local_name
from aiordt._wire import (
    Cancel,
    Failure,
    Pull,
    PullReply,
    Ready,
    Seen,
    TransportMessage,
)
from aiordt.abc import PeerAddress
from aiordt.testing import eventually
from tests.network import (
    PULL,
    SECRET,
    Intruder,
    MakeEnd,
    admitted,
    hello_to,
    made_ends,
    num_fds,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiordt._wire import Hello, Message
    from tests.network import End

PURPOSES = pytest.mark.parametrize("purpose", [_wire.CONTROL, _wire.STREAM])
KEY = bytes(range(16))


@pytest.fixture
async def ends() -> AsyncIterator[MakeEnd]:
    async with made_ends() as make:
        yield make


def hello(end: End, purpose: str) -> Hello:
    return hello_to(end, purpose=purpose, stream=b"s" * 16 if purpose == _wire.STREAM else b"")


def check_untouched(end: End) -> None:
    """Nobody was let in, and nothing that was said was acted on (AUTH-1)."""
    assert end.seen == []
    assert end.streams == {}
    assert end.network._connections == set()


def check_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """No task has failed unseen: one that did says so when it is garbage."""
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- the handshake ------------------------------------------------------------------------------


@PURPOSES
async def test_a_handshake_that_is_cut_anywhere_opens_nothing(
    ends: MakeEnd, purpose: str, caplog: pytest.LogCaptureFixture
) -> None:  # AUTH-1
    end = ends()
    said = hello(end, purpose)
    first = _wire.pack_hello(said)
    first = _wire.pack_header(len(first)) + first
    second = _wire.pack_header(32)
    for cut in range(len(first) + len(second) + 32):
        intruder = await Intruder.connect(end)
        await intruder.send(first[:cut])
        if cut >= len(first):
            challenge = _wire.unpack_challenge(await intruder.body())
            proof = _wire.proof(SECRET, b"client", said, challenge.nonce)
            await intruder.send((second + proof)[: cut - len(first)])
        with contextlib.suppress(OSError):
            intruder.sock.shutdown(socket.SHUT_WR)
        assert await intruder.rest() == b""
    check_untouched(end)
    check_quiet(caplog)


@pytest.mark.parametrize("length", [0, _wire.MAX_HANDSHAKE + 1, _wire.MAX_FRAME, 2**32 - 1])
@pytest.mark.parametrize("when", ["first", "in answer"])
async def test_a_handshake_frame_of_a_wrong_length_is_refused_unread(
    ends: MakeEnd, length: int, when: str
) -> None:  # AUTH-1, WIRE-2
    end = ends()
    intruder = await Intruder.connect(end)
    if when == "in answer":
        await intruder.challenged(hello_to(end))
    await intruder.send(_wire.pack_header(length))  # and none of the bytes that it announces
    assert await intruder.rest() == b""
    check_untouched(end)


@pytest.mark.parametrize("change", ["server", "client", "purpose", "nonce"])
async def test_a_handshake_that_is_passed_on_changed_is_refused_at_both_ends(
    ends: MakeEnd, change: str
) -> None:  # AUTH-1, WIRE-3
    """A stranger answers at the right address, by what it hears from a process with the secret."""
    client, server = ends(), ends()
    listener = listen("127.0.0.1")
    address = PeerAddress("127.0.0.1", listener.getsockname()[1], os.urandom(16), 1, bytes(16), 0)
    heard: list[bytes] = []
    fields: dict[str, dict[str, object]] = {
        "server": {},
        "client": {"client": os.urandom(16)},
        "purpose": {"purpose": _wire.STREAM, "stream": bytes(16)},
        "nonce": {"nonce": os.urandom(16)},
    }

    async def stranger() -> None:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        wanted = _wire.unpack_hello(await _peer._receive_frame(sock))
        there = await Intruder.connect(server)
        asked = {"client": wanted.client, "nonce": wanted.nonce} | fields[change]
        challenge = await there.challenged(hello_to(server, **asked))
        await _peer._send_frame(sock, _wire.pack_challenge(challenge))
        with contextlib.suppress(OSError):
            heard.append(await _peer._receive_frame(sock))
        sock.close()
        await there.frame(challenge.proof)
        assert _peer._WELCOME not in await there.rest()

    task = asyncio.create_task(stranger())
    with pytest.raises(AuthenticationError):
        await client.network.connect(address, _wire.CONTROL)
    await task
    listener.close()
    assert heard == [], "the client says no more than hello"
    check_untouched(server)


async def test_what_was_said_to_one_process_opens_no_other(ends: MakeEnd) -> None:  # WIRE-3
    one, other = ends(), ends()
    said = hello_to(one)
    intruder = await Intruder.connect(other)
    await intruder.frame(_wire.pack_hello(said))
    await intruder.frame(_wire.proof(SECRET, b"client", said, bytes(16)))
    heard = _wire.pack_header(5 + 16) + _peer._STALE + one.runtime_id  # what it said itself
    assert await intruder.rest() == heard
    check_untouched(other)


@PURPOSES
@pytest.mark.parametrize("where", ["network", "local"])
async def test_a_stranger_hears_a_challenge_and_a_refusal(
    ends: MakeEnd, purpose: str, where: str
) -> None:  # AUTH-1
    """Two random-looking values and one word, byte for byte."""
    end = ends()
    loop = asyncio.get_running_loop()
    if where == "network":
        intruder = await Intruder.connect(end)
    else:
        intruder = Intruder(socket.socket(socket.AF_UNIX))
        intruder.sock.settimeout(0)
        await loop.sock_connect(intruder.sock, local_name(end.runtime_id))
    said = hello(end, purpose)
    challenge = await intruder.challenged(said)
    assert len(_wire.pack_challenge(challenge)) == 1 + 1 + 2 + 16 + 2 + 32 + 1
    assert challenge.proof == _wire.proof(SECRET, b"server", said, challenge.nonce)
    await intruder.frame(b"guess")
    assert await intruder.rest() == _wire.pack_header(6) + _peer._BAD_SECRET
    check_untouched(end)


async def test_a_challenge_is_never_asked_twice(ends: MakeEnd) -> None:  # WIRE-3
    end = ends()
    said = hello_to(end)
    nonces = set()
    for _ in range(20):
        intruder = await Intruder.connect(end)
        nonces.add((await intruder.challenged(said)).nonce)
        intruder.sock.close()
    assert len(nonces) == 20


# --- after the handshake ------------------------------------------------------------------------

MESSAGES: dict[str, Message] = {
    "Pull": Pull([(KEY, 0, None)], 4, []),
    "Pull by streams": Pull([(KEY, 3, None)], 4, [KEY]),
    "PullReply": PullReply(b"payload"),
    "Seen": Seen([KEY]),
    "Failure": Failure("UsageError", "text"),
    "Cancel": Cancel(1),
    "TransportMessage": TransportMessage("nixl", b"body"),
    "Ready": Ready([KEY]),
}


def test_every_kind_of_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES.values()} == set(_wire._MESSAGES.values())


@pytest.mark.parametrize(
    "fault",
    [
        "altered",
        "replayed",
        "out of order",
        "left out",
        "of another connection",
        "oversized",
        "garbage",
    ],
)
@pytest.mark.parametrize("name", MESSAGES)
async def test_a_frame_that_is_not_as_it_was_sent_ends_its_connection_only(
    ends: MakeEnd, name: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:  # WIRE-1, WIRE-2, RPC-2
    end, bystander = ends(), ends()
    peer = bystander.peer(end)
    await peer.call(PULL)
    other, its_sealer = await admitted(end)  # another connection of the same peer
    member, sealer = await admitted(end)
    spare, another = await admitted(end)
    spare.sock.close()
    first, second, third = (
        sealer.seal(_wire.encode(_wire.KIND_REQUEST, number, MESSAGES[name])) for number in range(3)
    )
    garbage = random.Random(5).randbytes(len(first) - 8)  # noqa: S311  (a fixed seed)
    data = {
        "altered": first[:-1] + bytes([first[-1] ^ 1]),
        "replayed": first + first,
        "out of order": second + first,
        "left out": first + third,
        "of another connection": another.seal(_wire.encode(_wire.KIND_REQUEST, 1, MESSAGES[name])),
        "oversized": _wire.pack_header(_wire.MAX_FRAME + 1) + first,
        "garbage": first[: _wire.HEADER.size] + garbage,
    }
    others = b"c" * 16
    served = {"replayed", "left out"} & {fault}  # its first frame is as it should be
    await member.send(data[fault])
    await member.rest()
    await other.send(its_sealer.seal(_wire.encode(_wire.KIND_REQUEST, 1, PULL)))
    await other.body()
    other.sock.close()
    await eventually(lambda: others in end.lost, what="the connections were given up")
    assert await peer.call(PULL) == PullReply(b"echo")
    acted_on = [message for message, who in end.seen if who == others and message != PULL]
    assert len(acted_on) <= len(served)
    assert [who for _, who in end.seen].count(bystander.runtime_id) == 2
    check_quiet(caplog)


@pytest.mark.parametrize("name", MESSAGES)
async def test_a_message_that_is_cut_anywhere_ends_its_connection_only(
    ends: MakeEnd, name: str, caplog: pytest.LogCaptureFixture
) -> None:  # WIRE-2
    """Sealed as it should be: by a peer with the secret."""
    end, bystander = ends(), ends()
    peer = bystander.peer(end)
    whole = _wire.encode(_wire.KIND_REQUEST, 1, MESSAGES[name])
    for cut in range(len(whole)):
        member, sealer = await admitted(end)
        await member.send(sealer.seal(whole[:cut]))
        assert await member.rest() == b""
    assert end.seen == []
    assert await peer.call(PULL) == PullReply(b"echo")
    check_quiet(caplog)


# --- many strangers -----------------------------------------------------------------------------


async def test_whoever_sends_a_byte_at_a_time_is_cut_off(
    ends: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:  # AUTH-2
    """The time for a handshake is for all of it, not from byte to byte; others get in meanwhile."""
    monkeypatch.setattr(_peer, "HANDSHAKE_SECONDS", 1.0)
    end = ends()
    loop = asyncio.get_running_loop()
    said = _wire.pack_hello(hello_to(end))
    said = _wire.pack_header(len(said)) + said

    async def drip() -> int:
        intruder = await Intruder.connect(end)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for byte in said:  # it would take 9 s
                await loop.sock_sendall(intruder.sock, bytes([byte]))
                sent += 1
                await asyncio.sleep(0.1)
        intruder.sock.close()
        return sent

    dripping = [asyncio.create_task(drip()) for _ in range(20)]
    await eventually(lambda: len(end.network._handshakes) >= 10, what="they have begun")
    monkeypatch.setattr(_peer, "HANDSHAKE_SECONDS", 5.0)
    assert await ends().peer(end).call(PULL) == PullReply(b"echo"), "an honest one gets in"
    assert all(sent < len(said) for sent in await asyncio.gather(*dripping))
    await eventually(lambda: not end.network._handshakes, what="all of them were ended")
    assert len(end.seen) == 1


async def test_a_crowd_at_the_door_does_not_stop_what_goes_on_inside(ends: MakeEnd) -> None:
    """AUTH-3: between any two turns of the loop no more than a few are let to the door."""
    end = ends()
    crowd = [socket.create_connection(("127.0.0.1", end.port)) for _ in range(300)]  # queued up
    counts = [0]

    async def watch() -> None:
        while counts[-1] < 300:
            counts.append(len(end.network._handshakes))
            await asyncio.sleep(0)

    async with asyncio.timeout(60):
        await watch()
    for sock in crowd:
        sock.close()
    await eventually(lambda: not end.network._handshakes, what="the crowd has gone")
    assert max(later - before for before, later in itertools.pairwise(counts)) <= 3


def test_strangers_have_at_most_a_quarter_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, room in ((400, 100), (1 << 20, _peer.MAX_HANDSHAKES), (-1, _peer.MAX_HANDSHAKES)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert _peer._room() == room  # AUTH-2


FLOOD = """
import resource, socket, sys
port, count = map(int, sys.argv[1:])
files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
held = []
for number in range(count):
    if len(held) >= files - 100:
        held.pop(0).close()
    held.append(socket.create_connection(("127.0.0.1", port)))
    if number % 3 == 0:
        try:
            held[-1].send(b"\\0")
        except OSError:
            pass
print("all", flush=True)
sys.stdin.read()
"""


async def test_ten_thousand_connects(ends: MakeEnd, caplog: pytest.LogCaptureFixture) -> None:
    """AUTH-2: they have so many files and no more; others get in meanwhile; nothing is left."""
    end, resident = ends(), ends()
    peer = resident.peer(end)
    await peer.call(PULL)
    tasks, fds = len(asyncio.all_tasks()), num_fds()
    most = visits = 0
    flood = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FLOOD, str(end.port), "10000"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert flood.stdin is not None
    assert flood.stdout is not None
    reading = asyncio.create_task(flood.stdout.readline())
    while not reading.done():
        assert await peer.call(PULL) == PullReply(b"echo"), "who was there goes on"
        name = os.urandom(16)
        sock = await peer.open_stream(name)  # and a newcomer gets in
        await eventually(functools.partial(end.streams.get, name), what="it was handed over")
        sock.close()
        end.streams.pop(name).close()
        visits += 1
        most = max(most, num_fds())
    assert reading.result() == b"all\n"
    assert visits
    assert most <= fds + end.network._room + 64
    flood.stdin.close()
    assert await flood.wait() == 0
    await eventually(lambda: not end.network._handshakes, what="the flood is over")
    await eventually(lambda: num_fds() <= fds, what="its files are closed")
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks, what="its tasks have ended")
    assert await peer.call(PULL) == PullReply(b"echo")
    check_quiet(caplog)


async def test_a_stale_address_is_told_apart_from_a_stranger(ends: MakeEnd) -> None:
    """What a process says before it is asked for a proof: that it is another one, and no more."""
    client, server = ends(), ends()
    stale = PeerAddress("127.0.0.1", server.port, os.urandom(16), 1, bytes(16), 0)
    with pytest.raises(OwnerDiedError):
        await client.network.connect(stale, _wire.CONTROL)
    check_untouched(server)
