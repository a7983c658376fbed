"""Results as tables on the terminal, and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from benchmarks._measure import format_nbytes, format_seconds
from benchmarks._pages import HUGE, ORDINARY, SHARED
from benchmarks._results import (
    AIORDT,
    CMA,
    GLOO,
    INLINE,
    LABELS,
    MAPPED_ONE,
    MAPPED_TWO,
    MEMCPY,
    NIXL,
    NIXL_PULL,
    RAW_NIXL,
    RAW_OF,
    RAW_ONE,
    RAW_TWO,
    RAW_UCXX,
    SHM,
    STORE,
    STORE_VIEW,
    TCP,
    UCX,
    WAYS,
    find,
    goals,
    raw_best,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from rich.console import Console

    from benchmarks._results import Latency, Results

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS: Final = {
    AIORDT: "#0072B2",
    STORE: "#D55E00",
    STORE_VIEW: "#E69F00",
    GLOO: "#009E73",
    NIXL: "#CC79A7",
    CMA: "#0072B2",
    TCP: "#56B4E9",
    INLINE: "#882255",
    RAW_ONE: "#999999",
    RAW_TWO: "#000000",
    MEMCPY: "#E69F00",
    SHM: "#D55E00",
    MAPPED_ONE: "#E69F00",
    MAPPED_TWO: "#F0E442",
    NIXL_PULL: "#CC79A7",
    RAW_NIXL: "#AA4499",
    UCX: "#009E73",
    RAW_UCXX: "#117733",
}


def show(results: Results, console: Console) -> None:
    """Print all tables; the goals come last."""
    if results.actors:
        console.print(_actors_table(results))
    if results.pulls:
        console.print(_pulls_table(results))
    if results.lags:
        console.print(_lags_table(results))
    if results.idles:
        console.print(_idles_table(results))
    shares = results.huge_share.items()
    low = {what: share for what, share in shares if what.endswith(HUGE) and share < 0.9}
    if low:
        table = _table("Less on huge pages than asked for", "peer, bytes", "on huge pages")
        for what, share in low.items():
            table.add_row(what, f"{share:.0%}")
        console.print(table)
    if results.unavailable:
        table = _table("Not measured", "what", "why")
        for name, why in results.unavailable.items():
            table.add_row(LABELS.get(name, name), why)
        console.print(table)
    table = _table("Goals of the design", "figure", "goal", "measured", "met")
    for goal in goals(results):
        met = "[dim]?[/dim]" if goal.met is None else "yes" if goal.met else "[bold red]NO[/]"
        table.add_row(goal.figure, goal.goal, goal.measured, met)
    console.print(table)
    console.print(escape(machine_line(results.machine)), highlight=False, style="dim")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _numbers(table: Table, *columns: str) -> Table:
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _pages(row: Latency) -> str:
    return row.pages if row.nbytes >= 2 << 20 or row.pages == SHARED else ""


def _band(row: Latency) -> tuple[str, str, str, str]:
    spread = row.spread
    return (
        format_seconds(spread.p50),
        f"{format_seconds(spread.p10)} - {format_seconds(spread.p90)}",
        f"{format_seconds(spread.low)} - {format_seconds(spread.high)}",
        str(spread.num_samples),
    )


def _actors_table(results: Results) -> Table:
    table = _table("From actor to actor through the driver", "size", "producer's memory", "")
    _numbers(table, "p50", "p10 - p90", "min - max", "samples", "p50 / aiordt's")
    previous: object = None
    for row in results.actors:
        key = (row.nbytes, row.pages)
        if previous not in {None, key}:
            table.add_section()
        first = key != previous
        previous = key
        ours = find(results.actors, AIORDT, row.nbytes, row.pages)
        ratio = "" if ours is None else f"{row.spread.p50 / ours.spread.p50:.2f}"
        table.add_row(
            format_nbytes(row.nbytes) if first else "",
            _pages(row) if first else "",
            LABELS[row.name],
            *_band(row),
            "" if row.name == AIORDT else ratio,
        )
    return table


def _pulls_table(results: Results) -> Table:
    table = _table("Pull of a held ref", "size", "producer's memory", "")
    _numbers(table, "p50", "p10 - p90", "min - max", "samples", "GB/s", "of raw")
    previous: object = None
    for row in results.pulls:
        key = (row.nbytes, row.pages)
        if previous not in {None, key}:
            table.add_section()
        first = key != previous
        previous = key
        ours = row.name in RAW_OF
        raw = raw_best(results.pulls, row.nbytes, row.pages, row.name) if ours else None
        share = "" if raw is None else f"{raw.spread.p50 / row.spread.p50:.0%}"
        rate = row.nbytes / row.spread.p50 / 1e9
        table.add_row(
            format_nbytes(row.nbytes) if first else "",
            _pages(row) if first else "",
            row.name,
            *_band(row),
            f"{rate:.1f}" if row.nbytes >= 1 << 16 else "",
            share,
        )
    return table


def _lags_table(results: Results) -> Table:
    table = _table("Lateness of the consumer's loop while 1 GiB arrives", "", "what")
    _numbers(
        table,
        "it takes",
        "p50",
        "p99",
        "max",
        "plain p99",
        "samples",
        "idle p50",
        "idle p99",
        "idle max",
    )
    for lag in results.lags:
        table.add_row(
            LABELS.get(lag.name, lag.name),
            lag.what,
            format_seconds(lag.duration.p50),
            format_seconds(lag.late.p50),
            format_seconds(lag.late.p99),
            format_seconds(lag.late.high),
            format_seconds(lag.ticks.p99),
            str(lag.late.num_samples),
            format_seconds(lag.idle.p50),
            format_seconds(lag.idle.p99),
            format_seconds(lag.idle.high),
        )
    return table


def _idles_table(results: Results) -> Table:
    table = _table("CPU while everything waits, of a core", "", "process", "pending")
    _numbers(table, "CPU")
    for idle in results.idles:
        name = LABELS.get(idle.name, idle.name)
        table.add_row(name, idle.process, idle.awaits, f"{idle.cores:.2%}")
    return table


def machine_line(machine: dict[str, Any]) -> str:
    """Where the figures come from, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = " ".join(f"{value:.1f}" for value in machine["load_average"])
    return (
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{format_nbytes(machine['memory_bytes'] >> 30 << 30)}, "
        f"Linux {machine['kernel']}, huge pages {machine['thp']}, Python {machine['python']}, "
        f"{versions}; load before the run {load}; {machine['date']}"
    )


