"""What is promised of torn reads and garbled bytes: detected with checksums, unseen without."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import pickle
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch

import aiordt
from aiordt import _integrity
from aiordt._export import export
from aiordt._runtime import current
from aiordt.testing import FakeDevice, TcpProxy, at_phase, cancel_from_anywhere, record_phases
from aiordt.weights import publisher, subscriber
from tests.cluster.test_every_transport import (
    BY,
    CUTS,
    Kept,
    as_bytes,
    assert_same,
    every_dtype,
    every_layout,
    matrix,
    shared,
    state,
    targets_for,
)
from tests.cluster.test_relay import keeps_nothing
from tests.support import MIB, Node, arange, clean, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_NBYTES = 8 * MIB
_HALF = _NBYTES // 8  # elements
#: Where a read is under way, and the bytes that it reads next are in the first half.
_POINTS = {
    "shm": "shm.chunk",
    "cma": "cma.chunk",
    "nixl": "nixl.chunk",
    "tcp": "tcp.asking",
    "ucx": "ucx.asking",
}


@pytest.fixture(scope="module")
def _owner(spawn_for_all: Any) -> Any:
    return spawn_for_all(Node, {"checksums": True})


@pytest.fixture
async def owner(_owner: Any) -> AsyncIterator[Any]:
    """An actor whose exports are checked; after the test it must export and hold nothing."""
    yield _owner
    await clean(_owner)


@pytest.fixture(scope="module")
def _far(spawn_for_all: Any) -> Any:
    return spawn_for_all(Node, {"checksums": True})


@pytest.fixture
async def far(_far: Any) -> AsyncIterator[Any]:
    """Another, behind a proxy."""
    await _far.run.remote(hide)
    yield _far
    await _far.run.remote(show)
    await clean(_far)


async def hide(node: Any) -> None:
    runtime = current()
    address = runtime.address
    proxy = await TcpProxy(address.host, address.port).__aenter__()
    runtime.address = dataclasses.replace(address, host=proxy.host, port=proxy.port)
    node.kept["proxy"], node.kept["address"] = proxy, address


async def show(node: Any) -> None:
    await node.kept["proxy"].aclose()
    current().address = node.kept["address"]


def corrupt(node: Any) -> None:
    node.kept["proxy"].corrupt(after=MIB, towards="client")


def heal(node: Any) -> None:
    node.kept["proxy"].heal()


def keep(node: Any) -> torch.Tensor:
    node.kept["t"] = shared(arange(_NBYTES))
    tensor: torch.Tensor = node.kept["t"]
    return tensor


def write(node: Any, first: int = 0, last: int = _HALF) -> None:
    node.kept["t"][first:last] = -1


async def free(node: Any) -> bool:
    await aiordt.wait_tensor_freed(node.kept["t"], timeout=20)
    return True


def torn(tensor: torch.Tensor) -> bool:
    """Whether the first half is the new one, and the second the old one."""
    return bool(tensor[0] == -1) and torch.equal(tensor[_HALF:], arange(_NBYTES)[_HALF:])


async def pulled(what: Any, **options: Any) -> Any:
    """What `aiordt.get` gives, once it has been checked."""
    with record_phases() as phases:
        got = await aiordt.get(what, **options)
    assert "pull.checking" in phases.names
    return got


# --- right data passes ---------------------------------------------------------------------


@pytest.mark.parametrize("transport", BY)
@pytest.mark.parametrize("make", [every_dtype, every_layout])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
async def test_right_data_passes(owner: Any, transport: str, make: Any) -> None:
    refs = await owner.make.remote(make)
    wanted = make(Kept())
    for name, ref in refs.items():  # one by one, so that nothing is tied
        assert_same(await aiordt.get(ref, transport=transport), wanted[name], name)
    together = await pulled(refs, transport=transport)
    for name, tensor in wanted.items():
        assert_same(together[name], tensor, name)


@pytest.mark.parametrize("transport", BY)
async def test_right_targets_pass(owner: Any, transport: str) -> None:
    refs = await owner.make.remote(every_layout)
    wanted = every_layout(Kept())
    for plain in (True, False):
        targets = targets_for(wanted, plain=plain)
        await pulled(refs, into=targets, transport=transport)
        for name, tensor in wanted.items():
            assert torch.equal(as_bytes(targets[name]), as_bytes(tensor)), name


@pytest.mark.parametrize("transport", BY)
async def test_right_slices_pass(owner: Any, transport: str) -> None:
    ref = await owner.make.remote(matrix)
    wanted = matrix(None)
    for name, cut in CUTS.items():
        got = await pulled(ref[cut], transport=transport)
        assert torch.equal(got, wanted[cut]), name
    got = await pulled([ref[::2], ref[3], ref], transport=transport, dtype=torch.bfloat16)
    for tensor, like in zip(got, (wanted[::2], wanted[3], wanted), strict=True):
        assert torch.equal(tensor, like.bfloat16())


@pytest.mark.parametrize("transport", BY)
async def test_right_state_dicts_pass(
    owner: Any, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_integrity, "_MAX_PARTS", 150)  # three questions
    refs = await owner.make.remote(state)
    got = await pulled(refs, transport=transport)
    for name, tensor in state(None).items():
        assert torch.equal(got[name], tensor), name
    assert got["tied"] is got["layer7"]
    assert got["transposed"].data_ptr() == got["layer8"].data_ptr()


async def put_frozen(node: Any) -> Any:
    return await export(keep(node), "a test", transport=None, snapshot=False, frozen=True)


async def test_what_is_never_written_again_is_pulled_and_checked(owner: Any) -> None:
    """As a flow's results, which others have without a copy if there are no checksums."""
    ref = await owner.run.remote(put_frozen)
    (got,) = await pulled([ref])
    assert torch.equal(got, arange(_NBYTES))


