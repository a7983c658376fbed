"""What channels are made of: frames, credit, items."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiordt._arena import arena
from aiordt._errors import ProtocolViolationError
from aiordt._memory import lend
from aiordt._wire import Sealer, pack_header
from aiordt.channels import _frames
from aiordt.channels._frames import Item, Parser, Place
from aiordt.channels._items import Packed, copy, on_memory, rebuilt
from aiordt.channels._ring import ITEM_COST, Ring

if TYPE_CHECKING:
    from aiordt.channels._ring import Slot

KIB = 1 << 10
KEY = bytes(range(32))
ITEM = Item(7, 64, ((0, 1, (2, 3), None), (1, 0, (), None)), b"rest", Place(1, 2, 3, 4096, b"key"))


def frames() -> list[bytes]:
    sealer = Sealer(KEY)
    long = ITEM._replace(rest=os.urandom(_frames.PIECE_NBYTES * 2 + 5))
    payloads = [*_frames.pack_item(ITEM), *_frames.pack_item(long), _frames.pack_end("why")]
    return [sealer.seal(payload) for payload in (*payloads, _frames.pack_credit([1, 2]))]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 700_000), min_size=1))
def test_frames_come_whole_however_they_are_cut(cuts: list[int]) -> None:
    parser, data = Parser(Sealer(KEY)), b"".join(frames())
    found = []
    while data:
        size = cuts.pop(0) if cuts else len(data)
        found += list(parser.feed(data[:size]))
        data = data[size:]
    kinds = [kind for kind, _ in found]
    assert kinds == [_frames.ITEM, _frames.MORE, _frames.MORE, _frames.ITEM, _frames.END,
                     _frames.CREDIT]  # fmt: skip
    assert _frames.unpack_item(found[0][1], b"") == ITEM
    before = b"".join(body for kind, body in found[:3] if kind == _frames.MORE)
    assert len(_frames.unpack_item(found[3][1], before).rest) == _frames.PIECE_NBYTES * 2 + 5
    assert _frames.unpack_numbers(found[5][1]) == [1, 2]


@pytest.mark.parametrize("change", ["flip", "repeat", "swap", "key"])
def test_altered_frames_are_refused(change: str) -> None:  # CHF-1
    first, second, *_ = frames()
    data = first + second
    if change == "flip":
        data = data[:-1] + bytes([data[-1] ^ 1])
    elif change == "repeat":
        data = first + first
    elif change == "swap":
        data = second + first
    parser = Parser(Sealer(KEY if change != "key" else bytes(32)))
    with pytest.raises(ProtocolViolationError):
        list(parser.feed(data))


def test_frames_that_are_none_are_refused() -> None:
    with pytest.raises(ProtocolViolationError):
        _frames.unpack_item(b"\xc1", b"")
    with pytest.raises(ProtocolViolationError):
        _frames.unpack_numbers(b"\x91\xa1x")
    with pytest.raises(ProtocolViolationError):
        list(Parser(Sealer(KEY)).feed(pack_header(1 << 30)))


def ring(capacity: int) -> Ring:
    return Ring(capacity, lambda _: b"", lambda _: None)


def test_credit_is_never_exceeded_but_by_a_single_item() -> None:  # CRD-1
    made = ring(100 * KIB)
    slots: list[Slot] = []
    while (slot := made.take(10 * KIB, 100)) is not None:
        slots.append(slot)
    assert len(slots) == 9
    assert made.used == 9 * (10 * KIB + 100 + ITEM_COST) <= 100 * KIB
    assert made.take(200 * KIB, 0) is None, "alone, or not at all"
    for slot in slots:
        made.give(slot)
    large = made.take(200 * KIB, 0)
    assert large is not None
    assert len(made.buffers) == 2
    assert made.take(1, 0) is None
    made.give(large)
    assert made.used == 0
    assert len(made.buffers) == 1, "its buffer went with it"
    nothing = made.take(0, 10)
    assert nothing is not None
    assert nothing.buffer is None
    made.close()
    assert not made.buffers


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40 * KIB), st.booleans()), max_size=60))
def test_places_never_overlap(steps: list[tuple[int, bool]]) -> None:  # CRD-2
    made = ring(100 * KIB)
    held: list[Slot] = []
    for nbytes, oldest in steps:
        slot = made.take(nbytes, 0)
        if slot is not None:
            for other in held:
                apart = slot.offset + slot.nbytes <= other.offset
                assert apart or other.offset + other.nbytes <= slot.offset
            held.append(slot)
        elif held:
            made.give(held.pop(0 if oldest else -1))


def test_an_item_that_is_not_in_its_buffer_is_refused() -> None:
    packed = Packed({"x": torch.ones(100)})
    memory = ctypes.create_string_buffer(1000)

    class Home:
        def take_back(self, block: object) -> None:
            """Nothing to do."""

    lent = lend(ctypes.addressof(memory), Home(), memory)
    assert len(on_memory(packed.metas, lent, 400)) == 1
    with pytest.raises(ProtocolViolationError):
        on_memory(packed.metas, lent, 399)
    with pytest.raises(ProtocolViolationError):
        on_memory([(200, 0, (1,), None)], lent, 399)


def test_tensors_of_all_layouts_go_in_and_out() -> None:
    base = torch.arange(60).to(torch.complex64).reshape(3, 4, 5) * 1j
    tree = {
        "plain": base,
        "t": base.permute(2, 0, 1),
        "conj": base.conj(),
        "slice": base[:, 1:3],
        "wide": base[:, :1].expand(3, 4, 5),
        "none": torch.empty(0, 7),
    }
    packed = Packed(tree)
    target = arena.empty((packed.nbytes + 256,), torch.uint8)
    copy(packed.pieces(target, 64))
    packed.lay_out(target, 64)

    class Home:
        def take_back(self, block: object) -> None:
            """Nothing to do."""

    lent = lend(target.data_ptr() + 64, Home(), target)
    found = rebuilt(packed.rest, packed.metas, on_memory(packed.metas, lent, packed.nbytes),
                    seen=True)  # fmt: skip
    for name, tensor in tree.items():
        assert torch.equal(found[name], tensor.resolve_conj()), name
        assert found[name].stride() == tensor.clone().stride(), name
