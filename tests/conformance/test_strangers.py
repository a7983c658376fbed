"""What an owner of tensors tells a stranger, and a peer that guesses: nothing, and one error.

The threat model is in docs/explanation/security.md, which names these tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import torch

import aiordt
from aiordt import _peer, _wire
from aiordt._arena import arena
from aiordt._errors import AiordtError, ProtocolViolationError, TensorFreedError
from aiordt._peer import RemotePeer
from aiordt._sockets import local_name
from aiordt._wire import Hello, Pull, PullReply, Ready, Seen
from aiordt.abc import Part
from aiordt.testing import Leaks
from aiordt.testing._process import _SECRET, _Half

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: What stands in the tensors.
MARK = b"the tensor's own bytes: "


class Ends:
    """An owner of two tensors, a member that has read one of them, and that one's place."""

    def __init__(self) -> None:
        self.owner, self.member = _Half(), _Half()
        self.tensor = torch.frombuffer(bytearray(MARK * 10_000), dtype=torch.uint8)
        self.key = self.export("lease", 4096)
        self.large = self.export("large", 100_000)
        self.peer = RemotePeer(self.owner.address, self.member._network)

    def export(self, lease: str, nbytes: int) -> bytes:
        export = self.owner.registry.begin([self.tensor[:nbytes]], "test")
        self.owner.registry.commit(export, [lease])
        return export.key

    async def read(self, transport: str, key: bytes, nbytes: int) -> bytes:
        link = await self.member.connect(transport, self.owner.address)
        target = torch.zeros(nbytes, dtype=torch.uint8)
        try:
            await link.read([Part(key, 0, 0, target.data_ptr(), nbytes)])
        finally:
            await link.aclose()
        return bytes(target.numpy())

    async def ask(self, *messages: Pull | Ready) -> list[tuple[type, str]]:
        """What each of these comes to."""
        found = []
        for message in messages:
            with pytest.raises(AiordtError) as info:
                await self.member.io.run(self.peer.call(message))
            found.append((type(info.value), str(info.value)))
        return found

    async def hear(self, where: tuple[str, int] | bytes, *said: bytes) -> bytes:
        """All that a stranger hears who says this."""
        return await self.member.workers.run(lambda: hear(where, *said))

    async def aclose(self) -> None:
        await self.member.aclose()
        await self.owner.aclose()


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    leaks = Leaks()
    made = Ends()
    yield made
    await made.aclose()
    await leaks.wait_none()


def hear(where: tuple[str, int] | bytes, *said: bytes) -> bytes:
    family = socket.AF_UNIX if isinstance(where, bytes) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(10)
        sock.connect(where)
        heard = b""
        try:
            for each in said:
                sock.sendall(each)
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                heard += data
        except OSError:
            pass  # it was cut off, and perhaps while it spoke
        return heard


def framed(body: bytes) -> bytes:
    return _wire.pack_header(len(body)) + body


@pytest.mark.parametrize("where", ["network", "local"])
@pytest.mark.parametrize("purpose", [_wire.CONTROL, _wire.STREAM])
async def test_a_stranger_learns_nothing(ends: Ends, where: str, purpose: str) -> None:
    """AUTH-1: with the right address, the owner's id and even a tensor's key, but no secret."""
    assert (await ends.read("tcp", ends.key, 4096)).startswith(MARK)  # there is something to learn
    owner, stream = ends.owner.address, bytes(16) if purpose == _wire.STREAM else b""
    at = (owner.host, owner.port) if where == "network" else local_name(owner.runtime_id)
    ids = (os.urandom(16), ends.member.address.runtime_id)  # its own, and one that is welcome
    asked = [Pull([(ends.key, 0, None)], 4096, []), Ready([ends.key]), Seen([ends.key])]
    requests = b"".join(framed(_wire.encode(0, 1, message)) for message in asked)
    heard = b""
    for client in ids:
        for server in (owner.runtime_id, bytes(16)):
            said = Hello(purpose, client, server, os.urandom(16), stream)
            guess = framed(_wire.proof(b"guess", b"client", said, bytes(16)))
            hello = framed(_wire.pack_hello(said))
            heard += await ends.hear(at, hello, guess, requests)
            heard += await ends.hear(at, hello, requests)
            heard += await ends.hear(at, requests)
    assert heard, "challenges, at least"
    known = {framed(_peer._STALE + bytes(16)), framed(_peer._BAD_SECRET)}
    while heard:
        size = _wire.HEADER.size
        length = size + _wire.frame_length(heard[:size])
        frame, heard = heard[:length], heard[length:]
        if frame not in known:
            challenge = _wire.unpack_challenge(frame[size:])  # 16 random bytes and a digest
            assert frame == framed(_wire.pack_challenge(challenge))
            for secret in (ends.key, MARK, _SECRET, owner.host.encode()):
                assert secret not in frame
    assert await ends.read("tcp", ends.key, 4096)


