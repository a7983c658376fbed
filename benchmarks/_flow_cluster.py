"""The same program as a flow and as plain Ray, on several raylets of this machine."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.cluster_utils import Cluster

import aiordt
from aiordt import flow
from benchmarks._measure import MIB

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from benchmarks._flow_simulator import Program


@contextmanager
def raylets(nodes: int, cpus: int) -> Generator[None]:
    """A cluster of some nodes, and a head without CPUs; all of it on this machine."""
    head = {"num_cpus": 0, "object_store_memory": 200 * MIB, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=cpus, object_store_memory=700 * MIB)
        ray.init(address=made.address, logging_level="error", log_to_driver=False)
        made.wait_for_nodes()
        torch.set_num_threads(1)
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def here() -> str:
    """The node of the process that runs this."""
    return str(ray.get_runtime_context().get_node_id())


# --- what both programs do -------------------------------------------------------------------


def generate(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes // 4)


def step(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def cut(parts: int, x: torch.Tensor) -> torch.Tensor:
    return x.view(parts, -1).sum(0)


def summed(parts: Sequence[torch.Tensor]) -> float:
    return float(sum(part.sum() for part in parts))


def expected(program: Program) -> float:
    """What each reducer gets."""
    return 3.0 * program.maps * (program.nbytes // 4)


class FlowReducer(aiordt.AsyncActor):
    """A reducer that pulls its parts."""

    async def reduce(self, *refs: Any) -> tuple[float, str]:
        return summed(await aiordt.get(list(refs))), here()


@ray.remote
class RayReducer:
    """A reducer that Ray brings its parts to."""

    def reduce(self, *parts: torch.Tensor) -> tuple[float, str]:
        return summed(parts), here()


# --- as a flow ---------------------------------------------------------------------------------


class FlowWay:
    """The program as a flow; its reducers live as long as it.

    Args:
        program: What runs.
        placement: Of the context.
        workers: How many.
    """

    def __init__(self, program: Program, placement: str, workers: int) -> None:
        self._program = program
        self._placement = placement
        self._workers = workers
        self._reducers = flow.InitActors(FlowReducer, program.reducers)
        self.crossed = 0

    async def run(self, *, batches: int, count: bool = False) -> list[float]:
        """Run some batches on one broadcast; the seconds that each took.

        Args:
            batches: How many.
            count: Count what crosses, by where each result is and where it was used.
        """
        program = self._program
        seconds = []
        async with flow.Context(self._placement, self._workers):
            many = flow.Broadcast(generate, program.maps, args=[program.nbytes])
            seen: set[Any] = set()
            for _ in range(batches):
                begun = time.perf_counter()
                first = flow.Map(step, many)
                second = flow.Map(step, first)
                parts = program.nbytes // program.piece
                cuts = flow.Map(cut, second, args=[[parts]] * program.maps)
                out = await flow.ReduceActors("reduce", self._reducers, cuts)
                seconds.append(time.perf_counter() - begun)
                check([total for total, _ in out], program)
                if count:
                    where = [{node for _, node in out}] * program.maps
                    await self._count([many, first, second, cuts], where, seen)
        return seconds

    async def _count(self, nodes: list[flow.Node], last: list[set[str]], seen: set[Any]) -> None:
        rows = [await node for node in nodes]
        users = [[{ref.owner.node_id} for ref in row] for row in rows[1:]] + [last]
        for row, used in zip(rows, users, strict=True):
            for ref, places in zip(row, used, strict=True):
                for place in places - {ref.owner.node_id}:
                    if (ref, place) not in seen:  # one crossing for a node
                        seen.add((ref, place))
                        self.crossed += ref.nbytes

    async def aclose(self) -> None:
        """End its reducers."""
        for handle in await self._reducers:
            ray.kill(handle)


# --- as plain Ray ------------------------------------------------------------------------------


@ray.remote
def task(function: Any, *args: Any) -> Any:
    return function(*args)


class RayWay:
    """The program as Ray's manual would write it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._reducers = [RayReducer.remote() for _ in range(program.reducers)]
        self.crossed = 0

    async def run(self, *, batches: int, count: bool = False) -> list[float]:
        """As `FlowWay.run`; what crosses is counted by the copies that Ray made."""
        program = self._program
        seconds = []
        refs = []
        source = None
        for _ in range(batches):
            begun = time.perf_counter()
            source = source or task.remote(generate, program.nbytes)
            first = [task.remote(step, source) for _ in range(program.maps)]
            second = [task.remote(step, each) for each in first]
            parts = program.nbytes // program.piece
            cuts = [task.remote(cut, parts, each) for each in second]
            out = await asyncio.gather(*(actor.reduce.remote(*cuts) for actor in self._reducers))
            seconds.append(time.perf_counter() - begun)
            check([total for total, _ in out], program)
            refs += [*first, *second, *cuts] if count else []
        if count:
            found = ray.experimental.get_object_locations([*refs, source])
            for each in found.values():
                copies = len(each["node_ids"]) - 1
                self.crossed += max(copies, 0) * (each["object_size"] or 0)
        return seconds

    async def aclose(self) -> None:
        """End its reducers."""
        for handle in self._reducers:
            ray.kill(handle)


def check(totals: Sequence[float], program: Program) -> None:
    """What came out is right, to the rounding of float32."""
    for total in totals:
        if abs(total - expected(program)) > 1e-3 * expected(program):
            raise RuntimeError(f"a reducer got {total}, not {expected(program)}")
