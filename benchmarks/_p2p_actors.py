"""From actor to actor through the driver: aiordt, Ray's object store, RDT.

Each peer's actors live only in its own turns: RDT's NIXL agent spins a core while it lives.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import ray
import torch
from ray.experimental.collective import create_collective_group, destroy_collective_group

import aiordt
from benchmarks._cluster import end, get, reason, start
from benchmarks._measure import KIB, MIB, Spread
from benchmarks._pages import huge_share, make_tensor, pages_for, quiet
from benchmarks._results import AIORDT, GLOO, NIXL, PEERS, STORE, STORE_VIEW, Latency

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks._results import Results

#: Calls that warm a new pair of actors up, before those of each size.
_FIRST_CALLS: Final = 20


class _Source:
    """What the producers share: a tensor, or a dict of some, there before anybody asks."""

    def __init__(self) -> None:
        quiet()
        self.tensor: Any = torch.empty(0)

    def prepare(self, nbytes: int, pages: str) -> float:
        self.tensor = torch.empty(0)  # give the old one back first
        self.tensor = make_tensor(nbytes, pages)
        return huge_share(self.tensor)

    def make_dict(self, count: int, nbytes: int) -> None:
        self.tensor = torch.empty(0)
        self.tensor = state_dict(count, nbytes)


def state_dict(count: int, nbytes: int, *, shared: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of ``nbytes`` bytes, each with memory and contents of its own."""
    make = aiordt.empty if shared else torch.empty
    tensors = (make(nbytes // 4, dtype=torch.int32) for _ in range(count))
    return {f"layers.{i}.weight": tensor.fill_(i) for i, tensor in enumerate(tensors)}


@ray.remote
class _AiordtProducer(aiordt.AsyncActor, _Source):
    async def pid(self) -> int:
        return os.getpid()

    async def make(self, nbytes: int, pages: str) -> float:
        return self.prepare(nbytes, pages)

    @aiordt.method
    async def give(self) -> object:
        return self.tensor


@ray.remote
class _AiordtConsumer(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()

    async def pid(self) -> int:
        return os.getpid()

    async def take(self, refs: object) -> None:
        await aiordt.get(refs)


@ray.remote
class _StoreProducer(_Source):
    async def pid(self) -> int:
        return os.getpid()

    async def make(self, nbytes: int, pages: str) -> float:
        return self.prepare(nbytes, pages)

    async def give(self) -> object:
        return self.tensor


@ray.remote
class _StoreConsumer:
    def __init__(self) -> None:
        quiet()

    async def pid(self) -> int:
        return os.getpid()

    async def take(self, tensor: object) -> None:
        del tensor


def _rdt_producer(transport: str) -> Any:  # noqa: ANN401  (Ray's actor classes have no types)
    @ray.remote(enable_tensor_transport=True)
    class _RdtProducer(_Source):
        def pid(self) -> int:
            return os.getpid()

        def make(self, nbytes: int, pages: str) -> float:
            return self.prepare(nbytes, pages)

        @ray.method(tensor_transport=transport)
        def give(self) -> object:
            return self.tensor

    return _RdtProducer


@ray.remote(enable_tensor_transport=True)
class _RdtConsumer:
    def __init__(self) -> None:
        quiet()

    def pid(self) -> int:
        return os.getpid()

    def take(self, tensor: object) -> None:
        del tensor


class Pair:
    """A peer's producer and consumer, alive."""

    def __init__(self, peer: str) -> None:
        self._group: Any = None
        if peer == AIORDT:
            self.producer, self._consumer = start(_AiordtProducer), start(_AiordtConsumer)
        elif peer in {STORE, STORE_VIEW}:
            options: dict[str, Any] = {}
            if peer == STORE_VIEW:
                variables = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
                options = {"runtime_env": {"env_vars": variables}}
            self.producer = start(_StoreProducer, **options)
            self._consumer = start(_StoreConsumer, **options)
        else:
            self.producer, self._consumer = start(_rdt_producer(peer)), start(_RdtConsumer)
        try:
            get([self.producer.pid.remote(), self._consumer.pid.remote()])
            if peer == GLOO:
                pair = [self.producer, self._consumer]
                self._group = create_collective_group(pair, backend="gloo")
        except BaseException:
            self.end()
            raise

    def call(self) -> None:
        get(self._consumer.take.remote(self.producer.give.remote()))

    def end(self) -> None:
        if self._group is not None:
            # When its actors have died, that is what this turn's error is about.
            with suppress(ray.exceptions.RayError, RuntimeError, ValueError):
                destroy_collective_group(self._group)
        end([self.producer, self._consumer])


def missing(peer: str) -> str | None:
    """Why a peer cannot be measured here, as far as can be told without trying."""
    if peer == GLOO and not torch.distributed.is_gloo_available():
        return "this PyTorch has no Gloo"
    if peer == NIXL and importlib.util.find_spec("nixl") is None:
        return "nixl is not installed (pip install nixl-cu13 nixl)"
    return None


@dataclass(slots=True)
class _Series:
    """Samples of one peer at one size, by round."""

    rounds: list[list[float]] = field(default_factory=list)


def num_samples(nbytes: int, *, quick: bool) -> int:
    """Samples of one size in one round."""
    if nbytes <= 64 * KIB:
        return 60
    if nbytes <= MIB:
        return 20 if quick else 30
    if nbytes <= 16 * MIB:
        return 8 if quick else 12
    return 4 if quick else 5


def measure(
    results: Results,
    *,
    peers: Sequence[str],
    sizes: Sequence[int],
    rounds: int,
    quick: bool,
    say: Callable[[str], None],
) -> None:
    """Measure the peers in turns, ``rounds`` times, in another order each time.

    Whoever comes after a peer measures beside the end of that one's processes.
    """
    series: dict[tuple[str, int, str], _Series] = defaultdict(_Series)
    for number in range(rounds):
        first = number % len(peers)
        for peer in (*peers[first:], *peers[:first]):
            why = missing(peer)
            if why is not None:
                results.unavailable[peer] = why
            if peer in results.unavailable:
                continue
            say(f"actor to actor, round {number + 1} of {rounds}: {peer}")
            try:
                _turn(results, peer, sizes, series, quick=quick)
            except (
                ray.exceptions.RayError,
                TimeoutError,
                RuntimeError,
                ValueError,
                ImportError,
            ) as exc:
                results.unavailable[peer] = reason(exc)
    order = {peer: index for index, peer in enumerate(PEERS)}
    for (peer, nbytes, pages), one in sorted(
        series.items(), key=lambda item: (item[0][1], item[0][2], order[item[0][0]])
    ):
        samples = [sample for some in one.rounds for sample in some]
        results.actors.append(
            Latency(
                name=peer,
                nbytes=nbytes,
                pages=pages,
                spread=Spread.of(samples),
                round_p50=tuple(Spread.of(some).p50 for some in one.rounds),
            )
        )


def _turn(
    results: Results,
    peer: str,
    sizes: Sequence[int],
    series: dict[tuple[str, int, str], _Series],
    *,
    quick: bool,
) -> None:
    pair = Pair(peer)
    try:
        get(pair.producer.make.remote(8, pages_for(8)[0]))
        for _ in range(_FIRST_CALLS):
            pair.call()
        for nbytes in sizes:
            for pages in pages_for(nbytes)[: 1 if quick else None]:
                share = get(pair.producer.make.remote(nbytes, pages))
                results.huge_share[f"{peer}, {nbytes}, {pages}"] = share
                count = num_samples(nbytes, quick=quick)
                for _ in range(max(2, count // 5)):
                    pair.call()
                samples = []
                for _ in range(count):
                    begun = time.perf_counter()
                    pair.call()
                    samples.append(time.perf_counter() - begun)
                series[peer, nbytes, pages].rounds.append(samples)
    finally:
        pair.end()