# --- the picture ---------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """Draw latency over size: actor to actor, and pull of a held ref."""
    style: Any = {
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 5.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [name for name in LABELS if name != AIORDT] + [AIORDT]
        _panel(left, results.actors, names, "From actor to actor, through the driver")
        ways = list(WAYS[::-1])
        _panel(right, results.pulls, ways, "Await of a held ref, beside raw reads of its pages")
        figure.supxlabel(
            "Median and 10th to 90th percentile. Solid: producer's tensor on 4 KiB pages; "
            "dashed: on huge pages. " + _short_machine(results.machine),
            fontsize=8,
            color="#555555",
        )
        figure.savefig(path, dpi=150)


def _short_machine(machine: dict[str, Any]) -> str:
    ray, torch = machine["versions"].get("ray"), machine["versions"].get("torch")
    return f"{machine['cpu']}, {machine['cores']} cores; Ray {ray}, torch {torch}."


def _panel(axes: Axes, rows: Sequence[Latency], names: Sequence[str], title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name in names:
        for pages, line in ((ORDINARY, "-"), (SHARED, "-"), (HUGE, "--")):
            series = [row for row in rows if (row.name, row.pages) == (name, pages)]
            if series:
                label = LABELS.get(name, name) if line == "-" else None
                _line(axes, name, series, line, label=label)
    sizes = sorted({row.nbytes for row in rows})
    axes.set_xticks(sizes, [format_nbytes(nbytes) for nbytes in sizes], rotation=25)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(_tick)
    axes.grid(visible=True, axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylabel("latency")
    if rows:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, loc="upper left")


def _tick(value: float, _position: object) -> str:
    number, _, unit = format_seconds(value).partition(" ")
    return f"{float(number):g} {unit}"


def _line(axes: Axes, name: str, rows: Sequence[Latency], line: str, *, label: str | None) -> None:
    sizes = [row.nbytes for row in rows]
    ours = name in {AIORDT, CMA}
    axes.plot(
        sizes,
        [row.spread.p50 for row in rows],
        line,
        color=_COLOURS[name],
        label=label,
        markerfacecolor=_COLOURS[name] if line == "-" else "white",
        marker="o" if line == "-" else "s",
        markersize=5 if ours else 3.5,
        linewidth=2.4 if ours else 1.4,
        zorder=3 if ours else 2,
    )
    axes.fill_between(
        sizes,
        [row.spread.p10 for row in rows],
        [row.spread.p90 for row in rows],
        color=_COLOURS[name],
        alpha=0.13,
        linewidth=0,
    )
