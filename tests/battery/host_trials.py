"""Trials that need a driver of their own, or two hosts.

On two hosts the battery runs inside host 1, as a driver; what is done to the hosts, the process
that made them does (`on_two_hosts`): it is asked by a line on stdout, and answers on stdin.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import ray
from typing_extensions import override

from aiordt.testing import eventually
from aiordt.testing._hosts import two_hosts
from tests import worker
from tests.battery import trials
from tests.battery.actors import Holder, Reader, Result
from tests.battery.trials import LIMIT_SECONDS, Actors, Body, Trial

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

#: Where actors that outlive their driver have their names.
NAMESPACE: Final = "battery"
#: By what tensors move between hosts.
BETWEEN_HOSTS: Final = ("tcp", "ucx")
#: So slow that a transfer is under way for a while: 40 MiB for 0.8 s.
_MEGABITS: Final = 400
_START_SECONDS: Final = 60.0
#: In which an owner has heard of a holder's death, and would have freed what it must not.
_SETTLE_SECONDS: Final = 4.0
_ASKING: Final = "DO "


@dataclass(slots=True)
class PlacedActors(Actors):
    """Those of two hosts.

    ``"holder"`` and ``"far reader"`` are on host 2; ``"near holder"`` and ``"reader"`` on host 1.
    """

    spare: int = 0

    @override
    def _start(self, kind: str) -> Any:
        cls = Reader if kind.endswith("reader") else Holder
        host = "h2" if kind in {"holder", "far reader"} else "h1"
        actor = ray.remote(cls).options(num_cpus=0, resources={host: 1}).remote()
        self.all.append(actor)
        return actor


async def _ask(action: str) -> None:
    """Have something done to the hosts."""
    print(f"\n{_ASKING}{action}", flush=True)  # noqa: T201  (see `on_two_hosts`)
    if not await asyncio.to_thread(sys.stdin.readline):
        raise EOFError("the process that made the hosts has gone")


def on_two_hosts(arguments: list[str]) -> int:
    """Run the battery on two hosts; its exit status."""
    with two_hosts(environment=worker.environment()) as hosts:
        hosts.slow(_MEGABITS)
        actions: dict[str, Callable[[], None]] = {
            "cut": partial(hosts.cut, silently=True),
            "unplug": hosts.cut,
            "restore": hosts.restore,
            "kill the node": hosts.kill_node,
            "start a node": hosts.start_node,
        }
        command = [sys.executable, "-m", "tests.battery", *arguments]
        with hosts.h1.start_command(*command) as program:
            with suppress(EOFError):
                while True:
                    line = program.expect("", seconds=300)
                    if line.startswith(_ASKING):
                        actions[line.removeprefix(_ASKING)]()
                        program.tell("done")
                    elif line:
                        print(line, flush=True)  # noqa: T201  (it is the program's)
            return program.wait(seconds=60).exit_code


async def _lent(trial: Trial, actors: Actors) -> tuple[list[Any], Any]:
    """Actors of both hosts, those of either with something of the other's; the first one's ref."""
    kinds = ("holder", "far reader", "near holder", "reader")
    taken = [await actors.take(kind) for kind in kinds]
    holder, far, near, _ = taken
    ref = await trials._exported(holder, trial)
    await far.hold.remote([await trials._exported(near, trial)])
    return taken, ref


async def _under_way(trial: Trial, rng: random.Random, pulling: asyncio.Future[None]) -> None:
    """Wait until some of a pull between hosts is done, or all of it."""
    seconds = trial.nbytes * 8 / (_MEGABITS * 1e6)
    await asyncio.wait({pulling}, timeout=rng.uniform(0, 1.2 * seconds))
    trial.struck = not pulling.done()


async def _kill_node(trial: Trial, rng: random.Random, actors: Actors) -> None:
    """Ray's node of the owner fails: its actors die, and what they held is back."""
    (_, _, near, reader), ref = await _lent(trial, actors)
    pulling = asyncio.ensure_future(trials._pulled(reader, ref, trial))
    await _under_way(trial, rng, pulling)
    await _ask("kill the node")
    try:
        await pulling
        trials._expect(trial, "data", "OwnerDiedError", "PeerLostError")
        await near.freed.remote(LIMIT_SECONDS)
        del ref
        await trials._works(reader, near, trial)
        actors.give_back("near holder", near)
        actors.give_back("reader", reader)
    finally:
        await eventually(_is_seen, what="Ray sees that the node is gone", within=_START_SECONDS)
        await _ask("start a node")


