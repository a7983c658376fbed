"""What was measured, the goals it is held against, and its shape as JSON. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from benchmarks._measure import GIB, KIB, MIB, Spread, format_nbytes, format_seconds
from benchmarks._pages import HUGE, ORDINARY, SHARED

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT_VERSION: Final = 2
_BOTH: Final = (ORDINARY, HUGE)

AIORDT: Final = "aiordt"
STORE: Final = "store"
STORE_VIEW: Final = "store-view"
GLOO: Final = "gloo"
NIXL: Final = "nixl"
PEERS: Final = (AIORDT, STORE, STORE_VIEW, GLOO, NIXL)
#: aiordt in processes that have pulled by nixl and ucx before.
AIORDT_USED: Final = "aiordt, nixl and ucx used"
LABELS: Final = {
    AIORDT: "aiordt",
    STORE: "object store",
    STORE_VIEW: "object store, zero-copy",
    GLOO: "RDT Gloo",
    NIXL: "RDT NIXL",
}

CMA: Final = "aiordt cma"
SHM: Final = "aiordt shm"
NIXL_PULL: Final = "aiordt nixl"
UCX: Final = "aiordt ucx"
TCP: Final = "aiordt tcp"
INLINE: Final = "aiordt inline"
RAW_ONE: Final = "raw, 1 reader"
RAW_TWO: Final = "raw, 2 readers"
RAW_NIXL: Final = "raw NIXL"
RAW_UCXX: Final = "raw ucxx"
MAPPED_ONE: Final = "memcpy, 1 thread"
MAPPED_TWO: Final = "memcpy, 2 threads"
MEMCPY: Final = "memcpy (local)"
#: What each of aiordt's ways is held against: the fastest of these.
RAW_OF: Final = {
    INLINE: (RAW_ONE, RAW_TWO),
    SHM: (MAPPED_ONE, MAPPED_TWO),
    CMA: (RAW_ONE, RAW_TWO),
    NIXL_PULL: (RAW_NIXL,),
    UCX: (RAW_UCXX,),
    TCP: (RAW_ONE, RAW_TWO),
}
_AGAINST: Final = {
    SHM: "memcpy's",
    CMA: "the raw reads'",
    NIXL_PULL: "raw NIXL's",
    UCX: "raw ucxx's",
}
WAYS: Final = (
    *RAW_OF,
    RAW_ONE,
    RAW_TWO,
    RAW_NIXL,
    RAW_UCXX,
    MAPPED_ONE,
    MAPPED_TWO,
    MEMCPY,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One thing timed at one size.

    Attributes:
        name: The peer, or the way of reading.
        nbytes: Size of the tensor.
        pages: What the producer's tensor was to be on; see `Results.huge_share`.
        spread: Of all samples.
        round_p50: The median of each round, in seconds: how much the machine drifted.
    """

    name: str
    nbytes: int
    pages: str
    spread: Spread
    round_p50: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How late a consumer's loop was while bytes arrived, and while none did.

    Attributes:
        name: The peer.
        what: What arrived.
        duration: Of one arrival.
        late: Lateness, corrected for ticks that could not come; see `lateness`.
        ticks: Lateness of the ticks that came, and of no others.
        idle: The same on the same actor without a transfer.
    """

    name: str
    what: str
    duration: Spread
    late: Spread
    ticks: Spread
    idle: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """CPU that one process used while everything in it waited; in cores (1.0 is a core)."""

    name: str
    process: str
    awaits: str
    seconds: float
    cores: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal of the design beside what was measured; ``met`` is ``None`` where nothing was."""

    figure: str
    goal: str
    measured: str
    met: bool | None


@dataclass(slots=True)
class Results:
    """Everything that a run found.

    Attributes:
        machine: See `machine_facts`.
        settings: What was asked for, and how long it took.
        actors: From actor to actor.
        pulls: Of a held ref, beside raw reads.
        lags: Of the consumer's loop.
        idles: CPU of what only waits.
        unavailable: What could not be measured, and why.
        huge_share: The part of each producer's tensor that really was on huge pages.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    actors: list[Latency] = field(default_factory=list)
    pulls: list[Latency] = field(default_factory=list)
    lags: list[Lag] = field(default_factory=list)
    idles: list[Idle] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    huge_share: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All figures, in seconds and bytes, and the goals."""
        return {
            "format": FORMAT_VERSION,
            **{
                name: value
                for name, value in dataclasses.asdict(self).items()
                if name not in {"machine", "settings"}
            },
            "machine": self.machine,
            "settings": self.settings,
            "goals": [dataclasses.asdict(goal) for goal in goals(self)],
        }


def find(rows: Iterable[Latency], name: str, nbytes: int, pages: str) -> Latency | None:
    """The row of this name, size and kind of pages."""
    for row in rows:
        if (row.name, row.nbytes, row.pages) == (name, nbytes, pages):
            return row
    return None


def raw_best(rows: Iterable[Latency], nbytes: int, pages: str, name: str = CMA) -> Latency | None:
    """The fastest of what aiordt's way ``name`` is held against."""
    rows = list(rows)
    found = [find(rows, raw, nbytes, pages) for raw in RAW_OF[name]]
    return min(
        (row for row in found if row is not None), key=lambda row: row.spread.p50, default=None
    )


def goals(results: Results) -> list[Goal]:
    """The goals of design.md, section 5, that this benchmark covers, met or missed."""
    return [
        *_small_goals(results),
        *_large_goals(results),
        *_pull_goals(results),
        *_lag_goals(results),
        *_idle_goals(results),
    ]


