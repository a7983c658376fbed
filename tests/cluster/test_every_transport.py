"""What tensors may be, and what they may be received into, by every transport (scenarios: data,
buffers)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import aiordt
from aiordt._config import TRANSPORTS
from aiordt._types import DTYPE_CODES
from aiordt.transports import probe
from tests.support import ACROSS, MIB


def unusable(name: str) -> str:
    """Why a transport cannot be tested here; empty if it can."""
    found = probe(name)
    if not found.usable:
        return f"{name}: {found.reason}"
    return f"{name} between hosts: {found.reason}" if ACROSS and found.on_demand else ""


BY = [
    pytest.param(name, marks=pytest.mark.skipif(bool(unusable(name)), reason=unusable(name)))
    for name in TRANSPORTS
    if (name == ACROSS if ACROSS else name != "mpi")  # test_mpi_transport.py has that
]


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in shared memory, with the same strides if it is dense."""
    return aiordt.empty_like(tensor).copy_(tensor)


def pattern(numel: int, dtype: torch.dtype) -> torch.Tensor:
    nbytes = numel * dtype.itemsize
    data = torch.arange(nbytes, dtype=torch.int32).remainder(251).to(torch.uint8)
    if dtype is torch.bool:
        return data.remainder(2).bool()
    return data.view(dtype)


def every_dtype(node: Any) -> dict[str, torch.Tensor]:
    node.kept["t"] = {
        str(dtype): shared(pattern(24 * 1024, dtype).view(torch.uint8)).view(dtype)
        for dtype in DTYPE_CODES
    }
    kept: dict[str, torch.Tensor] = node.kept["t"]
    return kept


def every_layout(node: Any) -> dict[str, torch.Tensor]:
    cube = shared(pattern(40 * 50 * 60, torch.float32).view(40, 50, 60))
    row = shared(pattern(70_000, torch.float64))
    leaf = shared(torch.ones(200, 300)).requires_grad_()
    return {
        "whole": cube,
        "permuted": cube.permute(2, 0, 1),
        "inner": cube[3:30, 5:45, 7:50],
        "column": cube[:, :, 5],
        "every third": cube[::3],
        "expanded": row[:30_000].expand(4, 30_000),
        "scalar": row[9],
        "empty": cube[:, :0],
        "five": row[:5],
        "leaf": leaf,
        "parameter": torch.nn.Parameter(shared(torch.full((200, 300), 2.0))),
        "large": shared(pattern(20 * MIB, torch.uint8)),
    }


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert (got.shape, got.dtype, type(got)) == (wanted.shape, wanted.dtype, type(wanted)), what
    assert got.requires_grad == wanted.requires_grad, what
    assert torch.equal(as_bytes(got), as_bytes(wanted)), what


class Kept:
    """Stands for an actor here, to make the same tensors."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}


def moved(transport: str) -> int:
    entry = aiordt.stats().by_transport.get(transport)
    return 0 if entry is None else entry.nbytes


@pytest.mark.parametrize("transport", BY)
@pytest.mark.parametrize("make", [every_dtype, every_layout])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
async def test_data(nodes: Any, transport: str, make: Any) -> None:
    refs = await nodes[0].make.remote(make)
    wanted = make(Kept())
    before = moved(transport)
    for name, ref in refs.items():  # one by one, so that nothing is tied
        assert_same(await aiordt.get(ref, transport=transport), wanted[name], name)
    assert moved(transport) > before
    together = await aiordt.get(refs, transport=transport)
    for name, tensor in wanted.items():
        assert_same(together[name], tensor, name)


CUTS: dict[str, Any] = {
    "rows": slice(100, 300),
    "every second row": slice(None, None, 2),
    "block": (slice(50, 350), slice(20, 60)),
    "column": (slice(None), 7),
    "new axis": (None, slice(3, 9)),
    "last": -1,
}


def matrix(node: Any) -> torch.Tensor:
    return shared(pattern(400 * 500, torch.float32).view(400, 500))


@pytest.mark.parametrize("transport", BY)
async def test_slices_move_what_they_select(nodes: Any, transport: str) -> None:
    ref = await nodes[0].make.remote(matrix)
    wanted = matrix(None)
    for name, cut in CUTS.items():
        before = moved(transport)
        got = await aiordt.get(ref[cut], transport=transport)
        assert torch.equal(got, wanted[cut]), name
        assert moved(transport) - before == wanted[cut].nbytes, name
    before = moved(transport)
    got = await aiordt.get(ref[100:300][::2, 10:40][3], transport=transport)
    assert torch.equal(got, wanted[100:300][::2, 10:40][3])
    assert moved(transport) - before == 30 * 4


def targets_for(wanted: dict[str, torch.Tensor], *, plain: bool) -> dict[str, torch.Tensor]:
    """Zeros to receive into: contiguous ones, or such with a gap after each element."""
    return {
        name: torch.zeros_like(tensor.detach(), memory_format=torch.contiguous_format)
        if plain
        else torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
        for name, tensor in wanted.items()
    }


@pytest.mark.parametrize("transport", BY)
async def test_targets(nodes: Any, transport: str) -> None:
    refs = await nodes[0].make.remote(every_layout)
    wanted = every_layout(Kept())
    for plain in (True, False):
        targets = targets_for(wanted, plain=plain)
        got = await aiordt.get(refs, into=targets, transport=transport)
        for name, tensor in wanted.items():
            assert got[name] is targets[name]
            assert torch.equal(as_bytes(got[name]), as_bytes(tensor)), name


def state(node: Any) -> dict[str, torch.Tensor]:
    made = {f"layer{n}": shared(torch.full((70, 70), float(n))) for n in range(300)}
    made["tied"] = made["layer7"]
    made["transposed"] = made["layer8"].T
    made["tiny"] = shared(torch.arange(3))
    for number in range(100):
        made[f"odd{number}"] = shared(pattern(17_000 + number, torch.uint8))
    return made


@pytest.mark.parametrize("transport", BY)
async def test_a_state_dict(nodes: Any, transport: str) -> None:
    refs = await nodes[0].make.remote(state)
    wanted = state(None)
    before = moved(transport)
    got = await aiordt.get(refs, transport=transport)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
    assert got["tied"] is got["layer7"]
    assert got["transposed"].data_ptr() == got["layer8"].data_ptr()
    wanted_nbytes = 300 * 70 * 70 * 4 + sum(17_000 + number for number in range(100))
    assert moved(transport) - before == wanted_nbytes, "what is tied moves once"


@pytest.mark.parametrize("transport", BY)
async def test_nothing_is_written_between_targets(nodes: Any, transport: str) -> None:
    numel = 100_000  # 32 bytes short of where the next one begins, at the owner and here
    refs = await nodes[0].make.remote(
        lambda _: [shared(torch.full((numel,), number, dtype=torch.uint8)) for number in range(20)]
    )
    memory = torch.full((20, numel + 32), 99, dtype=torch.uint8)
    await aiordt.get(refs, into=[row[:numel] for row in memory], transport=transport)
    assert bool((memory[:, numel:] == 99).all())
    assert torch.equal(memory[:, 0], torch.arange(20, dtype=torch.uint8))


@pytest.mark.parametrize("transport", BY)
async def test_many_at_once(nodes: Any, transport: str) -> None:
    tree = await nodes[0].make.remote(state)
    refs = [ref for name, ref in tree.items() if name.startswith("layer")]
    pulls = [aiordt.get(ref, transport=transport) for ref in refs[:100]]
    for number, tensor in enumerate(await asyncio.gather(*pulls)):
        assert bool((tensor == number).all())
