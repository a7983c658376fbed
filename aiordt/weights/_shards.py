"""Which part of a tensor a process has, and what must move for others to have other parts. Pure.

Every description comes down to boxes: ranges of indices along each dimension of the whole. What
a process has of a tensor that was split flat is a run of its elements, which is a few boxes.

Invariants:
    SHD-1  A plan writes every element of its target exactly once, and reads no other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from typing_extensions import override

from aiordt._errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_Ints: TypeAlias = tuple[int, ...]
#: A range of indices for each dimension: first, and one beyond the last.
Ranges: TypeAlias = tuple[tuple[int, int], ...]
_MAX_PLANS: Final = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """One of ``of`` pieces along a dimension, as ``torch.chunk`` makes them.

    All are ``ceil(size / of)`` long, but for the last ones, which may be shorter, or empty.

    Attributes:
        dim: The dimension; negative: counted from the last.
        index: Which piece, from 0.
        of: How many there are.
    """

    dim: int
    index: int
    of: int

    def __post_init__(self) -> None:
        _check_index(self)

    @override
    def __str__(self) -> str:
        return f"shard {self.index} of {self.of} along dimension {self.dim}"


@dataclass(frozen=True, slots=True)
class FlatShard:
    """One of ``of`` pieces of a tensor's elements, in C order: a tensor of one dimension.

    All have ``ceil(numel / of)`` elements, but for the last ones; these may be padded to that.

    Attributes:
        index: Which piece, from 0.
        of: How many there are.
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        _check_index(self)

    @override
    def __str__(self) -> str:
        return f"flat shard {self.index} of {self.of}"


def _check_index(shard: Shard | FlatShard) -> None:
    if not 0 <= shard.index < shard.of:
        raise InvalidValueError(f"{shard}: the index must be in 0..{shard.of - 1}")


#: Pieces of pieces, in this order; empty: all of the tensor.
Placement: TypeAlias = "tuple[Shard, ...] | tuple[FlatShard]"
#: What users may write for it.
AnyPlacement: TypeAlias = "Shard | FlatShard | Sequence[Shard] | Sequence[FlatShard] | None"


def placement(given: AnyPlacement) -> Placement:
    """A description, checked.

    Raises:
        InvalidTypeError: It is none.
        InvalidValueError: A flat shard is combined with others.
    """
    if given is None:
        return ()
    if isinstance(given, Shard):
        return (given,)
    if isinstance(given, FlatShard):
        return (given,)
    parts = tuple(given) if isinstance(given, tuple | list) else (given,)
    if len(parts) == 1 and isinstance(parts[0], FlatShard):
        return (parts[0],)
    if any(isinstance(part, FlatShard) for part in parts):
        raise InvalidValueError("a flat shard is of the whole tensor: it stands alone")
    shards = tuple(part for part in parts if isinstance(part, Shard))
    if len(shards) < len(parts):
        raise InvalidTypeError(
            f"a Shard, a FlatShard or a tuple of Shards is needed, not {given!r}"
        )
    return shards


def describe(where: Placement) -> str:
    """For messages."""
    return ", ".join(map(str, where)) or "all of it"


