"""A held ref, awaited again and again, beside raw reads of the same pages of the producer."""

from __future__ import annotations

import asyncio
import functools
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
    SHARED,
    Copier,
    RawReader,
    fill,
    huge_share,
    is_filled,
    make_tensor,
    pages_for,
    quiet,
    receive_tensor,
)
from benchmarks._raw_peers import RawPair, missing
from benchmarks._results import (
    CMA,
    INLINE,
    MAPPED_ONE,
    MAPPED_TWO,
    MEMCPY,
    NIXL_PULL,
    RAW_NIXL,
    RAW_ONE,
    RAW_TWO,
    RAW_UCXX,
    SHM,
    TCP,
    UCX,
    WAYS,
    Latency,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks._results import Results

#: aiordt's default `inline_nbytes`: up to here tensors travel by value.
_INLINE_NBYTES: Final = 16 * KIB
_SHUFFLE_SEED: Final = 1
_TRANSPORTS: Final = {CMA: "cma", NIXL_PULL: "nixl", UCX: "ucx", TCP: "tcp"}
_RAW_LIBRARIES: Final = {RAW_NIXL: "nixl", RAW_UCXX: "ucxx"}


@ray.remote
class _Holder(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._tensor = torch.empty(0)

    async def pid(self) -> int:
        return os.getpid()

    async def make(self, nbytes: int, pages: str) -> tuple[int, float]:
        self._tensor = torch.empty(0)
        if pages == SHARED:
            self._tensor = fill(aiordt.empty(nbytes, dtype=torch.uint8))
        else:
            self._tensor = fill(make_tensor(nbytes, pages))
        return self._tensor.data_ptr(), huge_share(self._tensor)

    async def give(self, transport: str | None) -> aiordt.TensorRef:
        return await aiordt.put(self._tensor, transport=transport)


@ray.remote
class _Puller(aiordt.AsyncActor):
    def __init__(self, pid: int) -> None:
        quiet()
        aiordt.configure(relay_nbytes=0)  # else a second pull comes from the first one's copy
        self._reader = RawReader(pid)
        self._copier = Copier()
        self._refs: dict[str, aiordt.TensorRef] = {}
        self._raw: dict[str, RawPair] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def open_raw(self) -> dict[str, str]:
        """Start the raw libraries; why some are not there."""
        why = {way: missed for way, name in _RAW_LIBRARIES.items() if (missed := missing(name))}
        ways = [way for way in _RAW_LIBRARIES if way not in why]
        starting = [asyncio.to_thread(RawPair, _RAW_LIBRARIES[way]) for way in ways]
        started = await asyncio.gather(*starting, return_exceptions=True)
        for way, pair in zip(ways, started, strict=True):
            if isinstance(pair, BaseException):
                why[way] = reason(pair)
            else:
                self._raw[way] = pair
        return why

    async def close_raw(self) -> None:
        for pair in self._raw.values():
            await asyncio.to_thread(pair.close)

    async def hold(self, way: str, ref: aiordt.TensorRef) -> str | None:
        """Keep ``ref`` if it can be pulled, and is right; otherwise say why it cannot."""
        try:
            await ref
            before = aiordt.stats().bytes_pulled
            tensor = await ref
        except aiordt.AiordtError as exc:
            return reason(exc)
        if way != INLINE and aiordt.stats().bytes_pulled - before != ref.nbytes:
            raise RuntimeError(f"{way}: a second pull did not bring all bytes from the owner")
        if not is_filled(tensor):
            raise RuntimeError(f"{way}: the bytes that arrived are wrong")
        self._refs[way] = ref
        return None

    async def drop(self) -> None:
        self._refs = {}

    async def measure(
        self, address: int, nbytes: int, pages: str, count: int
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Time all ways ``count`` times, in a new order each time, after warming up.

        Returns:
            Samples of each way in seconds, and of those that failed, how often and why.
        """
        if pages == SHARED and SHM in self._refs:
            async with self._refs[SHM].view() as view:
                ways = self._mapped(view)
                return await self._in_turns(ways, nbytes, count)
        ways = self._unmapped(address, nbytes, pages)
        return await self._in_turns(ways, nbytes, count)

    def _mapped(self, source: torch.Tensor) -> dict[str, Callable[[], float]]:
        target = receive_tensor(source.nbytes)
        there, here, nbytes = target.data_ptr(), source.data_ptr(), source.nbytes
        ways = {MAPPED_ONE: _timed(lambda: self._copier.read(here, target.data_ptr(), nbytes))}
        if nbytes > MIB:
            ways[MAPPED_TWO] = _timed(lambda: self._copier.read_by_two(here, there, nbytes))
        return ways

    def _unmapped(self, address: int, nbytes: int, pages: str) -> dict[str, Callable[[], float]]:
        target, source = receive_tensor(nbytes), receive_tensor(nbytes)
        where = target.data_ptr()
        ways = {MEMCPY: _timed(lambda: target.copy_(source))}
        if CMA in self._refs:  # else the kernel refuses raw reads too
            ways[RAW_ONE] = _timed(lambda: self._reader.read(address, where, nbytes))
            if nbytes > MIB:  # one chunk is for one reader
                ways[RAW_TWO] = _timed(lambda: self._reader.read_by_two(address, where, nbytes))
        for way, pair in self._raw.items():
            pair.make(nbytes, pages)
            ways[way] = functools.partial(_last_pull, pair, 2 if nbytes <= MIB else 1)
        return ways

    async def _in_turns(
        self, local: dict[str, Callable[[], float]], nbytes: int, count: int
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        order = [*self._refs, *local]
        shuffle = random.Random(_SHUFFLE_SEED)  # noqa: S311  (no secret)
        samples: dict[str, list[float]] = defaultdict(list)
        errors: dict[str, list[str]] = defaultdict(list)
        warmups = max(2, count // 5)
        # What came before has the caches: of two small reads at once, the second one counts.
        turns = 2 if nbytes <= MIB else 1
        for number in range(warmups + count):
            shuffle.shuffle(order)
            for way in order:
                try:
                    took = 0.0
                    for _ in range(1 if way in self._raw else turns):
                        took = local[way]() if way in local else await _pull(self._refs[way])
                except (aiordt.AiordtError, RuntimeError) as exc:
                    errors[way].append(reason(exc))
                    continue
                if number >= warmups:
                    samples[way].append(took)
        failed = {
            way: f"{len(texts)} of {warmups + count} pulls failed: {texts[0]}"
            for way, texts in errors.items()
        }
        return dict(samples), failed


def _timed(read: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        begun = time.perf_counter()
        read()
        return time.perf_counter() - begun

    return measure


def _last_pull(pair: RawPair, count: int) -> float:
    return pair.pull(count)[-1]


async def _pull(ref: aiordt.TensorRef) -> float:
    begun = time.perf_counter()
    tensor = await ref
    took = time.perf_counter() - begun
    del tensor
    return took


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
            results.unavailable.update(get(puller.open_raw.remote()))
            for nbytes in sizes:
                count = num_samples(nbytes, quick=quick)
                for pages in (*pages_for(nbytes), SHARED):
                    found = _one(results, holder, puller, nbytes, pages, count=count)
                    for way, some in found.items():
                        series[nbytes, pages, way].append(some)
            get(puller.close_raw.remote())
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
    refs: dict[str, str | None] = {SHM: "shm"} if pages == SHARED else dict(_TRANSPORTS)
    if nbytes <= _INLINE_NBYTES and pages != SHARED:
        refs[INLINE] = None
    for way, transport in refs.items():
        try:
            why = get(puller.hold.remote(way, get(holder.give.remote(transport))))
        except ray.exceptions.RayTaskError as exc:  # the holder refuses to export that way
            why = reason(exc)
        if why is not None:
            results.unavailable[way] = why
    samples: dict[str, list[float]]
    samples, failed = get(puller.measure.remote(address, nbytes, pages, count))
    for way, why in failed.items():
        results.unavailable[f"some of {way}, {format_nbytes(nbytes)}, {pages}"] = why
    get(puller.drop.remote())
    return samples
