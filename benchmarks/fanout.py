"""One tensor for many hosts: when the last has it, and what leaves its owner's host.

Two hosts are made out of network namespaces, joined by a link of so many megabits a second. All
readers are on the second one, each as if on a host of its own. What the owner's host sends is
counted by its network device, headers included.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiordt.testing._hosts import hosts_unavailable, two_hosts
from benchmarks._cluster import reason
from benchmarks._figures import Run
from benchmarks._measure import MIB, format_nbytes

if TYPE_CHECKING:
    from benchmarks._figures import Figures

_DRIVER: Final = Path(__file__).with_name("_fanout_driver.py")
_SECONDS: Final = 240.0
#: Two times the tensor, and the headers of its packets.
_SENT: Final = 2.1

TREE: Final = "aiordt: hosts serve hosts"
ALONE: Final = "each from the owner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        nbytes: Of all tensors together, of 1 MiB each.
        hosts: How many readers, one after the other.
        megabits: Of the link, a second.
        samples: Of each figure.
    """

    nbytes: int
    hosts: tuple[int, ...]
    megabits: int
    samples: int

    @classmethod
    def choose(
        cls, *, quick: bool, nbytes: int | None = None, hosts: tuple[int, ...] | None = None
    ) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: A number is not positive.
        """
        if (nbytes is not None and nbytes < MIB) or any(count < 1 for count in hosts or ()):
            raise ValueError("there are at least 1 MiB and 1 host")
        return cls(
            nbytes=nbytes or 32 * MIB,
            hosts=hosts or ((2, 4) if quick else (2, 4, 8, 16)),
            megabits=1000,
            samples=2 if quick else 3,
        )


def group(settings: Settings, count: int) -> str:
    """Where the figures of so many readers are shown."""
    return f"{format_nbytes(settings.nbytes)} to {count} hosts"


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run(
        f"From one host to many, over {settings.megabits} Mbit/s", dataclasses.asdict(settings)
    )
    rows: list[dict[str, Any]] = []
    if why := hosts_unavailable():
        a_run.figures.unavailable["everything"] = why
    else:
        try:
            rows = _measured(a_run, settings)
        except (RuntimeError, EOFError, TimeoutError) as exc:
            a_run.figures.unavailable["everything"] = reason(exc)
    show(a_run.figures, settings, rows)
    return a_run.finish(json_path, plot_path)


def _measured(a_run: Run, settings: Settings) -> list[dict[str, Any]]:
    a_run.say("making two hosts")
    with two_hosts() as hosts:
        counts = ",".join(map(str, settings.hosts))
        args = (str(settings.nbytes), str(settings.samples), counts)
        with hosts.h1.start(_DRIVER, *args) as program:
            hosts.slow(settings.megabits)
            a_run.say(f"{counts} readers")
            rows: list[dict[str, Any]] = json.loads(program.expect("RESULT ", seconds=_SECONDS))
    return rows


def show(figures: Figures, settings: Settings, rows: list[dict[str, Any]]) -> None:
    """Rows of figures, and what the owner's host sent held against twice the tensor."""
    for count in settings.hosts:
        base = None
        for name, alone in ((TREE, False), (ALONE, True)):
            some = [row for row in rows if row["count"] == count and row["alone"] is alone]
            seconds = [row["seconds"] for row in some]
            if not some:
                continue
            sent = statistics.median(row["sent"] for row in some) / settings.nbytes
            facts: dict[str, float | str] = {"sent / size": f"{sent:.2f}"}
            base = base or statistics.median(seconds)
            facts["/ first"] = f"{statistics.median(seconds) / base:.2f}"
            figures.add(group(settings, count), name, seconds, **facts)
            if not alone:
                what = f"sent by the owner's host, {count} hosts"
                figures.judge(what, "≤ 2 x the tensor, and headers", sent, _SENT, f"{sent:.2f} x")