class Sync(aiordt.AsyncActor):
    """Exports from a thread that has no event loop."""

    def __init__(self) -> None:
        aiordt.configure(checksums=True)

    @aiordt.method
    def make(self) -> torch.Tensor:
        return arange(_NBYTES)


async def test_exports_of_a_thread_are_checked(spawn: Any) -> None:
    ref = await spawn(ray.remote(Sync)).make.remote()
    assert torch.equal(await pulled(ref), arange(_NBYTES))


def install(node: Any) -> None:
    node.kept["device"] = FakeDevice()
    node.kept["device"].install()


def waits(node: Any) -> int:
    return sum(len(event._waiters) for event in node.kept["device"].events)


async def test_an_export_that_is_cancelled_while_it_waits(owner: Any) -> None:  # CAN-1
    async def cancelled(node: Any) -> tuple[bool, int]:
        install(node)
        try:
            task = asyncio.ensure_future(aiordt.put(arange(MIB)))
            await eventually(lambda: waits(node), what="it waits for the device")
            task.cancel()
            await asyncio.wait({task})
        finally:
            node.kept["device"].remove()
        return task.cancelled(), aiordt.stats().exports

    assert await owner.run.remote(cancelled) == (True, 0)


async def test_checksums_are_of_what_a_device_made(owner: Any) -> None:  # DEV-1
    """The export waits for the device, so that they are of what it made."""

    async def waiting() -> bool:
        return bool(await owner.run.remote(waits))

    def make(node: Any) -> None:
        node.kept["t"].fill_(7)
        node.kept["device"].finish()

    await owner.run.remote(install)
    try:
        making = asyncio.ensure_future(owner.make.remote(keep))
        await eventually(waiting, what="the export waits for the device")
        await owner.run.remote(make)
        ref = await making
    finally:
        await owner.run.remote(lambda node: node.kept["device"].remove())
    assert bool((await pulled(ref) == 7).all())
    del making


# --- an owner that writes too early --------------------------------------------------------


async def read_while_written(node: Any, transport: str | None) -> torch.Tensor:
    """Pull a tensor whose first half its owner writes over before the read comes there."""
    ref = await node.make.remote(keep)
    await aiordt.get(ref[-5:], transport=transport)  # the link is there
    point = _POINTS[transport or "shm"]
    with at_phase(point, lambda: ray.get(node.run.remote(write))) as phases:
        tensor: torch.Tensor = await aiordt.get(ref, transport=transport)
    assert phases.reached.is_set()
    return tensor


