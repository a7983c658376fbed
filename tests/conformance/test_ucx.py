"""What is particular to UCX: its thread, its tags, its endpoints, and what it does to a process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from aiordt._errors import (
    ClosedError,
    OwnerDiedError,
    ProtocolViolationError,
    TensorFreedError,
    TransferError,
    UnavailableError,
)
from aiordt._types import MIB
from aiordt.abc import Part, TransportMessage
from aiordt.testing import (
    Leaks,
    at_phase,
    check_transport,
    eventually,
    process_pairs,
    record_phases,
)
from aiordt.testing._process import ServingProcess, _Half
from aiordt.transports import _ucx_devices, probe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiordt._peer import RemotePeer
    from aiordt.transports._ucp import Endpoint
    from aiordt.transports._ucx_link import UcxLink
    from aiordt.transports.ucx import UcxTransport

pytestmark = pytest.mark.skipif(not probe("ucx").usable, reason=f"ucx: {probe('ucx').reason}")
if probe("ucx").usable:
    from aiordt.transports._ucp import Ucp, UcxError
    from aiordt.transports._ucx_link import UcxLink
    from aiordt.transports._ucx_worker import (
        _BLOCK_NBYTES,
        _SEGMENT_NBYTES,
        Incoming,
        messages,
    )
    from aiordt.transports.ucx import UcxTransport

#: Of a large read: several messages, more than are received at once.
LARGE = 160 * MIB


class Ends:
    """An owner and a reader in this process, each with UCX of its own, and a link."""

    def __init__(self) -> None:
        self.owner = _Half()
        self.reader = _Half()
        self.tensor = torch.arange(LARGE // 8, dtype=torch.int64).view(torch.uint8)
        self.key = self.export(LARGE)
        self.link: UcxLink

    async def connect(self) -> UcxLink:
        link = await self.reader.connect("ucx", self.owner.address)
        assert isinstance(link, UcxLink)
        return link

    def export(self, nbytes: int) -> bytes:
        return self.export_each([self.tensor[:nbytes]])

    def export_each(self, tensors: list[torch.Tensor]) -> bytes:
        export = self.owner.registry.begin(tensors, "test")
        self.owner.registry.commit(export, [object()])
        return export.key

    async def read(self, nbytes: int = LARGE, link: UcxLink | None = None) -> None:
        target = torch.zeros(nbytes, dtype=torch.uint8)
        key = self.key if nbytes == LARGE else self.export(nbytes)
        await (link or self.link).read([Part(key, 0, 0, target.data_ptr(), nbytes)])
        assert torch.equal(target, self.tensor[:nbytes])

    @property
    def serving(self) -> UcxTransport:
        made = self.owner.transports.made["ucx"]
        assert isinstance(made, UcxTransport)
        return made

    @property
    def consuming(self) -> UcxTransport:
        made = self.reader.transports.made["ucx"]
        assert isinstance(made, UcxTransport)
        return made

    async def held_by_none(self) -> None:
        registry = self.owner.registry
        await eventually(
            lambda: not registry._state.holders.keys() - set(registry._leases.keys()),
            what="no transfer holds the tensor",
        )

    async def fail_and_read(self) -> None:
        """Fail the endpoint of each end while messages wait to be fetched; then read."""
        for end, phase in ((self.consuming, "ucx.asking"), (self.serving, "ucx.sending")):
            (endpoint,) = end.worker._endpoints

            def fail(end: UcxTransport = end, endpoint: Endpoint = endpoint) -> None:
                end.post(end.worker.disconnect, endpoint)

            with at_phase(phase, fail), pytest.raises(TransferError):
                await asyncio.wait_for(self.read(), 10)
            await self.held_by_none()
            await asyncio.wait_for(self.read(), 10)
            await self.one_session()

    async def one_session(self) -> None:
        """Closed endpoints are gone at both ends."""
        await eventually(lambda: len(self.serving._served) == 1, what="one session is left")
        for end in (self.serving, self.consuming):
            await eventually(
                lambda w=end.worker: len(w._endpoints) == 1 and not w._closing,  # type: ignore[misc]
                what="endpoints are closed at both ends",
            )

    async def close(self) -> None:
        await self.link.aclose()
        self.reader.close()
        self.owner.close()

    async def quiet(self) -> None:
        """Both ends of UCX have nothing under way."""
        for each in (self.serving, self.consuming):
            await eventually(lambda e=each: not e.worker._transfers, what="UCX is done")  # type: ignore[misc]


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    leaks = Leaks()
    made = Ends()
    made.link = await made.connect()
    yield made
    await made.close()
    await leaks.wait_none()


def test_conformance_of_a_busy_owner() -> None:
    async def check() -> None:
        leaks = Leaks()
        with process_pairs("ucx", busy=True) as make_pair:
            await check_transport(make_pair)
        await leaks.wait_none()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check())


async def test_conformance_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between hosts without RDMA: the owner's UCX has a part in every message."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    with process_pairs("ucx") as make_pair:
        await check_transport(make_pair)


# --- messages -----------------------------------------------------------------------------------


@given(
    sizes=st.lists(
        st.sampled_from((0, 1, 5000, 100_000, MIB - 1, MIB, 9 * MIB, 40 * MIB)), max_size=60
    ),
    shared=st.booleans(),
)
def test_messages_hold_every_byte_once_in_order(sizes: list[int], *, shared: bool) -> None:
    made = list(messages(sizes, shared=shared))
    pieces = [piece for message in made for piece in message]
    held = [0] * len(sizes)
    for place, start, nbytes in pieces:
        assert start == held[place]
        assert nbytes
        held[place] += nbytes
    assert held == sizes
    assert all(sum(piece.nbytes for piece in message) <= _SEGMENT_NBYTES for message in made)
    packed = [message for message in made if len(message) > 1]
    assert all(sum(piece.nbytes for piece in message) <= _BLOCK_NBYTES for message in packed)
    small = sum(size for size in sizes if size < MIB)
    if shared:
        assert sum(message[0].nbytes < MIB for message in made) <= 1 + small // (MIB - 64)
    else:
        assert not packed


@pytest.mark.parametrize("gap", [0, 64])
async def test_small_parts_travel_together(ends: Ends, gap: int) -> None:  # OWN-1
    """Into memory that is in one piece or not; what lies between is not touched."""
    size = 100_000
    step, count = size + gap, LARGE // size
    target = torch.zeros(count * step, dtype=torch.uint8)
    key = ends.export_each([ends.tensor[i * size : (i + 1) * size] for i in range(count)])
    parts = [Part(key, i, 0, target.data_ptr() + i * step, size) for i in range(count)]
    await ends.link.read(parts)
    got = target.view(count, step)
    assert torch.equal(got[:, :size].flatten(), ends.tensor[: count * size])
    assert not bool(got[:, size:].any())
    loop = asyncio.get_running_loop()
    for name in ("ucx.asking", "ucx.sending", "ucx.receiving"):
        task = asyncio.create_task(ends.link.read(parts))
        with at_phase(name, lambda t=task: loop.call_soon_threadsafe(t.cancel)) as phases:  # type: ignore[misc]
            await asyncio.wait({task}, timeout=10)
            await phases.wait_reached()
        if not task.cancelled():
            task.result()
        target.fill_(7)
        await ends.quiet()
        assert bool((target == 7).all()), "OWN-1"
    await ends.read()


# --- UCX-4: nothing is left behind --------------------------------------------------------------


@pytest.mark.parametrize("name", ["ucx.asking", "ucx.sending", "ucx.receiving"])
async def test_cancelled_at_each_phase(ends: Ends, name: str) -> None:  # UCX-1, UCX-4, CAN-1
    target = torch.zeros(LARGE, dtype=torch.uint8)
    part = Part(ends.key, 0, 0, target.data_ptr(), LARGE)
    loop = asyncio.get_running_loop()
    for _ in range(5):
        task = asyncio.create_task(ends.link.read([part]))
        with at_phase(name, lambda t=task: loop.call_soon_threadsafe(t.cancel)) as phases:  # type: ignore[misc]
            await asyncio.wait({task}, timeout=10)
            await phases.wait_reached()
        if not task.cancelled():  # the last byte came first
            task.result()
        target.fill_(7)
        await ends.held_by_none()
        await ends.quiet()
        assert bool((target == 7).all()), "OWN-1"
    await ends.read()


async def test_what_comes_after_a_cancellation_goes_nowhere() -> None:  # UCX-4, OWN-1
    """The owner, which stood still, answers a read that was given up."""
    with process_pairs("ucx") as make_pair:
        pair = await make_pair()
        content = torch.arange(LARGE // 8, dtype=torch.int64)
        (exported,) = await pair.export([content])
        target, again = torch.zeros_like(content), torch.zeros_like(content)
        pair.pause()
        for _ in range(3):
            with at_phase("ucx.asking", lambda: None) as phases:
                task = asyncio.create_task(pair.link.read([exported.part(target.data_ptr())]))
                await phases.wait_reached()
            task.cancel()
            await asyncio.wait({task}, timeout=2)
            assert task.cancelled()
        pair.resume()
        await pair.link.read([exported.part(again.data_ptr())])
        assert torch.equal(again, content)
        assert not bool(target.any())
        await pair.aclose()


async def test_a_refused_read_leaves_nothing(ends: Ends) -> None:  # ISO-1, UCX-4
    target = torch.zeros(LARGE, dtype=torch.uint8)
    for nbytes in (100, LARGE):
        with pytest.raises(TensorFreedError):
            await ends.link.read([Part(os.urandom(16), 0, 0, target.data_ptr(), nbytes)])
    await ends.quiet()
    await ends.read()


async def test_the_tensor_is_held_while_it_is_sent(ends: Ends) -> None:  # OWN-1
    registry = ends.owner.registry
    (lease,) = registry._leases
    with at_phase("ucx.sending", lambda: registry.drop([lease])) as phases:
        await ends.read()
    assert phases.reached.is_set()
    await eventually(lambda: registry.counts()[0] == 0, what="it is given up after that")


# --- UCX-5: sessions ----------------------------------------------------------------------------


async def test_each_link_closes_its_endpoints(ends: Ends) -> None:  # UCX-5
    for _ in range(20):
        link = await ends.connect()
        await ends.read(MIB, link)
        await link.aclose()
    await ends.one_session()
    await ends.read()


def test_no_endpoint_writes_to_a_queue_that_others_share() -> None:  # UCX-8
    """Who is killed in the middle of that stops it for all the others."""
    ours, theirs = Ucp(None), Ucp(None)
    endpoint = ours.connect(theirs.address)
    names = endpoint._transports()
    assert names & {b"cma", b"tcp"}
    assert not names & {b"posix", b"sysv"}
    endpoint.close(force=True)


async def test_a_failed_endpoint_is_made_anew(ends: Ends) -> None:  # UCX-5
    await ends.fail_and_read()


async def test_both_ends_close_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:  # UCX-7
    """The owner has not sent all, over TCP, when its reader goes; it serves the next ones."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    process = ServingProcess()
    content = torch.ones(LARGE, dtype=torch.uint8)
    try:
        address = process.address
        (exported,) = process.export([content])
        for _ in range(8):  # it took one or two
            half = _Half()
            link = await half.connect("ucx", address)
            target = torch.zeros_like(content)
            task = asyncio.create_task(link.read([exported.part(target.data_ptr())]))
            with at_phase("ucx.receiving", lambda: None) as phases:
                await phases.wait_reached()
            await link.aclose()
            await asyncio.wait_for(half.aclose(), 5)
            with suppress(ClosedError):  # unless the last byte came first
                await task
        assert process.alive
    finally:
        process.close()


