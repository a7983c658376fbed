"""How late a consumer's event loop runs while 1 GiB arrives."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import ray
from typing_extensions import override

import aiordt
from benchmarks._cluster import end, get, reason, start
from benchmarks._measure import GIB, MIB, Heartbeat, Spread, available_nbytes, lateness
from benchmarks._p2p_actors import missing
from benchmarks._pages import ORDINARY, RawReader, make_tensor, quiet, receive_tensor
from benchmarks._results import AIORDT, NIXL, RAW_TWO, STORE, Lag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks._results import Results

_WARMUPS: Final = 2
#: Between two arrivals, so that one's end does not count for the next.
_PAUSE: Final = 0.02


#: Makes a source and a listener, and what lets bytes arrive: it gives ticks and windows.
_Make: TypeAlias = "Callable[[Sequence[int], int], tuple[Any, Any, Callable[[], tuple[Any, Any]]]]"


class _Listener:
    """What the consumers share: a heartbeat, and pulling of what they hold."""

    def __init__(self) -> None:
        quiet()
        self.held: Any = None
        self.heart = Heartbeat()

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, refs: Any) -> None:  # noqa: ANN401
        self.held = refs

    async def idle(self, seconds: float) -> list[float]:
        """Lateness with nothing to do."""
        self.heart.start()
        begun = time.perf_counter()
        await asyncio.sleep(seconds)
        return lateness(self.heart.stop(), [(begun, time.perf_counter())])

    async def start(self) -> None:
        self.heart.start()

    async def stop(self) -> list[tuple[float, float]]:
        return self.heart.stop()

    async def arrive(self) -> None:
        raise NotImplementedError

    async def pull(self, count: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Let what is held arrive ``count`` times; the ticks, and when it was arriving."""
        self.heart.start()
        windows = []
        for _ in range(count):
            await asyncio.sleep(_PAUSE)
            begun = time.perf_counter()
            await self.arrive()
            windows.append((begun, time.perf_counter()))
        return self.heart.stop(), windows


@ray.remote
class _AiordtListener(aiordt.AsyncActor, _Listener):
    @override
    async def arrive(self) -> None:
        await aiordt.get(self.held)


@ray.remote
class _RawListener(_Listener):
    """Two threads that read and do nothing else: what the machine allows."""

    @override
    async def hold(self, refs: Any) -> None:
        pid, places = refs
        reader = RawReader(pid)
        targets = [(address, receive_tensor(nbytes), nbytes) for address, nbytes in places]
        self.held = reader, targets

    @override
    async def arrive(self) -> None:
        reader, targets = self.held
        for address, target, nbytes in targets:
            await asyncio.to_thread(reader.read_by_two, address, target.data_ptr(), nbytes)


@ray.remote
class _StoreListener(_Listener):
    @override
    async def arrive(self) -> None:
        await asyncio.gather(*self.held)


@ray.remote(enable_tensor_transport=True)
class _NixlListener(_Listener):
    async def take(self, *tensors: torch.Tensor) -> None:
        """RDT's tensors arrive while Ray deserialises the arguments."""


@ray.remote
class _AiordtSource(aiordt.AsyncActor):
    def __init__(self, sizes: Sequence[int]) -> None:
        quiet()
        self._tensors = [make_tensor(nbytes, ORDINARY) for nbytes in sizes]

    async def pid(self) -> int:
        return os.getpid()

    @aiordt.method
    async def give(self) -> list[torch.Tensor]:
        return list(self._tensors)

    async def where(self) -> tuple[int, list[tuple[int, int]]]:
        return os.getpid(), [(tensor.data_ptr(), tensor.nbytes) for tensor in self._tensors]


@ray.remote
class _StoreSource:
    def __init__(self, sizes: Sequence[int]) -> None:
        quiet()
        self._tensors = [make_tensor(nbytes, ORDINARY) for nbytes in sizes]

    async def pid(self) -> int:
        return os.getpid()

    async def give(self, index: int) -> torch.Tensor:
        return self._tensors[index]


@ray.remote(enable_tensor_transport=True)
class _NixlSource:
    def __init__(self, sizes: Sequence[int]) -> None:
        quiet()
        self._tensors = [make_tensor(nbytes, ORDINARY) for nbytes in sizes]

    async def pid(self) -> int:
        return os.getpid()

    @ray.method(tensor_transport="nixl")
    async def give(self, index: int) -> torch.Tensor:
        return self._tensors[index]


