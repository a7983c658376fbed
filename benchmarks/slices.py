"""Parts of a tensor: bytes moved over bytes needed, and time, beside pulling all of it."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import socket
import struct
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import format_nbytes
from benchmarks._pages import quiet

if TYPE_CHECKING:
    from benchmarks._figures import Figures

WAYS: Final = ("shm", "cma", "nixl", "ucx", "tcp")
#: Of a tcp_info (linux/tcp.h): the field ``tcpi_bytes_received``, and how much to ask for.
_RECEIVED_AT: Final = 128
_TCP_INFO_NBYTES: Final = 192
_SHUFFLE_SEED: Final = 1
#: What control frames, and Ray's own connections, may add to the kernel's count.
_ROUNDING: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures: a square of ``side`` x ``side`` float32, in ``rounds`` of pulls."""

    side: int
    rounds: int
    count: int

    @classmethod
    def choose(cls, *, quick: bool, side: int | None = None) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: ``side`` is not a multiple of 64.
        """
        if side is not None and (side < 64 or side % 64):
            raise ValueError("side must be a multiple of 64")
        return cls(
            side=side or (2048 if quick else 8192),
            rounds=1 if quick else 3,
            count=5 if quick else 12,
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A slice: its name, its index, the most that may move, and what it is of."""

    name: str
    index: tuple[slice | int, ...]
    limit: float
    cube: bool = False


