"""Receiving into the caller's tensors, and converting on the way.

INTO-1: nothing is written before all targets were found fit. INTO-2: targets share memory only
as the refs' tensors do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aiordt
from tests.support import MIB, arange

MAKERS = ["make_cma", "make_tcp"]
ROWS = MIB // 1024  # of 256 float32


def _grid(_: Any) -> torch.Tensor:
    return arange(MIB).view(ROWS, 256)


@pytest.mark.parametrize("make", MAKERS)
async def test_targets_of_any_layout_are_filled_and_kept(nodes: Any, make: str) -> None:
    refs = await getattr(nodes[0], make).remote(lambda _: {"a": _grid(_), "t": _grid(_).t()})
    wide = torch.full((ROWS, 1024), -1.0)
    into = {
        "contiguous": torch.zeros(ROWS, 256),
        "columns": wide[:, 256:512],
        "other_columns": wide[:, 512:1024:2],
        "transposed": torch.zeros(256, ROWS).t(),
        "parameter": torch.nn.Parameter(torch.zeros(ROWS, 256)),
        "into_transposed": torch.zeros(256, ROWS),
    }
    wanted = dict.fromkeys(into, refs["a"]) | {"into_transposed": refs["t"]}
    got = await aiordt.get(wanted, into=into)
    for key, target in into.items():
        assert got[key] is target, key
        expected = _grid(None).t() if key == "into_transposed" else _grid(None)
        assert torch.equal(target.detach(), expected), key
    assert (wide[:, :256] == -1).all()
    assert (wide[:, 513::2] == -1).all()


async def test_autograd_notices_and_leaves_may_be_filled(nodes: Any) -> None:
    ref = await nodes[0].make.remote(_grid)
    leaf = torch.zeros(ROWS, 256, requires_grad=True)
    saved = (leaf * leaf).sum()
    version = leaf._version
    assert await aiordt.get(ref, into=leaf) is leaf
    assert leaf.requires_grad
    assert leaf.is_leaf
    assert leaf._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(saved)
    strided = torch.zeros(ROWS, 512, requires_grad=True)
    with torch.no_grad():
        view = strided[:, ::2]
    version = strided._version
    await aiordt.get(ref, into=view)
    assert strided._version > version
    assert torch.equal(strided.detach()[:, ::2], _grid(None))


async def test_inference_tensors_may_be_filled(nodes: Any) -> None:
    ref = await nodes[0].make.remote(_grid)
    with torch.inference_mode():
        whole, wide = torch.zeros(ROWS, 256), torch.zeros(ROWS, 512)
        half = wide[:, 256:]
    await aiordt.get([ref, ref], into=[whole, half])
    assert torch.equal(whole, _grid(None))
    assert torch.equal(half, _grid(None))


async def test_values_by_value_and_ones_own_are_copied_in(nodes: Any) -> None:
    small = await nodes[0].make.remote(lambda _: torch.arange(6.0).view(2, 3))
    own = await aiordt.put(_grid(None))
    targets = [torch.zeros(3, 2).t(), torch.zeros(ROWS, 256)]
    got = await aiordt.get([small, own], into=targets)
    assert got[0] is targets[0]
    assert torch.equal(got[0], torch.arange(6.0).view(2, 3))
    assert torch.equal(targets[1], _grid(None))
    assert targets[1].data_ptr() != (await own).data_ptr()


WIDE = torch.zeros(ROWS, 512)
MISFITS: list[tuple[Any, str]] = [
    ({"a": torch.zeros(4)}, r"into\['a'\]: a tensor \(4,\)"),
    ({"a": torch.zeros(ROWS, 256, dtype=torch.int32)}, r"into\['a'\]: .* must be equal"),
    ({"a": torch.zeros(1).expand(ROWS, 256)}, r"into\['a'\]: an expanded tensor"),
    ({"a": torch.zeros(ROWS, 256, device="meta")}, r"into\['a'\]: a tensor on meta"),
    ({"a": torch.zeros(ROWS, 256).to_sparse()}, r"into\['a'\]: a tensor on cpu"),
    ({"a": 5}, r"into\['a'\] must be a tensor"),
    ({"a": WIDE[:, :256], "b": WIDE[:, 255:511]}, r"into\['a'\] and into\['b'\] share memory"),
    ({"a": WIDE[:, ::2], "b": WIDE[:, 256:]}, r"into\['[ab]'\] and into\['[ab]'\] share memory"),
    ({"a": WIDE[:, :256], "b": WIDE[:, :256]}, r"into\['a'\] and into\['b'\] share memory"),
]


@pytest.mark.parametrize(("bad", "words"), MISFITS)
async def test_one_misfit_and_nothing_is_written(nodes: Any, bad: Any, words: str) -> None:
    refs = await nodes[0].make.remote(  # INTO-1
        lambda _: {"first": _grid(_), "a": _grid(_) + 0, "b": _grid(_) + 1}
    )
    first = torch.full((ROWS, 256), -1.0)
    into = {"first": first, "a": torch.zeros(ROWS, 256), "b": torch.zeros(ROWS, 256)} | bad
    with pytest.raises(aiordt.UsageError, match=words):
        await aiordt.get(refs, into=into)
    assert (first == -1).all()


async def test_another_structure_is_refused(nodes: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: {"x": {"a": _grid(_)}, "l": [_grid(_) + 1]})
    fit = torch.zeros(ROWS, 256)
    for bad, words in [
        ({"x": {"a": fit}}, "into has"),
        ({"x": {"b": fit}, "l": [fit]}, r"into\['x'\] has"),
        ({"x": {"a": fit}, "l": []}, r"into\['l'\] has"),
    ]:
        with pytest.raises(aiordt.UsageError, match=words):
            await aiordt.get(refs, into=bad)


async def test_targets_may_share_memory_as_the_tensors_do(nodes: Any) -> None:  # INTO-2
    def make(_: Any) -> Any:
        base = _grid(_)
        return {"w": base, "tied": base.view(ROWS, 256), "rows": base[10:20], "t": base.t()}

    refs = await nodes[0].make.remote(make)
    base = torch.zeros(ROWS, 256)
    into = {"w": base, "tied": base[:], "rows": base[10:20], "t": base.t()}
    got = await aiordt.get(refs, into=into)
    assert torch.equal(base, _grid(None))
    assert all(got[key] is into[key] for key in into)
    apart = {"w": torch.zeros(ROWS, 256), "tied": torch.zeros(256, ROWS).t()}
    apart |= {"rows": torch.zeros(10, 256), "t": torch.zeros(256, ROWS)}
    got = await aiordt.get(refs, into=apart)
    for key, tensor in make(None).items():
        assert got[key] is apart[key]
        assert torch.equal(apart[key], tensor), key
    with pytest.raises(aiordt.UsageError, match="share memory"):
        await aiordt.get(refs, into=into | {"rows": base[11:21]})
    both = await aiordt.get([refs["w"], refs["w"]], into=[base, base])
    assert both[0] is both[1] is base


async def _pulled(_: Any, refs: Any, **options: Any) -> tuple[Any, int]:
    before = aiordt.stats().bytes_pulled
    got = await aiordt.get(refs, **options)
    return got, aiordt.stats().bytes_pulled - before


def _kinds(_: Any) -> dict[str, torch.Tensor]:
    return {
        "float": arange(2 * MIB),
        "strided": arange(2 * MIB).view(512, 1024)[:, :512].t(),
        "double": arange(2 * MIB, torch.float64),
        "half": arange(MIB, torch.float16),
        "int": arange(MIB, torch.int64),
        "complex": torch.complex(arange(MIB), arange(MIB)),
        "parameter": torch.nn.Parameter(arange(MIB)),
    }


@pytest.mark.parametrize("make", MAKERS)
async def test_dtype_converts_floats_before_sending_where_that_moves_less(
    nodes: Any, make: str
) -> None:
    a, b, _ = nodes
    refs = await getattr(a, make).remote(_kinds)
    got, moved = await b.run.remote(
        lambda node, refs: _pulled(node, refs, dtype=torch.bfloat16), refs
    )
    expected = 0
    for key, tensor in _kinds(None).items():
        same = key in {"int", "complex"}
        wanted = tensor if same else tensor.to(torch.bfloat16)
        assert got[key].dtype is wanted.dtype, key
        assert torch.equal(got[key], wanted), key
        assert got[key].stride() == tensor.clone().stride(), key
        sent = tensor if same or make == "make_cma" else wanted
        expected += sent.nbytes
    assert moved == expected
    assert type(got["parameter"]) is torch.nn.Parameter
    got, moved = await b.run.remote(
        lambda node, refs: _pulled(node, refs, dtype=torch.float64), {"f": refs["float"][10:20]}
    )
    assert torch.equal(got["f"], arange(2 * MIB).double()[10:20])
    assert moved == 40


async def test_dtype_must_be_one_that_floats_convert_to(nodes: Any) -> None:
    ref = await nodes[0].make.remote(_grid)
    wrong: list[Any] = [torch.int32, torch.bool, "float32"]
    for dtype in wrong:
        with pytest.raises(aiordt.UsageError, match="dtype"):
            await aiordt.get(ref, dtype=dtype)
    with pytest.raises(aiordt.UsageError, match="into= says"):
        await aiordt.get(ref, dtype=torch.float16, into=torch.zeros(ROWS, 256))
    complexes = await nodes[0].make.remote(lambda _: torch.complex(_grid(_), _grid(_)))
    assert (await aiordt.get(complexes, dtype=torch.complex128)).dtype is torch.complex128


async def test_a_tensor_without_elements_of_another_process(nodes: Any) -> None:
    """Where it does not travel by value, there is still nothing to ask its owner for."""
    ref = await nodes[0].make_tcp.remote(lambda _: torch.zeros(0, 3))
    target = torch.ones(0, 3)
    assert await aiordt.get(ref, into=target) is target
