"""Ranks that do the same collective operations by aiordt and by its peers, and time them."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import ray
import torch
import torch.distributed as dist
from ray.util import collective as ray_collective
from typing_extensions import override

import aiordt
from benchmarks._measure import Heartbeat, lateness
from benchmarks._pages import quiet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiordt.collective import MemberGroup

ALLREDUCE: Final = "allreduce"
BROADCAST: Final = "broadcast"
ALLGATHER: Final = "allgather"
REDUCESCATTER: Final = "reducescatter"
KINDS: Final = (ALLREDUCE, BROADCAST, ALLGATHER, REDUCESCATTER)

OURS: Final = ("shm", "gloo", "mpi")
#: By ``shm``, of tensors in shared memory.
SHARED: Final = "shm, aiordt.empty"
RAW: Final = "ProcessGroupGloo"
RAY: Final = "ray.util.collective"

_WARMUPS: Final = 2
#: Between two operations whose lag is measured, so that one's end does not count for the next.
_PAUSE: Final = 0.02
_TIMEOUT: Final = timedelta(seconds=30)
_GROUP: Final = "benchmark"

#: When a rank called, and when it had the result; `time.perf_counter` is one clock for a host.
Spans: TypeAlias = "list[tuple[float, float]]"


def brought(rank: int, numel: int) -> torch.Tensor:
    """What a rank brings: whole numbers, so that sums are exact in any order."""
    return torch.arange(50.0).repeat(numel // 50 + 1)[:numel] + rank


def expected(kind: str, numel: int, rank: int, size: int) -> torch.Tensor:
    """What a rank gets; the parts of a gathered list are laid end to end."""
    every = [brought(other, numel) for other in range(size)]
    if kind == BROADCAST:
        return every[0]
    if kind == ALLGATHER:
        return torch.cat(every)
    total = torch.stack(every).sum(0)
    return total if kind == ALLREDUCE else total.tensor_split(size)[rank]


def numel_of(kind: str, nbytes: int, size: int) -> int:
    """Elements of a rank's tensor. Peers cut it evenly only."""
    numel = nbytes // torch.float32.itemsize
    return numel - numel % size if kind == REDUCESCATTER else numel


def slowest(ranks: list[Spans]) -> list[float]:
    """Seconds of each operation: from the last rank's call to the last rank's result."""
    return [
        max(over for _, over in spans) - max(begun for begun, _ in spans)
        for spans in zip(*ranks, strict=True)
    ]


class _Way(ABC):
    """A library's group, in one of its ranks."""

    rank: int
    size: int

    @abstractmethod
    def call(self, kind: str, tensor: torch.Tensor) -> Callable[[], Awaitable[Any]]:
        """An operation, as a coroutine would do it; it gives the result."""

    @abstractmethod
    async def spans(self, kind: str, tensor: torch.Tensor, count: int) -> Spans:
        """Do an operation ``count`` times; all ranks meet before each."""


