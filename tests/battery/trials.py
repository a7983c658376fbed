"""Trials: what is done to a transfer, and what must come of it.

Everything that a trial chooses follows from its seed; what it meets, where a process is at that
moment, does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from typing_extensions import override

from aiordt.testing import eventually
from tests.battery.actors import Holder, Reader, Result, Strike
from tests.support import process_state

MIB: Final = 1 << 20
#: In which each trial's transfer must have ended.
LIMIT_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 5.0
_SIZES: Final = (100_000, MIB, 8 * MIB, 40 * MIB)
#: Where a pull by each transport comes by, in the process that pulls, and in the owner.
READING: Final = {
    "cma": ("pull.admitted", "cma.chunk", "pull.arrived"),
    "shm": ("pull.admitted", "shm.chunk", "pull.arrived"),
    "tcp": ("pull.admitted", "tcp.asking", "tcp.receiving", "pull.arrived"),
    "ucx": ("pull.admitted", "ucx.asking", "ucx.receiving", "pull.arrived"),
    "nixl": ("pull.admitted", "nixl.chunk", "pull.arrived"),
}
SENDING: Final = {"tcp": ("tcp.sending",), "ucx": ("ucx.sending",)}


@dataclass(slots=True, kw_only=True)
class Trial:
    """One of them.

    Attributes:
        seed: By which it can be made again.
        fault: What is done.
        transport: By which the tensor moves.
        nbytes: Its size.
        point: The phase at which it is done; empty: at no phase.
        outcome: How the pull ended.
        text: The error's message.
        seconds: How long it took.
        struck: Whether the fault happened.
        failed: What was wrong; empty: nothing.
    """

    seed: int
    fault: str
    transport: str
    nbytes: int
    point: str = ""
    outcome: str = ""
    text: str = ""
    seconds: float = 0.0
    struck: bool = False
    failed: str = ""

    @override
    def __str__(self) -> str:
        what = f"{self.fault}, {self.transport}, {self.nbytes} B, at {self.point or 'no point'}"
        return f"seed {self.seed}: {what}: {self.outcome} in {self.seconds:.2f} s"


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return process_state(pid) in {"Z", "X"}
    except OSError:
        return True


@dataclass(slots=True)
class Actors:
    """Those that are there; who was killed is replaced.

    Attributes:
        spare: How many of a kind are ready when one is killed.
        all: All of them.
    """

    spare: int = 1
    _idle: dict[str, list[Any]] = field(default_factory=dict)
    all: list[Any] = field(default_factory=list)

    async def take(self, kind: str) -> Any:
        """One of a kind: ``"holder"``, ``"hidden"``, ``"restarting"``, ``"reader"``."""
        idle = self._idle.setdefault(kind, [])
        while len(idle) <= self.spare:
            idle.append(self._start(kind))
        actor = idle.pop(0)
        if not hasattr(actor, "_battery_pid"):
            actor._battery_pid = await actor.pid.remote()
            if kind == "hidden":
                await actor.hide.remote()
        return actor

    def give_back(self, kind: str, actor: Any) -> None:
        """It is as it was."""
        self._idle[kind].insert(0, actor)

    def _start(self, kind: str) -> Any:
        cls = Reader if kind == "reader" else Holder
        options: dict[str, Any] = {"num_cpus": 0}
        if kind == "restarting":
            options["max_restarts"] = 1
        actor = ray.remote(cls).options(**options).remote()
        self.all.append(actor)
        return actor

    async def end(self, actor: Any) -> None:
        """End an actor that a trial has left in doubt."""
        ray.kill(actor)
        pid = getattr(actor, "_battery_pid", 0)
        if pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    async def end_all(self) -> None:
        """End every one."""
        for actor in self.all:
            await self.end(actor)
        self.all.clear()
        self._idle.clear()


Body = Callable[["Trial", random.Random, Actors], Awaitable[None]]


async def _exported(holder: Any, trial: Trial) -> Any:
    (ref,) = await holder.export.remote(trial.seed, trial.nbytes, trial.transport)
    return ref


async def _pulled(
    reader: Any, ref: Any, trial: Trial, strike: Strike | None = None, after: float | None = None
) -> None:
    """Pull, and note in the trial how that ended."""
    await _noted(trial, reader.pull.remote([ref], trial.seed, strike, after))


async def _noted(trial: Trial, pulling: Awaitable[Result]) -> None:
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(LIMIT_SECONDS + _STOP_SECONDS):
            result = await pulling
    except ray.exceptions.RayActorError:
        trial.outcome, trial.struck = "RayActorError", True
        trial.seconds = time.perf_counter() - begun
        return
    except TimeoutError:
        trial.outcome, trial.seconds = "HUNG", time.perf_counter() - begun
        return
    trial.outcome, trial.text, trial.seconds = result.outcome, result.text, result.seconds
    trial.struck = trial.struck or result.struck


async def _works(reader: Any, holder: Any, trial: Trial) -> None:
    """The survivors go on: another pull, and all counts as before."""
    ref = await _exported(holder, trial)
    async with asyncio.timeout(LIMIT_SECONDS):
        result: Result = await reader.pull.remote([ref], trial.seed, None, None)
    if result.outcome != "data":
        trial.failed = f"the next pull ended with {result.outcome}: {result.text}"
    del ref
    await holder.freed.remote(LIMIT_SECONDS)
    for actor in (holder, reader):
        await _is_clean(actor)


async def _is_clean(actor: Any) -> None:
    async def clean() -> bool:
        counts = await actor.counts.remote()
        return not any(counts.values())

    await eventually(clean, what="the counts are back", within=LIMIT_SECONDS)


async def _went_well(trial: Trial, actors: Actors, reader: Any, holder: Any, kind: str) -> None:
    """Both are there, and the ref is dropped: the tensor is freed, and they go on."""
    await holder.freed.remote(LIMIT_SECONDS)
    await _works(reader, holder, trial)
    actors.give_back(kind, holder)
    actors.give_back("reader", reader)


def _strike(trial: Trial, rng: random.Random, action: str, pid: int = 0) -> Strike:
    trial.point = rng.choice(READING[trial.transport])
    chunks = max(1, trial.nbytes // (8 * MIB))
    occurrence = rng.randint(1, chunks) if "chunk" in trial.point else 1
    return Strike(trial.point, occurrence, action, pid)


def _expect(trial: Trial, *outcomes: str) -> None:
    if trial.outcome not in outcomes:
        trial.failed = f"it ended with {trial.outcome}: {trial.text}"
    elif trial.seconds > LIMIT_SECONDS:
        trial.failed = f"it took {trial.seconds:.1f} s"


async def _kill_owner(trial: Trial, rng: random.Random, actors: Actors) -> None:
    holder, reader = await actors.take("holder"), await actors.take("reader")
    ref = await _exported(holder, trial)
    pid = holder._battery_pid
    sending = SENDING.get(trial.transport, ())
    if sending and rng.random() < 0.5:
        trial.point = rng.choice(sending)
        await holder.prepare.remote(Strike(trial.point, 1, "kill", pid))
        await _pulled(reader, ref, trial)
        trial.struck = is_gone(pid)
    else:
        await _pulled(reader, ref, trial, _strike(trial, rng, "kill", pid))
    _expect(trial, "OwnerDiedError", "data")
    if trial.outcome == "OwnerDiedError" and not trial.struck:
        trial.failed = "the owner was said to be dead"
    await actors.end(holder)
    del ref
    other = await actors.take("holder")
    await _works(reader, other, trial)
    actors.give_back("holder", other)
    actors.give_back("reader", reader)


async def _kill_reader(trial: Trial, rng: random.Random, actors: Actors) -> None:
    holder, reader = await actors.take("holder"), await actors.take("reader")
    ref = await _exported(holder, trial)
    await _pulled(reader, ref, trial, _strike(trial, rng, "kill", reader._battery_pid))
    _expect(trial, "RayActorError", "data")
    await actors.end(reader)
    del ref
    await holder.freed.remote(LIMIT_SECONDS)
    other = await actors.take("reader")
    await _works(other, holder, trial)
    actors.give_back("holder", holder)
    actors.give_back("reader", other)


async def _stop(trial: Trial, rng: random.Random, actors: Actors, *, owner: bool) -> None:
    """Stop one of them for 5 s."""
    holder, reader = await actors.take("holder"), await actors.take("reader")
    ref = await _exported(holder, trial)
    pid = (holder if owner else reader)._battery_pid
    pulling = asyncio.ensure_future(_pulled(reader, ref, trial, _strike(trial, rng, "stop", pid)))
    stopped = asyncio.ensure_future(_stopped(pid))
    await asyncio.wait({pulling, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        await asyncio.sleep(_STOP_SECONDS)
        os.kill(pid, signal.SIGCONT)
    stopped.cancel()
    await pulling
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGCONT)  # it may have been stopped at the very end
    # A new connection is waited for for 5 s.
    _expect(trial, "data", *(("TransferError", "PeerLostError") if owner else ()))
    del ref
    await _went_well(trial, actors, reader, holder, "holder")


async def _stopped(pid: int) -> None:
    while process_state(pid) != "T":  # noqa: ASYNC110  (nobody tells)
        await asyncio.sleep(0.005)


async def _stop_owner(trial: Trial, rng: random.Random, actors: Actors) -> None:
    await _stop(trial, rng, actors, owner=True)


async def _stop_reader(trial: Trial, rng: random.Random, actors: Actors) -> None:
    await _stop(trial, rng, actors, owner=False)


async def _at_point(
    trial: Trial, rng: random.Random, actors: Actors, action: str, *outcomes: str
) -> None:
    holder, reader = await actors.take("holder"), await actors.take("reader")
    ref = await _exported(holder, trial)
    if action == "cancel" and rng.random() < 0.5:
        trial.struck = True
        await _pulled(reader, ref, trial, after=rng.uniform(0, 0.02))
    else:
        await _pulled(reader, ref, trial, _strike(trial, rng, action))
    _expect(trial, *outcomes)
    del ref
    await _went_well(trial, actors, reader, holder, "holder")


async def _cancel(trial: Trial, rng: random.Random, actors: Actors) -> None:
    await _at_point(trial, rng, actors, "cancel", "CancelledError", "data")


async def _raise(trial: Trial, rng: random.Random, actors: Actors) -> None:
    await _at_point(trial, rng, actors, "raise", "InjectedError", "TransferError", "data")


async def _restart(trial: Trial, rng: random.Random, actors: Actors) -> None:
    """An owner that Ray starts again: what it had is gone, and it goes on."""
    holder, reader = await actors.take("restarting"), await actors.take("reader")
    ref = await _exported(holder, trial)
    await _pulled(reader, ref, trial, _strike(trial, rng, "kill", holder._battery_pid))
    _expect(trial, "OwnerDiedError", "data")
    again = trial.outcome, trial.text, trial.seconds
    if trial.struck:
        await _pulled(reader, ref, trial)
        if trial.outcome != "OwnerDiedError":
            trial.failed = f"a ref to what is gone gave {trial.outcome}: {trial.text}"
    trial.outcome, trial.text, trial.seconds = again
    del ref
    async with asyncio.timeout(60):
        while True:
            try:
                await holder.pid.remote()
                break
            except ray.exceptions.RayActorError:  # not up again yet
                await asyncio.sleep(0.05)
    await _works(reader, holder, trial)
    await actors.end(holder)
    actors.give_back("reader", reader)


async def _many(trial: Trial, rng: random.Random, actors: Actors) -> None:
    """More at once than receive memory is kept for."""
    holder, reader = await actors.take("holder"), await actors.take("reader")
    trial.nbytes = min(trial.nbytes, 8 * MIB)
    ref = await _exported(holder, trial)
    count = rng.choice((20, 200)) if trial.nbytes <= MIB else 40
    async with asyncio.timeout(LIMIT_SECONDS):
        result: Result = await reader.pull_many.remote([ref], trial.seed, count)
    trial.outcome, trial.seconds, trial.struck = result.outcome, result.seconds, True
    _expect(trial, "data")
    del ref
    await _went_well(trial, actors, reader, holder, "holder")


async def _network(trial: Trial, rng: random.Random, actors: Actors) -> None:
    """A connection that stands still for a moment, ends, breaks, or garbles a request."""
    holder, reader = await actors.take("hidden"), await actors.take("reader")
    trial.transport = "tcp"
    kind = rng.choice(("stall", "truncate", "reset", "cut", "corrupt"))
    trial.fault = f"network: {kind}"
    ref = await _exported(holder, trial)
    # What is said to an owner has a MAC; of payload only a checksum would tell.
    towards = "server" if kind == "corrupt" else rng.choice(("server", "client", "both"))
    after = rng.choice((0, 1, 40, 300, 5000, trial.nbytes // 2))
    await holder.disturb.remote(kind, after, towards)
    trial.struck = True
    pulling = asyncio.ensure_future(_pulled(reader, ref, trial))
    await asyncio.wait({pulling}, timeout=rng.uniform(0, 1.5))
    await holder.heal.remote()
    await pulling
    if kind == "stall":
        _expect(trial, "data")
    else:
        # A proof that was garbled is none: whether the secret was another one nobody can tell.
        unproved = ("AuthenticationError",) if kind == "corrupt" else ()
        _expect(trial, "data", "TransferError", "PeerLostError", *unproved)
    del ref
    await _went_well(trial, actors, reader, holder, "hidden")


FAULTS: Final[dict[str, Body]] = {
    "kill the owner": _kill_owner,
    "kill the reader": _kill_reader,
    "stop the owner for 5 s": _stop_owner,
    "stop the reader for 5 s": _stop_reader,
    "cancel": _cancel,
    "raise": _raise,
    "restart the owner": _restart,
    "many at once": _many,
    "network": _network,
}


def make(seed: int, transports: tuple[str, ...], faults: tuple[str, ...]) -> Trial:
    """The trial of a seed."""
    rng = random.Random(seed)  # noqa: S311  (repeatable, not secret)
    return Trial(
        seed=seed,
        fault=rng.choice(faults),
        transport=rng.choice(transports),
        nbytes=rng.choice(_SIZES),
    )


async def run(trial: Trial, actors: Actors, bodies: Mapping[str, Body] = FAULTS) -> None:
    """Run it; what goes wrong is in it."""
    body = bodies[trial.fault]
    try:
        async with asyncio.timeout(120):
            rng = random.Random(f"{trial.seed}/body")  # noqa: S311  (as above)
            await body(trial, rng, actors)
    except Exception as exc:  # noqa: BLE001  (the next trial is to run)
        trial.failed = trial.failed or f"{type(exc).__name__}: {str(exc)[-400:]}"
        await actors.end_all()
