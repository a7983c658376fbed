"""Groups whose members die, fail, are late, or leave (scenarios: errors, death, cancel)."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import Any

import pytest
import ray
import torch

import aiordt
from tests.cluster.group_support import everywhere, grouped, outcomes
from tests.support import eventually

BACKENDS = ["shm", "gloo", "mpi"]
#: By the contract; measured on a machine that does other things as well.
WITHIN = 2.0


async def pid_of(actor: Any) -> int:
    return int(await actor.pid.remote())


async def wait_for_peers(actor: Any, calls: list[str]) -> list[tuple[str, float]]:
    """Make calls that cannot end, all at once; how each ends, and when."""
    g = actor.group("g")
    large = torch.ones(1 << 20)
    makers = {
        "small": lambda: g.allreduce(torch.ones(3)),
        "large": lambda: g.allreduce(large),
        "tagged": lambda: g.allreduce(torch.ones(1 << 16), tag=7),
        "gather": lambda: g.allgather(torch.ones(40_000), tag=8),
        "recv": lambda: g.recv(torch.ones(9), 2),
        "send": lambda: g.send(torch.ones(9000), 2),
        "barrier": lambda: g.barrier(tag=9),
    }

    async def one(name: str) -> tuple[str, float]:
        try:
            await makers[name]()
        except aiordt.AiordtError as exc:
            return f"{type(exc).__name__}: {exc}", time.time()
        return "ok", time.time()

    actor.kept["started"] = True
    return list(await asyncio.gather(*map(one, calls)))


async def is_waiting(actor: Any, count: int) -> bool:
    operations = actor.group("g")._membership.engine._operations
    return len(operations) >= count


async def waiting(actors: list[Any], count: int) -> None:
    """Until each of them has so many calls pending."""

    async def all_do() -> bool:
        return all(await everywhere(actors, is_waiting, count))

    await eventually(all_do)


CALLS = ["small", "large", "tagged", "gather", "recv", "send", "barrier"]


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_killed_member_ends_every_call(nodes: Any, spawn: Any, backend: str) -> None:
    # GRP-3, GRP-5
    victim = spawn()
    actors = [*nodes[:2], victim]
    group = await aiordt.create_group(actors, backend, "g")
    pid = await pid_of(victim)
    pending = [actor.run.remote(wait_for_peers, CALLS) for actor in nodes[:2]]
    await waiting(nodes[:2], len(CALLS))
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    for ended in await asyncio.wait_for(asyncio.gather(*pending), 20):
        for text, when in ended:
            assert text.startswith("GroupError: group 'g': rank 2 (NodeActor"), text
            assert f"pid {pid}) is gone" in text
            assert when - killed < WITHIN
    for text in await outcomes(nodes[:2], adds_up):  # by a new `self.group("g")`
        assert f"pid {pid}) is gone" in text
    async with grouped(nodes[:2], backend):  # of the same name, at once
        await everywhere(nodes[:2], adds_up)
    await group.aclose()


async def adds_up(actor: Any) -> None:
    g = actor.group("g")
    for numel in (1, 40_000):
        assert float((await g.allreduce(torch.ones(numel)))[0]) == g.size


async def busy_with_calls(actor: Any) -> str:
    return await busy_until_over(actor.group("g"), torch.ones(1 << 22))


async def busy_until_over(g: Any, t: torch.Tensor) -> str:
    try:
        while True:
            await g.allreduce(t, "max")
    except aiordt.AiordtError as exc:
        return f"{type(exc).__name__}: {exc}"


@pytest.mark.parametrize("backend", BACKENDS)
async def test_killed_in_the_middle_of_a_transfer(nodes: Any, spawn: Any, backend: str) -> None:
    victim = spawn()
    actors = [nodes[0], victim, nodes[1]]
    await aiordt.create_group(actors, backend, "g")
    pid = await pid_of(victim)
    pending = [actor.run.remote(busy_with_calls) for actor in actors]
    await eventually(lambda: nodes[0].run.remote(is_waiting, 1))
    os.kill(pid, signal.SIGKILL)
    killed = time.time()
    ended = await asyncio.wait_for(asyncio.gather(pending[0], pending[2]), 20)
    assert time.time() - killed < WITHIN + 1
    for text in ended:
        assert text.startswith("GroupError: group 'g': rank 1 ("), text
        assert "is gone" in text
    with pytest.raises(ray.exceptions.RayActorError):
        await pending[1]
    await everywhere(nodes[:2], alive)


async def alive(actor: Any) -> bool:
    return True


async def late(actor: Any, rank: int) -> None:
    g = actor.group("g")
    if g.rank != rank:
        # Two that end it at the same moment would each keep their own reason.
        await g.allreduce(torch.ones(40_000), timeout=0.2 if g.rank == 0 else None)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_timeout_ends_the_group(nodes: Any, backend: str) -> None:  # GRP-5
    await aiordt.create_group(nodes, backend, "g")
    waits = nodes[2].run.remote(wait_for_peers, ["barrier"])
    await waiting([nodes[2]], 1)
    texts = await outcomes(nodes[:2], late, 2)
    assert len(set(texts)) == 1, texts
    assert texts[0].startswith("GroupError: group 'g': allreduce(float32[40000], op='sum')")
    assert "waiting for rank 2 (NodeActor" in texts[0]
    ended = await asyncio.wait_for(waits, 10)
    assert {text for text, _ in ended} == {texts[0]}, "also where it does not take part"
    async with grouped(nodes, backend):
        await everywhere(nodes, adds_up)


async def cancelled(actor: Any) -> str:
    g = actor.group("g")
    t = torch.ones(40_000)
    if g.rank == 0:
        task = asyncio.ensure_future(g.allreduce(t))
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            actor.kept["cancelled"] = t
            return "cancelled"
        return "ended"
    while True:
        await asyncio.sleep(0.01)
        if actor.kept.get("go"):
            break
    await g.allreduce(t)
    return str(float(t[0]))


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_cancelled_member_leaves_its_call_to_the_others(nodes: Any, backend: str) -> None:
    # GRP-4

    async def go(actor: Any) -> None:
        actor.kept["go"] = True

    async with grouped(nodes, backend):
        calls = [actor.run.remote(cancelled) for actor in nodes]
        assert await asyncio.wait_for(calls[0], 10) == "cancelled"
        await everywhere(nodes[1:], go)
        assert await asyncio.wait_for(asyncio.gather(*calls[1:]), 10) == ["3.0", "3.0"]
        await everywhere(nodes, adds_up)  # all are in step


@pytest.mark.parametrize("backend", BACKENDS)
async def test_closing_ends_what_is_pending(nodes: Any, backend: str) -> None:  # GRP-3
    group = await aiordt.create_group(nodes, backend, "g")
    names = [name for name in CALLS if name not in {"send", "recv"}]
    pending = [actor.run.remote(wait_for_peers, names) for actor in nodes[:2]]
    await waiting(nodes[:2], len(names))
    await group.aclose()
    await group.aclose()
    for ended in await asyncio.wait_for(asyncio.gather(*pending), 10):
        assert {text for text, _ in ended} == {"ClosedError: group 'g' was closed"}


async def leaves_in_the_middle(actor: Any) -> str:
    """Close while payload moves: a member is in the backend, whatever that is."""
    g = actor.group("g")
    t = torch.ones(1 << 23)
    text = await busy_until_over(g, t)
    before = t.fill_(5).clone()
    await asyncio.sleep(0.1)
    assert torch.equal(t, before), "GRP-4: written to after the call had raised"
    return text


@pytest.mark.parametrize("backend", BACKENDS)
async def test_closing_in_the_middle_of_a_transfer(nodes: Any, backend: str) -> None:  # GRP-4
    group = await aiordt.create_group(nodes, backend, "g")
    pending = [actor.run.remote(leaves_in_the_middle) for actor in nodes]
    await waiting(nodes, 1)
    await asyncio.sleep(0.1)  # anywhere in it is fine
    await group.aclose()
    ended = await asyncio.wait_for(asyncio.gather(*pending), 20)
    assert set(ended) == {"ClosedError: group 'g' was closed"}


async def raises(actor: Any) -> None:
    async with actor.group("g") as g:
        if g.rank == 1:
            raise KeyError("mine")
        await g.barrier()


async def test_a_member_that_raises_ends_the_group(nodes: Any) -> None:  # GRP-3
    await aiordt.create_group(nodes, "shm", "g")
    calls = [actor.run.remote(raises) for actor in nodes]
    ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert isinstance(ended[1], KeyError)
    for error in (ended[0], ended[2]):
        assert isinstance(error, aiordt.GroupError)
        assert "rank 1 (NodeActor" in str(error)
        assert "failed: KeyError: 'mine'" in str(error)
    assert await everywhere(nodes, alive) == [True] * 3


async def resources(actor: Any) -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


async def test_nothing_is_left_of_a_group(nodes: Any) -> None:
    async def round_of(backend: str) -> None:
        async with grouped(nodes, backend):
            await everywhere(nodes, adds_up)

    for backend in BACKENDS:  # threads and links that stay are made by the first
        await round_of(backend)
    before = await everywhere(nodes, resources)
    for backend in BACKENDS * 3:
        await round_of(backend)

    async def back() -> bool:
        now = await everywhere(nodes, resources)
        return all(
            fd <= fd_before and n <= n_before
            for (fd, n), (fd_before, n_before) in zip(now, before, strict=True)
        )

    await eventually(back, what="descriptors and threads are given back")


async def until_late(actor: Any) -> str:
    g = actor.group("g")
    t = torch.ones(1 << 21)
    await g.barrier()
    actor.kept["going"] = True
    try:
        while True:
            await g.allreduce(t, "max", timeout=3)
    except aiordt.AiordtError as exc:
        before = t.fill_(5).clone()
        await asyncio.sleep(0.1)
        assert torch.equal(t, before), "GRP-4: written to after the call had raised"
        return str(exc)


async def is_going(actor: Any) -> bool:
    return "going" in actor.kept


@pytest.mark.parametrize("backend", BACKENDS)
async def test_stopped_in_the_middle_of_a_transfer(nodes: Any, spawn: Any, backend: str) -> None:
    """What a backend cannot end by itself is ended for it: GRP-3, GRP-4."""
    victim = spawn()
    await aiordt.create_group([*nodes[:2], victim], backend, "g", timeout=200)
    pid = await pid_of(victim)
    pending = [actor.run.remote(until_late) for actor in (*nodes[:2], victim)]
    await eventually(lambda: nodes[0].run.remote(is_going))
    await asyncio.sleep(0.1)  # anywhere in it is fine
    os.kill(pid, signal.SIGSTOP)
    try:
        for text in await asyncio.wait_for(asyncio.gather(*pending[:2]), 30):
            assert "timed out on rank" in text
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "group 'g'" in await pending[2]


async def test_a_member_that_stops_is_named(nodes: Any, spawn: Any) -> None:
    victim = spawn()
    await aiordt.create_group([*nodes[:2], victim], "shm", "g")
    pid = await pid_of(victim)
    os.kill(pid, signal.SIGSTOP)
    try:
        texts = await outcomes(nodes[:2], late, 2)
        assert all("waiting for rank 2 (NodeActor" in text for text in texts), texts
    finally:
        os.kill(pid, signal.SIGCONT)
    await eventually(lambda: victim.run.remote(has_no_group))


async def has_no_group(actor: Any) -> bool:
    try:
        actor.group("g")
    except aiordt.GroupError:
        return True
    return False
