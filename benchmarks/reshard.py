"""A sharded state received in another partition: time, and bytes moved over bytes needed.

Owners hold row shards of a square matrix; a reader wants column blocks, other rows, or all of
it. Beside it: every reader pulls every part whole and cuts, and Ray's object store.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from aiordt.weights import Shard, export_shards, load_shards
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import format_nbytes
from benchmarks._pages import quiet

if TYPE_CHECKING:
    from pathlib import Path

    from aiordt.weights import Part
    from benchmarks._figures import Figures

OURS: Final = "aiordt, overlaps only"
WHOLE: Final = "aiordt, all parts, then cut"
STORE: Final = "object store, all parts, then cut"
NAMES: Final = (OURS, WHOLE, STORE)
_ERRORS: Final = (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError, RuntimeError)
#: What a reader wants, and the most that may move of what it needs.
WANTED: Final[dict[str, tuple[tuple[Shard, ...], float]]] = {
    "rows, 1 of 3": ((Shard(0, 1, 3),), 1.0),
    "columns, 1 of 4": ((Shard(1, 1, 4),), 1.05),
    "a block, 2 x 2": ((Shard(0, 1, 2), Shard(1, 0, 2)), 1.05),
    "all of it": ((), 1.0),
}
_ROUNDING: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures: a square of ``side``, of ``owners``, ``count`` times in ``rounds``."""

    side: int
    owners: int
    rounds: int
    count: int

    @classmethod
    def choose(cls, *, quick: bool, side: int | None = None) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: ``side`` is not a multiple of 12.
        """
        if side is not None and (side < 12 or side % 12):
            raise ValueError("side must be a multiple of 12")
        return cls(
            side=side or (1536 if quick else 4608),
            owners=2 if quick else 4,
            rounds=1 if quick else 3,
            count=3 if quick else 5,
        )


def _square(side: int) -> torch.Tensor:
    return torch.arange(side * side, dtype=torch.int32).view(torch.float32).view(side, side)


def _cut(square: torch.Tensor, where: tuple[Shard, ...]) -> torch.Tensor:
    for shard in where:
        square = square.chunk(shard.of, shard.dim)[shard.index]
    return square.contiguous()


@ray.remote
class _Owner(aiordt.AsyncActor):
    def __init__(self, side: int, index: int, owners: int) -> None:
        quiet()
        self._shard = Shard(0, index, owners)
        self._rows = _cut(_square(side), (self._shard,)).clone()

    async def pid(self) -> int:
        return os.getpid()

    async def parts(self) -> dict[str, Part]:
        return await export_shards({"w": self._rows}, self._shard)

    async def stored(self) -> torch.Tensor:
        return self._rows


@ray.remote
class _Reader(aiordt.AsyncActor):
    def __init__(self, side: int) -> None:
        quiet()
        self._side = side

    async def pid(self) -> int:
        return os.getpid()

    async def measure(
        self, parts: list[dict[str, Part]], owners: list[Any], count: int
    ) -> tuple[dict[tuple[str, str], list[float]], dict[str, float]]:
        """Seconds by what is wanted and how, and bytes moved over needed of our own way."""
        took: dict[tuple[str, str], list[float]] = defaultdict(list)
        moved: dict[str, float] = {}
        square = _square(self._side)
        for number in range(count + 1):
            for wanted, (where, _) in WANTED.items():
                expected = _cut(square, where).view(torch.int32)
                for name in NAMES:
                    counted = aiordt.stats().bytes_pulled
                    begun = time.perf_counter()
                    found = await self._get(name, parts, owners, where)
                    seconds = time.perf_counter() - begun
                    if not torch.equal(found.view(torch.int32), expected):
                        raise RuntimeError(f"{wanted}, {name}: the bytes are wrong")
                    if number:  # the first turn warms up
                        took[wanted, name].append(seconds)
                    if name == OURS:
                        moved[wanted] = (aiordt.stats().bytes_pulled - counted) / found.nbytes
                    del found
        return dict(took), moved

    @staticmethod
    async def _get(
        name: str, parts: list[dict[str, Part]], owners: list[Any], where: tuple[Shard, ...]
    ) -> torch.Tensor:
        if name == OURS:
            return (await load_shards(parts, where))["w"]
        if name == WHOLE:
            rows = await aiordt.get([part["w"].ref for part in parts])
        else:
            rows = await asyncio.gather(*(owner.stored.remote() for owner in owners))
        return _cut(torch.cat(list(rows)), where)


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    side = settings.side
    size = format_nbytes(4 * side * side)
    a_run = Run(
        f"Resharding of {size} (float32, {side} x {side}), rows of {settings.owners} owners",
        dataclasses.asdict(settings),
    )
    figures = a_run.figures
    a_run.say("starting Ray")
    series: dict[tuple[str, str], list[float]] = defaultdict(list)
    moved: dict[str, float] = {}
    with cluster():
        count = settings.owners
        owners = [start(_Owner, side, index, count, num_cpus=0) for index in range(count)]
        reader = start(_Reader, side, num_cpus=0)
        try:
            parts = get([owner.parts.remote() for owner in owners])
            for number in range(settings.rounds):
                a_run.say(f"round {number + 1} of {settings.rounds}")
                found, ratios = get(reader.measure.remote(parts, owners, settings.count))
                for key, seconds in found.items():
                    series[key] += seconds
                moved.update(ratios)
            del parts
        except _ERRORS as exc:
            figures.unavailable["the rest"] = reason(exc)
        finally:
            end([*owners, reader])
    for (wanted, name), seconds in series.items():
        facts = {"moved / needed": f"{moved[wanted]:.4f}"} if name == OURS else {}
        figures.add(wanted, name, seconds, **facts)
    for wanted, (_, limit) in WANTED.items():
        ratio = moved.get(wanted)
        words = "" if ratio is None else f"{ratio:.4f}"
        figures.judge(
            f"bytes moved / needed, {wanted}", f"≤ {limit:.2f}", ratio, limit + _ROUNDING, words
        )
    return a_run.finish(json_path, plot_path)
