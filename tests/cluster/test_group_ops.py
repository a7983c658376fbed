"""The operations of groups beside what they should give, for every size, dtype and reduction."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.distributed import FileStore, ProcessGroupGloo, ReduceOp  # type: ignore[attr-defined]

import aiordt
from aiordt.collective._rules import REDUCTIONS
from tests.cluster.group_support import (
    DTYPES,
    SIZES,
    allowed,
    brought,
    elements,
    everywhere,
    grouped,
    outcomes,
    reduced,
    same,
)
from tests.support import Node

if TYPE_CHECKING:
    from pathlib import Path

BACKENDS = ["shm", "gloo", "mpi"]
TORCH_OPS = {
    "sum": ReduceOp.SUM,
    "product": ReduceOp.PRODUCT,
    "min": ReduceOp.MIN,
    "max": ReduceOp.MAX,
}


@pytest.fixture(scope="module")
def six(_nodes: list[Any]) -> list[Any]:
    return [*_nodes, *(Node.options(num_cpus=0).remote() for _ in range(3))]


def can(backend: str, op: str, dtype: torch.dtype) -> bool:
    """Whether it is among what a backend can; Gloo's types are fewer."""
    if backend != "gloo":
        return True
    if dtype is torch.uint64:
        return op not in {"min", "max"}
    return not dtype.is_complex or op in {"sum", "avg"}


async def reduce_one(g: Any, backend: str, op: str, numel: int, dtype: torch.dtype) -> int:
    t = brought(g.rank, numel, dtype)
    if not allowed(op, dtype) or not can(backend, op, dtype):
        with pytest.raises(aiordt.UsageError):
            await g.allreduce(t, op)
        return 0
    want = reduced(op, g.size, numel, dtype)
    assert await g.allreduce(t, op) is t
    same(t, want)
    return 1


async def reduce_to(g: Any, numel: int, dtype: torch.dtype) -> None:
    rank, size = g.rank, g.size
    t, dst = brought(rank, numel, dtype), size // 2
    want = reduced("max", size, numel, dtype)
    same(await g.allreduce(t, "max", inplace=False), want)
    same(t, brought(rank, numel, dtype))
    assert await g.reduce(t, dst, "max") is t
    same(t, want if rank == dst else brought(rank, numel, dtype))
    piece = await g.reducescatter(brought(rank, numel, dtype), "max")
    same(piece, want.tensor_split(size)[rank])


#: What groups of a size reduce: how many elements, of which dtypes. All are in groups of 3.
REDUCED = {
    1: [(0, DTYPES), (140_000, DTYPES)],
    3: [(size, DTYPES) for size in SIZES],
    6: [(1, DTYPES[::2]), (140_000, DTYPES[1::2])],
}


async def reduce_all(actor: Any, backend: str) -> int:
    g = actor.group("g")
    count = 0
    for size, dtypes in REDUCED[g.size]:  # all of a size at once
        done = await asyncio.gather(
            *(
                reduce_one(g, backend, op, elements(size, dtype), dtype)
                for dtype in dtypes
                for op in REDUCTIONS
            )
        )
        count += sum(done)
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int16):
            await reduce_to(g, elements(size, dtype), dtype)
    return count


# The first one starts six actors: some 3 s of CPU each, and twice that with coverage.
@pytest.mark.parametrize("backend", BACKENDS)
async def test_reductions_of_every_dtype(six: list[Any], backend: str) -> None:
    for size, least in ((1, 120), (3, 250), (6, 60)):
        async with grouped(six[:size], backend):
            counts = await everywhere(six[:size], reduce_all, backend)
            assert counts[0] > least
            assert len(set(counts)) == 1


def shared(t: torch.Tensor) -> torch.Tensor:
    """It in shared memory, not where a segment begins."""
    made = aiordt.empty(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape)
    return made.copy_(t)


async def in_shared_memory(actor: Any, *memory: str) -> int:
    g = actor.group("g")
    rank, size = g.rank, g.size
    mine = shared if memory[rank % 2] == "shared" else torch.clone
    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        numel = elements(140_000, dtype)
        theirs = [brought(other, numel, dtype) for other in range(size)]
        want = reduced("sum", size, numel, dtype)
        for _ in range(2):  # the second time, in memory that is mapped already
            t = mine(theirs[rank])
            same(await g.allreduce(t), want)
            same(t, want)
            t = mine(theirs[rank])
            same(await g.allreduce(t, inplace=False), want)
            same(await g.reducescatter(t), want.tensor_split(size)[rank])
            got = await g.reduce(t, 1, inplace=False)
            assert (got is None) == (rank != 1)
            same(want if got is None else got, want)
            for got, there in zip(await g.allgather(t), theirs, strict=True):
                same(got, there)
            cut = [there.tensor_split(size)[rank] for there in theirs]
            same(await g.alltoall(t), torch.cat(cut))
            same(await g.scatter(t if rank == 2 else None, 2), cut[2])
            same(await g.broadcast(t, 1), theirs[1])
    return aiordt.stats().mapped_bytes


