"""State dicts: many tensors, tied ones, all kinds; one batch each."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from typing import Any

import pytest
import torch

import aiordt
from tests.support import MIB, arange, eventually, on_phase

MAKERS = ["make_cma", "make_tcp"]


def share(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Model(torch.nn.Module):
    """Tied weights, buffers, frozen and half-precision parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(3000, 100)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(100, 100) for _ in range(20))
        self.norm = torch.nn.BatchNorm1d(100)
        self.head = torch.nn.Linear(100, 3000, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("mask", torch.arange(90_000).remainder(2).bool().view(300, 300))


def _state(_: Any) -> Any:
    return Model().state_dict()


@pytest.mark.parametrize("make", MAKERS)
async def test_a_modules_state_dict_arrives_whole_and_tied(nodes: Any, make: str) -> None:
    a, b, _ = nodes
    refs = await getattr(a, make).remote(_state)

    async def load(_: Any, refs: Any) -> tuple[int, Any]:
        before = aiordt.stats().bytes_pulled
        got = await aiordt.get(refs)
        moved = aiordt.stats().bytes_pulled - before
        assert share(got["head.weight"], got["embedding.weight"])
        storages = {tensor.untyped_storage().data_ptr() for tensor in got.values()}
        assert len(storages) == len(got) - 1  # nothing else shares memory
        model = Model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(got)
        filled = Model().state_dict()
        for tensor in filled.values():
            tensor.zero_()
        result = await aiordt.get(refs, into=filled)
        assert all(result[key] is filled[key] for key in filled)
        return moved, (model.state_dict(), filled)

    moved, loaded = await b.run.remote(load, refs)
    wanted = _state(None)
    for state in loaded:
        assert list(state) == list(wanted)
        for key, tensor in wanted.items():
            assert torch.equal(state[key], tensor), key
    assert moved == sum(t.nbytes for t in wanted.values()) - wanted["head.weight"].nbytes


def _ties(_: Any) -> dict[str, torch.Tensor]:
    base = arange(2 * MIB).view(512, 1024)
    other = arange(2 * MIB)
    lonely = arange(2 * MIB).view(512, 1024)[:, :512]
    return {
        "base": base,
        "same": base.detach(),
        "rows": base[3:40],
        "transposed": base.t(),
        "columns": base[:, 5:9],
        "tiny_pieces": base[:, ::2],
        "bits": base.view(torch.int32),
        "expanded": base[:1].expand(7, 1024),
        "low": other[:300_000],
        "high": other[200_000:],
        "gapped": lonely,
        "gapped_twin": lonely.detach(),
        "alone": arange(MIB),
        "small": torch.arange(10.0),
    }


TIED = [
    {"base", "same", "rows", "transposed", "columns", "tiny_pieces", "bits", "expanded"},
    {"low", "high"},
    {"gapped", "gapped_twin"},
    {"alone"},
    {"small"},
]


def check_ties(got: dict[str, torch.Tensor]) -> None:
    for key, tensor in _ties(None).items():
        assert torch.equal(got[key], tensor), key
        assert got[key].dtype is tensor.dtype
    for one, other in itertools.combinations(got, 2):
        tied = any({one, other} <= keys for keys in TIED)
        assert share(got[one], got[other]) == tied, (one, other)
    got["base"][3] = -7  # what is written through one is seen through the others
    assert (got["rows"][0] == -7).all()
    assert (got["transposed"][:, 3] == -7).all()
    assert (got["tiny_pieces"][3] == -7).all()
    got["low"][250_000] = -9
    assert got["high"][50_000] == -9
    got["gapped"][1, 1] = -5
    assert got["gapped_twin"][1, 1] == -5


@pytest.mark.parametrize("make", [*MAKERS, "make", "make_snapshot"])
async def test_what_shares_memory_moves_once_and_shares_it(nodes: Any, make: str) -> None:
    a, b, _ = nodes
    refs = await getattr(a, make).remote(_ties)

    async def pull(_: Any, refs: Any) -> int:
        before = aiordt.stats().bytes_pulled
        check_ties(await aiordt.get(refs))
        return aiordt.stats().bytes_pulled - before

    small = 40
    assert await b.run.remote(pull, refs) == 4 * MIB + MIB + MIB + small


async def test_a_snapshot_copies_shared_memory_once(nodes: Any) -> None:
    a = nodes[0]
    refs = await a.make_snapshot.remote(_ties)
    stats = await a.stats.remote()
    assert stats.exports == 13
    assert stats.exported_bytes <= 4 * MIB + MIB + MIB + 16
    assert torch.equal(await refs["low"], _ties(None)["low"])


async def test_conversion_keeps_ties(nodes: Any) -> None:
    names = {"base", "same", "rows", "transposed", "columns", "low", "high", "gapped", "alone"}
    for make in MAKERS:
        refs = await getattr(nodes[0], make).remote(_ties)
        got = await aiordt.get({key: refs[key] for key in names}, dtype=torch.bfloat16)
        for key in names:
            assert torch.equal(got[key], _ties(None)[key].to(torch.bfloat16)), key
        for one, other in itertools.combinations(names, 2):
            tied = any({one, other} <= keys for keys in TIED)
            assert share(got[one], got[other]) == tied, (one, other)


async def test_small_tied_tensors_travel_by_value_and_stay_tied(nodes: Any) -> None:
    def make(_: Any) -> Any:
        base = torch.arange(100.0).view(10, 10)
        wide = torch.arange(100.0).view(10, 10)[:, :3]
        return {"base": base, "row": base[2], "t": base.t(), "x": wide, "y": wide.detach(),
                "alone": torch.ones(3)}  # fmt: skip

    refs = await nodes[0].make.remote(make)
    assert all(ref.inline is not None for ref in refs.values())
    got = await aiordt.get(refs)
    for key, tensor in make(None).items():
        assert torch.equal(got[key], tensor), key
    got["base"][2] = 5
    assert got["row"].tolist() == [5.0] * 10
    assert got["t"][:, 2].tolist() == [5.0] * 10
    assert share(got["x"], got["y"])
    assert not share(got["x"], got["base"])
    assert (await refs["row"])[0] == 20


async def test_overlapping_slices_of_one_ref_move_once(nodes: Any) -> None:
    a, b, _ = nodes
    ref = await a.make.remote(lambda _: arange(2 * MIB))

    async def pull(_: Any, refs: Any) -> int:
        before = aiordt.stats().bytes_pulled
        low, high = await aiordt.get(refs)
        assert torch.equal(low, arange(2 * MIB)[:300_000])
        assert torch.equal(high, arange(2 * MIB)[299_000:])
        return aiordt.stats().bytes_pulled - before

    assert await b.run.remote(pull, [ref[:300_000], ref[299_000:]]) == 2 * MIB


async def test_parameters_that_are_tied_keep_their_class(nodes: Any) -> None:
    def make(_: Any) -> Any:
        weight = torch.nn.Parameter(arange(MIB))
        return {"w": weight, "same": weight, "plain": weight.detach(), "grad": weight[2:]}

    refs = await nodes[0].make.remote(make)
    got = await aiordt.get(refs)
    assert got["w"] is got["same"]
    assert type(got["w"]) is torch.nn.Parameter
    assert type(got["plain"]) is torch.Tensor
    assert not got["plain"].requires_grad
    assert got["grad"].requires_grad
    assert all(tensor.is_leaf for tensor in got.values())
    assert share(got["w"], got["plain"])
    assert share(got["w"], got["grad"])


KINDS = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool,
    torch.complex64, torch.int64, torch.uint8,
]  # fmt: skip