class _Ours(_Way):
    def __init__(self, group: MemberGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size

    @override
    def call(self, kind: str, tensor: torch.Tensor) -> Callable[[], Awaitable[Any]]:
        operation: Any = getattr(self._group, kind)
        if kind == BROADCAST:
            return lambda: operation(tensor, 0)
        return lambda: operation(tensor)

    @override
    async def spans(self, kind: str, tensor: torch.Tensor, count: int) -> Spans:
        call = self.call(kind, tensor)
        spans = []
        for _ in range(_WARMUPS + count):
            await self._group.barrier()
            begun = time.perf_counter()
            await call()
            spans.append((begun, time.perf_counter()))
        return spans[_WARMUPS:]


class _Blocking(_Way):
    """A library whose calls block; they do on ``thread``, or else on the loop's."""

    def __init__(self, rank: int, size: int, thread: ThreadPoolExecutor | None) -> None:
        self.rank, self.size = rank, size
        self._thread = thread

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all ranks have come."""

    @abstractmethod
    def operation(self, kind: str, tensor: torch.Tensor) -> Callable[[], Any]:
        """The blocking call; it gives the result."""

    @override
    def call(self, kind: str, tensor: torch.Tensor) -> Callable[[], Awaitable[Any]]:
        operation = self.operation(kind, tensor)
        return lambda: self._run(operation)

    @override
    async def spans(self, kind: str, tensor: torch.Tensor, count: int) -> Spans:
        operation = self.operation(kind, tensor)

        def blocking() -> Spans:
            spans = []
            for _ in range(_WARMUPS + count):
                self.barrier()
                begun = time.perf_counter()
                operation()
                spans.append((begun, time.perf_counter()))
            return spans[_WARMUPS:]

        found: Spans = await self._run(blocking)
        return found

    async def _run(self, function: Callable[[], Any]) -> Any:  # noqa: ANN401
        if self._thread is None:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


class _Raw(_Blocking):
    """PyTorch's process group, made directly."""

    def __init__(self, path: str, rank: int, size: int) -> None:
        super().__init__(rank, size, ThreadPoolExecutor(1, thread_name_prefix="raw"))
        store = dist.FileStore(path, size)  # type: ignore[attr-defined]
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, _TIMEOUT)

    @override
    def barrier(self) -> None:
        self._group.barrier().wait()

    @override
    def operation(self, kind: str, tensor: torch.Tensor) -> Callable[[], Any]:
        group, size = self._group, self.size
        if kind == ALLREDUCE:
            return lambda: group.allreduce([tensor]).wait() and tensor
        if kind == BROADCAST:
            return lambda: group.broadcast([tensor]).wait() and tensor
        if kind == ALLGATHER:
            every = torch.empty(size * tensor.numel())
            return lambda: group._allgather_base(every, tensor).wait() and every  # noqa: SLF001
        piece = torch.empty(tensor.numel() // size)
        return lambda: group._reduce_scatter_base(piece, tensor).wait() and piece  # noqa: SLF001


class _Rays(_Blocking):
    """``ray.util.collective``, as its documentation calls it."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, None)
        ray_collective.init_collective_group(size, rank, backend="gloo", group_name=_GROUP)

    @override
    def barrier(self) -> None:
        ray_collective.barrier(_GROUP)

    @override
    def operation(self, kind: str, tensor: torch.Tensor) -> Callable[[], Any]:
        if kind == ALLREDUCE:
            return lambda: ray_collective.allreduce(tensor, _GROUP) or tensor
        if kind == BROADCAST:
            return lambda: ray_collective.broadcast(tensor, 0, _GROUP) or tensor
        if kind == ALLGATHER:
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            return lambda: ray_collective.allgather(parts, tensor, _GROUP) or parts
        pieces = list(tensor.tensor_split(self.size))
        out = torch.empty_like(pieces[self.rank])
        return lambda: ray_collective.reducescatter(out, pieces, _GROUP) or out


class _Rank:
    """What the actors share."""

    def __init__(self) -> None:
        quiet()
        self._heart = Heartbeat()
        self._kept: torch.Tensor | None = None

    async def pid(self) -> int:
        return os.getpid()

    def way(self, name: str) -> _Way:
        raise NotImplementedError

    async def check(self, name: str, kind: str, nbytes: int) -> None:
        """Do an operation once, and compare what comes."""
        way = self.way(name)
        numel = numel_of(kind, nbytes, way.size)
        got = await way.call(kind, brought(way.rank, numel))()
        result = torch.cat(got) if isinstance(got, list) else got
        if not torch.equal(result, expected(kind, numel, way.rank, way.size)):
            raise RuntimeError(f"{kind} of {nbytes} B by {name}: rank {way.rank} got wrong values")

    async def spans(self, name: str, kind: str, nbytes: int, count: int) -> Spans:
        """Time an operation; on zeros, whose sum stays what it is."""
        way = self.way(name)
        make = aiordt.empty if name == SHARED else torch.empty
        tensor = make(numel_of(kind, nbytes, way.size)).fill_(0)  # touches its pages
        return await way.spans(kind, tensor, count)

    async def idle(self, seconds: float) -> list[float]:
        """Lateness of the loop with nothing to do."""
        self._heart.start()
        begun = time.perf_counter()
        await asyncio.sleep(seconds)
        return lateness(self._heart.stop(), [(begun, time.perf_counter())])

    async def lag(self, name: str, nbytes: int, count: int) -> list[float]:
        """Lateness of the loop while this rank is in an allreduce."""
        make = aiordt.empty if name == SHARED else torch.empty
        call = self.way(name).call(ALLREDUCE, make(nbytes // 4).fill_(0))
        await call()
        self._heart.start()
        windows = []
        for _ in range(count):
            await asyncio.sleep(_PAUSE)
            begun = time.perf_counter()
            await call()
            windows.append((begun, time.perf_counter()))
        return lateness(self._heart.stop(), windows)


@ray.remote
class Member(aiordt.AsyncActor, _Rank):
    """A member of aiordt's groups; beside them, of a process group of torch."""

    def __init__(self) -> None:
        super().__init__()
        self._raw: _Raw | None = None

    @override
    def way(self, name: str) -> _Way:
        if name != RAW:
            return _Ours(self.group("shm" if name == SHARED else name))
        if self._raw is None:
            raise RuntimeError("there is no process group")
        return self._raw

    async def join(self, path: str, rank: int, size: int) -> None:
        """Make the process group, by a file at ``path``."""
        self._raw = await asyncio.to_thread(_Raw, path, rank, size)

    @aiordt.method
    async def give(self, rank: int, nbytes: int) -> torch.Tensor:
        """A ref to what this rank brings."""
        self._kept = brought(rank, nbytes // 4)
        return self._kept

    async def take(self, ref: aiordt.TensorRef) -> None:
        """Have what the driver sends."""
        self._kept = await ref


@ray.remote
class RayRank(_Rank):
    """A rank of ``ray.util.collective``, whose calls block the loop."""

    def __init__(self) -> None:
        super().__init__()
        self._rays: _Rays | None = None

    @override
    def way(self, name: str) -> _Way:
        if self._rays is None:
            raise RuntimeError("there is no group")
        return self._rays

    async def join(self, rank: int, size: int) -> None:
        """Make the group."""
        self._rays = _Rays(rank, size)
