"""What `test_mpi_launch.py` runs by ``python -m aiordt.mpi run``: ``mpi_scripts.py <scenario>``.

Of what is found there is one line ``RESULT <json>``; what is asserted stands in the tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import torch

import aiordt
import aiordt.mpi


def tell(found: Any) -> None:
    """In one piece: Ray writes, too."""
    # On a line of its own: Ray's thread may be in the middle of one.
    sys.stdout.write(f"\nRESULT {json.dumps(found)}\n")
    sys.stdout.flush()


def parent_name() -> str:
    return Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip()


class Member(aiordt.AsyncActor):
    def __init__(self) -> None:
        self.comm: Any = None

    async def about(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "parent": parent_name(),
            "world": os.environ["AIORDT_MPI_WORLD"],
            "secret": [name for name in os.environ if name.startswith("AIORDT_MPI_")],
            "node": ray.get_runtime_context().get_node_id(),
            "variable": os.environ.get("MEMBER_VARIABLE"),
        }

    @aiordt.method
    async def made(self) -> Any:
        return torch.ones(100_000)

    async def imported(self) -> bool:
        from mpi4py import MPI  # noqa: PLC0415

        return bool(MPI.Is_initialized())

    async def join(self, ranks: list[int]) -> list[int]:
        """Make a communicator of some ranks, by mpi4py."""
        from mpi4py import MPI  # noqa: PLC0415

        world = MPI.COMM_WORLD
        group = world.Get_group().Incl(ranks)
        self.comm = await asyncio.to_thread(world.Create_group, group, 7)
        return [world.rank, world.size, self.comm.rank, self.comm.size]

    async def allreduce(self) -> float:
        import numpy as np  # noqa: PLC0415
        from mpi4py import MPI  # noqa: PLC0415

        values = np.full(1000, float(MPI.COMM_WORLD.rank))
        await asyncio.to_thread(self.comm.Allreduce, MPI.IN_PLACE, values)
        return float(values.sum())

    async def die(self, how: str) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)


class Plain:
    """No `AsyncActor`."""

    def pid(self) -> int:
        return os.getpid()


Actor: Any = ray.remote(num_cpus=0)(Member)
PlainActor: Any = ray.remote(num_cpus=0)(Plain)


async def refusal(make: Any) -> str:
    """How an actor's first call ends that cannot become a rank."""
    try:
        await asyncio.wait_for(make().pid.remote(), 30)
    except ray.exceptions.ActorDiedError as exc:
        return f"died: {exc}"
    except aiordt.UsageError as exc:
        return f"refused: {exc}"
    return "made"


async def whole() -> dict[str, Any]:
    world = aiordt.mpi.world()
    variables = {"env_vars": {"MEMBER_VARIABLE": "set"}}
    first_options = world.worker(1, runtime_env=variables)
    first = Actor.options(**first_options).remote()
    (second,) = await world.spawn(Actor, 1)
    members = [first, second]
    found: dict[str, Any] = {"ranks": [[r.rank, r.pid, r.node_id] for r in world.ranks]}
    ordinary = Actor.remote()  # it inherits what the script's environment has
    found["pulled"] = [
        float((await aiordt.get(await each.made.remote())).sum()) for each in [*members, ordinary]
    ]
    found["own"] = os.getpid()
    found["about"] = await asyncio.gather(*[each.about.remote() for each in members])
    found["twice"] = await refusal(lambda: PlainActor.options(**world.worker(1)).remote())
    found["again"] = await refusal(lambda: PlainActor.options(**first_options).remote())
    found["early"] = await asyncio.gather(*[each.imported.remote() for each in members])
    await world.init_mpi()
    found["joined"] = await asyncio.gather(*[each.join.remote([1, 2]) for each in members])
    found["sums"] = await asyncio.gather(*[each.allreduce.remote() for each in members])
    found["late"] = await refusal(lambda: PlainActor.options(**world.worker(3)).remote())
    from mpi4py import MPI  # noqa: PLC0415

    found["driver"] = [MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size]
    found["leaked"] = [name for name in os.environ if name.startswith(("PMI", "OMPI_"))]
    del first, second, members  # an actor that is a rank outlives its handles
    return found


async def death(how: str) -> dict[str, Any]:
    world = aiordt.mpi.world()
    members = await world.spawn(Actor, 2)
    if how == "killed":
        await world.init_mpi()
    about = await members[0].about.remote()
    tell({"pid": about["pid"]})
    members[0].die.remote(how)
    await asyncio.Event().wait()
    return {}


async def interrupted() -> dict[str, Any]:
    world = aiordt.mpi.world()
    await world.spawn(Actor, 1)
    await world.init_mpi()
    tell({"script": os.getpid()})
    await asyncio.Event().wait()
    return {}


async def selfish() -> str:
    """The script has initialised MPI itself, before it asked for its world."""
    world = aiordt.mpi.world()
    try:
        await world.init_mpi()
    except aiordt.UnavailableError as exc:
        return exc.reason
    return "initialised"


async def hosts() -> dict[str, Any]:
    world = aiordt.mpi.world()
    members = await world.spawn(Actor, 3)
    await world.init_mpi()
    ranks = [1, 2, 3]
    return {
        "ranks": [[r.rank, r.pid, r.node_id] for r in world.ranks],
        "about": await asyncio.gather(*[each.about.remote() for each in members]),
        "joined": await asyncio.gather(*[each.join.remote(ranks) for each in members]),
        "sums": await asyncio.gather(*[each.allreduce.remote() for each in members]),
    }


def main() -> None:
    name, *args = sys.argv[1:]
    if name == "bare":  # neither Ray nor MPI
        tell({"argv": args})
        sys.exit(5)
    if name == "selfish":
        from mpi4py import MPI  # noqa: F401, PLC0415
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="ERROR", log_to_driver=False)
    else:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    scenarios: list[Any] = [whole, death, interrupted, selfish, hosts]
    chosen = next(each for each in scenarios if each.__name__ == name)
    tell(asyncio.run(chosen(*args)))
    if name == "whole":
        world = aiordt.mpi.world()
        ray.shutdown()
        try:
            asyncio.run(world.spawn(Actor, 1))
        except aiordt.ClosedError as exc:
            tell(str(exc))
        sys.exit(3)


if __name__ == "__main__":
    main()
