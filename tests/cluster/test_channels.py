"""Channels between actors, tasks and the driver: order, credit, holding, and how they end."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
import torch

import aiordt
from aiordt import _runtime
from aiordt.channels._service import channels_of
from tests.support import MIB, eventually

if TYPE_CHECKING:
    from tests.conftest import Spawn

KIB = 1 << 10


@dataclass
class Batch:
    """Something of the user's own."""

    tokens: torch.Tensor
    mask: np.ndarray[Any, Any]
    note: str


def item(number: int) -> Any:
    """Items whose structure, shapes, dtypes and strides change from one to the next."""
    base = torch.arange(number * 37 % 500 + 1, dtype=torch.float32) + number
    kinds: list[Any] = [
        base,
        {"x": base, "step": number},
        [base.to(torch.bfloat16), (base.long(), None, "text")],
        {"rows": base.reshape(1, -1).expand(3, -1), "t": base.repeat(4, 1).t()},
        {"empty": torch.empty(0, 3), "scalar": torch.tensor(number), "flags": base > number},
        Batch(base, base.numpy(), f"note {number}"),
        {"array": base.double().numpy(), "same": [base, base]},
        number,
    ]
    return kinds[number % len(kinds)]


def flat(value: Any) -> list[Any]:
    """What a tree consists of, comparable."""
    if isinstance(value, torch.Tensor):
        return [
            str(value.dtype),
            tuple(value.shape),
            value.clone().stride(),
            value.flatten().tolist(),
        ]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, dict):
        return [part for key, each in value.items() for part in [key, *flat(each)]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(part for each in value for part in flat(each))]
    if isinstance(value, Batch):
        return ["batch", *flat(value.tokens), *flat(value.mask), value.note]
    return [value]


async def send_items(_: Any, tx: aiordt.Sender, count: int) -> None:
    async with tx:
        for number in range(count):
            await tx.send(item(number))


async def receive_items(_: Any, rx: aiordt.Receiver) -> list[Any]:
    return [flat(each) async for each in rx]


async def send_numbers(_: Any, tx: aiordt.Sender, count: int, nbytes: int) -> int:
    """Send tensors full of their number; how many times sending did not wait."""
    done = 0
    tensor = torch.zeros(nbytes, dtype=torch.uint8)
    for number in range(count):
        tensor.numpy().fill(number % 251)  # by numpy, which does not wake other threads for it
        await tx.send(tensor)
        done += 1
    await tx.aclose()
    return done


async def receive_numbers(_: Any, rx: aiordt.Receiver) -> tuple[int, list[int]]:
    """How many came, and those that were not what they should be."""
    wrong, number = [], 0
    async for tensor in rx:
        if not (tensor.numpy() == number % 251).all():
            wrong.append(number)
        number += 1
    return number, wrong


def expected(count: int) -> list[Any]:
    return [flat(item(number)) for number in range(count)]


async def test_items_of_all_kinds_arrive_in_order(nodes: list[Any]) -> None:  # SND-2
    tx, rx = await aiordt.channel(nodes[0], nodes[1])
    sent = nodes[0].run.remote(send_items, tx, 64)
    assert await nodes[1].run.remote(receive_items, rx) == expected(64)
    await sent


async def test_one_sender_and_many_receivers_one_of_which_leaves(nodes: list[Any]) -> None:  # SND-3
    async def take_two(_: Any, rx: aiordt.Receiver) -> list[Any]:
        found = [flat(await rx.recv()), flat(await rx.recv())]
        await rx.aclose()
        with pytest.raises(aiordt.ClosedError):
            await rx.recv()
        return found

    tx, rxs = await aiordt.channel(nodes[0], [nodes[1], nodes[2], None])
    sent = nodes[0].run.remote(send_items, tx, 64)
    first = nodes[1].run.remote(receive_items, rxs[0])
    second = nodes[2].run.remote(take_two, rxs[1])
    assert await receive_items(None, rxs[2]) == expected(64), "this driver, as it came"
    assert await first == expected(64)
    assert await second == expected(2)
    await sent


async def test_driver_tasks_and_handles_that_travel(nodes: list[Any]) -> None:  # CHN-2
    @ray.remote(num_cpus=0)
    def task(tx: aiordt.Sender, rx: aiordt.Receiver) -> int:
        async def double() -> int:
            count = 0
            async with tx:
                async for tensor in rx:
                    await tx.send(tensor * 2)
                    count += 1
            return count

        return asyncio.run(double())

    to_task, in_task = await aiordt.channel(None, "anyone", name="there")
    from_task, here = await aiordt.channel("anyone", None, name="back")
    assert "there" in repr(to_task)
    count = task.remote(from_task, pickle.loads(pickle.dumps(in_task)))
    for number in range(5):
        await to_task.send(torch.full((1000,), number))
        assert (await here.recv())[0] == 2 * number
    await to_task.aclose()
    with pytest.raises(aiordt.ClosedError, match=r"its sender.*closed it"):
        await here.recv()
    assert await count == 5
    with pytest.raises(aiordt.ClosedError):
        await to_task.send(1)
    await to_task.aclose()
    await here.aclose()