def _many(_: Any) -> dict[str, torch.Tensor]:
    state = {}
    for number in range(10_000):
        dtype = KINDS[number % len(KINDS)]
        raw = torch.full((number % 50, 3), number % 120, dtype=torch.uint8).remainder(2)
        tensor = raw.to(dtype) if number % 7 else raw.to(dtype).t()
        state[f"layers.{number}.weight"] = tensor
    state["scalar"] = torch.tensor(2.5)
    state["large"] = torch.ones(3 * MIB, dtype=torch.uint8)
    return state


@pytest.mark.parametrize("make", MAKERS)
async def test_ten_thousand_tensors_of_all_kinds(nodes: Any, make: str) -> None:
    a, b, _ = nodes
    refs = await getattr(a, make).remote(_many)

    async def check(_: Any, refs: Any) -> list[str]:
        got, want = await aiordt.get(refs), _many(None)
        again = await aiordt.get(refs)
        return [
            key
            for key, tensor in want.items()
            if got[key].dtype is not tensor.dtype
            or got[key].shape != tensor.shape
            or not torch.equal(got[key].to(torch.complex64), tensor.to(torch.complex64))
            or (tensor.numel() and share(got[key], again[key]))
        ]

    assert await b.run.remote(check, refs) == []
    assert (await a.stats.remote()).exports == 10_002


async def test_tensors_have_storages_of_their_own(nodes: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: [arange(100_000) for _ in range(100)])
    got = await aiordt.get(refs)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in got)


