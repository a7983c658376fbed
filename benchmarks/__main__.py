"""The command line: ``python -m benchmarks <name>``."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer

# Ray reads these when it is imported. A peer that hangs is to be shown as such, soon.
os.environ.setdefault("RAY_rdt_fetch_fail_timeout_milliseconds", "20000")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def benchmarks() -> None:
    """Measure aiordt side by side with its peers."""


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


@app.command()
def p2p(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over size here (PNG).")] = None,
    sizes: Annotated[str | None, typer.Option(hidden=True)] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    parts: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """One producer, one consumer: latency, throughput, loop lag and idle CPU."""
    from benchmarks import p2p as command  # noqa: PLC0415  (imports Ray: see above)

    try:
        settings = command.Settings.choose(
            quick=quick,
            sizes=None if sizes is None else tuple(int(size) for size in _listed(sizes) or ()),
            only=_listed(only),
            parts=_listed(parts),
        )
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    command.run(settings, json_path=json, plot_path=plot)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