async def test_both_ends_in_one_process(cluster: None) -> None:
    tx, rx = await aiordt.channel(None, None)
    sending = asyncio.ensure_future(send_items(None, tx, 32))
    assert await receive_items(None, rx) == expected(32)
    await sending


async def test_sender_waits_for_credit_and_only_for_that(nodes: list[Any]) -> None:  # SND-1
    tx, rx = await aiordt.channel(None, nodes[1], capacity=MIB)
    tensor = torch.zeros(256 * KIB - 1024, dtype=torch.uint8)
    for _ in range(4):
        await tx.send(tensor)
    fifth = asyncio.ensure_future(tx.send(tensor))
    done, _ = await asyncio.wait({fifth}, timeout=0.2)
    assert not done, "four of them are all the credit"
    fifth.cancel()
    await asyncio.wait({fifth})
    assert fifth.cancelled()

    async def take(_: Any, rx: aiordt.Receiver, count: int) -> list[float]:
        return [float((await rx.recv())[0]) for _ in range(count)]

    assert await nodes[1].run.remote(take, rx, 2) == [0, 0], "the second gives the first back"
    await tx.send(tensor + 5)
    assert await nodes[1].run.remote(take, rx, 3) == [0, 0, 5], "what was cancelled never came"
    large = asyncio.ensure_future(tx.send(torch.full((3 * MIB,), 7, dtype=torch.uint8)))
    assert await nodes[1].run.remote(take, rx, 1) == [7], "more than all credit goes alone"
    await large
    await tx.aclose()


async def test_a_cancelled_send_is_received_by_all_or_none(nodes: list[Any]) -> None:  # SND-1
    async def collect(_: Any, rx: aiordt.Receiver) -> list[int]:
        return [int(tensor[-1]) async for tensor in rx]

    tx, rxs = await aiordt.channel(None, nodes[:2], capacity=3 * MIB)
    found = [node.run.remote(collect, rx) for node, rx in zip(nodes, rxs, strict=False)]
    chance = random.Random(7)  # noqa: S311  (no secret)
    sent = []
    for number in range(300):
        numel = chance.choice([10, 100_000, 300_000])  # inline, at once, on worker threads
        task = asyncio.ensure_future(tx.send(torch.full((numel,), number)))
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            sent.append(number)
    await tx.aclose()
    assert 30 < len(sent) < 300, "some were, and some were not"
    assert await asyncio.gather(*found) == [sent, sent]


async def test_memory_is_not_written_to_while_it_is_looked_at(nodes: list[Any]) -> None:  # CRD-2
    """Room for four items, 300 of which pass; each is compared as a whole."""
    tx, rx = await aiordt.channel(nodes[0], nodes[1], capacity=MIB)
    sent = nodes[0].run.remote(send_numbers, tx, 300, 200 * KIB)
    assert await nodes[1].run.remote(receive_numbers, rx) == (300, [])
    assert await sent == 300


async def test_held_items_stay_and_give_their_credit_back_when_they_go(
    nodes: list[Any],
) -> None:  # RCV-3
    async def hold_some(_: Any, rx: aiordt.Receiver) -> tuple[list[float], float, float]:
        kept = []
        with pytest.raises(aiordt.UsageError):
            rx.hold()
        for _ in range(3):
            kept.append(await rx.recv())
            rx.hold()
        fourth = await rx.recv()
        passed = float(fourth[0])
        seen = [float(each.float().mean()) for each in kept]  # as they were
        kept.clear()
        last = 0.0
        for _ in range(20):
            last = float((await rx.recv())[0])
        return seen, passed, last

    tx, rx = await aiordt.channel(nodes[0], nodes[1], capacity=MIB)
    sent = nodes[0].run.remote(send_numbers, tx, 24, 200 * KIB)
    assert await nodes[1].run.remote(hold_some, rx) == ([0, 1, 2], 3, 23)
    assert await sent == 24


async def test_copies_are_private(nodes: list[Any]) -> None:
    async def collect(_: Any, rx: aiordt.Receiver) -> list[float]:
        found = [tensor async for tensor in rx]
        for tensor in found:
            tensor.add_(1)
        return [float(tensor.float().mean()) for tensor in found]

    tx, rx = await aiordt.channel(nodes[0], nodes[1], capacity=MIB, copies=True)
    sent = nodes[0].run.remote(send_numbers, tx, 20, 200 * KIB)
    assert await nodes[1].run.remote(collect, rx) == [number + 1 for number in range(20)]
    assert await sent == 20