async def failure(pull: Any) -> aiordt.ChecksumError:
    """The error of a pull, without its frames, which hold the ref."""
    try:
        await pull
    except aiordt.ChecksumError as exc:
        return exc.with_traceback(None)
    raise AssertionError("nobody found out")


@pytest.mark.parametrize("transport", BY)
async def test_without_checksums_a_read_may_be_torn(nodes: Any, transport: str) -> None:
    assert torn(await read_while_written(nodes[0], transport)), "and nobody knows"


@pytest.mark.parametrize("transport", BY)
async def test_a_torn_read_is_found_out(owner: Any, transport: str) -> None:  # SUM-1, SUM-3
    error = await failure(read_while_written(owner, transport))
    assert error.overwritten
    assert (error.transport, error.nbytes) == (transport, _NBYTES)
    for words in (f"tensor ({_NBYTES // 4},) float32 of", error.peer, "wait_tensor_freed"):
        assert words in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.overwritten) == (str(error), True)
    gc.collect()
    assert await owner.run.remote(free), "the lease came back"
    assert aiordt.stats().in_flight == 0
    assert torch.equal(await pulled(await owner.make.remote(keep)), arange(_NBYTES))


async def test_an_actor_finds_out(nodes: Any, owner: Any) -> None:
    async def read(_: Any, owner: Any) -> str:
        return str(await failure(read_while_written(owner, "cma")))

    assert "its owner wrote over it" in await nodes[1].run.remote(read, owner)


async def test_whole_and_parts(owner: Any) -> None:
    """Only what lies in a block that was written over is refused, and named."""
    ref = await owner.make.remote(keep)
    await owner.run.remote(write, 3, 4)
    for part in (ref, ref[:5], ref[3:4], ref[::3]):
        error = await failure(aiordt.get(part))
        assert error.overwritten
    later = ref[_HALF:]
    assert torch.equal(await pulled(later), arange(_NBYTES)[_HALF:])
    assert "get(...)['x']" in str(await failure(aiordt.get({"y": later, "x": ref[:5]})))
    wide = torch.zeros(5, 2)
    await failure(aiordt.get(ref[:5], into=wide[:, 1]))
    assert not wide.any(), "what is copied from elsewhere is not touched"
    error = await failure(aiordt.get(ref[:5], transport="tcp", dtype=torch.float16))
    assert error.nbytes == 5 * 2


async def test_the_owner_itself_is_not_checked(owner: Any) -> None:
    async def read(node: Any) -> bool:
        ref = await aiordt.put(keep(node))
        write(node)
        return await ref is node.kept["t"] and await aiordt.get(ref) is node.kept["t"]

    assert await owner.run.remote(read)


async def test_a_view_is_not_checked(owner: Any) -> None:
    ref = await owner.make.remote(keep)
    await owner.run.remote(write)
    async with ref.view() as tensor:
        assert torn(tensor)


# --- what happens on the way ---------------------------------------------------------------


async def test_without_checksums_nobody_sees_what_was_garbled(spawn: Any) -> None:
    node = spawn()
    await node.run.remote(hide)
    ref = await node.make_tcp.remote(keep)
    await aiordt.get(ref[:5])
    await node.run.remote(corrupt)
    got = await aiordt.get(ref)
    assert 1 <= int((got.view(torch.uint8) != arange(_NBYTES).view(torch.uint8)).sum()) <= 2


async def test_what_was_garbled_is_found_out(far: Any) -> None:  # SUM-1, SUM-3
    ref = await far.make_tcp.remote(keep)
    await aiordt.get(ref[:5])
    await far.run.remote(corrupt)
    error = await failure(aiordt.get(ref))
    assert not error.overwritten
    assert error.transport == "tcp"
    assert "other bytes arrived" in str(error)
    await far.run.remote(heal)
    assert torch.equal(await pulled(ref), arange(_NBYTES)), "the next pull works"
    del ref
    gc.collect()
    assert await far.run.remote(free)