def _is_seen() -> bool:
    return sum(node["Alive"] for node in ray.nodes()) == 1


async def _partition(trial: Trial, rng: random.Random, actors: Actors) -> None:
    """The hosts do not see each other for a while; both live."""
    (holder, far, near, reader), ref = await _lent(trial, actors)
    pulling = asyncio.ensure_future(trials._pulled(reader, ref, trial))
    await _under_way(trial, rng, pulling)
    await _ask(rng.choice(("cut", "unplug")))
    try:
        begun = asyncio.ensure_future(reader.pull.remote([ref], trial.seed, None, None))
        cancelled: Result = await reader.pull.remote([ref], trial.seed, None, rng.uniform(0, 0.3))
        await asyncio.sleep(rng.choice((0.1, 3.0, 11.0)))  # so long are they apart
    finally:
        await _ask("restore")
    await pulling
    trials._expect(trial, "data", "PeerLostError", "TransferError")
    if cancelled.outcome not in {"CancelledError", "data"}:
        trial.failed = f"cancelling ended with {cancelled.outcome}: {cancelled.text}"
    other: Result = await begun
    if (
        other.outcome not in {"data", "PeerLostError", "TransferError"}
        or other.seconds > LIMIT_SECONDS
    ):
        trial.failed = f"begun meanwhile: {other}"
    again: Result = await reader.pull.remote([ref], trial.seed, None, None)
    if again.outcome != "data":
        trial.failed = f"afterwards the ref gave {again.outcome}: {again.text}"
    if (await near.counts.remote())["exports"] != 1:
        trial.failed = "freed while the other host held it"
    await far.hold.remote([])
    await near.freed.remote(LIMIT_SECONDS)
    del ref
    await trials._works(far, near, trial)
    actors.give_back("far reader", far)
    actors.give_back("near holder", near)
    await trials._went_well(trial, actors, reader, holder, "holder")


async def _kill_driver(trial: Trial, rng: random.Random, actors: Actors) -> None:
    """A driver is killed, whose actors outlive it: what it held is back, and they go on."""
    number = f"{trial.seed} {os.getpid()}"
    address = ray.get_runtime_context().gcs_address
    arguments = [address, number, str(trial.seed), str(trial.nbytes), trial.transport]
    driver = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tests.battery.driver", *arguments],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert driver.stdout is not None
        async with asyncio.timeout(_START_SECONDS):
            while await driver.stdout.readline() != b"READY\n":
                if driver.stdout.at_eof():
                    raise EOFError("the driver ended by itself")
        holder, reader = [
            ray.get_actor(f"{kind} {number}", NAMESPACE) for kind in ("holder", "reader")
        ]
        actors.all += [holder, reader]
        strike = trials._strike(trial, rng, "kill", driver.pid)
        await trials._noted(trial, reader.pull_held.remote(0, trial.seed, strike))
        trials._expect(trial, "data", "OwnerDiedError")
    finally:
        with suppress(ProcessLookupError):
            driver.kill()
        await driver.wait()
    await asyncio.sleep(_SETTLE_SECONDS)
    other: Result = await reader.pull_held.remote(1, trial.seed, None)
    if other.outcome != "data":
        trial.failed = f"the holder's tensor gave {other.outcome}: {other.text}"
    if (await holder.counts.remote())["exports"] != 1:
        trial.failed = "freed while the reader held it"
    await reader.hold.remote([])
    await holder.freed.remote(LIMIT_SECONDS)
    await trials._works(reader, holder, trial)
    for actor in (holder, reader):
        await actors.end(actor)
        actors.all.remove(actor)


#: One host is enough for these, ...
OF_DRIVERS: Final[dict[str, Body]] = {"kill the driver": _kill_driver}
#: ... and these need two.
OF_HOSTS: Final[dict[str, Body]] = {
    "kill the owner's node": _kill_node,
    "partition": _partition,
}
