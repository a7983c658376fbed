"""Errors, deaths and cancellation (scenarios: errors, death, cancel)."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import signal
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch

import aiordt
from aiordt._config import PLANNED
from aiordt.testing import at_phase, cancel_from_anywhere
from tests.cluster.test_every_transport import BY
from tests.support import MIB, Node, arange, eventually, kill, on_phase

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSPORTS = ["make_cma", "make_tcp"]


async def pull_timed(_: Any, refs: list[Any]) -> list[tuple[str, float]]:
    """Await every ref; how each ended, and after how long."""
    started = time.monotonic()

    async def one(ref: Any) -> tuple[str, float]:
        try:
            await ref
        except aiordt.AiordtError as exc:
            return f"{type(exc).__name__}: {exc}", time.monotonic() - started
        return "ok", time.monotonic() - started

    return list(await asyncio.gather(*map(one, refs)))


async def test_producer_raises_and_both_stay_usable(nodes: Any) -> None:
    a, b, _ = nodes

    def fail(_: Any) -> None:
        raise KeyError("told")

    with pytest.raises(KeyError, match="told"):
        await aiordt.get(a.make.remote(fail))
    with pytest.raises(KeyError, match="told"):
        await b.pull.remote({"nested": [a.make.remote(fail)]})
    got = await b.pull.remote(a.make.remote(lambda _: arange(MIB)))
    assert torch.equal(got, arange(MIB))


async def test_retried_producer_leaves_one_entry(nodes: Any, spawn: Any) -> None:
    class Flaky(aiordt.AsyncActor):
        def __init__(self) -> None:
            self.calls = 0

        @ray.method(max_task_retries=3, retry_exceptions=True)
        @aiordt.method
        async def make(self) -> Any:
            self.calls += 1
            if self.calls < 3:
                raise ValueError("again")
            return arange(MIB)

        async def exports(self) -> int:
            return aiordt.stats().exports

    actor = spawn(ray.remote(Flaky))
    ref = await actor.make.remote()
    assert torch.equal(await ref, arange(MIB))
    assert await actor.exports.remote() == 1


async def test_forced_transports(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make_tcp.remote(lambda _: [arange(MIB), torch.ones(2)])
    assert refs[0].transport == "tcp"
    explained = await aiordt.explain(refs[0])
    assert explained.chosen == "tcp"
    assert explained.reasons["cma"] == "the exporter demanded tcp"
    assert (await aiordt.explain(refs[1])).chosen == "tcp"
    assert torch.equal((await b.pull.remote(refs))[1], torch.ones(2))
    ref = await a.make.remote(lambda _: arange(MIB))
    assert (await aiordt.explain(ref)).chosen == "cma"
    assert "tcp" in str(await aiordt.explain(ref))
    assert torch.equal(await aiordt.get(ref, transport="tcp"), arange(MIB))
    with pytest.raises(ValueError, match="no transport 'smoke'"):
        await aiordt.get(ref, transport="smoke")
    with pytest.raises(TypeError):
        await aiordt.put(torch.ones(2), transport=7)  # type: ignore[arg-type]


async def test_a_transport_that_is_switched_off_is_unavailable(nodes: Any, spawn: Any) -> None:
    b = spawn(Node, {"transports": ["tcp"]})
    ref = await nodes[0].make_cma.remote(lambda _: arange(MIB))

    async def attempt(_: Any, refs: list[Any]) -> tuple[str, Any, str]:
        with pytest.raises(aiordt.UnavailableError) as caught:
            await refs[0]
        return caught.value.reason, await aiordt.explain(refs[0]), caught.value.transport

    reason, explained, transport = await b.run.remote(attempt, [ref])
    assert "not among this process's transports: tcp" in reason
    assert transport == "cma"
    assert explained.chosen is None
    with pytest.raises(aiordt.UnavailableError, match="cma"):
        await b.make_cma.remote(lambda _: arange(MIB))
    plain = await nodes[0].make.remote(lambda _: arange(MIB))
    assert torch.equal(await b.pull.remote(plain), arange(MIB))


async def test_a_bad_setting_is_told_by_the_first_use(spawn: Any) -> None:
    actor = spawn(options={"runtime_env": {"env_vars": {"AIORDT_TYPO": "1"}}})
    for _ in range(2):
        with pytest.raises(aiordt.UsageError, match="AIORDT_TYPO"):
            await actor.make.remote(lambda _: arange(MIB))


async def test_preference_is_as_configured(spawn: Any, nodes: Any) -> None:
    b = spawn(options={"runtime_env": {"env_vars": {"AIORDT_TRANSPORTS": "tcp,cma"}}})
    ref = await nodes[0].make.remote(lambda _: arange(MIB))

    async def explained(_: Any, refs: list[Any]) -> tuple[str | None, list[str]]:
        await refs[0]
        return (await aiordt.explain(refs[0])).chosen, list(aiordt.stats().by_transport)

    assert await b.run.remote(explained, [ref]) == ("tcp", ["tcp"])


async def test_resized_storage_is_an_error_and_never_garbage(nodes: Any) -> None:
    a, b, _ = nodes

    def make(node: Any) -> Any:
        node.kept["t"] = arange(4 * MIB)
        return node.kept["t"]

    ref = await a.make.remote(make)
    await a.run.remote(lambda node: [node.kept["t"].untyped_storage().resize_(0), None][1])

    async def by_tcp(_: Any, refs: list[Any]) -> str:
        with pytest.raises(aiordt.TensorFreedError) as caught:
            await aiordt.get(refs[0], transport="tcp")
        return str(caught.value)

    assert "resized" in await b.run.remote(by_tcp, [ref])
    with pytest.raises(aiordt.TensorFreedError, match="resized"):
        await a.pull.remote([ref])


async def test_owner_killed_before_the_pull(nodes: Any, spawn: Any) -> None:
    a, b = spawn(), nodes[1]
    refs = []
    for transport in TRANSPORTS:
        refs += await getattr(a, transport).remote(lambda _: [arange(MIB), arange(300_000)])
    await kill(await a.pid.remote())
    ends = await b.run.remote(pull_timed, refs)
    for text, seconds in ends:
        assert text.startswith("OwnerDiedError"), text
        assert seconds < 2
    assert "NodeActor" in ends[0][0]
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    assert torch.equal(await b.pull.remote(ref), arange(MIB))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("known", ["", "known peer"], ids=["first contact", "known peer"])
async def test_owner_killed_during_the_pull(
    nodes: Any, spawn: Any, transport: str, known: str
) -> None:
    a, b = spawn(), nodes[1]
    pid = await a.pid.remote()
    refs = await getattr(a, transport).remote(
        lambda _: [torch.ones(64 * MIB // 4) for _ in range(3)] + [arange(MIB)]
    )
    if known:
        await b.pull.remote(refs[3:])
    point = "cma.chunk" if transport == "make_cma" else "tcp.receiving"

    async def killed_inside(node: Any, refs: list[Any], pid: int) -> Any:
        def strike(name: str) -> None:
            if name == point:
                on_phase(None)
                os.kill(pid, signal.SIGKILL)

        on_phase(strike)
        try:
            return await pull_timed(node, refs)
        finally:
            on_phase(None)

    ends = await b.run.remote(killed_inside, refs, pid)
    assert all(seconds < 2 for _, seconds in ends), ends
    assert any(text.startswith("OwnerDiedError") for text, _ in ends), ends
    assert all(text.startswith("OwnerDiedError") or text == "ok" for text, _ in ends), ends
    again = await b.run.remote(pull_timed, refs)
    assert all(text.startswith("OwnerDiedError") for text, _ in again)
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    assert torch.equal(await b.pull.remote(ref), arange(MIB))


async def test_owner_dies_before_creating(nodes: Any, spawn: Any) -> None:
    a, b = spawn(), nodes[1]
    pid = await a.pid.remote()

    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    out = a.make.remote(never)
    waiting = b.pull.remote([out])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        await waiting
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    assert torch.equal(await b.pull.remote(ref), arange(MIB))


async def test_consumer_killed_during_a_tcp_pull_frees_the_producer(nodes: Any, spawn: Any) -> None:
    a, b = nodes[0], spawn()

    def make(node: Any) -> Any:
        node.kept["t"] = torch.ones(64 * MIB // 4)
        return node.kept["t"]

    ref = await a.make_tcp.remote(make)

    async def die_inside(_: Any, refs: list[Any]) -> None:
        def strike(name: str) -> None:
            if name == "tcp.receiving":
                os.kill(os.getpid(), signal.SIGKILL)

        on_phase(strike)
        await refs[0]

    with pytest.raises(ray.exceptions.RayActorError):
        await b.run.remote(die_inside, [ref])
    (got,) = await nodes[1].pull.remote([ref])
    assert float(got.sum()) == 16 * MIB
    del ref

    async def wait(node: Any) -> bool:
        await aiordt.wait_tensor_freed(node.kept["t"], 20)
        return True

    assert await a.run.remote(wait)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_cancelled_at_random_times(nodes: Any, transport: str) -> None:
    """No late write, no leak, other transfers unharmed (OWN-1, CAN-1, ISO-1)."""
    a, b, _ = nodes
    refs = await getattr(a, transport).remote(
        lambda _: [torch.ones(n) for n in (5_000, 300_000, 2_000_000)]
    )

    async def storm(_: Any, refs: list[Any], times: int, seed: int) -> dict[str, int]:
        chance = random.Random(seed)  # noqa: S311
        counts = {"cancelled": 0, "done": 0, "other": 0}
        memory = [(torch.zeros(ref.shape), torch.zeros(ref.shape)) for ref in refs]
        steady = asyncio.ensure_future(survivors(refs))
        for _ in range(times):
            ref, (target, before) = chance.choice(list(zip(refs, memory, strict=True)))
            task = asyncio.ensure_future(aiordt.get(ref, into=target))
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() * 0.004)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                counts["done" if task.exception() is None else "other"] += 1
                continue
            counts["cancelled"] += 1
            before.copy_(target)
            await asyncio.sleep(0.0005)
            assert torch.equal(before, target), "written after the await had ended"
        steady.cancel()
        await asyncio.wait({steady})
        assert steady.cancelled(), steady.exception()
        assert aiordt.stats().in_flight == 0
        return counts

    async def survivors(refs: list[Any]) -> None:
        while True:
            for ref in refs:
                tensor = await ref
                assert bool((tensor == 1).all())
                await asyncio.sleep(0)

    counts = await b.run.remote(storm, refs, 300, 7)
    assert counts["other"] == 0
    assert counts["cancelled"] > 50, counts
    fds = await b.run.remote(lambda _: len(os.listdir("/proc/self/fd")))
    counts = await b.run.remote(storm, refs, 100, 8)

    async def flat() -> bool:
        return bool(await b.run.remote(lambda _: len(os.listdir("/proc/self/fd"))) <= fds + 4)

    await eventually(flat, what="file descriptors")


async def test_admission_is_first_come_first_served(nodes: Any, spawn: Any) -> None:
    b = spawn(Node, {"max_in_flight_bytes": 3 * MIB})
    refs = await nodes[0].make.remote(lambda _: [arange(2 * MIB) for _ in range(8)])

    async def pull_all(_: Any, refs: list[Any]) -> tuple[list[int], int, bool]:
        order: list[int] = []
        peak = 0

        async def one(i: int) -> torch.Tensor:
            nonlocal peak
            tensor: torch.Tensor = await refs[i]
            order.append(i)
            peak = max(peak, aiordt.stats().in_flight)
            return tensor

        await refs[0]  # finding the way to the owner is in no order
        tensors = await asyncio.gather(*map(one, range(len(refs))))
        batch = await aiordt.get(refs)
        return order, peak, all(map(torch.equal, tensors, batch))

    order, peak, equal = await b.run.remote(pull_all, refs)
    assert order == list(range(8))
    assert peak <= 1
    assert equal


async def test_hundreds_of_tcp_pulls_at_once(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make_tcp.remote(lambda _: [torch.full((50_000,), i) for i in range(300)])

    async def pull(_: Any, refs: list[Any]) -> list[int]:
        tensors = await asyncio.gather(*refs)
        return [int(tensor[-1]) for tensor in tensors]

    assert await b.run.remote(pull, refs) == list(range(300))


async def test_release_during_a_pull_does_not_free_what_is_read(nodes: Any) -> None:
    a, b, _ = nodes

    def make(node: Any) -> Any:
        node.kept["t"] = torch.zeros(64 * MIB // 4)
        return node.kept["t"]

    async def write_when_free(node: Any) -> None:
        await aiordt.wait_tensor_freed(node.kept["t"], 30)
        node.kept["t"].fill_(1)

    async def release_inside(_: Any, refs: list[Any], a: Any) -> list[float]:
        ref = refs.pop()
        struck = threading.Event()

        def strike(name: str) -> None:
            if name == "cma.chunk" and not struck.is_set():
                struck.set()
                ref.release()
                time.sleep(0.1)  # time for the owner to hear of a drop, if there were one

        on_phase(strike)
        try:
            tensor = await ref
        finally:
            on_phase(None)
        assert struck.is_set()
        return [float(tensor.min()), float(tensor.max())]

    out = a.make.remote(make)
    (ref,) = [await out]
    del out
    writing = a.run.remote(write_when_free)
    pulled = b.run.remote(release_inside, [ref], a)
    del ref
    assert await pulled == [0.0, 0.0]
    await writing


async def test_a_live_transport_that_is_to_come_says_so(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    for name in PLANNED:
        with pytest.raises(aiordt.UnavailableError, match="does not have it yet") as caught:
            await aiordt.get(ref, transport=name)
        assert caught.value.transport == name
        with pytest.raises(aiordt.UnavailableError, match="does not have it yet"):
            await aiordt.put(torch.ones(3), transport=name)


def test_errors_travel_through_ray(cluster: None) -> None:
    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise aiordt.TransferError("reset", transport="tcp", peer="x", nbytes=5)

    with pytest.raises(aiordt.TransferError) as caught:
        ray.get(fail.remote())
    assert caught.value.nbytes == 5


def large(node: Any) -> torch.Tensor:
    node.kept["t"] = aiordt.empty(24 * MIB, dtype=torch.uint8).fill_(3)
    return node.kept["t"]


async def _awaited(ref: aiordt.TensorRef, transport: str) -> None:
    await aiordt.get(ref, transport=transport)


def broken() -> None:
    raise ConnectionResetError(errno.ECONNRESET, "as if by the network")


@pytest.mark.parametrize("transport", BY)
@pytest.mark.parametrize("how", ["killed", "cancelled"])
async def test_a_pull_that_failed_keeps_no_ref(spawn: Any, how: str, transport: str) -> None:
    await keeps_no_ref(spawn, how, transport)


async def test_a_pull_that_the_network_broke_keeps_no_ref(spawn: Any) -> None:
    await keeps_no_ref(spawn, "broken", "tcp")


async def keeps_no_ref(spawn: Any, how: str, transport: str) -> None:
    """ERR-1: nor anything else of the caller's, until the garbage collector comes by."""
    owner = spawn()
    ref = await owner.make.remote(large)
    pid = ref.owner.pid
    task = asyncio.ensure_future(_awaited(ref, transport))
    gone = weakref.ref(ref)
    acts: dict[str, Callable[[], object]] = {
        "killed": partial(os.kill, pid, 9),
        "cancelled": partial(cancel_from_anywhere, task),
        "broken": broken,
    }
    point = "tcp.receiving" if how == "broken" else "pull.admitted"
    gc.collect()
    gc.disable()
    try:
        with at_phase(point, acts[how]):
            await asyncio.wait({task})
        if how == "cancelled":
            assert task.cancelled()
        else:
            expected = aiordt.OwnerDiedError if how == "killed" else aiordt.TransferError
            assert isinstance(task.exception(), expected)
        del task, acts, ref
        await eventually(lambda: gone() is None, what="the ref is let go", seconds=5)
    finally:
        gc.enable()
