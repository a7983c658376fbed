"""Weights: versions from one publisher to many readers, each of them whole."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import aiordt
from aiordt._runtime import current
from aiordt.testing import at_phase, cancel_randomly
from aiordt.weights import Subscriber, Update, publisher, subscriber
from aiordt.weights._service import weights_of
from tests.support import MIB, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_LAYERS = 6
_NUMEL = 64 * 1024


def filled(value: float, numel: int = _NUMEL) -> dict[str, torch.Tensor]:
    """Layers of which every element is ``value``, large and small."""
    layers = {f"layer{n}": torch.full((numel,), float(value)) for n in range(_LAYERS)}
    return {**layers, "bias": torch.full((3,), float(value))}


def mixed(weights: dict[str, torch.Tensor], version: int) -> bool:
    """Whether any element is not of that version."""
    return any(not bool((tensor == version).all()) for tensor in weights.values())


async def open_publisher(node: Any, name: str, options: dict[str, Any]) -> int:
    node.kept["pub"] = await publisher(name, **options)
    return int(node.kept["pub"].epoch)


async def publish(node: Any, tree: Any, version: int | None = None) -> int | None:
    number: int | None = await node.kept["pub"].publish(tree, version=version)
    return number


async def publish_filled(node: Any, first: int, last: int) -> list[int | None]:
    """Publish versions; each is written over as soon as it has been."""
    tree = filled(0)
    numbers = []
    for version in range(first, last + 1):
        for tensor in tree.values():
            tensor.fill_(version)
        numbers.append(await node.kept["pub"].publish(tree))
    for tensor in tree.values():
        tensor.fill_(-1)
    return numbers


async def close_publisher(node: Any) -> None:
    pub = node.kept.pop("pub", None)
    if pub is not None:
        await pub.aclose()


async def open_subscriber(node: Any, name: str) -> None:
    node.kept["sub"] = await subscriber(name)


async def close_subscriber(node: Any) -> None:
    sub = node.kept.pop("sub", None)
    if sub is not None:
        await sub.aclose()


async def latest(node: Any, min_version: int | None = None) -> Update:
    found: Update = await node.kept["sub"].latest(min_version)
    return found


async def watch(node: Any, until: int) -> tuple[list[int], int]:
    """The versions that came, up to one, and how many were mixed."""
    versions, torn = [], 0
    async for version, weights in node.kept["sub"]:
        versions.append(version)
        torn += mixed(weights, version)
        if version >= until:
            break
    return versions, torn


class Opener:
    """Publishers on nodes, and subscribers here, all closed after the test."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    async def publisher(self, node: Any, name: str, **options: Any) -> int:
        epoch: int = await node.run.remote(open_publisher, name, options)

        async def close() -> None:
            with suppress(Exception):  # it was killed
                await node.run.remote(close_publisher)

        self._stack.push_async_callback(close)
        return epoch

    async def subscriber(self, name: str, **options: Any) -> Subscriber:
        return await self._stack.enter_async_context(await subscriber(name, **options))

    async def on(self, node: Any, name: str) -> None:
        await node.run.remote(open_subscriber, name)
        self._stack.push_async_callback(lambda: node.run.remote(close_subscriber))

    async def aclose(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def opener(nodes: Any) -> AsyncIterator[Opener]:
    made = Opener()
    yield made
    await made.aclose()


async def hold(sub: Subscriber) -> int:
    """Hold the newest version as a slow reader does; by what it is let go."""
    service = weights_of(current())
    number = next(service.numbers)
    assert await current().io.run(service.take(sub._record, number, 0)) is not None
    return number


async def let_go(sub: Subscriber, number: int) -> bool:
    service = weights_of(current())
    return await current().io.run(service.done(sub._record, number))


def num_held(_: Any) -> int:
    streams = weights_of(current())._streams.values()
    return sum(len(s.holders) for each in streams for s in each._versions.slots.values())


# --- what arrives --------------------------------------------------------------------------


async def test_readers_get_the_newest_version(nodes: Any, opener: Opener) -> None:
    await opener.publisher(nodes[0], "newest")
    sub = await opener.subscriber("newest")
    waiting = asyncio.ensure_future(sub.latest())
    await nodes[0].run.remote(publish_filled, 1, 1)
    version, weights = await waiting  # woken by it
    assert (version, mixed(weights, 1)) == (1, False)
    weights["layer0"].zero_()  # private
    assert not mixed((await sub.latest()).weights, 1)
    await nodes[0].run.remote(publish_filled, 2, 4)
    await opener.on(nodes[1], "newest")  # late
    version, weights = await nodes[1].run.remote(latest)
    assert (version, mixed(weights, 4)) == (4, False)
    assert (await sub.latest(3)).version == 4
    later = asyncio.ensure_future(sub.latest(6))
    await nodes[0].run.remote(publish_filled, 5, 5)
    assert (await sub.latest()).version == 5
    assert not later.done()
    await nodes[0].run.remote(publish_filled, 6, 6)
    assert (await later).version == 6


async def test_into_and_dtype(nodes: Any, opener: Opener) -> None:
    await opener.publisher(nodes[0], "into")
    sub = await opener.subscriber("into")
    await nodes[0].run.remote(publish_filled, 1, 1)
    mine = filled(0)
    version, weights = await sub.latest(into=mine)
    assert all(weights[name] is mine[name] for name in mine)
    assert not mixed(mine, version)
    weights = (await sub.latest(dtype=torch.bfloat16)).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not mixed(weights, 1)
    del mine["bias"]
    with pytest.raises(aiordt.UsageError, match="into"):
        await sub.latest(into=mine)
    assert await nodes[0].run.remote(num_held) == 0


def model(node: Any) -> dict[str, Any]:
    shared = torch.arange(float(_NUMEL)).reshape(256, -1)
    return {
        "embedding": shared,
        "head": shared.t(),
        "parameter": torch.nn.Parameter(torch.ones(5)),
        "array": np.arange(7),
        "state": [{"step": 3}, (b"raw", None)],
    }


async def publish_model(node: Any) -> None:
    await node.kept["pub"].publish(model(node))


async def test_trees_arrive_as_by_get(nodes: Any, opener: Opener) -> None:
    await opener.publisher(nodes[0], "trees")
    sub = await opener.subscriber("trees")
    await nodes[0].run.remote(publish_model)
    before = aiordt.stats().bytes_pulled
    _, got = await sub.latest()
    moved = aiordt.stats().bytes_pulled - before
    expected = model(None)
    assert torch.equal(got["head"], expected["head"])
    assert got["head"].untyped_storage().data_ptr() == got["embedding"].untyped_storage().data_ptr()
    assert moved < 1.5 * _NUMEL * 4, "what is tied moves once"
    assert isinstance(got["parameter"], torch.nn.Parameter)
    assert np.array_equal(got["array"], expected["array"])
    assert got["state"] == expected["state"]
    # Another shape, then other values in a buffer that is known.
    for step in range(4):
        await nodes[0].run.remote(publish, {"t": torch.full((step // 2 + 5,), 1.0), "step": step})
        got = (await sub.latest()).weights
        assert (got["t"].shape, got["step"]) == ((step // 2 + 5,), step)


async def test_a_publisher_reads_its_own(nodes: Any) -> None:
    tree = {"t": torch.ones(MIB), "p": torch.nn.Parameter(torch.ones(3))}
    async with await publisher("own") as pub, await subscriber("own") as sub:
        assert await pub.publish(tree) == 1
        version, weights = await sub.latest()
        assert version == 1
        assert torch.equal(weights["t"], tree["t"])
        assert isinstance(weights["p"], torch.nn.Parameter)
        into = {"t": torch.zeros(MIB), "p": torch.zeros(3)}
        tree["t"].fill_(2)
        assert await pub.publish(tree, version=9) == 9
        version, weights = await sub.latest(into=into)
        assert (version, weights["t"] is into["t"]) == (9, True)
        assert bool((into["t"] == 2).all())
        del weights, into
    assert aiordt.stats().exports == 0


# --- consistency ---------------------------------------------------------------------------


async def consistent(nodes: Any, opener: Opener, count: int) -> None:
    """WGT-4: four readers, of which none sees two versions mixed, while others are published."""
    await opener.publisher(nodes[0], "load", max_versions=5)
    for node in nodes[1:]:
        await opener.on(node, "load")
    subs = [await opener.subscriber("load") for _ in range(2)]

    async def watch_here(sub: Subscriber) -> tuple[list[int], int]:
        return await watch(SimpleNamespace(kept={"sub": sub}), count)

    watching = [node.run.remote(watch, count) for node in nodes[1:]]
    here = [asyncio.ensure_future(watch_here(sub)) for sub in subs]
    numbers: list[int | None] = []
    while len(numbers) < count:  # the last one is there for certain
        some = await nodes[0].run.remote(publish_filled, len(numbers) + 1, len(numbers) + 10)
        assert None not in some, "four readers have four at most"
        numbers += some
    found = await asyncio.gather(*watching, *here)
    assert numbers == list(range(1, count + 1))
    for versions, torn in found:
        assert torn == 0
        assert versions == sorted(set(versions))
        assert versions[-1] == count


async def test_no_reader_sees_two_versions_mixed(nodes: Any, opener: Opener) -> None:
    await consistent(nodes, opener, 150)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_no_reader_sees_two_versions_mixed_in_ten_thousand(
    nodes: Any, opener: Opener
) -> None:
    await consistent(nodes, opener, 10_000)


def forget_readers(node: Any) -> None:
    """As when the connections to all readers break, though they go on reading."""
    (stream,) = weights_of(current())._streams.values()
    for slot in list(stream._versions.slots.values()):
        for reader, _ in list(slot.holders):
            stream.lost(reader)


async def test_a_version_that_was_not_held_does_not_count(nodes: Any, opener: Opener) -> None:
    """WGT-4: a one-sided read from a publisher that has given its reader up brings a mixture."""
    await opener.publisher(nodes[0], "broken")
    sub = await opener.subscriber("broken")
    await nodes[0].run.remote(publish_filled, 1, 1)
    await sub.latest()  # maps the buffer
    reached, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        reached.set()
        go_on.wait(20)

    with at_phase("shm.chunk", stop):
        reading = asyncio.ensure_future(sub.latest())
        try:
            await eventually(reached.is_set)
            await nodes[0].run.remote(forget_readers)
            await nodes[0].run.remote(publish_filled, 2, 6)
        finally:
            go_on.set()
        version, weights = await reading
    assert (version, mixed(weights, 6)) == (6, False)


# --- bounds --------------------------------------------------------------------------------


async def test_readers_that_have_all_buffers(nodes: Any, opener: Opener) -> None:
    """WGT-1, WGT-3: what is read is kept, what nobody reads makes room, the rest is dropped."""
    await opener.publisher(nodes[0], "drop", max_versions=2)
    sub = await opener.subscriber("drop")
    held = []
    for version in (1, 2):
        await nodes[0].run.remote(publish_filled, version, version)
        held.append(await hold(sub))
    assert await nodes[0].run.remote(publish_filled, 3, 3) == [None]
    assert (await sub.latest()).version == 2
    assert await let_go(sub, held[0])
    assert await nodes[0].run.remote(publish_filled, 3, 5) == [3, 4, 5]
    assert await let_go(sub, held[1])
    assert not await let_go(sub, held[1]), "once"
    version, weights = await sub.latest()
    assert (version, mixed(weights, 5)) == (5, False)


async def test_a_publisher_that_waits(nodes: Any, opener: Opener) -> None:
    await opener.publisher(nodes[0], "wait", max_versions=2, when_full="wait")
    sub = await opener.subscriber("wait")
    held = []
    for version in (1, 2):
        await nodes[0].run.remote(publish_filled, version, version)
        held.append(await hold(sub))
    publishing = asyncio.ensure_future(nodes[0].run.remote(publish_filled, 3, 3))
    done, _ = await asyncio.wait({publishing}, timeout=0.3)
    assert not done
    await let_go(sub, held[1])
    assert await publishing == [3]
    await let_go(sub, held[0])


async def test_bad_input_is_refused(nodes: Any, opener: Opener) -> None:
    with pytest.raises(aiordt.UsageError, match="max_versions"):
        await publisher("bad", max_versions=1)
    with pytest.raises(aiordt.UsageError, match="when_full"):
        await publisher("bad", when_full="never")  # type: ignore[arg-type]
    with pytest.raises(aiordt.UsageError, match="name"):
        await subscriber("")
    async with await publisher("bad") as pub, await subscriber("bad") as sub:
        await pub.publish({"a": 1}, version=5)
        with pytest.raises(aiordt.UsageError, match="only grow"):
            await pub.publish({"a": 1}, version=5)
        with pytest.raises(aiordt.UsageError, match="is a set"):
            await pub.publish({"a": {1}})
        with pytest.raises(aiordt.UsageError, match="min_version"):
            await sub.latest("5")  # type: ignore[arg-type]
        assert await sub.latest() == (5, {"a": 1})


# --- the end of one side -------------------------------------------------------------------


async def test_a_name_has_one_publisher_at_a_time(nodes: Any, opener: Opener) -> None:
    """NAM-1, NAM-2."""
    assert await opener.publisher(nodes[0], "taken") == 1
    for node in nodes[:2]:  # in the same process, and in another
        with pytest.raises(aiordt.UsageError, match=r"'taken' are published by .* already"):
            await node.run.remote(open_publisher, "taken", {})
    await nodes[0].run.remote(close_publisher)
    found = await asyncio.gather(
        *(node.run.remote(open_publisher, "taken", {}) for node in nodes), return_exceptions=True
    )
    assert [epoch for epoch in found if not isinstance(epoch, Exception)] == [2]
    await asyncio.gather(*(node.run.remote(close_publisher) for node in nodes))


async def test_a_subscriber_may_come_first(nodes: Any, opener: Opener) -> None:
    """NAM-3: it is called, and does not ask again and again."""
    finding = [asyncio.ensure_future(subscriber("later")) for _ in range(2)]
    there = nodes[1].run.remote(open_subscriber, "later")
    done, _ = await asyncio.wait(finding, timeout=0.3)
    assert not done
    finding[1].cancel()
    await opener.publisher(nodes[0], "later")
    await nodes[0].run.remote(publish_filled, 1, 1)
    async with asyncio.timeout(10):
        sub = await finding[0]
        await there
    assert (await sub.latest()).version == 1
    await sub.aclose()
    await nodes[1].run.remote(close_subscriber)
    assert finding[1].cancelled()


async def test_closing(nodes: Any, opener: Opener) -> None:
    """WGT-5, CLS-1, CLS-2."""
    await opener.publisher(nodes[0], "closing")
    sub, follower = [await opener.subscriber("closing", follow=follow) for follow in (False, True)]
    await nodes[0].run.remote(publish_filled, 1, 1)
    number = await hold(sub)
    versions = []

    async def iterate() -> None:
        async for version, _ in sub:
            versions.append(version)

    iterating = asyncio.ensure_future(iterate())
    following = asyncio.ensure_future(follower.latest(2))
    waiting = asyncio.ensure_future(sub.latest(2))
    await eventually(lambda: versions == [1])
    await nodes[0].run.remote(close_publisher)
    await asyncio.wait_for(iterating, 10)
    with pytest.raises(aiordt.ClosedError, match=r"publisher of 'closing'.* was closed"):
        await asyncio.wait_for(waiting, 10)
    assert await let_go(sub, number), "what is being read stays until it has been"
    assert not following.done()
    assert await opener.publisher(nodes[1], "closing") == 2
    await nodes[1].run.remote(publish_filled, 1, 1)
    assert (await asyncio.wait_for(following, 10)).version == 1, "newer than any of epoch 1"
    assert follower.epoch == 2
    parked = asyncio.ensure_future(follower.latest(100))
    await asyncio.sleep(0)
    await follower.aclose()
    await follower.aclose()
    for ended in (parked, follower.latest()):
        with pytest.raises(aiordt.ClosedError, match="this subscriber"):
            await ended
    with pytest.raises(aiordt.ClosedError):
        await sub.latest()


async def test_cancelled_readers_hold_nothing(nodes: Any, opener: Opener) -> None:
    """CAN-1, and WGT-5."""
    await opener.publisher(nodes[0], "cancelled")
    sub = await opener.subscriber("cancelled")
    await nodes[0].run.remote(publish_filled, 1, 1)
    await sub.latest()
    assert await cancel_randomly(sub.latest, times=60, seed=3, longest=0.004) > 10
    assert await cancel_randomly(lambda: sub.latest(9), times=20, seed=4) == 20

    async def held() -> bool:
        return bool(await nodes[0].run.remote(num_held) == 0)

    await eventually(held, what="nothing is held")
    assert not mixed((await sub.latest()).weights, 1)


async def cancel_publishing(node: Any) -> tuple[bool, int]:
    pub, tree = node.kept["pub"], filled(2)
    go_on = threading.Event()

    def hold_thread() -> None:
        go_on.wait(20)

    for _ in range(4):
        current().workers.submit(hold_thread)  # none is there to copy
    task = asyncio.ensure_future(pub.publish(tree))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    go_on.set()
    await asyncio.wait({task})
    return task.cancelled(), pub.version


async def test_a_cancelled_publish_publishes_nothing(nodes: Any, opener: Opener) -> None:
    """OWN-1."""
    await opener.publisher(nodes[0], "unpublished")
    sub = await opener.subscriber("unpublished")
    await nodes[0].run.remote(publish_filled, 1, 1)
    assert await nodes[0].run.remote(cancel_publishing) == (True, 1)
    assert not mixed((await sub.latest()).weights, 1)
    assert await nodes[0].run.remote(publish_filled, 2, 2) == [2]
    assert not mixed((await sub.latest()).weights, 2)


async def test_deaths(nodes: Any, opener: Opener, spawn: Any) -> None:
    """DTH-1, NAM-1: of a reader, then of a publisher, whose readers are told or go on."""
    victim = spawn()
    await opener.publisher(nodes[0], "reader", max_versions=2, when_full="wait")
    await nodes[0].run.remote(publish_filled, 1, 1)

    async def hold_there(node: Any) -> None:
        node.kept["sub"] = await subscriber("reader")
        await hold(node.kept["sub"])

    await victim.run.remote(hold_there)
    await nodes[0].run.remote(publish_filled, 2, 2)
    await victim.run.remote(hold_there)
    publishing = asyncio.ensure_future(nodes[0].run.remote(publish_filled, 3, 3))
    assert await opener.publisher(victim, "mortal") == 1
    await victim.run.remote(publish_filled, 1, 3)
    sub = await opener.subscriber("mortal")
    follower = await opener.subscriber("mortal", follow=True)
    assert (await sub.latest()).version == (await follower.latest()).version == 3
    waiting = asyncio.ensure_future(sub.latest(4))
    following = asyncio.ensure_future(follower.latest(4))
    assert not publishing.done()
    os.kill(await victim.pid.remote(), signal.SIGKILL)
    async with asyncio.timeout(5):
        assert await publishing == [3]
        with pytest.raises(aiordt.OwnerDiedError, match="publisher of 'mortal'"):
            await waiting
        with pytest.raises(aiordt.OwnerDiedError):
            await sub.latest()
    assert not following.done()
    assert await opener.publisher(nodes[1], "mortal") == 2
    await nodes[1].run.remote(publish_filled, 1, 1)
    version, weights = await asyncio.wait_for(following, 10)
    assert (version, mixed(weights, 1), follower.epoch) == (1, False, 2)
