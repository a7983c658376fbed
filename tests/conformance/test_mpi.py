"""The transport ``mpi`` keeps every promise of `aiordt.abc`, in processes with MPI of their own."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typing_extensions import override

from aiordt._errors import GroupError, TransferError, UnavailableError
from aiordt._exports import cut_out, sent_dtype
from aiordt._layout import Cut
from aiordt._types import DTYPE_CODES
from aiordt.abc import Part
from aiordt.testing import eventually
from aiordt.testing._process import _Half
from aiordt.transports import probe
from aiordt.transports.mpi import PIECE_NBYTES, Carrier, Way, pieces, ways

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = Path(__file__).with_name("mpi_joined.py")


@pytest.mark.skipif(not probe("mpi").usable, reason=f"mpi: {probe('mpi').reason}")
@pytest.mark.parametrize("suite", ["all", "huge"])
def test_conformance(suite: str) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(PROGRAM), suite],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr


def some_part(seed: int) -> tuple[torch.Tensor, Part, torch.Tensor]:
    """A tensor, a part of it to be read, and what is to arrive."""
    choose = random.Random(seed)  # noqa: S311
    shape = [choose.choice((1, 2, 3, 7, 40)) for _ in range(choose.randint(1, 4))]
    dtype = choose.choice((torch.uint8, torch.int32, torch.float64))
    whole = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    view = whole.permute(*choose.sample(range(whole.dim()), whole.dim()))
    for axis, size in enumerate(view.shape):
        view = view.narrow(axis, low := choose.randrange(size), choose.randint(1, size - low))
    code = choose.choice((None, None, torch.float32))
    wanted = view if code is None else view.to(code)
    offset = view.data_ptr() - whole.data_ptr()
    cut: Cut | None = Cut(
        offset,
        tuple(view.shape),
        view.stride(),
        whole.itemsize,
        None if code is None else DTYPE_CODES[code],
    )
    if view.shape == whole.shape and view.is_contiguous() and code is None:
        cut = None
    wanted = torch.frombuffer(bytearray(wanted.numpy().tobytes()), dtype=torch.uint8)
    target = torch.zeros_like(wanted)
    return whole, Part(b"key", seed, 0, target.data_ptr(), len(wanted), cut, tensor=target), wanted


def test_reads_are_cut_up_into_pieces() -> None:
    """Whatever is read, its pieces are what the owner gives out for them, end to end."""
    found = [some_part(seed) for seed in range(400)]
    for limit in (16, 1000, PIECE_NBYTES):
        for piece in pieces([part for _, part, _ in found], limit):
            assert piece.nbytes == sum(map(len, piece.targets)) <= limit
            for (_, index, cut), target in zip(piece.items, piece.targets, strict=True):
                view = cut_out(found[index][0], cut)
                sent = view.to(sent_dtype(view, cut)).reshape(-1)
                target[:] = sent.numpy().tobytes()
        for _, part, wanted in found:
            assert part.tensor is not None
            assert torch.equal(part.tensor, wanted), part.cut
            part.tensor.zero_()


class Slow(Carrier):
    """MPI that moves nothing until it is told to."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, Callable[[Exception | None], None]]] = []

    @override
    def carry(
        self,
        memory: torch.Tensor,
        other: int,
        tag: int,
        done: Callable[[Exception | None], None],
        *,
        sending: bool,
    ) -> None:
        self.pending.append((memory, done))


def test_a_tag_has_one_message_at_a_time() -> None:  # MPT-1
    way = Way(b"g", {}, Slow())
    taken = [way.take_tag() for _ in range(32_000)]
    way.give_tag(taken.pop(7))
    taken += [way.take_tag() for _ in range(32_767 - len(taken))]
    assert set(taken) == set(range(1, 32_768))
    with pytest.raises(GroupError, match="no tags left"):
        way.take_tag()


async def test_memory_that_mpi_has_is_not_used_again() -> None:  # MPT-2, OWN-1
    owner, reader = _Half(), _Half()
    tensor = torch.arange(2 * PIECE_NBYTES, dtype=torch.int32).view(torch.uint8)[:PIECE_NBYTES]
    export = owner.registry.begin([tensor], "test")
    owner.registry.commit(export, ["lease"])
    slow = Slow()
    way = Way(b"g", {owner.address.runtime_id: 0, reader.address.runtime_id: 1}, slow)
    ways.add(way)
    link = await reader.connect("mpi", owner.address)
    target = torch.zeros(PIECE_NBYTES, dtype=torch.uint8)
    part = Part(export.key, 0, 0, target.data_ptr(), PIECE_NBYTES)

    async def begin() -> tuple[asyncio.Task[None], list[Any]]:
        """A read, and both ends of its message."""
        before = len(slow.pending)
        task = asyncio.ensure_future(link.read([part]))
        await eventually(lambda: len(slow.pending) == before + 2, what="both ends are pending")
        return task, slow.pending[before:]

    first, stuck = await begin()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second, ends = await begin()
    addresses = [memory.data_ptr() for memory, _ in (*stuck, *ends)]
    assert len(set(addresses)) == 4, "none of them is in two transfers"
    ends[1][0].copy_(ends[0][0])
    for _, done in ends:
        done(None)
    await second
    assert torch.equal(target, tensor)
    target.zero_()
    for memory, done in stuck:
        memory.fill_(1)
        done(None)
    third, ends = await begin()
    assert not target.any()
    for _, done in ends:
        done(GroupError("it has ended"))
    with pytest.raises(TransferError, match="it has ended"):
        await third
    ways.remove(b"g")
    with pytest.raises(UnavailableError, match="in no group by MPI"):
        await link.read([part])
    await link.aclose()
    reader.close()
    owner.close()
