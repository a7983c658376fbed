"""The command line: ``python -m benchmarks <name>``."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Generator

# Ray reads these when it is imported. A peer that hangs is to be shown as such, soon.
os.environ.setdefault("RAY_rdt_fetch_fail_timeout_milliseconds", "20000")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def benchmarks() -> None:
    """Measure aiordt side by side with its peers."""


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


@contextmanager
def _refusals() -> Generator[None]:
    """Settings that are refused are a mistake on the command line."""
    try:
        yield
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


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

    with _refusals():
        settings = command.Settings.choose(
            quick=quick,
            sizes=None if sizes is None else tuple(int(size) for size in _listed(sizes) or ()),
            only=_listed(only),
            parts=_listed(parts),
        )
    command.run(settings, json_path=json, plot_path=plot)


_Quick = Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")]
_Json = Annotated[Path | None, typer.Option(help="Write all figures here.")]
_Plot = Annotated[Path | None, typer.Option(help="Draw the medians here (PNG).")]
_Hidden = Annotated[str | None, typer.Option(hidden=True)]


@app.command()
def view(
    *, quick: _Quick = False, json: _Json = None, plot: _Plot = None, sizes: _Hidden = None
) -> None:
    """A view of another process's tensor, beside copies and Ray's object store."""
    from benchmarks import view as command  # noqa: PLC0415

    chosen = None if sizes is None else tuple(int(size) for size in _listed(sizes) or ())
    command.run(command.Settings.choose(quick=quick, sizes=chosen), json_path=json, plot_path=plot)


@app.command()
def slices(
    *, quick: _Quick = False, json: _Json = None, plot: _Plot = None, side: _Hidden = None
) -> None:
    """Parts of a tensor: bytes moved and time, beside pulling all of it."""
    from benchmarks import slices as command  # noqa: PLC0415

    command.run(
        command.Settings.choose(quick=quick, side=None if side is None else int(side)),
        json_path=json,
        plot_path=plot,
    )


@app.command()
def statedict(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: _Plot = None,
    counts: _Hidden = None,
    only: _Hidden = None,
) -> None:
    """A dict of a thousand tensors: export, refs through Ray, pull, beside memcpy and peers."""
    from benchmarks import statedict as command  # noqa: PLC0415

    chosen = None if counts is None else tuple(int(count) for count in _listed(counts) or ())
    with _refusals():
        settings = command.Settings.choose(quick=quick, counts=chosen, only=_listed(only))
    command.run(settings, json_path=json, plot_path=plot)


@app.command()
def collectives(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: _Plot = None,
    ranks: Annotated[str | None, typer.Option(help="How many members: 2,3 by default.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Bytes of a member's tensor.")] = None,
) -> None:
    """Collective operations, in members and on refs, beside torch's, Ray's and MPI's."""
    from benchmarks import collectives as command  # noqa: PLC0415

    with _refusals():
        settings = command.Settings.choose(
            quick=quick,
            ranks=None if ranks is None else tuple(int(count) for count in _listed(ranks) or ()),
            sizes=None if sizes is None else tuple(int(size) for size in _listed(sizes) or ()),
        )
    command.run(settings, json_path=json, plot_path=plot)


@app.command()
def flow(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latencies here (PNG).")] = None,
    parts: Annotated[str | None, typer.Option(help="Of simulate,bytes,latency,hosts.")] = None,
) -> None:
    """Graphs placed by group beside plain Ray: on raylets, on two hosts, and simulated."""
    from benchmarks import flow as command  # noqa: PLC0415

    with _refusals():
        settings = command.Settings.choose(quick=quick, parts=_listed(parts))
    command.run(settings, json_path=json, plot_path=plot)


@app.command()
def channels(
    *, quick: _Quick = False, json: _Json = None, plot: _Plot = None, sizes: _Hidden = None
) -> None:
    """Items from actor to actor, beside compiled graphs, Gloo and the object store."""
    from benchmarks import channels as command  # noqa: PLC0415

    chosen = None if sizes is None else tuple(int(size) for size in _listed(sizes) or ())
    command.run(command.Settings.choose(quick=quick, sizes=chosen), json_path=json, plot_path=plot)


@app.command()
def reshard(
    *, quick: _Quick = False, json: _Json = None, plot: _Plot = None, side: _Hidden = None
) -> None:
    """A sharded state in another partition: time and bytes, beside pulling all of it."""
    from benchmarks import reshard as command  # noqa: PLC0415

    command.run(
        command.Settings.choose(quick=quick, side=None if side is None else int(side)),
        json_path=json,
        plot_path=plot,
    )


@app.command()
def weights(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: _Plot = None,
    nbytes: Annotated[int | None, typer.Option(help="Bytes of the weights: 100 MiB.")] = None,
    readers: Annotated[str | None, typer.Option(help="How many readers: 1,2,4.")] = None,
    only: _Hidden = None,
) -> None:
    """Weights from a trainer to samplers, beside the object store, RDT and a broadcast."""
    from benchmarks import weights as command  # noqa: PLC0415

    chosen = None if readers is None else tuple(int(count) for count in _listed(readers) or ())
    with _refusals():
        settings = command.Settings.choose(
            quick=quick, nbytes=nbytes, readers=chosen, only=_listed(only)
        )
    command.run(settings, json_path=json, plot_path=plot)


@app.command()
def fanout(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: _Plot = None,
    nbytes: Annotated[int | None, typer.Option(help="Bytes of the tensors: 32 MiB.")] = None,
    hosts: Annotated[str | None, typer.Option(help="How many readers: 2,4,8,16.")] = None,
) -> None:
    """One tensor for many hosts, as far as one machine can show it; needs root."""
    from benchmarks import fanout as command  # noqa: PLC0415

    chosen = None if hosts is None else tuple(int(count) for count in _listed(hosts) or ())
    with _refusals():
        settings = command.Settings.choose(quick=quick, nbytes=nbytes, hosts=chosen)
    command.run(settings, json_path=json, plot_path=plot)


@app.command()
def crowd(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: _Plot = None,
    consumers: Annotated[int | None, typer.Option(help="How many pull at once: 200.")] = None,
    nbytes: Annotated[int | None, typer.Option(help="Bytes of what they pull: 64 MiB.")] = None,
    only: Annotated[str | None, typer.Option(help="Transports: cma,tcp,ucx,nixl.")] = None,
) -> None:
    """A small pull beside many large ones of the same producer's."""
    from benchmarks import crowd as command  # noqa: PLC0415

    with _refusals():
        settings = command.Settings.choose(
            quick=quick, consumers=consumers, nbytes=nbytes, only=_listed(only)
        )
    command.run(settings, json_path=json, plot_path=plot)


@app.command()
def overhead(
    *,
    quick: _Quick = False,
    json: _Json = None,
    plot: _Plot = None,
    rounds: Annotated[int | None, typer.Option(help="Samples of each step: 30.")] = None,
) -> None:
    """What each step of a transfer takes: awaits, exports, leases, the wire."""
    from benchmarks import overhead as command  # noqa: PLC0415

    with _refusals():
        settings = command.Settings.choose(quick=quick, rounds=rounds)
    command.run(settings, json_path=json, plot_path=plot)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