def _unmeasured(figure: str, goal: str, why: str | None) -> Goal:
    return Goal(figure=figure, goal=goal, measured=why or "not measured", met=None)


def _small_goals(results: Results) -> list[Goal]:
    rows = []
    ours = find(results.actors, AIORDT, KIB, ORDINARY)
    for peer, limit in ((STORE, 1.2), (GLOO, 0.5), (NIXL, 0.5)):
        figure = "actor to actor, 1 KiB"
        goal = f"≤ {limit} x {LABELS[peer]}"
        theirs = find(results.actors, peer, KIB, ORDINARY)
        if ours is None or theirs is None:
            rows.append(_unmeasured(figure, goal, results.unavailable.get(peer)))
            continue
        ratio = ours.spread.p50 / theirs.spread.p50
        rows.append(
            Goal(
                figure=figure,
                goal=goal,
                measured=f"{ratio:.2f} x ({_pair(ours, theirs)})",
                met=ratio <= limit,
            )
        )
    return rows


def _large_goals(results: Results) -> list[Goal]:
    rows = []
    for pages in (ORDINARY, HUGE):
        ours = find(results.actors, AIORDT, 256 * MIB, pages)
        for peer in (STORE, GLOO, NIXL):
            figure = f"actor to actor, 256 MiB, {pages}"
            goal = f"≥ 5 x faster than {LABELS[peer]}"
            theirs = find(results.actors, peer, 256 * MIB, pages)
            if ours is None or theirs is None:
                rows.append(_unmeasured(figure, goal, results.unavailable.get(peer)))
                continue
            ratio = theirs.spread.p50 / ours.spread.p50
            rows.append(
                Goal(
                    figure=figure,
                    goal=goal,
                    measured=f"{ratio:.1f} x ({_pair(ours, theirs)})",
                    met=ratio >= 5,
                )
            )
    return rows


def _pair(ours: Latency, theirs: Latency) -> str:
    return f"{format_seconds(ours.spread.p50)} : {format_seconds(theirs.spread.p50)}"


def _pull_goals(results: Results) -> list[Goal]:
    rows = []
    ours = find(results.pulls, CMA, 64 * KIB, ORDINARY)
    figure, goal = "pull of a held ref, 64 KiB", "p50 ≤ 50 µs"
    if ours is None:
        rows.append(_unmeasured(figure, goal, results.unavailable.get(CMA)))
    else:
        p50 = ours.spread.p50
        rows.append(Goal(figure=figure, goal=goal, measured=format_seconds(p50), met=p50 <= 50e-6))
    shares = [(CMA, MIB, ORDINARY, 80)]
    shares += [(CMA, 256 * MIB, pages, share) for pages in (ORDINARY, HUGE) for share in (80, 90)]
    shares += [(SHM, 256 * MIB, SHARED, 90)]
    shares += [(way, 256 * MIB, pages, 90) for way in (NIXL_PULL, UCX) for pages in _BOTH]
    for way, nbytes, pages, share in shares:
        ours = find(results.pulls, way, nbytes, pages)
        raw = raw_best(results.pulls, nbytes, pages, way)
        by = "" if way == CMA else f" by {way.removeprefix('aiordt ')}"
        figure = f"pull of a held ref{by}, {format_nbytes(nbytes)}, {pages}"
        goal = f"≥ {share} % of {_AGAINST[way]} speed"
        if ours is None or raw is None:
            why = [results.unavailable.get(name) for name in (way, *RAW_OF[way])]
            rows.append(_unmeasured(figure, goal, next(filter(None, why), None)))
            continue
        ratio = raw.spread.p50 / ours.spread.p50
        measured = f"{ratio:.0%} ({_pair(ours, raw)}, {raw.name})"
        rows.append(Goal(figure=figure, goal=goal, measured=measured, met=ratio >= share / 100))
    return rows


def _lag_goals(results: Results) -> list[Goal]:
    figure = f"loop lag while {format_nbytes(GIB)} arrives"
    goal = "p99 ≤ 2 ms"
    ours = [lag for lag in results.lags if lag.name == AIORDT]
    if not ours:
        return [_unmeasured(figure, goal, results.unavailable.get("lag"))]
    return [
        Goal(
            figure=f"{figure}, {lag.what}",
            goal=goal,
            measured=f"{format_seconds(lag.late.p99)} (idle: {format_seconds(lag.idle.p99)})",
            met=lag.late.p99 <= 2e-3,
        )
        for lag in ours
    ]


def _idle_goals(results: Results) -> list[Goal]:
    figure, goal = "idle CPU, 1,000 awaits pending", "< 1 % of a core"
    ours = [idle for idle in results.idles if idle.name in {AIORDT, AIORDT_USED}]
    if not ours:
        return [_unmeasured(figure, goal, results.unavailable.get("idle"))]
    plain = {idle.process: idle for idle in results.idles if idle not in ours}
    rows = []
    for idle in ours:
        measured = f"{idle.cores:.2%}"
        if idle.process in plain:
            measured += f" (plain Ray: {plain[idle.process].cores:.2%})"
        rows.append(
            Goal(
                figure=f"{figure}{idle.name.removeprefix(AIORDT)}, {idle.process}",
                goal=goal,
                measured=measured,
                met=idle.cores < 0.01,
            )
        )
    return rows
