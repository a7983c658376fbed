"""What is particular to NIXL: wiring up, what it knows of peers, and that nobody hears of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from aiordt._errors import ClosedError, OwnerDiedError, TransferError, UnavailableError
from aiordt._peer import RemotePeer
from aiordt.abc import Part
from aiordt.testing import (
    Leaks,
    _process,
    at_phase,
    check_transport,
    eventually,
    process_pairs,
)
from aiordt.testing._process import _Half
from aiordt.transports import _nixl_read, nixl, probe
from aiordt.transports.nixl import NixlLink, NixlTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

available = probe("nixl")
pytestmark = pytest.mark.skipif(not available.usable, reason=f"nixl: {available.reason}")


class Ends:
    """Two halves of a transfer in one process, so that both ends can be looked into."""

    def __init__(self) -> None:
        self.owner = _Half()
        self.reader = _Half()

    async def connect(self) -> NixlLink:
        link = await self.reader.connect("nixl", self.owner.address)
        assert isinstance(link, NixlLink)
        return link

    @property
    def owning(self) -> NixlTransport:
        made = self.owner.transports.made["nixl"]
        assert isinstance(made, NixlTransport)
        return made

    def export(self, tensors: Sequence[torch.Tensor]) -> bytes:
        export = self.owner.registry.begin(list(tensors), "test")
        self.owner.registry.commit(
            export, [export.key + bytes([n]) for n in range(len(export.groups))]
        )
        return export.key

    def free(self, key: bytes) -> None:
        leases = self.owner.registry._leases
        gone = [name for name, (export, _) in leases.items() if export.key == key]
        self.owner.registry.drop(gone)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    leaks = Leaks()
    made = Ends()
    yield made
    made.reader.close()
    made.owner.close()
    await leaks.wait_none()


def part_of(key: bytes, index: int, tensor: torch.Tensor, target: torch.Tensor) -> Part:
    return Part(key, index, tensor.data_ptr(), target.data_ptr(), tensor.nbytes, tensor=target)


async def read(link: NixlLink, key: bytes, tensors: Sequence[torch.Tensor]) -> None:
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    pairs = zip(tensors, targets, strict=True)
    await link.read([part_of(key, index, *pair) for index, pair in enumerate(pairs)])
    for tensor, target in zip(tensors, targets, strict=True):
        assert torch.equal(tensor, target)


async def test_a_busy_owner_serves_as_well() -> None:
    leaks = Leaks()
    with process_pairs("nixl", busy=True) as make_pair:
        await check_transport(make_pair)
    await leaks.wait_none()


@pytest.fixture
def as_if_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and in serving processes: NIXL as it is set up on hosts with an RDMA device."""
    monkeypatch.setattr(nixl, "has_rdma", lambda: True)
    patch = "from aiordt.transports import nixl; nixl.has_rdma = lambda: True; "
    monkeypatch.setattr(_process, "_PROGRAM", patch + _process._PROGRAM)


@pytest.mark.usefixtures("as_if_rdma")
async def test_where_first_contact_needs_the_owner() -> None:  # NIX-1
    leaks = Leaks()
    with process_pairs("nixl") as make_pair:
        await check_transport(make_pair)
    await leaks.wait_none()


@pytest.mark.usefixtures("as_if_rdma")
async def test_the_owner_makes_progress_only_while_a_peer_wires_up(ends: Ends) -> None:
    peer = RemotePeer(ends.owner.address, ends.reader._network)
    remote = _nixl_read.Remote(peer, None, ends.reader.io)  # type: ignore[arg-type]
    await ends.reader.io.run(remote._ask("hello", []))
    assert ends.owning._progressing
    await ends.reader.io.run(remote._ask("wired", []))
    await eventually(lambda: not ends.owning._progressing, what="the owner sleeps again")
    await ends.reader.io.run(remote._ask("hello", []))
    assert ends.owning._progressing
    await ends.reader.io.run(ends.reader._network.aclose())  # it died before it was wired up
    await eventually(lambda: not ends.owning._progressing, what="the owner sleeps again")


