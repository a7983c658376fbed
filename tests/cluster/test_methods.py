"""`AsyncActor` and `@method` in all their combinations with what Ray offers."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch
from typing_extensions import override

import aiordt
from aiordt._export import export_blocking
from aiordt._runtime import current
from tests.support import MIB, arange, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Base(aiordt.AsyncActor):
    def __init__(self, scale: float, *, offset: float = 0.0) -> None:  # does not call super's
        self.scale = scale
        self.offset = offset

    @aiordt.method
    def inherited(self) -> torch.Tensor:
        return arange(MIB) * self.scale + self.offset

    @aiordt.method
    async def overridden(self) -> Any:
        return {"base": arange(MIB)}


class Derived(Base):
    """Every kind of method."""

    @aiordt.method
    @override
    async def overridden(self) -> Any:
        return {"derived": arange(MIB)}

    @aiordt.method
    def plain(self, n: int) -> tuple[torch.Tensor, str]:
        return arange(n), threading.current_thread().name

    @aiordt.method
    async def stream(self, n: int) -> AsyncIterator[Any]:
        for i in range(n):
            yield {"i": i, "t": torch.full((300_000,), float(i))}

    @aiordt.method
    def sync_stream(self, n: int) -> Iterator[Any]:
        for i in range(n):
            yield torch.full((300_000,), float(i))

    @aiordt.method(resolve=True)
    async def total(self, first: Any, *rest: Any, more: Any = None) -> list[float]:
        tensors = [first["w"], *rest, *(more or {}).values()]
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        return [float(tensor.sum()) for tensor in tensors]

    @aiordt.method
    @ray.method(num_returns=2, concurrency_group="io")
    async def two_ours_on_top(self) -> Any:
        return arange(MIB), {"thread": threading.current_thread().name, "t": arange(2 * MIB)}

    @ray.method(num_returns=2, concurrency_group="io")
    @aiordt.method
    async def two_rays_on_top(self) -> Any:
        return arange(MIB), {"thread": threading.current_thread().name, "t": arange(2 * MIB)}

    @ray.method(concurrency_group="compute")
    @aiordt.method
    async def other_loop(self, refs: list[Any]) -> Any:
        (tensor,) = await aiordt.get(refs)
        return {"thread": threading.current_thread().name, "t": tensor * 2}

    async def not_decorated(self) -> torch.Tensor:
        return arange(40)


GroupedActor: Any = ray.remote(concurrency_groups={"io": 2, "compute": 4})(Derived)


class SyncOnly(aiordt.AsyncActor):
    """No async method: Ray runs it on threads without a loop."""

    @aiordt.method
    def make(self, n: int) -> Any:
        return [arange(n)]

    @aiordt.method(resolve=True)
    def total(self, ref: Any) -> float:
        return float(ref["t"].sum())

    def export_while_the_io_thread_is_held(self) -> bool:
        done, waited = threading.Event(), []
        current().io.loop.call_soon_threadsafe(lambda: waited.append(done.wait(20)))
        export_blocking(arange(MIB), "test", transport=None, snapshot=False)
        in_time = not waited
        done.set()
        return in_time

    @aiordt.method(snapshot=True)
    def stream(self, n: int) -> Iterator[torch.Tensor]:
        tensor = torch.zeros(MIB)
        for i in range(n):
            tensor.fill_(i)
            yield tensor


@pytest.fixture(scope="module")
def grouped(spawn_for_all: Any) -> Any:
    return spawn_for_all(GroupedActor, 2.0)


async def test_def_async_def_inheritance_and_own_init(grouped: Any) -> None:
    assert torch.equal(await (await grouped.inherited.remote()), arange(MIB) * 2)
    assert set(await grouped.overridden.remote()) == {"derived"}
    ref, thread = await grouped.plain.remote(MIB)
    assert torch.equal(await ref, arange(MIB))
    assert "AsyncIO" in thread
    assert isinstance(await grouped.not_decorated.remote(), torch.Tensor)


async def test_generators(grouped: Any) -> None:
    seen = []
    async for out in grouped.stream.remote(4):
        item = await out
        seen.append((item["i"], float((await item["t"])[0])))
    assert seen == [(i, float(i)) for i in range(4)]
    values = [float((await (await out))[7]) async for out in grouped.sync_stream.remote(3)]
    assert values == [0.0, 1.0, 2.0]


async def test_leaving_a_generator_early_closes_the_users(nodes: Any) -> None:
    local = Closing()
    items: Any = local.stream()
    async for _ in items:
        break
    await items.aclose()
    assert local.closed


class Closing(aiordt.AsyncActor):
    """Knows when its generator has ended."""

    closed = False

    @aiordt.method
    async def stream(self) -> AsyncIterator[Any]:
        try:
            while True:
                yield torch.ones(3)
        finally:
            self.closed = True


async def test_an_actor_configures_itself(nodes: Any, spawn: Any) -> None:
    class Configured(aiordt.AsyncActor):
        def __init__(self) -> None:
            aiordt.configure(inline_nbytes=0)

        @aiordt.method
        async def make(self) -> Any:
            return torch.ones(3)

    ref = await spawn(ray.remote(Configured)).make.remote()
    assert (await aiordt.explain(ref)).chosen == "cma"
    assert torch.equal(await ref, torch.ones(3))


async def test_resolve_pulls_refs_in_args_and_kwargs(nodes: Any, grouped: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: [arange(40), arange(MIB), arange(3 * MIB)])
    nested = nodes[0].make.remote(lambda _: arange(2 * MIB))
    sums = await grouped.total.remote({"w": refs[0]}, refs[1], more={"x": refs[2], "o": nested})
    want = [float(arange(n).sum()) for n in (40, MIB, 3 * MIB, 2 * MIB)]
    assert sums == want


@pytest.mark.parametrize("name", ["two_ours_on_top", "two_rays_on_top"])
async def test_ray_method_in_either_order(grouped: Any, name: str) -> None:
    first, second = getattr(grouped, name).remote()
    assert torch.equal(await (await first), arange(MIB))
    second = await second
    assert "io" in second["thread"]
    assert torch.equal(await second["t"], arange(2 * MIB))


async def test_concurrency_groups_have_their_own_loops(nodes: Any, grouped: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(4 * MIB))
    calls = [grouped.other_loop.remote([ref]) for _ in range(8)]
    firsts = [grouped.overridden.remote() for _ in range(4)]
    for out in calls:
        got = await out
        assert "compute" in got["thread"]
        assert torch.equal(await got["t"], arange(4 * MIB) * 2)
    for out in firsts:
        assert torch.equal(await (await out)["derived"], arange(MIB))


async def test_max_concurrency_out_of_order(nodes: Any, spawn: Any) -> None:
    class Slow(aiordt.AsyncActor):
        def __init__(self) -> None:
            self.order: list[int] = []

        async def use(self, i: int, refs: list[Any]) -> int:
            await asyncio.sleep(0.001 * ((i * 7) % 10))
            (tensor,) = await aiordt.get(refs)
            self.order.append(i)
            return int(tensor[0])

        async def arrived(self) -> list[int]:
            return self.order

    consumer = spawn(ray.remote(Slow), options={"max_concurrency": 10})
    outs = [nodes[i % 2].make.remote(lambda _, i: torch.full((100_000,), i), i) for i in range(100)]
    got = await asyncio.gather(*[consumer.use.remote(i, [out]) for i, out in enumerate(outs)])
    assert got == list(range(100))
    arrived = await consumer.arrived.remote()
    assert sorted(arrived) == list(range(100))
    assert arrived != list(range(100))


async def test_sync_only_actor(nodes: Any, spawn: Any) -> None:
    actor = spawn(ray.remote(SyncOnly))
    (ref,) = await actor.make.remote(MIB)
    assert torch.equal(await ref, arange(MIB))
    refs = await nodes[0].make.remote(lambda _: {"t": arange(2 * MIB)})
    assert await actor.total.remote(refs) == float(arange(2 * MIB).sum())
    values = [float((await (await out))[3]) async for out in actor.stream.remote(3)]
    assert values == [0.0, 1.0, 2.0]
    assert await actor.export_while_the_io_thread_is_held.remote()


async def test_named_detached_and_restarted(spawn: Any) -> None:
    class Worker(aiordt.AsyncActor):
        @aiordt.method
        async def make(self) -> torch.Tensor:
            return arange(MIB)

        async def die(self) -> None:
            import os  # noqa: PLC0415

            os._exit(1)

    actor = spawn(
        ray.remote(Worker),
        options={"name": "aiordt-w", "lifetime": "detached", "max_restarts": 1},
    )
    ref = await actor.make.remote()
    assert ref.owner.actor_name == "aiordt-w"
    assert torch.equal(await ref, arange(MIB))
    again = ray.get_actor("aiordt-w")
    assert torch.equal(await (await again.make.remote()), arange(MIB))
    actor.die.remote()

    async def restarted() -> Any:
        try:
            return await again.make.remote()
        except ray.exceptions.RayActorError:
            return None

    fresh = await eventually(restarted, seconds=30)
    assert torch.equal(await fresh, arange(MIB))
    with pytest.raises(aiordt.OwnerDiedError, match="aiordt-w"):
        await ref


def test_signatures_survive_and_misuse_is_refused() -> None:
    parameters = list(inspect.signature(Derived.total).parameters)
    assert parameters[:4] == ["self", "first", "rest", "more"]  # Ray may add one for tracing
    assert not hasattr(Derived.total, "__wrapped__")
    assert inspect.iscoroutinefunction(Derived.plain)
    assert inspect.isasyncgenfunction(Derived.sync_stream)
    assert not inspect.iscoroutinefunction(SyncOnly.make)
    with pytest.raises(aiordt.UsageError, match="no transport 'smoke'"):
        aiordt.method(transport="smoke")
    with pytest.raises(TypeError, match="decorates methods"):
        aiordt.method(5)  # type: ignore[call-overload]


async def test_method_without_the_mixin_says_so(spawn: Any) -> None:
    class Lonely:
        @aiordt.method
        async def make(self) -> torch.Tensor:
            return torch.ones(2)

    with pytest.raises(aiordt.UsageError, match="AsyncActor among its bases"):
        await spawn(ray.remote(Lonely)).make.remote()


async def test_mixin_outside_ray_is_a_plain_object(cluster: None) -> None:
    local = Derived(3.0)
    refs = await local.overridden()
    assert torch.equal(await refs["derived"], arange(MIB))
