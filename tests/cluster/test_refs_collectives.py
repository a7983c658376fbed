"""Collectives on refs: every operation against what it must give, refusals, failures, groups."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
import torch

import aiordt
from aiordt import _ray, _runtime
from aiordt.collective import (
    allgather_refs,
    allreduce_refs,
    alltoall_refs,
    broadcast_refs,
    create_group,
    gather_refs,
    reduce_refs,
    reducescatter_refs,
    scatter_refs,
)
from aiordt.collective import (
    spawn as spawn_group,
)
from aiordt.collective._declared import Declared
from aiordt.collective._requests import FIRST_LANE
from aiordt.collective._service import groups_of
from tests.support import Node, eventually, kill

if TYPE_CHECKING:
    from collections.abc import Callable

#: Elements: what travels by value, and what does not.
SIZES = [7, 50_001]


def tensor(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(numel) % 50 + rank).to(dtype)


def all_of(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.stack([tensor(rank, numel, dtype) for rank in range(3)])


def made(nodes: list[Any], numel: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Calls under way, one on each node."""

    def keep(node: Any, rank: int) -> torch.Tensor:
        node.kept["tensor"] = tensor(rank, numel, dtype)
        kept: torch.Tensor = node.kept["tensor"]
        return kept

    return [node.make.remote(keep, rank) for rank, node in enumerate(nodes)]


async def pids(nodes: list[Any]) -> list[int]:
    return list(await asyncio.gather(*(node.pid.remote() for node in nodes)))


@pytest.mark.parametrize("numel", SIZES)
async def test_every_operation(nodes: list[Any], numel: int) -> None:
    refs = await asyncio.gather(*made(nodes, numel))
    every, total = all_of(numel), all_of(numel).sum(0)
    pieces = total.tensor_split(3)
    for ref, owner in zip(out := await allreduce_refs(refs), await pids(nodes), strict=True):
        assert ref.owner.pid == owner, "results live on the members"
        assert torch.equal(await ref, total)
    del out, ref
    assert torch.equal(await (await reduce_refs(refs, dst=1, op="max")), every.amax(0))
    assert torch.equal(await (await allgather_refs(refs))[2], every)
    assert torch.equal(await (await allgather_refs(refs, dim=0))[1], every.flatten())
    assert torch.equal(await (await gather_refs(refs, dst=2)), every)
    for ref, piece in zip(await reducescatter_refs(refs), pieces, strict=True):
        assert torch.equal(await ref, piece)
    for rank, ref in enumerate(await alltoall_refs(refs)):
        wanted = torch.cat([row.tensor_split(3)[rank] for row in every])
        assert torch.equal(await ref, wanted)
    for ref in await broadcast_refs(refs[1], nodes):
        assert torch.equal(await ref, every[1])
    for ref, piece in zip(
        await scatter_refs(refs[1], nodes), every[1].tensor_split(3), strict=True
    ):
        assert torch.equal(await ref, piece)
    for ref, row in zip(refs, every, strict=True):
        assert torch.equal(await ref, row), "REF-2: inputs stay as they are"


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
async def test_dtypes(nodes: list[Any], numel: int, dtype: torch.dtype) -> None:
    wanted = all_of(numel, torch.float64).sum(0).to(dtype)
    for ref in await allreduce_refs(made(nodes, numel, dtype)):
        assert torch.equal(await ref, wanted)


async def test_gathering_along_other_dimensions(nodes: list[Any]) -> None:
    def make(_: Any, rank: int) -> torch.Tensor:
        return torch.full((40, 30, 20), float(rank))

    refs = await asyncio.gather(*(node.make.remote(make, i) for i, node in enumerate(nodes)))
    every = [torch.full((40, 30, 20), float(rank)) for rank in range(3)]
    for dim in (0, 1, -1):
        (ref, *_) = await allgather_refs(refs, dim=dim)
        assert torch.equal(await ref, torch.cat(every, dim))
    assert torch.equal(await (await allgather_refs(refs))[0], torch.stack(every))


