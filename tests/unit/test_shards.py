"""Plans of resharding, against what numpy makes of the same parts."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aiordt
from aiordt.weights import FlatShard, Shard, _shards

if TYPE_CHECKING:
    from aiordt.weights._shards import Piece, Placement


def part(whole: np.ndarray[Any, Any], where: Placement) -> np.ndarray[Any, Any]:
    """What a process has of a whole: by torch.chunk, and nothing of the code under test."""
    tensor = torch.from_numpy(whole)
    for shard in where:
        if isinstance(shard, FlatShard):
            flat, step = tensor.reshape(-1), -(-tensor.numel() // shard.of)
            return flat[shard.index * step : (shard.index + 1) * step].numpy().copy()
        chunks = torch.chunk(tensor, shard.of, shard.dim)
        empty = tensor.narrow(shard.dim, 0, 0)
        tensor = chunks[shard.index] if shard.index < len(chunks) else empty
    return tensor.numpy().copy()


def at(array: np.ndarray[Any, Any], piece: Piece) -> np.ndarray[Any, Any]:
    if piece.flat is not None:
        array = array[piece.flat : piece.flat + prod(piece.shape)].reshape(piece.shape)
    index: Any = (*(slice(*each) for each in piece.ranges), ...)
    return array[index]


@st.composite
def layouts(draw: st.DrawFn, ndim: int) -> list[Placement]:
    """All the parts of one way to split a tensor."""
    kind = draw(st.sampled_from(["whole", "one", "two", "flat"] if ndim else ["whole", "flat"]))
    of = draw(st.integers(1, 5))
    if kind == "whole":
        return [()]
    if kind == "flat":
        return [(FlatShard(index, of),) for index in range(of)]
    dim = draw(st.integers(-ndim, ndim - 1))
    if kind == "one":
        return [(Shard(dim, index, of),) for index in range(of)]
    other, count = draw(st.integers(0, ndim - 1)), draw(st.integers(1, 3))
    return [(Shard(dim, i, of), Shard(other, j, count)) for i in range(of) for j in range(count)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_plan_writes_each_element_once_and_right(data: st.DataObject) -> None:  # SHD-1
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    whole = np.arange(1, prod(shape) + 1, dtype=np.int64).reshape(shape)
    sources = data.draw(layouts(len(shape)))
    if data.draw(st.booleans()):
        sources = [*sources, *sources]  # replicas
    parts = [part(whole, where) for where in sources]
    for where in data.draw(layouts(len(shape))):
        expected = part(whole, where)
        assert _shards.local_shape(shape, where) == expected.shape
        found = np.zeros(expected.shape, dtype=np.int64)
        for move in _shards.plan(shape, tuple(sources), where):
            for source in move.sources:
                read = at(parts[source], move.source)
                assert read.shape == move.shape
                assert np.array_equal(read, at(parts[move.sources[0]], move.source))
            written = at(found, move.target)
            assert not written.any(), "written twice"
            written[...] = at(parts[move.sources[0]], move.source)
        assert np.array_equal(found, expected)


def shapes_of(shape: tuple[int, ...], sources: list[Placement]) -> tuple[int, ...]:
    whole = np.zeros(shape)
    return _shards.common_shape([(part(whole, where).shape, where, None) for where in sources])


def test_the_shape_of_the_whole_is_found_out() -> None:
    assert shapes_of((10, 3), [(Shard(0, index, 4),) for index in range(4)]) == (10, 3)
    assert shapes_of((3, 10), [(Shard(-1, index, 4),) for index in range(4)]) == (3, 10)
    grid: list[Placement] = [(Shard(0, i, 2), Shard(1, j, 3)) for i in range(2) for j in range(3)]
    assert shapes_of((5, 7), grid) == (5, 7)
    with pytest.raises(aiordt.UsageError, match="shard 2 of 4 along dimension 0"):
        shapes_of((10, 3), [(Shard(0, index, 4),) for index in (0, 1, 3)])
    with pytest.raises(aiordt.UsageError, match="give shapes="):
        shapes_of((10,), [(FlatShard(0, 1),)])
    with pytest.raises(aiordt.UsageError, match="give shapes="):
        shapes_of((10,), [(Shard(0, 0, 2), Shard(0, 0, 2))])


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(aiordt.UsageError, match=r"has the shape \(4, 3\)"):
        _shards.common_shape([((4, 3), (Shard(0, 0, 2),), (10, 3))])
    padded = [((4,), (FlatShard(index, 3),), (10,)) for index in range(3)]
    assert _shards.common_shape(padded) == (10,), "the last is padded"
    with pytest.raises(aiordt.UsageError, match="different shapes"):
        _shards.common_shape([((4,), (), (4,)), ((5,), (), (5,))])


def test_missing_and_overlapping_parts_are_named() -> None:
    flat = tuple((FlatShard(index, 4),) for index in (0, 1, 3))
    with pytest.raises(aiordt.UsageError, match="missing: flat shard 2 of 4"):
        _shards.plan((10, 3), flat, ())
    assert _shards.plan((10, 3), flat, (FlatShard(3, 4),)), "what is missing is not needed here"
    halves: tuple[Placement, ...] = ((Shard(0, 0, 2),), (Shard(0, 0, 3),), (Shard(0, 1, 2),))
    with pytest.raises(aiordt.UsageError, match=r"overlap: shard 0 of 2.*, and shard 0 of 3"):
        _shards.plan((12,), halves, ())
    with pytest.raises(aiordt.UsageError, match="2 dimensions"):
        _shards.plan((3, 4), ((Shard(2, 0, 2),),), ())


def test_what_is_no_placement_is_refused() -> None:
    for wrong in ("rows", [1], (Shard(0, 0, 2), "x")):
        with pytest.raises(aiordt.UsageError, match="is needed"):
            _shards.placement(wrong)  # type: ignore[arg-type]
    with pytest.raises(aiordt.UsageError, match="stands alone"):
        _shards.placement((Shard(0, 0, 2), FlatShard(0, 2)))  # type: ignore[arg-type]
    for index, of in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(aiordt.UsageError):
            Shard(0, index, of)
        with pytest.raises(aiordt.UsageError):
            FlatShard(index, of)


def test_plans_are_made_once() -> None:
    sources = tuple((Shard(0, index, 8),) for index in range(8))
    first = _shards.plan((64, 3), sources, (Shard(1, 0, 3),))
    assert _shards.plan((64, 3), sources, (Shard(1, 0, 3),)) is first
    assert sum(prod(move.shape) for move in first) == 64
