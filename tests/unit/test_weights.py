"""Weights: the pure parts."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import aiordt
from aiordt._errors import ProtocolViolationError
from aiordt.abc import PeerAddress
from aiordt.weights._layout import Known, Laid
from aiordt.weights._names import Record, digest
from aiordt.weights._versions import Versions

READERS = st.integers(0, 3)
STEPS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 1)),
    st.tuples(st.just("fail"), st.integers(0, 1)),
    st.tuples(st.just("take"), READERS),
    st.tuples(st.just("done"), READERS),
    st.tuples(st.just("lost"), READERS),
)


@given(st.integers(2, 4), st.lists(STEPS, max_size=60))
def test_a_version_that_is_read_is_never_written(limit: int, steps: list[Any]) -> None:
    """WGT-1, WGT-2, WGT-3: against a model that knows what each reader has."""
    versions = Versions(limit)
    held: dict[int, tuple[int, Any]] = {}  # reader -> version and slot
    alive: set[int] = set()  # versions whose export is there
    newest = published = 0

    def end(slots_ended: list[Any], of: dict[int, int]) -> None:
        for slot in slots_ended:
            alive.remove(of[slot.number])  # once, and only what was there

    of: dict[int, int] = {}
    for what, which in steps:
        if what in {"publish", "fail"}:
            slot, ended = versions.begin(which)
            end(ended, of)
            if ended:
                newest = 0  # the newest made room, unread
            if slot is None:
                assert len({version for version, _ in held.values()}) == limit
                continue
            assert all(slot is not other for _, other in held.values())
            assert slot.layout == which
            assert len(versions.slots) <= limit
            if what == "fail":
                versions.abandon(slot)
                continue
            published += 1
            alive.add(published)
            end(versions.commit(slot, published), of)
            of[slot.number] = newest = published
        elif what == "take" and which not in held:
            slot = versions.take((b"%d" % which, 1), 0)
            assert (0 if slot is None else slot.version) == newest
            if slot is not None:
                held[which] = slot.version, slot
        elif what == "done":
            was, ended = versions.done((b"%d" % which, 1))
            assert was is (held.pop(which, None) is not None)
            end(ended, of)
        elif what == "lost":
            held.pop(which, None)
            end(versions.lost(b"%d" % which), of)
        assert alive == {version for version, _ in held.values()} | ({newest} - {0})
        assert all(slot.version == version for version, slot in held.values())


def test_a_reader_waits_for_what_is_later() -> None:
    versions = Versions(2)
    slot, _ = versions.begin("layout")
    assert slot is not None
    versions.commit(slot, 7)
    assert versions.take((b"reader", 1), 7) is None
    assert versions.take((b"reader", 1), 6) is slot
    assert versions.close() == []  # it is being read
    assert versions.take((b"reader", 2), 0) is None
    assert versions.done((b"reader", 1)) == (True, [slot])


def received(laid: Laid, buffers: list[torch.Tensor]) -> Any:
    laid.copier(buffers)()
    return Known.unpack(laid.describe(buffers)).rebuild(buffers)


def test_trees_arrive_as_they_are() -> None:
    weight, array = torch.arange(6.0).reshape(2, 3), np.arange(4)
    tree = {
        "w": weight,
        "again": [weight, (weight.t(), array)],
        7: OrderedDict(a=torch.tensor(3), b=torch.empty(0, 2)),
        "values": {"step": 3, "name": "x", "none": None, "lr": 0.5, "raw": b"\0", "on": True},
    }
    laid = Laid(tree)
    got = received(laid, laid.buffers())
    assert list(got) == list(tree)
    assert torch.equal(got["w"], weight)
    assert got["again"][0] is got["w"]
    transposed = got["again"][1][0]
    assert torch.equal(transposed, weight.t())
    assert transposed.untyped_storage().data_ptr() == got["w"].untyped_storage().data_ptr()
    assert type(got["again"][1]) is tuple
    assert torch.equal(got["again"][1][1], torch.from_numpy(array))
    assert type(got[7]) is OrderedDict
    assert got[7]["b"].shape == (0, 2)
    assert got["values"] == tree["values"]


def test_buffers_are_used_again_for_what_fits() -> None:
    def laid(**tree: Any) -> Laid:
        return Laid(tree)

    one = torch.zeros(8)
    first = laid(a=one, b=torch.zeros(8))
    assert first.signature == laid(a=torch.ones(8), b=torch.ones(8)).signature
    assert first.signature != laid(a=one, b=one.view(8)).signature  # they share memory
    assert first.signature != laid(a=torch.zeros(8), b=torch.zeros(2, 4)).signature
    assert first.signature != laid(a=torch.zeros(8), b=torch.zeros(8).bfloat16()).signature
    assert first.signature == laid(a=torch.zeros(8), b=torch.zeros(8), c=3).signature
    assert first.skeleton != laid(a=torch.zeros(8), b=torch.zeros(8), c=3).skeleton


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"a": [{1, 2}]}, r"\['a'\]\[0\] is a set"),
        ({(1, 2): torch.zeros(1)}, "keys must be str or int"),
        ({"a": torch.zeros(2).to_sparse()}, r"\['a'\].*layout"),
        ({"a": 1 << 70}, "out of bounds"),
        (torch.nn.Linear(1, 1), "is a Linear"),
    ],
)
def test_what_cannot_be_published(tree: Any, match: str) -> None:
    with pytest.raises(aiordt.UsageError, match=match):
        Laid(tree)


@given(st.binary(max_size=64))
def test_any_bytes_describe_a_tree_or_raise(data: bytes) -> None:
    for read in (lambda: Known.unpack(data).rebuild([]), lambda: Record.unpack(data)):
        with suppress(ProtocolViolationError):
            read()


def test_records_and_names() -> None:
    address = PeerAddress("10.0.0.1", 7, b"r" * 16, 3, b"h", 5)
    record = Record(4, b"t" * 16, address, aiordt.Owner("ab", 3, "cd", "Trainer"), closed=True)
    assert Record.unpack(record.pack()) == record
    names = {digest("a", "b"), digest("ab", ""), digest("", "ab"), digest("a", "b/1")}
    assert len(names) == 4
