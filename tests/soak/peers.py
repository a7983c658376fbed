"""Peers that come, pull from one owner, and go; what the owner has before and after."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SIZES: Final = (4_000, 40_000, 400_000, 3_000_000)
_DEADLINE_SECONDS: Final = 60.0


class Owner(aiordt.AsyncActor):
    """Exports for everybody, and outlives them."""

    def __init__(self) -> None:
        gc.freeze()
        self._kept: dict[int, list[torch.Tensor]] = {}

    async def export(self, number: int, count: int, transport: str) -> list[aiordt.TensorRef]:
        """Tensors that show whose they are, to be moved by ``transport``."""
        tensors = []
        for index in range(count):
            numel = _SIZES[index % len(_SIZES)] // 4
            make = aiordt.empty if transport == "shm" else torch.empty
            tensors.append(make(numel, dtype=torch.int32).fill_(number * 1000 + index))
        self._kept[number] = tensors
        return [await aiordt.put(tensor, transport=transport) for tensor in tensors]

    async def freed(self, number: int) -> float:
        """When a peer's tensors may be overwritten, by the clock that all processes share."""
        await aiordt.wait_tensor_freed(self._kept.pop(number), timeout=_DEADLINE_SECONDS)
        return time.monotonic()

    async def counts(self) -> Counts:
        """What it has now."""
        gc.collect()
        # What Python has freed already is not a leak: glibc keeps it.
        ctypes.CDLL(None).malloc_trim(0)
        stats = aiordt.stats()
        return Counts(
            exports=stats.exports,
            refs=stats.held_refs,
            fds=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            tasks=len(asyncio.all_tasks()),
            nbytes=_resident_nbytes(),
        )


class Visitor(aiordt.AsyncActor):
    """Comes, pulls, and goes."""

    def __init__(self) -> None:
        gc.freeze()

    async def pull(self, refs: list[Any], number: int) -> tuple[int, float]:
        """Pull all, half of them at once.

        Returns:
            How many had the right bytes, and when they were dropped.
        """
        half = len(refs) // 2
        tensors = [await ref for ref in refs[:half]]
        tensors += await asyncio.gather(*refs[half:])
        right = sum(
            bool((tensor == number * 1000 + index).all()) for index, tensor in enumerate(tensors)
        )
        return right, time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a process has: ``nbytes`` is its resident memory."""

    exports: int
    refs: int
    fds: int
    threads: int
    tasks: int
    nbytes: int


@dataclass(slots=True)
class Soak:
    """What came of it.

    Attributes:
        transfers: That brought the right bytes.
        wrong: That brought others.
        notices: Seconds from a peer's last use of what it had pulled to the owner's knowing.
        counts: Of the owner, by how many peers had gone.
        seconds: How long it took.
    """

    transfers: int = 0
    wrong: int = 0
    notices: list[float] = field(default_factory=list)
    counts: dict[int, Counts] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def drift(self) -> float:
        """By how much the owner's memory has grown since a tenth of the peers had gone."""
        first = min(gone for gone in self.counts if gone >= max(self.counts) // 10)
        return self.counts[max(self.counts)].nbytes / self.counts[first].nbytes - 1

    def notice(self, percent: int) -> float:
        """A percentile of the notices, in seconds."""
        return statistics.quantiles(self.notices, n=100)[percent - 1]


def _resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def soak(
    peers: int,
    pulls: int,
    transports: Sequence[str],
    *,
    at_once: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Soak:
    """Let peers come and go; Ray has been initialised.

    Args:
        peers: How many, each in a process of its own.
        pulls: Of each.
        transports: By turns.
        at_once: Peers that are there at a time.
        say: Is told how far it is.
    """
    found = Soak()
    begun = time.monotonic()
    owner: Any = ray.remote(Owner).options(num_cpus=0).remote()
    room = asyncio.Semaphore(at_once)
    gone = 0

    async def visit(number: int) -> None:
        nonlocal gone
        async with room:
            peer: Any = ray.remote(Visitor).options(num_cpus=0).remote()
            refs = await owner.export.remote(number, pulls, transports[number % len(transports)])
            right, dropped = await peer.pull.remote(refs, number)
            del refs
            freed = await owner.freed.remote(number)
            found.notices.append(max(0.0, freed - dropped))
            found.transfers += right
            found.wrong += pulls - right
            if number % 2:
                ray.kill(peer)
            del peer
            gone += 1
            if gone % max(1, peers // 20) == 0:
                found.counts[gone] = await owner.counts.remote()
                say(f"{gone} peers, {time.monotonic() - begun:.0f} s: {found.counts[gone]}")

    await asyncio.gather(*map(visit, range(peers)))
    deadline = time.monotonic() + _DEADLINE_SECONDS
    last = await owner.counts.remote()
    while (last.exports or last.refs) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        last = await owner.counts.remote()
    found.counts[peers] = last
    found.seconds = time.monotonic() - begun
    ray.kill(owner)
    return found
