"""Slices of refs: PyTorch's own basic indexing, and no byte more than it selects.

SLC-1: what a slice selects, its shape, its strides and its errors are those of the tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aiordt
from aiordt import _memory, _wire
from aiordt._landing import Header, land, unpack_inline
from aiordt._memory import Pool
from aiordt._ref import Lease, TensorRef
from aiordt._slices import view_of
from aiordt._types import DTYPE_CODES, Owner
from aiordt.abc import PeerAddress
from tests.unit.test_memory import check_arrived, read_part, steps, tensors

HEADER = Header(None, b"", PeerAddress("", 0, bytes(16), 0, b"", 0), Owner("", 0), bytes(16), None)
LEASE: Any = Lease.__new__(Lease)  # a marker is Ray's


def ref_to(tensor: torch.Tensor, *, flags: int = 0, inline: bool = False) -> TensorRef:
    stride = None if tensor.is_contiguous() else tensor.stride()
    address = 0 if inline else tensor.data_ptr()
    meta = _wire.TensorMeta(DTYPE_CODES[tensor.dtype], flags, tuple(tensor.shape), stride, address)
    data = _memory.raw_bytes(tensor) if inline else None
    return TensorRef(HEADER, 0, _wire.pack_meta(meta), None if inline else LEASE, data)


@st.composite
def indices(draw: st.DrawFn, ndim: int) -> Any:
    """Anything that basic indexing takes, in range or a little out of it."""
    bounds = st.none() | st.integers(-5, 5)
    item = st.integers(-4, 3) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))
    items: list[Any] = draw(st.lists(item | st.none(), max_size=ndim + 1))
    if draw(st.booleans()):
        items.insert(draw(st.integers(0, len(items))), Ellipsis)
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


def outcome(value: Any, index: Any) -> Any:
    """What indexing gives, or the type of its error."""
    try:
        return value[index]
    except (IndexError, ValueError) as exc:
        return type(exc)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_slices_of_slices_are_those_of_the_tensor(data: st.DataObject) -> None:  # SLC-1
    whole = data.draw(tensors())
    inline = data.draw(st.booleans())
    wanted, ref = whole, ref_to(whole, inline=inline)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(indices(wanted.ndim))
        sliced, found = outcome(wanted, index), outcome(ref, index)
        if isinstance(sliced, type):
            assert found is sliced
            return
        wanted, ref = sliced, found
        assert ref.shape == wanted.shape
    if ref.inline is not None:
        assert len(ref.inline) <= wanted.nbytes
        check_arrived(unpack_inline(ref, ref.inline), wanted)
        return
    landing = land(ref, Pool(0))
    assert landing.part.nbytes == _memory.in_memory_order(wanted).nbytes
    if wanted.numel():
        assert landing.part.address == wanted.data_ptr()
        read_part(landing.part)
    check_arrived(landing.finish(), wanted)
    local = view_of(whole, ref.meta)
    assert torch.equal(local, wanted)
    if wanted.numel():
        assert (local.data_ptr(), steps(local)) == (wanted.data_ptr(), steps(wanted))


@pytest.mark.parametrize(
    "index",
    [
        True, 1.0, "a", [0, 1], (0, [1]), torch.tensor(0), torch.tensor([True]), np.array([0]),
        np.array(0), slice(torch.tensor(1), None), slice(0, 1.5), (..., False),
    ],
    ids=repr,
)  # fmt: skip
def test_what_would_copy_is_refused(index: Any) -> None:
    with pytest.raises(aiordt.UsageError, match="await the ref and index the tensor") as info:
        _ = ref_to(torch.ones(3, 4))[index]
    assert isinstance(info.value, TypeError)


def test_numpy_integers_index_as_integers() -> None:
    ref = ref_to(torch.ones(3, 4))
    assert ref[np.int64(1), : np.uint8(2)] == ref[1, :2]


def test_refs_compare_and_hash_by_view() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    ref = ref_to(tensor)
    assert ref == ref[:] == ref[...] == ref[0:3, -4:]
    assert ref[1] == ref[1:][0] == ref[-2]
    assert len({ref, ref[...], ref[0], ref[0, :], ref[1], ref[:, 0], ref[0:1]}) == 5
    assert ref[0] != ref[1]


def test_a_slice_of_a_parameter_is_a_plain_tensor() -> None:
    flags = _wire.FLAG_PARAMETER | _wire.FLAG_REQUIRES_GRAD
    ref = ref_to(torch.ones(3, 4), flags=flags)
    for sliced in (ref[0], ref[:], ref[...]):
        assert sliced.meta.flags == _wire.FLAG_REQUIRES_GRAD
        assert sliced != ref


def test_a_released_ref_has_no_slices_and_its_slices_live_on() -> None:
    ref = ref_to(torch.ones(3, 4))
    row = ref[0]
    ref.release()
    assert not row.released
    with pytest.raises(aiordt.TensorFreedError):
        _ = ref[0]


def test_a_ref_is_not_iterable() -> None:
    with pytest.raises(TypeError):
        iter(ref_to(torch.ones(3)))


def test_a_slice_is_little_longer_on_the_wire() -> None:
    ref = ref_to(torch.empty(64, 64, 64, dtype=torch.uint8))
    assert len(ref[3:, ::5, 7]._packed) - len(ref._packed) <= 64