def cuts(side: int) -> tuple[Cut, ...]:
    """The slices of a square of ``side``; the cube is (64, side / 64, side)."""
    part = side // 8
    inner = side // 64
    block = (slice(8, 24), slice(inner // 4, inner // 4 + inner // 2), slice(part, 2 * part))
    return (
        Cut("rows, contiguous", (slice(part, 2 * part),), 1.0),
        Cut("every 2nd row", (slice(None, None, 2),), 1.05),
        Cut("a column block", (slice(None), slice(part, 2 * part)), 1.05),
        Cut("one column", (slice(None), part), 1.05),
        Cut("a 3-D block", block, 1.05, cube=True),
    )


@ray.remote
class _Holder(aiordt.AsyncActor):
    def __init__(self, side: int) -> None:
        quiet()
        self._side = side
        self._kept: list[torch.Tensor] = []

    async def pid(self) -> int:
        return os.getpid()

    async def give(self, *, shared: bool) -> dict[str, aiordt.TensorRef]:
        side = self._side
        square = torch.empty(side, side) if not shared else aiordt.empty(side, side)
        _fill(square)
        self._kept.append(square)
        return await aiordt.put({"square": square, "cube": square.view(64, side // 64, side)})


def _fill(square: torch.Tensor) -> torch.Tensor:
    flat = torch.arange(square.numel(), dtype=torch.int32)
    square.view(torch.int32).view(-1).copy_(flat)
    return square


@ray.remote
class _Puller(aiordt.AsyncActor):
    def __init__(self, side: int) -> None:
        quiet()
        aiordt.configure(relay_nbytes=0)  # else a second pull comes from the first one's copy
        self._side = side

    async def pid(self) -> int:
        return os.getpid()

    async def check(self, refs: dict[str, aiordt.TensorRef], way: str) -> str | None:
        """Pull every slice once and compare; why that cannot be."""
        square = _fill(torch.empty(self._side, self._side)).view(torch.int32)
        for cut in cuts(self._side):
            try:
                got = await aiordt.get(_whole(refs, cut)[cut.index], transport=way)
            except aiordt.UnavailableError as exc:
                return reason(exc)
            expected = square.view(64, -1, self._side) if cut.cube else square
            if not torch.equal(got.view(torch.int32), expected[cut.index].contiguous()):
                raise RuntimeError(f"{cut.name} by {way}: the bytes that arrived are wrong")
        return None

    async def measure(
        self, refs: dict[str, dict[str, aiordt.TensorRef]], count: int
    ) -> tuple[dict[str, list[float]], dict[str, tuple[float, float]]]:
        """Time all slices by all ways in ``refs``, in a new order each time.

        Returns:
            Seconds by slice and way; and of each, bytes that aiordt counts and that the
            kernel counts on this process's TCP connections, over bytes needed.
        """
        jobs = [(cut, way, whole) for cut in cuts(self._side) for way in refs for whole in (0, 1)]
        shuffle = random.Random(_SHUFFLE_SEED)  # noqa: S311  (no secret)
        samples: dict[str, list[float]] = defaultdict(list)
        moved: dict[str, tuple[float, float]] = {}
        for number in range(count + 1):
            shuffle.shuffle(jobs)
            for cut, way, whole in jobs:
                ref = _whole(refs[way], cut)
                counted, received = aiordt.stats().bytes_pulled, received_nbytes()
                begun = time.perf_counter()
                if whole:
                    tensor = await aiordt.get(ref, transport=way)
                    part = tensor[cut.index].contiguous()
                else:
                    tensor = part = await aiordt.get(ref[cut.index], transport=way)
                took = time.perf_counter() - begun
                key = name_of(cut.name, way, whole=bool(whole))
                if number:  # the first turn warms up
                    samples[key].append(took)
                    moved[key] = (
                        (aiordt.stats().bytes_pulled - counted) / part.nbytes,
                        (received_nbytes() - received) / part.nbytes,
                    )
                del tensor, part
        return dict(samples), moved


def name_of(cut: str, way: str, *, whole: bool) -> str:
    """The key of a figure."""
    return f"{cut}|aiordt {way}{', all of it' if whole else ''}"


def _whole(refs: dict[str, aiordt.TensorRef], cut: Cut) -> aiordt.TensorRef:
    return refs["cube" if cut.cube else "square"]


def received_nbytes() -> int:
    """Bytes that the kernel received on this process's open TCP connections."""
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                if sock.family not in {socket.AF_INET, socket.AF_INET6}:
                    continue
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_NBYTES)
                total += struct.unpack_from("=Q", info, _RECEIVED_AT)[0]
    return total


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    side = settings.side
    size = format_nbytes(4 * side * side)
    a_run = Run(f"Slices of {size} (float32, {side} x {side})", dataclasses.asdict(settings))
    figures = a_run.figures
    a_run.say("starting Ray")
    series: dict[str, list[float]] = defaultdict(list)
    moved: dict[str, tuple[float, float]] = {}
    with cluster():
        for number in range(settings.rounds):
            a_run.say(f"round {number + 1} of {settings.rounds}")
            actors: list[Any] = []
            try:
                actors += [start(_Holder, side), start(_Puller, side)]
                some, ratios = _turn(figures, *actors, count=settings.count)
                for key, seconds in some.items():
                    series[key] += seconds
                moved.update(ratios)
            except (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError) as exc:
                figures.unavailable[f"round {number + 1}"] = reason(exc)
            finally:
                end(actors)
    for key, seconds in series.items():
        cut, _, name = key.partition("|")
        counted, kernel = moved[key]
        facts: dict[str, float | str] = {"moved / needed": f"{counted:.4f}"}
        if "tcp" in name:
            facts["by TCP"] = f"{kernel:.4f}"
        figures.add(cut, name, seconds, **facts)
    order = [cut.name for cut in cuts(side)]
    figures.rows.sort(key=lambda row: (order.index(row.group), _place(row.name)))
    judge(figures, side)
    return a_run.finish(json_path, plot_path)


def _place(name: str) -> tuple[bool, int]:
    way, _, whole = name.removeprefix("aiordt ").partition(",")
    return bool(whole), WAYS.index(way)


def judge(figures: Figures, side: int) -> None:
    """Hold the bytes that moved against what each slice needs."""
    for cut in cuts(side):
        for way in WAYS:
            name = f"aiordt {way}"
            rows = [row for row in figures.rows if (row.group, row.name) == (cut.name, name)]
            found = [
                max(float(value) for value in row.facts.values()) if way == "tcp" else counted
                for row in rows
                for counted in [float(row.facts["moved / needed"])]
            ]
            figures.judge(
                f"bytes moved / needed, {cut.name}, {way}",
                f"1.00 to {cut.limit:.2f}",
                # Less than is needed has come from elsewhere, which is not what was asked.
                (found[0] if found[0] >= 1 else math.inf) if found else None,
                cut.limit + _ROUNDING,
                f"{found[0]:.4f}" if found else "",
            )


def _turn(
    figures: Figures,
    holder: Any,  # noqa: ANN401  (Ray's handles have no types)
    puller: Any,  # noqa: ANN401
    *,
    count: int,
) -> tuple[dict[str, list[float]], dict[str, tuple[float, float]]]:
    refs = {}
    ordinary, shared = get([holder.give.remote(shared=False), holder.give.remote(shared=True)])
    for way in WAYS:
        chosen = shared if way == "shm" else ordinary
        why = get(puller.check.remote(chosen, way))
        if why is None:
            refs[way] = chosen
        else:
            figures.unavailable[way] = why
    found: tuple[dict[str, list[float]], dict[str, tuple[float, float]]]
    found = get(puller.measure.remote(refs, count))
    return found