async def test_requires_grad_parameters_and_large_rests_arrive(nodes: list[Any]) -> None:  # LIN-1
    async def look(_: Any, rx: aiordt.Receiver) -> Any:
        first, second, third = await rx.recv(), None, None
        first = (first.requires_grad, first.is_leaf)
        second = type(await rx.recv()).__name__
        third = await rx.recv()
        return first, second, len(third["blob"]), float(third["x"].sum())

    tx, rx = await aiordt.channel(None, nodes[0])
    found = nodes[0].run.remote(look, rx)
    await tx.send(torch.ones(100_000, requires_grad=True) * 2)
    await tx.send(torch.nn.Parameter(torch.ones(100)))
    await tx.send({"blob": bytes(3 * MIB), "x": torch.ones(5 * MIB)})
    assert await found == ((True, True), "Parameter", 3 * MIB, 5.0 * MIB)
    await tx.aclose()


async def test_what_cannot_be_sent_is_refused_and_the_channel_goes_on(nodes: list[Any]) -> None:
    tx, rx = await aiordt.channel(None, nodes[0])
    ref = await aiordt.put(torch.ones(MIB))
    for wrong in (ref, {"a": [ref]}, ray.put(1), nodes[0]):
        with pytest.raises(aiordt.UsageError, match="cannot go through a channel"):
            await tx.send(wrong)
    with pytest.raises(aiordt.UsageError, match="layout"):
        await tx.send({"x": torch.ones(3).to_sparse()})
    with pytest.raises(aiordt.UsageError, match="cannot go through a channel"):
        await tx.send(iter([1]).__next__ for _ in range(2))
    await tx.send(5)
    await tx.aclose()
    assert await nodes[0].run.remote(receive_items, rx) == [[5]]
    with pytest.raises(aiordt.UsageError, match="belongs to"):
        await rx.recv()
    with pytest.raises(aiordt.UsageError):
        await aiordt.channel(nodes[0], "actor")
    with pytest.raises(aiordt.UsageError):
        await aiordt.channel(nodes[0], [])
    with pytest.raises(aiordt.UsageError):
        await aiordt.channel(nodes[0], nodes[1], capacity=0)


async def test_a_failed_sender_says_so(nodes: list[Any]) -> None:
    async def fail(_: Any, tx: aiordt.Sender) -> None:
        async with tx:
            await tx.send(1)
            raise ValueError("the data ran out")

    tx, rx = await aiordt.channel(nodes[0], None)
    failed = nodes[0].run.remote(fail, tx)
    assert await rx.recv() == 1
    with pytest.raises(aiordt.ClosedError, match="ValueError: the data ran out"):
        await anext(rx.__aiter__())
    with pytest.raises(ValueError, match="ran out"):
        await failed
    await rx.aclose()