@pytest.mark.parametrize("memory", [("shared", "shared"), ("own", "shared")], ids=["all", "some"])
async def test_tensors_in_shared_memory(six: list[Any], memory: tuple[str, str]) -> None:
    """They are reduced where they are, whatever memory the others have."""
    async with grouped(six[3:], "shm"):
        mapped = await everywhere(six[3:], in_shared_memory, *memory)
        assert all(mapped), mapped


async def many_alike(actor: Any, backend: str) -> int:
    g = actor.group("g")

    async def one(op: str) -> bool:
        t = brought(g.rank, 20_011, torch.float64)
        return torch.equal(await g.allreduce(t, op), reduced(op, g.size, 20_011, torch.float64))

    calls = []
    for number in range(150):
        calls.append(asyncio.ensure_future(one(("sum", "max", "min")[number % 3])))
        await asyncio.sleep(0)  # so that calls come while those before them become ready
    return sum(await asyncio.gather(*calls))


@pytest.mark.parametrize("backend", BACKENDS)
async def test_calls_that_look_alike_are_never_mixed_up(six: list[Any], backend: str) -> None:
    """Without tags, they run in the order in which they were made, on all members (GRP-2)."""
    async with grouped(six, backend):
        assert await everywhere(six, many_alike, backend) == [150] * 6


async def move_all(actor: Any) -> None:
    g = actor.group("g")
    rank, size = g.rank, g.size
    root = size - 1
    for total in SIZES:
        for dtype in (torch.float32, torch.bool, torch.complex128, torch.float8_e5m2):
            numel = elements(total, dtype)
            mine = brought(rank, numel, dtype)
            theirs = [brought(other, numel, dtype) for other in range(size)]
            t = mine.clone()
            assert await g.broadcast(t, root) is t
            same(t, theirs[root])
            if rank == root:
                same(await g.broadcast(mine, root, inplace=False), theirs[root])
            else:
                same(await g.broadcast(torch.zeros_like(mine), root, inplace=False), theirs[root])
            for got, want in zip(await g.allgather(mine), theirs, strict=True):
                same(got, want)
            gathered = await g.gather(mine, root)
            assert (gathered is None) == (rank != root)
            for got, want in zip(gathered or [], theirs, strict=False):
                same(got, want)
            got = await g.scatter(theirs[root] if rank == root else None, root)
            same(got, theirs[root].tensor_split(size)[rank])
            got = await g.alltoall(mine)
            same(got, torch.cat([each.tensor_split(size)[rank] for each in theirs]))
            if size > 1:
                before, after = (rank - 1) % size, (rank + 1) % size
                into = torch.zeros_like(mine)
                await asyncio.gather(g.send(mine, after), g.recv(into, before))
                same(into, theirs[before])
            same(mine, brought(rank, numel, dtype))
    await g.barrier()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_what_moves_arrives(six: list[Any], backend: str) -> None:
    for size in (1, 2, 5):
        async with grouped(six[:size], backend):
            await everywhere(six[:size], move_all)


