"""Which tensors share memory, against what their elements' addresses say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiordt._ties import Extent, contiguous_stride, groups, is_dense, overlapping, twins
from tests.unit.test_memory import tensors

BASE = 1 << 20


def bytes_of(extent: Extent) -> set[int]:
    """Addresses of all bytes of all elements."""
    starts = {extent.address}
    for size, step in zip(extent.shape, extent.stride, strict=True):
        starts = {start + i * step * extent.itemsize for start in starts for i in range(size)}
    return {start + byte for start in starts for byte in range(extent.itemsize)}


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Tensors in a small range of addresses, so that many overlap."""
    found = []
    for _ in range(draw(st.integers(1, 7))):
        tensor = draw(tensors().filter(lambda tensor: tensor.numel() > 0))
        itemsize = draw(st.sampled_from([1, 2, 4, 16]))
        address = BASE + draw(st.integers(0, 60))
        if draw(st.booleans()):
            address -= address % itemsize
        found.append(Extent(address, tuple(tensor.shape), tensor.stride(), itemsize))
    return found


@settings(max_examples=500, deadline=None)
@given(extents())
def test_groups_against_sets_of_bytes(some: list[Extent]) -> None:
    content = [bytes_of(extent) for extent in some]
    found = groups(enumerate(some))
    taken = [place for group in found for place in group.members]
    assert len(taken) == len(set(taken))
    for group in found:
        whole: set[int] = set().union(*(content[place] for place in group.members))
        low, high = min(whole), max(whole) + 1
        assert group.address % 16 == 0
        assert low - 16 < group.address <= low
        assert group.address + group.nbytes == high
        assert whole == set(range(low, high))  # TIE-1: one run, and members fill it
        assert len(group.members) > 1
        position = low
        for piece in group.pieces:  # TIE-2
            assert piece.address == position
            assert piece.nbytes > 0
            assert set(range(position, position + piece.nbytes)) <= content[piece.member]
            position += piece.nbytes
        assert position == high
        reached = content[group.pieces[0].member]  # TIE-1: connected by shared bytes
        rest = set(group.members)
        while touching := {place for place in rest if content[place] & reached}:
            rest -= touching
            reached = reached.union(*(content[place] for place in touching))
        assert not rest
    aligned = [extent.address % extent.itemsize == 0 for extent in some]
    dense = [is_dense(extent.shape, extent.stride) for extent in some]
    of = {place: number for number, group in enumerate(found) for place in group.members}
    for one in range(len(some)):
        for other in range(one):
            if all((dense[one], dense[other], aligned[one], aligned[other])):
                shared = bool(content[one] & content[other])
                assert not shared or (one in of and of[one] == of.get(other))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12))
def test_overlapping_spans(rows: list[tuple[int, int]]) -> None:
    wanted = {
        one
        for one, (a, n) in enumerate(rows)
        if any(a < b + m and b < a + n for two, (b, m) in enumerate(rows) if one != two)
    }
    found = overlapping([a for a, _ in rows], [n for _, n in rows])
    assert len(found) == len(set(found))
    assert set(found) == wanted


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_dense_tensors_are_those_that_pytorch_calls_so(tensor: torch.Tensor) -> None:
    if tensor.numel() == 0:
        return
    extent = Extent(0, tuple(tensor.shape), tensor.stride(), 1)
    whole = bytes_of(extent)
    once = tensor
    for dim, step in enumerate(tensor.stride()):
        once = once.narrow(dim, 0, 1) if step == 0 else once
    fills = whole == set(range(max(whole) + 1)) and len(whole) == once.numel()
    assert is_dense(extent.shape, extent.stride) == fills
    assert (
        contiguous_stride(tensor.shape)
        == tensor.contiguous().clone(memory_format=torch.contiguous_format).stride()
        or 1 in tensor.shape
    )


@pytest.mark.parametrize("count", [2, 5])
def test_twins_are_equal_in_all(count: int) -> None:
    gapped = Extent(64, (3, 2), (8, 1), 4)
    rows = [gapped] * count + [Extent(64, (3, 2), (8, 2), 4), Extent(68, (3, 2), (8, 1), 4)]
    assert twins(enumerate(rows)) == [list(range(count))]
    assert groups(enumerate(rows)) == []


def test_a_chain_of_windows_is_one_group_and_moves_once() -> None:
    rows = [Extent(BASE + 64 * n, (32,), (1,), 4) for n in range(10_000)]
    (group,) = groups(enumerate(rows))
    assert group.nbytes == 64 * 9_999 + 128 == sum(piece.nbytes for piece in group.pieces)


def test_neighbours_are_not_tied() -> None:
    assert groups(enumerate([Extent(BASE, (4,), (1,), 4), Extent(BASE + 16, (4,), (1,), 4)])) == []
