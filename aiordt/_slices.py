"""Slices of refs: which elements `TensorRef.__getitem__` selects, by PyTorch's own rules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aiordt import _wire
from aiordt._errors import InvalidTypeError
from aiordt._landing import unpack_plain
from aiordt._memory import raw_bytes
from aiordt._types import ITEMSIZES

if TYPE_CHECKING:
    from aiordt._wire import TensorMeta


def slice_meta(meta: TensorMeta, index: Any) -> TensorMeta:  # noqa: ANN401
    """The description of ``tensor[index]``, which is a plain tensor, also of a parameter.

    Raises:
        InvalidTypeError: ``index`` is not made of integers, slices, ``...`` and ``None``.
        IndexError: It is out of range, as PyTorch says.
        ValueError: A step is not positive, as PyTorch says.

    Cost:
        About 15 µs.
    """
    whole = _without_memory(meta)
    view = whole[_checked(index)]
    flags = meta.flags & ~_wire.FLAG_PARAMETER
    stride = None if view.is_contiguous() else view.stride()
    offset = int(view.storage_offset()) * ITEMSIZES[meta.dtype]
    if view.shape == whole.shape and stride == meta.stride and not offset:
        return replace(meta, flags=flags) if flags != meta.flags else meta
    return replace(
        meta,
        flags=flags,
        shape=tuple(view.shape),
        stride=stride,
        address=meta.address and meta.address + offset,  # 0: it has none
        offset=(meta.offset or 0) + offset,
    )


def slice_inline(meta: TensorMeta, data: bytes, index: Any, sliced: TensorMeta) -> bytes:  # noqa: ANN401
    """The bytes of a slice of a tensor that travels by value.

    Args:
        meta: Of the tensor.
        data: Its bytes.
        index: What is selected.
        sliced: What `slice_meta` made of ``meta``.
    """
    view = unpack_plain(meta, data)[_checked(index)]
    return raw_bytes(view.contiguous() if sliced.stride is None else view, sliced.stride)


def restrided_meta(
    meta: TensorMeta, start: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> TensorMeta:
    """The description of ``tensor.as_strided(shape, stride, start)`` of a contiguous tensor."""
    view = torch.empty_strided(shape, stride, dtype=torch.uint8, device="meta")
    offset = start * ITEMSIZES[meta.dtype]
    return replace(
        meta,
        flags=meta.flags & ~_wire.FLAG_PARAMETER,
        shape=shape,
        stride=None if view.is_contiguous() else stride,
        address=meta.address and meta.address + offset,
        offset=(meta.offset or 0) + offset,
    )


def restrided_inline(
    meta: TensorMeta, data: bytes, start: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """The bytes of that, of a tensor that travels by value."""
    view = unpack_plain(meta, data).as_strided(shape, stride, start)
    return raw_bytes(view, None if view.is_contiguous() else stride)


def view_of(tensor: torch.Tensor, meta: TensorMeta) -> torch.Tensor:
    """What a ref is for, at the owner: the exported tensor, or a view of it."""
    if meta.offset is None:
        return tensor
    stride = _without_memory(meta).stride()
    start = tensor.storage_offset() + meta.offset // tensor.itemsize
    return tensor.as_strided(meta.shape, stride, start)


def _without_memory(meta: TensorMeta) -> torch.Tensor:
    if meta.stride is None:
        return torch.empty(meta.shape, dtype=torch.uint8, device="meta")
    return torch.empty_strided(meta.shape, meta.stride, dtype=torch.uint8, device="meta")


def _checked(index: Any) -> Any:  # noqa: ANN401
    """``index`` with plain integers; PyTorch would copy for anything but basic indexing."""
    if isinstance(index, tuple):
        return tuple(map(_checked_item, index))
    return _checked_item(index)


def _checked_item(item: Any) -> Any:  # noqa: ANN401
    if item is None or item is Ellipsis:
        return item
    if isinstance(item, slice):
        return slice(*(
            bound if bound is None else _integer(bound)
            for bound in (item.start, item.stop, item.step)
        ))  # fmt: skip
    return _integer(item)


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidTypeError(
            f"a ref cannot be indexed by a {type(value).__name__}: integers, slices, ... and None "
            "select without a copy. For anything else, await the ref and index the tensor"
        )
    return int(value)
