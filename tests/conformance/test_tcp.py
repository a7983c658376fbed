"""What is particular to TCP: streams are used again, at once, and end with their peer."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from typing_extensions import override

from aiordt._errors import PeerLostError, ProtocolViolationError, TransferError
from aiordt._peer import RemotePeer
from aiordt._types import KIB, MIB
from aiordt._wire import Pull
from aiordt.abc import Part, Served, Source
from aiordt.testing import Leaks, TcpProxy, at_phase, eventually, process_pairs, record_phases
from aiordt.testing._process import _Half
from aiordt.transports.tcp import TcpTransport

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from aiordt._wire import Item
    from aiordt.abc import Link


class Ends:
    """Two halves of a transfer in one process, so that both ends can be looked into."""

    def __init__(self) -> None:
        self.owner = _Half()
        self.reader = _Half()
        self.tensor = torch.arange(12 << 20, dtype=torch.int64).view(torch.uint8)
        export = self.owner.registry.begin([self.tensor], "test")
        self.owner.registry.commit(export, ["lease"])
        self.key = export.key
        self.link: Link

    async def connect(self, port: int = 0) -> None:
        """By that port of this host in place of the owner's."""
        address = replace(self.owner.address, port=port or self.owner.address.port)
        self.link = await self.reader.connect("tcp", address)

    def part(self, target: torch.Tensor) -> Part:
        return Part(self.key, 0, 0, target.data_ptr(), target.nbytes)

    def export(self, nbytes: int) -> bytes:
        export = self.owner.registry.begin([self.tensor[:nbytes]], "test")
        self.owner.registry.commit(export, [object()])
        return export.key

    async def read(self, key: bytes, nbytes: int) -> None:
        target = torch.zeros(nbytes, dtype=torch.uint8)
        await self.link.read([Part(key, 0, 0, target.data_ptr(), nbytes)])
        assert torch.equal(target, self.tensor[:nbytes])

    async def aclose(self) -> None:
        await self.link.aclose()
        await self.reader.aclose()
        await self.owner.aclose()


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    leaks = Leaks()
    made = Ends()
    await made.connect()
    yield made
    await made.aclose()
    await leaks.wait_none()


@pytest.fixture
async def proxied() -> AsyncIterator[tuple[Ends, TcpProxy]]:
    """Ends that have all connections through a proxy."""
    leaks = Leaks()
    made = Ends()
    async with TcpProxy(made.owner.address.host, made.owner.address.port) as proxy:
        await made.connect(proxy.port)
        yield made, proxy
        proxy.heal()
        await made.aclose()
    await leaks.wait_none()


async def test_a_stream_is_used_again_at_once() -> None:  # ISO-1
    """A busy owner's thread learns late that its last byte has arrived; no read may fail."""
    with process_pairs("tcp", busy=True) as make_pair:
        pair = await make_pair()
        (exported,) = await pair.export([torch.ones(100_000, dtype=torch.uint8)])
        target = torch.zeros(100_000, dtype=torch.uint8)
        try:
            async with asyncio.timeout(20):
                for _ in range(100):
                    await pair.link.read([exported.part(target.data_ptr())])
        finally:
            await pair.aclose()
        assert bool(target.all())


class Failing(Source):
    """Exports that cannot be read, as when packing them finds no memory."""

    @override
    @asynccontextmanager
    async def open(self, items: Sequence[Item], nbytes: int) -> AsyncGenerator[Served]:
        raise MemoryError("packing failed")
        yield

    @override
    def exported(self, key: bytes, index: int) -> torch.Tensor:
        raise AssertionError


@pytest.mark.parametrize("nbytes", [100, 100_000])
async def test_a_failure_over_there_ends_the_read(ends: Ends, nbytes: int) -> None:  # RPC-1
    tcp = ends.owner.transports.made["tcp"]
    assert isinstance(tcp, TcpTransport)
    tcp._source = Failing()
    target = torch.zeros(nbytes, dtype=torch.uint8)
    with pytest.raises(TransferError):
        await asyncio.wait_for(ends.link.read([Part(ends.key, 0, 0, target.data_ptr(), nbytes)]), 5)


async def test_idle_streams_that_the_owner_has_closed_are_replaced(ends: Ends) -> None:
    """It took this process for lost; of the end of its streams, nothing came through."""
    tcp = ends.owner.transports.made["tcp"]
    assert isinstance(tcp, TcpTransport)

    async def forget() -> None:
        tcp.forget(ends.reader.address.runtime_id)

    for nbytes in (100_000, 16 * MIB, 100_000):  # one stream, several
        key = ends.export(nbytes)
        await ends.read(key, nbytes)
        await ends.owner.io.run(forget())
        await ends.read(key, nbytes)


async def test_streams_are_kept_and_bounded(ends: Ends) -> None:
    key = ends.export(100_000)
    with record_phases() as phases:
        await asyncio.gather(*(ends.read(key, 100_000) for _ in range(12)))
        opened = phases.count("peer.connecting")
        assert opened <= 12
        for _ in range(4):
            await ends.read(key, 100_000)
        assert phases.count("peer.connecting") == opened, "a stream was kept"
        for _ in range(3):
            await asyncio.gather(*(ends.read(key, 100_000) for _ in range(12)))
        assert phases.count("peer.connecting") <= 12, "8 reads at once, and each stream is kept"