def chunk(size: int, index: int, of: int) -> tuple[int, int]:
    """The range that ``torch.chunk`` gives a piece."""
    step = -(-size // of)
    return min(index * step, size), min((index + 1) * step, size)


class Region(NamedTuple):
    """A box that a process has.

    Attributes:
        box: It, in indices of the whole.
        flat: Where its elements begin in a tensor of one dimension, one after the other; ``None``:
            the tensor has just this box.
    """

    box: Ranges
    flat: int | None

    @property
    def shape(self) -> _Ints:
        """Its sizes."""
        return tuple(stop - start for start, stop in self.box)


def regions(shape: _Ints, where: Placement) -> list[Region]:
    """What a process has of a tensor of this shape.

    Raises:
        InvalidValueError: The tensor has no such dimension.
    """
    first = where[0] if where else None
    if isinstance(first, FlatShard):
        start, stop = chunk(prod(shape), first.index, first.of)
        return [Region(box, flat - start) for box, flat in _run(shape, start, stop)]
    box = [(0, size) for size in shape]
    for shard in where:
        assert isinstance(shard, Shard)  # noqa: S101  (see `placement`)
        if not -len(shape) <= shard.dim < len(shape):
            raise InvalidValueError(f"{shard}: the tensor has {len(shape)} dimensions")
        start, stop = box[shard.dim]
        low, high = chunk(stop - start, shard.index, shard.of)
        box[shard.dim] = (start + low, start + high)
    return [Region(tuple(box), None)]


def _run(shape: _Ints, start: int, stop: int) -> Iterator[tuple[Ranges, int]]:
    """The boxes of a run of elements, and where each begins among all."""
    if start >= stop:
        return
    if not shape:
        yield (), start
        return
    inner = prod(shape[1:])
    first, after = divmod(start, inner)
    last, rest = divmod(stop, inner)
    if after or first == last:
        end = min(stop, (first + 1) * inner)
        for box, flat in _run(shape[1:], after, end - first * inner):
            yield ((first, first + 1), *box), first * inner + flat
        first += 1
        start = end
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:])), first * inner
        start = last * inner
    if start < stop and rest:
        for box, flat in _run(shape[1:], 0, rest):
            yield ((last, last + 1), *box), last * inner + flat


def local_shape(shape: _Ints, where: Placement) -> _Ints:
    """The shape of the tensor that a process has."""
    if where and isinstance(where[0], FlatShard):
        start, stop = chunk(prod(shape), where[0].index, where[0].of)
        return (stop - start,)
    return regions(shape, where)[0].shape


class Piece(NamedTuple):
    """Elements of a process's tensor.

    Attributes:
        flat: Where, in a tensor of one dimension, a box begins that they are in; ``None``: the
            tensor is that box.
        shape: Of that box.
        ranges: Theirs, in it.
    """

    flat: int | None
    shape: _Ints
    ranges: Ranges


class Move(NamedTuple):
    """What one process gets from one other.

    Attributes:
        sources: The parts that have it: any one of them will do.
        source: Where it is there.
        target: Where it goes here.
        shape: Its sizes.
    """

    sources: _Ints
    source: Piece
    target: Piece
    shape: _Ints


