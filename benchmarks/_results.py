"""What was measured, the goals it is held against, and its shape as JSON. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from benchmarks._measure import GIB, KIB, MIB, Spread, format_nbytes, format_seconds
from benchmarks._pages import HUGE, ORDINARY

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT_VERSION: Final = 1

AIORDT: Final = "aiordt"
STORE: Final = "store"
STORE_VIEW: Final = "store-view"
GLOO: Final = "gloo"
NIXL: Final = "nixl"
PEERS: Final = (AIORDT, STORE, STORE_VIEW, GLOO, NIXL)
LABELS: Final = {
    AIORDT: "aiordt",
    STORE: "object store",
    STORE_VIEW: "object store, zero-copy",
    GLOO: "RDT Gloo",
    NIXL: "RDT NIXL",
}

CMA: Final = "aiordt cma"
TCP: Final = "aiordt tcp"
INLINE: Final = "aiordt inline"
RAW_ONE: Final = "raw, 1 reader"
RAW_TWO: Final = "raw, 2 readers"
MEMCPY: Final = "memcpy (local)"
WAYS: Final = (INLINE, CMA, TCP, RAW_ONE, RAW_TWO, MEMCPY)


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


def raw_best(rows: Iterable[Latency], nbytes: int, pages: str) -> Latency | None:
    """The faster of the raw reads: what aiordt is held against."""
    rows = list(rows)
    found = [find(rows, name, nbytes, pages) for name in (RAW_ONE, RAW_TWO)]
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
    shares = [(MIB, ORDINARY, 80)]
    shares += [(256 * MIB, pages, share) for pages in (ORDINARY, HUGE) for share in (80, 90)]
    for nbytes, pages, share in shares:
        figure = f"pull of a held ref, {format_nbytes(nbytes)}, {pages}"
        goal = f"≥ {share} % of the raw reads' speed"
        ours = find(results.pulls, CMA, nbytes, pages)
        raw = raw_best(results.pulls, nbytes, pages)
        if ours is None or raw is None:
            rows.append(_unmeasured(figure, goal, results.unavailable.get(CMA)))
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
    ours = [idle for idle in results.idles if idle.name == AIORDT]
    if not ours:
        return [_unmeasured(figure, goal, results.unavailable.get("idle"))]
    plain = {idle.process: idle for idle in results.idles if idle.name != AIORDT}
    rows = []
    for idle in ours:
        measured = f"{idle.cores:.2%}"
        if idle.process in plain:
            measured += f" (plain Ray: {plain[idle.process].cores:.2%})"
        rows.append(
            Goal(
                figure=f"{figure}, {idle.process}",
                goal=goal,
                measured=measured,
                met=idle.cores < 0.01,
            )
        )
    return rows
