"""Weights from a trainer to samplers: what publishing takes, when they have them, what they feel.

Peers: Ray's object store (``ray.put``, a call that passes the ref, ``await ref`` or ``ray.get``),
RDT, and torch's broadcast by Gloo, of one tensor of as many bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import ray
import torch
from typing_extensions import override

import aiordt
from aiordt.weights import publisher, subscriber
from benchmarks import _p2p_actors
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._collective_ranks import BROADCAST, RAW, Member, slowest
from benchmarks._figures import Run
from benchmarks._measure import MIB, Heartbeat, format_nbytes, lateness
from benchmarks._p2p_actors import Pair, state_dict
from benchmarks._pages import quiet
from benchmarks._results import GLOO, LABELS, NIXL, STORE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._figures import Figures

_NAME: Final = "benchmark"
_LAYER: Final = MIB
_STALL: Final = 5e-3
#: Publishing with the most readers may take so much longer than with none.
_FLAT: Final = 1.25
_WARMUPS: Final = 4

MEMCPY: Final = "copy, tensor by tensor"
PUT: Final = "ray.put"
FRESH: Final = "aiordt: publish, latest()"
INTO: Final = "aiordt: publish, latest(into=)"
PUT_GET: Final = "object store: ray.put, call, ray.get"
AWAIT: Final = "await of the object store's ref"
BLOCKING: Final = "ray.get in the sampler"
OURS: Final = "aiordt: latest()"
OURS_INTO: Final = "aiordt: latest(into=)"

_ERRORS: Final = (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError, RuntimeError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        nbytes: Of the weights.
        readers: How many, one after the other.
        samples: Of each figure.
        peers: Ray's object store, RDT, and a broadcast.
    """

    nbytes: int
    readers: tuple[int, ...]
    samples: int
    peers: tuple[str, ...]

    @classmethod
    def choose(
        cls,
        *,
        quick: bool,
        nbytes: int | None = None,
        readers: tuple[int, ...] | None = None,
        only: tuple[str, ...] | None = None,
    ) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: A number is not positive, or there is no such peer.
        """
        if (nbytes is not None and nbytes < _LAYER) or any(count < 1 for count in readers or ()):
            raise ValueError("weights are at least 1 MiB, and readers are positive")
        peers = (STORE, GLOO, NIXL, BROADCAST)
        unknown = [name for name in only or () if name not in peers]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(peers)}")
        return cls(
            nbytes=nbytes or 100 * MIB,
            readers=readers or ((1, 2) if quick else (1, 2, 4)),
            samples=6 if quick else 15,
            peers=tuple(peer for peer in peers if only is None or peer in only),
        )


#: When ``ray.put`` began and ended, and the ref in a list.
_Put: TypeAlias = "tuple[float, float, list[Any]]"


class _Actor:
    def __init__(self) -> None:
        quiet()
        self.weights: dict[str, torch.Tensor] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def make(self, nbytes: int) -> None:
        self.weights = state_dict(nbytes // _LAYER, _LAYER)


@ray.remote(max_concurrency=100)
class _Trainer(aiordt.AsyncActor, _Actor):
    async def open(self) -> None:
        self._pub = await publisher(_NAME, max_versions=6)

    async def publish(self, count: int, pause: float) -> list[tuple[float, float]]:
        """When each publish began and ended."""
        spans = []
        for _ in range(count):
            await asyncio.sleep(pause)
            begun = time.perf_counter()
            await self._pub.publish(self.weights)
            spans.append((begun, time.perf_counter()))
        return spans

    async def copy(self, count: int) -> list[float]:
        """The least that it can take."""
        targets = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        found = []
        for _ in range(count):
            begun = time.perf_counter()
            for name, tensor in self.weights.items():
                targets[name].copy_(tensor)
            found.append(time.perf_counter() - begun)
        return found

    async def put(self) -> _Put:
        """When ``ray.put`` began and ended, and the ref."""
        begun = time.perf_counter()
        ref = ray.put(self.weights)
        return begun, time.perf_counter(), [ref]


@ray.remote(max_concurrency=100)
class _Sampler(aiordt.AsyncActor, _Actor):
    @override
    async def make(self, nbytes: int) -> None:
        await _Actor.make(self, nbytes)
        self._sub = await subscriber(_NAME)

    async def read(self, until: int, *, into: bool) -> list[tuple[int, float, float]]:
        """Read to a version: which came when, and how late this loop was at most meanwhile."""
        heart = Heartbeat()
        found = []
        target = self.weights if into else None
        await self._sub.latest(into=target)  # maps the memory
        version = 0
        while version < until:
            heart.start()
            begun = time.perf_counter()
            version, weights = await self._sub.latest(version + 1, into=target)
            came = time.perf_counter()
            del weights
            await asyncio.sleep(0.005)  # what was late ticks now
            late = lateness(heart.stop(), [(begun, came)], corrected=False)
            found.append((version, came, max(late, default=0.0)))
        return found

    async def take(
        self, put: tuple[float, float, list[Any]], *, block: bool
    ) -> tuple[float, float]:
        """Have what was put; when it was there, and how late this loop was at most."""
        heart = Heartbeat()
        heart.start()
        await asyncio.sleep(0.005)
        begun = time.perf_counter()
        (ref,) = put[2]
        got = ray.get(ref) if block else await ref
        came = time.perf_counter()
        del got
        await asyncio.sleep(0.005)
        return came, max(lateness(heart.stop(), [(begun, came)], corrected=False), default=0.0)


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    size = format_nbytes(settings.nbytes)
    a_run = Run(f"Weights of {size} in tensors of 1 MiB", dataclasses.asdict(settings))
    figures = a_run.figures
    series: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    a_run.say("starting Ray")
    with cluster():
        try:
            _ours(a_run, settings, series)
        except _ERRORS as exc:
            figures.unavailable["aiordt"] = reason(exc)
        for peer in [peer for peer in settings.peers if peer != BROADCAST]:
            a_run.say(LABELS[peer])
            try:
                _peer(settings, peer, series)
            except (*_ERRORS, ValueError, ImportError) as exc:
                figures.unavailable[LABELS[peer]] = reason(exc)
        for count in settings.readers if BROADCAST in settings.peers else ():
            a_run.say(f"{RAW}, {count} readers")
            try:
                _broadcast(settings, count, series)
            except _ERRORS as exc:
                figures.unavailable[f"{RAW}, {count} readers"] = reason(exc)
    for group, named in series.items():
        base = next(iter(named.values()))
        for name, samples in named.items():
            ratio = statistics.median(samples) / statistics.median(base)
            figures.add(group, name, samples, **{"/ first": f"{ratio:.2f}"})
    judge(figures, settings)
    return a_run.finish(json_path, plot_path)


def groups(settings: Settings) -> tuple[str, str, str]:
    """Of the trainer's time, the time until a reader has it, and what its loop feels."""
    size = format_nbytes(settings.nbytes)
    return f"publish {size}", f"update of {size}", f"stall of a reader, {size}"


