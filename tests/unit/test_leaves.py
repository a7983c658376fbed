"""What is a leaf, and tensors made of leaves and back."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from aiordt._leaves import (
    as_array,
    as_tensor,
    has_memory,
    is_leaf,
    is_target,
    is_tensor,
    memory_range,
)
from aiordt._memory import storage_range
from aiordt._tree import Flat, match
from tests.support import Wrapped

TAKEN = "?bBhHiIlLqefdFD"


class Unpackable:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> object:
        raise BufferError("strings have no tensor")


class AnyAttribute:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nobody should ask an object for {name}")


def negative() -> Any:
    return np.arange(6)[::-1]


def unaligned() -> Any:
    return np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float64)


NO_LEAVES: dict[str, Any] = {
    "objects": np.array([None, "x"]),
    "strings": np.array(["a", "bc"]),
    "bytes": np.array([b"a"]),
    "dates": np.array(["2026-01-01"], "datetime64[D]"),
    "durations": np.array([1], "timedelta64[s]"),
    "structured": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "big endian": np.zeros(2, ">f4"),
    "long double": np.zeros(2, np.longdouble),
    "unsigned long long": np.zeros(2, np.ulonglong),
    "negative strides": negative(),
    "odd strides": np.zeros(4, [("a", "u1"), ("f", "f4")])["f"],
    "unaligned": unaligned(),
    "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
    "records": np.rec.array([(1, 2.0)]),
    "scalar": np.float32(2),
    "not for DLPack": Unpackable(),
    "a class": Wrapped,
    "asked of its class": AnyAttribute(),
    "list": [1.0],
    "memoryview": memoryview(b"ab"),
}


@pytest.mark.parametrize("char", TAKEN)
def test_arrays_of_torchs_dtypes_are_leaves(char: str) -> None:
    array = np.arange(6).astype(char).reshape(2, 3)
    assert is_leaf(array)
    tensor = as_tensor(array)
    back = as_array(tensor)
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    assert tensor.data_ptr() == array.__array_interface__["data"][0]  # LEAF-2


@pytest.mark.parametrize("name", NO_LEAVES)
def test_what_torch_cannot_take_is_no_leaf(name: str) -> None:
    value = NO_LEAVES[name]
    assert not is_leaf(value)  # LEAF-1
    assert Flat([value], is_leaf, inside=is_tensor).rebuild([])[0] is value


def test_a_tensor_shares_the_memory_and_keeps_it() -> None:
    array = np.ones((3, 4))
    gone = weakref.ref(array)
    tensor = as_tensor(array)
    array[1, 1] = 50
    assert tensor[1, 1] == 50
    read_only = array[:, ::2]
    read_only.flags.writeable = False
    other = as_tensor(read_only)  # without a warning: they are errors here
    assert other.stride() == (4, 2)
    del array, read_only, tensor
    gc.collect()
    assert gone() is not None  # LEAF-2
    assert other[1, 0] == 1
    del other
    gc.collect()
    assert gone() is None


def test_odd_shapes() -> None:
    for array in (np.array(3.5), np.zeros((0, 3)), np.broadcast_to(np.arange(3.0), (2, 3))):
        array.flags.writeable = False
        tensor = as_tensor(array)
        assert tuple(tensor.shape) == array.shape
        assert np.array_equal(tensor.numpy(), array)
    assert as_array(torch.tensor(2.0)).shape == ()


def test_a_memmap_is_a_leaf(tmp_path: Any) -> None:
    array = np.memmap(tmp_path / "x", dtype=np.int32, mode="w+", shape=(5,))
    array[:] = range(5)
    assert is_leaf(array)
    assert as_tensor(array).tolist() == [0, 1, 2, 3, 4]


def test_what_speaks_dlpack_is_a_leaf() -> None:
    wrapped = Wrapped(torch.arange(5))
    assert is_leaf(wrapped)
    assert has_memory(wrapped)
    assert not is_target(wrapped)
    assert as_tensor(wrapped).data_ptr() == wrapped.tensor.data_ptr()
    assert memory_range(wrapped) == storage_range(wrapped.tensor)


def test_where_numpy_lacks_a_dtype_a_tensor_stays_one() -> None:
    tensor = torch.ones(2, dtype=torch.bfloat16)
    assert as_array(tensor) is tensor
    meta = torch.ones(2, device="meta")
    assert as_array(meta) is meta


def test_ranges_of_memory() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    start = array.__array_interface__["data"][0]
    assert memory_range(array) == (start, 96) == storage_range(as_tensor(array))
    assert memory_range(array[::-1, ::-1]) == (start, 96)
    assert memory_range(array[1, 2:4]) == (start + 32, 8)
    assert memory_range(array.T) == (start, 96)
    assert memory_range(array[:0])[1] == 0
    assert has_memory(array[::-1])
    assert not has_memory(NO_LEAVES["objects"])


class Model:
    """Not a container."""

    def __init__(self) -> None:
        self.array = np.ones(3)
        self.tensor = torch.ones(3)


@dataclass
class Batch:
    array: Any


def test_arrays_in_objects_that_are_no_containers_stay() -> None:
    model, batch = Model(), Batch(np.zeros(2))
    flat = Flat({"model": model, "batch": batch}, is_leaf, inside=is_tensor)  # LEAF-1
    assert [type(leaf) for leaf in flat.leaves] == [torch.Tensor, np.ndarray]
    made = flat.rebuild(["tensor", "array"])
    assert made["batch"].array == "array"
    assert made["model"].tensor == "tensor"
    assert np.array_equal(made["model"].array, model.array)
    assert len(Flat(model, has_memory).leaves) == 2


def test_targets_may_be_arrays() -> None:
    array = np.zeros(2)
    assert match(["x"], [array], lambda leaf: leaf == "x")[0] is array
    for bad in (negative(), NO_LEAVES["masked"], 5):
        with pytest.raises(TypeError, match="plain array"):
            match(["x"], [bad], lambda leaf: leaf == "x")