async def test_no_contact_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "posix")
    process = ServingProcess()
    try:
        address = process.address
        monkeypatch.setenv("UCX_TLS", "tcp")
        half = _Half()
        with pytest.raises(UnavailableError, match="no contact") as caught:
            await half.connect("ucx", address)
        assert caught.value.transport == "ucx"
        half.close()
    finally:
        process.close()


async def test_malformed_requests_are_refused(ends: Ends) -> None:
    peer: RemotePeer = ends.link._peer  # type: ignore[assignment]
    for body in (
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\x09",
        b"\x92\x02\xc4",
        b"\x93\x02\xc4\x00\xff",
        b"\x01",
    ):
        with pytest.raises(ProtocolViolationError):
            await ends.reader.io.run(peer.call(TransportMessage("ucx", body)))
    await ends.read()


async def test_only_the_peer_that_made_a_session_may_use_it(ends: Ends) -> None:  # AUTH-1
    (number,) = [number for _, number in ends.serving._served]
    stranger = _Half()
    link = await stranger.connect("ucx", ends.owner.address)
    assert isinstance(link, UcxLink)
    taken = link._session
    assert taken is not None
    taken.number += number + 5
    target = torch.zeros(LARGE, dtype=torch.uint8)
    with pytest.raises(TransferError, match="no such session"):
        await link.read([Part(ends.key, 0, 0, target.data_ptr(), LARGE)])
    await link.read([Part(ends.key, 0, 0, target.data_ptr(), LARGE)])  # by a new one
    assert torch.equal(target, ends.tensor)
    await link.aclose()
    stranger.close()