async def test_trees_arrays_and_slices(nodes: list[Any]) -> None:
    def make(_: Any, rank: int) -> dict[str, Any]:
        weights = tensor(rank, 30_000)
        tree = {"weights": weights, "rest": [tensor(rank, 5), tensor(rank, 20_000).numpy()]}
        return tree if rank != 1 else dict(reversed(tree.items()))

    trees = await asyncio.gather(*(node.make.remote(make, i) for i, node in enumerate(nodes)))
    assert list(trees[1]) != list(trees[0])
    out = await aiordt.get(await allreduce_refs(trees))
    for tree in out:
        assert torch.equal(tree["weights"], all_of(30_000).sum(0))
        assert torch.equal(tree["rest"][0], all_of(5).sum(0))
        assert isinstance(tree["rest"][1], np.ndarray)
        assert tree["rest"][1].tolist() == all_of(20_000).sum(0).tolist()
    halves = [tree["weights"][::2] for tree in trees]
    (ref, *_) = await allreduce_refs(halves)
    assert torch.equal(await ref, all_of(30_000).sum(0)[::2])


async def test_in_place(nodes: list[Any]) -> None:
    refs = await asyncio.gather(*made(nodes, 50_000))
    out = await allreduce_refs(refs, "avg", inplace=True)
    assert out == refs
    wanted = all_of(50_000).mean(0)
    for node in nodes:
        assert torch.equal(await node.run.remote(lambda node: node.kept["tensor"]), wanted)


