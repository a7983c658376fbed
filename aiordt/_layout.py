"""How the elements of a tensor lie in memory: cuts, and the runs of bytes they are made of.

Pure: numbers in, numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Cut:
    """Which bytes of an exported tensor to move, in which order, and as what.

    Attributes:
        offset: Of the first element from the exported tensor's element 0, in bytes.
        shape: Sizes, in elements, in the order in which they travel (C order).
        stride: Strides at the owner, in elements.
        itemsize: Bytes of an element there.
        dtype: Code of the dtype to which the owner converts them first; ``None``: as they are.
            Only links whose owner packs take one.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int
    dtype: int | None = None

    @property
    def contiguous(self) -> bool:
        """Whether it is one run of bytes."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def span(self) -> int:
        """Bytes from its first element to the end of its last."""
        return span(self.shape, self.stride, self.itemsize)

    def runs(self) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """As `runs`, of this cut; offsets are from its first element."""
        return runs(self.shape, self.stride, self.itemsize)


def span(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes from a strided tensor's element 0 to the end of its last."""
    if 0 in shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return (last + 1) * itemsize


def first_run(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes of each of the contiguous runs that `runs` lists."""
    run = itemsize
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step * itemsize != run:
            break
        run *= size
    return run


def runs(
    shape: Sequence[int], stride: Sequence[int], itemsize: int
) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The contiguous runs of bytes that make up a strided tensor, in C order.

    Returns:
        Bytes of each run, and the offset of each from element 0, in bytes.
    """
    run = first_run(shape, stride, itemsize)
    inner = itemsize
    dims = list(zip(shape, stride, strict=True))
    while dims and inner < run:
        inner *= dims.pop()[0]
    offsets = np.zeros(1, dtype=np.int64)
    for size, step in dims:
        steps = np.arange(size, dtype=np.int64) * (step * itemsize)
        offsets = (offsets[:, None] + steps[None, :]).reshape(-1)
    return run, offsets