# --- DTH-1 --------------------------------------------------------------------------------------

_CONSUMER = """
import asyncio, json, os, signal, sys, torch
from aiordt.abc import Part, PeerAddress
from aiordt.testing import at_phase
from aiordt.testing._process import _Half
host, port, runtime, pid, host_id, token, key, nbytes, phase = json.loads(sys.argv[1])
address = PeerAddress(host, port, bytes.fromhex(runtime), pid, bytes.fromhex(host_id), token)
target = torch.zeros(nbytes, dtype=torch.uint8)

async def main():
    half = _Half()
    link = await half.connect("ucx", address)
    with at_phase(phase, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        await link.read([Part(bytes.fromhex(key), 0, 0, target.data_ptr(), nbytes)])

asyncio.run(main())
"""


@pytest.mark.parametrize("transports", ["all", "tcp"])
async def test_a_dead_consumer_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, transports: str
) -> None:  # DTH-1, OWN-1
    monkeypatch.setenv("UCX_TLS", transports)
    ends = Ends()
    at = ends.owner.address
    told = [at.host, at.port, at.runtime_id.hex(), at.pid, at.host_id.hex(), at.token_address]
    told += [ends.key.hex(), LARGE, "ucx.receiving"]
    with record_phases() as phases:
        consumer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _CONSUMER, json.dumps(told)
        )
        assert await consumer.wait() == -signal.SIGKILL
        assert phases.count("ucx.sending") == 1
        await ends.held_by_none()
        await eventually(lambda: not ends.serving._served, what="its endpoint is closed")
    ends.reader.close()
    ends.owner.close()


