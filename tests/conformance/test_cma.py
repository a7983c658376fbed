"""What is particular to same-host reads: the proof of who is there, and its death."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typing_extensions import override

from aiordt._errors import OwnerDiedError, TransferError, UnavailableError
from aiordt.abc import Cut, Part, Peer, PeerAddress
from aiordt.testing import check_leaks, wait_until
from aiordt.transports import _job, cma
from aiordt.transports.cma import CmaTransport

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from aiordt._wire import Message

pytestmark = pytest.mark.skipif(
    not CmaTransport.probe().usable, reason=f"cma: {CmaTransport.probe().reason}"
)


class Known(Peer):
    """A peer of which only the address is needed."""

    def __init__(self, address: PeerAddress) -> None:
        self.address = address

    @override
    async def reach(self) -> None:
        raise AssertionError

    @override
    async def call(self, request: Message) -> Message:
        raise AssertionError

    @override
    async def open_stream(self, stream: bytes) -> socket.socket:
        raise AssertionError

    @override
    async def open_local(self, stream: bytes) -> socket.socket:
        raise AssertionError

    @override
    async def verdict(self, cause: Exception, *, transport: str, nbytes: int) -> Exception:
        raise AssertionError


#: What a transport that serves nobody does not look at.
NO_CONTEXT: Any = None
TOKEN = bytes(range(16))
MEMORY = ctypes.create_string_buffer(TOKEN, 16)


def here(**changes: Any) -> PeerAddress:
    """This process, as another would know it."""
    address = PeerAddress(
        "127.0.0.1", 1, TOKEN, os.getpid(), cma.host_id(), ctypes.addressof(MEMORY)
    )
    return dataclasses.replace(address, **changes)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process, without aiordt."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


async def test_a_link_needs_the_token_where_it_is_said_to_be() -> None:  # CMA-1
    transport = CmaTransport(NO_CONTEXT)
    async with await transport.connect(Known(here())) as link:
        assert link.death_fd is not None
    wrong = {
        "another runtime": here(runtime_id=bytes(16)),
        "another address": here(token_address=ctypes.addressof(MEMORY) + 1),
        "not mapped": here(token_address=4096),
        "another host": here(host_id=bytes(16)),
        "no such process": here(pid=2**22 - 1),
    }
    with check_leaks():
        for name, address in wrong.items():
            with pytest.raises(UnavailableError) as info:
                await transport.connect(Known(address))
            assert info.value.transport == "cma", name
            assert info.value.reason in str(info.value)
    await transport.aclose()


async def test_another_process_with_the_pid_is_refused(
    sleeper: subprocess.Popen[bytes],
) -> None:  # CMA-1
    transport = CmaTransport(NO_CONTEXT)
    with pytest.raises(UnavailableError, match="another one"):
        await transport.connect(Known(here(pid=sleeper.pid)))
    await transport.aclose()


async def test_a_read_counts_only_if_the_owner_lives(
    sleeper: subprocess.Popen[bytes],
) -> None:  # CMA-2
    """The pid is ours and the memory is there, but the process that was proved is dead."""
    transport = CmaTransport(NO_CONTEXT)
    pidfd = os.pidfd_open(sleeper.pid)
    link = cma.CmaLink(os.getpid(), pidfd, name="reused pid", workers=transport._workers)
    source, target = torch.arange(1 << 20), torch.zeros(1 << 20, dtype=torch.int64)
    small = Part(b"", 0, source.data_ptr(), target.data_ptr(), 64)
    large = Part(b"", 0, source.data_ptr(), target.data_ptr(), 8 << 20)
    assert link.read_nowait([small])
    await link.read([large])
    assert torch.equal(source, target)
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(OwnerDiedError, match="reused pid"):
        link.read_nowait([small])
    with pytest.raises(OwnerDiedError, match="reused pid"):
        await link.read([large])
    await link.aclose()
    await transport.aclose()


async def test_any_thread_may_ask_whether_the_owner_lives() -> None:  # CMA-2
    """Reads of several loops, and failing workers, look at the same descriptor at once."""
    transport = CmaTransport(NO_CONTEXT)
    link = await transport.connect(Known(here()))
    source, target = torch.ones(64), torch.zeros(64)
    part = Part(b"", 0, source.data_ptr(), target.data_ptr(), 64)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(2000):
                link.read_nowait([part])
        except BaseException as exc:  # noqa: BLE001  (told below)
            errors.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: not any(thread.is_alive() for thread in threads),
        what="the reads have ended",
        within=30,
    )
    sys.setswitchinterval(interval)
    await link.aclose()
    await transport.aclose()
    assert errors == []


async def test_a_read_that_stops_short_is_a_failed_transfer() -> None:  # OWN-1
    """The kernel reads up to the first piece that is not mapped, and says how much."""
    transport = CmaTransport(NO_CONTEXT)
    link = await transport.connect(Known(here()))
    source = torch.arange(8192, dtype=torch.uint8)
    target = torch.zeros(3 * 4096, dtype=torch.uint8)
    for step in (1 << 46, 1 << 45):  # past the end of the address space, and of the first half
        cut = Cut(0, (3, 4096), (step, 1), 1)
        part = Part(b"", 0, source.data_ptr(), target.data_ptr(), 3 * 4096, cut)
        with pytest.raises(TransferError):
            await link.read([part])
    await link.aclose()
    await transport.aclose()


async def test_memory_that_is_not_there_is_a_failed_transfer() -> None:
    transport = CmaTransport(NO_CONTEXT)
    link = await transport.connect(Known(here()))
    target = torch.zeros(8 << 20, dtype=torch.uint8)
    for nbytes in (64, 8 << 20):
        part = Part(b"", 0, 4096, target.data_ptr(), nbytes)
        with pytest.raises(TransferError) as info:
            await link.read([part])
        assert (info.value.transport, info.value.nbytes) == ("cma", nbytes)
    await link.aclose()
    await transport.aclose()


@pytest.mark.parametrize("nbytes", [1, 40, 3000, 70_000])
async def test_many_small_parts_are_read_by_few_calls(
    monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    count = 2500 if nbytes < 70_000 else 50
    transport = CmaTransport(NO_CONTEXT)
    link = await transport.connect(Known(here()))
    source = torch.randint(0, 256, (count, nbytes + 7), dtype=torch.uint8)
    target = torch.zeros(count, nbytes + 3, dtype=torch.uint8)
    parts = [
        Part(b"", 0, row.data_ptr(), to.data_ptr(), nbytes if number % 10 else 0)
        for number, (row, to) in enumerate(zip(source, target, strict=True))
    ]
    calls = []
    readv = cma._readv
    assert readv is not None

    def counting(*args: Any) -> int:
        calls.append(args)
        return readv(*args)

    monkeypatch.setattr(cma, "_readv", counting)
    if not link.read_nowait(parts):
        assert count * nbytes > cma.INLINE_NBYTES
        await link.read(parts)
    assert len(calls) <= 2 + max(count // 1000, count * nbytes // (_job.CHUNK_NBYTES - nbytes))
    expected = torch.zeros_like(target)
    expected[:, :nbytes] = source[:, :nbytes]
    expected[::10] = 0
    assert torch.equal(target, expected)
    await link.aclose()
    await transport.aclose()


async def test_one_small_part_of_many_that_is_not_there_fails_them_all() -> None:
    transport = CmaTransport(NO_CONTEXT)
    link = await transport.connect(Known(here()))
    source, target = torch.ones(100, 64), torch.zeros(100, 64)
    parts = [
        Part(b"", 0, 4096 if number == 60 else row.data_ptr(), to.data_ptr(), 256)
        for number, (row, to) in enumerate(zip(source, target, strict=True))
    ]
    with pytest.raises(TransferError):
        link.read_nowait(parts)
    with pytest.raises(TransferError):
        await link.read(parts)
    assert not target[60:].any()
    await link.aclose()
    await transport.aclose()