def publishing(readers: int) -> str:
    """The row of publishing to so many."""
    return f"aiordt, {readers} reader{'' if readers == 1 else 's'}"


def _ours(a_run: Run, settings: Settings, series: dict[str, dict[str, list[float]]]) -> None:
    publish, update, stall = groups(settings)
    count = settings.samples + _WARMUPS
    trainer = start(_Trainer)
    samplers = [start(_Sampler) for _ in range(max(settings.readers))]
    try:
        get([trainer.make.remote(settings.nbytes), trainer.open.remote()])
        series[publish][MEMCPY] = get(trainer.copy.remote(count))[_WARMUPS:]
        get(trainer.publish.remote(_WARMUPS, 0))
        spans = get(trainer.publish.remote(settings.samples, 0.02))
        series[publish][publishing(0)] = [over - begun for begun, over in spans]
        get([sampler.make.remote(settings.nbytes) for sampler in samplers])
        version = _WARMUPS + settings.samples
        for number in settings.readers:
            for into in (False, True):
                a_run.say(f"{number} readers, into={into}")
                last = version + count
                some = samplers[:number]
                reading = [sampler.read.remote(last, into=into) for sampler in some]
                # So rarely that all readers have read what came before.
                pause = 0.1 + 0.1 * number * settings.nbytes / (100 * MIB)
                spans = get(trainer.publish.remote(count, pause))
                found = get(reading)
                if not into:
                    series[publish][publishing(number)] = [
                        over - begun for begun, over in spans[_WARMUPS:]
                    ]
                for reader in found:
                    for seen, came, late in reader:
                        place = seen - version - 1
                        if place < _WARMUPS:
                            continue
                        if number == settings.readers[0]:
                            label = INTO if into else FRESH
                            series[update][label].append(came - spans[place][0])
                            series[stall][OURS_INTO if into else OURS].append(late)
                version = last
    finally:
        end([trainer, *samplers])


