"""Shared memory: every byte lent once, given back, and gone with its process."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aiordt
from aiordt import _arena
from aiordt._arena import SEGMENT_NBYTES, Arena, Extents
from aiordt._config import Config
from aiordt._memory import view_memory
from aiordt._types import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK = settings(max_examples=100, deadline=None)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=80))
@QUICK
def test_extents_lend_every_byte_once(steps: list[tuple[bool, int]]) -> None:  # ARN-1
    extents = Extents(256)
    taken: list[tuple[int, int]] = []
    for give, number in steps:
        if give and taken:
            extents.give(*taken.pop(number % len(taken)))
            continue
        start = extents.take(number)
        if start is None:  # no gap is large enough
            edges = sorted([(0, 0), *taken, (256, 0)])
            gaps = [b[0] - a[0] - a[1] for a, b in itertools.pairwise(edges)]
            assert max(gaps) < number
            continue
        assert 0 <= start <= 256 - number
        assert all(start + number <= other or other + size <= start for other, size in taken)
        taken.append((start, number))
    assert extents.free == 256 - sum(size for _, size in taken)
    for each in taken:
        extents.give(*each)
    assert extents.unused
    assert extents.take(256) == 0, "all gaps grew together again"


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    yield made
    gc.collect()
    assert made.used_nbytes == 0, "every tensor gave its memory back"


def test_tensors_have_memory_of_their_own(arena: Arena) -> None:  # ARN-1
    shapes = [(1,), (7, 3), (1000,), (300, 300), (5 * MIB,), (20 * MIB,), (2, 0, 3), ()]
    tensors = [arena.empty(shape, torch.int32) for shape in shapes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert bool((tensor == number).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert (arena.locate(tensor.data_ptr()) > 0) is (tensor.numel() > 0)
    assert arena.locate(torch.empty(100).data_ptr()) == 0


def test_views_keep_the_memory(arena: Arena) -> None:  # ARN-1
    tensor = arena.empty((1000, 1000), torch.float32)
    view = tensor[10:20].T
    del tensor
    gc.collect()
    assert arena.used_nbytes >= 4_000_000
    other = arena.empty((1000, 1000), torch.float32)
    assert other.data_ptr() + other.nbytes <= view.data_ptr() or (
        view.data_ptr() + view.nbytes <= other.data_ptr()
    )
    del view, other


def test_memory_is_used_again(arena: Arena) -> None:
    for nbytes in (1000, MIB, 100 * MIB):
        first = arena.empty((nbytes,), torch.uint8).data_ptr()
        gc.collect()
        assert arena.empty((nbytes,), torch.uint8).data_ptr() == first


def test_small_ones_do_not_scatter_over_the_segments_of_large_ones(arena: Arena) -> None:
    large = arena.empty((SEGMENT_NBYTES + MIB,), torch.uint8)
    number = arena.locate(large.data_ptr())
    del large
    small = arena.empty((100,), torch.uint8)
    assert arena.locate(small.data_ptr()) != number


def test_exhausted_memory_is_an_error_and_the_next_call_works() -> None:
    arena = Arena(lambda: Config(arena_nbytes=8 * MIB))
    held = arena.empty((6 * MIB,), torch.uint8)
    with pytest.raises(aiordt.OutOfMemoryError, match="arena_nbytes") as info:
        arena.empty((6 * MIB,), torch.uint8)
    assert isinstance(info.value, MemoryError)
    del held
    assert arena.empty((6 * MIB,), torch.uint8).numel() == 6 * MIB
    with pytest.raises(aiordt.OutOfMemoryError):
        arena.empty((9 * MIB,), torch.uint8)
    assert arena.empty((8 * MIB,), torch.uint8).numel() == 8 * MIB, "what was idle made room"


def test_idle_memory_goes_back_to_the_system() -> None:
    arena = Arena(lambda: Config(pool_nbytes=100 * MIB))
    gone: list[int] = []
    arena.watch(gone.append)
    first, second = (arena.empty((80 * MIB,), torch.uint8) for _ in range(2))
    numbers = {arena.locate(tensor.data_ptr()) for tensor in (first, second)}
    del first
    gc.collect()
    assert gone == [], "80 MiB may be kept"
    del second
    gc.collect()
    assert len(gone) == 1
    assert set(gone) < numbers
    assert arena.segment(gone[0]) is None
    assert arena.nbytes == 80 * MIB
    third = arena.empty((90 * MIB,), torch.uint8)
    assert arena.locate(third.data_ptr()) not in numbers, "ARN-2: a number is used once"


def test_a_storage_that_dies_while_memory_is_being_taken(arena: Arena) -> None:  # ARN-1
    """The collector may run in the middle of `empty`, on the thread that holds the lock."""
    tensor = arena.empty((1000,), torch.uint8)
    with arena._lock:
        del tensor
        gc.collect()
    assert arena.used_nbytes == 0


def test_threads_may_take_and_give_at_once(arena: Arena) -> None:  # ARN-1
    errors: list[str] = []

    def work(number: int) -> None:
        for step in range(200):
            tensor = arena.empty((1 + 997 * (step % 13),), torch.uint8).fill_(number)
            other = arena.empty((64 * (1 + step % 7),), torch.uint8).fill_(number + 100)
            if not bool((tensor == number).all()) or not bool((other == number + 100).all()):
                errors.append(f"thread {number}, step {step}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert errors == []


def test_nobody_can_map_a_segment_to_write(arena: Arena) -> None:  # ARN-3
    tensor = arena.empty((MIB,), torch.uint8)
    segment = arena.segment(arena.locate(tensor.data_ptr()))
    assert segment is not None
    fd = os.dup(segment.fd)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, segment.nbytes)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    seen = mmap.mmap(fd, segment.nbytes, prot=mmap.PROT_READ)
    tensor.fill_(5)
    assert seen[:10] == bytes([5] * 10)
    seen.close()
    os.close(fd)


def names_in_shm() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*aiordt*")}  # noqa: S108


def test_a_killed_process_leaves_nothing_behind() -> None:
    before = names_in_shm()
    program = (
        "import os, signal, aiordt\n"
        "tensor = aiordt.zeros(1 << 20)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)  # noqa: S603
    assert names_in_shm() - before == set()


# --- the public names ---------------------------------------------------------------------------


def test_empty_and_zeros_are_as_torchs() -> None:
    assert aiordt.empty(2, 3).shape == (2, 3)
    assert aiordt.empty((2, 3)).shape == (2, 3)
    assert aiordt.empty([2, 3]).dtype == torch.get_default_dtype()
    assert aiordt.empty(torch.Size([4]), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert aiordt.empty(()).shape == ()
    assert aiordt.empty(3, device="cpu").device.type == "cpu"
    assert aiordt.empty(3, device="meta").device.type == "meta"
    zeros = aiordt.zeros(1000, dtype=torch.int64)
    assert not bool(zeros.any())
    zeros.fill_(3)
    del zeros
    assert not bool(aiordt.zeros(1000, dtype=torch.int64).any()), "also where memory is used again"


@pytest.mark.parametrize("shape", [(-1,), ("3",), (2.0,), ((2, -3),)])
def test_what_is_no_shape_is_refused(shape: tuple[object, ...]) -> None:
    with pytest.raises(aiordt.UsageError, match="shape"):
        aiordt.empty(*shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "like",
    [
        torch.zeros(3, 4),
        torch.zeros(3, 4, dtype=torch.float64).T,
        torch.zeros(2, 3, 4).permute(2, 0, 1)[1:],
        torch.zeros(1, dtype=torch.bool).expand(5),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(0, 3),
    ],
)
def test_empty_like_is_as_torchs(like: torch.Tensor) -> None:
    made = aiordt.empty_like(like)
    wanted = torch.empty_like(like.detach())
    assert (made.shape, made.dtype, made.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert type(made) is torch.Tensor
    assert not made.requires_grad
    assert aiordt.empty_like(like, dtype=torch.int8).dtype == torch.int8
    assert made.numel() == 0 or _arena.arena.locate(made.data_ptr()) > 0


def test_shared_memory_is_plain_memory() -> None:
    tensor = aiordt.empty(1000, dtype=torch.uint8)
    tensor.copy_(torch.arange(1000) % 256)
    assert bytes(view_memory(tensor.data_ptr(), 1000)) == bytes(n % 256 for n in range(1000))
    assert Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:aiordt")
