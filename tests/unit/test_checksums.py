"""Checksums: blocks, spans, and what an owner says of what others have received."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiordt import _checksums, _integrity
from aiordt._errors import AiordtError, InvalidValueError, ProtocolViolationError, TensorFreedError
from aiordt._integrity import GARBLED, INTACT, OVERWRITTEN, Checks
from aiordt._layout import Cut
from aiordt._memory import in_memory_order, raw_bytes, view_memory
from aiordt._progress import Workers
from aiordt._registry import Registry
from aiordt._types import DTYPE_CODES
from aiordt._wire import pack_items
from aiordt.abc import TransportMessage

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 16


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """So that small tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checksums, "BLOCK_NBYTES", _BLOCK)
        yield


# --- the core ----------------------------------------------------------------------------------


@given(st.binary(max_size=100))
def test_kept_sums_answer_for_the_whole(data: bytes) -> None:
    sums = _checksums.block_sums(memoryview(data))
    assert len(sums) == -(-len(data) // _BLOCK) * _checksums.SUM_NBYTES
    assert _checksums.joint_sum(sums) == _checksums.sum_of(memoryview(data))


@given(st.binary(min_size=1, max_size=100), st.data())
def test_no_change_of_a_byte_goes_unseen(data: bytes, more: st.DataObject) -> None:
    place = more.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[place] ^= 1 << more.draw(st.integers(0, 7))
    assert _checksums.sum_of(memoryview(changed)) != _checksums.sum_of(memoryview(data))


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_only_the_same_bytes_have_the_same_sum(one: bytes, other: bytes) -> None:
    same = _checksums.sum_of(memoryview(one)) == _checksums.sum_of(memoryview(other))
    assert same == (one == other)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_part_is_intact_as_long_as_its_blocks_are(data: bytes, more: st.DataObject) -> None:
    start = more.draw(st.integers(0, len(data) - 1))
    nbytes = more.draw(st.integers(1, len(data) - start))
    place = more.draw(st.integers(0, len(data) - 1))
    sums = _checksums.block_sums(memoryview(data))
    assert _checksums.intact(sums, memoryview(data), start, nbytes)
    changed = bytearray(data)
    changed[place] ^= 1
    touched = start // _BLOCK <= place // _BLOCK <= (start + nbytes - 1) // _BLOCK
    assert _checksums.intact(sums, memoryview(changed), start, nbytes) is not touched


# --- an owner ----------------------------------------------------------------------------------


class Owner:
    """An export with checksums, and the questions that a consumer asks about it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.workers = Workers("test", 1)
        self.registry = Registry(self.workers)
        nobody: Any = None  # as an owner it asks no other process
        self.checks = Checks(nobody, self.registry, nobody, nobody, self.workers)
        self.tensors = tensors

    async def export(self) -> bytes:
        export = self.registry.begin(self.tensors, "a test")
        export.sums = await self.checks.sums_of(self.tensors)
        self.leases = [object() for _ in export.groups]
        self.registry.commit(export, self.leases)
        return export.key

    async def ask(self, *asked: tuple[bytes, int, Cut | None, bytes]) -> list[int]:
        items = [(key, index, cut) for key, index, cut, _ in asked]
        received = [data for *_, data in asked]
        sums = [_checksums.sum_of(memoryview(data)) for data in received]
        body = msgpack.packb((pack_items(items), list(map(len, received)), sums))
        reply = await self.checks.serve(TransportMessage(_integrity.NAME, body), bytes(16))
        assert isinstance(reply, TransportMessage)
        return list(reply.body)

    def close(self) -> None:
        self.workers.close()


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any strides."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.uint8, torch.float32, torch.int16]))
    numel = torch.Size(shape).numel()
    base = torch.arange(2 * numel).to(dtype).view(*shape, 2)
    tensor = base[..., 0] if draw(st.booleans()) else base[..., 0].contiguous()
    return tensor.permute(draw(st.permutations(range(len(shape)))))


def cut_of(tensor: torch.Tensor, view: torch.Tensor, dtype: torch.dtype | None = None) -> Cut:
    source = in_memory_order(view)
    code = None if dtype is None else DTYPE_CODES[dtype]
    offset = view.data_ptr() - tensor.data_ptr()
    return Cut(offset, tuple(source.shape), source.stride(), view.itemsize, code)


def flip(tensor: torch.Tensor, number: int) -> None:
    """Change the first byte of an element, by its place in memory."""
    source = in_memory_order(tensor)
    place = tuple(map(int, np.unravel_index(number, tuple(source.shape))))
    view_memory(source[place].data_ptr(), 1, writable=True)[0] ^= 1


@given(layouts(), st.data())
def test_what_an_owner_says(tensor: torch.Tensor, more: st.DataObject) -> None:  # SUM-1, SUM-3
    """Of any part of any tensor, with any one byte changed there, on the way, or nowhere."""
    view = tensor
    for dim, size in enumerate(tensor.shape):
        start = more.draw(st.integers(0, size - 1))
        view = view.narrow(dim, start, more.draw(st.integers(1, size - start)))
    fits = tensor.is_contiguous() and view is tensor
    cut = None if fits and more.draw(st.booleans()) else cut_of(tensor, view)
    received = bytearray(raw_bytes(in_memory_order(view).contiguous()))
    element = more.draw(st.none() | st.integers(0, tensor.numel() - 1))
    garbled = more.draw(st.booleans())

    async def main() -> list[int]:
        owner = Owner([tensor])
        try:
            key = await owner.export()
            if element is not None:
                flip(tensor, element)
            if garbled:
                received[more.draw(st.integers(0, len(received) - 1))] ^= 1
            return await owner.ask((key, 0, cut, bytes(received)))
        finally:
            owner.close()

    (verdict,) = asyncio.run(main())
    first, last = 0, tensor.nbytes - 1
    if tensor.is_contiguous() and cut is not None:
        first, last = cut.offset, cut.offset + cut.span - 1
    place = None if element is None else element * tensor.itemsize // _BLOCK
    written = place is not None and first // _BLOCK <= place <= last // _BLOCK
    whole = cut is None or _integrity.is_whole(tensor, cut)
    if written and whole and not garbled:
        assert verdict == INTACT, "it came before that"
    elif written:
        assert verdict == OVERWRITTEN
    else:
        assert verdict == (GARBLED if garbled else INTACT)


@given(layouts(), st.data())
def test_what_is_taken_for_the_whole_is_the_whole(
    tensor: torch.Tensor, more: st.DataObject
) -> None:
    view = tensor
    for dim, size in enumerate(tensor.shape):
        start = more.draw(st.integers(0, size - 1))
        view = view.narrow(dim, start, more.draw(st.integers(1, size - start)))
    packed = raw_bytes(in_memory_order(tensor).contiguous())
    if _integrity.is_whole(tensor, cut_of(tensor, view)):
        assert raw_bytes(in_memory_order(view).contiguous()) == packed
    assert _integrity.is_whole(tensor, cut_of(tensor, tensor))
    assert not _integrity.is_whole(tensor, cut_of(tensor, tensor, torch.float64))


async def test_what_its_owner_converts() -> None:
    tensor = torch.rand(40, 3)
    owner = Owner([tensor])
    key = await owner.export()
    cut = cut_of(tensor, tensor[5:9], torch.bfloat16)
    sent = raw_bytes(tensor[5:9].bfloat16())
    assert await owner.ask((key, 0, cut, sent), (key, 0, cut, b"\0" * len(sent))) == [
        INTACT,
        GARBLED,
    ]
    tensor[0] = 9  # in another block
    assert await owner.ask((key, 0, cut, sent)) == [INTACT]
    tensor[5] = 9
    assert await owner.ask((key, 0, cut, raw_bytes(tensor[5:9].bfloat16()))) == [OVERWRITTEN]
    owner.close()


async def test_several_exports_in_one_question() -> None:
    tensors = [torch.arange(n + 1, dtype=torch.uint8) for n in range(50)]
    owner = Owner(tensors)
    first, second = await owner.export(), await owner.export()
    tensors[7].fill_(99)
    rows = [(key, n, None, raw_bytes(tensors[n])) for n in range(50) for key in (first, second)]
    found = await owner.ask(*rows)
    assert [n for n, verdict in enumerate(found) if verdict] == [14, 15]
    assert set(found) == {INTACT, OVERWRITTEN}
    owner.close()


async def test_questions_that_cannot_be_answered() -> None:
    tensor = torch.arange(5, dtype=torch.uint8)
    owner = Owner([tensor])
    key = await owner.export()
    plain = owner.registry.begin([tensor], "a test")
    owner.registry.commit(plain, [object()])
    with pytest.raises(InvalidValueError, match="a test exported a tensor without checksums"):
        await owner.ask((plain.key, 0, None, b"x"))
    with pytest.raises(InvalidValueError, match="5 bytes there, not 4"):
        await owner.ask((key, 0, None, b"xxxx"))
    with pytest.raises(TensorFreedError):
        await owner.ask((b"?" * 16, 0, None, b"x"))
    item = pack_items([(key, 0, None)])
    bodies: tuple[Any, ...] = (7, (item, [], [b"x"]), (item, ["5"], [b"x"]))
    for body in (b"", b"\xc1", *map(msgpack.packb, bodies)):
        with pytest.raises(ProtocolViolationError):
            await owner.checks.serve(TransportMessage(_integrity.NAME, body), bytes(16))
    owner.close()


@given(
    st.recursive(
        st.none() | st.integers(-(2**63), 2**63) | st.binary(max_size=20) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    )
    | st.tuples(
        st.just(pack_items([(b"k" * 16, 0, None)])),
        st.lists(st.integers(-5, 5) | st.none(), max_size=2),
        st.lists(st.binary(max_size=9) | st.integers(-5, 5), max_size=2),
    )
)
def test_any_question_is_answered_or_refused(question: Any) -> None:  # WIRE-2
    async def main() -> None:
        owner = Owner([])
        try:
            with suppress(AiordtError):  # and nothing else
                message = TransportMessage(_integrity.NAME, msgpack.packb(question))
                await owner.checks.serve(message, bytes(16))
        finally:
            owner.close()

    asyncio.run(main())


async def test_sums_are_gone_with_their_export() -> None:
    owner = Owner([torch.arange(5)])
    key = await owner.export()
    owner.registry.drop(owner.leases)
    with pytest.raises(TensorFreedError):
        await owner.ask((key, 0, None, b"x"))
    owner.close()


def test_a_cut_of_other_elements_is_not_the_whole() -> None:
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4).t()
    cut = cut_of(tensor, tensor)
    assert _integrity.is_whole(tensor, cut)
    for other in ({"itemsize": 1}, {"offset": 4}, {"stride": (1, 3)}, {"dtype": 1}):
        assert not _integrity.is_whole(tensor, dataclasses.replace(cut, **other))
    flat = tensor.t()
    assert _integrity.is_whole(flat, cut), "as it lies"
    assert not _integrity.is_whole(flat, Cut(0, (4, 3), (1, 4), 4)), "all, in another order"
    assert not _integrity.is_whole(flat, dataclasses.replace(cut, offset=4))
