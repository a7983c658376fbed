"""Run trials and print their table: ``python -m tests.battery --trials 1000``."""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import sys
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import rich
import torch

from aiordt.transports import probe
from tests.battery import host_trials, trials
from tests.battery.trials import READING, Actors, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.battery.trials import Body


async def battery(
    seeds: list[int],
    transports: tuple[str, ...],
    faults: tuple[str, ...],
    *,
    bodies: Mapping[str, Body],
    make_actors: Callable[[], Actors],
    at_once: int,
) -> list[Trial]:
    """Run the trials of some seeds, so many at a time, each with actors of its own."""
    left = deque(seeds)
    done: list[Trial] = []

    async def run_some() -> None:
        actors = make_actors()
        while left:
            trial = trials.make(left.popleft(), transports, faults)
            await trials.run(trial, actors, bodies)
            done.append(trial)
            if trial.failed:
                rich.print(f"FAILED {trial}: {trial.failed}", flush=True)
            elif len(done) % 50 == 0:
                rich.print(f"{len(done)}: {trial}", flush=True)
        await actors.end_all()

    await asyncio.gather(*(run_some() for _ in range(at_once)))
    return sorted(done, key=lambda trial: trial.seed)


def table(done: list[Trial]) -> str:
    """How they ended, by fault and transport."""
    rows: dict[tuple[str, str], list[Trial]] = {}
    for trial in done:
        rows.setdefault((trial.fault, trial.transport), []).append(trial)
    lines = [
        "| fault | transport | trials | struck | data | error | wrong | median s | longest s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (fault, transport), some in sorted(rows.items()):
        outcomes = [trial.outcome for trial in some]
        errors = sorted(set(outcomes) - {"data"})
        seconds = [trial.seconds for trial in some]
        cells = [
            fault,
            transport,
            len(some),
            sum(trial.struck for trial in some),
            outcomes.count("data"),
            ", ".join(f"{outcomes.count(error)} {error.lstrip('_')}" for error in errors),
            sum(bool(trial.failed) for trial in some),
            f"{statistics.median(seconds):.2f}",
            f"{max(seconds):.2f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run what was asked for; 1 if a trial failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.battery", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--transports", help="default: all that move what is to be moved")
    parser.add_argument("--faults", help="default: all")
    parser.add_argument("--at-once", type=int, default=3, help="on two hosts, always one")
    parser.add_argument("--hosts", action="store_true", help="between two hosts; needs root")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help="write the table there")
    options = parser.parse_args()
    if options.hosts and not options.inside:
        return host_trials.on_two_hosts([*sys.argv[1:], "--inside"])
    bodies = host_trials.OF_HOSTS if options.hosts else {**trials.FAULTS, **host_trials.OF_DRIVERS}
    faults = tuple(options.faults.split(",") if options.faults else bodies)
    possible = host_trials.BETWEEN_HOSTS if options.hosts else tuple(READING)
    chosen = options.transports.split(",") if options.transports else possible
    usable = tuple(name for name in chosen if probe(name).usable)
    cluster: dict[str, Any] = {} if options.hosts else {"num_cpus": 2, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="error", **cluster)
    begun = time.monotonic()
    seeds = list(range(options.seed, options.seed + options.trials))
    make_actors = host_trials.PlacedActors if options.hosts else Actors
    at_once = 1 if options.hosts else options.at_once
    done = asyncio.run(
        battery(seeds, usable, faults, bodies=bodies, make_actors=make_actors, at_once=at_once)
    )
    ray.shutdown()
    failed = [trial for trial in done if trial.failed]
    text = table(done)
    rich.print(text)
    rich.print(f"{len(done)} trials in {time.monotonic() - begun:.0f} s, {len(failed)} failed")
    if options.report:
        names = ("ray", "torch", "nixl-cu12", "ucxx-cu13")
        versions = [f"Python {platform.python_version()}"]
        versions += [f"{name} {version(name)}" for name in names]
        head = f"{len(done)} trials, seeds {seeds[0]} to {seeds[-1]}; {', '.join(versions)}"
        options.report.write_text(f"{head}\n\n{text}\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
