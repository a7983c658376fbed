"""How groups form, are passed on, and end (scenarios: groups)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import msgpack
import pytest
import ray
import torch
import torch.distributed as dist

import aiordt
from aiordt import _ray
from aiordt.collective._members import Member
from aiordt.collective._service import group_here
from tests.cluster.group_support import everywhere, grouped
from tests.support import Node, eventually


async def adds_up(actor: Any, name: str = "g") -> int:
    g = actor.group(name)
    t = torch.ones(3)
    await g.allreduce(t)
    assert t.tolist() == [g.size] * 3
    return int(g.rank)


async def test_a_group_has_members_and_ranks(nodes: Any, spawn: Any) -> None:
    stranger = spawn()
    a, b, c = nodes
    async with await aiordt.create_group([b, c, a]) as group:
        assert group.size == 3
        assert [group.rank_of(actor) for actor in (a, b, c)] == [2, 0, 1]
        assert group.members == (b, c, a)
        assert group.backend == "shm"
        with pytest.raises(aiordt.UsageError, match="not in group"):
            group.rank_of(stranger)
        assert await everywhere([a, b, c], adds_up, group.name) == [2, 0, 1]
        assert "of 3, shm" in repr(group)
    with pytest.raises(aiordt.ClosedError, match="was closed"):
        await a.run.remote(adds_up, group.name)
    with pytest.raises(aiordt.UsageError, match="not in a group 'none'; it is in no group"):
        await a.run.remote(adds_up, "none")


async def test_arguments_are_checked(nodes: Any) -> None:
    with pytest.raises(TypeError, match="actor handle"):
        await aiordt.create_group([])
    with pytest.raises(TypeError, match="actor handle"):
        await aiordt.create_group([nodes[0], "b"])
    with pytest.raises(ValueError, match="twice"):
        await aiordt.create_group([nodes[0], nodes[0]])
    with pytest.raises(ValueError, match="backend='x'"):
        await aiordt.create_group(nodes, "x")
    with pytest.raises(aiordt.UnavailableError, match="nccl"):
        await aiordt.create_group(nodes, "nccl", "n")
    async with grouped(nodes, name="n"):  # nothing is left of it
        await everywhere(nodes, adds_up, "n")


async def test_names_are_unique_for_each_member(nodes: Any) -> None:  # FRM-1, FRM-2
    a, b, c = nodes
    async with grouped([a, b], name="one"):
        with pytest.raises(aiordt.UsageError, match=r"rank 1 \(NodeActor .* in a group 'one'"):
            await aiordt.create_group([c, b], name="one")
        async with grouped([c], name="one"), grouped([a, c], name="two"):
            results = await asyncio.gather(
                everywhere([a, b], adds_up, "one"),
                everywhere([a, c], adds_up, "two"),
                everywhere([c], adds_up, "one"),
            )
            assert list(results) == [[0, 1], [0, 1], [0]]


async def test_many_overlapping_groups_work_at_once(nodes: Any) -> None:
    names = [f"g{number}" for number in range(6)]

    async def all_groups(actor: Any) -> int:
        async def one(name: str) -> None:
            g = actor.group(name)
            for number in range(20):
                t = torch.full((number * 700,), 1.0)
                await g.allreduce(t)
                assert float(t.sum()) == t.numel() * g.size

        await asyncio.gather(*map(one, names))
        return len(names)

    groups = await asyncio.gather(
        *(
            aiordt.create_group(nodes[::-1] if n % 2 else nodes, ("shm", "gloo")[n % 3 == 0], name)
            for n, name in enumerate(names)
        )
    )
    assert await everywhere(nodes, all_groups) == [6] * 3
    await asyncio.gather(*(group.aclose() for group in groups))


class Stuck(aiordt.AsyncActor):
    """Its loop never turns again once it is told so."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def stick(self) -> None:
        while not os.path.exists(self.path):  # noqa: ASYNC240
            time.sleep(0.01)  # noqa: ASYNC251

    async def use(self) -> int:
        return await adds_up(self)


async def test_a_group_forms_while_its_members_are_busy(spawn: Any, tmp_path: Any) -> None:
    # ADR-1
    path = tmp_path / "go"
    actors = [spawn(ray.remote(Stuck), str(path)) for _ in range(2)]
    stuck = [actor.stick.remote() for actor in actors]
    group = await aiordt.create_group(actors, "gloo", "g", timeout=30)
    assert not ray.wait(stuck, timeout=0)[0]
    uses = [actor.use.remote() for actor in actors]
    path.touch()
    assert await asyncio.wait_for(asyncio.gather(*uses), 20) == [0, 1]
    await group.aclose()


class Plain:
    """An actor that knows nothing of aiordt."""

    def ping(self) -> int:
        return os.getpid()


class PlainUser:
    async def use(self) -> int:
        g = group_here("g")
        t = torch.ones(2)
        await g.allreduce(t)
        return int(t[0])


async def test_plain_actors_are_asked(spawn: Any) -> None:
    actors = [spawn(ray.remote(PlainUser)) for _ in range(2)]
    async with grouped(actors):
        uses = [actor.use.remote() for actor in actors]
        assert await asyncio.wait_for(asyncio.gather(*uses), 20) == [2, 2]
    blocking = spawn(ray.remote(Plain))
    async with grouped([blocking]) as group:
        assert group.size == 1


