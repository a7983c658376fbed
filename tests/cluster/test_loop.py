"""The event loop stays free, and a busy producer still serves (scenarios: loop, concurrency)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import ray
import torch

import aiordt
from tests.support import MIB, NodeActor, arange

LOOPS = [("uvloop", "1"), ("asyncio", "0")]


@pytest.mark.parametrize(("loop", "flag"), LOOPS, ids=[name for name, _ in LOOPS])
async def test_the_loop_ticks_while_large_tensors_arrive(
    nodes: Any, spawn: Any, loop: str, flag: str
) -> None:  # BLK-1
    consumer = spawn(options={"runtime_env": {"env_vars": {"RAY_USE_UVLOOP": flag}}})
    refs = await nodes[0].make.remote(lambda _: [torch.ones(128 * MIB // 4) for _ in range(2)])

    async def count_ticks(_: Any, refs: list[Any], transport: str) -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticker = asyncio.ensure_future(tick())
        tensors = await aiordt.get(refs, transport=transport)
        ticker.cancel()
        assert all(float(tensor[-1]) == 1 for tensor in tensors)
        return type(asyncio.get_running_loop()).__module__, ticks

    for transport in ("cma", "tcp"):
        module, ticks = await consumer.run.remote(count_ticks, refs, transport)
        assert module.startswith(loop)
        # A loop that was blocked for the transfer would tick a handful of times.
        assert ticks > 50, (transport, ticks)


async def test_a_producer_that_is_busy_in_python_still_serves(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: [arange(4 * MIB), arange(300_000)])
    seconds = 1.5

    def spin(_: Any) -> float:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            sum(range(1000))
        return started

    async def pull(_: Any, refs: list[Any], transport: str) -> float:
        for ref in refs:
            tensor = await aiordt.get(ref, transport=transport)
            assert torch.equal(tensor, arange(tensor.nbytes))
        return time.monotonic()

    for transport in ("cma", "tcp"):
        busy = a.run.remote(spin)
        done = await b.run.remote(pull, refs, transport)
        started = await busy
        assert done < started + seconds, f"{transport}: served only after the method had ended"


async def test_idle_runtimes_have_no_busy_thread(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(4 * MIB))
    for node in nodes[1:]:
        await node.pull.remote([ref])

    async def used(_: Any, seconds: float) -> float:
        before = time.process_time()
        await asyncio.sleep(seconds)
        return time.process_time() - before

    spent = await asyncio.gather(*[node.run.remote(used, 1.0) for node in nodes])
    assert max(spent) < 0.25, spent  # a spinning thread would spend 1 s


async def test_nothing_blocks_in_construction_or_deletion(cluster: None) -> None:
    """A ref's death, on the loop, does nothing but decrement (BLK-1)."""
    tensor = arange(4 * MIB)
    refs = [await aiordt.put(tensor) for _ in range(50)]
    started = time.perf_counter()
    refs.clear()
    assert time.perf_counter() - started < 0.5
    await aiordt.wait_tensor_freed(tensor, 10)


async def test_blocking_calls_on_the_drivers_loop_are_caught(nodes: Any) -> None:
    from blockbuster import blockbuster_ctx  # noqa: PLC0415

    refs = await nodes[0].make.remote(lambda _: [arange(4 * MIB), arange(40)])
    got: Any = None
    with blockbuster_ctx("aiordt"):
        for transport in ("cma", "tcp"):
            got = await aiordt.get(refs, transport=transport)
            assert torch.equal(got[0], arange(4 * MIB))
        put = await aiordt.put({"x": got[0]}, snapshot=True)
        del put
        await aiordt.wait_tensor_freed(got[0], 10)


async def test_actor_on_plain_asyncio_does_everything(nodes: Any, spawn: Any) -> None:
    options = {"runtime_env": {"env_vars": {"RAY_USE_UVLOOP": "0"}}}
    a, b = spawn(ray.remote(NodeActor), options=options), nodes[1]
    ref = await a.make.remote(lambda node: node.kept.setdefault("t", arange(MIB)))
    assert torch.equal(await b.pull.remote(ref), arange(MIB))
    assert torch.equal(await a.pull.remote(await b.make.remote(lambda _: arange(MIB))), arange(MIB))
    del ref

    async def freed(node: Any) -> bool:
        await aiordt.wait_tensor_freed(node.kept["t"], 10)
        return True

    assert await a.run.remote(freed)
