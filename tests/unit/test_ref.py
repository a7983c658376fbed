"""A ref without Ray: what it says of its tensor, and that nobody can copy it uncounted."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import ray.cloudpickle
import torch

import aiordt
from aiordt import _wire
from aiordt._landing import Header
from aiordt._ref import TensorRef
from aiordt._types import DTYPE_CODES, Owner
from aiordt.abc import PeerAddress

OWNER = Owner("n" * 56, 7, "a" * 32, "Trainer")


def make_ref(tensor: torch.Tensor, *, index: int = 0, key: bytes = bytes(16)) -> TensorRef:
    address = PeerAddress("10.0.0.1", 1, bytes(16), 7, bytes(16), 0)
    header = Header(None, b"", address, OWNER, key, None)
    stride = None if tensor.is_contiguous() else tensor.stride()
    meta = _wire.TensorMeta(DTYPE_CODES[tensor.dtype], 0, tuple(tensor.shape), stride, 0)
    return TensorRef(header, index, _wire.pack_meta(meta), None, b"inline bytes")


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16).T, torch.tensor(1), torch.ones(0, 2)],
)
def test_a_ref_describes_its_tensor(tensor: torch.Tensor) -> None:
    ref = make_ref(tensor)
    assert (ref.shape, ref.dtype, ref.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert ref.nbytes == tensor.nbytes
    assert ref.owner is OWNER
    assert ref.transport is None
    assert "Trainer" in repr(ref)


def test_refs_compare_by_export_and_index() -> None:
    one, same = make_ref(torch.ones(1)), make_ref(torch.zeros(1))
    others = [make_ref(torch.ones(1), index=1), make_ref(torch.ones(1), key=b"k" * 16)]
    assert one == same
    assert hash(one) == hash(same)
    assert all(one != other for other in [*others, "a string", None])
    assert len({one, same, *others}) == 3


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
def test_copies_are_equal_and_released_apart(make_copy: Any) -> None:
    ref = make_ref(torch.ones(1))
    held = aiordt.stats().held_refs
    other = make_copy({"ref": ref})["ref"] if make_copy is copy.deepcopy else make_copy(ref)
    assert other is not ref
    assert other == ref
    assert aiordt.stats().held_refs == held + 1
    other.release()
    other.release()
    assert other.released
    assert not ref.released
    assert "released" in repr(other)


@pytest.mark.parametrize("pickler", [pickle, ray.cloudpickle], ids=["pickle", "cloudpickle"])
def test_uncounted_copies_are_refused(pickler: Any) -> None:  # LSE-3
    ref = make_ref(torch.ones(1))
    for value in (ref, {"nested": [ref]}, lambda: ref):
        if pickler is pickle and callable(value):
            continue
        with pytest.raises(aiordt.RefPicklingError, match="outside Ray's own serialization"):
            pickler.dumps(value)


def test_a_lease_cannot_be_written_to_the_wire() -> None:  # LSE-2
    marker = ray.ObjectRef.from_random()
    for message in (
        _wire.PullReply(marker),
        _wire.Seen([marker]),
        _wire.Pull([(marker, 0, None)], 1, []),
    ):
        with pytest.raises(TypeError, match="ObjectRef"):
            _wire.encode(_wire.KIND_NOTE, 0, message)
