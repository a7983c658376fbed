"""Slices of refs in a cluster: the bytes that move, lifetime, travel, owner's views."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import ray
import torch

import aiordt
from tests.support import MIB, arange, eventually

#: Method of `NodeActor` that exports by one transport, and that transport.
WAYS = [("make_cma", "cma"), ("make_tcp", "tcp")]

INDICES: dict[str, Any] = {
    "rows": slice(100, 300),
    "row": 7,
    "last_row": -1,
    "part_of_a_row": (3, slice(10, 500)),
    "columns": (slice(None), slice(0, 256)),
    "column": (..., 5),
    "every_other_row": slice(None, None, 2),
    "every_third_column": (slice(None), slice(1, None, 3)),
    "block": (slice(5, 900, 7), slice(100, 612)),
    "new_axis": (None, slice(0, 4), None),
    "element": (1, 2),
    "nothing": slice(3, 3),
    "all": ...,
}


def _matrix(_: Any) -> torch.Tensor:
    return torch.arange(1024 * 1024, dtype=torch.float32).view(1024, 1024)


async def _pull_counting(_: Any, refs: dict[str, aiordt.TensorRef]) -> dict[str, Any]:
    """Each slice's content, and the bytes that its pull moved."""
    found = {}
    for name, ref in refs.items():
        before = aiordt.stats().bytes_pulled
        tensor = await ref
        found[name] = tensor, aiordt.stats().bytes_pulled - before
    return found


@pytest.mark.parametrize(("make", "transport"), WAYS)
async def test_only_the_bytes_that_are_needed_move(nodes: Any, make: str, transport: str) -> None:
    a, b, _ = nodes
    whole = await getattr(a, make).remote(_matrix)
    assert whole.transport == transport
    refs = {name: whole[index] for name, index in INDICES.items()}
    found = await b.run.remote(_pull_counting, refs)
    for name, index in INDICES.items():
        wanted = _matrix(None)[index]
        got, moved = found[name]
        assert torch.equal(got, wanted), name
        assert got.is_contiguous() == wanted.clone().is_contiguous(), name
        assert moved == wanted.nbytes, name


async def test_slices_of_a_strided_tensor_and_of_a_slice(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: _matrix(_).t()[:, ::2])
    refs = {"slice": ref[5:50], "nested": ref[5:50][:, 3][::4], "element": ref[5][6]}
    wanted = _matrix(None).t()[:, ::2]
    found = await b.run.remote(_pull_counting, refs)
    assert torch.equal(found["slice"][0], wanted[5:50])
    assert torch.equal(found["nested"][0], wanted[5:50][:, 3][::4])
    assert found["element"][0] == wanted[5][6]
    assert [moved for _, moved in found.values()] == [
        45 * 512 * 4, len(wanted[5:50][:, 3][::4]) * 4, 4,
    ]  # fmt: skip


async def test_tiny_pieces_of_a_slice_are_packed_by_the_owner(nodes: Any) -> None:
    a, b, _ = nodes
    ref = (await a.make.remote(_matrix))[:, ::2]
    explained = await b.run.remote(lambda _, refs: aiordt.explain(refs[0]), [ref])
    assert explained.chosen == "tcp"
    (got,) = await b.pull.remote([ref])
    assert torch.equal(got, _matrix(None)[:, ::2])


async def test_slices_of_small_tensors_carry_their_own_bytes(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: torch.arange(3000.0).view(30, 100).t())
    row = ref[7, 3:]
    assert row.inline is not None
    assert len(row.inline) == 27 * 4
    (got,) = await b.pull.remote([row])
    assert torch.equal(got, torch.arange(3000.0).view(30, 100).t()[7, 3:])


async def test_a_slice_travels_and_holds_the_tensor(nodes: Any) -> None:
    a, b, _ = nodes
    holder = await a.make.remote(lambda node: node.kept.setdefault("w", arange(2 * MIB)))
    part = holder[100:200]
    sent = await b.run.remote(lambda node, refs: node.kept.setdefault("refs", refs), [part[1:]])
    assert sent[0] == holder[101:200]
    del holder, part, sent
    gc.collect()

    async def free(node: Any) -> bool:
        try:
            await aiordt.wait_tensor_freed(node.kept["w"], timeout=0.05)
        except TimeoutError:
            return False
        return True

    assert not await a.run.remote(free)
    got = await b.run.remote(lambda node: aiordt.get(node.kept["refs"]))
    assert torch.equal(got[0], arange(2 * MIB)[101:200])
    del got
    await b.run.remote(lambda node: node.kept.clear())
    await eventually(lambda: a.run.remote(free), what="the slice let go")


async def test_the_owner_gets_views_of_the_tensor_itself(nodes: Any) -> None:
    def make(node: Any) -> Any:
        node.kept["w"] = arange(2 * MIB).view(512, 1024)
        return node.kept["w"]

    async def write(node: Any, refs: Any) -> list[Any]:
        row, block = await aiordt.get(refs)
        row.fill_(-1)
        return [
            row.data_ptr() == node.kept["w"][3].data_ptr(),
            torch.equal(block, node.kept["w"][2:5, ::3]),
            node.kept["w"][3].tolist() == [-1.0] * 1024,
        ]

    a = nodes[0]
    ref = await a.make.remote(make)
    assert await a.run.remote(write, [ref[3], ref[2:5, ::3]]) == [True] * 3


async def test_slices_of_parameters_and_of_what_requires_grad(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: torch.nn.Parameter(arange(2 * MIB)))
    whole, part = await aiordt.get([ref, ref[:10]])
    assert type(whole) is torch.nn.Parameter
    assert type(part) is torch.Tensor
    assert part.requires_grad
    assert part.is_leaf


async def test_into_and_put_take_slices(nodes: Any) -> None:
    ref = await nodes[0].make.remote(_matrix)
    target = torch.zeros(1024, 2048)
    view = target[:, 1024:]
    got = await aiordt.get({"half": ref[512:]}, into={"half": view[:512]})
    assert got["half"].data_ptr() == view.data_ptr()
    assert torch.equal(target[:512, 1024:], _matrix(None)[512:])
    assert not target[:, :1024].any()
    assert not target[512:].any()
    boxed = ray.put({"row": ref[9]})
    assert torch.equal((await aiordt.get(boxed))["row"], _matrix(None)[9])
