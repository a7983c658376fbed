"""One producer, one consumer, beside Ray's object store, RDT, raw reads and memcpy."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Console

from benchmarks import _p2p_actors, _p2p_idle, _p2p_lag, _p2p_pull, _report
from benchmarks._cluster import cluster
from benchmarks._measure import KIB, MIB, machine_facts
from benchmarks._results import PEERS, STORE_VIEW, Results

if TYPE_CHECKING:
    from pathlib import Path

PARTS: Final = ("actors", "pull", "lag", "idle")
_SIZES: Final = (8, KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)
_QUICK_SIZES: Final = (KIB, 64 * KIB, MIB, 256 * MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        quick: Fewer samples.
        sizes: Of tensors, in bytes.
        peers: Names from `PEERS`.
        parts: Names from `PARTS`.
        rounds: Turns of each peer.
    """

    quick: bool
    sizes: tuple[int, ...]
    peers: tuple[str, ...]
    parts: tuple[str, ...]
    rounds: int

    @classmethod
    def choose(
        cls,
        *,
        quick: bool,
        sizes: tuple[int, ...] | None = None,
        only: tuple[str, ...] | None = None,
        parts: tuple[str, ...] | None = None,
    ) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: There is no such peer or part, or a size is not positive.
        """
        everyone = tuple(peer for peer in PEERS if not quick or peer != STORE_VIEW)
        for name, known in [
            *((peer, PEERS) for peer in only or ()),
            *((part, PARTS) for part in parts or ()),
        ]:
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}")
        if any(size < 1 for size in sizes or ()):
            raise ValueError("sizes must be positive")
        return cls(
            quick=quick,
            sizes=sizes or (_QUICK_SIZES if quick else _SIZES),
            peers=only or everyone,
            parts=parts or PARTS,
            rounds=1 if quick else 3,
        )


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Results:
    """Measure, print, and write what was asked for."""
    console = Console()
    if not console.is_terminal:
        console.width = 132
    started = time.monotonic()
    results = Results(machine_facts(), dataclasses.asdict(settings))

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:4.0f} s  {text}[/dim]", highlight=False)

    say("starting Ray")
    quick = settings.quick
    with cluster():
        if "actors" in settings.parts:
            _p2p_actors.measure(
                results,
                peers=settings.peers,
                sizes=settings.sizes,
                rounds=settings.rounds,
                quick=quick,
                say=say,
            )
        if "pull" in settings.parts:
            _p2p_pull.measure(
                results, sizes=settings.sizes, rounds=settings.rounds, quick=quick, say=say
            )
        if "lag" in settings.parts:
            _p2p_lag.measure(
                results, peers=settings.peers, count=3 if quick else 12, quick=quick, say=say
            )
        if "idle" in settings.parts:
            _p2p_idle.measure(results, window=3.0 if quick else 5.0, say=say)
    results.settings["seconds"] = time.monotonic() - started
    _report.show(results, console)
    if json_path is not None:
        text = json.dumps(results.to_json(), indent=1, ensure_ascii=False)
        json_path.write_text(text + "\n", encoding="utf-8")
        console.print(f"figures: {json_path}")
    if plot_path is not None:
        _report.plot(results, plot_path)
        console.print(f"plot: {plot_path}")
    return results
