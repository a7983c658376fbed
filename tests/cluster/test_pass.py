"""Tensors passed between actors, the driver and tasks (scenarios: pass, own actor, driver)."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tensordict import TensorDict

import aiordt
from tests.support import MIB, arange, eventually

SIZES = [4, 16384, 16388, 65536, 262144, 262148, MIB, 3 * MIB + 4, 17 * MIB]


@dataclasses.dataclass(frozen=True)
class Batch:
    observations: torch.Tensor
    rewards: list[torch.Tensor]
    name: str
    late: torch.Tensor = dataclasses.field(init=False, default=None)  # type: ignore[assignment]


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024  (the untyped one is used too)


@pytest.mark.parametrize("transport", ["make", "make_tcp", "make_cma"])
async def test_sizes(nodes: Any, transport: str) -> None:
    a, b, _ = nodes
    for nbytes in SIZES:
        out = getattr(a, transport).remote(lambda _, n: arange(n), nbytes)
        got = await b.pull.remote([out])
        assert torch.equal(got[0], arange(nbytes)), nbytes


async def test_500_by_500(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: torch.ones(500, 500))
    assert ref.shape == (500, 500)
    assert ref.dtype is torch.float32
    assert ref.device == torch.device("cpu")
    assert ref.nbytes == MIB - 48576
    assert ref.transport is None
    assert ref.owner.pid == await a.pid.remote()
    assert ref.owner.actor_id == a._actor_id.hex()
    assert ref.owner.actor_name == "NodeActor"
    assert torch.equal(await b.pull.remote(ref), torch.ones(500, 500))


async def test_structures(nodes: Any) -> None:
    a, b, _ = nodes

    def make(_: Any) -> Any:
        batch = Batch(arange(MIB), [arange(40), arange(2 * MIB)], "n")
        object.__setattr__(batch, "late", arange(80000))
        return {
            "dict": {"a": arange(40000), "plain": [1, "two", None]},
            "list": [arange(8), (arange(MIB),)],
            "point": Point(arange(24), 5),
            "ordered": collections.OrderedDict(z=arange(16), a=1),
            "batch": batch,
            "set": {3, 4},
            "td": TensorDict({"x": torch.ones(3, 50000), "n": {"y": torch.zeros(3, 2)}}, [3]),
            "array": np.arange(10),
        }

    refs = await a.make.remote(make)
    assert isinstance(refs["dict"]["a"], aiordt.TensorRef)
    assert refs["dict"]["plain"] == [1, "two", None]
    assert isinstance(refs["point"], Point)
    assert isinstance(refs["batch"].rewards[1], aiordt.TensorRef)
    got = await aiordt.get(refs)
    want = make(None)
    assert torch.equal(got["dict"]["a"], want["dict"]["a"])
    assert torch.equal(got["list"][1][0], want["list"][1][0])
    assert torch.equal(got["point"].x, want["point"].x)
    assert list(got["ordered"]) == ["z", "a"]
    assert torch.equal(got["batch"].late, arange(80000))
    assert got["batch"].name == "n"
    assert isinstance(got["td"], TensorDict)
    assert (got["td"] == want["td"]).all()
    assert torch.equal((await b.pull.remote(refs))["td"]["n", "y"], torch.zeros(3, 2))


async def test_tensors_inside_other_objects(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: torch.nn.Linear(600, 600))
    assert isinstance(refs, torch.nn.Linear)
    assert isinstance(refs._parameters["weight"], aiordt.TensorRef)
    module = await b.pull.remote(refs)
    assert isinstance(module.weight, torch.nn.Parameter)
    assert module(torch.ones(1, 600)).shape == (1, 600)


async def test_result_without_tensors_is_untouched(nodes: Any) -> None:
    a = nodes[0]
    assert await a.make.remote(lambda _: {"x": [1, 2], "y": "z"}) == {"x": [1, 2], "y": "z"}
    assert await a.make.remote(lambda _: None) is None
    assert (await a.stats.remote()).exports == 0


async def test_a_megabyte_of_plain_data_beside(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: {"t": arange(MIB), "data": b"x" * MIB})
    got = await b.pull.remote(refs)
    assert got["data"] == b"x" * MIB
    assert torch.equal(got["t"], arange(MIB))


async def test_same_ref_twice_in_one_call(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: arange(MIB))

    async def twice(_: Any, x: Any, y: Any) -> tuple[bool, bool]:
        both = await aiordt.get([x, {"y": y}, x])
        return both[0] is both[2] is both[1]["y"], torch.equal(both[0], arange(MIB))

    before = (await b.stats.remote()).bytes_pulled
    assert await b.run.remote(twice, ref, ref) == (True, True)
    assert (await b.stats.remote()).bytes_pulled - before == MIB


async def test_each_consumer_has_its_own_clean_copy(nodes: Any) -> None:
    a, b, c = nodes
    ref = await a.make.remote(lambda _: torch.zeros(MIB))

    async def spoil(_: Any, refs: list[Any]) -> float:
        tensor = await refs[0]
        before = float(tensor.sum())
        tensor.fill_(9)
        return before

    for node in (b, c, b):
        assert await node.run.remote(spoil, [ref]) == 0.0
    assert float((await ref).sum()) == 0.0


async def test_through_another_caller_and_sent_on(nodes: Any) -> None:
    a, b, c = nodes

    async def middle(_: Any, a: Any, c: Any) -> Any:
        ref = await a.make.remote(lambda _: arange(2 * MIB))
        return await c.pull.remote([ref]), ref

    (got,), ref = await b.run.remote(middle, a, c)
    assert torch.equal(got, arange(2 * MIB))
    assert torch.equal(await c.pull.remote(ref), arange(2 * MIB))


async def test_own_actor_gets_the_tensor_itself_and_warns_once(nodes: Any) -> None:
    a, b, _ = nodes

    def keep(node: Any) -> torch.Tensor:
        node.kept["t"] = arange(MIB)
        return node.kept["t"]

    async def back(node: Any, refs: list[Any]) -> list[bool]:
        return [(await refs[0]) is node.kept["t"], (await aiordt.get(refs))[0] is node.kept["t"]]

    def listen(node: Any) -> None:
        node.kept["seen"], node.kept["show"] = [], warnings.showwarning

        def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
            node.kept["seen"].append(f"{category.__name__}: {message}")

        warnings.showwarning = show

    def stop_listening(node: Any) -> None:
        warnings.showwarning = node.kept["show"]

    def seen(node: Any) -> list[str]:
        return list(node.kept["seen"])

    ref = await a.make.remote(keep)
    await a.run.remote(listen)
    assert await a.run.remote(back, [ref]) == [True, True]
    assert await a.run.remote(seen) == []
    assert torch.equal(await b.pull.remote(ref), arange(MIB))
    (text,) = await eventually(lambda: a.run.remote(seen), what="the owner's warning")
    assert text.startswith("SharedTensorWarning")
    assert "NodeActor.make()" in text
    assert await a.run.remote(back, [ref]) == [True, True]
    assert await a.run.remote(seen) == [text]
    await a.run.remote(stop_listening)


async def test_small_tensors_are_by_value_even_for_their_owner(nodes: Any) -> None:
    a = nodes[0]

    def keep(node: Any) -> torch.Tensor:
        node.kept["t"] = torch.zeros(4)
        return node.kept["t"]

    ref = await a.make.remote(keep)

    async def changed(node: Any, refs: list[Any]) -> tuple[float, bool]:
        node.kept["t"].fill_(7)
        got = await refs[0]
        return float(got.sum()), got is node.kept["t"]

    assert await a.run.remote(changed, [ref]) == (0.0, False)
    assert (await a.stats.remote()).exports == 0


async def test_inline_is_capped_per_result_in_tree_order(nodes: Any) -> None:
    a = nodes[0]
    refs = await a.make.remote(lambda _: [arange(16384) for _ in range(6)])
    inline = [(await aiordt.explain(ref)).chosen == "inline" for ref in refs]
    assert inline == [True] * 4 + [False] * 2
    assert (await a.stats.remote()).exports == 2
    for ref in refs:
        assert torch.equal(await ref, arange(16384))


async def test_driver_put_and_get(nodes: Any) -> None:
    a, b, _ = nodes
    tensor = arange(3 * MIB)
    refs = await aiordt.put({"t": tensor, "n": 1})
    assert await refs["t"] is tensor
    assert (await aiordt.explain(refs["t"])).chosen == "local"
    got = await asyncio.gather(a.pull.remote(refs), b.pull.remote([refs, refs]))
    assert torch.equal(got[0]["t"], tensor)
    assert torch.equal(got[1][1]["t"], tensor)
    assert (await a.pull.remote(refs))["n"] == 1
    del refs
    await aiordt.wait_tensor_freed(tensor, 10)


async def test_put_in_one_actor_nested_in_another_actors_arguments(nodes: Any) -> None:
    a, b, _ = nodes

    async def put(_: Any) -> Any:
        return [await aiordt.put(arange(MIB)), await aiordt.put({"x": arange(20)})]

    refs = await a.run.remote(put)
    got = await b.pull.remote({"nested": [refs]})
    assert torch.equal(got["nested"][0][0], arange(MIB))
    assert torch.equal(got["nested"][0][1]["x"], arange(20))


async def test_get_takes_trees_object_refs_and_plain_values(nodes: Any) -> None:
    a = nodes[0]
    pending = a.make.remote(lambda _: {"w": arange(MIB)})
    ref = await a.make.remote(lambda _: arange(400))
    got = await aiordt.get({"p": pending, "deep": [ref, (pending, 3)], "plain": torch.ones(2)})
    assert torch.equal(got["p"]["w"], arange(MIB))
    assert torch.equal(got["deep"][0], arange(400))
    assert got["deep"][1][1] == 3
    assert await aiordt.get(5) == 5
    assert torch.equal((await aiordt.get(pending))["w"], arange(MIB))


async def test_plain_actors_and_tasks_consume_and_export(nodes: Any, spawn: Any) -> None:
    a = nodes[0]

    @ray.remote(num_cpus=0)
    def task(refs: Any) -> Any:
        async def main() -> Any:
            tensor = (await aiordt.get(refs))["w"]
            return float(tensor.sum()), await aiordt.put(tensor * 2)

        return asyncio.run(main())

    class Plain:
        async def total(self, refs: Any) -> float:
            return float((await aiordt.get(refs))["w"].sum())

        async def freed(self) -> None:
            await aiordt.wait_tensor_freed(torch.zeros(3))

    class Sync:
        def total(self, refs: Any) -> float:
            return float(asyncio.run(aiordt.get(refs))["w"].sum())

    refs = await a.make.remote(lambda _: {"w": arange(MIB)})
    want = float(arange(MIB).sum())
    total, doubled = await task.remote(refs)
    assert total == want
    assert torch.equal(await doubled, arange(MIB) * 2)
    plain = spawn(ray.remote(Plain))
    assert await plain.total.remote(refs) == want
    await plain.freed.remote()
    assert await spawn(ray.remote(Sync)).total.remote(refs) == want


async def test_a_thousand_tensors_stay_small_on_the_wire(nodes: Any) -> None:
    a = nodes[0]
    refs = await a.make.remote(
        lambda _: {f"layer.{i}": torch.full((64, 257), i) for i in range(1000)}
    )
    context = ray._private.worker.global_worker.get_serialization_context()
    plain = context.serialize(dict.fromkeys(refs)).total_bytes
    nbytes = context.serialize(refs).total_bytes - plain
    assert nbytes < 64 * 1000
    assert nbytes + plain < 100 * 1024
    one = context.serialize(refs["layer.7"]).total_bytes
    assert one < 1200
    got = await aiordt.get(refs)
    assert all(float(got[f"layer.{i}"][5, 5]) == i for i in range(1000))
    assert (await a.stats.remote()).exports == 1000
