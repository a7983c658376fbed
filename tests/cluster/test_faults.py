"""Faults in real actors' pulls, as users' tests would have them."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch

import aiordt
from aiordt.testing import FaultPlan, FaultyTransport, eventually, faults_in
from tests.cluster.test_every_transport import BY, shared
from tests.support import MIB, arange

if TYPE_CHECKING:
    from collections.abc import Callable

_NBYTES = 4 * MIB
_AT = MIB + 12


def error() -> aiordt.TransferError:
    return aiordt.TransferError("told to", transport="cma", peer="nobody", nbytes=7)


def keep(node: Any) -> torch.Tensor:
    node.kept["t"] = shared(arange(_NBYTES))
    tensor: torch.Tensor = node.kept["t"]
    return tensor


async def free(node: Any) -> bool:
    await aiordt.wait_tensor_freed(node.kept["t"], timeout=20)
    return True


async def pull_each(_: Any, refs: list[Any]) -> list[str]:
    """Await one after the other; how each ended."""
    ends = []
    for ref in refs:
        try:
            ends.append("right" if torch.equal(await ref, arange(_NBYTES)) else "wrong")
        except aiordt.TransferError as exc:
            ends.append(f"{exc}, of {exc.peer}")
    return ends


async def test_the_second_pull_of_an_actor_fails(nodes: Any) -> None:
    owner, consumer, _ = nodes
    ref = await owner.make.remote(keep)
    assert await consumer.run.remote(pull_each, [ref]) == ["right"], "its link is there before"
    async with faults_in(consumer, FaultPlan(fail={2: error()})) as faults:
        ends = await consumer.run.remote(pull_each, [ref] * 3)
        assert ends == ["right", "told to, of nobody", "right"]
        assert await faults.operations() == 3
        assert await nodes[2].run.remote(pull_each, [ref] * 2) == ["right"] * 2, "others go on"
    assert await consumer.run.remote(pull_each, [ref] * 2) == ["right"] * 2
    del ref
    gc.collect()
    assert await owner.run.remote(free), "the leases came back"


async def test_an_actor_stands_still_and_goes_on(nodes: Any) -> None:
    owner, consumer, other = nodes
    ref = await owner.make.remote(keep)
    async with faults_in(consumer, FaultPlan(stall_after=_AT), "shm") as faults:
        pulling = asyncio.ensure_future(consumer.run.remote(pull_each, [ref]))

        async def standing() -> bool:
            return await faults.standing() == 1

        await eventually(standing, what="it stands still")
        assert await other.run.remote(pull_each, [ref]) == ["right"]
        assert not pulling.done()
        await faults.release()
        assert await pulling == ["right"]
    del ref, pulling
    gc.collect()
    assert await owner.run.remote(free)


async def test_an_actor_that_dies_takes_its_faults_along(nodes: Any, spawn: Any) -> None:
    victim = spawn()
    ref = await nodes[0].make.remote(keep)
    async with faults_in(victim, FaultPlan(stall_after=_AT)) as faults:
        pulling = asyncio.ensure_future(victim.run.remote(pull_each, [ref]))

        async def standing() -> bool:
            return await faults.standing() == 1

        await eventually(standing, what="it stands still")
        ray.kill(victim)
        with pytest.raises(ray.exceptions.RayActorError):
            await pulling
    del ref, pulling
    gc.collect()
    assert await nodes[0].run.remote(free)


@pytest.mark.parametrize("end", ["release", "cancel", "close"])
@pytest.mark.parametrize("transport", BY)
async def test_a_pull_stands_still_at_the_byte(nodes: Any, transport: str, end: str) -> None:
    """OWN-1, CAN-1: what has come stays, and nothing comes after the end."""
    ref = await nodes[0].make.remote(keep)
    into = torch.zeros(_NBYTES // 4) - 1
    with FaultyTransport(FaultPlan(stall_after=_AT), transport) as faults:
        task = asyncio.ensure_future(aiordt.get(ref, into=into, transport=transport))
        await eventually(lambda: bool(into[_AT // 4 - 1] != -1), what="it has come so far")
        await eventually(lambda: faults.standing == 1, what="it stands still")
        assert torch.equal(into[: _AT // 4], arange(_NBYTES)[: _AT // 4])
        assert bool((into[_AT // 4 :] == -1).all())
        if end == "cancel":
            task.cancel()
        elif end == "release":
            faults.release()
    await asyncio.wait({task})
    assert task.cancelled() is (end == "cancel")
    assert torch.equal(into, arange(_NBYTES)) is (end != "cancel")
    assert aiordt.stats().in_flight == 0
    assert torch.equal(await aiordt.get(ref, transport=transport), arange(_NBYTES))
    del ref, task
    gc.collect()
    assert await nodes[0].run.remote(free)


async def test_views_are_operations_too(nodes: Any) -> None:
    ref = await nodes[0].make.remote(keep)
    with FaultyTransport(FaultPlan(fail={2: error()}), "shm") as faults:
        for number in range(1, 4):
            if number == 2:
                with pytest.raises(aiordt.TransferError, match="told to"):
                    async with ref.view():
                        pass
            else:
                async with ref.view() as tensor:
                    assert torch.equal(tensor, arange(_NBYTES))
        assert faults.operations == 3


async def test_small_tensors_and_other_transports(nodes: Any) -> None:
    """What is read at once without it is an operation with it; what is by value is none."""
    make: Callable[[Any], Any] = lambda _: [torch.ones(20_000), torch.ones(3)]  # noqa: E731
    large, small = await nodes[0].make.remote(make)
    await aiordt.get(large, transport="cma")
    await aiordt.get(large, transport="tcp")
    with FaultyTransport(FaultPlan(fail={1: error(), 3: error()}), "cma") as faults:
        for transport, fails in (("tcp", False), ("cma", True), ("cma", False), ("cma", True)):
            if fails:
                with pytest.raises(aiordt.TransferError, match="told to"):
                    await aiordt.get(large, transport=transport)
            else:
                assert bool((await aiordt.get(large, transport=transport) == 1).all())
        assert bool((await small == 1).all())
        assert faults.operations == 3


async def test_one_at_a_time(cluster: None) -> None:
    with FaultyTransport(FaultPlan()) as faults:
        with pytest.raises(AssertionError, match="active already"):
            FaultyTransport(FaultPlan()).__enter__()
        assert faults.operations == 0
    with FaultyTransport(FaultPlan()):
        pass
