"""A dict of many tensors: its export, its refs through Ray, its pull, and what peers take."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from benchmarks import _p2p_actors
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import KIB, format_nbytes, format_seconds
from benchmarks._p2p_actors import Pair, state_dict
from benchmarks._pages import quiet, receive_tensor
from benchmarks._results import AIORDT, GLOO, LABELS, NIXL, STORE

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks._figures import Figures

WAYS: Final = ("shm", "cma", "nixl", "ucx", "tcp")
PEERS: Final = (AIORDT, STORE, GLOO, NIXL)
#: Tensors in a dict, and the bytes of each.
_SHAPES: Final = {1_000: 64 * KIB, 10_000: 4 * KIB}
_GOAL_COUNT: Final = 1_000
_PER_TENSOR: Final = 20e-6
_PER_BYTE: Final = 1.3
_SHUFFLE_SEED: Final = 1
#: Seconds after which what is slow gets no more samples than two.
_BUDGET: Final = 5.0
#: Calls that warm a pair of actors up.
_FIRST_CALLS: Final = 3

FLOOR: Final = "two empty calls"
_CALLS: Final = "aiordt {}: two calls with the refs, less export"
MEMCPY: Final = "memcpy, tensor by tensor"
MEMCPY_ONE: Final = "memcpy, in one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures: numbers of tensors, transports and peers, rounds and samples."""

    counts: tuple[int, ...]
    ways: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    samples: int

    @classmethod
    def choose(
        cls,
        *,
        quick: bool,
        counts: tuple[int, ...] | None = None,
        only: tuple[str, ...] | None = None,
    ) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: There is no such way or peer, or a count is not positive.
        """
        unknown = [name for name in only or () if name not in {*WAYS, *PEERS}]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join((*WAYS, *PEERS))}")
        if any(count < 1 for count in counts or ()):
            raise ValueError("counts must be positive")
        # "nixl" is the name of a transport, and of RDT's.
        return cls(
            counts=counts or ((_GOAL_COUNT,) if quick else tuple(_SHAPES)),
            ways=tuple(way for way in WAYS if only is None or way in only),
            peers=tuple(peer for peer in PEERS if only is None or peer in only),
            rounds=1 if quick else 3,
            samples=5 if quick else 15,
        )


def nbytes_of(count: int) -> int:
    """Bytes of each tensor in a dict of so many."""
    return _SHAPES.get(count, 64 * KIB)


@ray.remote
class _Trainer(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._state: dict[bool, dict[str, torch.Tensor]] = {}
        self._one: dict[bool, torch.Tensor] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def make(self, count: int, nbytes: int) -> None:
        self._state, self._one = {}, {}
        for shared in (False, True):
            self._state[shared] = state_dict(count, nbytes, shared=shared)
            make = aiordt.empty if shared else torch.empty
            self._one[shared] = make(count * nbytes, dtype=torch.uint8).fill_(1)

    async def nothing(self) -> None:
        """The floor of a call."""

    async def export(self, way: str) -> tuple[float, dict[str, aiordt.TensorRef]]:
        """Seconds of the export, and the refs."""
        begun = time.perf_counter()
        refs = await aiordt.put(self._state[way == "shm"], transport=way)
        return time.perf_counter() - begun, refs

    async def export_one(self, way: str) -> aiordt.TensorRef:
        return await aiordt.put(self._one[way == "shm"], transport=way)


@ray.remote
class _Sampler(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        aiordt.configure(relay_nbytes=0)  # else a second pull comes from the first one's copy
        self._refs: dict[str, dict[str, aiordt.TensorRef]] = {}
        self._one: dict[str, aiordt.TensorRef] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def accept(self, exported: tuple[float, Any] | None) -> float:
        """Take what a trainer exported, and no more; the seconds that its export took."""
        return 0.0 if exported is None else exported[0]

    async def hold(
        self, way: str, exported: tuple[float, Any], one: aiordt.TensorRef, count: int
    ) -> str | None:
        """Keep refs that can be pulled, and are right; otherwise say why they cannot."""
        refs = exported[1]
        try:
            before = aiordt.stats().bytes_pulled
            tensors = await aiordt.get(refs)
            needed = sum(ref.nbytes for ref in refs.values())
            if aiordt.stats().bytes_pulled - before != needed:
                raise RuntimeError(f"{way}: other bytes moved than the dict has")
            await one
        except aiordt.UnavailableError as exc:
            return reason(exc)
        wrong = [name for i, (name, t) in enumerate(tensors.items()) if not bool((t == i).all())]
        if wrong or len(tensors) != count:
            raise RuntimeError(f"{way}: the bytes of {wrong[:1]} are wrong")
        self._refs[way], self._one[way] = refs, one
        return None

    async def drop(self) -> None:
        self._refs, self._one = {}, {}

    async def measure(self, count: int, nbytes: int, samples: int) -> dict[str, list[float]]:
        """Time every way ``samples`` times, warm, in a new order each time."""
        names = [f"pull {way}" for way in self._refs] + [f"one {way}" for way in self._one]
        order = [*names, MEMCPY, MEMCPY_ONE]
        shuffle = random.Random(_SHUFFLE_SEED)  # noqa: S311  (no secret)
        sources = list(state_dict(count, nbytes).values())
        targets = [torch.zeros_like(source) for source in sources]
        copies = [(t.data_ptr(), s.data_ptr()) for t, s in zip(targets, sources, strict=True)]
        there, here = receive_tensor(count * nbytes), receive_tensor(count * nbytes)
        found: dict[str, list[float]] = defaultdict(list)
        spent: dict[str, float] = defaultdict(float)
        for number in range(samples + 2):
            shuffle.shuffle(order)
            for name in order:
                if spent[name] > _BUDGET and len(found[name]) > 1:
                    continue
                kind, _, way = name.partition(" ")
                got: Any = None
                begun = time.perf_counter()
                if name == MEMCPY:
                    for target, source in copies:
                        ctypes.memmove(target, source, nbytes)
                elif name == MEMCPY_ONE:
                    ctypes.memmove(there.data_ptr(), here.data_ptr(), count * nbytes)
                elif kind == "pull":
                    got = await aiordt.get(self._refs[way])
                else:
                    got = await self._one[way]
                took = time.perf_counter() - begun
                del got
                spent[name] += took
                if number >= 2:
                    found[name].append(took)
        return dict(found)


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run("State dicts", dataclasses.asdict(settings))
    figures = a_run.figures
    a_run.say("starting Ray")
    with cluster():
        for count in settings.counts:
            series: dict[str, list[float]] = defaultdict(list)
            for number in range(settings.rounds):
                a_run.say(f"{count:,} tensors, round {number + 1} of {settings.rounds}")
                actors: list[Any] = []
                try:
                    actors += [start(_Trainer), start(_Sampler)]
                    _turn(figures, settings, count, series, actors)
                except (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError) as exc:
                    figures.unavailable[f"{count:,} tensors, round {number + 1}"] = reason(exc)
                finally:
                    end(actors)
                for peer in settings.peers:
                    _peer_turn(figures, settings, count, peer, series)
            _rows(figures, settings, count, series)
            judge(figures, settings.ways, count)
    return a_run.finish(json_path, plot_path)


def _turn(
    figures: Figures,
    settings: Settings,
    count: int,
    series: dict[str, list[float]],
    actors: list[Any],
) -> None:
    trainer, sampler = actors
    nbytes = nbytes_of(count)
    get(trainer.make.remote(count, nbytes))
    for way in settings.ways:
        try:
            one = get(trainer.export_one.remote(way))
            why = get(sampler.hold.remote(way, trainer.export.remote(way), one, count))
        except ray.exceptions.RayTaskError as exc:
            why = reason(exc)
        if why is not None:
            figures.unavailable[way] = why
            continue
        for number in range(settings.samples + _FIRST_CALLS):
            begun = time.perf_counter()
            get(sampler.accept.remote(trainer.nothing.remote()))
            floor = time.perf_counter() - begun
            begun = time.perf_counter()
            export = get(sampler.accept.remote(trainer.export.remote(way)))
            took = time.perf_counter() - begun
            if number >= _FIRST_CALLS:
                series[f"floor {way}"].append(floor)
                series[f"export {way}"].append(export)
                series[f"calls {way}"].append(took - export)
    for name, seconds in get(sampler.measure.remote(count, nbytes, settings.samples)).items():
        series[name] += seconds
    get(sampler.drop.remote())


def _peer_turn(
    figures: Figures, settings: Settings, count: int, peer: str, series: dict[str, list[float]]
) -> None:
    name = f"{LABELS[peer]}, {count:,} tensors"
    why = _p2p_actors.missing(peer)
    if why is not None:
        figures.unavailable[name] = why
    if name in figures.unavailable:
        return
    try:
        pair = Pair(peer)
        try:
            get(pair.producer.make_dict.remote(count, nbytes_of(count)))
            for number in range(settings.samples + _FIRST_CALLS):
                begun = time.perf_counter()
                pair.call()
                if number >= _FIRST_CALLS:
                    series[f"peer {peer}"].append(time.perf_counter() - begun)
        finally:
            pair.end()
    except (ray.exceptions.RayError, TimeoutError, RuntimeError, ValueError, ImportError) as exc:
        figures.unavailable[name] = reason(exc)


def group_of(count: int) -> str:
    """The name of a dict."""
    return f"{count:,} x {format_nbytes(nbytes_of(count))}"


def _rows(figures: Figures, settings: Settings, count: int, series: dict[str, list[float]]) -> None:
    group = group_of(count)
    steps = {
        "floor": FLOOR,
        "export": "aiordt {}: export",
        "calls": _CALLS,
        "pull": "aiordt {}: pull",
        "one": "aiordt {}: pull of one tensor of that size",
    }
    for way in settings.ways:
        for step, label in steps.items():
            seconds = series[f"{step} {way}"]
            if seconds and (step != "floor" or way == settings.ways[0]):
                median = sorted(seconds)[len(seconds) // 2]
                figures.add(group, label.format(way), seconds, **_per_tensor(median, count, step))
    for name in (MEMCPY, MEMCPY_ONE):
        figures.add(group, name, series[name])
    for peer in settings.peers:
        figures.add(group, f"{LABELS[peer]}: actor to actor", series[f"peer {peer}"])


def _per_tensor(seconds: float, count: int, step: str) -> dict[str, float | str]:
    return (
        {} if step in {"floor", "one", "calls"} else {"a tensor": format_seconds(seconds / count)}
    )


def judge(figures: Figures, ways: tuple[str, ...], count: int) -> None:
    """Hold each transport against memcpy, and against one tensor of the same bytes."""
    group = group_of(count)
    memcpy, floor = figures.p50(group, MEMCPY), figures.p50(group, FLOOR)
    for way in ways:
        export = figures.p50(group, f"aiordt {way}: export")
        calls = figures.p50(group, _CALLS.format(way))
        through = None if calls is None or floor is None else calls - floor
        pull = figures.p50(group, f"aiordt {way}: pull")
        one = figures.p50(group, f"aiordt {way}: pull of one tensor of that size")
        for what, parts in (("pull", (pull,)), ("export, refs, pull", (export, through, pull))):
            over, words = None, ""
            if memcpy is not None and None not in parts:
                over = (sum(part or 0.0 for part in parts) - memcpy) / count
                words = f"{over * 1e6:.1f} µs"
            figure = f"{group}, {way}: {what}, a tensor, over memcpy"
            figures.judge(figure, "≤ 20 µs", over, _PER_TENSOR, words)
        ratio = None if pull is None or not one else pull / one
        words = "" if ratio is None else f"{ratio:.2f} x"
        figure = f"{group}, {way}: pull over that of one tensor of as many bytes"
        figures.judge(figure, "≤ 1.3 x", ratio, _PER_BYTE, words)
