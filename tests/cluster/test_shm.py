"""Tensors in shared memory between real actors: views, copies, the end of both."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import aiordt
from aiordt._arena import arena
from tests.support import MIB, arange, eventually, kill

_NBYTES = 2 * MIB


def share(node: Any, nbytes: int = _NBYTES) -> torch.Tensor:
    """A tensor in the actor's shared memory."""
    content = arange(nbytes)
    tensor = node.kept["t"] = aiordt.empty_like(content).copy_(content)
    return tensor


def share_tree(node: Any) -> dict[str, torch.Tensor]:
    square = aiordt.empty((6000, 70), dtype=torch.float32)
    square.copy_(torch.arange(420_000.0).reshape(6000, 70))
    pair = aiordt.zeros(70_000, dtype=torch.complex128)
    pair.copy_(torch.arange(70_000) * (1 + 2j))
    return {
        "whole": square,
        "transposed": square.T,
        "block": square[100:5000, 2:62],
        "column": square[:, 3],
        "pair": pair[::2],
        "half": aiordt.zeros((300, 300), dtype=torch.bfloat16).fill_(1.5),
        "flags": aiordt.empty(40_000, dtype=torch.bool).copy_(torch.ones(40_000)),
    }


async def copies(node: Any, tree: Any) -> Any:
    """Pull everything, and say by which transports."""
    before = aiordt.stats().by_transport
    got = await aiordt.get(tree)
    after = aiordt.stats().by_transport
    return got, {name: after[name].pulls - getattr(before.get(name), "pulls", 0) for name in after}


async def look(node: Any, ref: aiordt.TensorRef) -> Any:
    before = aiordt.stats().bytes_pulled
    async with ref.view() as tensor:
        return tensor.clone(), tensor.stride(), aiordt.stats().bytes_pulled - before


async def overwrite(node: Any) -> None:
    await aiordt.wait_tensor_freed(node.kept["t"], 10)
    node.kept["t"].fill_(9)


async def test_copies_come_through_shared_memory(nodes: Any) -> None:
    a, b, _ = nodes
    tree = await a.make.remote(share_tree)
    (got, by), wanted = (
        await b.run.remote(copies, tree),
        await aiordt.get(tree, transport="tcp"),
    )
    assert by["shm"] == len(tree)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
        assert (got[name].stride(), got[name].dtype) == (tensor.stride(), tensor.dtype), name


