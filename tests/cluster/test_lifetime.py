"""When tensors are freed, and how one waits for it (scenarios: lifetime, write after free)."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from typing import Any

import pytest
import ray
import torch

import aiordt
from aiordt import _claims
from aiordt._runtime import current
from tests.cluster.test_items import cut
from tests.support import MIB, arange, eventually

_NBYTES = 2 * MIB


def keep(node: Any) -> torch.Tensor:
    node.kept["t"] = arange(_NBYTES)
    tensor: torch.Tensor = node.kept["t"]
    return tensor


async def freed(node: Any, seconds: float | None = None) -> bool:
    try:
        await aiordt.wait_tensor_freed(node.kept["t"], seconds)
    except TimeoutError:
        return False
    return True


async def hold(node: Any, refs: list[Any]) -> None:
    node.kept["refs"] = refs


async def drop(node: Any) -> None:
    node.kept.pop("refs")
    gc.collect()


async def test_survives_two_consumers_and_then_the_registry_is_empty(nodes: Any) -> None:
    a, b, c = nodes
    ref = await a.make.remote(keep)
    for node in (b, c):
        (got,) = await node.pull.remote([ref])
        assert torch.equal(got, arange(_NBYTES))
    stats = await a.stats.remote()
    assert (stats.exports, stats.exported_bytes) == (1, _NBYTES)
    del ref
    assert await a.run.remote(freed, 10.0)
    assert (await a.stats.remote()).exports == 0


async def test_ref_deleted_right_after_submit_still_delivers(nodes: Any) -> None:
    a, b, _ = nodes
    out = a.make.remote(keep)
    result = b.pull.remote([out])
    del out
    (got,) = await result
    assert torch.equal(got, arange(_NBYTES))
    del result
    assert await a.run.remote(freed, 10.0)


async def test_ref_deleted_before_the_producer_has_run(nodes: Any) -> None:
    a, _, _ = nodes

    async def slowly(node: Any) -> torch.Tensor:
        await asyncio.sleep(0.3)
        return keep(node)

    out = a.make.remote(slowly)
    del out
    await eventually(lambda: a.run.remote(lambda node: "t" in node.kept))
    assert await a.run.remote(freed, 10.0)


async def test_the_return_object_ref_counts(nodes: Any) -> None:
    a, _, _ = nodes
    out = a.make.remote(keep)
    ref = await out
    del ref
    assert not await a.run.remote(freed, 0.3)
    del out
    assert await a.run.remote(freed, 10.0)


async def test_use_inside_the_owner_then_free(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(keep)

    async def use(node: Any, refs: list[Any]) -> bool:
        return (await refs[0]) is node.kept["t"]

    assert await a.run.remote(use, [ref])
    assert await a.run.remote(use, [ref])
    del ref
    assert await a.run.remote(freed, 10.0)


async def test_held_elsewhere_times_out_and_names_the_export(nodes: Any) -> None:
    a, b, _ = nodes
    await b.run.remote(hold, [await a.make.remote(keep)])

    async def message(node: Any) -> str:
        with pytest.raises(TimeoutError) as caught:
            await aiordt.wait_tensor_freed(node.kept["t"], 0.2)
        return str(caught.value)

    text = await a.run.remote(message)
    assert "NodeActor.make()" in text
    assert "1 tensor" in text
    await b.run.remote(drop)
    assert await a.run.remote(freed, 10.0)


async def test_write_after_freed_gives_snapshot_semantics(nodes: Any) -> None:
    a, b, c = nodes

    async def step(node: Any, steps: int) -> list[Any]:
        refs = []
        for _ in range(steps):
            ref = await aiordt.put(node.kept["t"])
            refs.append(ref)
            del ref
            node.kept["seen"] = await asyncio.gather(
                *[peer.pull.remote(refs[-1:]) for peer in node.kept["peers"]]
            )
            refs.clear()
            await aiordt.wait_tensor_freed(node.kept["t"])
            node.kept["t"].add_(1)
        return [float(got.max() - got.min()) for (got,) in node.kept["seen"]]

    def start(node: Any, peers: list[Any]) -> None:
        node.kept.update(t=torch.zeros(_NBYTES // 4), peers=peers)

    await a.run.remote(start, [b, c])
    assert await a.run.remote(step, 10) == [0.0, 0.0]


async def test_snapshot_hides_later_writes_and_leaves_the_original_free(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make_snapshot.remote(keep)
    assert await a.run.remote(freed, 0.0)
    await a.run.remote(lambda node: float(node.kept["t"].fill_(7)[0]))
    (got,) = await b.pull.remote([ref])
    assert torch.equal(got, arange(_NBYTES))
    strided = await a.make_snapshot.remote(lambda node: node.kept["t"].view(512, 1024).t()[3:])
    assert float((await strided).sum()) == 7.0 * 1021 * 512
    parameter = await a.make_snapshot.remote(lambda _: torch.nn.Parameter(torch.ones(MIB)))
    assert isinstance(await parameter, torch.nn.Parameter)


async def test_a_snapshot_is_never_torn(nodes: Any) -> None:
    a, _, _ = nodes

    async def race(node: Any) -> list[tuple[float, float]]:
        tensor = torch.zeros(96 * MIB // 4)
        seen = []
        for step in range(4):
            snapshot = asyncio.ensure_future(aiordt.put(tensor, snapshot=True))
            await asyncio.sleep(0.001 * step)
            await aiordt.wait_tensor_freed(tensor)
            tensor.add_(1)
            copy = await (await snapshot)
            seen.append((float(copy.min()), float(copy.max())))
        return seen

    for low, high in await a.run.remote(race):
        assert low == high


class Box:
    """An object that is no container."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


