"""Run by `test_flow_nodes.py`: a flow on two nodes, of which one is lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster

import aiordt
from aiordt import flow
from tests.support import MIB, arange


def base() -> torch.Tensor:
    return arange(MIB)


def add(amount: int, x: torch.Tensor) -> torch.Tensor:
    return x + amount


class Where:
    async def sum(self, *refs: Any) -> tuple[str, float]:
        total = float(sum(tensor.sum() for tensor in await aiordt.get(list(refs))))
        return ray.get_runtime_context().get_node_id(), total


async def scenario(cluster: Cluster, nodes: dict[str, Any]) -> dict[str, Any]:
    async with flow.Context(workers=2) as context:
        maps = flow.Map(add, flow.Broadcast(base, 2), args=[[1], [2]])
        actors = flow.InitActors(Where, 1)
        ((where, total),) = await flow.ReduceActors("sum", actors, maps)
        ran_on = [ref.owner.node_id for ref in await maps]
        placed = [each.node for each in maps.placements if each]
        lost = next(node for node in ran_on if node != where)
        cluster.remove_node(nodes[lost])
        after = flow.Map(add, maps, args=[[10], [20]])
        gathered = await flow.Gather(after)
        right = [torch.equal(each, base() + n) for each, n in zip(gathered, (11, 22), strict=True)]
        await context.look(now=True)
        return {
            "expected": float((base() + 1).sum() + (base() + 2).sum()),
            "total": total,
            "distinct": len(set(ran_on)),
            "as_decided": ran_on == placed,
            "reducer_beside": where == ran_on[0],
            "right": right,
            "left": lost not in context.cluster.nodes,
            "again_on": sorted({ref.owner.node_id == where for ref in await after}),
        }


def main() -> None:
    head = {"num_cpus": 0, "object_store_memory": 100 * MIB, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    added = [cluster.add_node(num_cpus=1, object_store_memory=100 * MIB) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    cluster.wait_for_nodes()
    nodes = {each.node_id: each for each in added}
    print("RESULT", json.dumps(asyncio.run(scenario(cluster, nodes))))  # noqa: T201
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
