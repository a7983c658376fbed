"""Receive memory that is lent and comes back, and the bytes behind a strided tensor."""

from __future__ import annotations

import ctypes
import gc
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiordt import _memory
from aiordt._landing import Header, land, unpack_inline
from aiordt._layout import runs
from aiordt._memory import Pool, block_nbytes, dense_stride
from aiordt._types import DTYPE_CODES, MIB, Owner
from aiordt._wire import TensorMeta
from aiordt.abc import PeerAddress
from aiordt.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiordt.abc import Part

QUICK = settings(max_examples=100, deadline=None)


# --- the pool -----------------------------------------------------------------------------------


def lent(pool: Pool, nbytes: int = MIB) -> torch.Tensor:
    return pool.empty((nbytes,), torch.uint8)


KEEPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "the tensor": lambda tensor: tensor,
    "a view": lambda tensor: tensor.view(2, -1),
    "a slice": lambda tensor: tensor[-1:],
    "another dtype": lambda tensor: tensor.view(torch.float32),
    "the storage": lambda tensor: tensor.untyped_storage(),
    "a typed alias": lambda tensor: torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage()
    ),
    "numpy": lambda tensor: tensor.numpy(),
    "a slice of numpy": lambda tensor: tensor.numpy()[::7],
    "detached": lambda tensor: tensor.detach(),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor.view(torch.float32)),
    "dlpack": lambda tensor: tensor.__dlpack__(),
    "an autograd graph": lambda tensor: (
        tensor.view(torch.float32)[:8].requires_grad_(True) * 2.0  # noqa: FBT003
    ),
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS.keys())
def test_a_block_returns_with_the_last_reference(keep: Callable[[torch.Tensor], Any]) -> None:
    pool = Pool(64 * MIB)  # MEM-1
    tensor = lent(pool)
    address = tensor.data_ptr()
    kept = keep(tensor)
    del tensor
    assert pool.idle_nbytes == 0, "MEM-1: the storage lives"
    other = lent(pool)
    assert other.data_ptr() != address, "MEM-1: lent to one storage at a time"
    del kept
    assert pool.idle_nbytes == MIB
    assert lent(pool).data_ptr() == address, "the warm block is used again"


def test_a_block_returns_from_a_garbage_cycle() -> None:  # MEM-1
    pool = Pool(64 * MIB)
    cycle: list[Any] = [lent(pool)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.idle_nbytes == MIB


def test_a_block_returns_from_another_thread() -> None:  # MEM-1
    pool = Pool(64 * MIB)
    holder = [lent(pool)]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert pool.idle_nbytes == MIB


def test_a_tray_returns_with_the_last_of_its_tensors() -> None:  # MEM-1
    pool = Pool(64 * MIB)
    buffer = pool.tray(MIB)
    assert buffer is not None
    some = [
        torch.frombuffer(buffer, dtype=torch.uint8, count=1000, offset=1000 * number)
        for number in range(3)
    ]
    del buffer
    address = some[0].data_ptr()
    while some:
        other = lent(pool)
        assert other.data_ptr() != address, "MEM-1: a tensor of the tray lives"
        del other
        some.pop()
    assert lent(pool).data_ptr() == address


@pytest.mark.parametrize("nbytes", [MIB - 1, 8 * MIB + 1])
def test_a_tray_is_as_large_as_what_the_pool_lends(nbytes: int) -> None:
    assert Pool(8 * MIB).tray(nbytes) is None


def test_many_threads_never_share_a_block() -> None:  # MEM-1
    pool = Pool(64 * MIB)
    wrong: list[str] = []

    def work(mark: int) -> None:
        for _ in range(200):
            tensor = lent(pool)
            tensor[::4096] = mark
            view = tensor[4096:]
            del tensor
            if not bool((view[::4096] == mark).all()):
                wrong.append(f"a block of thread {mark} was written by another")

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, "MEM-1"
    assert MIB <= pool.idle_nbytes <= 8 * MIB, "no more blocks than were ever lent at once"


def test_idle_memory_stays_under_the_limit() -> None:
    pool = Pool(4 * MIB)
    tensors = [lent(pool) for _ in range(10)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 10, "lending has no limit"
    tensors.clear()
    assert pool.idle_nbytes == 4 * MIB


@pytest.mark.parametrize("limit", [0, MIB - 1, 2 * MIB])
def test_what_does_not_fit_is_ordinary_memory(limit: int) -> None:
    pool = Pool(limit)
    tensor = pool.empty((limit + MIB,), torch.uint8)
    tensor.fill_(7)
    assert tensor.untyped_storage().nbytes() == limit + MIB
    del tensor
    assert pool.idle_nbytes == 0


def test_small_tensors_are_left_to_malloc() -> None:
    pool = Pool(64 * MIB)
    tensor = lent(pool, MIB - 1)
    tensor.resize_(4 * MIB)  # pool memory could not grow
    del tensor
    assert pool.idle_nbytes == 0


def test_a_closed_pool_keeps_nothing() -> None:
    pool = Pool(64 * MIB)
    early, late = lent(pool), lent(pool)
    del early
    assert pool.idle_nbytes == MIB
    pool.close()
    assert pool.idle_nbytes == 0
    late.fill_(3)  # what is lent stays good
    del late
    assert pool.idle_nbytes == 0
    assert lent(pool).numel() == MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex128])
