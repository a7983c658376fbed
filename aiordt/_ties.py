"""Tensors that share memory: which of many do, and what to move so that they share it again.

Pure: numbers in, numbers out. Tensors are rows of a sequence and go by their place in it.

Invariants:
    TIE-1  Tensors of one group shared bytes where they were exported, directly or by way of
           others of the group; what was alone is in no group.
    TIE-2  The pieces of a group are all of its bytes, each once, and each lies in one tensor.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from aiordt._layout import span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: Groups begin at a multiple of the largest element's size, so that elements stay aligned.
_ALIGNMENT: Final = 16


class Extent(NamedTuple):
    """Where a tensor of at least one element lies.

    Attributes:
        address: Of its element 0.
        shape: Sizes, in elements.
        stride: Strides, in elements.
        itemsize: Bytes of an element.
    """

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int


class Piece(NamedTuple):
    """Bytes of a group that are moved as part of one tensor.

    Attributes:
        member: Which tensor.
        address: Of the first byte.
        nbytes: How many.
    """

    member: int
    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share one run of memory.

    Attributes:
        address: Where the run begins, rounded down to be aligned for any element.
        nbytes: From there to its end.
        members: Which tensors.
        pieces: What to move, in order of addresses.
    """

    address: int
    nbytes: int
    members: list[int]
    pieces: list[Piece]

    def renumbered(self, places: Mapping[int, int]) -> Group:
        """The same group, where tensors have other places."""
        return Group(
            self.address,
            self.nbytes,
            [places[member] for member in self.members],
            [piece._replace(member=places[piece.member]) for piece in self.pieces],
        )


def overlapping(addresses: Sequence[int], spans: Sequence[int]) -> list[int]:
    """Those whose span of bytes overlaps another's.

    Cost:
        ~0.1 µs each, 0.2 µs where they are not in the order of their addresses.
    """
    if len(addresses) < 2:  # the common pull: numpy would take 0.1 ms of it, cold
        return []
    starts = np.fromiter(addresses, dtype=np.int64, count=len(addresses))
    ends = starts + np.fromiter(spans, dtype=np.int64, count=len(spans))
    if (starts[1:] >= ends[:-1]).all():  # as they are in memory
        return []
    order = np.argsort(starts, kind="stable")
    joined = starts[order][1:] < np.maximum.accumulate(ends[order])[:-1]
    if not joined.any():
        return []
    found = np.zeros(len(order), dtype=bool)
    found[1:] |= joined
    found[:-1] |= joined
    places: list[int] = order[found].tolist()
    return places


def groups(extents: Iterable[tuple[int, Extent]]) -> list[Group]:
    """The groups among some tensors, each given with its place.

    A group is held together by dense tensors: those whose elements fill their span. Views with
    gaps belong to it if they lie within what those cover. Other views with gaps are in no
    group, even if they overlap: see `twins`.
    """
    dense: list[tuple[int, int, int]] = []  # address, end, place
    gapped: list[tuple[int, int, int]] = []
    for place, extent in extents:
        address, shape, stride, itemsize = extent
        if address % itemsize == 0:
            row = (address, address + span(shape, stride, itemsize), place)
            (dense if is_dense(shape, stride) else gapped).append(row)
    dense.sort()
    runs: list[list[tuple[int, int, int]]] = []
    ends: list[int] = []
    for row in dense:
        if runs and row[0] < ends[-1]:
            runs[-1].append(row)
            ends[-1] = max(ends[-1], row[1])
        else:
            runs.append([row])
            ends.append(row[1])
    members = [[place for _, _, place in run] for run in runs]
    starts = [run[0][0] for run in runs]
    for address, end, place in gapped:
        number = bisect_right(starts, address) - 1
        if number >= 0 and end <= ends[number]:
            members[number].append(place)
    return [
        _group(run, end, places)
        for run, end, places in zip(runs, ends, members, strict=True)
        if len(places) > 1
    ]


def _group(run: list[tuple[int, int, int]], end: int, members: list[int]) -> Group:
    first = position = run[0][0]
    pieces = []
    reach = run[0]
    coming = iter(run[1:])
    row = next(coming, None)
    while position < end:
        while row is not None and row[0] <= position:
            reach = max(reach, row, key=lambda row: row[1])
            row = next(coming, None)
        pieces.append(Piece(reach[2], position, reach[1] - position))
        position = reach[1]
    address = first - first % _ALIGNMENT
    return Group(address, end - address, members, pieces)


def twins(extents: Iterable[tuple[int, Extent]]) -> list[list[int]]:
    """Tensors that are the same elements in the same order."""
    same: dict[Extent, list[int]] = {}
    for place, extent in extents:
        same.setdefault(extent, []).append(place)
    return [places for places in same.values() if len(places) > 1]


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor's elements fill its span, each once (but for broadcast dimensions)."""
    step = 1
    for stride_, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and stride_:
            if stride_ != step:
                return False
            step *= size
    return True


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))