async def test_the_tensor_is_held_while_it_is_sent(ends: Ends) -> None:  # OWN-1
    """Its last lease may go in the middle of a transfer; the bytes still come."""
    nbytes = 20 << 20
    key = ends.export(nbytes)
    registry = ends.owner.registry
    (lease,) = [name for name, (export, _) in registry._leases.items() if export.key == key]
    with at_phase("tcp.sending", lambda: registry.drop([lease])) as phases:
        await ends.read(key, nbytes)
    assert phases.reached.is_set()
    await eventually(lambda: registry.counts()[0] == 1, what="only the fixture's export is left")


@pytest.mark.parametrize("name", ["tcp.asking", "tcp.receiving", "tcp.sending"])
async def test_cancelled_at_each_phase(ends: Ends, name: str) -> None:  # CAN-1, OWN-1, ISO-1
    nbytes = 20 << 20
    key = ends.export(nbytes)
    target = torch.zeros(nbytes, dtype=torch.uint8)
    part = Part(key, 0, 0, target.data_ptr(), nbytes)
    task = asyncio.create_task(ends.link.read([part]))
    loop = asyncio.get_running_loop()
    with at_phase(name, lambda: loop.call_soon_threadsafe(task.cancel)) as phases:
        await asyncio.wait({task}, timeout=10)
        await phases.wait_reached()
    if not task.cancelled():  # the last byte came first
        task.result()
    await ends.read(key, nbytes)
    await eventually(
        lambda: (
            not ends.owner.registry._state.holders.keys() - set(ends.owner.registry._leases.keys())
        ),
        what="no transfer holds the tensor",
    )


async def test_a_pull_that_names_bad_streams_spoils_no_good_one(ends: Ends) -> None:  # ISO-1
    nbytes = 100_000
    key = ends.export(nbytes)
    peer = RemotePeer(ends.owner.address, ends.reader._network)
    name = os.urandom(16)

    async def ask(*names: bytes) -> None:
        pull = Pull([(key, 0, None)], nbytes, list(names))
        await asyncio.wait_for(ends.reader.io.run(peer.call(pull)), 5)

    sock = await ends.reader.io.run(peer.open_stream(name))
    for names in ((name, b"unknown stream.."), (name, name)):
        with pytest.raises(ProtocolViolationError):
            await ask(*names)
    await ask(name)
    data = await ends.reader.workers.run(lambda: sock.recv(nbytes, socket.MSG_WAITALL))
    sock.close()
    assert data == bytes(ends.tensor[:nbytes].numpy())


async def test_only_the_peer_that_opened_a_stream_may_name_it(ends: Ends) -> None:  # AUTH-1
    key = ends.export(100_000)
    stranger = Ends()
    name = os.urandom(16)
    opened = await ends.reader.io.run(
        RemotePeer(ends.owner.address, ends.reader._network).open_stream(name)
    )
    other = RemotePeer(ends.owner.address, stranger.reader._network)
    with pytest.raises(ProtocolViolationError):
        await stranger.reader.io.run(other.call(Pull([(key, 0, None)], 100_000, [name])))
    opened.close()
    stranger.reader.close()
    stranger.owner.close()


# --- a network that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["truncate", "reset", "cut"])
async def test_a_read_whose_connections_end_raises_and_the_next_one_works(
    proxied: tuple[Ends, TcpProxy], fault: str
) -> None:  # ISO-1, DTH-1
    ends, proxy = proxied
    link, tensor = ends.link, ends.tensor
    target = torch.zeros_like(tensor)
    await link.read([ends.part(target)])
    target.zero_()
    proxy.stall(after=2 * MIB, towards="client")
    reading = asyncio.ensure_future(link.read([ends.part(target)]))
    await eventually(lambda: proxy.holding, what="the read is under way")
    if fault == "cut":
        proxy.cut()
    else:
        getattr(proxy, fault)(after=64 * KIB)
    with pytest.raises((TransferError, PeerLostError)):
        async with asyncio.timeout(10):
            await reading
    proxy.heal()
    await link.read([ends.part(target)])
    assert torch.equal(target, tensor)


@pytest.mark.parametrize("fault", ["truncate", "reset", "corrupt"])
async def test_an_owner_whose_control_connection_ends_is_not_dead(
    proxied: tuple[Ends, TcpProxy], fault: str
) -> None:  # DTH-1: who lives is not said to be dead
    ends, proxy = proxied
    key = ends.export(1000)  # so little comes in the reply
    await ends.read(key, 1000)
    getattr(proxy, fault)(after=8, towards="server")
    with at_phase("peer.connecting", proxy.heal):  # when it is asked whether it lives
        async with asyncio.timeout(10):
            with pytest.raises(PeerLostError, match="it lives and can be reached again"):
                await ends.read(key, 1000)
    await ends.read(key, 1000)


async def test_a_read_that_stands_still_is_cancelled_or_goes_on(
    proxied: tuple[Ends, TcpProxy],
) -> None:  # OWN-1, CAN-1
    ends, proxy = proxied
    link, tensor = ends.link, ends.tensor
    for cancelled in (False, True):
        target = torch.zeros_like(tensor)
        proxy.stall(after=2 * MIB, towards="client")
        reading = asyncio.ensure_future(link.read([ends.part(target)]))
        await eventually(lambda: proxy.holding, what="the read stands still")
        if cancelled:
            reading.cancel()
            async with asyncio.timeout(5):
                with pytest.raises(asyncio.CancelledError):
                    await reading
            seen = target.clone()
            proxy.heal()
            again = torch.zeros_like(tensor)
            await link.read([ends.part(again)])
            assert torch.equal(again, tensor)
            assert torch.equal(target, seen), "nothing is written after its end"
        else:
            proxy.heal()
            await reading
            assert torch.equal(target, tensor)