def test_lent_tensors_are_ordinary(dtype: torch.dtype) -> None:
    pool = Pool(64 * MIB)
    shape = (3, MIB // dtype.itemsize, 1)
    tensor = pool.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    strided = pool.empty((3, MIB), dtype, (1, 3))
    assert strided.stride() == (1, 3)
    strided.zero_()
    assert not bool(strided.any())


def test_large_blocks_lie_on_huge_pages() -> None:
    pool = Pool(64 * MIB)
    assert lent(pool, 5 * MIB).data_ptr() % _memory.HUGE_PAGE == 0


@QUICK
@given(st.integers(1, 1 << 40))
def test_block_sizes_waste_at_most_a_quarter(nbytes: int) -> None:
    size = block_nbytes(nbytes)
    assert nbytes <= size
    assert size == MIB or size <= nbytes * 1.25
    assert size % 4096 == 0
    assert block_nbytes(size) == size


def test_the_pool_survives_the_collector_in_its_middle() -> None:  # MEM-1
    """A block may come back while `empty` runs: the collector may run at any allocation."""
    pool = Pool(256 * MIB)
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(100):
            cycle: list[Any] = [lent(pool)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    wait_until(lambda: pool.idle_nbytes >= MIB, what="the blocks of the cycles are back")
    assert lent(pool).numel() == MIB


# --- strides ------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Sliced, transposed, expanded, stepped and squeezed tensors of 0 to 4 dimensions."""
    shape = draw(st.lists(st.integers(0 if draw(st.booleans()) else 1, 4), max_size=4))
    numel = int(np.prod(shape, dtype=np.int64))
    tensor = torch.arange(numel, dtype=torch.int32).reshape(shape)
    for _ in range(draw(st.integers(0, 4))):
        ndim = tensor.ndim
        what = draw(st.sampled_from(["permute", "slice", "expand", "diagonal", "unsqueeze"]))
        if what == "permute":
            tensor = tensor.permute(draw(st.permutations(range(ndim))))
        elif what == "unsqueeze" and ndim < 5:
            tensor = tensor.unsqueeze(draw(st.integers(0, ndim)))
        elif what == "diagonal" and ndim >= 2:
            tensor = tensor.diagonal()
        elif what == "slice" and ndim:
            dim = draw(st.integers(0, ndim - 1))
            index: list[slice] = [slice(None)] * ndim
            start = draw(st.integers(0, 2))
            index[dim] = slice(start, None, draw(st.integers(1, 3)))
            tensor = tensor[tuple(index)]
        elif what == "expand" and ndim < 5:
            tensor = tensor.expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor


@dataclass
class Ref:
    """What the landing of a tensor must know of a ref."""

    meta: TensorMeta
    header: Header = field(
        default_factory=lambda: Header(
            None, b"", PeerAddress("", 0, bytes(16), 0, b"", 0), Owner("", 0), bytes(16), None
        )
    )
    index: int = 0
    inline: bytes | None = None
    cls: type[torch.Tensor] | None = None
    lease: None = None
    released: bool = False


def ref_to(tensor: torch.Tensor) -> Ref:
    stride = None if tensor.is_contiguous() else tensor.stride()
    code = DTYPE_CODES[tensor.dtype]
    return Ref(TensorMeta(code, 0, tuple(tensor.shape), stride, tensor.data_ptr()))


def read_part(part: Part) -> None:
    """What a one-sided transport does: run after run, into the target."""
    run_nbytes, offsets = part.runs()
    assert len(offsets) * run_nbytes == part.nbytes
    for number, offset in enumerate(offsets.tolist()):
        ctypes.memmove(part.target + number * run_nbytes, part.address + offset, run_nbytes)


@QUICK
@given(tensors())
def test_dense_strides_are_those_of_clone(tensor: torch.Tensor) -> None:
    assert dense_stride(tensor.shape, tensor.stride()) == tensor.clone().stride()


def steps(tensor: torch.Tensor) -> list[int]:
    """The strides that mean something: those of dimensions of more than one element."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check_arrived(arrived: torch.Tensor, tensor: torch.Tensor) -> None:
    wanted = tensor.clone()
    assert torch.equal(arrived, wanted)
    assert arrived.shape == wanted.shape
    if tensor.numel():
        assert steps(arrived) == steps(wanted)
    assert arrived.is_contiguous() == wanted.is_contiguous()
    assert not any(
        size > 1 and step == 0 for size, step in zip(arrived.shape, arrived.stride(), strict=True)
    ), "a private copy: no two elements share memory"


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_a_tensor_arrives_as_its_clone(tensor: torch.Tensor) -> None:
    """What is read, put together again, is equal to the clone in values and in strides."""
    ref = ref_to(tensor)
    landing = land(ref, Pool(0))
    assert landing.part.nbytes <= tensor.nbytes, "no byte travels twice"
    if tensor.numel():
        read_part(landing.part)
    check_arrived(landing.finish(), tensor)


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_an_inline_tensor_arrives_as_its_clone(tensor: torch.Tensor) -> None:
    check_arrived(unpack_inline(ref_to(tensor), _memory.raw_bytes(tensor)), tensor)


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_runs_are_the_bytes_that_a_served_transfer_sends(tensor: torch.Tensor) -> None:
    """One-sided and two-sided transports fill a target with the same bytes."""
    if tensor.numel() == 0:
        return
    landing = land(ref_to(tensor), Pool(0))
    read_part(landing.part)
    read = _memory.view_memory(landing.part.target, landing.part.nbytes)
    assert bytes(read) == _memory.raw_bytes(tensor)


@QUICK
@given(tensors(), tensors())
def test_into_a_tensor_of_any_layout(tensor: torch.Tensor, other: torch.Tensor) -> None:
    into = (
        torch.empty_strided(
            tensor.shape, dense_stride(other.shape, other.stride()), dtype=tensor.dtype
        )
        if other.shape == tensor.shape
        else torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(
            tuple(range(tensor.ndim))[::-1]
        )
    )
    landing = land(ref_to(tensor), Pool(0), into)
    if tensor.numel():
        read_part(landing.part)
    assert landing.finish() is into
    assert torch.equal(into, tensor)


@QUICK
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 40)), max_size=4),
    st.sampled_from([1, 2, 4, 8]),
)
def test_runs_against_numpy(dims: list[tuple[int, int]], itemsize: int) -> None:
    shape = [size for size, _ in dims]
    stride = [step for _, step in dims]
    run_nbytes, offsets = runs(shape, stride, itemsize)
    indices = np.indices(shape).reshape(len(shape), int(np.prod(shape)))
    starts = (indices * np.array(stride, dtype=np.int64)[:, None]).sum(axis=0) * itemsize
    wanted = (starts[:, None] + np.arange(itemsize)).reshape(-1)
    found = (offsets[:, None] + np.arange(run_nbytes)).reshape(-1)
    assert found.tolist() == wanted.tolist()


def test_runs_are_as_long_as_can_be() -> None:
    assert runs((4, 5, 6), (30, 6, 1), 4)[0] == 4 * 5 * 6 * 4
    assert runs((4, 5, 6), (60, 6, 1), 4)[0] == 5 * 6 * 4
    assert runs((4, 1, 6), (60, 999, 1), 4)[0] == 6 * 4
    assert len(runs((4, 5), (1, 4), 4)[1]) == 20
    assert runs((), (), 8) == (8, np.zeros(1, dtype=np.int64))


def test_an_expanded_tensor_moves_its_elements_once() -> None:
    tensor = torch.arange(5).expand(1000, 5)
    assert len(_memory.raw_bytes(tensor)) == 5 * 8


def test_memory_views_are_read_only_unless_asked() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    view = _memory.view_memory(tensor.data_ptr(), 4)
    with pytest.raises(TypeError):
        view[0] = 1
    _memory.view_memory(tensor.data_ptr(), 4, writable=True)[0] = 9
    assert tensor.tolist() == [9, 0, 0, 0]
    assert _memory.view_memory(0, 0).nbytes == 0