async def test_a_copy_is_private(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(share)
    one, other = await ref, await ref
    one.fill_(0)
    assert torch.equal(other, arange(_NBYTES))
    assert torch.equal(await ref, arange(_NBYTES))


async def test_a_view_moves_nothing(nodes: Any) -> None:
    a, b, _ = nodes
    tree = await a.make.remote(share_tree)
    for name, ref in tree.items():
        tensor, stride, pulled = await b.run.remote(look, ref)
        assert torch.equal(tensor, await ref), name
        assert pulled == 0
        if name == "transposed":
            assert stride == (1, 70), "as it lies at its owner"


async def test_a_view_is_the_owners_memory_and_holds_it(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(share)
    async with ref.view() as tensor:
        ref.release()
        del ref
        overwriting = asyncio.ensure_future(a.run.remote(overwrite))
        done, _ = await asyncio.wait({overwriting}, timeout=0.3)
        assert not done, "the view holds the tensor"
        assert torch.equal(tensor, arange(_NBYTES))
    await asyncio.wait_for(overwriting, 15)
    assert bool((tensor == 9).all()), "and then it sees what its owner wrote"
    del tensor


async def test_views_of_what_needs_none(nodes: Any) -> None:
    """The owner sees its tensor itself, and what came by value is there already."""
    a, _, _ = nodes
    mine = torch.arange(100_000)
    ref = await aiordt.put(mine)
    async with ref.view() as tensor:
        assert tensor.data_ptr() == mine.data_ptr()
    small = await a.make.remote(share, 100)
    assert small.transport is None
    async with small.view() as tensor:
        assert torch.equal(tensor, arange(100))
    empty = await a.make.remote(share, 0)
    async with empty.view() as tensor:
        assert tensor.numel() == 0


def ordinary(node: Any) -> torch.Tensor:
    return arange(_NBYTES)


async def test_what_is_not_shared_says_what_to_do(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(ordinary)
    with pytest.raises(aiordt.UnavailableError, match=r"aiordt\.empty") as info:
        async with ref.view():
            pass
    assert info.value.transport == "shm"
    with pytest.raises(aiordt.UnavailableError, match=r"aiordt\.empty"):
        await aiordt.get(ref, transport="shm")
    with pytest.raises(aiordt.UnavailableError, match=r"aiordt\.empty"):
        await aiordt.put(torch.zeros(100), transport="shm")
    explained = await aiordt.explain(ref)
    assert explained.chosen == "cma"
    assert "aiordt.empty" in explained.reasons["shm"]
    shared = await a.make.remote(share)
    explained = await aiordt.explain(shared)
    assert explained.chosen == "shm"
    assert "shm is preferred" in explained.reasons["cma"]


async def test_a_released_ref_cannot_be_viewed(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(share)
    ref.release()
    with pytest.raises(aiordt.TensorFreedError):
        async with ref.view():
            pass


async def fault(node: Any, ref: aiordt.TensorRef) -> None:
    async with ref.view() as tensor:
        tensor.fill_(0)


async def test_a_write_to_a_view_harms_the_writer_only(nodes: Any, spawn: Any) -> None:  # SHM-3
    a, _, _ = nodes
    ref = await a.make.remote(share)
    writer = spawn()
    with pytest.raises(ray.exceptions.RayActorError):
        await writer.run.remote(fault, ref)
    assert torch.equal(await ref, arange(_NBYTES))


async def keep_a_view(node: Any, ref: aiordt.TensorRef) -> None:
    async with ref.view() as tensor:
        node.kept["view"] = tensor


def sum_of_view(node: Any) -> int:
    return int(node.kept["view"].sum())


async def test_the_owners_end_is_told_and_harms_no_view(nodes: Any, spawn: Any) -> None:  # SHM-2
    _, b, _ = nodes
    owner = spawn()
    ref = await owner.make.remote(share)
    await b.run.remote(keep_a_view, ref)
    assert torch.equal(await ref, arange(_NBYTES))
    await kill(ref.owner.pid)
    with pytest.raises(aiordt.OwnerDiedError):
        await ref
    with pytest.raises(aiordt.OwnerDiedError):
        async with ref.view():
            pass
    assert await b.run.remote(sum_of_view) == int(arange(_NBYTES).sum())


def num_mapped() -> int:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum("memfd:aiordt" in line and " r--s " in line for line in lines)


def shrink(node: Any) -> int:
    """Give all unused segments back, as when memory is short."""
    node.kept.clear()
    gc.collect()
    with arena._lock:
        for segment in list(arena._segments.values()):
            if segment.extents.unused:
                arena._drop(segment)
    return len(arena._segments)


async def test_what_the_owner_gave_up_is_unmapped_here(nodes: Any, spawn: Any) -> None:  # SHM-1
    owner = spawn()
    before = num_mapped()
    ref = await owner.make.remote(share)
    async with ref.view() as tensor:
        assert num_mapped() == before + 1
        assert aiordt.stats().mapped_bytes >= _NBYTES
    ref.release()
    await eventually(lambda: _is_free(owner), what="the tensor is free")
    assert await owner.run.remote(shrink) == 0
    assert num_mapped() == before + 1, "SHM-2: a tensor is left"
    del tensor
    await eventually(lambda: num_mapped() == before, what="the segment is unmapped")
    again = await owner.make.remote(share)
    assert torch.equal(await again, arange(_NBYTES)), "ARN-2: another number, mapped anew"


async def _is_free(node: Any) -> bool:
    return bool((await node.stats.remote()).exports == 0)


async def test_stats_show_shared_memory(nodes: Any) -> None:
    before = aiordt.stats()
    tensor = aiordt.empty(3 * MIB, dtype=torch.uint8)
    after = aiordt.stats()
    assert after.arena_used_bytes >= before.arena_used_bytes + 3 * MIB
    assert after.arena_bytes >= after.arena_used_bytes
    del tensor