def common_shape(parts: Sequence[tuple[_Ints, Placement, _Ints | None]]) -> _Ints:
    """The shape of the whole.

    Args:
        parts: Of each part its own shape, what it is of the whole, and that one's shape, where it
            was given.

    Raises:
        InvalidValueError: Parts do not fit each other, or one is missing.
    """
    given = {whole for _, _, whole in parts if whole is not None}
    if len(given) > 1:
        raise InvalidValueError(f"its parts are of tensors of different shapes: {sorted(given)}")
    shape = given.pop() if given else _inferred(parts)
    for local, where, _ in parts:
        expected = local_shape(shape, where)
        padded = expected
        if where and isinstance(where[0], FlatShard):
            padded = (-(-prod(shape) // where[0].of),)
        if local not in {expected, padded}:
            raise InvalidValueError(
                f"{describe(where)} has the shape {local}; of a tensor {shape} it has {expected}"
            )
    return shape


def _inferred(parts: Sequence[tuple[_Ints, Placement, _Ints | None]]) -> _Ints:
    first, where, _ = parts[0]
    sizes = list(first)
    if where and isinstance(where[0], FlatShard):
        raise InvalidValueError("a flat shard does not say the shape of the whole: give shapes=")
    dims = [shard.dim % max(1, len(first)) for shard in where]
    if len(set(dims)) < len(dims):
        raise InvalidValueError(
            "a dimension that was split twice does not say its size: give shapes="
        )
    for position, dim in enumerate(dims):
        found: dict[int, int] = {}
        count = 0
        for local, other, _ in parts:
            shard = other[position] if position < len(other) else None
            if not isinstance(shard, Shard) or len(local) <= dim:
                raise InvalidValueError(
                    f"its parts are split in different ways: {describe(where)}, "
                    f"{describe(other)}; give shapes="
                )
            found[shard.index] = local[dim]
            count = shard.of
        absent = [str(Shard(dim, index, count)) for index in range(count) if index not in found]
        if absent:
            raise InvalidValueError(f"missing: {'; '.join(absent)}")
        sizes[dim] = sum(found.values())
    return tuple(sizes)


@functools.lru_cache(maxsize=_MAX_PLANS)
def plan(shape: _Ints, sources: tuple[Placement, ...], target: Placement) -> tuple[Move, ...]:
    """What moves so that a process has ``target``, from others that have ``sources``.

    Computed once for each combination.

    Raises:
        InvalidValueError: Sources overlap without being the same, or elements are in none.
    """
    boxes: dict[Ranges, list[tuple[int, int | None]]] = {}
    for number, where in enumerate(sources):
        for region in regions(shape, where):
            boxes.setdefault(region.box, []).append((number, region.flat))
    moves: list[Move] = []
    wanted = covered = 0
    for region in regions(shape, target):
        wanted += prod(region.shape)
        touched: list[Ranges] = []
        for box, holders in boxes.items():
            common = _common(box, region.box)
            if common is None:
                continue
            for other in touched:
                if _common(other, common) is not None:
                    _refuse_overlap(sources, boxes, other, box)
            touched.append(box)
            covered += prod(stop - start for start, stop in common)
            by_flat: dict[int | None, list[int]] = {}
            for number, flat in holders:
                by_flat.setdefault(flat, []).append(number)
            flat, numbers = next(iter(by_flat.items()))
            moves.append(
                Move(
                    tuple(numbers),
                    _piece(box, flat, common),
                    _piece(region.box, region.flat, common),
                    tuple(stop - start for start, stop in common),
                )
            )
    if covered < wanted:
        raise InvalidValueError(_absent(sources, wanted - covered, wanted))
    return tuple(moves)


def _common(one: Ranges, other: Ranges) -> Ranges | None:
    found = tuple(
        (max(start, low), min(stop, high))
        for (start, stop), (low, high) in zip(one, other, strict=True)
    )
    return None if any(start >= stop for start, stop in found) else found


def _piece(box: Ranges, flat: int | None, common: Ranges) -> Piece:
    return Piece(
        flat,
        tuple(stop - start for start, stop in box),
        tuple(
            (start - low, stop - low) for (start, stop), (low, _) in zip(common, box, strict=True)
        ),
    )


def _refuse_overlap(
    sources: Sequence[Placement],
    boxes: dict[Ranges, list[tuple[int, int | None]]],
    one: Ranges,
    other: Ranges,
) -> None:
    first, second = (describe(sources[boxes[box][0][0]]) for box in (one, other))
    raise InvalidValueError(f"two parts overlap: {first}, and {second}")


def _absent(sources: Sequence[Placement], count: int, wanted: int) -> str:
    """Which parts are missing, as far as that can be said."""
    absent: list[str] = []
    singles = [where[0] for where in sources if len(where) == 1]
    if singles and len(singles) == len(sources):
        first = singles[0]
        there = {part.index for part in singles if part.of == first.of}
        for index in range(first.of):
            if index not in there:
                shard = (
                    Shard(first.dim, index, first.of)
                    if isinstance(first, Shard)
                    else FlatShard(index, first.of)
                )
                absent.append(str(shard))
    have = "; ".join(map(describe, sources)) or "no part"
    which = f"missing: {'; '.join(absent)}" if absent else f"there is {have}"
    return f"{count} of {wanted} elements are in no part: {which}"
