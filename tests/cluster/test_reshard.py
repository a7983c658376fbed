"""Sharded states received in other partitions: the bytes, how many of them, and refusals."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import aiordt
from aiordt.weights import FlatShard, Shard, export_shards, load_shards

ROWS, COLUMNS = 1026, 768
NUM_OWNERS = 3


def whole(name: str) -> torch.Tensor:
    shapes = {"w": (ROWS, COLUMNS), "b": (COLUMNS,), "tiny": (5,)}
    shape = shapes[name]
    numel = torch.Size(shape).numel()
    return (torch.arange(numel, dtype=torch.float32) % 8191 + len(name)).reshape(shape)


def flat_part(tensor: torch.Tensor, index: int, of: int) -> torch.Tensor:
    step = -(-tensor.numel() // of)
    padded = torch.nn.functional.pad(tensor.reshape(-1), (0, of * step - tensor.numel()))
    return padded[index * step : (index + 1) * step].clone()


async def give_rows(node: Any, index: int) -> Any:
    node.kept["parts"] = {name: whole(name).chunk(NUM_OWNERS)[index].clone() for name in "wb"}
    return await export_shards(node.kept["parts"], Shard(0, index, NUM_OWNERS))


async def give_flat(_: Any, index: int) -> Any:
    names = ("w", "b", "tiny")
    parts = {name: flat_part(whole(name), index, NUM_OWNERS) for name in names}
    shapes = {name: tuple(whole(name).shape) for name in names}
    return await export_shards(parts, FlatShard(index, NUM_OWNERS), shapes=shapes)


async def owned(nodes: list[Any], give: Any) -> list[Any]:
    return list(await asyncio.gather(*(node.run.remote(give, i) for i, node in enumerate(nodes))))


def moved() -> int:
    return aiordt.stats().bytes_pulled


async def test_only_overlaps_move(nodes: list[Any]) -> None:
    parts = await owned(nodes, give_rows)
    before = moved()
    rows = (await load_shards(parts, {"w": Shard(0, 1, 2), "b": None}))["w"]
    assert torch.equal(rows, whole("w").chunk(2)[1])
    assert moved() - before == rows.nbytes + whole("b").nbytes, "1.00 of what is needed"
    before = moved()
    block = await load_shards(parts, lambda name, _: Shard(1, 2, 4) if name == "w" else None)
    assert torch.equal(block["w"], whole("w").chunk(4, 1)[2])
    assert torch.equal(block["b"], whole("b"))
    assert moved() - before <= 1.05 * (block["w"].nbytes + block["b"].nbytes)


async def test_flat_shards_grids_and_wholes(nodes: list[Any]) -> None:
    parts = await owned(nodes, give_flat)
    before = moved()
    everything = await load_shards(parts)
    needed = sum(tensor.nbytes for tensor in everything.values())
    for name, tensor in everything.items():
        assert torch.equal(tensor, whole(name)), name
    assert moved() - before <= needed, "what is tiny travelled inside its ref"
    grid: Any = {"w": (Shard(0, 1, 2), Shard(1, 1, 3)), "tiny": FlatShard(1, 2)}
    some = await load_shards(parts, grid)
    assert torch.equal(some["w"], whole("w").chunk(2)[1].chunk(3, 1)[1])
    assert some["tiny"].tolist() == whole("tiny")[3:].tolist()


async def test_into_dtypes_and_refs_of_results(nodes: list[Any]) -> None:
    results = [node.run.remote(give_rows, index) for index, node in enumerate(nodes)]
    target = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    into = {"w": target[:, :100]}
    with pytest.raises(aiordt.UsageError, match=r"'w': into has the shape \(1026, 100\)"):
        await load_shards(results, into=into)
    assert not target.any()
    into = {"w": target[: ROWS // 2]}
    found = await load_shards(results, Shard(0, 0, 2), into=into)
    assert found["w"] is into["w"]
    assert torch.equal(target[: ROWS // 2], whole("w")[: ROWS // 2].bfloat16())
    assert not target[ROWS // 2 :].any(), "and nothing beside it"
    half = await load_shards(results, Shard(0, 2, 3), dtype=torch.float16)
    assert torch.equal(half["w"], whole("w").chunk(3)[2].half())


async def test_missing_overlapping_and_misfit_parts_are_refused_by_name(nodes: list[Any]) -> None:
    parts = await owned(nodes, give_flat)
    before = moved()
    with pytest.raises(aiordt.UsageError, match=r"'w': .*missing: flat shard 1 of 3"):
        await load_shards([parts[0], parts[2]])
    rows = await owned(nodes, give_rows)
    with pytest.raises(aiordt.UsageError, match="'w': missing: shard 0 of 3"):
        await load_shards(rows[1:])
    other = await export_shards({"w": whole("w")[: ROWS // 2]}, Shard(0, 0, 2),
                                shapes={"w": (ROWS, COLUMNS)})  # fmt: skip
    with pytest.raises(aiordt.UsageError, match="'w': two parts overlap"):
        await load_shards([*rows, other])
    with pytest.raises(aiordt.UsageError, match="no owner has 'v'"):
        await load_shards(rows, into={"v": torch.empty(1)})
    with pytest.raises(aiordt.UsageError, match=r"'x': .*give shapes="):
        await export_shards({"x": torch.ones(4)}, FlatShard(0, 2))
    with pytest.raises(aiordt.UsageError, match="load_shards takes"):
        await load_shards([1])
    assert moved() == before


async def test_replicas_are_read_once(nodes: list[Any]) -> None:
    parts = await owned(nodes, give_rows)
    before = moved()
    found = await load_shards([*parts, *parts])
    assert torch.equal(found["w"], whole("w"))
    assert moved() - before == found["w"].nbytes + found["b"].nbytes


def test_dtensors_say_what_they_are(cluster: None) -> None:
    """Four ranks of a mesh of 2 x 2, one after the other, in this process."""
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415
    from torch.distributed.tensor import Shard as Split  # noqa: PLC0415
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    tensor = whole("w")

    async def give(rank: int) -> Any:
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), _init_backend=False)
            local = tensor.chunk(2)[rank // 2].chunk(2, 1)[rank % 2].contiguous()
            split = DTensor.from_local(
                local, mesh, [Split(0), Split(1)], run_check=False,
                shape=tensor.shape, stride=tensor.stride(),
            )  # fmt: skip
            row = tensor[:1].contiguous()
            same = DTensor.from_local(row, mesh, [Replicate(), Replicate()], run_check=False)
            return await export_shards({"w": split, "row": same})
        finally:
            dist.destroy_process_group()

    async def scenario() -> None:
        parts = [await give(rank) for rank in range(4)]
        found = await load_shards(parts)
        assert torch.equal(found["w"], tensor)
        assert torch.equal(found["row"], tensor[:1])
        dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
        try:
            mesh = DeviceMesh("cpu", torch.arange(2), _init_backend=False)
            into = DTensor.from_local(
                torch.zeros(ROWS // 2, COLUMNS), mesh, [Split(0)], run_check=False
            )
            result = await load_shards(parts, into={"w": into})
            assert result["w"] is into
            assert torch.equal(into.to_local(), tensor[ROWS // 2 :])
        finally:
            dist.destroy_process_group()

    asyncio.run(scenario())