async def test_from_inside_an_actor_and_passed_on(nodes: Any) -> None:
    async def make(actor: Any, others: list[Any]) -> Any:
        own = ray.get_runtime_context().current_actor
        return await aiordt.create_group([own, *others], name="g")

    async def close(actor: Any, held: list[Any]) -> str:
        (group,) = held
        await group.aclose()
        return repr(group)

    group = await nodes[0].run.remote(make, nodes[1:])
    assert await everywhere(nodes, adds_up) == [0, 1, 2]
    assert group.rank_of(nodes[2]) == 2
    assert await nodes[1].run.remote(close, [group]) == "<group 'g' of 3, shm>"
    with pytest.raises(aiordt.ClosedError, match="was closed"):
        await nodes[2].run.remote(adds_up)


async def test_a_dead_actor_is_named(nodes: Any, spawn: Any) -> None:  # FRM-1, ADR-1
    victim = spawn()
    os.kill(await victim.pid.remote(), signal.SIGKILL)
    with pytest.raises(aiordt.GroupError, match="the actor is dead"):
        await aiordt.create_group([nodes[0], victim], name="g")
    async with grouped(nodes):
        await everywhere(nodes, adds_up)


async def test_a_restarted_actor_is_found_anew(nodes: Any, spawn: Any) -> None:  # ADR-1
    restarted = spawn(options={"max_restarts": 1})
    pid = await restarted.pid.remote()
    async with grouped([nodes[0], restarted]):
        await everywhere([nodes[0], restarted], adds_up)
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    async with grouped([nodes[0], restarted]):
        assert await everywhere([nodes[0], restarted], adds_up) == [0, 1]
    assert await restarted.pid.remote() != pid


async def test_an_actor_that_is_late_is_waited_for(nodes: Any, spawn: Any) -> None:
    async with grouped([nodes[0], spawn()]) as group:  # it has not started yet
        assert group.size == 2


async def test_forming_has_a_deadline(nodes: Any, spawn: Any) -> None:  # FRM-1
    victim = spawn()
    pid = await victim.pid.remote()
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(aiordt.GroupError, match=r"0\.5 s"):
            await aiordt.create_group([*nodes, victim], name="g", timeout=0.5)
    finally:
        os.kill(pid, signal.SIGCONT)

    async def free() -> bool:
        async with grouped([*nodes, victim]):
            return True

    async def formed() -> bool:
        try:
            return await free()
        except aiordt.UsageError:  # the stopped one gives up a moment later
            return False

    await eventually(formed)


async def test_a_new_one_of_the_same_name(nodes: Any) -> None:
    group = await aiordt.create_group(nodes, "gloo", "g")
    again = await group.reform(nodes[:2])
    assert (again.name, again.backend, again.size) == ("g", "gloo", 2)
    assert await everywhere(nodes[:2], adds_up) == [0, 1]
    await again.aclose()


async def test_beside_the_default_group_of_torch(nodes: Any, tmp_path: Any) -> None:
    async def default(actor: Any, path: str, rank: int) -> float:
        def enter() -> None:
            store = dist.FileStore(  # type: ignore[attr-defined]
                path, 3
            )
            dist.init_process_group("gloo", store=store, rank=rank, world_size=3)

        await asyncio.to_thread(enter)
        g = actor.group("g")
        ours, theirs = torch.ones(40_000), torch.ones(40_000)
        await asyncio.gather(g.allreduce(ours), asyncio.to_thread(dist.all_reduce, theirs))
        dist.destroy_process_group()
        await g.allreduce(ours)
        assert torch.equal(ours, theirs * 3)
        return float(ours[0])

    async with grouped(nodes, "gloo"):
        calls = [a.run.remote(default, str(tmp_path / "s"), r) for r, a in enumerate(nodes)]
        assert await asyncio.wait_for(asyncio.gather(*calls), 30) == [9.0] * 3


async def test_gloo_where_memory_cannot_be_read(spawn: Any) -> None:
    only_tcp = {"runtime_env": {"env_vars": {"AIORDT_TRANSPORTS": "tcp"}}}
    actors = [spawn(options=only_tcp), spawn(options=only_tcp)]
    with pytest.raises(aiordt.UnavailableError, match=r"shm: rank \d cannot read"):
        await aiordt.create_group(actors, "shm", timeout=200)  # they have not started yet
    async with grouped(actors) as group:
        assert group.backend == "gloo"
        await everywhere(actors, adds_up)
        await everywhere(actors, large_message)


async def large_message(actor: Any) -> None:
    g = actor.group("g")
    if g.rank == 0:
        await g.send({"a": torch.arange(300_000), "b": torch.ones(3)}, 1)
    else:
        into = {"a": torch.zeros(300_000, dtype=torch.int64), "b": torch.zeros(3)}
        assert await g.recv(into, 0) is into
        assert torch.equal(into["a"], torch.arange(300_000))
        assert into["b"].tolist() == [1, 1, 1]


async def test_what_an_actor_publishes(nodes: Any, spawn: Any) -> None:  # ADR-1
    """Its record is there without a call, and its handle does not keep it alive."""
    actor = Node.options(num_cpus=0).remote()
    actor_id = _ray.actor_id_of(actor)
    session = _ray.session()
    data = await eventually(lambda: _ray.find_actor(session, actor_id or ""))
    member = Member.unpack(msgpack.unpackb(data))
    assert member.owner.actor_id == actor_id
    weak = _ray.weak_handle(member.state)
    assert await weak.pid.remote() == member.owner.pid
    del actor
    await eventually(lambda: not os.path.exists(f"/proc/{member.owner.pid}"))


def test_construction_without_ray_or_outside_an_actor() -> None:
    assert Stuck("x").path == "x"
