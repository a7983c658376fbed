"""Rows of figures in groups, goals, and their shapes: table, JSON, picture."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks._measure import Spread, format_seconds, machine_facts
from benchmarks._report import machine_line
from benchmarks._results import FORMAT_VERSION, Goal

if TYPE_CHECKING:
    from pathlib import Path

_OURS: Final = "#0072B2"
_THEIRS: Final = "#999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing timed.

    Attributes:
        group: What it is compared within.
        name: What it is; aiordt's own begin with ``aiordt``.
        spread: Seconds.
        facts: What else is known of it, by column.
    """

    group: str
    name: str
    spread: Spread
    facts: dict[str, float | str] = field(default_factory=dict)


@dataclass(slots=True)
class Figures:
    """Everything that a run found.

    Attributes:
        title: What was measured.
        settings: What was asked for, and how long it took.
        rows: In the order in which they are shown.
        goals: Met or missed.
        unavailable: What could not be measured, and why.
        machine: See `machine_facts`.
    """

    title: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine_facts)

    def add(self, group: str, name: str, samples: list[float], **facts: float | str) -> None:
        """One more row; without samples none."""
        if samples:
            spread = Spread.of(samples)
            self.rows.append(Row(group=group, name=name, spread=spread, facts=facts))

    def p50(self, group: str, name: str) -> float | None:
        """The median of a row, in seconds."""
        for row in self.rows:
            if (row.group, row.name) == (group, name):
                return row.spread.p50
        return None

    def judge(
        self, figure: str, goal: str, measured: float | None, limit: float, words: str
    ) -> None:
        """Hold a figure against the most that it may be; ``words`` is how it is shown."""
        if measured is None:
            found = Goal(figure=figure, goal=goal, measured="not measured", met=None)
        else:
            found = Goal(figure=figure, goal=goal, measured=words, met=measured <= limit)
        self.goals.append(found)

    def to_json(self) -> dict[str, Any]:
        """All figures, in seconds and bytes."""
        return {"format": FORMAT_VERSION, **dataclasses.asdict(self)}


class Run:
    """A command's run: says where it is, and shows and writes what it found."""

    def __init__(self, title: str, settings: dict[str, Any]) -> None:
        self.figures = Figures(title, settings)
        self._console = Console()
        if not self._console.is_terminal:
            self._console.width = 132
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Where the run is."""
        seconds = time.monotonic() - self._started
        self._console.print(f"[dim]{seconds:4.0f} s  {text}[/dim]", highlight=False)

    def finish(self, json_path: Path | None, plot_path: Path | None) -> Figures:
        """Show, and write what was asked for."""
        figures = self.figures
        figures.settings["seconds"] = time.monotonic() - self._started
        show(figures, self._console)
        if json_path is not None:
            text = json.dumps(figures.to_json(), indent=1, ensure_ascii=False)
            json_path.write_text(text + "\n", encoding="utf-8")
            self._console.print(f"figures: {json_path}")
        if plot_path is not None:
            plot(figures, plot_path)
            self._console.print(f"plot: {plot_path}")
        return figures


def show(figures: Figures, console: Console) -> None:
    """Print all; the goals come last."""
    columns = list(dict.fromkeys(name for row in figures.rows for name in row.facts))
    table = _table(figures.title)
    for _ in range(2):
        table.add_column("", no_wrap=True)
    for column in ("p50", "p10 - p90", "min - max", "samples", *columns):
        table.add_column(column, justify="right", no_wrap=column == "p50")
    previous = None
    for row in figures.rows:
        if previous not in {None, row.group}:
            table.add_section()
        spread = row.spread
        table.add_row(
            row.group if row.group != previous else "",
            row.name,
            format_seconds(spread.p50),
            f"{format_seconds(spread.p10)} - {format_seconds(spread.p90)}",
            f"{format_seconds(spread.low)} - {format_seconds(spread.high)}",
            str(spread.num_samples),
            *(_fact(row.facts.get(column, "")) for column in columns),
        )
        previous = row.group
    console.print(table)
    if figures.unavailable:
        table = _table("Not measured", "what", "why")
        for name, why in figures.unavailable.items():
            table.add_row(name, escape(why))
        console.print(table)
    table = _table("Goals of the design", "figure", "goal", "measured", "met")
    for goal in figures.goals:
        met = "[dim]?[/dim]" if goal.met is None else "yes" if goal.met else "[bold red]NO[/]"
        table.add_row(goal.figure, goal.goal, goal.measured, met)
    console.print(table)
    console.print(escape(machine_line(figures.machine)), highlight=False, style="dim")


def _fact(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def plot(figures: Figures, path: Path) -> None:
    """Draw each group's medians as bars, with their 10th to 90th percentile."""
    groups = list(dict.fromkeys(row.group for row in figures.rows))
    heights = [sum(row.group == group for row in figures.rows) for group in groups]
    style: Any = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        size = (9, 1 + 0.55 * len(groups) + 0.26 * sum(heights))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
        for axes, group in zip(panels[:, 0], groups, strict=True):
            rows = [row for row in figures.rows if row.group == group][::-1]
            spreads = [row.spread for row in rows]
            below = [spread.p50 - spread.p10 for spread in spreads]
            above = [spread.p90 - spread.p50 for spread in spreads]
            axes.barh(
                [row.name for row in rows],
                [spread.p50 for spread in spreads],
                xerr=[below, above],
                color=[_OURS if row.name.startswith("aiordt") else _THEIRS for row in rows],
                error_kw={"elinewidth": 0.9, "ecolor": "#222222"},
            )
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: format_seconds(value))
            axes.set_title(group, loc="left", fontweight="bold")
        figure.suptitle(figures.title)
        figure.savefig(path, dpi=150)
