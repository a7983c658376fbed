"""Items from actor to actor: channels beside compiled graphs, Gloo's send and the object store.

An *echo* is an item that goes to another actor and comes back, timed by who sent it first. A
*stream* is timed from the first item to the last one's arrival, and is shown for each item.
Compiled graphs and the object store are driven by their caller, as they must be: there an
echo is a call of the one actor, seen from the driver, with the item as argument and result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import torch
import torch.distributed as dist

import aiordt
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import KIB, MIB, format_nbytes, format_seconds
from benchmarks._pages import quiet

if TYPE_CHECKING:
    from benchmarks._figures import Figures

_SIZES: Final = (8, 64 * KIB, MIB, 16 * MIB)
_QUICK_SIZES: Final = (64 * KIB,)
_GOAL_NBYTES: Final = 64 * KIB
_GOAL: Final = 150e-6

OURS: Final = "aiordt channel"
COPIES: Final = "aiordt channel, copies"
GLOO: Final = "raw Gloo send/recv"
GRAPH: Final = "compiled graph"
STORE: Final = "ray.put + ray.get"
NAMES: Final = (OURS, COPIES, GLOO, GRAPH, STORE)
_ERRORS: Final = (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError, RuntimeError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures: items of ``sizes`` bytes, ``rounds`` of each way in turn."""

    sizes: tuple[int, ...]
    rounds: int

    @classmethod
    def choose(cls, *, quick: bool, sizes: tuple[int, ...] | None = None) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: A size is no multiple of 4.
        """
        if any(size < 4 or size % 4 for size in sizes or ()):
            raise ValueError("sizes must be multiples of 4")
        return cls(sizes=sizes or (_QUICK_SIZES if quick else _SIZES), rounds=1 if quick else 5)

    def count(self, nbytes: int) -> int:
        """How many items of this size go in a round."""
        return 20 if nbytes > 4 * MIB else 60 if nbytes > 256 * KIB else 300


def _item(nbytes: int) -> torch.Tensor:
    return torch.arange(nbytes // 4, dtype=torch.int32)


@ray.remote
class _Node(aiordt.AsyncActor):
    """Either end of every way but compiled graphs."""

    def __init__(self) -> None:
        quiet()
        self._group: Any = None

    async def pid(self) -> int:
        return os.getpid()

    # --- channels ----------------------------------------------------------------------------

    async def ask(
        self, tx: aiordt.Sender, rx: aiordt.Receiver, nbytes: int, count: int
    ) -> list[float]:
        item, took = _item(nbytes), []
        for number in range(count + count // 4):
            begun = time.perf_counter()
            await tx.send(item)
            back = await rx.recv()
            if number >= count // 4:
                took.append(time.perf_counter() - begun)
            if back.shape != item.shape or back[-1] != item[-1]:
                raise RuntimeError("what came back is something else")
        await tx.aclose()
        return took

    async def answer(self, rx: aiordt.Receiver, tx: aiordt.Sender) -> None:
        async with tx:
            async for item in rx:
                await tx.send(item)

    async def stream(self, tx: aiordt.Sender, nbytes: int, count: int) -> float:
        """Send; when the first of them was, by the clock that all processes of a host have."""
        item = _item(nbytes)
        async with tx:
            await tx.send(item)
            begun = time.monotonic()
            for _ in range(count):
                await tx.send(item)
        return begun

    async def drain(self, rx: aiordt.Receiver) -> float:
        """Receive; when the last one came."""
        ended = 0.0
        async for item in rx:
            ended = time.monotonic() + 0.0 * float(item[0])
        return ended

    # --- Gloo --------------------------------------------------------------------------------

    async def join(self, path: str, rank: int) -> None:
        def connect() -> Any:  # noqa: ANN401
            store: Any = dist.FileStore(path, 2)  # type: ignore[attr-defined]
            return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))

        self._group = await asyncio.to_thread(connect)

    async def ask_gloo(self, nbytes: int, count: int) -> list[float]:
        def run() -> list[float]:
            item, back, took = _item(nbytes), _item(nbytes), []
            for number in range(count + count // 4):
                begun = time.perf_counter()
                self._group.send([item], 1, 0).wait()
                self._group.recv([back], 1, 0).wait()
                if number >= count // 4:
                    took.append(time.perf_counter() - begun)
            return took

        return await asyncio.to_thread(run)

    async def answer_gloo(self, nbytes: int, count: int) -> None:
        def run() -> None:
            item = _item(nbytes)
            for _ in range(count + count // 4):
                self._group.recv([item], 0, 0).wait()
                self._group.send([item], 0, 0).wait()

        await asyncio.to_thread(run)

    async def stream_gloo(self, nbytes: int, count: int) -> float:
        def run() -> float:
            item = _item(nbytes)
            self._group.send([item], 1, 0).wait()
            begun = time.monotonic()
            for _ in range(count):
                self._group.send([item], 1, 0).wait()
            return begun

        return await asyncio.to_thread(run)

    async def drain_gloo(self, nbytes: int, count: int) -> float:
        def run() -> float:
            item = _item(nbytes)
            for _ in range(count + 1):
                self._group.recv([item], 0, 0).wait()
            return time.monotonic()

        return await asyncio.to_thread(run)


@ray.remote
class _Plain:
    """The actor of compiled graphs, and of calls by the object store."""

    def __init__(self) -> None:
        quiet()

    def pid(self) -> int:
        return os.getpid()

    def echo(self, item: torch.Tensor) -> torch.Tensor:
        return item


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run("Items from actor to actor (int32 in host memory)", dataclasses.asdict(settings))
    figures = a_run.figures
    a_run.say("starting Ray")
    echoes: dict[tuple[int, str], list[float]] = defaultdict(list)
    streams: dict[tuple[int, str], list[float]] = defaultdict(list)
    with cluster(), tempfile.TemporaryDirectory() as folder:
        lot = _Lot(Path(folder) / "store")
        try:
            for number in range(settings.rounds):
                a_run.say(f"round {number + 1} of {settings.rounds}")
                for nbytes in settings.sizes:
                    for name in [name for name in NAMES if name not in figures.unavailable]:
                        try:
                            some, each = lot.measure(name, nbytes, settings.count(nbytes))
                        except _ERRORS as exc:
                            figures.unavailable[name] = reason(exc)
                            continue
                        echoes[nbytes, name] += some
                        streams[nbytes, name] += each
        finally:
            lot.end()
    for nbytes in settings.sizes:
        for kind, found in (("echo", echoes), ("stream", streams)):
            for name in NAMES:
                figures.add(_group(kind, nbytes), name, found[nbytes, name])
    judge(figures)
    return a_run.finish(json_path, plot_path)


def _group(kind: str, nbytes: int) -> str:
    return f"{kind} {format_nbytes(nbytes)}"


def judge(figures: Figures) -> None:
    """Hold an item of 64 KiB against the goal: one way is half of an echo."""
    echo = figures.p50(_group("echo", _GOAL_NBYTES), OURS)
    stream = figures.p50(_group("stream", _GOAL_NBYTES), OURS)
    for what, measured in (
        ("actor to actor, half an echo", None if echo is None else echo / 2),
        ("actor to actor, in a stream", stream),
    ):
        figures.judge(
            f"64 KiB {what}",
            f"p50 ≤ {_GOAL * 1e6:.0f} µs",
            measured,
            _GOAL,
            "" if measured is None else format_seconds(measured),
        )


class _Lot:
    """The actors, which all live until the end."""

    def __init__(self, store: Path) -> None:
        self._nodes = [start(_Node), start(_Node)]
        self._plain = start(_Plain)
        self._graph: Any = None
        self._store = store
        self._joined = False
        get([actor.pid.remote() for actor in (*self._nodes, self._plain)])

    def measure(self, name: str, nbytes: int, count: int) -> tuple[list[float], list[float]]:
        """Seconds of echoes, and seconds for each item of a stream."""
        if name in {OURS, COPIES}:
            return asyncio.run(self._channels(nbytes, count, copies=name == COPIES))
        if name == GLOO:
            return self._gloo(nbytes, count)
        if name == GRAPH:
            return self._compiled(nbytes, count), []
        return self._stored(nbytes, max(5, count // 10)), []

    async def _channels(
        self, nbytes: int, count: int, *, copies: bool
    ) -> tuple[list[float], list[float]]:
        first, second = self._nodes
        there, in_second = await aiordt.channel(first, second, copies=copies)
        back, in_first = await aiordt.channel(second, first, copies=copies)
        answered = second.answer.remote(in_second, back)
        echoes = await first.ask.remote(there, in_first, nbytes, count)
        await answered
        tx, rx = await aiordt.channel(first, second, copies=copies)
        drained = second.drain.remote(rx)
        begun = await first.stream.remote(tx, nbytes, count)
        return echoes, [(await drained - begun) / count]

    def _gloo(self, nbytes: int, count: int) -> tuple[list[float], list[float]]:
        if not self._joined:
            get([node.join.remote(str(self._store), rank) for rank, node in enumerate(self._nodes)])
            self._joined = True
        first, second = self._nodes
        answered = second.answer_gloo.remote(nbytes, count)
        echoes = get(first.ask_gloo.remote(nbytes, count))
        get(answered)
        drained = second.drain_gloo.remote(nbytes, count)
        begun = get(first.stream_gloo.remote(nbytes, count))
        return echoes, [(get(drained) - begun) / count]

    def _compiled(self, nbytes: int, count: int) -> list[float]:
        from ray.dag import InputNode  # noqa: PLC0415  (experimental)

        if self._graph is None:
            with InputNode() as given:
                made = self._plain.echo.bind(given)
            self._graph = made.experimental_compile(_buffer_size_bytes=64 * MIB)
        item, took = _item(nbytes), []
        for number in range(count + count // 4):
            begun = time.perf_counter()
            back = ray.get(self._graph.execute(item))
            if number >= count // 4:
                took.append(time.perf_counter() - begun)
            if back.shape != item.shape:
                raise RuntimeError("what came back is something else")
            del back
        return took

    def _stored(self, nbytes: int, count: int) -> list[float]:
        self._release_graph()
        item, took = _item(nbytes), []
        for number in range(count + 2):
            begun = time.perf_counter()
            back = get(self._plain.echo.remote(ray.put(item)))
            if number >= 2:
                took.append(time.perf_counter() - begun)
            del back
        return took

    def _release_graph(self) -> None:
        """While a graph is compiled, its actor takes no calls."""
        if self._graph is not None:
            self._graph.teardown()
            self._graph = None

    def end(self) -> None:
        """End the actors."""
        self._release_graph()
        end([*self._nodes, self._plain])
