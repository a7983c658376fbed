"""One crossing per node, on one host: consumers that may not read their owner's memory."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import aiordt
from aiordt import _copies, _relay
from aiordt._landing import land
from aiordt._runtime import current
from aiordt.testing import at_phase
from tests.support import MIB, Node, arange, clean, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_NBYTES = 4 * MIB


#: To who has these, every owner is as if on another host.
_ELSEWHERE = {"transports": ("shm", "tcp")}


@pytest.fixture(scope="module")
def _neighbours(spawn_for_all: Any) -> list[Any]:
    return [spawn_for_all(Node, _ELSEWHERE) for _ in range(3)]


@pytest.fixture
async def neighbours(_neighbours: list[Any]) -> AsyncIterator[list[Any]]:
    """Three consumers on another host; after the test they hold nothing and keep no copy."""
    yield _neighbours
    await clean(*_neighbours)
    for each in _neighbours:
        await eventually(partial(keeps_nothing, each), what="no copy is left")


def keep(node: Any, nbytes: int) -> torch.Tensor:
    node.kept["t"] = arange(nbytes)
    tensor: torch.Tensor = node.kept["t"]
    return tensor


def keep_many(node: Any, count: int) -> dict[str, torch.Tensor]:
    node.kept["t"] = {f"layer{number}": arange(64 * 1024) + number for number in range(count)}
    tree: dict[str, torch.Tensor] = node.kept["t"]
    return tree


async def received(node: Any, tree: Any) -> tuple[Any, dict[str, int]]:
    before = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
    got = await aiordt.get(tree)
    after = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
    return got, {name: nbytes - before.get(name, 0) for name, nbytes in after.items()}


def copies(node: Any) -> int:
    return current().relay.nbytes


async def is_free(node: Any) -> bool:
    await aiordt.wait_tensor_freed(node.kept["t"], 10)
    return True


def total(moved: list[dict[str, int]], name: str) -> int:
    return sum(each.get(name, 0) for each in moved)


async def test_bytes_cross_once(nodes: Any, neighbours: Any) -> None:
    ref = await nodes[0].make.remote(keep, _NBYTES)
    found = await asyncio.gather(*(each.run.remote(received, ref) for each in neighbours))
    assert all(torch.equal(got, arange(_NBYTES)) for got, _ in found)
    moved = [each for _, each in found]
    assert (total(moved, "tcp"), total(moved, "shm")) == (_NBYTES, 2 * _NBYTES)


async def test_a_batch_of_small_tensors_crosses_once(nodes: Any, neighbours: Any) -> None:
    tree = await nodes[0].make.remote(keep_many, 40)
    found = await asyncio.gather(*(each.run.remote(received, tree) for each in neighbours))
    for got, _ in found:
        assert all(torch.equal(got[f"layer{n}"], arange(64 * 1024) + n) for n in range(40))
    assert total([each for _, each in found], "tcp") == 40 * 64 * 1024


async def test_a_copy_is_private(nodes: Any, neighbours: Any) -> None:
    ref = await nodes[0].make.remote(keep, _NBYTES)
    for each in neighbours[:2]:
        assert await each.run.remote(scribble, ref)
    got, _ = await neighbours[1].run.remote(received, ref)
    assert torch.equal(got, arange(_NBYTES))


async def scribble(node: Any, ref: aiordt.TensorRef) -> bool:
    (await ref).zero_()
    return True


async def test_copies_hold_no_tensor(nodes: Any, neighbours: Any) -> None:  # LSE-1
    consumer = neighbours[0]
    ref = await nodes[0].make.remote(keep, _NBYTES)
    await consumer.run.remote(received, ref)
    assert await consumer.run.remote(copies) == _NBYTES
    ref.release()
    assert await nodes[0].run.remote(is_free)
    await eventually(lambda: keeps_nothing(consumer), what="the copy is gone with the export")


async def keeps_nothing(consumer: Any) -> bool:
    return bool(await consumer.run.remote(copies) == 0)


async def test_room_for_copies_is_bounded(nodes: Any, spawn: Any) -> None:
    consumer = spawn(Node, {**_ELSEWHERE, "relay_nbytes": 5 * MIB})
    refs = [await nodes[0].make.remote(keep, size * MIB) for size in (3, 4, 2, 6)]
    for ref, size in zip(refs, (3, 4, 2, 6), strict=True):
        got, moved = await consumer.run.remote(received, ref)
        assert torch.equal(got, arange(size * MIB))
        assert moved["tcp"] == size * MIB
    assert await consumer.run.remote(copies) == 2 * MIB, "4 went for 2, and 6 never fits"


async def test_without_room_every_pull_goes_to_the_owner(
    nodes: Any, neighbours: Any, spawn: Any
) -> None:
    alone = spawn(Node, {**_ELSEWHERE, "relay_nbytes": 0})
    first, second = [await nodes[0].make.remote(keep, _NBYTES) for _ in range(2)]
    for consumer, ref in zip(
        (alone, neighbours[0], neighbours[1], alone), (first, first, second, second), strict=True
    ):
        got, moved = await consumer.run.remote(received, ref)
        assert torch.equal(got, arange(_NBYTES))
        assert moved["tcp"] == _NBYTES, "neither offered to others nor asked of them"


async def stand_in(sock: socket.socket, answer: bytes) -> None:
    while True:
        other, _ = await asyncio.get_running_loop().sock_accept(sock)
        with other:
            other.send(answer)


async def test_a_stranger_in_the_place_of_a_neighbour(nodes: Any, neighbours: Any) -> None:
    """Any process of the host may take the name: it is neither believed nor waited for."""
    consumer = neighbours[0]
    answers = [b"", b"garbage", b"\x96" * 40, _copies.pack_address(current().address)[:-1] + b"\0"]
    for answer in answers:
        ref = await nodes[0].make.remote(keep, _NBYTES)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(_copies.meeting_name(ref.header.key))
            sock.listen()
            sock.settimeout(0)

            standing = asyncio.ensure_future(stand_in(sock, answer))
            got, moved = await asyncio.wait_for(consumer.run.remote(received, ref), 30)
            standing.cancel()
        assert torch.equal(got, arange(_NBYTES))
        assert moved["tcp"] == _NBYTES


async def cancel_first_of_two(node: Any, ref: aiordt.TensorRef) -> bool:
    """Two awaits of one process share the transfer; the end of one is not that of the other."""
    loop = asyncio.get_running_loop()
    reached = asyncio.Event()
    with at_phase("relay.fetching", lambda: loop.call_soon_threadsafe(reached.set)):
        first = asyncio.ensure_future(aiordt.get(ref))
        await reached.wait()
        second = asyncio.ensure_future(aiordt.get([ref]))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
    (got,) = await second
    return torch.equal(got, arange(_NBYTES * 4)) and first.cancelled()


async def cancel_alone(node: Any, ref: aiordt.TensorRef) -> int:
    loop = asyncio.get_running_loop()
    reached = asyncio.Event()
    with at_phase("relay.fetching", lambda: loop.call_soon_threadsafe(reached.set)):
        pull = asyncio.ensure_future(aiordt.get(ref))
        await reached.wait()
        pull.cancel()
        await asyncio.wait({pull})
    assert pull.cancelled() or torch.equal(pull.result(), arange(_NBYTES * 4))
    return aiordt.stats().in_flight


async def test_cancellation(nodes: Any, neighbours: Any) -> None:  # CAN-1, ISO-1
    consumer = neighbours[0]
    ref = await nodes[0].make.remote(keep, _NBYTES * 4)
    assert await consumer.run.remote(cancel_alone, ref) == 0
    other = await nodes[0].make.remote(keep, _NBYTES * 4)
    assert await consumer.run.remote(cancel_first_of_two, other)
    got, _ = await consumer.run.remote(received, ref)
    assert torch.equal(got, arange(_NBYTES * 4))


async def join_the_cancelled(node: Any, ref: aiordt.TensorRef) -> bool:
    """Ask for what is on its way at the moment when its only reader has given it up."""
    runtime = current()
    relay, header = runtime.relay, ref.header
    landing = land(ref, runtime.pool)

    def fetch() -> Any:
        return relay._fetch(header.address, header.key, [landing.part])

    async def on_io_loop() -> bool:
        reached = asyncio.Event()
        assert await relay._first(header.key) is None
        with at_phase("relay.fetching", reached.set):
            first = asyncio.ensure_future(fetch())
            await reached.wait()
        first.cancel()
        await asyncio.sleep(0)
        entries = await fetch()
        arrived = torch.equal(entries[0].tensor.view(torch.float32), arange(_NBYTES * 4))
        relay._unpin(entries)
        return arrived and first.cancelled()

    return await runtime.io.run(on_io_loop())


async def test_who_comes_when_a_transfer_is_given_up(nodes: Any, neighbours: Any) -> None:  # ISO-1
    ref = await nodes[0].make.remote(keep, _NBYTES * 4)
    assert await neighbours[0].run.remote(join_the_cancelled, ref)


# --- several hosts -------------------------------------------------------------------------


def move_to_host(node: Any, name: str) -> None:
    """From now on this process has no neighbours, as if its network namespace were its own."""
    here = _copies.meeting_name
    vars(_relay)["meeting_name"] = lambda key: here(key) + name.encode()


def plan_of(node: Any, key: bytes) -> dict[int, int | None]:
    """Who gets an export from whom, by pid; ``None``: from this node."""
    fanout = current().relay.fanout
    plan = fanout.plan(key)
    assert plan is not None
    pids = {member: address.pid for member, address in fanout._addresses.items()}
    return {
        pids[member]: None if place.parent is None else pids[place.parent]
        for member, place in plan.places.items()
    }


@pytest.fixture
async def hosts(_neighbours: list[Any], spawn: Any) -> list[Any]:
    """Four processes on four hosts. They stay there: their tests come last."""
    made = [*_neighbours, spawn(Node, _ELSEWHERE)]
    await asyncio.gather(*(node.run.remote(move_to_host, f"{n}") for n, node in enumerate(made)))
    return made


async def test_hosts_serve_hosts(nodes: Any, hosts: Any) -> None:
    """FAN-1, FAN-2; and what is left of them serves on when one of them dies."""
    tree = await nodes[0].make.remote(keep_many, 400)  # 25 MiB: two steps
    expected = {f"layer{n}": arange(64 * 1024) + n for n in range(400)}
    found = await asyncio.gather(*(each.run.remote(received, tree) for each in hosts))
    for got, moved in found:
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        assert moved["tcp"] == 25 * MIB
    key = tree["layer0"].header.key
    plan = await nodes[0].run.remote(plan_of, key)
    sources = list(plan.values())
    assert (len(sources), sources.count(None)) == (4, 2)
    relayed = [pid for pid, source in plan.items() if source is not None]
    assert {plan[pid] for pid in relayed} <= set(plan) - set(relayed)

    # The first of them dies while it serves another, which goes on by way of somebody else.
    tree = await nodes[0].make.remote(keep_many, 400)
    key = tree["layer0"].header.key
    first, late = hosts[3], hosts[0]
    others = hosts[1:3]
    await first.run.remote(received, tree)
    await asyncio.gather(*(each.run.remote(received, tree) for each in others[:1]))
    reading = late.run.remote(received_beside_a_death, tree, await first.pid.remote())
    got, moved = await asyncio.wait_for(reading, 30)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    plan = await nodes[0].run.remote(plan_of, key)
    assert plan[await late.pid.remote()] == await others[0].pid.remote()


async def received_beside_a_death(node: Any, tree: Any, victim: int) -> tuple[Any, dict[str, int]]:
    with at_phase("relay.far", lambda: os.kill(victim, signal.SIGKILL)) as phases:
        got = await received(node, tree)
    assert phases.reached.is_set(), "it read from the one that died"
    return got
