"""The same program as a flow and as plain Ray, on several raylets of this machine."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray
import torch
from ray.cluster_utils import Cluster

import aiordt
from aiordt import flow
from aiordt._relay import MIN_NBYTES
from benchmarks._cluster import start
from benchmarks._measure import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

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


def generate_shared(nbytes: int) -> torch.Tensor:
    """As `generate`, where others read it without a copy."""
    return aiordt.empty(nbytes // 4).fill_(1)


def step(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def cut(parts: int, x: torch.Tensor) -> torch.Tensor:
    return x.view(parts, -1).sum(0)


def pass_on(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1)


def cut_off(parts: int, x: torch.Tensor) -> torch.Tensor:
    return x.view(parts, -1)[0]


@dataclass(frozen=True, slots=True)
class Functions:
    """What the maps of a program run.

    Attributes:
        step: The first two.
        cut: The last one, to a piece.
        share: The sum of a piece, for each element that a map gets.
    """

    step: Callable[[torch.Tensor], torch.Tensor]
    cut: Callable[[int, torch.Tensor], torch.Tensor]
    share: float


#: They read and write all bytes.
WORKING: Final = Functions(step, cut, 3.0)
#: They return views, so that what is timed is placement, calls and transfers.
PASSING: Final = Functions(pass_on, cut_off, 0.25)


def summed(parts: Sequence[torch.Tensor]) -> float:
    return float(sum(part.sum() for part in parts))


def expected(program: Program, functions: Functions) -> float:
    """What each reducer gets."""
    return functions.share * program.maps * (program.nbytes // 4)


class FlowReducer(aiordt.AsyncActor):
    """A reducer that pulls its parts."""

    async def reduce(self, *refs: aiordt.TensorRef) -> tuple[float, str]:
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
        reducers: How many.
        placement: Of the context.
        workers: How many.
    """

    def __init__(self, reducers: int, placement: str, workers: int) -> None:
        self._placement = placement
        self._workers = workers
        self._reducers = flow.InitActors(FlowReducer, reducers)

    async def run(
        self, program: Program, functions: Functions = WORKING, *, count: bool = False
    ) -> tuple[list[float], int]:
        """Run the program's batches on one broadcast.

        Args:
            program: What runs.
            functions: What its maps do.
            count: Count what crosses, by where each result is and where it was used.

        Returns:
            The seconds that each batch took, and the bytes that crossed.
        """
        seconds = []
        crossed = 0
        async with flow.Context(self._placement, self._workers):
            many = flow.Broadcast(generate_shared, program.maps, args=[program.nbytes])
            seen: set[Any] = set()
            for _ in range(program.batches):
                begun = time.perf_counter()
                first = flow.Map(functions.step, many)
                second = flow.Map(functions.step, first)
                parts = program.nbytes // program.piece
                cuts = flow.Map(functions.cut, second, args=[[parts]] * program.maps)
                out = await flow.ReduceActors("reduce", self._reducers, cuts)
                seconds.append(time.perf_counter() - begun)
                check([total for total, _ in out], program, functions)
                if count:
                    users = [node for _, node in out]
                    crossed += await _crossed([many, first, second, cuts], users, seen)
        return seconds, crossed

    async def aclose(self) -> None:
        """End its reducers."""
        if any(self._reducers.placements):  # else they were never made
            for handle in await self._reducers:
                ray.kill(handle)


async def _crossed(nodes: Sequence[flow.Node], last: list[str], seen: set[Any]) -> int:
    """Bytes that crossed to where each node's elements were used: the next one's, then ``last``."""
    rows = [await node for node in nodes]
    users = [[[ref.owner.node_id] for ref in row] for row in rows[1:]] + [[last] * len(rows[-1])]
    total = 0
    for row, used in zip(rows, users, strict=True):
        for ref, places in zip(row, used, strict=True):
            for place in places:
                if place == ref.owner.node_id:
                    continue
                # One crossing for a node, but of what is too small for the relay.
                if (ref, place) not in seen or ref.nbytes < MIN_NBYTES:
                    seen.add((ref, place))
                    total += ref.nbytes
    return total


# --- as plain Ray ------------------------------------------------------------------------------


@ray.remote
def task(function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401
    return function(*args)


class RayWay:
    """The program as Ray's manual would write it.

    Args:
        reducers: How many.
    """

    def __init__(self, reducers: int) -> None:
        self._reducers = [start(RayReducer) for _ in range(reducers)]

    async def run(
        self, program: Program, functions: Functions = WORKING, *, count: bool = False
    ) -> tuple[list[float], int]:
        """As `FlowWay.run`; what crosses is counted by the copies that Ray made."""
        seconds = []
        refs = []
        source = task.remote(generate, program.nbytes)
        for _ in range(program.batches):
            begun = time.perf_counter()
            first = [task.remote(functions.step, source) for _ in range(program.maps)]
            second = [task.remote(functions.step, each) for each in first]
            parts = program.nbytes // program.piece
            cuts = [task.remote(functions.cut, parts, each) for each in second]
            out = await asyncio.gather(*(actor.reduce.remote(*cuts) for actor in self._reducers))
            seconds.append(time.perf_counter() - begun)
            check([total for total, _ in out], program, functions)
            refs += [*first, *second, *cuts] if count else []
        crossed = 0
        if count:
            for each in ray.experimental.get_object_locations([*refs, source]).values():
                copies = max(len(each["node_ids"]) - 1, 0)
                crossed += copies * (each["object_size"] or 0)
        return seconds, crossed

    async def aclose(self) -> None:
        """End its reducers."""
        for handle in self._reducers:
            ray.kill(handle)


def check(totals: Sequence[float], program: Program, functions: Functions) -> None:
    """What came out is right, to the rounding of float32."""
    wanted = expected(program, functions)
    for total in totals:
        if abs(total - wanted) > 1e-3 * wanted:
            raise RuntimeError(f"a reducer got {total}, not {wanted}")