async def test_every_wrong_key_is_answered_alike(ends: Ends) -> None:  # KEY-1
    """Whether a key was never given out, was once, or is near a right one."""
    once = ends.export("another", 4096)
    ends.owner.registry.drop(["another"])
    near = bytes([ends.key[0] ^ 1, *ends.key[1:]])
    wrong: list[tuple[bytes, int]] = [
        (os.urandom(16), 0), (once, 0), (near, 0), (ends.key, 1), (ends.key, 1 << 40),
        (bytes(16), 0), (ends.key[:-1], 0), (ends.key + b"\0", 0), (b"", 0),
    ]  # fmt: skip
    pulls = [Pull([(key, index, None)], 64, []) for key, index in wrong]
    found = set(await ends.ask(*pulls))
    assert {kind for kind, _ in found} == {TensorFreedError}
    assert len(found) == 1, found
    beside = [Pull([(ends.key, 0, None), (key, index, None)], 64, []) for key, index in wrong]
    assert set(await ends.ask(*beside)) == found, "also beside a right one: nothing of that comes"
    whole = [key for key, _ in wrong if len(key) == 16 and key != ends.key]
    assert len(set(await ends.ask(*(Ready([key]) for key in whole)))) == 1


@pytest.mark.parametrize("nbytes", [4096, 100_000])
async def test_a_wrong_key_brings_no_byte(ends: Ends, nbytes: int) -> None:  # KEY-1
    """By a reply, and by a stream; the next one is right."""
    with pytest.raises(TensorFreedError):
        await ends.read("tcp", os.urandom(16), nbytes)
    right = ends.key if nbytes == 4096 else ends.large
    assert (await ends.read("tcp", right, nbytes)) == (MARK * 10_000)[:nbytes]


async def test_a_stream_that_has_a_name_already_is_refused(ends: Ends) -> None:  # ISO-1
    name = os.urandom(16)
    first = await ends.member.io.run(ends.peer.open_stream(name))
    second = await ends.member.io.run(ends.peer.open_stream(name))
    second.settimeout(10)
    assert await ends.member.workers.run(lambda: second.recv(1)) == b"", "closed"
    second.close()
    pull = Pull([(ends.large, 0, None)], 100_000, [name])
    assert await ends.member.io.run(ends.peer.call(pull)) == PullReply(b"")
    data = await ends.member.workers.run(lambda: first.recv(100_000, socket.MSG_WAITALL))
    first.close()
    assert data == (MARK * 10_000)[:100_000]


async def test_a_guessed_stream_is_refused(ends: Ends) -> None:  # AUTH-1
    names = [os.urandom(16), bytes(16)]
    found = await ends.ask(*(Pull([(ends.large, 0, None)], 100_000, [name]) for name in names))
    assert {kind for kind, _ in found} == {ProtocolViolationError}
    assert len(set(found)) == 1


async def test_odd_questions_about_shared_memory_end_one_connection(ends: Ends) -> None:
    """By a peer with the secret: half a number, numbers of segments that there are not."""
    shared = aiordt.empty((4096,), dtype=torch.uint8)
    shared.copy_(ends.tensor[:4096])
    export = ends.owner.registry.begin([shared], "test")
    ends.owner.registry.commit(export, ["shared"])
    segment, address = arena.locate(shared.data_ptr()), shared.data_ptr()
    link = await ends.member.connect("shm", ends.owner.address)

    async def read() -> bytes:
        target = torch.zeros(4096, dtype=torch.uint8)
        part = Part(export.key, 0, address, target.data_ptr(), 4096, segment=segment)
        await link.read([part])
        return bytes(target.numpy())

    assert await read() == (MARK * 10_000)[:4096]
    for asked, told in (
        (bytes(3), b""),
        (struct.pack("!Q", 2**64 - 1), struct.pack("!QQQ", 2**64 - 1, 0, 0)),
        (b"garbage!" + bytes(5), b"garbage!" + bytes(16)),
    ):
        sock = await ends.member.io.run(ends.peer.open_local(os.urandom(16)))
        sock.settimeout(10)
        sock.sendall(asked)
        sock.shutdown(socket.SHUT_WR)
        heard = b""
        with sock, contextlib.suppress(ConnectionError):
            while data := await ends.member.workers.run(functools.partial(sock.recv, 1024)):
                heard += data
        assert heard == told
    assert await read() == (MARK * 10_000)[:4096], "and the next one is served"
    await link.aclose()
    ends.owner.registry.drop(["shared"])