async def beside_torch(actor: Any, path: str) -> None:
    g = actor.group("g")
    rank, size = g.rank, g.size

    def connect() -> Any:
        store = FileStore(path, size)
        return ProcessGroupGloo(store, rank, size, timedelta(seconds=60))

    raw = await asyncio.to_thread(connect)
    generator = torch.Generator().manual_seed(rank)
    for numel in (size, 23_456 * size):
        t = torch.randn(numel, generator=generator)
        theirs = t.clone()
        raw.allreduce([theirs], ReduceOp.SUM).wait()
        ours = await g.allreduce(t, inplace=False)
        torch.testing.assert_close(ours, theirs)
        bits = await g.allgather(ours)
        assert all(torch.equal(other, ours) for other in bits), "the same bits on all ranks"
        outs = [torch.empty(numel) for _ in range(size)]
        raw.allgather([outs], [t]).wait()
        assert all(map(torch.equal, await g.allgather(t), outs))
        swapped = torch.empty(numel)
        raw.alltoall_base(swapped, t, [], []).wait()
        assert torch.equal(await g.alltoall(t), swapped)
        share = torch.empty(numel // size)
        raw._reduce_scatter_base(share, t).wait()
        torch.testing.assert_close(await g.reducescatter(t), share)
        sent = t.clone()
        raw.broadcast(sent, size - 1).wait()
        assert torch.equal(await g.broadcast(t, size - 1, inplace=False), sent)
        for op, theirs_op in TORCH_OPS.items():
            for dtype in (torch.float64, torch.float16, torch.int32, torch.uint8):
                t = brought(rank, numel + 3, dtype)
                theirs = t.clone()
                raw.allreduce([theirs], theirs_op).wait()
                assert torch.equal(await g.allreduce(t, op), theirs), (op, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_the_same_as_torch_distributed(six: Any, backend: str, tmp_path: Path) -> None:
    for size in range(1, 7):
        async with grouped(six[:size], backend):
            await everywhere(six[:size], beside_torch, str(tmp_path / f"store-{size}"))


async def trees(actor: Any) -> int:
    g = actor.group("g")
    rank, size = g.rank, g.size
    said = 0
    send = g._membership.engine.mesh.send

    def counting(*args: Any) -> None:
        nonlocal said
        said += 1
        send(*args)

    g._membership.engine.mesh.send = counting
    shared = torch.full((30,), float(rank))
    tree = {
        "many": [torch.full((i % 7, 3), float(rank)) for i in range(1000)],
        "wide": torch.full((4, 600), float(rank), dtype=torch.bfloat16).t(),
        "array": np.full((5, 2), rank),
        "alone": torch.full((1 << 19,), float(rank)),
        "columns": torch.full((300, 5), float(rank))[:, 2],
        "twice": (shared, shared),
    }
    total = float(sum(range(size)))
    assert await g.allreduce(tree) is tree
    g._membership.engine.mesh.send = send
    assert all(bool((t == total).all()) for t in tree["many"])
    for key in ("wide", "array", "alone", "columns"):
        assert bool((tree[key] == total).all()), key
    assert float(shared[0]) == total, "one tensor in two places is reduced once"
    parameter = torch.nn.Parameter(torch.ones(3))
    await g.allreduce(parameter)
    assert parameter.tolist() == [size] * 3
    gathered = await g.allgather({"a": np.arange(3) + rank, "b": torch.ones(2, 2)})
    assert [each["a"][0] for each in gathered] == list(range(size))
    assert isinstance(gathered[0]["a"], np.ndarray)
    rows = {"x": torch.arange(size * 2).view(size, 2), "y": [np.arange(size + 1)]}
    got = await g.scatter(rows if rank == 0 else None, 0)
    assert got["x"].tolist() == [[2 * rank, 2 * rank + 1]]
    assert isinstance(got["y"][0], np.ndarray)
    swapped = await g.alltoall({"x": torch.arange(size) + 10 * rank, "y": torch.zeros(size, 2)})
    assert swapped["x"].tolist() == [10 * other + rank for other in range(size)]
    assert swapped["y"].shape == (size, 2)
    return said


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_tree_is_few_operations(nodes: Any, backend: str) -> None:
    async with grouped(nodes, backend):
        said = await everywhere(nodes, trees)
        assert max(said) <= 12, said  # to two others: descriptors, and a few exchanges


async def many_at_once(actor: Any) -> None:
    g = actor.group("g")
    rank, size = g.rank, g.size
    rounds = 60

    async def one(number: int) -> None:
        numel = 5 if number % 3 else 40_000  # inline, and not
        t = torch.full((numel,), float(rank + number))
        await g.allreduce(t, tag=number)
        want = size * number + sum(range(size))
        assert t[0] == t[-1] == want, (number, t, want)

    async def plain() -> None:
        for number in range(rounds):
            t = torch.full((40_000,), float(number))
            await g.allreduce(t)
            assert t[0] == size * number

    order = torch.randperm(rounds, generator=torch.Generator().manual_seed(rank)).tolist()
    await asyncio.gather(plain(), *map(one, order))  # each member in an order of its own


@pytest.mark.parametrize("backend", BACKENDS)
async def test_tags_keep_calls_apart(nodes: Any, backend: str) -> None:  # GRP-2
    async with grouped(nodes, backend):
        await everywhere(nodes, many_at_once)


async def crossed(actor: Any) -> None:
    """Two calls become ready at the same moment, each by another member's word."""
    g = actor.group("g")
    for number in range(40):
        tags = {"a": 2 * number, "b": 2 * number + 1}
        tensors = {name: torch.full((40_000,), float(tag)) for name, tag in tags.items()}

        def start(name: str, tags: Any = tags, tensors: Any = tensors) -> Any:
            return asyncio.ensure_future(g.allreduce(tensors[name], tag=tags[name]))

        early = {0: ["a", "b"], 1: ["b"], 2: ["a"]}[g.rank]
        calls = [start(name) for name in early]
        await g.barrier()
        calls += [start(name) for name in tags if name not in early]
        await asyncio.gather(*calls)
        for name, tag in tags.items():
            assert float(tensors[name][0]) == float(tensors[name][-1]) == 3.0 * tag, (name, number)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_calls_that_are_ready_in_another_order(nodes: Any, backend: str) -> None:  # GRP-2
    async with grouped(nodes, backend):
        await everywhere(nodes, crossed)


async def by_order(actor: Any) -> None:
    g = actor.group("g")
    tensors = [torch.full((3,), float(i)) for i in range(50)]
    await asyncio.gather(*map(g.allreduce, tensors))
    assert [float(t[0]) for t in tensors] == [i * g.size for i in range(50)]


async def test_calls_are_matched_by_their_order(nodes: Any) -> None:  # GRP-2
    async with grouped(nodes, "shm"):
        await everywhere(nodes, by_order)


async def mixed_messages(actor: Any) -> None:
    g = actor.group("g")
    if g.rank == 0:
        waiting = asyncio.ensure_future(g.allreduce(torch.ones(3)))
        large = asyncio.ensure_future(g.send(torch.arange(30_000), 1, tag=2))
        await asyncio.sleep(0)
        await g.send(torch.ones(2), 1, tag=1)
        await large
        assert (await waiting)[0] == g.size
    elif g.rank == 1:
        first, second = torch.zeros(2), torch.zeros(30_000, dtype=torch.int64)
        await g.recv(first, 0, tag=1)  # sent later, on another tag
        await g.recv(second, 0, tag=2)
        assert second[-1] == 29_999
        await g.allreduce(torch.ones(3))  # only now: rank 0 waited in it while it sent
    else:
        await g.allreduce(torch.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
async def test_messages_wait_for_no_collective(nodes: Any, backend: str) -> None:
    async with grouped(nodes, backend):
        await everywhere(nodes, mixed_messages)


MISMATCHES: list[tuple[str, Any, Any]] = [
    ("other shapes", lambda g: g.allreduce(torch.ones(4)), lambda g: g.allreduce(torch.ones(3))),
    (
        "other dtypes",
        lambda g: g.allreduce(torch.ones(40_000)),
        lambda g: g.allreduce(torch.ones(40_000, dtype=torch.float64)),
    ),
    (
        "other reductions",
        lambda g: g.allreduce(torch.ones(4)),
        lambda g: g.allreduce(torch.ones(4), "max"),
    ),
    (
        "other roots",
        lambda g: g.broadcast(torch.ones(4), 0),
        lambda g: g.broadcast(torch.ones(4), 1),
    ),
    ("other calls", lambda g: g.barrier(), lambda g: g.allreduce(torch.ones(4))),
    (
        "1 tensors and 2",
        lambda g: g.allgather(torch.ones(1)),
        lambda g: g.allgather([torch.ones(1), torch.zeros(1)]),
    ),
    (
        "rank 2: allreduce: there is no tensor",
        lambda g: g.allreduce(torch.ones(4)),
        lambda g: g.allreduce("x"),
    ),
    ("no rank 7", lambda g: g.reduce(torch.ones(4), 0), lambda g: g.reduce(torch.ones(4), 7)),
]


async def mismatched(actor: Any, number: int) -> None:
    g = actor.group("g")
    _, usual, odd = MISMATCHES[number]
    await (odd if g.rank == 2 else usual)(g)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_mismatch_is_told_to_all(nodes: Any, backend: str) -> None:  # GRP-1
    async with grouped(nodes, backend):
        for number, (words, _, _) in enumerate(MISMATCHES):
            for text in await outcomes(nodes, mismatched, number):
                assert words in text, text
                assert text.split(":")[0] in {"UsageError", "InvalidTypeError", "InvalidValueError"}
                assert "rank" in text
            await everywhere(nodes, by_order)  # the group goes on, in step


async def wrong_message(actor: Any, numel: int) -> None:
    g = actor.group("g")
    if g.rank == 0:
        await g.send(torch.ones(numel), 1)
    elif g.rank == 1:
        await g.recv(torch.ones(numel + 1), 0)


async def test_a_message_that_does_not_fit_is_told_to_both(nodes: Any) -> None:  # GRP-1
    async with grouped(nodes, "gloo"):
        large = await outcomes(nodes, wrong_message, 9000)
        assert large[0] == large[1]
        assert "float32[9000]" in large[0]
        assert "float32[9001]" in large[0]
        small = await outcomes(nodes, wrong_message, 3)
        assert small[0] == "ok", "small messages do not wait for their receiver"
        assert "float32[3]" in small[1]