@pytest.mark.parametrize("lost", [False, True], ids=["cancelled", "lost"])
async def test_a_message_that_never_comes(ends: Ends, *, lost: bool) -> None:  # DTH-1, CAN-1
    """As when the owner dies just before it sends, which shared memory does not tell."""
    session = ends.link._session
    assert session is not None
    assert session.endpoint is not None
    never = Incoming(
        session.endpoint, ends.consuming.next_tag(), [[memoryview(bytearray(MIB))]] * 3
    )
    task = asyncio.create_task(ends.consuming.run(ends.consuming.worker.carry_out(never)))
    await eventually(lambda: ends.consuming.worker._transfers, what="it waits")
    if lost:
        loop = ends.reader.io.loop
        loop.call_soon_threadsafe(ends.consuming.forget, ends.owner.address.runtime_id)
        with pytest.raises(UcxError):
            await asyncio.wait_for(task, 2)
    else:
        task.cancel()
        await asyncio.wait({task}, timeout=2)
        assert task.cancelled()
        assert never.num_left == 3, "all were taken back"
        assert session.endpoint.alive
    await ends.read()


@pytest.mark.parametrize("end", ["cancelled", "killed"])
async def test_an_owner_that_stands_still_in_a_message(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:  # UCX-1, UCX-2, CAN-1, DTH-1
    monkeypatch.setenv("UCX_TLS", "tcp")
    with process_pairs("ucx") as make_pair:
        pair = await make_pair()
        (exported,) = await pair.export([torch.ones(LARGE, dtype=torch.uint8)])
        target = torch.zeros(LARGE, dtype=torch.uint8)
        part = exported.part(target.data_ptr())
        await pair.link.read([part])
        task = asyncio.create_task(pair.link.read([part]))
        with at_phase("ucx.receiving", pair.pause) as phases:
            await phases.wait_reached()
            await sleeps()
        if end == "killed":
            await pair.kill()
            with pytest.raises(OwnerDiedError):
                await asyncio.wait_for(task, 2)
        else:
            task.cancel()
            await asyncio.wait({task}, timeout=5)
            assert task.cancelled()
            target.zero_()
            pair.resume()
            again = torch.zeros_like(target)
            await pair.link.read([exported.part(again.data_ptr())])
            assert bool(again.all())
            assert not bool(target.any()), "OWN-1"
        await pair.aclose()


# --- UCX-2, UCX-3: what it does to a process ----------------------------------------------------


def wakeups() -> int:
    """How often the threads of UCX have gone to sleep so far."""
    total = 0
    for thread in threading.enumerate():
        if thread.name == "aiordt-ucx":
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text(encoding="ascii")
            total += sum(
                int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line
            )
    return total


async def sleeps() -> None:
    """Wait until UCX's threads sleep, and see that they do so for a while."""

    async def still() -> bool:
        before = wakeups()
        await asyncio.sleep(0.3)
        return wakeups() == before

    await eventually(still, what="UCX-2: nothing wakes UCX's threads for 0.3 s")


async def test_without_work_nothing_wakes_up(ends: Ends) -> None:  # UCX-2
    await ends.read()
    await sleeps()


async def test_a_pending_read_wakes_nothing() -> None:  # UCX-2
    with process_pairs("ucx") as make_pair:
        pair = await make_pair()
        (exported,) = await pair.export([torch.ones(MIB, dtype=torch.uint8)])
        target = torch.zeros(MIB, dtype=torch.uint8)
        pair.pause()
        tasks = [
            asyncio.create_task(pair.link.read([exported.part(target.data_ptr())]))
            for _ in range(20)
        ]
        await sleeps()
        pair.resume()
        await asyncio.gather(*tasks)
        await pair.aclose()


_INTRUSION = """
import asyncio, logging, os, torch
from pathlib import Path
from aiordt.testing._process import _Half

def state():
    caught = [line for line in open("/proc/self/status") if line.startswith("SigCgt")]
    blocked = [line for line in open("/proc/self/status") if line.startswith("SigBlk")]
    root = logging.getLogger()
    # The highest is a real-time signal, by which glibc talks to its own threads.
    return dict(os.environ), int(caught[0].split()[1], 16) & 0x7FFFFFFF, blocked, root.handlers

async def main():
    owner, reader = _Half(), _Half()
    before = state()
    link = await reader.connect("ucx", owner.address)
    assert state() == before, (state(), before)
    listening = [
        line.split()[1].split(":")[0]
        for name in ("tcp", "tcp6")
        for line in Path("/proc/self/net", name).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[9] in inodes()
    ]
    assert len(listening) > 2 and set(listening) == {"0100007F"}, listening
    await link.aclose()
    reader.close()
    owner.close()

def inodes():
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{fd}")]
    return {link[8:-1] for link in links if link.startswith("socket:[")}

asyncio.run(main())
"""


def test_the_process_is_as_it_was() -> None:  # UCX-3
    """Environment, signals, what is printed; and it listens on the node's address only."""
    environment = {name: value for name, value in os.environ.items() if "UCX" not in name}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _INTRUSION],
        check=False,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_rdma_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, package = tmp_path / "infiniband", tmp_path / "libucx"
    monkeypatch.setattr(_ucx_devices, "_INFINIBAND", adapters)
    assert not _ucx_devices.missing_rdma()
    (adapters / "mlx5_0").mkdir(parents=True)
    (package / "lib" / "ucx").mkdir(parents=True)
    spec = importlib.util.spec_from_file_location("libucx", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert "mlx5_0" in _ucx_devices.missing_rdma()
    assert "nixl" in UcxTransport.probe().reason
    assert _ucx_devices.network_device("127.0.0.1") == "lo"
    (package / "lib" / "ucx" / "libuct_ib.so.0").touch()
    assert not _ucx_devices.missing_rdma()
    assert _ucx_devices.network_device("127.0.0.1") is None, "the adapter is to be used"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not _ucx_devices.missing_rdma(), "UCX of the system, or of conda-forge"


def test_the_interface_of_an_address_is_found() -> None:
    assert _ucx_devices.interface_of("127.0.0.1") == "lo"
    assert _ucx_devices.interface_of("192.0.2.123") is None
    assert _ucx_devices.local_host("127.0.0.1") == "127.0.0.1"
    assert _ucx_devices.local_host("no address") is None


_WITHOUT_HOOKS = """
import asyncio, ctypes, sys
sys.path.insert(0, sys.argv[1])
from test_ucx import LARGE, _SEGMENT_NBYTES, Ends
from aiordt.transports._ucp import _ucp

unmapped = []

@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_size_t), ctypes.c_void_p)
def note(kind, event, _):
    unmapped.append((event[0], event[1]))

async def main():
    ends = Ends()
    ends.link = await ends.connect()
    await ends.fail_and_read()
    vm_unmapped, no_install = 1 << 17, 1 << 24
    assert _ucp.ucm_set_event_handler(vm_unmapped | no_install, 0, note, None) == 0
    await ends.read()
    await ends.quiet()
    _ucp.ucm_unset_event_handler(vm_unmapped, note, None)
    source = ends.tensor.data_ptr()
    assert sum(nbytes for _, nbytes in unmapped) == 2 * LARGE, "at both ends"
    assert {at for at, _ in unmapped} >= set(range(source, source + LARGE, _SEGMENT_NBYTES))
    await ends.close()

asyncio.run(main())
"""


def test_memory_is_forgotten_where_it_is_not_seen_unmapped() -> None:  # UCX-6
    environment = {**os.environ, "UCX_MEM_MMAP_HOOK_MODE": "none"}
    subprocess.run(  # noqa: S603
        [sys.executable, "-c", _WITHOUT_HOOKS, str(Path(__file__).parent)],
        check=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )


_BOTH = """
import asyncio, sys, torch
sys.path.insert(0, sys.argv[2])
from test_ucx import Ends
from nixl_cu13 import nixl_agent, nixl_agent_config

def by_nixl():
    config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    owner, reader = nixl_agent("owner", config), nixl_agent("reader", config)
    source = torch.arange(1 << 18)
    target = torch.zeros_like(source)
    owner.register_memory([source])
    reader.register_memory([target])
    name = reader.add_remote_agent(owner.get_agent_metadata())
    there, here = owner.get_xfer_descs([source]), reader.get_xfer_descs([target])
    transfer = reader.initialize_xfer("READ", here, there, name)
    state = reader.transfer(transfer)
    while state == "PROC":
        owner.get_new_notifs()
        state = reader.check_xfer_state(transfer)
    assert state == "DONE" and torch.equal(target, source)
    return owner, reader

async def by_ucx():
    ends = Ends()
    ends.link = await ends.connect()
    await ends.read()
    await ends.fail_and_read()
    await ends.close()

if sys.argv[1] == "ucx":
    asyncio.run(by_ucx())
kept = by_nixl()
asyncio.run(by_ucx())
kept = by_nixl()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("nixl_cu13") is None, reason="nixl_cu13 is not installed"
)
@pytest.mark.parametrize("first", ["nixl", "ucx"])
def test_nixls_copy_of_ucx_is_in_the_same_process(first: str) -> None:  # UCX-6
    """It takes UCX's hooks over."""
    subprocess.run(  # noqa: S603
        [sys.executable, "-c", _BOTH, first, str(Path(__file__).parent)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
