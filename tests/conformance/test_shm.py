"""What is particular to shared memory: whose it is, who may map it, and for how long."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from aiordt._arena import arena
from aiordt._errors import TransferError, UnavailableError
from aiordt._sockets import local_name
from aiordt._types import KIB, MIB
from aiordt.abc import Part
from aiordt.testing import Leaks, eventually
from aiordt.testing._process import _Half
from aiordt.transports.shm import ShmLink, ShmTransport
from tests.support import on_phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(
    not ShmTransport.probe().usable, reason=f"shm: {ShmTransport.probe().reason}"
)
NBYTES = 3 << 20


class Ends:
    """Two halves in one process, and a tensor in its shared memory."""

    def __init__(self) -> None:
        self.owner, self.reader = _Half(), _Half()
        content = torch.arange(NBYTES // 8).view(torch.uint8)
        self.tensor = arena.empty((NBYTES,), torch.uint8).copy_(content)
        self.segment = arena.locate(self.tensor.data_ptr())
        self.link: ShmLink

    async def connect(self) -> ShmLink:
        link = await self.reader.connect("shm", self.owner.address)
        assert isinstance(link, ShmLink)
        self.link = link
        return link

    def part(self, target: torch.Tensor, address: int, segment: int) -> Part:
        return Part(b"", 0, address, target.data_ptr(), target.nbytes, segment=segment)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    leaks = Leaks()
    made = Ends()
    await made.connect()
    yield made
    await made.link.aclose()
    made.reader.close()
    made.owner.close()
    del made.tensor
    await leaks.wait_none()


async def test_only_the_segment_that_is_named_is_read(ends: Ends) -> None:  # SHM-1
    """An address of the owner's that is not in the segment: freed, or somebody's mistake."""
    segment = arena.segment(ends.segment)
    assert segment is not None
    target = torch.zeros(64, dtype=torch.uint8)
    end = segment.address + segment.nbytes
    for address in (segment.address - 64, end - 63, end, target.data_ptr(), 0):
        part = ends.part(target, address, ends.segment)
        with pytest.raises(TransferError, match="not in the shared segment"):
            await ends.link.read([part])
        with pytest.raises(TransferError, match="not in the shared segment"):
            ends.link.read_nowait([part])
    with pytest.raises(TransferError, match="no such shared segment"):
        await ends.link.read([ends.part(target, ends.tensor.data_ptr(), 1 << 40)])
    assert not bool(target.any())
    await ends.link.read([ends.part(target, ends.tensor.data_ptr(), ends.segment)])
    assert torch.equal(target, ends.tensor[:64])


async def test_a_segment_is_mapped_once_for_all_who_ask(ends: Ends) -> None:
    targets = [torch.zeros(1000, dtype=torch.uint8) for _ in range(20)]
    address = ends.tensor.data_ptr()
    await asyncio.gather(
        *(ends.link.read([ends.part(target, address, ends.segment)]) for target in targets)
    )
    segment = arena.segment(ends.segment)
    assert segment is not None
    assert ends.link.mapped_nbytes == segment.nbytes
    assert all(torch.equal(target, ends.tensor[:1000]) for target in targets)


async def test_chunks_are_small_and_small_parts_are_gathered(ends: Ends) -> None:
    """One chunk of a large tensor at a time, so that others have their turns (FAIR-1)."""
    large = arena.empty((8 * MIB,), torch.uint8).fill_(3)
    target = torch.zeros(8 * MIB, dtype=torch.uint8)
    chunks: list[str] = []

    def count(name: str) -> None:
        chunks.extend([name] * (name == "shm.chunk"))

    on_phase(count)
    try:
        segment = arena.locate(large.data_ptr())
        await ends.link.read([ends.part(target, large.data_ptr(), segment)])
        assert len(chunks) == 8
        chunks.clear()
        parts = []
        for start in range(0, 8 * MIB, 64 * KIB):
            address, here = large.data_ptr() + start, target.data_ptr() + start
            part = Part(b"", 0, address, here, 64 * KIB, segment=segment, tensor=target)
            parts.append(part)
        await ends.link.read(parts)
        assert len(chunks) == 4
    finally:
        on_phase(None)
    assert torch.equal(target, large)
    del large


async def test_nobody_gets_memory_without_the_secret(ends: Ends) -> None:  # AUTH-1
    """Whoever connects to the local socket, and asks right away, is not answered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(local_name(ends.owner.address.runtime_id))
        sock.settimeout(10)
        sock.send(ends.segment.to_bytes(8, "big") * 4)
        with pytest.raises(ConnectionResetError):
            socket.recv_fds(sock, 100, 4)


async def test_another_host_is_refused(ends: Ends) -> None:
    elsewhere = dataclasses.replace(ends.owner.address, host_id=bytes(16))
    with pytest.raises(UnavailableError, match="another host"):
        await ends.reader.connect("shm", elsewhere)


async def test_another_network_namespace_is_refused(ends: Ends) -> None:
    """The control connection works, but its local socket is not to be found here."""
    listeners = ends.owner._network._listeners
    ends.owner.io.loop.call_soon_threadsafe(ends.owner._network._serving[1].cancel)
    await eventually(ends.owner._network._serving[1].done, what="it listens no more")
    listeners[1].close()
    with pytest.raises(UnavailableError, match="network namespace"):
        await ends.reader.connect("shm", ends.owner.address)


class Held:
    """A lease, say."""


async def test_what_is_written_to_a_copy_on_write_is_the_writers(ends: Ends) -> None:  # SHM-3
    before = ends.tensor.clone()
    place = (ends.segment, ends.tensor.data_ptr() + 5000, NBYTES - 9000)  # of no whole pages
    wanted = before[5000:-4000]
    held = Held()
    gone = weakref.ref(held)
    one, other = [await ends.link.copy_on_write(*place, held) for _ in range(2)]
    del held
    one[100_000:200_000] = 1
    assert one[100_000:200_000].eq(1).all()
    assert torch.equal(one[:100_000], wanted[:100_000])
    assert torch.equal(ends.tensor, before), "the owner's"
    assert torch.equal(other, wanted), "made before it was written"
    assert torch.equal(await ends.link.copy_on_write(*place, None), wanted), "and after"
    part = one[150_000:]
    del one, other
    assert gone() is not None, "the memory is in use"
    del part
    assert gone() is None
    with pytest.raises(TransferError, match="not in the shared segment"):
        await ends.link.copy_on_write(ends.segment, ends.tensor.data_ptr() - (1 << 30), 9, None)


async def test_a_view_needs_no_link_to_live(ends: Ends) -> None:  # SHM-2
    view = await ends.link.view(ends.segment, ends.tensor.data_ptr(), NBYTES)
    await ends.link.aclose()
    ends.reader.close()
    assert torch.equal(view, ends.tensor)
    ends.tensor[5] = 77
    assert int(view[5]) == 77
