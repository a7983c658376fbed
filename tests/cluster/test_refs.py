"""`TensorRef` as a value, and the data of every kind of tensor."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import ray
import ray.cloudpickle
import torch

import aiordt
from aiordt._types import DTYPES
from aiordt.testing._pair import sparse
from tests.support import MIB, arange

DTYPE_LIST = [dtype for dtype in DTYPES if dtype is not None]


async def test_copy_equality_and_hash(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: [arange(MIB), arange(MIB), torch.zeros(2)])
    same = copy.copy(refs[0])
    deep = copy.deepcopy({"r": refs[0]})["r"]
    assert same == refs[0] == deep
    assert len({refs[0], same, deep, refs[1], refs[2]}) == 3
    assert refs[0] != refs[1]
    assert refs[0] != "x"
    assert torch.equal(await deep, await same)
    assert {refs[0]: 1}[deep] == 1
    echoed = await b.run.remote(lambda _, refs: refs, refs)
    assert echoed == refs
    assert "tensor (262144,) float32, 1048576 bytes, owner NodeActor" in repr(refs[0])
    assert "inline" in repr(refs[2])


async def test_plain_pickle_and_closures_are_refused(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(MIB))
    for dumps in (pickle.dumps, ray.cloudpickle.dumps):
        with pytest.raises(aiordt.RefPicklingError, match="outside Ray's own serialization"):
            dumps(ref)
        with pytest.raises(aiordt.UsageError):
            dumps({"nested": [ref]})

    @ray.remote(num_cpus=0)
    def capture() -> Any:
        return ref

    with pytest.raises(pickle.PicklingError, match="argument"):
        capture.remote()


async def test_an_exception_with_a_ref_leaves_the_actor_usable(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: arange(MIB))

    async def fail(_: Any, refs: list[Any]) -> None:
        raise ValueError("holds", refs[0])

    with pytest.raises(ray.exceptions.RayTaskError):
        await b.run.remote(fail, [ref])
    assert torch.equal(await b.pull.remote(ref), arange(MIB))


@pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch says so of every complex32
@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
async def test_every_dtype(nodes: Any, dtype: torch.dtype) -> None:
    a, _, _ = nodes

    def make(_: Any) -> Any:
        raw = torch.arange(400_000, dtype=torch.int64).remainder(120).to(torch.uint8)
        raw = raw[: 400_000 - 400_000 % dtype.itemsize]
        if dtype is torch.bool:
            raw = raw.remainder(2)
        return {"large": raw.view(dtype), "small": raw[: 16 * dtype.itemsize].view(dtype)}

    refs = await a.make.remote(make)
    got, want = await aiordt.get(refs), make(None)
    for key in want:
        assert got[key].dtype is dtype
        assert refs[key].dtype is dtype
        assert torch.equal(got[key].view(torch.uint8), want[key].view(torch.uint8))


def _shapes(_: Any) -> dict[str, torch.Tensor]:
    base = torch.arange(1_200_000, dtype=torch.float32)
    grid = base.view(1000, 1200)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "transposed": grid.t(),
        "columns": grid[:, 100:150],
        "every_third": base[::3],
        "one_column": grid[:, 7],
        "permuted": base.view(100, 30, 400).permute(2, 0, 1),
        "permuted_slice": base.view(100, 30, 400).permute(2, 0, 1)[5:300, 3:],
        "expanded": base[:1200].expand(500, 1200),
        "expanded_inner": grid[:, :1].expand(1000, 600),
        "expanded_strided": grid[::2, ::3].unsqueeze(1).expand(500, 3, 400),
        "small_transposed": torch.arange(12.0).view(3, 4).t(),
        "small_expanded": torch.arange(3.0).expand(4, 3),
        "channels_last": base.view(10, 30, 40, 100).contiguous(memory_format=torch.channels_last),
        "ones_dims": base[:600_000].view(1, 600, 1, 1000).transpose(1, 3),
        "conjugated": torch.complex(grid, grid).conj(),
        "diagonal": grid[:1000, :1000].diagonal(),
        "overlapping": base.unfold(0, 100, 3)[:2000],
    }


@pytest.mark.parametrize("transport", ["make", "make_tcp", "make_cma"])
async def test_every_layout_arrives_as_clone_makes_it(nodes: Any, transport: str) -> None:
    refs = await getattr(nodes[0], transport).remote(_shapes)
    # One by one: in one call, those that share memory arrive sharing it.
    got, want = {name: await ref for name, ref in refs.items()}, _shapes(None)
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape == refs[name].shape, name
        assert torch.equal(got[name].resolve_conj(), tensor.resolve_conj()), name
        if not tensor.is_conj():
            assert got[name].stride() == tensor.clone().stride(), name


async def test_strided_pulls_move_only_what_is_needed(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make_cma.remote(
        lambda _: {k: v for k, v in _shapes(None).items() if k in {"columns", "expanded"}}
    )
    before = (await b.stats.remote()).bytes_pulled
    await b.pull.remote(refs)
    moved = (await b.stats.remote()).bytes_pulled - before
    assert moved == 1000 * 50 * 4 + 1200 * 4


async def test_a_tensor_of_tiny_pieces_is_packed_by_its_owner(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: torch.arange(4e6).view(2000, 2000)[:, ::2])
    explained = await b.run.remote(lambda _, refs: aiordt.explain(refs[0]), [ref])
    assert explained.chosen == "tcp"
    assert "packs" in explained.reasons["tcp"]
    (got,) = await b.pull.remote([ref])
    assert torch.equal(got, torch.arange(4e6).view(2000, 2000)[:, ::2])


async def test_same_ref_direct_and_through_an_object_ref(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: arange(MIB))
    boxed = ray.put([ref])

    async def both(_: Any, x: Any) -> tuple[bool, int]:
        before = aiordt.stats().bytes_pulled
        got = await aiordt.get(x)
        return got[0] is got[1][0], aiordt.stats().bytes_pulled - before

    assert await b.run.remote(both, [ref, boxed]) == (True, MIB)


async def test_requires_grad_and_parameters(nodes: Any) -> None:
    refs = await nodes[0].make.remote(
        lambda _: [
            torch.nn.Parameter(torch.ones(MIB)),
            torch.ones(MIB, requires_grad=True) * 2,
            torch.nn.Parameter(torch.ones(3), requires_grad=False),
            torch.ones(3, requires_grad=True),
        ]
    )
    got = await aiordt.get(refs)
    assert [type(t) for t in got] == [torch.nn.Parameter, torch.Tensor] * 2
    assert [t.requires_grad for t in got] == [True, True, False, True]
    assert all(t.is_leaf for t in got)


class Tagged(torch.Tensor):
    """A plain subclass."""


async def test_subclasses_keep_their_class(nodes: Any) -> None:
    (large, small) = await aiordt.get(
        await nodes[0].make.remote(
            lambda _: [torch.ones(MIB).as_subclass(Tagged), torch.ones(2).as_subclass(Tagged)]
        )
    )
    assert type(large) is Tagged
    assert type(small) is Tagged


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: torch.eye(3).to_sparse(), "to_dense"),
        (lambda _: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "int_repr"),
        (lambda _: torch.empty(5, device="meta"), "has none"),
        (lambda _: torch.empty(8, dtype=getattr(torch, "uint4")), "uint8"),  # noqa: B009,
    ],
    ids=["sparse", "quantized", "meta", "uint4"],
)
async def test_what_cannot_be_exported_is_refused_whole(nodes: Any, make: Any, words: str) -> None:
    a = nodes[0]
    with pytest.raises(aiordt.UsageError, match=words):
        await a.make.remote(lambda _: [arange(MIB), make(_)])
    assert (await a.stats.remote()).exports == 0


async def test_over_two_and_four_gib(nodes: Any) -> None:
    a, b, _ = nodes
    nbytes = (4 << 30) + 5
    marks = dict.fromkeys((0, (2 << 30) - 1, 2 << 30, 4 << 30, nbytes - 1), b"\x07")
    ref = await a.make.remote(lambda _: sparse(nbytes, marks))  # whose zeros take no memory

    async def check(_: Any, refs: list[Any]) -> tuple[int, list[int]]:
        tensor = await refs[0]
        places = [place + step for place in marks for step in (-1, 0, 1)]
        return tensor.numel(), [
            place for place in places if 0 <= place < nbytes and bool(tensor[place] == 7)
        ]

    numel, found = await b.run.remote(check, [ref])
    assert numel == nbytes
    assert sorted(set(found)) == sorted(marks)


async def test_ten_thousand_tiny_tensors(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: [torch.full((3,), i) for i in range(10_000)])

    async def total(_: Any, refs: list[Any]) -> int:
        return sum(int(tensor[0]) for tensor in await aiordt.get(refs))

    assert await b.run.remote(total, refs) == sum(range(10_000))


async def test_get_into(nodes: Any) -> None:
    a, _, _ = nodes
    refs = await a.make.remote(
        lambda _: {"w": arange(2 * MIB), "t": arange(MIB).view(512, 512).t(), "s": torch.ones(3)}
    )
    targets = {
        "w": torch.zeros(MIB // 2),
        "t": torch.zeros(512, 1024)[:, ::2],
        "s": torch.zeros(3),
    }
    got = await aiordt.get(refs, into=targets)
    for key, target in targets.items():
        assert got[key] is target
        assert torch.equal(target, await refs[key])
    assert await aiordt.get(refs["w"], into=targets["w"]) is targets["w"]
    for bad, words in [
        ({**targets, "w": torch.zeros(4)}, "must be equal"),
        ({**targets, "w": torch.zeros(MIB // 2, dtype=torch.int32)}, "must be equal"),
        ({"w": targets["w"]}, "refs have"),
        ({**targets, "s": 5}, "must be a tensor"),
        ({**targets, "w": torch.zeros(1).expand(MIB // 2)}, "share memory"),
    ]:
        with pytest.raises(aiordt.UsageError, match=words):
            await aiordt.get(refs, into=bad)


async def test_get_converts(nodes: Any) -> None:
    refs = await nodes[0].make.remote(
        lambda _: {"w": torch.ones(MIB), "i": torch.ones(5, dtype=torch.int64)}
    )
    got = await aiordt.get(refs, dtype=torch.bfloat16, device="cpu")
    assert got["w"].dtype is torch.bfloat16
    assert got["i"].dtype is torch.int64
    with pytest.raises(aiordt.UsageError, match="device"):
        await aiordt.get(refs, device="cuda:7")


async def test_stats_say_what_moved(nodes: Any) -> None:
    a, b, _ = nodes
    refs = await a.make.remote(lambda _: [arange(2 * MIB), torch.ones(4)])
    before = await b.stats.remote()
    await b.pull.remote(refs)
    after = await b.stats.remote()
    assert after.pulls - before.pulls == 2
    assert (
        after.by_transport["cma"].nbytes
        - (before.by_transport["cma"].nbytes if "cma" in before.by_transport else 0)
        == 2 * MIB
    )
    assert after.in_flight == 0
    assert after.pool_bytes >= 0
    assert dataclasses.asdict(after)["by_transport"]["cma"] == after.by_transport["cma"]
    with pytest.raises(AttributeError):
        after.pulls = 5