@pytest.mark.parametrize("rdma", [False, True])
async def test_only_tcp_is_refused(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, *, rdma: bool
) -> None:  # NIX-1
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(nixl, "has_rdma", lambda: rdma)  # then the owner helps to wire up
    with pytest.raises(UnavailableError, match="UCX_TLS"):
        await ends.connect()
    monkeypatch.setattr(nixl, "only_tcp", lambda: False)
    monkeypatch.setattr(_nixl_read, "_PROOF_SECONDS" if rdma else "WIRING_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="the owner's help"):  # found out by trying
            await ends.connect()


async def test_another_host_is_refused(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "host_id", lambda: bytes(16))
    with pytest.raises(UnavailableError, match="another host"):
        await ends.connect()


async def test_what_is_known_of_a_peer_is_bounded(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:  # NIX-4
    """Many exports, one after another and at once, while all of it is forgotten in between."""
    monkeypatch.setattr(_nixl_read, "MAX_KNOWN", 8)
    link = await ends.connect()
    for number in range(30):
        tensors = [torch.full((3000,), number), torch.full((9,), -number)]
        await read(link, ends.export(tensors), tensors)
        assert len(link._remote._known) <= 8
    many = [[torch.full((30_000,), number + 100 * k) for k in range(5)] for number in range(8)]
    keys = [ends.export(tensors) for tensors in many]
    async with asyncio.timeout(20):
        await asyncio.gather(*(read(link, *each) for each in zip(keys, many, strict=True)))
        large = [torch.full((99,), number) for number in range(20)]
        await read(link, ends.export(large), large)  # more than the bound by itself


async def test_only_what_is_exported_is_registered(ends: Ends) -> None:  # RGN-3
    link = await ends.connect()
    before, _ = ends.owning.registered
    tensors = [torch.full((3000,), number) for number in range(3)]
    key = ends.export(tensors)
    await read(link, key, tensors)
    assert ends.owning.registered[0] == before + 3
    ends.owner.io.loop.call_soon_threadsafe(ends.owning._sweep)
    await asyncio.sleep(0.05)
    await read(link, key, tensors)
    assert ends.owning.registered[0] == before + 3, "a peer may still read them"
    ends.free(key)
    del tensors
    ends.owner.io.loop.call_soon_threadsafe(ends.owning._sweep)
    await eventually(lambda: ends.owning.registered[0] == before, what="all are deregistered")


async def test_views_of_one_storage_are_registered_once(ends: Ends) -> None:  # RGN-1
    link = await ends.connect()
    before, _ = ends.owning.registered
    whole = torch.arange(100_000)
    tensors = [whole, whole[5000:], whole[:70_000].view(7, 10_000)]
    await read(link, ends.export(tensors), tensors)
    assert ends.owning.registered[0] == before + 1


async def test_a_loop_never_waits_for_the_agent(ends: Ends) -> None:  # NIX-2
    """Another thread is at it: the read is left to the agent's own thread, and comes later."""
    link = await ends.connect()
    tensor, target = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    key = ends.export([tensor])
    await read(link, key, [tensor])
    part = part_of(key, 0, tensor, target)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with link._engine.lock:
            taken.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(20)
    assert not link.read_nowait([part])
    reading = asyncio.create_task(link.read([part]))
    await asyncio.sleep(0.05)
    assert not reading.done()
    assert not target.any()
    done.set()
    await reading
    holder.join()
    assert torch.equal(tensor, target)
    assert link.read_nowait([part])


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("known", [False, True])
async def test_closing_needs_nothing_of_a_loop_that_reads(
    ends: Ends, *, known: bool, routed: bool
) -> None:
    """As when a runtime is closed on the loop that pulls: it stands still until that is done."""
    link = await ends.connect()  # CLS-2, NIX-4
    tensor = torch.arange(16 << 20)
    target = torch.zeros_like(tensor)
    key = ends.export([tensor])
    if known:
        await read(link, key, [tensor])
    reading = asyncio.create_task(link.read([part_of(key, 0, tensor, target)]))
    with at_phase("nixl.chunk", lambda: None) as phases:
        await phases.wait_reached()
        if routed:  # as a runtime's routes do before its transports end
            await link.aclose()
        ends.reader.close()
    assert ends.reader.io.loop.is_closed(), "its io thread has ended"
    with pytest.raises(ClosedError):
        await reading


async def test_closing_ends_a_first_contact(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:  # CLS-2
    monkeypatch.setenv("UCX_TLS", "tcp")  # the owner would have to help
    monkeypatch.setattr(nixl, "only_tcp", lambda: False)
    monkeypatch.setattr(_nixl_read, "WIRING_SECONDS", 60)
    connecting = asyncio.create_task(ends.connect())
    with at_phase("nixl.proving", lambda: None) as phases:
        await phases.wait_reached()
        ends.reader.close()
    assert ends.reader.io.loop.is_closed(), "its io thread has ended"
    with pytest.raises(ClosedError):
        await connecting


async def test_nothing_outside_of_an_export_is_read(ends: Ends) -> None:  # NIX-3
    link = await ends.connect()
    tensor, target = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    key = ends.export([tensor])
    for offset in (-8, 8):
        part = part_of(key, 0, tensor, target)
        part.address += offset
        assert not link.read_nowait([part])
        with pytest.raises(TransferError, match="outside"):
            await link.read([part])
    assert not target.any()
    await read(link, key, [tensor])


_UNMAPPING = """
import ctypes, mmap, signal, torch
from aiordt.testing import _process

unpack, maps, gone = _process._unpack, [], []

def unpack_elsewhere(*args, **kwargs):
    tensor = unpack(*args, **kwargs)
    maps.append(mmap.mmap(-1, tensor.nbytes))
    return torch.frombuffer(maps[-1], dtype=tensor.dtype).copy_(tensor)

def unmap(*_):
    gone.append(maps[len(gone)])
    address = ctypes.addressof(ctypes.c_char.from_buffer(gone[-1]))
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(len(gone[-1])))

_process._unpack = unpack_elsewhere
signal.signal(signal.SIGUSR1, unmap)
"""


async def read_after_a_failure(make_pair: process_pairs) -> None:
    pair = await make_pair()
    small, large, kept = await pair.export(
        [torch.arange(1000), torch.arange(4 << 20), torch.arange(50_000)]
    )
    for gone in (small, large):
        target = torch.zeros_like(gone.like)
        part = gone.part(target.data_ptr())
        await pair.link.read([part])
        assert make_pair._process is not None
        make_pair._process.process.send_signal(signal.SIGUSR1)
        await pair.export([torch.zeros(1)])  # done after the signal's handler
        for _ in range(2):
            assert not pair.link.read_nowait([part])
            with pytest.raises(TransferError) as info:
                await pair.link.read([part])
            assert (info.value.transport, info.value.nbytes) == ("nixl", part.nbytes)
            target = torch.zeros_like(kept.like)
            await pair.link.read([kept.part(target.data_ptr())])
            assert torch.equal(target, kept.like)
    await pair.aclose()


async def test_the_link_is_usable_after_a_failed_transfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # ISO-1
    """The owner lost memory that it had exported; UCX gives its endpoint up after that."""
    monkeypatch.setattr(_process, "_PROGRAM", _UNMAPPING + _process._PROGRAM)
    leaks = Leaks()
    with process_pairs("nixl") as make_pair:
        await read_after_a_failure(make_pair)
    await leaks.wait_none()


@pytest.mark.parametrize("renewed", [False, True])
async def test_an_owner_that_dies_while_it_is_asked(*, renewed: bool) -> None:  # DTH-1
    with process_pairs("nixl") as make_pair:
        pair = await make_pair()
        (exported,) = await pair.export([torch.arange(1000)])
        target = torch.zeros_like(exported.like)
        assert isinstance(pair.link, NixlLink)
        pair.link._remote.broken = renewed
        assert make_pair._process is not None
        kill = make_pair._process.kill

        def die() -> None:
            kill()
            raise RuntimeError("NIXL_ERR_REMOTE_DISCONNECT")

        with at_phase("nixl.loading", die), pytest.raises(OwnerDiedError):
            await pair.link.read([exported.part(target.data_ptr())])
        await pair.aclose()


_PROGRAM = """
import asyncio, logging, os, sys, warnings
before = dict(os.environ), list(logging.root.handlers), logging.raiseExceptions
import torch
from aiordt.testing import process_pairs
from aiordt._errors import AiordtError

async def main():
    with process_pairs("nixl") as make_pair:
        pair = await make_pair()
        (exported,) = await pair.export([torch.arange(1000)])
        target = torch.zeros(1000, dtype=torch.int64)
        await pair.link.read([exported.part(target.data_ptr())])
        assert torch.equal(target, exported.like)
        await pair.kill()
        try:
            await pair.link.read([exported.part(target.data_ptr())])
        except AiordtError:
            pass
        await pair.aclose()

asyncio.run(main())
assert before == (dict(os.environ), list(logging.root.handlers), logging.raiseExceptions)
"""


def test_nobody_hears_of_it() -> None:
    """Neither an output, nor a change of the environment or of logging; a dead peer included."""
    ran = subprocess.run(  # noqa: S603  (our own program)
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_without_an_rdma_device_it_is_used_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    for rdma in (False, True):
        monkeypatch.setattr(nixl, "has_rdma", lambda rdma=rdma: rdma)
        found = NixlTransport.probe()
        assert found.usable
        assert found.on_demand is not rdma
        assert bool(found.reason) is not rdma
