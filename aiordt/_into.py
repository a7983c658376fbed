"""The tensors that a caller hands to `aiordt.get` to receive into: checked as a whole, first.

Invariants:
    INTO-1  Nothing is written before all targets were found fit.
    INTO-2  Where two targets share memory, what arrives there is the same for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._landing import describe
from aiordt._layout import first_run, runs, span
from aiordt._leaves import as_tensor
from aiordt._ref import TensorRef
from aiordt._runtime import current
from aiordt._ties import contiguous_stride, overlapping
from aiordt._tree import Flat, match, place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Checking targets that interleave looks at each of their runs: 50 ns each.
_RUNS_ON_LOOP: Final = 10_000


def is_tensor_ref(value: object) -> bool:
    """Whether ``value`` is a `TensorRef`."""
    return isinstance(value, TensorRef)


async def targets_for(
    tree: Any,  # noqa: ANN401
    into: Any,  # noqa: ANN401
) -> tuple[Flat, list[Any], list[torch.Tensor]]:
    """The refs of a tree, each time they occur, what to receive into, and the tensors of that.

    Raises:
        InvalidTypeError: ``into`` does not have tensors where ``tree`` has refs.
        InvalidValueError: Its structure, or one of its tensors, does not fit.
    """
    flat = Flat(tree, is_tensor_ref, every=True)
    targets = match(tree, into, is_tensor_ref)
    if len(targets) != len(flat.leaves):
        raise InvalidTypeError(
            "into= works with refs in dicts, lists, tuples, dataclasses and TensorDicts; some of "
            "these are inside other objects"
        )
    tensors = []
    for ref, target in zip(flat.leaves, targets, strict=True):
        writable = isinstance(target, torch.Tensor) or target.flags.writeable
        tensor = as_tensor(target) if writable else torch.empty(0)
        reason = _misfit(ref, tensor) if writable else "a read-only array"
        if reason:
            raise InvalidValueError(f"{place(into, target, 'into')}: {reason}")
        tensors.append(tensor)
    check = _overlap_check(flat.leaves, tensors)
    if check is not None:
        cost, find = check
        found = find() if cost <= _RUNS_ON_LOOP else await current().workers.run(find)
        if found is not None:
            one, other = (place(into, targets[number], "into") for number in found)
            raise InvalidValueError(
                f"{one} and {other} share memory, but receive what does not share memory in the "
                "same way: both cannot be right"
            )
    return flat, targets, tensors


def _misfit(ref: TensorRef, target: torch.Tensor) -> str:
    """Why a tensor cannot be received into; empty if it can."""
    if target.shape != ref.shape or target.dtype != ref.dtype:
        return (
            f"a tensor {tuple(target.shape)} {target.dtype} where {describe(ref)} arrives; shapes "
            "and dtypes must be equal"
        )
    if target.device.type != "cpu" or target.layout is not torch.strided:
        return f"a tensor on {target.device}; host memory is needed"
    if type(target).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(target).__qualname__} wraps other tensors: receive into those"
    if target.is_conj() or target.is_neg():
        return "a conjugated or negated view; receive into the tensor behind it"
    strides = zip(target.shape, target.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in strides):
        return "an expanded tensor, whose elements share memory"
    return ""


def _overlap_check(
    refs: Sequence[TensorRef], targets: Sequence[torch.Tensor]
) -> tuple[int, Callable[[], tuple[int, int] | None]] | None:
    """How many runs of memory there are to look at, and the function that does.

    That gives two targets that share memory and may not, if there are such.
    """
    places = [number for number, target in enumerate(targets) if target.numel()]
    spans = [
        span(target.shape, target.stride(), target.itemsize)
        for target in map(targets.__getitem__, places)
    ]
    suspects = overlapping([targets[number].data_ptr() for number in places], spans)
    if not suspects:
        return None
    classes: dict[object, list[int]] = {}
    for number in sorted(places[suspect] for suspect in suspects):
        classes.setdefault(_mirrored(refs[number], targets[number]), []).append(number)
    if len(classes) == 1:
        return None
    cost = sum(
        targets[number].numel() // first_run(targets[number].shape, targets[number].stride(), 1)
        for numbers in classes.values()
        for number in numbers
    )
    return cost, lambda: _shared(list(classes.values()), targets)


def _mirrored(ref: TensorRef, target: torch.Tensor) -> object:
    """The same for refs and targets that lie in the same way to each other (INTO-2)."""
    meta = ref.meta
    stride = contiguous_stride(meta.shape) if meta.stride is None else meta.stride
    if meta.address and stride == target.stride():
        return ref.header.key, target.data_ptr() - meta.address
    return ref, target.data_ptr(), target.stride()


def _shared(
    classes: Sequence[Sequence[int]], targets: Sequence[torch.Tensor]
) -> tuple[int, int] | None:
    """Two targets of different classes that share bytes."""
    rows: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for number_of_class, numbers in enumerate(classes):
        for number in numbers:
            target = targets[number]
            nbytes, offsets = runs(target.shape, target.stride(), target.itemsize)
            start = offsets + target.data_ptr()
            same = np.full_like(start, number_of_class)
            rows.append(np.stack([start, start + nbytes, same, np.full_like(start, number)]))
    start, end, number_of_class, number = np.concatenate(rows, axis=1)
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    number_of_class, number = number_of_class[order], number[order]
    # The farthest end so far, and the farthest of another class than that one's.
    first, second = (0, -1, -1), (0, -1, -1)
    for row in zip(start.tolist(), end.tolist(), number_of_class.tolist(), number.tolist(),
                   strict=True):  # fmt: skip
        for reach, of_class, which in (first, second):
            if of_class not in {row[2], -1} and row[0] < reach:
                return which, row[3]
        mine = (row[1], row[2], row[3])
        if mine[1] == first[1]:
            first = max(first, mine)
        elif mine[0] > first[0]:
            first, second = mine, first
        elif mine[0] > second[0]:
            second = mine
    return None
