"""`wait`, `as_completed`, and refs in asyncio's and anyio's own tools."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anyio
import pytest
import ray
import torch

import aiordt
from tests.support import MIB, arange


async def slow(_: Any, seconds: float, value: int) -> torch.Tensor:
    await asyncio.sleep(seconds)
    return torch.full((300_000,), value)


async def fail(_: Any) -> None:
    raise KeyError("told")


async def test_wait_is_as_rays(nodes: Any) -> None:
    a, b, _ = nodes
    pulls = (await a.stats.remote()).pulls
    ready = await a.make.remote(lambda _: arange(MIB))
    never = a.make.remote(slow, 30.0, 1)
    soon = b.make.remote(slow, 0.2, 2)
    done, pending = await aiordt.wait([never, soon, ready])
    assert (done, pending) == ([ready], [never, soon])
    done, pending = await aiordt.wait([never, soon, ready], num_returns=2)
    assert (done, pending) == ([soon, ready], [never])
    started = time.monotonic()
    done, pending = await aiordt.wait([never, soon], num_returns=2, timeout=0.2)
    assert (done, pending) == ([soon], [never])
    assert time.monotonic() - started < 5
    done, pending = await aiordt.wait([never], timeout=0)
    assert (done, pending) == ([], [never])
    assert await aiordt.wait([]) == ([], [])
    there = [ray.put(i) for i in range(20)]
    assert await aiordt.wait(there, num_returns=20, timeout=0) == (there, [])
    failed = a.make.remote(fail)
    assert await aiordt.wait([failed], timeout=20) == ([failed], [])
    assert await aiordt.wait([ready, soon], num_returns=1) == ([ready], [soon])
    ray.cancel(never)
    assert (await a.stats.remote()).pulls == pulls


async def test_wait_refuses_what_ray_refuses(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    with pytest.raises(TypeError):
        await aiordt.wait(ref)
    with pytest.raises(TypeError):
        await aiordt.wait([ref, 5])
    bad: list[dict[str, Any]] = [{"num_returns": 0}, {"num_returns": 2}, {"timeout": -1}]
    for options in bad:
        with pytest.raises(ValueError, match=r"num_returns|timeout"):
            await aiordt.wait([ref], **options)
    with pytest.raises(ValueError, match="once"):
        await aiordt.wait([ref, ref])


async def test_as_completed_yields_in_order_of_completion(nodes: Any) -> None:
    a, b, c = nodes
    outs = [
        node.make.remote(slow, delay, value)
        for node, delay, value in ((a, 0.6, 0), (b, 0.3, 1), (c, 0.0, 2))
    ]
    held = await a.make.remote(lambda _: arange(40))
    seen = []
    async for ref, tensor in aiordt.as_completed([*outs, held]):
        seen.append(9 if ref is held else int(tensor[0]))
    assert seen == [9, 2, 1, 0]


async def test_as_completed_raises_in_turn_and_goes_on(nodes: Any) -> None:
    a, b, _ = nodes
    outs = [a.make.remote(fail), b.make.remote(slow, 0.3, 1)]
    async with aiordt.as_completed(outs) as completed:
        with pytest.raises(KeyError):
            await anext(completed)
        _, tensor = await anext(completed)
        assert int(tensor[0]) == 1
        with pytest.raises(StopAsyncIteration):
            await anext(completed)
    async with aiordt.as_completed([a.make.remote(slow, 20.0, 1)]) as completed:
        task = asyncio.ensure_future(anext(completed))
        await asyncio.sleep(0)
        task.cancel()
    assert not completed._tasks


async def test_gather_task_group_timeout_and_anyio(nodes: Any) -> None:
    a, _, _ = nodes
    refs = await a.make.remote(lambda _: [arange(n) for n in (40, MIB, 3 * MIB)])

    async def use(ref: Any) -> torch.Tensor:
        tensor: torch.Tensor = await ref
        return tensor

    for got in (
        await asyncio.gather(*refs),
        await asyncio.gather(*map(use, refs)),
    ):
        assert all(map(torch.equal, got, [arange(40), arange(MIB), arange(3 * MIB)]))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(use(ref)) for ref in refs]
    assert torch.equal(tasks[2].result(), arange(3 * MIB))
    with anyio.fail_after(10):
        assert torch.equal(await refs[1], arange(MIB))
    never = a.make.remote(slow, 20.0, 1)
    with anyio.move_on_after(0.1) as scope:
        await aiordt.get([never, refs[1]])
    assert scope.cancelled_caught
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await aiordt.get({"x": never})
    ray.cancel(never)


async def test_first_failure_is_raised_plain(nodes: Any) -> None:
    a, b, _ = nodes
    slow_one = b.make.remote(slow, 20.0, 1)
    with pytest.raises(KeyError, match="told"):
        await aiordt.get([slow_one, a.make.remote(fail), await a.make.remote(lambda _: arange(8))])
    ray.cancel(slow_one)


async def test_sets_of_refs(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: {arange(MIB), arange(40)})
    assert isinstance(refs, set)

    async def sizes(_: Any, refs: set[Any]) -> list[int]:
        return sorted(tensor.nbytes for tensor in await aiordt.get(refs))

    assert await b.run.remote(sizes, refs) == [40, MIB]
