"""The tensors of a call as few flat buffers.

A tree of a thousand tensors becomes one buffer for each dtype; a large tensor that lies
contiguous in memory is a buffer by itself, and is not copied. Which tensor is in which buffer
follows from the shapes and dtypes alone, so all members do the same.

In a call that cuts, a buffer holds the pieces of rank 0 of all its tensors, then those of
rank 1, and so on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from aiordt._types import MIB
from aiordt.collective._rules import Spec, rows

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Larger tensors get a buffer each.
_ALONE_NBYTES: Final = 1 * MIB


@dataclass(frozen=True, slots=True)
class Unit:
    """One buffer.

    Attributes:
        dtype: Of all its tensors.
        specs: Its tensors.
        places: Which ones of the call they are.
        bounds: Where the piece of each rank begins, in elements, and the end of the last one.
    """

    dtype: torch.dtype
    specs: tuple[Spec, ...]
    places: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.bounds[-1]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


def piece_spec(spec: Spec, size: int, rank: int) -> Spec:
    """The piece of one rank of a tensor that is cut along dimension 0."""
    start, stop = rows(spec.shape[0], size, rank)
    return Spec((stop - start, *spec.shape[1:]), spec.dtype)


@functools.lru_cache(maxsize=256)  # the same calls come again and again: 15 µs of a small one
def plan(specs: tuple[Spec, ...], size: int, *, cutting: bool) -> tuple[Unit, ...]:
    """The buffers for these tensors."""
    buckets: dict[object, list[int]] = {}
    for place, spec in enumerate(specs):
        key = place if spec.nbytes >= _ALONE_NBYTES else spec.dtype
        buckets.setdefault(key, []).append(place)
    units = []
    for places in buckets.values():
        chosen = tuple(specs[place] for place in places)
        if cutting:
            bounds = [0]
            for rank in range(size):
                piece = sum(piece_spec(spec, size, rank).numel for spec in chosen)
                bounds.append(bounds[-1] + piece)
        else:
            total = sum(spec.numel for spec in chosen)
            bounds = [_even(total, size, rank, chosen[0].dtype) for rank in range(size + 1)]
        units.append(Unit(chosen[0].dtype, chosen, tuple(places), tuple(bounds)))
    return tuple(units)


def _even(total: int, size: int, rank: int, dtype: torch.dtype) -> int:
    """Where the share of a rank begins; on cache lines, so that no two ranks write to one."""
    line = max(1, 64 // dtype.itemsize)
    return min(total, -(-total // (size * line)) * line * rank)


def specs_of(tensors: Sequence[torch.Tensor]) -> tuple[Spec, ...]:
    """Shapes and dtypes."""
    return tuple(Spec(tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def flat_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor as a flat one that shares its memory, if it lies there in order."""
    return tensor.view(-1) if tensor.is_contiguous() else None


def packed(unit: Unit, tensors: Sequence[torch.Tensor], *, cutting: bool) -> torch.Tensor:
    """The buffer with the elements of the tensors: their own memory, if it is only one.

    Args:
        unit: The buffer.
        tensors: All of the call; detached.
        cutting: Whether the pieces of each rank lie together.
    """
    chosen = [tensors[place] for place in unit.places]
    if len(chosen) == 1:  # pieces along dimension 0 lie in order
        flat = flat_view(chosen[0])
        # Of one dimension, it would be a view, with gaps.
        return chosen[0].reshape(-1).contiguous() if flat is None else flat
    if not cutting:
        return torch.cat([tensor.reshape(-1) for tensor in chosen])
    size = len(unit.bounds) - 1
    parts = []
    for rank in range(size):
        for tensor, spec in zip(chosen, unit.specs, strict=True):
            start, stop = rows(spec.shape[0], size, rank)
            parts.append(tensor[start:stop].reshape(-1))
    return torch.cat(parts)


def unpacked(flat: torch.Tensor, specs: Sequence[Spec]) -> list[torch.Tensor]:
    """Views of a buffer as tensors of these shapes, one after another.

    Args:
        flat: The buffer, or the piece of a rank.
        specs: Shapes of what is in it, in order.
    """
    views = []
    start = 0
    for spec in specs:
        stop = start + spec.numel
        views.append(flat[start:stop].view(spec.shape))
        start = stop
    return views
