"""What waiting costs: the CPU of processes in which 1,000 awaits are pending."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from benchmarks._cluster import end, get, reason, start
from benchmarks._measure import KIB, cpu_seconds
from benchmarks._pages import quiet
from benchmarks._results import AIORDT, AIORDT_USED, NIXL_PULL, UCX, Idle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from benchmarks._results import Results

_COUNT: Final = 1000
_CONCURRENCY: Final = 2 * _COUNT
#: Seconds for the tasks to start and for the processes to calm down.
_SETTLE: Final = 1.5
PLAIN: Final = "plain Ray"


class _Waiting:
    """What the actors share: methods that never return, tasks that never end."""

    def __init__(self) -> None:
        quiet()
        self.tasks: list[asyncio.Task[Any]] = []
        self.held: object = None

    async def pid(self) -> int:
        return os.getpid()

    async def never(self) -> None:
        await asyncio.Event().wait()

    async def hold(self, held: object) -> None:
        self.held = held

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(coroutine))


@ray.remote(max_concurrency=_CONCURRENCY)
class _PlainWaiter(_Waiting):
    async def wait_for_events(self) -> None:
        for _ in range(_COUNT):
            self.spawn(self.never())

    async def wait_for(self, refs: list[Any]) -> None:
        for ref in refs:
            self.spawn(_plain_wait(ref))


@ray.remote(max_concurrency=_CONCURRENCY)
class _AiordtWaiter(aiordt.AsyncActor, _Waiting):
    @aiordt.method
    async def give(self) -> list[torch.Tensor]:
        self.tensors = [torch.zeros(64 * KIB, dtype=torch.uint8) for _ in range(_COUNT)]
        return list(self.tensors)

    async def use(self, refs: list[Any]) -> dict[str, str]:
        return await _use(refs)

    async def wait_freed(self) -> None:
        for tensor in self.tensors:
            self.spawn(aiordt.wait_tensor_freed(tensor))

    async def wait_for(self, refs: list[Any]) -> None:
        for ref in refs:
            self.spawn(aiordt.get(ref))


async def _use(refs: list[Any]) -> dict[str, str]:
    """Pull by nixl and ucx; why that is not to be had."""
    why = {}
    for label, transport in ((NIXL_PULL, "nixl"), (UCX, "ucx")):
        try:
            await aiordt.get(refs, transport=transport)
        except aiordt.AiordtError as exc:
            why[f"idle, {label}"] = reason(exc)
    return why


async def _plain_wait(ref: Any) -> Any:  # noqa: ANN401
    return await ref


async def _observe(
    wait: Callable[[Any], Coroutine[Any, Any, Any]], refs: list[Any], pids: list[int], window: float
) -> list[float]:
    """CPU seconds of each process over ``window`` s, while this one awaits ``refs``."""
    tasks = [asyncio.ensure_future(wait(ref)) for ref in refs]
    await asyncio.sleep(_SETTLE)
    before = [cpu_seconds(pid) for pid in pids]
    await asyncio.sleep(window)
    used = [cpu_seconds(pid) - old for pid, old in zip(pids, before, strict=True)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return used


def measure(results: Results, *, window: float, say: Callable[[str], None]) -> None:
    """Measure plain Ray first: aiordt's runtime, once started, stays in the driver."""
    for name in (PLAIN, AIORDT, AIORDT_USED):
        say(f"idle CPU: {name}")
        waiter: Any = _PlainWaiter if name == PLAIN else _AiordtWaiter
        producer, consumer = start(waiter), start(waiter)
        try:
            pids = [os.getpid(), *get([producer.pid.remote(), consumer.pid.remote()])]
            refs = [producer.never.remote() for _ in range(_COUNT)]
            if name == PLAIN:
                get(producer.wait_for_events.remote())
                awaits = ("await ObjectRef", "Event.wait", "await ObjectRef")
            else:
                exported = producer.give.remote()
                get(consumer.hold.remote(exported))
                if name == AIORDT_USED:
                    refs_here = get(exported)[:1]
                    used_here = asyncio.run(_use(refs_here))
                    for part in (used_here, get(consumer.use.remote(refs_here))):
                        results.unavailable.update(part)
                    del refs_here
                get(producer.wait_freed.remote())
                awaits = ("get(ObjectRef)", "wait_tensor_freed", "get(ObjectRef)")
            get(consumer.wait_for.remote(refs))
            wait = _plain_wait if name == PLAIN else aiordt.get
            used = asyncio.run(_observe(wait, refs, pids, window))
            for process, kind, seconds in zip(
                ("driver", "producer", "consumer"), awaits, used, strict=True
            ):
                results.idles.append(
                    Idle(
                        name=name,
                        process=process,
                        awaits=f"{_COUNT:,} x {kind}",
                        seconds=seconds,
                        cores=seconds / window,
                    )
                )
        except (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError) as exc:
            results.unavailable[f"idle, {name}"] = reason(exc)
        finally:
            end([producer, consumer])
