"""The program of `_flow_cluster` on two hosts out of network namespaces, with a slow link."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import ray
import torch

from aiordt.testing._hosts import hosts_unavailable, two_hosts
from benchmarks._flow_cluster import FlowWay, RayWay
from benchmarks._flow_simulator import Program
from benchmarks._measure import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_SECONDS: Final = 60.0


@contextmanager
def program(
    reducers: int, workers: int
) -> Generator[Callable[[Program, int | None], dict[str, tuple[list[float], int]]]]:
    """Two hosts with a driver on one of them.

    Yields:
        Runs a program both ways with the link at so many megabits a second; ``None``: no
        limit. It gives the seconds of each batch, and the bytes that crossed, by way.

    Raises:
        RuntimeError: There can be no hosts here; says why.
    """
    why = hosts_unavailable()
    if why is not None:
        raise RuntimeError(why)
    # Twice the CPUs, so that the workers of the flow leave plain Ray as many slots.
    with (
        two_hosts(num_cpus=workers, object_store_nbytes=500 * MIB) as hosts,
        hosts.h1.start(Path(__file__), str(reducers), str(workers)) as driver,
    ):

        def run(program: Program, megabits: int | None) -> dict[str, tuple[list[float], int]]:
            if megabits is not None:
                hosts.slow(megabits)
            try:
                driver.tell(json.dumps(dataclasses.asdict(program)))
                found: dict[str, tuple[list[float], int]] = json.loads(
                    driver.expect("RESULT ", seconds=_SECONDS)
                )
            finally:
                if megabits is not None:
                    hosts.slow(None)
            return found

        yield run
        driver.wait(seconds=20)


async def _drive(reducers: int, workers: int) -> None:
    ways: dict[str, FlowWay | RayWay] = {
        "aiordt flow": FlowWay(reducers, "group", workers),
        "plain Ray": RayWay(reducers),
    }
    while line := await asyncio.to_thread(sys.stdin.readline):
        program = Program(**json.loads(line))
        found = {name: await way.run(program, count=True) for name, way in ways.items()}
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="error")
    torch.set_num_threads(1)
    asyncio.run(_drive(*map(int, sys.argv[1:])))
    ray.shutdown()
