"""Stream ordering: who reads an export waits for the device work that made it.

No GPU here, so `FakeDevice` is put in the place of host memory's layer in an actor: its events
are done when the test says so.
"""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import aiordt
from aiordt import _device, _wire
from aiordt.testing import FakeDevice
from tests.support import MIB, arange, eventually, on_phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOWS = ["make_cma", "make_tcp", "make"]


def install(node: Any) -> None:
    node.kept["device"] = FakeDevice()
    node.kept["device"].install()


def remove(node: Any) -> None:
    device = node.kept.pop("device", None)
    if device is not None:
        device.remove()


def write(node: Any, value: float) -> None:
    """What the device does, at last."""
    for tensor in node.kept["tensors"]:
        tensor.fill_(value)
    node.kept["device"].finish()


def zeros(node: Any) -> list[torch.Tensor]:
    base = torch.zeros(600, 700)
    node.kept["tensors"] = [torch.zeros(MIB), torch.zeros(2000), base[::2, ::3], base]
    return node.kept["tensors"][:3]


@pytest.fixture
async def device(nodes: Any) -> AsyncIterator[Any]:
    """The first of the nodes, with a `FakeDevice`."""
    await nodes[0].run.remote(install)
    yield nodes[0]
    await nodes[0].run.remote(remove)


def log(node: Any) -> list[str]:
    return list(node.kept["device"].log)


async def waiting(node: Any, at_least: int = 1) -> None:
    """Wait until so many wait for the device."""

    def count(node: Any) -> int:
        return sum(len(event._waiters) for event in node.kept["device"].events)

    async def enough() -> bool:
        return bool(await node.run.remote(count) >= at_least)

    await eventually(enough, what="somebody waits for the device")


@pytest.mark.parametrize("how", HOWS)
async def test_nothing_is_read_before_the_work_that_makes_it(
    nodes: Any, device: Any, how: str
) -> None:
    refs = await getattr(device, how).remote(zeros)
    if how == "make":  # the small one came by value
        refs = [refs[0], refs[2]]
    pulls = [nodes[1].pull.remote(refs), nodes[2].pull.remote(refs[:1])]
    mine = asyncio.ensure_future(aiordt.get(refs))
    await waiting(device, 3)
    assert not mine.done()
    assert "stage" not in await device.run.remote(log)
    await device.run.remote(write, 7.0)
    for tensors in (await pulls[0], await pulls[1], await mine):
        assert all(bool((tensor == 7).all()) for tensor in tensors)  # DEV-1
    assert not refs[0].header.pending
    assert (await refs[0])[5] == 7
    assert (await device.run.remote(log)).count("record") == 1


