"""Refs in items of generators: as long lived as any other ref."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch

import aiordt
from aiordt import _items
from aiordt._runtime import current
from tests.support import Node, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

N = 10


def tensor(i: int) -> torch.Tensor:
    return torch.full((300_000,), float(i))


class Threaded(aiordt.AsyncActor):
    """Without a loop of its own; makes a new tensor for each item."""

    @aiordt.method
    def stream(self, n: int) -> Iterator[Any]:
        for i in range(n):
            yield {"t": tensor(i)}

    def stats(self) -> aiordt.Stats:
        return aiordt.stats()


@pytest.fixture(scope="module")
def threaded(spawn_for_all: Any) -> Any:
    return spawn_for_all(ray.remote(Threaded))


@pytest.fixture
async def producer(nodes: list[Any]) -> Any:
    return nodes[0]


async def made(_actor: Any, n: int = N) -> AsyncIterator[Any]:
    for i in range(n):
        yield {"t": tensor(i)}


async def outs_of(generator: Any) -> list[Any]:
    """All items, none of them opened."""
    return [out async for out in generator]


async def ahead(producer: Any, *args: Any, n: int = N) -> Any:
    """A generator that has yielded all its items, and nobody has waited for one.

    What somebody waits for is counted by Ray, and opened by its generator.
    """
    await producer.stats.remote()  # it has started
    generator = producer.stream.remote(*args)

    async def yielded() -> bool:
        return (await producer.stats.remote()).exports == n

    await eventually(yielded, what="all are yielded")
    return generator


async def all_free(producer: Any) -> None:
    async def free() -> bool:
        return not (await producer.stats.remote()).exports

    await eventually(free, what="the producer holds nothing")


async def held(_actor: Any) -> list[int]:
    """How many processes have each lease that this one yielded."""
    items = _items.of(current())
    return [len(each.takers) for each in items._held.values()]


async def taken(producer: Any) -> None:
    async def all_are() -> bool:
        return bool(await producer.run.remote(held) == [1] * N)

    await eventually(all_are, what="all are taken")


def none_held(_actor: Any) -> bool:
    return not _items.of(current())._held


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_items_wait_to_be_taken(producer: Any, threaded: Any, kind: str) -> None:  # ITM-1
    if kind == "thread":
        producer = threaded
        outs = await outs_of(await ahead(threaded, N))
    else:
        outs = await outs_of(await ahead(producer, made))
    refs = [(await out)["t"] for out in outs]
    del outs
    await producer.stats.remote()
    assert [float((await ref)[0]) for ref in refs] == list(range(N))
    assert (await producer.stats.remote()).exports == N
    del refs
    await all_free(producer)


async def test_they_end_when_they_are_dropped(producer: Any) -> None:  # ITM-1
    async for out in producer.stream.remote(made):
        item = await out
        del out, item
    await all_free(producer)


def keep(actor: Any, name: str, value: Any) -> None:
    actor.kept[name] = value


async def take_all(actor: Any, producer: Any) -> None:
    actor.kept["items"] = [await out for out in await outs_of(await ahead(producer, made))]


def hand_over(actor: Any) -> Any:
    return actor.kept.pop("items")


async def hand_over_by_argument(actor: Any, other: Any) -> None:
    await other.run.remote(keep, "items", actor.kept["items"])
    del actor.kept["items"]


async def first_values(actor: Any) -> list[float]:
    return [float((await item["t"])[0]) for item in actor.kept["items"]]


async def nobody_took(producer: Any) -> None:
    async def none() -> bool:
        return not any(await producer.run.remote(held))

    await eventually(none, what="who took the items has dropped them")


@pytest.mark.parametrize("way", ["result", "argument"])
async def test_passed_on(producer: Any, nodes: Any, way: str) -> None:  # ITM-2
    await nodes[1].run.remote(take_all, producer)
    if way == "result":
        items = await nodes[1].run.remote(hand_over)
        await nodes[2].run.remote(keep, "items", items)
        del items
    else:
        await nodes[1].run.remote(hand_over_by_argument, nodes[2])
    await eventually(lambda: producer.run.remote(none_held), what="Ray counts them instead")
    assert await nodes[2].run.remote(first_values) == list(range(N))
    await nodes[2].run.remote(hand_over)
    await all_free(producer)


async def yield_again(_actor: Any, producer: Any) -> AsyncIterator[Any]:
    for out in await outs_of(await ahead(producer, made)):
        item = await out
        yield item
        yield item


async def test_yielded_again(producer: Any, nodes: Any) -> None:
    outs = await outs_of(nodes[1].stream.remote(yield_again, producer))
    items = [await out for out in outs]
    del outs
    assert [float((await item["t"])[0]) for item in items] == [i // 2 for i in range(2 * N)]
    del items
    await all_free(producer)


async def yield_given(_actor: Any, refs: list[Any]) -> AsyncIterator[Any]:
    while refs:
        yield [refs.pop(0)]


async def test_refs_of_others_are_yielded(producer: Any, nodes: Any) -> None:
    refs = await nodes[1].make.remote(lambda _: [tensor(i) for i in range(N)])
    outs = await outs_of(producer.stream.remote(yield_given, refs))
    del refs
    items = [await out for out in outs]
    del outs
    await producer.stats.remote()
    assert [float((await item[0])[0]) for item in items] == list(range(N))
    del items
    await all_free(nodes[1])


async def use(_actor: Any, item: Any) -> float:
    return float((await item["t"])[0])


async def test_unopened_items_go_to_several(producer: Any, nodes: Any) -> None:  # ITM-1
    for i, out in enumerate(await outs_of(await ahead(producer, made, 3, n=3))):
        for consumer in (nodes[1], producer, nodes[2]):
            assert await consumer.run.remote(use, out) == i
            await nobody_took(producer)
    del out
    await eventually(lambda: producer.run.remote(none_held))


async def test_nobody_takes_them(nodes: Any, spawn: Any) -> None:  # ITM-1
    producer = spawn(Node, {"item_seconds": 1})
    generator = await ahead(producer, made, 3, n=3)
    await eventually(lambda: producer.run.remote(none_held), what="items are given up")
    for out in await outs_of(generator):
        with pytest.raises(aiordt.TensorFreedError, match="item_seconds"):
            await (await out)["t"]


def forget_soon(_actor: Any) -> None:
    _items._RETURN_SECONDS = 0.1  # type: ignore[misc]


async def test_who_took_them_is_killed(nodes: Any, spawn: Any) -> None:  # ITM-1
    producer = spawn()
    await producer.run.remote(forget_soon)
    consumer = spawn()
    await consumer.run.remote(take_all, producer)
    await taken(producer)
    os.kill(await consumer.pid.remote(), signal.SIGKILL)
    await all_free(producer)


async def cut(_actor: Any) -> None:
    runtime = current()

    async def close_all() -> None:
        for connection in list(runtime._network._connections):
            await connection.aclose()

    await runtime.io.run(close_all())


async def test_the_connection_is_cut(producer: Any, nodes: Any) -> None:  # ITM-1
    await nodes[1].run.remote(take_all, producer)
    await taken(producer)
    await producer.run.remote(cut)
    await taken(producer)
    assert await nodes[1].run.remote(first_values) == list(range(N))
    await nodes[1].run.remote(hand_over)
    await all_free(producer)


async def iterate(actor: Any) -> list[float]:
    return [float((await item["t"])[0]) async for item in actor.stream(made)]


async def test_called_without_ray(producer: Any) -> None:
    assert await producer.run.remote(iterate) == list(range(N))
    await all_free(producer)