def _peer(settings: Settings, peer: str, series: dict[str, dict[str, list[float]]]) -> None:
    publish, update, stall = groups(settings)
    if why := _p2p_actors.missing(peer):
        raise RuntimeError(why)
    if peer == STORE:
        trainer, sampler = start(_Trainer), start(_Sampler)
        try:
            get(trainer.make.remote(settings.nbytes))
            for block in (True, False):
                for number in range(settings.samples + _WARMUPS):
                    put = trainer.put.remote()
                    came, late = get(sampler.take.remote(put, block=block))
                    begun, over, _ = get(put)
                    del put
                    if number < _WARMUPS:
                        continue
                    series[stall][BLOCKING if block else AWAIT].append(late)
                    if block:
                        series[publish][PUT].append(over - begun)
                        series[update][PUT_GET].append(came - begun)
        finally:
            end([trainer, sampler])
        return
    pair = Pair(peer)
    try:
        get(pair.producer.make_dict.remote(settings.nbytes // _LAYER, _LAYER))
        for number in range(settings.samples + _WARMUPS):
            begun = time.perf_counter()
            pair.call()
            if number >= _WARMUPS:
                series[update][f"{LABELS[peer]}: actor to actor"].append(
                    time.perf_counter() - begun
                )
    finally:
        pair.end()


def _broadcast(settings: Settings, readers: int, series: dict[str, dict[str, list[float]]]) -> None:
    publish, update, _ = groups(settings)
    members = [start(Member) for _ in range(readers + 1)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "store")
            size = len(members)
            get([member.join.remote(path, rank, size) for rank, member in enumerate(members)])
            found: Sequence[Any] = get(
                [
                    member.spans.remote(RAW, BROADCAST, settings.nbytes, settings.samples)
                    for member in members
                ]
            )
        name = f"{RAW}: broadcast, {readers} reader{'' if readers == 1 else 's'}"
        series[publish][name] = [over - begun for begun, over in found[0]]
        if readers == settings.readers[0]:
            series[update][name] = slowest(list(found))
    finally:
        end(members)


def judge(figures: Figures, settings: Settings) -> None:
    """Hold publishing against the number of readers, and what a reader's loop feels."""
    publish, _, stall = groups(settings)
    alone = figures.p50(publish, publishing(0))
    for readers in settings.readers:
        most = figures.p50(publish, publishing(readers))
        ratio = None if alone is None or most is None else most / alone
        figures.judge(
            f"publish to {readers} over publish to nobody",
            f"≤ {_FLAT} x",
            ratio,
            _FLAT,
            "" if ratio is None else f"{ratio:.2f} x",
        )
    for name in (OURS, OURS_INTO):
        late = figures.p50(stall, name)
        words = "" if late is None else f"{late * 1e3:.2f} ms"
        figures.judge(f"{stall}, {name}", "p50 ≤ 5 ms", late, _STALL, words)
