"""A flow between two real hosts; one of the scenarios of `drivers.py`."""

from __future__ import annotations

from typing import Any

import ray
import torch

import aiordt
from aiordt import flow

MIB = 1 << 20


def generate(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes // 4)


def step(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def quarter(x: torch.Tensor) -> torch.Tensor:
    return x.view(4, -1).sum(0)


def by_tcp(_actor: object = None) -> int:
    entry = aiordt.stats().by_transport.get("tcp")
    return 0 if entry is None else entry.nbytes


class Reducer:
    async def reduce(self, *refs: Any) -> tuple[float, str]:
        total = float(sum(tensor.sum() for tensor in await aiordt.get(list(refs))))
        return total, ray.get_runtime_context().get_node_id()


async def flow_graph() -> dict[str, Any]:
    """One map on each host, and a reducer beside one of them."""
    async with flow.Context(workers=2) as context:
        maps = flow.Map(step, flow.Broadcast(generate, 2, args=[4 * MIB]))
        pieces = flow.Map(quarter, maps)
        reducers = flow.InitActors(Reducer, 1)
        ((total, where),) = await flow.ReduceActors("reduce", reducers, pieces)
        actors = [*(remote.handle for remote in context.pool.workers), *(await reducers)]
        moved = [await actor.__ray_call__.remote(by_tcp) for actor in actors]
        ran_on = [ref.owner.node_id for ref in await maps]
    await flow.release_workers()
    return {
        "total": total,
        "tcp": sum(moved),
        "hosts": len(set(ran_on)),
        "beside": where in ran_on,
    }
