"""A held ref, awaited again and again, beside raw reads of the same pages of the producer."""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from benchmarks._cluster import end, get, reason, start
from benchmarks._measure import KIB, MIB, Spread, format_nbytes
from benchmarks._pages import (
    RawReader,
    huge_share,
    make_tensor,
    pages_for,
    quiet,
    receive_tensor,
)
from benchmarks._results import CMA, INLINE, MEMCPY, RAW_ONE, RAW_TWO, TCP, WAYS, Latency

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks._results import Results

#: aiordt's default `inline_nbytes`: up to here tensors travel by value.
_INLINE_NBYTES: Final = 16 * KIB
_SHUFFLE_SEED: Final = 1


@ray.remote
class _Holder(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._tensor = torch.empty(0)

    async def pid(self) -> int:
        return os.getpid()

    async def make(self, nbytes: int, pages: str) -> tuple[int, float]:
        self._tensor = torch.empty(0)
        self._tensor = make_tensor(nbytes, pages)
        return self._tensor.data_ptr(), huge_share(self._tensor)

    @aiordt.method
    async def by_default(self) -> torch.Tensor:
        return self._tensor

    @aiordt.method(transport="cma")
    async def by_cma(self) -> torch.Tensor:
        return self._tensor

    @aiordt.method(transport="tcp")
    async def by_tcp(self) -> torch.Tensor:
        return self._tensor


@ray.remote
class _Puller(aiordt.AsyncActor):
    def __init__(self, pid: int) -> None:
        quiet()
        self._reader = RawReader(pid)
        self._refs: dict[str, aiordt.TensorRef] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, way: str, ref: aiordt.TensorRef) -> str | None:
        """Keep ``ref`` if it can be pulled; otherwise say why it cannot."""
        try:
            await ref
        except aiordt.AiordtError as exc:
            return reason(exc)
        self._refs[way] = ref
        return None

    async def drop(self) -> None:
        self._refs = {}

    async def measure(
        self, address: int, nbytes: int, count: int
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Time all ways ``count`` times, in a new order each time, after warming up.

        Returns:
            Samples of each way in seconds, and of those that failed, how often and why.
        """
        target, source = receive_tensor(nbytes), receive_tensor(nbytes)
        where = target.data_ptr()
        local: dict[str, Callable[[], object]] = {
            RAW_ONE: lambda: self._reader.read(address, where, nbytes),
            MEMCPY: lambda: target.copy_(source),
        }
        if nbytes > MIB:  # one chunk is for one reader
            local[RAW_TWO] = lambda: self._reader.read_by_two(address, where, nbytes)
        if CMA not in self._refs:  # the kernel refuses raw reads too
            local = {MEMCPY: local[MEMCPY]}
        order = [*self._refs, *local]
        shuffle = random.Random(_SHUFFLE_SEED)  # noqa: S311  (no secret)
        samples: dict[str, list[float]] = defaultdict(list)
        errors: dict[str, list[str]] = defaultdict(list)
        warmups = max(2, count // 5)
        for number in range(warmups + count):
            shuffle.shuffle(order)
            for way in order:
                if way in local:
                    read = local[way]
                    begun = time.perf_counter()
                    read()
                    took = time.perf_counter() - begun
                else:
                    ref = self._refs[way]
                    begun = time.perf_counter()
                    try:
                        tensor = await ref
                    except aiordt.AiordtError as exc:
                        errors[way].append(reason(exc))
                        continue
                    took = time.perf_counter() - begun
                    del tensor
                if number >= warmups:
                    samples[way].append(took)
        failed = {
            way: f"{len(texts)} of {warmups + count} pulls failed: {texts[0]}"
            for way, texts in errors.items()
        }
        return dict(samples), failed


def num_samples(nbytes: int, *, quick: bool) -> int:
    """Samples of one size in one round."""
    if nbytes <= 64 * KIB:
        return 200
    if nbytes <= MIB:
        return 60 if quick else 100
    if nbytes <= 16 * MIB:
        return 20 if quick else 30
    return 5 if quick else 10


def measure(
    results: Results,
    *,
    sizes: Sequence[int],
    rounds: int,
    quick: bool,
    say: Callable[[str], None],
) -> None:
    """Measure pulls of a held ref; each round with actors of its own."""
    series: dict[tuple[int, str, str], list[list[float]]] = defaultdict(list)
    for number in range(rounds):
        say(f"pull of a held ref, round {number + 1} of {rounds}")
        holder = start(_Holder)
        actors = [holder]
        try:
            puller = start(_Puller, get(holder.pid.remote()))
            actors.append(puller)
            for nbytes in sizes:
                count = num_samples(nbytes, quick=quick)
                for pages in pages_for(nbytes):
                    found = _one(results, holder, puller, nbytes, pages, count=count)
                    for way, some in found.items():
                        series[nbytes, pages, way].append(some)
        except (ray.exceptions.RayError, TimeoutError) as exc:
            results.unavailable["pull"] = reason(exc)
        finally:
            end(actors)
    for (nbytes, pages, way), some_rounds in sorted(
        series.items(), key=lambda item: (item[0][0], item[0][1], WAYS.index(item[0][2]))
    ):
        results.pulls.append(
            Latency(
                name=way,
                nbytes=nbytes,
                pages=pages,
                spread=Spread.of([sample for some in some_rounds for sample in some]),
                round_p50=tuple(Spread.of(some).p50 for some in some_rounds),
            )
        )


def _one(
    results: Results,
    holder: Any,  # noqa: ANN401  (Ray's handles have no types)
    puller: Any,  # noqa: ANN401
    nbytes: int,
    pages: str,
    *,
    count: int,
) -> dict[str, list[float]]:
    """Samples by way, at one size."""
    address, share = get(holder.make.remote(nbytes, pages))
    results.huge_share[f"pull, {nbytes}, {pages}"] = share
    refs = {CMA: holder.by_cma, TCP: holder.by_tcp}
    if nbytes <= _INLINE_NBYTES:
        refs[INLINE] = holder.by_default
    for way, method in refs.items():
        try:
            why = get(puller.hold.remote(way, method.remote()))
        except ray.exceptions.RayTaskError as exc:  # the holder refuses to export that way
            why = reason(exc)
        if why is not None:
            results.unavailable[way] = why
    samples: dict[str, list[float]]
    samples, failed = get(puller.measure.remote(address, nbytes, count))
    for way, why in failed.items():
        results.unavailable[f"some of {way}, {format_nbytes(nbytes)}, {pages}"] = why
    get(puller.drop.remote())
    return samples
