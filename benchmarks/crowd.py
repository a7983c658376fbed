"""Many consumers of one producer at once: what a small pull beside them feels, who gets what."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from aiordt.transports import probe
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import KIB, MIB, Spread, format_nbytes, format_seconds
from benchmarks._pages import fill, is_filled, quiet

if TYPE_CHECKING:
    from benchmarks._figures import Figures

_TRANSPORTS: Final = ("cma", "tcp", "ucx", "nixl")
_SMALL_NBYTES: Final = KIB
_LIMIT: Final = 50e-3
_ALONE_SECONDS: Final = 2.0

ALONE: Final = "aiordt: 1 KiB, nobody else"
BESIDE: Final = "aiordt: 1 KiB, from a process of its own"
AMONG: Final = "aiordt: 1 KiB, from a process of the crowd"
LARGE: Final = "aiordt: each consumer's pulls, together"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        nbytes: Of what the crowd pulls.
        consumers: How many pull at once.
        processes: That they are spread over.
        pulls: Of each consumer.
        transports: One after the other.
    """

    nbytes: int
    consumers: int
    processes: int
    pulls: int
    transports: tuple[str, ...]

    @classmethod
    def choose(
        cls,
        *,
        quick: bool,
        consumers: int | None = None,
        nbytes: int | None = None,
        only: tuple[str, ...] | None = None,
    ) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: There is no such transport, or nobody to consume.
        """
        chosen = only or (_TRANSPORTS[:2] if quick else _TRANSPORTS)
        if unknown := set(chosen) - set(_TRANSPORTS):
            raise ValueError(f"no such transport: {', '.join(sorted(unknown))}")
        many = consumers or (40 if quick else 200)
        if many < 1 or (nbytes or 1) < 1:
            raise ValueError("there must be a consumer, and bytes for it")
        return cls(
            nbytes=nbytes or 64 * MIB,
            consumers=many,
            processes=min(4, many),
            pulls=2 if quick else 4,
            transports=chosen,
        )


@ray.remote
class _Producer(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._kept: list[torch.Tensor] = []

    async def pid(self) -> int:
        return os.getpid()

    async def make(self, nbytes: int, transport: str) -> list[aiordt.TensorRef]:
        """A tensor for the crowd, and a small one, both to be moved by that transport."""
        self._kept = [fill(torch.empty(size, dtype=torch.uint8)) for size in (nbytes, 1024)]
        return [await aiordt.put(tensor, transport=transport) for tensor in self._kept]

    async def peak_nbytes(self) -> int:
        return _peak_nbytes()


@ray.remote
class _Consumers(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._over = asyncio.Event()

    async def pid(self) -> int:
        return os.getpid()

    async def pull(self, refs: list[Any], consumers: int, pulls: int) -> list[tuple[float, float]]:
        """When each consumer began and ended."""

        async def consume(number: int) -> tuple[float, float]:
            begun = time.perf_counter()
            for _ in range(pulls):
                tensor = await refs[0]
                if number == 0 and not is_filled(tensor):
                    raise RuntimeError("the pull brought wrong bytes")
                del tensor
            return begun, time.perf_counter()

        try:
            return await asyncio.gather(*map(consume, range(consumers)))
        finally:
            self._over.set()

    async def look(self, refs: list[Any], seconds: float | None) -> list[float]:
        """Seconds of each small pull, so long, or until this process's crowd or `stop` is over."""
        self._over.clear()
        ends = time.perf_counter() + (seconds or 600.0)
        samples = []
        while time.perf_counter() < ends and not self._over.is_set():
            begun = time.perf_counter()
            await refs[1]
            samples.append(time.perf_counter() - begun)
            await asyncio.sleep(0.002)
        return samples

    async def stop(self) -> None:
        self._over.set()

    async def peak_nbytes(self) -> int:
        return _peak_nbytes()


def _peak_nbytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    return 0


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run("A small pull beside a crowd of large ones", dataclasses.asdict(settings))
    a_run.say("starting Ray")
    with cluster():
        for transport in settings.transports:
            available = probe(transport)
            if not available.usable:
                a_run.figures.unavailable[transport] = available.reason
                continue
            a_run.say(f"{settings.consumers} consumers, {transport}")
            try:
                measure(settings, transport, a_run.figures)
            except (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError) as exc:
                a_run.figures.unavailable[transport] = reason(exc)
    judge(a_run.figures)
    return a_run.finish(json_path, plot_path)


def judge(figures: Figures) -> None:
    """Hold what a small pull feels against the limit."""
    for row in figures.rows:
        if row.name in {BESIDE, AMONG}:
            p99 = row.spread.p99
            words = format_seconds(p99)
            figures.judge(f"{row.name}, {row.group}", "p99 ≤ 50 ms", p99, _LIMIT, words)


def measure(settings: Settings, transport: str, figures: Figures) -> None:
    """Add what comes of one transport; Ray has been initialised."""
    producer, other = start(_Producer), start(_Consumers)
    crowd = [start(_Consumers) for _ in range(settings.processes)]
    actors = [producer, other, *crowd]
    try:
        get([actor.pid.remote() for actor in actors])
        refs = get(producer.make.remote(settings.nbytes, transport))
        for actor in (other, *crowd):  # each finds its way first
            get(actor.pull.remote(refs, 1, 1))
        group = f"{transport}, {settings.consumers} x {format_nbytes(settings.nbytes)}"
        _add(figures, group, ALONE, get(other.look.remote(refs, _ALONE_SECONDS)))
        each = settings.consumers // settings.processes
        looking = [other.look.remote(refs, None), crowd[0].look.remote(refs, None)]
        pulling = [actor.pull.remote(refs, each, settings.pulls) for actor in crowd]
        times = [pair for some in ray.get(pulling, timeout=600) for pair in some]
        get(other.stop.remote())
        beside, among = get(looking)
        _add(figures, group, BESIDE, beside)
        _add(figures, group, AMONG, among)
        took = max(end for _, end in times) - min(begun for begun, _ in times)
        peaks = get([actor.peak_nbytes.remote() for actor in (producer, *crowd)])
        figures.add(
            group,
            LARGE,
            [end - begun for begun, end in times],
            **{
                "GB/s": len(times) * settings.pulls * settings.nbytes / took / 1e9,
                "producer's peak MiB": peaks[0] / MIB,
                "consumer's peak MiB": max(peaks[1:]) / MIB,
            },
        )
        del refs
    finally:
        end(actors)


def _add(figures: Figures, group: str, name: str, samples: list[float]) -> None:
    figures.add(group, name, samples, p99=format_seconds(Spread.of(samples).p99) if samples else "")
