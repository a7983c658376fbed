"""What becomes a ref: tensors, numpy arrays, and what speaks DLPack.

Everything is moved as a tensor; an array arrives as an array again, anything else as a tensor.

Invariants:
    LEAF-1  An array that PyTorch cannot take is no leaf: it travels by Ray, untouched. So do
            arrays inside objects that are no containers (a data frame, a fitted model): these
            look at their arrays when they are rebuilt.
    LEAF-2  The tensor made of a leaf shares its memory and keeps it alive.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    Array: TypeAlias = np.ndarray[Any, Any]

#: Type characters of the dtypes that `torch.from_numpy` takes ("Q" is not among them, but
#: uint64 is "L" on Linux).
_CHARS: Final = frozenset("?bBhHiIlLqefdFD")
#: Subclasses mean more than their elements (masks, units); a memmap is just memory.
_ARRAYS: Final = (np.ndarray, np.memmap)


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a tensor."""
    return isinstance(value, torch.Tensor)


def is_leaf(value: object) -> bool:
    """Whether ``value`` is what becomes a ref."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, np.ndarray):
        return type(value) in _ARRAYS and _is_fit(value)
    cls: Any = type(value)
    return _speaks_dlpack(cls) and _try_dlpack(value) is not None


def has_memory(value: object) -> bool:
    """Whether ``value`` is memory that an exported leaf may share."""
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return is_leaf(value)


def is_target(value: object) -> bool:
    """Whether ``value`` is what a tensor can be received into."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and is_leaf(value))


def _is_fit(array: Array) -> bool:
    dtype = array.dtype
    return (
        dtype.char in _CHARS
        and dtype.isnative
        and array.flags.aligned
        and all(stride >= 0 and stride % dtype.itemsize == 0 for stride in array.strides)
    )


@functools.lru_cache(maxsize=1024)  # asked of every container: 0.3 µs without
def _speaks_dlpack(cls: Any) -> bool:  # noqa: ANN401
    """Asked of the class: an object's ``__getattr__`` may answer to anything."""
    return hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__")


def _try_dlpack(value: Any) -> torch.Tensor | None:  # noqa: ANN401
    """``value`` as a tensor, if it can be one: strings of pyarrow, for one, cannot."""
    try:
        tensor: torch.Tensor = from_dlpack(value)
    except Exception:  # noqa: BLE001  (every library has errors of its own for this)
        return None
    return tensor


class _Writable:
    """A read-only array under another flag: `torch.from_numpy` warns of such."""

    def __init__(self, array: Array) -> None:
        self._array = array  # keeps the memory alive (LEAF-2)
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def as_tensor(leaf: Any) -> torch.Tensor:  # noqa: ANN401
    """A leaf as a tensor that shares its memory (LEAF-2).

    Of a read-only array it is for reading, whatever it says.

    Cost:
        1 µs for an array, 5 µs if it is read-only.
    """
    if isinstance(leaf, torch.Tensor):
        return leaf
    if not isinstance(leaf, np.ndarray):
        tensor: torch.Tensor = from_dlpack(leaf)
        return tensor
    return torch.from_numpy(leaf if leaf.flags.writeable else np.asarray(_Writable(leaf)))


def as_array(tensor: torch.Tensor) -> torch.Tensor | Array:
    """A tensor as an array that shares its memory.

    Returns:
        The tensor itself where numpy has no such dtype, and where it is on a device.
    """
    if tensor.device.type != "cpu":
        return tensor
    try:
        array: Array = tensor.detach().numpy()
    except TypeError:  # bfloat16, float8
        return tensor
    return array


def memory_range(leaf: Any) -> tuple[int, int]:  # noqa: ANN401
    """Where the storage of a tensor, or the elements of an array, lie: address and bytes."""
    if isinstance(leaf, np.ndarray):
        address = leaf.__array_interface__["data"][0]
        if not leaf.size:
            return address, 0
        ends = [(size - 1) * step for size, step in zip(leaf.shape, leaf.strides, strict=True)]
        below = sum(end for end in ends if end < 0)
        above = sum(end for end in ends if end > 0)
        return address + below, above - below + leaf.itemsize
    storage = as_tensor(leaf).untyped_storage()
    return storage.data_ptr(), storage.nbytes()