async def test_methods_that_run_and_methods_that_fail(nodes: list[Any]) -> None:
    async def late(_: Any, rank: int) -> torch.Tensor:
        await asyncio.sleep(0.05 * rank)
        if rank == 5:
            raise KeyError("no weights")
        return tensor(rank, 50_000)

    (ref, *_) = await allreduce_refs([n.make.remote(late, i) for i, n in enumerate(nodes)])
    assert torch.equal(await ref, all_of(50_000).sum(0))
    calls = [n.make.remote(late, i) for n, i in zip(nodes, (0, 1, 5), strict=True)]
    with pytest.raises(KeyError, match="no weights"):
        await allreduce_refs(calls)
    await asyncio.gather(*calls, return_exceptions=True)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "twice the same owner": (
        lambda r: allreduce_refs([r[0], r[1], r[1]]),
        r"refs\[1\] and refs\[2\] are both of NodeActor",
    ),
    "shapes": (
        lambda r: allreduce_refs([r[0], r[1][:100], r[2]]),
        r"refs\[1\] is float32\[100\], but refs\[0\] is float32\[50000\]",
    ),
    "structures": (
        lambda r: allreduce_refs([{"w": r[0]}, {"v": r[1]}, {"w": r[2]}]),
        r"refs\[1\] has \['v'\] where the refs have \['w'\]",
    ),
    "a leaf that is none": (
        lambda r: allreduce_refs([{"w": r[0]}, {"w": 5}, {"w": r[2]}]),
        r"refs\[1\]\['w'\] must be a TensorRef, not int",
    ),
    "refs of two owners in one": (
        lambda r: allreduce_refs([[r[0], r[1]], [r[1], r[2]]]),
        r"refs\[0\] has refs of .* and of .*: a member brings its own only",
    ),
    "no such reduction": (lambda r: allreduce_refs(r, "mean"), "op='mean'"),
    "one without meaning": (lambda r: allreduce_refs(r, "bxor"), "integers"),
    "no such rank": (lambda r: reduce_refs(r, dst=3), "no rank 3"),
    "no such dimension": (lambda r: allgather_refs(r, dim=1), "dim=1"),
    "no refs": (lambda r: allreduce_refs(r[:0]), "no refs"),
    "no list": (lambda r: allreduce_refs(r[0]), "a list with a ref of each member"),
    "no tensors": (lambda r: allreduce_refs([1, *r]), "no TensorRef"),
    "neither actors nor group": (lambda r: broadcast_refs(r[0]), "either actors or a group"),
    "what is no actor": (lambda r: scatter_refs(r[0], [5]), "handles of different actors"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_refusals(nodes: list[Any], what: str) -> None:  # REF-1
    call, message = REFUSED[what]
    refs = await asyncio.gather(*made(nodes, 50_000))
    with pytest.raises(aiordt.UsageError, match=message):
        await call(refs)
    assert torch.equal(await refs[1], tensor(1, 50_000))


async def test_only_what_actors_own(nodes: list[Any]) -> None:
    mine = await aiordt.put(torch.ones(50_000))
    theirs = await made(nodes, 50_000)[0]
    with pytest.raises(aiordt.UsageError, match="only actors can be members"):
        await allreduce_refs([mine, theirs])
    scalar = await nodes[0].make.remote(lambda _: torch.tensor(1.0))
    with pytest.raises(aiordt.UsageError, match="a scalar cannot be cut"):
        await scatter_refs(scalar, nodes)
    with pytest.raises(aiordt.UsageError, match="by value, and there is nothing to overwrite"):
        await allreduce_refs([scalar], inplace=True)


async def test_a_group_of_ones_own(nodes: list[Any]) -> None:
    refs = await asyncio.gather(*made(nodes, 50_000))
    async with await create_group([nodes[2], nodes[0]]) as group:
        out = await allgather_refs([refs[0], refs[2]], group)
        assert [ref.owner.pid for ref in out] == [refs[2].owner.pid, refs[0].owner.pid]
        assert (await out[0])[:, 0].tolist() == [2.0, 0.0], "in rank order"
        with pytest.raises(aiordt.UsageError, match=r"refs\[1\] is of NodeActor .* not in <group"):
            await allreduce_refs([refs[0], refs[1]], group=group)
        with pytest.raises(aiordt.UsageError, match="no ref of rank 0"):
            await allreduce_refs([refs[0]], group=group)
        with pytest.raises(aiordt.UsageError, match="which is not in <group"):
            await broadcast_refs(refs[1], group=group)
        # ... and in another process, whose own it is
        wanted = (all_of(50_000)[0] + all_of(50_000)[2]).tolist()

        async def reduce(_: Any, group: Any, *refs: Any) -> list[float]:
            (mine, _other) = await allreduce_refs(refs, group=group)
            found: list[float] = (await mine).tolist()
            return found

        assert await nodes[2].run.remote(reduce, group, refs[2], refs[0]) == wanted
        assert await nodes[1].run.remote(reduce, group, refs[2], refs[0]) == wanted
    with pytest.raises(aiordt.GroupError, match="has ended"):
        await allreduce_refs([refs[0], refs[2]], group=group)


async def test_what_a_member_cannot_do_fails_on_all_and_the_group_goes_on(nodes: list[Any]) -> None:
    refs = await asyncio.gather(*made(nodes, 50_000))
    await allreduce_refs(refs)

    def shrink(node: Any) -> None:
        node.kept["tensor"].untyped_storage().resize_(4)

    await nodes[1].run.remote(shrink)
    with pytest.raises(aiordt.TensorFreedError, match="was resized"):  # REQ-1
        await allreduce_refs(refs)
    again = await asyncio.gather(*made(nodes, 50_000))
    assert len(await allreduce_refs(again)) == 3


async def test_members_that_are_busy(nodes: list[Any], tmp_path: Path) -> None:
    """The request goes by the control connection: Ray's calls would wait for the loops."""
    refs = await asyncio.gather(*made(nodes, 1000))
    fifos = [tmp_path / str(rank) for rank in range(3)]
    for fifo in fifos:
        os.mkfifo(fifo)

    def block(_: Any, path: str) -> str:
        return Path(path).read_text()  # until somebody writes

    busy = [n.run.remote(block, str(fifo)) for n, fifo in zip(nodes, fifos, strict=True)]
    out = await allreduce_refs(refs)
    assert torch.equal(await out[0], all_of(1000).sum(0))
    for call, fifo in zip(busy, fifos, strict=True):
        await asyncio.to_thread(fifo.write_text, "on")
        await call


async def test_one_ray_call_for_each_member(
    nodes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = await asyncio.gather(*made(nodes, 50_000))
    small = await asyncio.gather(*made(nodes, 100))
    await allreduce_refs(refs)
    calls = []
    ask = _ray.ask_actor

    async def counted(handle: Any, function: Any) -> Any:
        calls.append(handle)
        return await ask(handle, function)

    monkeypatch.setattr(_ray, "ask_actor", counted)
    await allreduce_refs(small)
    assert calls == []
    await allreduce_refs(refs)
    assert len(calls) == 3


async def test_many_at_once_from_several_processes(nodes: list[Any]) -> None:
    refs = await asyncio.gather(*made(nodes, 50_000))

    async def several(_: Any, *refs: Any) -> bool:
        calls = [allreduce_refs(refs), allgather_refs(refs), alltoall_refs(refs)]
        sums, stacks, _rest = await asyncio.gather(*calls)
        same = torch.equal(await sums[1], all_of(50_000).sum(0))
        return same and torch.equal(await stacks[0], all_of(50_000))

    here = [several(None, *refs) for _ in range(4)]
    there = [node.run.remote(several, *refs) for node in nodes]
    assert all(await asyncio.gather(*here, *there))


async def test_a_caller_that_is_cancelled(nodes: list[Any]) -> None:  # REQ-2
    refs = await asyncio.gather(*made(nodes, 500_000))
    await allreduce_refs(refs)
    for turns in range(0, 60, 3):
        task = asyncio.create_task(allreduce_refs(refs))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    def kept(_: Any) -> int:
        return len(groups_of(_runtime.current()).requests._kept)

    async def none_kept() -> bool:
        return await asyncio.gather(*(node.run.remote(kept) for node in nodes)) == [0, 0, 0]

    assert torch.equal(await (await allreduce_refs(refs))[0], all_of(500_000).sum(0))
    await eventually(none_kept, what="results dropped")


async def test_a_member_that_dies(spawn: Any) -> None:
    actors = [spawn() for _ in range(3)]
    refs = await asyncio.gather(*made(actors, 50_000))
    await allreduce_refs(refs)

    await kill(refs[2].owner.pid)
    with pytest.raises(aiordt.AiordtError, match=f"{refs[2].owner.pid}"):
        async with asyncio.timeout(5):
            await allreduce_refs(refs)
    assert torch.equal(await refs[1], tensor(1, 50_000)), "REF-2"
    (ref, _) = await allreduce_refs(refs[:2])  # a new group, at once
    assert torch.equal(await ref, tensor(0, 50_000) + tensor(1, 50_000))


async def test_an_asker_that_dies_before_it_asked_all(nodes: list[Any], spawn: Any) -> None:
    refs = await asyncio.gather(*made(nodes, 50_000))
    group = await create_group(nodes)
    asker = spawn()

    async def ask_one(_: Any, group: Any, refs: list[Any]) -> None:
        runtime = _runtime.current()
        call = Declared("allreduce", op="sum")
        request = call._request(FIRST_LANE, 0, call._inputs(refs), pulled=False)
        runtime.io.loop.call_soon_threadsafe(
            lambda: runtime.io.spawn(group.ask(runtime, 0, "collect", request))
        )

    await asker.run.remote(ask_one, group, refs)

    def serving(_: Any) -> bool:
        return FIRST_LANE in groups_of(_runtime.current()).requests._served

    await eventually(lambda: nodes[0].run.remote(serving), what="the request is there")
    os.kill(await asker.pid.remote(), signal.SIGKILL)

    async def ended() -> bool:
        try:
            await allreduce_refs(refs, group=group)
        except aiordt.GroupError:
            return True
        return False

    await eventually(ended, what="the group ended")  # REQ-3
    assert not await nodes[0].run.remote(serving)


async def test_made_groups_keep_no_actor_alive(cluster: None) -> None:  # MADE-1
    actors = [Node.options(num_cpus=0).remote() for _ in range(2)]
    refs = await asyncio.gather(*made(actors, 50_000))
    await allreduce_refs(refs)
    found = [Path(f"/proc/{ref.owner.pid}") for ref in refs]
    del actors, refs
    gc.collect()
    await eventually(lambda: not any(path.exists() for path in found), what="actors ended")


@ray.remote(num_cpus=0)
class Given(aiordt.AsyncActor):
    """Returns what it was made with."""

    def __init__(self, value: float) -> None:
        self.value = value

    @aiordt.method
    async def give(self) -> torch.Tensor:
        return torch.full((3,), self.value)


async def test_spawn(cluster: None) -> None:
    async with await spawn_group(Given, 2, args=[[1.0], [2.0]]) as group:
        refs = [actor.give.remote() for actor in group.members]
        assert (await (await allreduce_refs(refs, group=group))[0])[0] == 3.0
    async with await spawn_group(Given, 2, args=[5.0]) as group:
        refs = [actor.give.remote() for actor in group.members]
        assert (await (await allreduce_refs(refs, group=group))[0])[0] == 10.0
    with pytest.raises(aiordt.UsageError, match="n=0"):
        await spawn_group(Given, 0)
