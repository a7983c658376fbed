"""Collective operations: in members beside their peers, on refs, and what they do to a loop.

All ranks meet before each operation; a sample is the time from the last rank's call to the last
rank's result. The peers' calls block: torch's process group on a thread of its own in aiordt's
members, ``ray.util.collective`` on the loop of its actors, mpi4py in processes of ``mpiexec``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import ray
import torch

import aiordt
from aiordt.collective import allreduce_refs, create_group
from benchmarks import _mpi_ranks
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._collective_ranks import (
    ALLREDUCE,
    KINDS,
    OURS,
    RAW,
    RAY,
    SHARED,
    Member,
    RayRank,
    expected,
    slowest,
)
from benchmarks._figures import Run
from benchmarks._measure import KIB, MIB, Spread, format_nbytes, format_seconds
from benchmarks._mpi_ranks import MPI

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiordt.collective import Group
    from benchmarks._figures import Figures

_SIZES: Final = (8, 64 * KIB, 4 * MIB, 64 * MIB)
_QUICK_SIZES: Final = (8, 4 * MIB)
_OVERHEAD_SIZES: Final = (8, 64 * KIB)
_OVERHEAD: Final = 100e-6
_MPI_OVERHEAD: Final = 150e-6
#: Seconds in which an idle loop is watched.
_IDLE: Final = 1.0

#: By MPI, in actors that no mpiexec started.
ATTACH: Final = "aiordt mpi (attach)"
#: An allreduce of refs; all pulled to the driver, added and sent back; a call of each member.
REFS: Final = "aiordt on refs"
BY_DRIVER: Final = "by the driver"
PLAIN: Final = "plain calls"

_ERRORS: Final = (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError, RuntimeError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        ranks: How many members, one after the other.
        sizes: Bytes that each member brings to an allreduce.
        other_nbytes: ... to the other operations.
        ref_sizes: ... to an allreduce of refs.
        lag_nbytes: ... while loops are watched.
        rounds: Of all ways in turn.
        lags: How many operations a loop is watched in.
    """

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    other_nbytes: int
    ref_sizes: tuple[int, ...]
    lag_nbytes: int
    rounds: int
    lags: int

    @classmethod
    def choose(
        cls,
        *,
        quick: bool,
        ranks: tuple[int, ...] | None = None,
        sizes: tuple[int, ...] | None = None,
    ) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: There is a group of one, or a size that is no multiple of 8.
        """
        if any(count < 2 for count in ranks or ()):
            raise ValueError("a group has at least 2 ranks")
        if any(size < 8 or size % 8 for size in sizes or ()):
            raise ValueError("sizes must be multiples of 8")
        return cls(
            ranks=ranks or ((3,) if quick else (2, 3)),
            sizes=sizes or (_QUICK_SIZES if quick else _SIZES),
            other_nbytes=max(*sizes, KIB) if sizes else 4 * MIB,
            ref_sizes=(KIB, 4 * MIB),
            lag_nbytes=max(*sizes, KIB) if sizes else 64 * MIB,
            rounds=2 if quick else 5,
            lags=3 if quick else 8,
        )

    def count(self, nbytes: int) -> int:
        """How many operations of this size are timed in a round."""
        if nbytes > MIB:
            return 4 if nbytes > 16 * MIB else 10
        return 25 if nbytes > 64 * KIB else 100


class Job(NamedTuple):
    """An operation that all ways do."""

    kind: str
    nbytes: int

    def group(self, ranks: int) -> str:
        """Where its figures are shown."""
        return f"{self.kind} {format_nbytes(self.nbytes)} x {ranks}"


def jobs(settings: Settings) -> list[Job]:
    """All operations in members."""
    others = [Job(kind, settings.other_nbytes) for kind in KINDS if kind != ALLREDUCE]
    return [Job(ALLREDUCE, nbytes) for nbytes in settings.sizes] + others


def label(way: str) -> str:
    """How a way is shown."""
    if way == "mpi":
        return ATTACH
    return f"aiordt {way}" if way in {*OURS, SHARED} else way


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run(
        "Collective operations of 2 or more ranks (x 2 ...), float32 in host memory",
        dataclasses.asdict(settings),
    )
    a_run.say("starting Ray")
    with cluster(), tempfile.TemporaryDirectory() as folder:
        for ranks in settings.ranks:
            lot = _Lot(a_run, settings, ranks)
            try:
                lot.gather(Path(folder) / f"store-{ranks}")
                lot.measure()
            except _ERRORS as exc:
                a_run.figures.unavailable[f"the rest x {ranks}"] = reason(exc)
            finally:
                lot.show()
                lot.end()
    judge(a_run.figures, settings.ranks)
    return a_run.finish(json_path, plot_path)


def judge(figures: Figures, ranks: Sequence[int]) -> None:
    """Hold what an awaited allreduce takes against its library alone."""
    for count in ranks:
        for nbytes in _OVERHEAD_SIZES:
            group = Job(ALLREDUCE, nbytes).group(count)
            for way in OURS:
                peer, limit = (MPI, _MPI_OVERHEAD) if way == "mpi" else (RAW, _OVERHEAD)
                raw = figures.p50(group, peer)
                ours = figures.p50(group, label(way))
                more = None if raw is None or ours is None else ours - raw
                what = f"await g.allreduce, {format_nbytes(nbytes)}, {count} ranks, {way}"
                figures.judge(
                    f"{what}, over {'mpi4py' if peer == MPI else 'the raw group'}",
                    f"p50 ≤ {limit * 1e6:.0f} µs more",
                    more,
                    limit,
                    "" if more is None else f"{'-+'[more >= 0]}{format_seconds(abs(more))}",
                )


class _Lot:
    """Members of aiordt's groups and of their peers', which all live until the end."""

    def __init__(self, a_run: Run, settings: Settings, ranks: int) -> None:
        self._run = a_run
        self._figures = a_run.figures
        self._settings = settings
        self._ranks = ranks
        self._members: list[Any] = []
        self._rays: list[Any] = []
        self._groups: dict[str, Group] = {}
        self._ways: list[str] = []
        self._series: dict[tuple[Job, str], list[float]] = defaultdict(list)
        self._of_refs: dict[tuple[int, str], list[float]] = defaultdict(list)

    def _say(self, text: str) -> None:
        self._run.say(f"{self._ranks} ranks: {text}")

    def _lacks(self, what: str, why: str) -> None:
        self._figures.unavailable[f"{what} x {self._ranks}"] = why

    # --- the ways ------------------------------------------------------------------------------

    def gather(self, path: Path) -> None:
        """Start all processes, and make all groups that can be made."""
        self._say("starting actors")
        self._members = [start(Member) for _ in range(self._ranks)]
        self._rays = [start(RayRank) for _ in range(self._ranks)]
        get([actor.pid.remote() for actor in (*self._members, *self._rays)])
        for way in OURS:
            self._make(way, functools.partial(self._form, way))
        if "shm" in self._ways:
            self._ways.append(SHARED)
        self._make(RAW, lambda: self._join(self._members, str(path)))
        self._make(RAY, lambda: self._join(self._rays))
        if why := _mpi_ranks.missing():
            self._lacks(MPI, why)
        else:
            self._ways.append(MPI)

    def _make(self, way: str, make: Callable[[], None]) -> None:
        try:
            make()
        except _ERRORS as exc:
            self._lacks(label(way), reason(exc))
        else:
            self._ways.append(way)

    def _form(self, backend: str) -> None:
        made = create_group(self._members, backend, name=backend)
        self._groups[backend] = asyncio.run(made)

    def _join(self, actors: Sequence[Any], *path: str) -> None:
        get([actor.join.remote(*path, rank, len(actors)) for rank, actor in enumerate(actors)])

    def _actors(self, way: str) -> Sequence[Any]:
        return self._rays if way == RAY else self._members

    # --- figures -------------------------------------------------------------------------------

    def measure(self) -> None:
        """All rounds, and what loops are late."""
        todo = jobs(self._settings)
        for number in range(self._settings.rounds):
            self._say(f"round {number + 1} of {self._settings.rounds}")
            for job in todo:
                for way in list(self._ways):
                    self._time(job, way, check=number == 0)
            if self._groups:
                asyncio.run(self._time_refs(check=number == 0))
        self._watch()

    def _time(self, job: Job, way: str, *, check: bool) -> None:
        count = self._settings.count(job.nbytes)
        try:
            if way == MPI:
                spans = _mpi_ranks.spans(*job, self._ranks, count)
            else:
                actors = self._actors(way)
                if check:
                    get([actor.check.remote(way, *job) for actor in actors])
                spans = get([actor.spans.remote(way, *job, count) for actor in actors])
        except _ERRORS as exc:
            self._lacks(label(way), reason(exc))
            self._ways.remove(way)
        else:
            self._series[job, way] += slowest(spans)

    async def _time_refs(self, *, check: bool) -> None:
        group = next(iter(self._groups.values()))
        members = self._members
        for nbytes in self._settings.ref_sizes:
            made = [member.give.remote(rank, nbytes) for rank, member in enumerate(members)]
            refs = [await ref for ref in made]
            if check:
                total = expected(ALLREDUCE, nbytes // 4, 0, self._ranks)
                for ref in await allreduce_refs(refs, group=group):
                    if not torch.equal(await ref, total):
                        raise RuntimeError(f"{REFS} of {nbytes} B gave wrong values")
            ways: dict[str, Callable[[], Awaitable[Any]]] = {
                REFS: functools.partial(allreduce_refs, refs, group=group),
                BY_DRIVER: functools.partial(_by_driver, refs, members),
                PLAIN: lambda: asyncio.gather(*(member.pid.remote() for member in members)),
            }
            for name, way in ways.items():
                for number in range(1 + self._settings.count(nbytes)):
                    begun = time.perf_counter()
                    kept = await way()
                    took = time.perf_counter() - begun
                    if number:  # the first one warms up
                        self._of_refs[nbytes, name].append(took)
                    del kept

    def _watch(self) -> None:
        nbytes, ranks = self._settings.lag_nbytes, self._ranks
        group = f"lag, {format_nbytes(nbytes)} x {ranks}"
        if self._members:
            idle = get([member.idle.remote(_IDLE) for member in self._members])
            self._add_lag(group, "idle", idle)
        for way in [way for way in self._ways if way != MPI]:
            self._say(f"the loop's lag, {label(way)}")
            try:
                actors = self._actors(way)
                found = get(
                    [actor.lag.remote(way, nbytes, self._settings.lags) for actor in actors]
                )
            except _ERRORS as exc:
                self._lacks(f"lag, {label(way)}", reason(exc))
                continue
            self._add_lag(group, label(way), found)

    def _add_lag(self, group: str, name: str, late: list[list[float]]) -> None:
        # A loop may wake a little early by its own clock.
        pooled = [max(seconds, 0.0) for some in late for seconds in some]
        if pooled:
            self._figures.add(group, name, pooled, p99=format_seconds(Spread.of(pooled).p99))

    def show(self) -> None:
        """Put what was timed before what the loops were late."""
        figures = self._figures
        lags = [row for row in figures.rows if "p99" in row.facts]
        figures.rows = [row for row in figures.rows if row not in lags]
        for job in jobs(self._settings):
            named = {label(way): self._series[job, way] for way in (*OURS, SHARED, RAW, RAY, MPI)}
            _add(figures, job.group(self._ranks), named)
        for nbytes in self._settings.ref_sizes:
            named = {name: self._of_refs[nbytes, name] for name in (REFS, BY_DRIVER, PLAIN)}
            group = f"refs, {format_nbytes(nbytes)} x {self._ranks}"
            _add(figures, group, named)
        figures.rows += lags

    def end(self) -> None:
        """End the groups, then the actors."""
        try:
            for group in self._groups.values():
                asyncio.run(group.aclose())
        finally:
            end([*self._members, *self._rays])


async def _by_driver(refs: list[aiordt.TensorRef], members: Sequence[Any]) -> None:
    tensors = await aiordt.get(refs)
    total = torch.stack(tensors).sum(0)
    sent = await aiordt.put(total)
    await asyncio.gather(*(member.take.remote(sent) for member in members))


def _add(figures: Figures, group: str, series: dict[str, list[float]]) -> None:
    """Rows of a group, with what each takes of aiordt's first: less than 1 is a loss of ours."""
    base = next((name for name in series if name.startswith("aiordt") and series[name]), None)
    for name, samples in series.items():
        facts: dict[str, float | str] = {}
        if samples and base not in {None, name}:
            ratio = statistics.median(samples) / statistics.median(series[base])
            facts["/ ours"] = f"{ratio:.2f}"
        figures.add(group, name, samples, **facts)