def _aiordt(sizes: Sequence[int], count: int) -> tuple[Any, Any, Callable[[], tuple[Any, Any]]]:
    source, listener = start(_AiordtSource, sizes), start(_AiordtListener)
    return source, listener, lambda: _pulled(listener, source.give.remote(), count)


def _raw(sizes: Sequence[int], count: int) -> tuple[Any, Any, Callable[[], tuple[Any, Any]]]:
    source, listener = start(_AiordtSource, sizes), start(_RawListener)
    return source, listener, lambda: _pulled(listener, source.where.remote(), count)


def _store(sizes: Sequence[int], count: int) -> tuple[Any, Any, Callable[[], tuple[Any, Any]]]:
    source, listener = start(_StoreSource, sizes), start(_StoreListener)

    def arrivals() -> tuple[Any, Any]:
        # The producer's copy into the store is made before: only the consumer's half counts.
        refs = [source.give.remote(index) for index in range(len(sizes))]
        ray.wait(refs, num_returns=len(refs), timeout=60, fetch_local=False)
        return _pulled(listener, refs, count)

    return source, listener, arrivals


def _nixl(sizes: Sequence[int], count: int) -> tuple[Any, Any, Callable[[], tuple[Any, Any]]]:
    source, listener = start(_NixlSource, sizes), start(_NixlListener)

    def arrive() -> tuple[float, float]:
        refs = [source.give.remote(index) for index in range(len(sizes))]
        begun = time.perf_counter()
        get(listener.take.remote(*refs))
        return begun, time.perf_counter()

    def arrivals() -> tuple[Any, Any]:
        for _ in range(_WARMUPS):
            arrive()
        get(listener.start.remote())
        windows = []
        for _ in range(count):
            time.sleep(_PAUSE)
            windows.append(arrive())
        return get(listener.stop.remote()), windows

    return source, listener, arrivals


def _pulled(listener: Any, refs: Any, count: int) -> tuple[Any, Any]:  # noqa: ANN401
    get(listener.hold.remote(refs))
    get(listener.pull.remote(_WARMUPS))
    found: tuple[Any, Any] = get(listener.pull.remote(count))
    return found


def measure(
    results: Results,
    *,
    peers: Sequence[str],
    count: int,
    quick: bool,
    say: Callable[[str], None],
) -> None:
    """Measure the lag of each peer's consumer, idle and while 1 GiB arrives ``count`` times."""
    quarters = (256 * MIB,) * 4
    turns: list[tuple[str, str, tuple[int, ...], _Make]] = [
        (AIORDT, "4 x 256 MiB", quarters, _aiordt),
        (RAW_TWO, "4 x 256 MiB", quarters, _raw),
        (STORE, "4 x 256 MiB", quarters, _store),
        (NIXL, "4 x 256 MiB", quarters, _nixl),
    ]
    if not quick:
        turns.insert(1, (AIORDT, "1 x 1 GiB", (GIB,), _aiordt))
    for peer, what, sizes, make in turns:
        if (AIORDT if peer == RAW_TWO else peer) not in peers:
            continue
        why = missing(peer)
        if available_nbytes() < 8 * GIB:
            why = "less than 8 GiB of memory are free"
        if why is not None:
            results.unavailable[f"lag, {peer}"] = why
            continue
        say(f"loop lag: {peer}, {what}")
        source, listener, arrivals = make(sizes, count)
        try:
            get(source.pid.remote())
            get(listener.idle.remote(0.3))
            idle = get(listener.idle.remote(1.0 if quick else 2.0))
            ticks, windows = arrivals()
            results.lags.append(
                Lag(
                    name=peer,
                    what=what,
                    duration=Spread.of([over - begun for begun, over in windows]),
                    late=Spread.of(lateness(ticks, windows)),
                    ticks=Spread.of(lateness(ticks, windows, corrected=False)),
                    idle=Spread.of(idle),
                )
            )
        except (ray.exceptions.RayError, TimeoutError, RuntimeError, ValueError) as exc:
            results.unavailable[f"lag, {peer}"] = reason(exc)
        finally:
            end([source, listener])