async def test_a_cancelled_receive_loses_nothing(cluster: None, nodes: list[Any]) -> None:  # RCV-1
    tx, rx = await aiordt.channel(nodes[0], None)
    waiting = asyncio.ensure_future(rx.recv())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    sent = nodes[0].run.remote(send_numbers, tx, 200, 1000)
    number = 0
    while number < 200:
        task = asyncio.ensure_future(rx.recv())
        for _ in range(number % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            assert int(task.result()[0]) == number
            number += 1
        else:
            assert int((await rx.recv())[0]) == number
            number += 1
    await sent
    await rx.aclose()


async def test_closing_wakes_the_other_end_and_ones_own(nodes: list[Any]) -> None:  # END-2
    tx, rx = await aiordt.channel(None, None, capacity=1000)
    receiving = asyncio.ensure_future(rx.recv())
    await asyncio.sleep(0.05)
    await rx.aclose()
    with pytest.raises(aiordt.ClosedError, match="closed here"):
        await receiving
    with pytest.raises(aiordt.ClosedError, match="nobody receives"):
        await tx.send(1)
    tx, rx = await aiordt.channel(None, None, capacity=1500)
    receiving = asyncio.ensure_future(rx.recv())
    await tx.send(torch.ones(100))
    await receiving
    await tx.send(torch.ones(100))
    sending = asyncio.ensure_future(tx.send(torch.ones(100)))
    await asyncio.sleep(0.05)
    assert not sending.done()
    await tx.aclose()
    with pytest.raises(aiordt.ClosedError, match="closed here"):
        await sending
    await rx.aclose()


async def test_a_killed_sender_ends_its_receivers(
    spawn: Spawn, nodes: list[Any]
) -> None:  # RCV-2, CHN-1
    async def send_and_wait(_: Any, tx: aiordt.Sender) -> None:
        await tx.send(torch.ones(MIB))
        await asyncio.sleep(1000)

    async def take(_: Any, rx: aiordt.Receiver) -> float:
        return float((await rx.recv()).mean())

    async def receive(_: Any, rx: aiordt.Receiver) -> str:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await rx.recv()
        except aiordt.OwnerDiedError as exc:
            assert loop.time() - began < 5
            return str(exc)
        return ""

    async def make(_: Any, receiver: Any) -> Any:
        return await aiordt.channel("anyone", receiver)

    async def wait_for_a_sender(_: Any, rx: aiordt.Receiver) -> str:
        try:
            await rx.recv()
        except aiordt.OwnerDiedError as exc:
            return str(exc)
        return ""

    victim = spawn()
    pid = await victim.pid.remote()
    tx, rxs = await aiordt.channel(victim, [nodes[1], None])
    gone = victim.run.remote(send_and_wait, tx)
    assert await nodes[1].run.remote(take, rxs[0]) == 1
    said = nodes[1].run.remote(receive, rxs[0])
    _, never = await victim.run.remote(make, nodes[2])
    waits = nodes[2].run.remote(wait_for_a_sender, never)
    await rxs[1].recv()
    receiving = asyncio.ensure_future(rxs[1].recv())
    await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        with pytest.raises(aiordt.OwnerDiedError, match=r"its sender.*died"):
            await receiving
        assert "died" in await said
        assert "died" in await waits, "the process that made it is gone, and no sender came"
    with pytest.raises(ray.exceptions.RayActorError):
        await gone
    await rxs[1].aclose()


async def test_a_killed_receiver_ends_the_channel(
    spawn: Spawn, nodes: list[Any]
) -> None:  # SND-3, CHN-1
    async def receive_for_ever(_: Any, rx: aiordt.Receiver) -> None:
        await rx.recv()
        await asyncio.sleep(1000)

    victim = spawn()
    pid = await victim.pid.remote()
    tx, rxs = await aiordt.channel(None, [victim, nodes[1]], capacity=MIB)
    other = nodes[1].run.remote(receive_numbers, rxs[1])
    gone = victim.run.remote(receive_for_ever, rxs[0])
    tensor = torch.zeros(400 * KIB, dtype=torch.uint8)
    await tx.send(tensor)
    await tx.send(tensor + 1)
    sending = asyncio.ensure_future(tx.send(tensor + 2))
    await asyncio.sleep(0.05)
    assert not sending.done(), "no credit: one receiver does not go on"
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        with pytest.raises(aiordt.PeerLostError, match=r"its receiver.*died"):
            await sending
        with pytest.raises(aiordt.ClosedError, match=r"its receiver.*died"):
            await other
    with pytest.raises(aiordt.PeerLostError):
        await tx.send(1)
    with pytest.raises(ray.exceptions.RayActorError):
        await gone
    with pytest.raises(aiordt.AiordtError):
        await aiordt.channel(nodes[0], victim)


async def test_nothing_is_left_of_closed_channels(nodes: list[Any]) -> None:  # LIN-2
    service = channels_of(_runtime.current())
    files = len(os.listdir("/proc/self/fd"))
    used = aiordt.stats().arena_used_bytes
    for _ in range(20):
        tx, rx = await aiordt.channel(None, None, capacity=MIB)
        await tx.send(torch.ones(1000))
        await rx.recv()
        await tx.aclose()
        with pytest.raises(aiordt.ClosedError):
            await rx.recv()
        await rx.aclose()

    def gone() -> bool:
        here = len(os.listdir("/proc/self/fd"))
        return here <= files + 2 and aiordt.stats().arena_used_bytes <= used

    await eventually(gone, what="sockets and buffers are gone")
    assert not service.meetings


def test_an_end_may_change_loops_but_not_have_two(cluster: None) -> None:  # END-1
    async def make() -> tuple[aiordt.Sender, aiordt.Receiver]:
        tx, rx = await aiordt.channel(None, None)
        await tx.send(1)
        assert await rx.recv() == 1
        return tx, rx

    async def go_on(tx: aiordt.Sender, rx: aiordt.Receiver) -> int:
        await tx.send(2)
        found: int = await rx.recv()
        await tx.aclose()
        await rx.aclose()
        return found

    async def elsewhere(rx: aiordt.Receiver) -> None:
        waiting = asyncio.ensure_future(rx.recv())
        await asyncio.sleep(0.05)
        with pytest.raises(aiordt.UsageError, match="in use on another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(rx.recv()))
        waiting.cancel()
        await asyncio.wait({waiting})

    tx, rx = asyncio.run(make())
    asyncio.run(elsewhere(rx))
    assert asyncio.run(go_on(tx, rx)) == 2