async def test_one_tensor_keeps_little_memory(nodes: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: [arange(100_000) for _ in range(400)])
    got = await aiordt.get(refs)
    kept = got[200]
    before = aiordt.stats().pool_bytes
    del got
    returned = aiordt.stats().pool_bytes - before
    assert returned >= 400 * kept.nbytes - 3 * MIB
    again = await aiordt.get(refs)  # on the same memory
    assert torch.equal(kept, arange(100_000))
    assert aiordt.stats().pool_bytes - before < 3 * MIB
    del again, kept


async def test_over_four_gib_in_one_dict(nodes: Any) -> None:
    """More than may be in flight at once: it goes in several batches, tied ones together."""

    def make(_: Any) -> Any:
        big = torch.zeros((2 << 30) + 100, dtype=torch.uint8)
        big[-1] = 9
        return {"a": big, "tail": big[-50:], "b": torch.ones(3 * MIB)}

    a, b, _ = nodes
    refs = await a.make_cma.remote(make)

    async def check(_: Any, refs: Any) -> Any:
        got = await aiordt.get(refs)
        return (
            got["a"].numel(),
            int(got["a"][-1]),
            int(got["tail"][-1]),
            share(*list(got.values())[:2]),
        )

    assert await b.run.remote(check, refs) == ((2 << 30) + 100, 9, 9, True)


# --- errors --------------------------------------------------------------------------------


async def test_refusals_to_export_name_the_key(nodes: Any) -> None:
    state = {"layers": [{"weight": torch.ones(3)}, {"weight": torch.eye(3).to_sparse()}]}
    with pytest.raises(
        aiordt.UsageError, match=r"\['layers'\]\[1\]\['weight'\]: a tensor with layout"
    ):
        await aiordt.put(state)
    with pytest.raises(aiordt.UsageError, match=r"\['x'\]: a quantized tensor"):
        await nodes[0].make.remote(
            lambda _: {"x": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}
        )


async def test_a_released_ref_is_named(nodes: Any) -> None:
    refs = await nodes[0].make.remote(lambda _: {"a": arange(MIB), "b": [arange(MIB) + 1]})
    refs["b"][0].release()
    with pytest.raises(aiordt.TensorFreedError, match=r"get\(\.\.\.\)\['b'\]\[0\]: this ref was"):
        await aiordt.get(refs)
    targets = {"a": torch.zeros(MIB // 4), "b": [torch.zeros(MIB // 4)]}
    with pytest.raises(aiordt.TensorFreedError, match=r"get\(\.\.\.\)\['b'\]\[0\]: this ref was"):
        await aiordt.get(refs, into=targets)


async def test_a_failed_transfer_is_named(spawn: Any) -> None:
    owner, other = spawn(), spawn()
    refs = await owner.make_tcp.remote(lambda _: {"a": arange(MIB), "b": arange(MIB) + 1})
    kept = await other.make_tcp.remote(lambda _: {"c": arange(MIB)})

    owner.run.remote(lambda _: os.kill(os.getpid(), signal.SIGKILL))

    async def gone() -> bool:
        try:
            await aiordt.get({"x": refs, "y": kept})
        except aiordt.OwnerDiedError as exc:
            return str(exc).startswith("get(...)['x']['a'] and 1 more: ")
        return False

    await eventually(gone, what="the owner's death is told, with the keys")


@pytest.mark.parametrize("number", [1, 4, 9])
async def test_a_cancelled_batch_writes_nothing_afterwards(nodes: Any, number: int) -> None:
    """OWN-1, CAN-1: cancelled in the midst of steps, of which several are under way."""
    a, b, _ = nodes
    refs = await a.make_cma.remote(lambda _: [arange(40_000) + i % 7 for i in range(2000)])

    async def check(_: Any, refs: Any) -> Any:
        targets = [torch.zeros(10_000) for _ in refs]
        loop = asyncio.get_running_loop()
        task = loop.create_task(aiordt.get(refs, into=targets))
        seen = itertools.count(1)

        def strike(name: str) -> None:
            if name == "cma.chunk" and next(seen) == number:
                loop.call_soon_threadsafe(task.cancel)

        on_phase(strike)
        try:
            await task
        except asyncio.CancelledError:
            cancelled = True
        else:
            cancelled = False
        finally:
            on_phase(None)
        for target in targets:
            target.fill_(-1)
        in_flight = aiordt.stats().in_flight
        again = await aiordt.get(refs)
        right = all(bool((tensor[0] == i % 7).item()) for i, tensor in enumerate(again))
        return cancelled, in_flight, right, all(bool((t == -1).all()) for t in targets)

    assert await b.run.remote(check, refs) == (True, 0, True, True)
