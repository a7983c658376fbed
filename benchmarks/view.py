"""A tensor in another process's shared memory: looked at, copied, or taken from Ray's store."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import ray
import torch

import aiordt
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import GIB, KIB, MIB, format_nbytes, format_seconds
from benchmarks._pages import fill, is_filled, quiet

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks._figures import Figures

_SIZES: Final = (64 * KIB, MIB, 256 * MIB, GIB)
_QUICK_SIZES: Final = (64 * KIB, 256 * MIB)
_LIMIT: Final = 1e-3

CONNECT: Final = "aiordt view, first of the owner's"
FIRST: Final = "aiordt view, first of a tensor"
AGAIN: Final = "aiordt view, again"
COPY: Final = "aiordt pull (a copy)"
NUMPY: Final = "object store, numpy, zero-copy"
TORCH: Final = "object store, torch, zero-copy"
STORE_COPY: Final = "object store, torch"
NAMES: Final = (CONNECT, FIRST, AGAIN, COPY, NUMPY, TORCH, STORE_COPY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures: sizes in bytes, peers, rounds, and looks at each tensor."""

    sizes: tuple[int, ...]
    peers: tuple[str, ...]
    rounds: int
    looks: int

    @classmethod
    def choose(cls, *, quick: bool, sizes: tuple[int, ...] | None = None) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: A size is not positive.
        """
        if any(size < 1 for size in sizes or ()):
            raise ValueError("sizes must be positive")
        chosen = sizes or (_QUICK_SIZES if quick else _SIZES)
        peers = (NUMPY, STORE_COPY) if quick else (NUMPY, STORE_COPY, TORCH)
        return cls(sizes=chosen, peers=peers, rounds=1 if quick else 2, looks=10 if quick else 25)


@ray.remote
class _Holder(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._tensor = torch.empty(0)

    async def pid(self) -> int:
        return os.getpid()

    async def share(self, nbytes: int) -> aiordt.TensorRef:
        self._tensor = torch.empty(0)
        self._tensor = fill(aiordt.empty(nbytes, dtype=torch.uint8))
        return await aiordt.put(self._tensor, transport="shm")

    def store(self, nbytes: int, kind: str) -> list[Any]:
        self._tensor = torch.empty(0)
        tensor = fill(torch.empty(nbytes, dtype=torch.uint8))
        return [ray.put(tensor.numpy() if kind == NUMPY else tensor)]


@ray.remote
class _Viewer(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._met = False

    async def pid(self) -> int:
        return os.getpid()

    async def look(self, ref: aiordt.TensorRef, looks: int) -> dict[str, list[float]]:
        """Seconds of each way to have the tensor; checks what is seen."""
        samples: dict[str, list[float]] = defaultdict(list)
        for number in range(looks + 1):
            begun = time.perf_counter()
            async with ref.view() as tensor:
                took = time.perf_counter() - begun
                if number == 0 and not is_filled(tensor):
                    raise RuntimeError("the view shows wrong bytes")
            first = FIRST if self._met else CONNECT
            samples[AGAIN if number else first].append(took)
            self._met = True
        for number in range(3 if ref.nbytes >= GIB else max(2, looks // 5)):
            begun = time.perf_counter()
            tensor = await ref
            took = time.perf_counter() - begun
            if number == 0 and not is_filled(tensor):
                raise RuntimeError("the pull brought wrong bytes")
            if number:  # the first one makes the pool warm
                samples[COPY].append(took)
            del tensor
        return dict(samples)

    async def fetch(self, refs: list[Any], looks: int) -> list[float]:
        """Seconds of each `await` of an object of Ray's store."""
        samples = []
        for number in range(looks):
            begun = time.perf_counter()
            value = await refs[0]
            samples.append(time.perf_counter() - begun)
            tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            if number == 0 and not is_filled(tensor):
                raise RuntimeError("the object store brought wrong bytes")
            del value, tensor
        return samples


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run("To have a tensor of another process", dataclasses.asdict(settings))
    a_run.say("starting Ray")
    series: dict[tuple[int, str], list[float]] = defaultdict(list)
    with cluster():
        for number in range(settings.rounds):
            a_run.say(f"round {number + 1} of {settings.rounds}")
            try:
                _turn(settings, series)
                _store_turn(settings, [NUMPY, STORE_COPY], series)
                if TORCH in settings.peers:
                    _store_turn(settings, [TORCH], series)
            except (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError) as exc:
                a_run.figures.unavailable[f"round {number + 1}"] = reason(exc)
    figures = a_run.figures
    for nbytes in settings.sizes:
        for name in NAMES:
            figures.add(format_nbytes(nbytes), name, series[nbytes, name])
    judge(figures, settings.sizes)
    return a_run.finish(json_path, plot_path)


def judge(figures: Figures, sizes: tuple[int, ...]) -> None:
    """Hold each kind of view against the limit."""
    for nbytes in sizes:
        group = format_nbytes(nbytes)
        for name in (FIRST, AGAIN):
            p50 = figures.p50(group, name)
            words = "" if p50 is None else format_seconds(p50)
            figures.judge(f"{name}, {group}", "p50 ≤ 1 ms", p50, _LIMIT, words)


def _turn(settings: Settings, series: dict[tuple[int, str], list[float]]) -> None:
    holder, viewer = start(_Holder), start(_Viewer)
    try:
        get([holder.pid.remote(), viewer.pid.remote()])
        for nbytes in settings.sizes:
            for _ in range(1 if nbytes >= GIB else 2):
                ref = get(holder.share.remote(nbytes))
                for name, some in get(viewer.look.remote(ref, settings.looks)).items():
                    series[nbytes, name] += some
                del ref
    finally:
        end([holder, viewer])


def _store_turn(
    settings: Settings, names: list[str], series: dict[tuple[int, str], list[float]]
) -> None:
    options: dict[str, Any] = {}
    if TORCH in names:  # read by Ray when the process starts
        options = {"runtime_env": {"env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}}}
    holder, viewer = start(_Holder, **options), start(_Viewer, **options)
    try:
        get([holder.pid.remote(), viewer.pid.remote()])
        for nbytes in settings.sizes:
            for name in names:
                refs = get(holder.store.remote(nbytes, name))
                looks = 2 if nbytes >= GIB else max(2, settings.looks // 5)
                series[nbytes, name] += get(viewer.fetch.remote(refs, looks))
                del refs
    finally:
        end([holder, viewer])