async def attempt(node: Any, ref: aiordt.TensorRef) -> str:
    try:
        got = await aiordt.get(ref)
    except aiordt.AiordtError as exc:
        return type(exc).__name__
    return "right" if torch.equal(got, arange(_NBYTES)) else "wrong"


async def test_a_garbled_copy_is_not_kept_for_neighbours(far: Any, spawn: Any) -> None:  # SUM-2
    """Two processes of another host, which share what the first of them got."""
    first, second = (spawn(Node, {"transports": ("shm", "tcp")}) for _ in range(2))
    ref = await far.make_snapshot.remote(lambda _: arange(_NBYTES))
    await asyncio.gather(*(node.run.remote(attempt, ref[-5:]) for node in (first, second)))
    await far.run.remote(corrupt)
    assert await first.run.remote(attempt, ref) == "ChecksumError"
    await eventually(partial(keeps_nothing, first), what="the garbled copy is gone")
    await far.run.remote(heal)
    assert await first.run.remote(attempt, ref) == "right"
    assert await second.run.remote(attempt, ref) == "right"


# --- the check itself ----------------------------------------------------------------------


async def cancelled_at_the_check(ref: aiordt.TensorRef) -> bool:
    task = asyncio.ensure_future(aiordt.get(ref))
    with at_phase("pull.checking", lambda: cancel_from_anywhere(task)) as phases:
        await asyncio.wait({task})
    assert phases.reached.is_set()
    return task.cancelled()


async def test_cancelled_while_it_is_checked(owner: Any) -> None:  # CAN-1
    ref = await owner.make.remote(keep)
    assert await cancelled_at_the_check(ref)
    assert aiordt.stats().in_flight == 0
    assert torch.equal(await pulled(ref), arange(_NBYTES))
    del ref
    gc.collect()
    assert await owner.run.remote(free)


async def test_the_owner_dies_before_it_is_asked(spawn: Any) -> None:
    node = spawn(Node, {"checksums": True})
    pid = await node.pid.remote()
    ref = await node.make.remote(keep)
    dying = at_phase("pull.checking", lambda: os.kill(pid, signal.SIGKILL))
    with dying, pytest.raises(aiordt.OwnerDiedError):
        await aiordt.get(ref)


async def test_a_process_that_cannot_check_refuses(owner: Any, spawn: Any) -> None:
    """It has no xxhash, and says what to do."""

    async def attempt(_: Any, ref: aiordt.TensorRef) -> str:
        modules: dict[str, Any] = sys.modules
        modules["xxhash"] = None  # as if it were not installed
        with pytest.raises(aiordt.UnavailableError) as caught:
            await ref
        return caught.value.reason

    ref = await owner.make.remote(keep)
    assert "pip install aiordt[checksums]" in await spawn().run.remote(attempt, ref)


# --- weights -------------------------------------------------------------------------------


async def publish(node: Any, name: str) -> None:
    node.kept["pub"] = await publisher(name)
    await node.kept["pub"].publish({"w": arange(_NBYTES), "b": torch.ones(3)})


async def spoil(node: Any) -> None:
    """What a wild pointer does: others write to a publisher's own memory."""
    for buffer in node.kept["pub"]._stream._buffers.values():
        buffer.tensors[0][5] = -1


async def unpublish(node: Any) -> None:
    await node.kept["pub"].aclose()


async def test_versions_of_weights_are_checked(owner: Any) -> None:
    await owner.run.remote(publish, "checked")
    try:
        async with await subscriber("checked") as sub:
            with record_phases() as phases:
                _, weights = await sub.latest()
            assert "pull.checking" in phases.names
            assert torch.equal(weights["w"], arange(_NBYTES))
            assert torch.equal(weights["b"], torch.ones(3))
            await owner.run.remote(spoil)
            error = await failure(sub.latest())
            assert error.overwritten
    finally:
        await owner.run.remote(unpublish)
