"""Where processes of a host meet for an export: whoever is there has proved nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgpack
import pytest

from aiordt._copies import meeting_name, pack_address, unpack_address
from aiordt._errors import AiordtError, ProtocolViolationError
from aiordt._metrics import Counters
from aiordt._relay import Relay
from aiordt._route import Routes
from aiordt._types import MIB
from aiordt.abc import PeerAddress
from aiordt.testing import Leaks
from aiordt.testing._process import _Half

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ADDRESS = PeerAddress("127.0.0.1", 4711, bytes(16), 99, bytes(16), 1 << 40)
NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def test_an_address_comes_back() -> None:
    assert unpack_address(pack_address(ADDRESS)) == ADDRESS
    newer = msgpack.packb([*msgpack.unpackb(pack_address(ADDRESS)), "a fact"])
    assert unpack_address(newer) == ADDRESS


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, ""), (0, "nowhere"), (0, "a..b"), (0, "127.0.0.1\0"), (0, b"127.0.0.1"),
        (1, 0), (1, 1 << 16), (1, -1), (1, True),
        (2, bytes(15)), (2, bytes(200)), (3, 0), (3, -1), (3, 1 << 31),
        (4, bytes(17)), (5, -1), (5, "0"),
    ],
)  # fmt: skip
def test_nonsense_is_no_address(place: int, value: object) -> None:  # RLY-2
    """Each of these would raise what nobody expects where it is connected to."""
    values = msgpack.unpackb(pack_address(ADDRESS))
    values[place] = value
    with pytest.raises(ProtocolViolationError):
        unpack_address(msgpack.packb(values))


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    leaks = Leaks()
    half = _Half()
    made = Relay(
        half.address,
        half.io,
        registry=half.registry,
        routes=Routes(half.io, half._network, half.transports, ("shm", "tcp")),
        counters=Counters(),
        workers=half.workers,
        limit=MIB,
    )
    yield made
    await half.io.run(made.aclose())
    await half.aclose()
    await leaks.wait_none()


SQUATTER = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind(bytes.fromhex(sys.argv[2]))
    sock.listen()
    print("there", flush=True)
    while True:
        with sock.accept()[0] as other:
            try:
                other.sendall(bytes.fromhex(sys.argv[3]))
            except OSError:
                pass
"""
VISITOR = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(bytes.fromhex(sys.argv[2]))
    print(sock.recv(1024).hex(), flush=True)
"""


@asynccontextmanager
async def program(text: str, *args: str) -> AsyncIterator[bytes]:
    """Run it; its first line."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", text, *args), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            yield (await process.stdout.readline()).strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@as_root
async def test_another_user_in_the_place_is_not_asked(relay: Relay) -> None:  # RLY-2
    key = os.urandom(16)
    for uid, heard in ((os.getuid(), True), (NOBODY, False)):
        name, told = meeting_name(key).hex(), pack_address(ADDRESS).hex()
        async with program(SQUATTER, str(uid), name, told) as line:
            assert line == b"there"
            if heard:
                assert await relay._io.run(relay._first(key)) == ADDRESS
            else:
                with pytest.raises(PermissionError, match="another user"):
                    await relay._io.run(relay._first(key))


@as_root
async def test_another_user_is_told_nothing(relay: Relay) -> None:
    key = os.urandom(16)
    assert await relay._io.run(relay._first(key)) is None
    for uid, heard in ((os.getuid(), pack_address(relay._address)), (NOBODY, b"")):
        async with program(VISITOR, str(uid), meeting_name(key).hex()) as line:
            assert line.decode() == heard.hex()


@pytest.mark.parametrize("said", [b"\xc1", b"\x80", b"garbage", bytes(range(256)) * 4, b""])
async def test_nonsense_in_the_place_is_no_help(relay: Relay, said: bytes) -> None:  # RLY-2
    """What `_read_export` goes on after, straight to the owner."""
    key = os.urandom(16)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(meeting_name(key))
        sock.listen()
        sock.settimeout(0)
        asked = asyncio.create_task(relay._io.run(relay._first(key)))
        other, _ = await asyncio.get_running_loop().sock_accept(sock)
        with other:
            other.sendall(said)
        with pytest.raises((AiordtError, OSError)):
            await asked