async def test_objects_that_hold_refs_beside_tensors(cluster: None) -> None:
    tensor, other = arange(_NBYTES), arange(MIB)
    ref = await aiordt.put(other)
    box = await aiordt.put(Box(a=tensor, r=ref))
    assert isinstance(box.a, aiordt.TensorRef)
    assert box.r is ref
    with pytest.raises(TimeoutError):
        await aiordt.wait_tensor_freed(Box(a=tensor, r=ref), 0.05)
    with pytest.raises(aiordt.UsageError, match="pass the tensors themselves"):
        await aiordt.wait_tensor_freed(Box(a=tensor, lock=threading.Lock()), 0.05)
    got = await aiordt.get(box)
    assert got.a is tensor
    assert got.r is other
    del box, ref
    await aiordt.wait_tensor_freed([tensor, other], 10)


async def test_views_and_overlaps_are_one_storage(nodes: Any) -> None:
    a, _, _ = nodes

    def view(node: Any) -> Any:
        return {"v": keep(node)[1000:200000]}

    refs = await a.make.remote(view)

    async def check(node: Any) -> list[bool]:
        tensor = node.kept["t"]
        same_memory = torch.from_numpy(tensor.numpy())
        partly = torch.frombuffer(memoryview(tensor.numpy())[4096:], dtype=torch.float32)
        other = torch.zeros(_NBYTES // 4)
        outcomes = []
        for wanted in (tensor, tensor[300000:], tensor.view(-1, 2), same_memory, partly, other):
            try:
                await aiordt.wait_tensor_freed(wanted, 0.05)
                outcomes.append(True)
            except TimeoutError:
                outcomes.append(False)
        return outcomes

    assert await a.run.remote(check) == [False] * 5 + [True]
    del refs
    assert await a.run.remote(freed, 10.0)
    assert await a.run.remote(check) == [True] * 6


async def test_large_storages_are_counted_each_and_small_ones_together(nodes: Any) -> None:
    a, _, _ = nodes

    def several(node: Any) -> Any:
        node.kept["big"] = [arange(MIB), arange(MIB)]
        node.kept["small"] = [arange(100_000), arange(100_000)]
        return node.kept["big"] + node.kept["small"]

    refs = await a.make.remote(several)

    async def free_now(node: Any) -> list[bool]:
        outcomes = []
        for tensor in node.kept["big"] + node.kept["small"]:
            try:
                await aiordt.wait_tensor_freed(tensor, 0.0)
                outcomes.append(True)
            except TimeoutError:
                outcomes.append(False)
        return outcomes

    assert await a.run.remote(free_now) == [False] * 4
    refs[0].release()

    async def first_is_free() -> bool:
        return bool(await a.run.remote(free_now) == [True, False, False, False])

    await eventually(first_is_free)
    del refs[2]
    gc.collect()
    assert await a.run.remote(free_now) == [True, False, False, False]
    refs.clear()

    async def all_free() -> bool:
        return bool(await a.run.remote(free_now) == [True] * 4)

    await eventually(all_free)


async def test_trees_and_the_same_tensor_in_two_results(nodes: Any) -> None:
    a, _, _ = nodes
    first = await a.make.remote(keep)
    second = await a.make.remote(lambda node: [node.kept["t"]])

    async def tree_freed(node: Any, seconds: float) -> bool:
        try:
            await aiordt.wait_tensor_freed({"x": [node.kept["t"], 5], "y": torch.ones(2)}, seconds)
        except TimeoutError:
            return False
        return True

    del first
    assert not await a.run.remote(tree_freed, 0.3)
    del second
    assert await a.run.remote(tree_freed, 10.0)


async def test_never_exported_or_by_value_is_free(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(lambda node: node.kept.setdefault("t", torch.zeros(3)))
    assert await a.run.remote(freed, 0.0)
    assert float((await ref).sum()) == 0.0
    await aiordt.wait_tensor_freed(torch.zeros(5_000_000))


async def test_release_gives_up_early_and_awaiting_then_says_so(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(keep)
    copy = ref.__copy__()
    ref.release()
    ref.release()
    with pytest.raises(aiordt.TensorFreedError, match="released"):
        await ref
    assert torch.equal(await copy, arange(_NBYTES))
    copy.release()
    assert await a.run.remote(freed, 10.0)


async def test_many_waiters_wake(nodes: Any) -> None:
    a, _, _ = nodes
    ref = await a.make.remote(keep)
    waits = [a.run.remote(freed, 20.0) for _ in range(20)]
    del ref
    assert all(await asyncio.gather(*waits))


async def test_killed_consumer_frees(nodes: Any, spawn: Any) -> None:
    a, _, _ = nodes
    victim = spawn()
    pid = await victim.pid.remote()
    await victim.run.remote(hold, [await a.make.remote(keep)])
    assert not await a.run.remote(freed, 0.2)
    os.kill(pid, signal.SIGKILL)
    assert await a.run.remote(freed, 20.0)


async def test_who_got_a_ref_from_a_process_that_is_killed_still_holds_it(
    nodes: Any, spawn: Any
) -> None:  # CLM-1, REG-4
    """Ray knows of the last one only through the one in the middle."""
    a, b, _ = nodes
    middle = spawn()

    async def pass_on(node: Any, a: Any, b: Any) -> None:
        node.kept["ref"] = await a.make.remote(keep)
        await b.run.remote(hold, [node.kept["ref"]])

    async def pull(node: Any) -> bool:
        return torch.equal(await node.kept["refs"][0], arange(_NBYTES))

    await middle.run.remote(pass_on, a, b)
    pid = await middle.pid.remote()
    os.kill(pid, signal.SIGKILL)
    assert not await a.run.remote(freed, 4.0), "Ray tells within 2 s that the middle is gone"
    await a.run.remote(cut)
    assert not await a.run.remote(freed, 1.0), "it lives, and can be reached again"
    assert await b.run.remote(pull)
    await b.run.remote(drop)
    assert await a.run.remote(freed, 10.0)


def claims_after(_: Any, seconds: float) -> bytes:
    _claims.STAY_SECONDS = seconds  # type: ignore[misc]
    return current().address.runtime_id


async def swept(_: Any) -> None:
    """Look now at what has come, and not when the longer time is over."""

    async def sweep() -> None:
        current().claims._sweep()

    await current().io.run(sweep())


async def test_only_a_ref_that_stays_is_claimed(nodes: Any) -> None:  # CLM-2
    a, b, _ = nodes
    peer_id = await b.run.remote(claims_after, 60.0)

    def claimed(_: Any, peer_id: bytes) -> bool:
        return current().registry.claimed_by(peer_id)

    ref = await a.make.remote(keep)
    for _ in range(10):
        await b.pull.remote([ref])
    assert not await a.run.remote(claimed, peer_id)
    await b.run.remote(claims_after, _claims.STAY_SECONDS)
    await b.run.remote(hold, [ref])
    await b.run.remote(swept)
    await eventually(lambda: a.run.remote(claimed, peer_id), what="it is claimed")
    await b.run.remote(drop)

    async def given_up() -> bool:
        return not await a.run.remote(claimed, peer_id)

    await eventually(given_up, what="it is claimed no more")
    del ref
    assert await a.run.remote(freed, 10.0)


async def test_claims_of_many_go_in_several_messages(nodes: Any) -> None:
    a, b, _ = nodes

    def keep_many(node: Any) -> list[torch.Tensor]:
        node.kept["t"] = [arange(_NBYTES) for _ in range(7)]
        return list(node.kept["t"])

    def two_a_message(_: Any) -> None:
        _claims._MAX_LEASES = 2  # type: ignore[misc]

    def num_claims(_: Any) -> int:
        return len(current().registry._claims)

    await b.run.remote(two_a_message)
    await b.run.remote(hold, await a.make.remote(keep_many))

    async def told(number: int) -> bool:
        return bool(await a.run.remote(num_claims) == number)

    await eventually(lambda: told(7), what="all are claimed")
    await b.run.remote(drop)
    await eventually(lambda: told(0), what="none is any more")
    assert await a.run.remote(freed, 10.0)


async def test_cancelled_consumer_frees(nodes: Any) -> None:
    a, b, _ = nodes

    async def use_for_ever(_: Any, refs: list[Any]) -> None:
        tensor = await refs[0]
        await asyncio.Event().wait()
        del tensor

    call = b.run.remote(use_for_ever, [await a.make.remote(keep)])

    async def pulled() -> bool:
        return bool((await a.run.remote(freed, 0.1)) is False)

    await pulled()
    ray.cancel(call)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError)):
        await call
    del call
    assert await a.run.remote(freed, 20.0)


async def test_a_warning_names_what_is_held_after_a_while(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiordt._wait.WARN_SECONDS", 0.1)
    tensor = arange(_NBYTES)
    ref = await aiordt.put(tensor)
    with caplog.at_level(logging.WARNING, "aiordt"), pytest.raises(TimeoutError):
        await aiordt.wait_tensor_freed(tensor, 0.35)
    assert len(caplog.records) >= 2
    assert "put() in test_a_warning_names" in caplog.text
    assert "Refs nested in the arguments" in caplog.text
    del ref
    await aiordt.wait_tensor_freed(tensor, 10)


async def test_cancelled_wait_leaves_no_waiter(cluster: None) -> None:
    tensor = arange(_NBYTES)
    ref = await aiordt.put(tensor)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await aiordt.wait_tensor_freed(tensor)
    assert not current().registry._waiters
    del ref
    await aiordt.wait_tensor_freed(tensor, 10)


async def test_export_in_progress_counts(nodes: Any) -> None:  # REG-3
    a, _, _ = nodes

    async def race(node: Any) -> bool:
        node.kept["t"] = arange(_NBYTES)
        current().markers._pool.clear()  # the export has to wait for a marker
        task = asyncio.create_task(aiordt.put(node.kept["t"]))
        await asyncio.sleep(0)
        busy = not await freed(node, 0.0)
        await task
        return busy

    assert await a.run.remote(race)