async def test_finished_work_costs_nothing_on_the_wire(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    assert not ref.header.pending
    phases: list[str] = []
    on_phase(phases.append)
    try:
        await ref
    finally:
        on_phase(None)
    assert "pull.pending" not in phases


@pytest.mark.parametrize("how", HOWS)
async def test_cancelled_while_waiting_for_the_device(nodes: Any, device: Any, how: str) -> None:
    refs = await getattr(device, how).remote(zeros)
    pulling = asyncio.ensure_future(aiordt.get(refs[0]))
    await waiting(device)
    pulling.cancel()
    await asyncio.wait({pulling})
    assert pulling.cancelled()  # CAN-1

    async def nobody() -> bool:
        return not await device.run.remote(
            lambda node: sum(len(event._waiters) for event in node.kept["device"].events)
        )

    await eventually(nobody, what="the owner's wait has ended too")
    del refs, pulling
    gc.collect()

    async def free(node: Any) -> bool:
        await aiordt.wait_tensor_freed(node.kept["tensors"], timeout=30)
        return True

    assert await device.run.remote(free)


async def test_the_owner_dies_while_its_device_works(spawn: Any) -> None:
    owner = spawn()
    await owner.run.remote(install)
    refs = [(await getattr(owner, how).remote(zeros))[0] for how in HOWS]
    pulls = [asyncio.ensure_future(aiordt.get(ref)) for ref in refs]
    await waiting(owner, len(pulls))

    def die(_: Any) -> None:
        import os  # noqa: PLC0415
        import signal  # noqa: PLC0415

        os.kill(os.getpid(), signal.SIGKILL)

    owner.run.remote(die)
    for pulling in pulls:
        with pytest.raises(aiordt.OwnerDiedError):  # DTH-1
            await asyncio.wait_for(pulling, 30)


async def test_work_that_fails_ends_the_pulls(nodes: Any, device: Any) -> None:
    refs = await device.make_cma.remote(zeros)
    pulling = asyncio.ensure_future(aiordt.get(refs[0]))
    await waiting(device)

    def fail(node: Any) -> None:
        node.kept["device"].finish(
            aiordt.TransferError("illegal address", transport="cuda", peer="", nbytes=0)
        )

    await device.run.remote(fail)
    with pytest.raises(aiordt.AiordtError, match="illegal address"):
        await pulling


async def test_freed_while_the_device_works(nodes: Any, device: Any) -> None:
    (ref, *_) = await device.make_cma.remote(zeros)

    def drop(node: Any) -> None:
        from aiordt._runtime import current  # noqa: PLC0415

        registry = current().registry
        registry.drop(list(registry._leases))

    await device.run.remote(drop)
    with pytest.raises(aiordt.TensorFreedError):
        await ref


@pytest.mark.parametrize("nbytes", [2000, 40_000, 3 * MIB])
async def test_the_callers_stream_waits_before_a_tensor_is_handed_out(
    nodes: Any, device: Any, nbytes: int
) -> None:
    ref = await nodes[1].make_cma.remote(lambda _, nbytes: arange(nbytes), nbytes)

    async def pull(node: Any, refs: list[Any]) -> list[str]:
        fake = node.kept["device"]
        fake.log.clear()
        tensor = await refs[0]
        del tensor
        return list(fake.log)

    assert await device.run.remote(pull, [ref]) == ["wait_on_stream"]  # DEV-3
    assert await device.run.remote(pull, [ref]) == ["wait_on_stream"]


async def test_the_owners_own_stream_waits_for_its_work(nodes: Any, device: Any) -> None:
    async def check(node: Any) -> list[bool]:
        fake = node.kept["device"]
        tensor = torch.zeros(MIB)
        ref = await aiordt.put(tensor)
        got = await ref  # at once: its stream will wait
        waited = fake.waited_for == fake.events
        target = torch.zeros(MIB)
        copying = asyncio.ensure_future(aiordt.get(ref, into=target))
        await eventually(lambda: len(fake.events[0]._waiters) == 1)
        tensor.fill_(3)
        fake.finish()
        await copying
        return [got is tensor, waited, bool((target == 3).all())]

    assert all(await device.run.remote(check))


def as_if_on(ref: Any, device: str) -> Any:
    """The ref of a tensor in host memory, as if its owner had it on a device."""
    meta = ref.meta
    packed = _wire.pack_meta(
        _wire.TensorMeta(
            meta.dtype, meta.flags, meta.shape, meta.stride, meta.address, meta.segment, device
        )
    )
    return aiordt.TensorRef(ref.header, ref.index, packed, ref.lease)


async def test_a_tensor_of_a_device_that_is_not_here_arrives_in_host_memory(nodes: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: [arange(MIB), arange(2 * MIB)[::2]])
    refs = [as_if_on(ref, "cuda:3") for ref in refs]
    assert refs[0].device == torch.device("cuda", 3)
    _device._homeless.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = await aiordt.get(refs)
        again = await refs[0]
    assert torch.equal(got[0], arange(MIB))
    assert torch.equal(again, arange(MIB))
    assert torch.equal(got[1], arange(2 * MIB)[::2])
    assert [str(warning.message)[:60] for warning in caught] == [
        "a tensor that its owner has on cuda:3 arrived in host memory"
    ]
    into = torch.zeros(MIB // 4)
    assert torch.equal(await aiordt.get(refs[0], into=into), arange(MIB))
    explanation = await aiordt.explain(refs[0])
    assert explanation.chosen == "tcp"
    assert "stages it from cuda:3" in explanation.reasons["tcp"]
    assert "does not read the memory of devices" in explanation.reasons["cma"]
    with pytest.raises(aiordt.UnavailableError, match="on cuda:3"):
        await aiordt.get(refs[0], transport="cma")


async def test_other_devices_are_refused_clearly(nodes: Any) -> None:
    async def refused(_: Any) -> str:
        try:
            await aiordt.put(torch.empty(4, device="meta"))
        except aiordt.UsageError as exc:
            return str(exc)
        return ""

    text = await nodes[0].run.remote(refused)
    assert "on meta" in text
    assert "empty_like" in text


async def test_shared_memory_is_looked_at_after_the_work(nodes: Any, device: Any) -> None:
    def make(node: Any) -> list[torch.Tensor]:
        node.kept["tensors"] = [aiordt.zeros((MIB,))]
        return list(node.kept["tensors"])

    (ref,) = await device.make.remote(make)
    assert (await aiordt.explain(ref)).chosen == "shm"

    async def look() -> bool:
        async with ref.view() as seen:
            return bool((seen == 7).all())

    looking = asyncio.ensure_future(look())
    pulling = asyncio.ensure_future(aiordt.get(ref))
    await waiting(device, 2)
    await device.run.remote(write, 7.0)
    assert await looking  # DEV-1
    assert bool((await pulling == 7).all())
