"""Leaves beside tensors: numpy arrays come back as arrays, what speaks DLPack as tensors."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import aiordt
from tests.support import MIB, Wrapped, eventually


def numbers(nbytes: int, dtype: Any = np.float32) -> Any:
    dtype = np.dtype(dtype)
    return (np.arange(nbytes // dtype.itemsize) % 251).astype(dtype)


def same(got: Any, wanted: Any) -> bool:
    return (
        type(got) is np.ndarray
        and got.dtype == wanted.dtype
        and got.shape == wanted.shape
        and np.array_equal(got, wanted)
    )


@dataclass
class Batch:
    observations: Any
    names: Any


@pytest.mark.parametrize("how", ["make", "make_cma", "make_tcp"])
async def test_arrays_arrive_as_arrays(nodes: Any, how: str) -> None:
    a = nodes[0]

    def arrays(_: Any) -> Any:
        big = numbers(2 * MIB).reshape(512, 1024)
        return {
            "big": big,
            "small": np.arange(6, dtype=np.int16).reshape(2, 3),
            "zero": np.array(2.5),
            "empty": np.zeros((0, 3), np.complex64),
            "fortran": np.asfortranarray(big),
            "strided": big[::2, 4:900:3],
            "expanded": np.broadcast_to(np.arange(300_000.0), (2, 300_000)),
            "bool": numbers(MIB, np.uint8) > 100,
            "tensor": torch.ones(3),
        }

    refs = await getattr(a, how).remote(arrays)
    wanted = arrays(None)
    assert all(isinstance(ref, aiordt.TensorRef) for ref in refs.values())
    assert refs["big"].dtype is torch.float32
    assert refs["strided"].shape == torch.Size(wanted["strided"].shape)
    together = await aiordt.get(refs)
    assert all(same(together[name], wanted[name]) for name in wanted if name != "tensor")
    assert np.shares_memory(together["big"], together["strided"])  # as at their owner
    # One by one, they are apart.
    got = {name: await ref for name, ref in refs.items()}
    assert isinstance(got.pop("tensor"), torch.Tensor)
    for name, array in got.items():
        assert same(array, wanted[name]), name
        assert array.flags.writeable, name
        array[...] = 0  # private
        clone = torch.from_numpy(np.array(wanted[name], order="K")).clone().numpy()
        if name != "expanded":
            assert array.strides == clone.strides, name
    again = await refs["big"]
    assert same(again, wanted["big"])


async def test_arrays_of_every_dtype(nodes: Any) -> None:
    def arrays(_: Any) -> Any:
        return [numbers(40_000, char) for char in "?bBhHiIlLefdFD"]

    got = await aiordt.get(await nodes[0].make.remote(arrays))
    assert all(map(same, got, arrays(None)))


async def test_what_torch_cannot_take_travels_by_ray(nodes: Any) -> None:
    def arrays(_: Any) -> Any:
        return {
            "objects": np.array(["x", None, 3]),
            "strings": np.array(["a", "bc"]),
            "dates": np.array(["2026-01-01"], "datetime64[D]"),
            "records": np.zeros(3, [("a", "f4"), ("b", "i8")]),
            "big endian": numbers(MIB, ">f4"),
            "reversed": numbers(MIB)[::-1],
            "long double": np.ones(3, np.longdouble),
            "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
            "scalar": np.float32(3),
        }

    got = await nodes[0].make.remote(arrays)
    for name, value in arrays(None).items():
        assert type(got[name]) is type(value), name
        assert np.array_equal(got[name], value), name


async def test_a_plain_array_beside_one_that_cannot_move(nodes: Any) -> None:
    def batch(_: Any) -> Any:
        return Batch(numbers(MIB), np.array(["a", None], dtype=object)), np.float32(1)

    out, scalar = await nodes[0].make.remote(batch)
    assert isinstance(out.observations, aiordt.TensorRef)
    assert out.names.tolist() == ["a", None]
    assert scalar == 1
    got = await aiordt.get(out)
    assert same(got.observations, numbers(MIB))


async def test_a_memmap_and_a_read_only_array_are_exported(nodes: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "array")

    def make(_: Any) -> Any:
        mapped = np.memmap(path, dtype=np.float32, mode="w+", shape=(300_000,))
        mapped[:] = np.arange(300_000) % 251
        frozen = numbers(MIB)
        frozen.flags.writeable = False
        return [mapped, frozen]

    async def exported(_: Any) -> Any:
        import warnings  # noqa: PLC0415

        frozen = numbers(40)
        frozen.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return (await aiordt.put([frozen], transport="tcp"))[0].shape

    assert await nodes[0].run.remote(exported) == (10,)
    refs = await nodes[0].make.remote(make)
    mapped, frozen = await aiordt.get(refs)
    assert same(mapped, numbers(1_200_000))
    assert same(frozen, numbers(MIB))
    assert frozen.flags.writeable


async def test_the_owner_gets_the_array_itself(nodes: Any) -> None:
    async def check(_: Any) -> list[bool]:
        array, frozen, wrapped = numbers(MIB), numbers(2 * MIB), Wrapped(torch.ones(MIB))
        frozen.flags.writeable = False
        refs = await aiordt.put({"a": array, "f": frozen, "w": wrapped})
        got = await aiordt.get(refs)
        once = [got["a"] is array, got["f"] is frozen, got["w"] is wrapped]
        small = await (await aiordt.put(np.arange(4)))
        copied = await (await aiordt.put(array, snapshot=True))
        wrapped_copy = await (await aiordt.put(wrapped, snapshot=True))
        return [
            *once,
            (await refs["a"]) is array,
            type(small) is np.ndarray,
            copied is not array and same(copied, array),
            isinstance(wrapped_copy, torch.Tensor),
        ]

    assert all(await nodes[0].run.remote(check))


async def test_snapshots_of_arrays(nodes: Any) -> None:
    def make(node: Any) -> Any:
        node.kept["array"] = numbers(MIB)
        return node.kept["array"]

    def overwrite(node: Any) -> None:
        node.kept["array"][:] = -1

    ref = await nodes[0].make_snapshot.remote(make)
    await nodes[0].run.remote(overwrite)
    assert same(await ref, numbers(MIB))


async def test_resolve_gives_methods_arrays(nodes: Any, spawn: Any) -> None:
    import ray  # noqa: PLC0415

    class Summing(aiordt.AsyncActor):
        @aiordt.method(resolve=True)
        async def total(self, arrays: dict[str, Any], *, tensor: Any) -> Any:
            return type(arrays["x"]).__name__, float(arrays["x"].sum()), type(tensor).__name__

    ref = await nodes[0].make.remote(lambda _: {"x": np.ones(MIB), "w": Wrapped(torch.ones(MIB))})
    actor = spawn(ray.remote(Summing))
    told = await actor.total.remote({"x": ref["x"]}, tensor=ref["w"])
    assert told == ("ndarray", MIB, "Tensor")


async def test_what_speaks_dlpack_arrives_as_a_tensor(nodes: Any) -> None:
    def make(_: Any) -> Any:
        return [Wrapped(torch.arange(float(MIB))), Wrapped(torch.arange(4)), Wrapped]

    large, small, cls = await nodes[0].make.remote(make)
    assert cls is Wrapped
    assert small.dtype is torch.int64
    got = await aiordt.get([large, small])
    assert torch.equal(got[0], torch.arange(float(MIB)))
    assert torch.equal(got[1], torch.arange(4))


async def test_into_arrays(nodes: Any) -> None:
    refs = await nodes[0].make.remote(
        lambda _: {"x": numbers(2 * MIB), "y": np.arange(3), "t": torch.ones(MIB)}
    )
    x, y = np.zeros(MIB // 2, np.float32), np.zeros(3, np.int64)
    strided = np.zeros(2 * MIB, np.float32)[::2]
    got = await aiordt.get(refs, into={"x": x, "y": y, "t": strided})
    assert got["x"] is x
    assert got["y"] is y
    assert got["t"] is strided
    assert np.array_equal(x, numbers(2 * MIB))
    assert y.tolist() == [0, 1, 2]
    assert strided.min() == 1
    tensor = torch.zeros(MIB // 2)
    assert await aiordt.get(refs["x"], into=tensor) is tensor
    assert np.array_equal(tensor.numpy(), numbers(2 * MIB))


async def test_into_is_checked_before_anything_moves(nodes: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: [numbers(MIB), numbers(MIB)])
    good = np.zeros(MIB // 4, np.float32)
    frozen = good.copy()
    frozen.flags.writeable = False
    for bad, why in (
        (frozen, "read-only"),
        (np.zeros(5, np.float32), "shapes and dtypes"),
        (np.zeros(MIB // 4, np.float64), "shapes and dtypes"),
        (np.lib.stride_tricks.as_strided(good, (MIB // 4,), (0,)), "expanded"),
        (good[::-1], "plain array"),
        (np.ma.masked_array(good), "plain array"),
        ("x", "plain array"),
    ):
        with pytest.raises(aiordt.UsageError, match=why):
            await aiordt.get(refs, into=[good, bad])
    assert not good.any()


async def test_the_owner_may_receive_into_other_memory(nodes: Any) -> None:
    async def check(_: Any) -> bool:
        frozen = numbers(2 * MIB)
        frozen.flags.writeable = False
        wrapped = Wrapped(torch.arange(float(MIB)))
        refs = await aiordt.put([frozen, wrapped])
        targets = [np.zeros_like(frozen), np.zeros(MIB, np.float32)]
        await aiordt.get(refs, into=targets)
        return np.array_equal(targets[0], frozen) and targets[1][7] == 7

    assert await nodes[0].run.remote(check)


async def test_dtype_and_device(nodes: Any) -> None:
    refs = await nodes[0].make.remote(
        lambda _: {"f": numbers(MIB), "i": np.arange(5), "w": Wrapped(torch.ones(3))}
    )
    got = await aiordt.get(refs, dtype=torch.float64)
    assert same(got["f"], numbers(MIB).astype(np.float64))
    assert same(got["i"], np.arange(5))
    assert got["w"].dtype is torch.float64
    got = await aiordt.get(refs, device="cpu")
    assert same(got["f"], numbers(MIB))
    got = await aiordt.get(refs, dtype=torch.bfloat16)
    assert got["f"].dtype is torch.bfloat16  # numpy has no such dtype
    assert same(got["i"], np.arange(5))
    got = await aiordt.get(refs, device="meta")
    assert all(got[name].device.type == "meta" for name in refs)


@pytest.mark.parametrize("nbytes", [40_000, 3 * MIB])
async def test_wait_tensor_freed_knows_arrays_by_their_memory(nodes: Any, nbytes: int) -> None:
    a, b, _ = nodes

    def make(node: Any) -> Any:
        node.kept["array"] = numbers(nbytes)
        return node.kept["array"][4:]

    async def busy(node: Any, which: str) -> bool:
        array = node.kept["array"]
        memory = {
            "itself": array,
            "view": array[10:20],
            "reversed": array[::-1],
            "tensor": torch.from_numpy(array),
            "other": array[:4],
        }[which]
        try:
            await aiordt.wait_tensor_freed({"x": [memory]}, timeout=0)
        except TimeoutError:
            return True
        return False

    ref = await a.make.remote(make)
    for which in ("itself", "view", "reversed", "tensor"):
        assert await a.run.remote(busy, which), which  # REG-1
    assert not await a.run.remote(busy, "other")
    assert (await b.pull.remote([ref]))[0][3] == numbers(nbytes)[7]
    del ref
    gc.collect()

    async def free(node: Any) -> bool:
        await aiordt.wait_tensor_freed(node.kept["array"], timeout=30)
        return True

    assert await a.run.remote(free)


async def test_an_exported_array_is_kept_alive(nodes: Any) -> None:
    def make(node: Any) -> Any:
        import weakref  # noqa: PLC0415

        arrays = [np.full(MIB // 2, value, np.float32) for value in range(8)]
        node.kept["weak"] = [weakref.ref(array) for array in arrays]
        return arrays

    def alive(node: Any) -> int:
        gc.collect()
        return sum(weak() is not None for weak in node.kept["weak"])

    refs = await nodes[0].make.remote(make)
    assert await nodes[0].run.remote(alive) == 8
    got = await asyncio.gather(*refs)
    assert [array[-1] for array in got] == list(range(8))
    del refs

    async def gone() -> bool:
        return bool(await nodes[0].run.remote(alive) == 0)

    await eventually(gone)


async def test_arrays_in_shared_memory(nodes: Any) -> None:
    def make(_: Any) -> Any:
        array = aiordt.empty((300_000,)).numpy()
        array[:] = np.arange(300_000) % 251
        return array

    ref = await nodes[0].make.remote(make)
    assert (await aiordt.explain(ref)).chosen == "shm"
    got = await ref
    assert same(got, numbers(1_200_000))
    assert got.flags.writeable
    async with ref.view() as seen:
        assert same(seen, numbers(1_200_000))
        assert not seen.flags.writeable

    async def own(_: Any) -> list[bool]:
        array, small = aiordt.empty((300_000,)).numpy(), np.ones(3)
        refs = await aiordt.put([array, small])
        async with refs[0].view() as seen, refs[1].view() as copied:
            return [seen is array, same(copied, small)]

    assert all(await nodes[0].run.remote(own))
