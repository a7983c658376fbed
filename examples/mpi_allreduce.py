"""An allreduce by MPI between actors, in either of two ways, with ``aiordt[mpi]`` installed.

``python examples/mpi_allreduce.py``: ordinary actors, each of which initialises MPI when the
group forms. ``python -m aiordt.mpi run -n 4 -- examples/mpi_allreduce.py``: mpiexec starts four
processes; the first runs this script, and the actors become the others.
"""

from __future__ import annotations

import argparse
import asyncio

import ray
import torch

import aiordt
import aiordt.mpi


@ray.remote(num_cpus=0)
class Worker(aiordt.AsyncActor):
    """A member of the group."""

    async def step(self, numel: int) -> tuple[int, str, float]:
        """Add up what all members have: the rank, by what it moved, and the sum."""
        group = self.group("workers")
        t = torch.full((numel,), float(group.rank + 1))
        await group.allreduce(t)  # in place; the event loop goes on meanwhile
        return group.rank, group.backend, float(t.mean())


async def main(num_workers: int, numel: int) -> None:
    """Make a group, use it, and check what it gave."""
    try:
        world = aiordt.mpi.world()
    except aiordt.UsageError:  # no mpiexec has started this script
        workers = [Worker.remote() for _ in range(num_workers)]
    else:
        num_workers = world.size - 1
        workers = await world.spawn(Worker, num_workers)
    expected = num_workers * (num_workers + 1) / 2
    async with await aiordt.create_group(workers, backend="mpi", name="workers"):
        results = await asyncio.gather(*[worker.step.remote(numel) for worker in workers])
    for rank, backend, mean in results:
        print(f"rank {rank}: {backend}, the mean is {mean}")
        if mean != expected:
            raise SystemExit(f"expected {expected}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An allreduce by MPI between Ray actors.")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--numel", type=int, default=1_000_000)
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    asyncio.run(main(options.workers, options.numel))
    ray.shutdown()
