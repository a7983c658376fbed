"""NIXL between real actors, when somebody asks for it by name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

import aiordt
from aiordt.transports import probe
from tests.support import MIB, arange, kill

if TYPE_CHECKING:
    from collections.abc import Callable

available = probe("nixl")
pytestmark = pytest.mark.skipif(not available.usable, reason=f"nixl: {available.reason}")


def tensors(_: Any) -> dict[str, torch.Tensor]:
    square = torch.arange(420_000.0).reshape(6000, 70)
    return {
        "large": arange(20 * MIB),
        "shared": aiordt.empty(1000).copy_(torch.arange(1000.0)),
        "transposed": square.T,
        "block": square[100:5000, 2:62],
        "few": torch.arange(5),
        "none": torch.zeros(0, 3),
    }


async def pull(_: Any, tree: Any) -> Any:
    """Pull twice, into new memory and into what that was, by NIXL."""
    before = aiordt.stats().by_transport.get("nixl")
    got = await aiordt.get(tree, transport="nixl")
    again = await aiordt.get(tree, transport="nixl", into=got)
    after = aiordt.stats().by_transport["nixl"]
    assert aiordt.stats().registrations > 0
    assert aiordt.stats().registered_bytes >= 20 * MIB, "the targets"
    return again, after.pulls - (before.pulls if before else 0)


async def test_trees_arrive_by_nixl(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.run.remote(lambda node: aiordt.put(tensors(node), transport="nixl"))
    got, pulls = await b.run.remote(pull, refs)
    for name, tensor in tensors(None).items():
        assert torch.equal(got[name], tensor), name
    assert pulls > 0


@pytest.mark.skipif(not available.on_demand, reason="there is an RDMA device here")
async def test_it_is_used_on_demand_only(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    explained = await nodes[1].run.remote(lambda _, ref: aiordt.explain(ref), ref)
    assert explained.chosen == "cma"
    assert "on demand" in explained.reasons["nixl"]


async def test_a_dead_owner_is_an_error(nodes: Any, spawn: Callable[..., Any]) -> None:  # DTH-1
    owner = spawn()
    first, second = [await owner.make.remote(lambda _: arange(100_000)) for _ in range(2)]

    async def pull_from_the_dead(_: Any, refs: Any, pid: int) -> None:
        await aiordt.get(refs[0], transport="nixl")
        await kill(pid)
        for ref in refs:
            with pytest.raises(aiordt.OwnerDiedError):
                await aiordt.get(ref, transport="nixl")

    pid = await owner.run.remote(lambda _: os.getpid())
    await nodes[0].run.remote(pull_from_the_dead, [first, second], pid)
