"""The network that `TcpProxy` stands for: each fault, at the byte it was asked for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aiordt.testing import Leaks, TcpProxy, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WORDS = bytes(range(200))


class Ends:
    """A client, and what a server got from it; they talk through a proxy."""

    def __init__(self, proxy: TcpProxy, accepted: asyncio.Queue[Streams]) -> None:
        self.proxy = proxy
        self._accepted = accepted

    async def connect(self) -> tuple[Streams, Streams]:
        """A new connection: the client's end, and the server's."""
        client = await asyncio.open_connection(self.proxy.host, self.proxy.port)
        return client, await asyncio.wait_for(self._accepted.get(), 5)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    leaks = Leaks()
    accepted: asyncio.Queue[Streams] = asyncio.Queue()
    made: list[Streams] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append((reader, writer))
        accepted.put_nowait(made[-1])

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with TcpProxy(*server.sockets[0].getsockname()) as proxy:
        yield Ends(proxy, accepted)
    for _, writer in made:
        writer.close()
    server.close()
    await leaks.wait_none()


async def test_all_that_is_said_arrives_and_ends(ends: Ends) -> None:
    (reader, writer), (there, back) = await ends.connect()
    writer.write(WORDS)
    writer.write_eof()
    assert await there.read() == WORDS, "the end is passed on, too"
    back.write(WORDS * 1000)
    back.close()
    assert await reader.read() == WORDS * 1000
    assert (ends.proxy.num_connections, ends.proxy.num_passed) == (1, 1001 * len(WORDS))
    writer.close()


async def test_what_is_held_arrives_once_healed(ends: Ends) -> None:
    (reader, writer), (there, back) = await ends.connect()
    writer.write(WORDS[:50])
    assert await there.readexactly(50) == WORDS[:50]
    ends.proxy.stall(after=10, towards="server")
    writer.write(WORDS[50:])
    assert await there.readexactly(10) == WORDS[50:60]
    await eventually(lambda: ends.proxy.holding, what="the rest is held")
    back.write(b"answer")
    assert await reader.readexactly(6) == b"answer", "the other direction goes on"
    reading = asyncio.ensure_future(there.readexactly(140))
    await asyncio.sleep(0)
    assert not reading.done()
    ends.proxy.heal()
    assert await reading == WORDS[60:]
    assert not ends.proxy.holding
    writer.close()


async def test_a_connection_ends_after_so_many_bytes(ends: Ends) -> None:
    (reader, writer), (there, _) = await ends.connect()
    ends.proxy.truncate(after=7, towards="server")
    writer.write(WORDS)
    assert await there.read() == WORDS[:7]
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()


async def test_a_connection_breaks_after_so_many_bytes(ends: Ends) -> None:
    (reader, writer), (there, _) = await ends.connect()
    (bystander, other), _ = await ends.connect()
    ends.proxy.reset(after=7, towards="server")
    writer.write(WORDS)
    for each in (there, reader):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(each.readexactly(8), 5)
    assert not bystander.at_eof(), "it has said nothing"
    writer.close()
    other.close()


async def test_one_bit_turns(ends: Ends) -> None:
    (_, writer), (there, _) = await ends.connect()
    ends.proxy.corrupt(after=3)
    writer.write(WORDS[:2])
    await there.readexactly(2)
    writer.write(WORDS[2:])
    got = await there.readexactly(len(WORDS) - 2)
    differences = [new ^ old for new, old in zip(got, WORDS[2:], strict=True)]
    assert differences == [0, 1] + [0] * 196
    writer.write(WORDS)
    assert await there.readexactly(200) == WORDS, "once"
    writer.close()


async def test_a_cut_ends_all_and_lets_nobody_in(ends: Ends) -> None:
    (reader, writer), (there, _) = await ends.connect()
    ends.proxy.cut()
    for each in (there, reader):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(each.readexactly(1), 5)
    refused, late = await asyncio.open_connection(ends.proxy.host, ends.proxy.port)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(refused.readexactly(1), 5)
    ends.proxy.heal()
    (_, again), (there, _) = await ends.connect()
    again.write(WORDS)
    assert await there.readexactly(200) == WORDS
    for end in (writer, late, again):
        end.close()


async def test_a_server_that_is_gone_breaks_what_comes(ends: Ends) -> None:
    async with TcpProxy("127.0.0.1", 1) as proxy:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
