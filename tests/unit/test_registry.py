"""What is exported, which storages are in use, and who is told when they are free."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiordt._errors import InvalidValueError, TensorFreedError, UsageError
from aiordt._exports import Export, check_exportable
from aiordt._layout import Cut
from aiordt._memory import storage_range
from aiordt._progress import Workers
from aiordt._registry import Registry
from aiordt._types import MIB
from aiordt.testing import eventually, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiordt._wire import Item


@pytest.fixture
def registry() -> Iterator[Registry]:
    workers = Workers("registry-test", 2)
    yield Registry(workers)
    workers.close()


class Leases:
    """Exports tensors, as `aiordt.put` does, with strings in the place of Ray's markers."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._count = 0

    def export(self, *tensors: torch.Tensor, label: str = "test") -> tuple[Export, list[str]]:
        export = self.registry.begin(tensors, label)
        leases = []
        for _ in export.groups:
            self._count += 1
            leases.append(f"lease-{self._count}")
        self.registry.commit(export, leases)
        return export, leases


@pytest.fixture
def leases(registry: Registry) -> Leases:
    return Leases(registry)


def ranges(*tensors: torch.Tensor) -> list[tuple[int, int]]:
    return [storage_range(tensor) for tensor in tensors]


def is_busy(registry: Registry, *tensors: torch.Tensor) -> bool:
    return bool(registry.busy(ranges(*tensors)))


# --- storages -----------------------------------------------------------------------------------


def test_a_tensor_is_busy_until_its_lease_is_gone(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    assert not is_busy(registry, tensor)
    _, (lease,) = leases.export(tensor)
    assert is_busy(registry, tensor)
    assert registry.counts() == (1, 32)
    registry.drop([lease])
    assert not is_busy(registry, tensor)
    assert registry.counts() == (0, 0)


ALIASES = {
    "a view": lambda tensor: tensor.view(-1),
    "a slice elsewhere": lambda tensor: tensor[3:],
    "transposed": lambda tensor: tensor.T,
    "detached": lambda tensor: tensor.detach(),
    "a parameter": torch.nn.Parameter,
    "another dtype": lambda tensor: tensor.view(torch.int32),
    "through numpy": lambda tensor: torch.from_numpy(tensor.numpy()),
    "the end, through numpy": lambda tensor: torch.from_numpy(tensor.numpy()[-1:]),
    "through dlpack": torch.utils.dlpack.from_dlpack,
    "through a buffer": lambda tensor: torch.frombuffer(
        memoryview(tensor.numpy()).cast("B"), dtype=torch.uint8, offset=5, count=2
    ),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES.keys())
def test_what_shares_memory_is_busy_with_it(
    registry: Registry, leases: Leases, alias: Any
) -> None:  # REG-1
    tensor = torch.zeros(8, 4)
    other = alias(tensor)
    bystander = torch.zeros(8, 4)
    for exported, asked in ((tensor, other), (other, tensor)):
        _, dropped = leases.export(exported)
        assert is_busy(registry, asked), "REG-1: a storage is where it lies"
        assert not is_busy(registry, bystander)
        registry.drop(dropped)
        assert not is_busy(registry, asked)


def test_two_arrays_that_touch_do_not_overlap(registry: Registry, leases: Leases) -> None:
    array = np.zeros(100, dtype=np.uint8)
    left, right = torch.from_numpy(array[:50]), torch.from_numpy(array[50:])
    middle = torch.from_numpy(array[49:51])
    leases.export(left)
    assert not is_busy(registry, right), "[0, 50) and [50, 100)"
    assert is_busy(registry, middle)
    assert is_busy(registry, right, middle), "any of them"


def test_a_storage_is_kept_alive_so_its_address_means_something(
    registry: Registry, leases: Leases
) -> None:  # REG-1
    tensor = torch.zeros(MIB)
    storage = tensor.untyped_storage()
    where = storage_range(tensor)
    _, dropped = leases.export(tensor)
    del tensor, storage
    others = [torch.zeros(MIB) for _ in range(4)]
    assert all(storage_range(other) != where for other in others)
    assert registry.busy([where]) == {where}
    registry.drop(dropped)
    assert registry.counts() == (0, 0)


def test_a_freed_tensor_is_let_go(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    alive = weakref.ref(tensor)
    export, dropped = leases.export(tensor)
    del tensor
    assert alive() is not None
    registry.drop(dropped)
    assert export.tensors == [None]
    assert alive() is None


def test_an_empty_tensor_overlaps_nothing(registry: Registry, leases: Leases) -> None:
    leases.export(torch.empty(0))
    leases.export(torch.empty(3, 0), torch.zeros(4))
    assert not is_busy(registry, torch.zeros(5)), "an empty storage holds no bytes"
    assert not is_busy(registry, torch.empty(0))


def test_many_exports_of_one_storage(registry: Registry, leases: Leases) -> None:  # CNT-1
    tensor = torch.zeros(4, MIB)
    first = leases.export(tensor, tensor[1])[1]
    second = leases.export(tensor[2:])[1]
    assert (len(first), len(second)) == (1, 1), "one lease for a large storage"
    assert registry.counts() == (3, tensor.nbytes), "each storage counted once"
    registry.drop(first)
    assert is_busy(registry, tensor)
    registry.drop(second)
    assert not is_busy(registry, tensor)


def test_large_storages_have_a_lease_each_and_small_ones_share(
    registry: Registry, leases: Leases
) -> None:
    large = [torch.zeros(MIB, dtype=torch.uint8) for _ in range(2)]
    small = [torch.zeros(MIB - 1, dtype=torch.uint8) for _ in range(3)]
    export, dropped = leases.export(small[0], large[0], small[1], large[1], small[2])
    assert sorted(map(sorted, export.groups)) == [[0, 2, 4], [1], [3]]
    of = dict(zip(map(tuple, export.groups), dropped, strict=True))
    registry.drop([of[1,]])
    assert [is_busy(registry, tensor) for tensor in large] == [False, True]
    assert all(is_busy(registry, tensor) for tensor in small)
    registry.drop([of[0, 2, 4]])
    assert not is_busy(registry, *small)
    assert registry.counts() == (1, MIB)
    registry.drop([of[3,]])
    assert registry.counts() == (0, 0)


def test_leases_are_dropped_once_and_unknown_ones_ignored(
    registry: Registry, leases: Leases
) -> None:  # CNT-3
    tensor = torch.zeros(8)
    _, dropped = leases.export(tensor)
    _, kept = leases.export(tensor)
    registry.drop([*dropped, *dropped, "never seen"])
    registry.drop(dropped)
    assert is_busy(registry, tensor)
    registry.drop(kept)
    assert not is_busy(registry, tensor)


# --- beginning and ending an export -------------------------------------------------------------


def test_what_is_being_exported_counts_from_the_beginning(registry: Registry) -> None:  # REG-3
    tensor = torch.zeros(8)
    export = registry.begin([tensor], "test")
    assert is_busy(registry, tensor), "REG-3"
    registry.abandon(export)
    assert not is_busy(registry, tensor)
    assert registry.counts() == (0, 0)


def test_commit_leaves_no_gap(registry: Registry) -> None:  # REG-3
    """The leases hold before the export lets go: no waiter is woken in between."""
    tensor = torch.zeros(8)

    async def main() -> None:
        export = registry.begin([tensor], "test")
        waiter = registry.watch(registry.busy(ranges(tensor)))
        assert waiter is not None
        registry.commit(export, ["lease"])
        await asyncio.sleep(0.01)
        assert not waiter.future.done()
        registry.drop(["lease"])
        await asyncio.wait_for(waiter.future, 5)

    asyncio.run(main())


async def test_nothing_can_export_between_the_check_and_the_write(
    registry: Registry, leases: Leases
) -> None:  # REG-2
    tensor = torch.zeros(8)
    written: list[bool] = []

    async def exporter() -> None:
        for _ in range(50):
            _, dropped = leases.export(tensor)
            await asyncio.sleep(0)
            registry.drop(dropped)
            await asyncio.sleep(0)

    async def writer() -> None:
        for _ in range(30):
            while busy := registry.busy(ranges(tensor)):
                waiter = registry.watch(busy)
                if waiter is not None:
                    await waiter.future
                    registry.unwatch(waiter)
            written.append(is_busy(registry, tensor))
            await asyncio.sleep(0)

    await asyncio.gather(exporter(), writer())
    assert written == [False] * 30, "REG-2"


def test_abandon_after_close_is_harmless(registry: Registry) -> None:
    """`put` abandons when the session ends while it waits for leases."""
    export = registry.begin([torch.zeros(8)], "test")
    registry.close()
    registry.abandon(export)
    assert registry.counts() == (0, 0)


def test_a_drop_after_close_is_harmless(registry: Registry, leases: Leases) -> None:
    _, dropped = leases.export(torch.zeros(8))
    registry.close()
    registry.drop(dropped)
    assert registry.counts() == (0, 0)


# --- waiting ------------------------------------------------------------------------------------


async def test_a_waiter_is_woken_when_the_last_storage_is_free(
    registry: Registry, leases: Leases
) -> None:
    first, second = torch.zeros(8), torch.zeros(8)
    (one,) = leases.export(first)[1]
    (two,) = leases.export(second)[1]
    waiter = registry.watch(registry.busy(ranges(first, second)))
    assert waiter is not None
    registry.drop([one])
    await asyncio.sleep(0)
    assert not waiter.future.done()
    registry.drop([two])
    await asyncio.wait_for(waiter.future, 5)
    registry.unwatch(waiter)


async def test_watching_what_is_free_gives_no_waiter(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    _, dropped = leases.export(tensor)
    busy = registry.busy(ranges(tensor))
    registry.drop(dropped)
    assert registry.watch(busy) is None


def test_waiters_are_woken_on_their_own_loops(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    _, dropped = leases.export(tensor)
    woken_on: list[bool] = []

    async def wait() -> None:
        waiter = registry.watch(registry.busy(ranges(tensor)))
        assert waiter is not None
        waiting.append(waiter)
        await asyncio.wait_for(waiter.future, 10)
        woken_on.append(waiter.future.get_loop() is asyncio.get_running_loop())

    waiting: list[Any] = []
    threads = [threading.Thread(target=lambda: asyncio.run(wait())) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(waiting) == 3, what="three loops wait")
    registry.drop(dropped)  # from a thread that has no loop
    for thread in threads:
        thread.join()
    assert woken_on == [True, True, True]


def test_a_waiter_whose_loop_is_gone_harms_nobody(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    _, dropped = leases.export(tensor)

    async def leave() -> None:
        assert registry.watch(registry.busy(ranges(tensor))) is not None

    asyncio.run(leave())

    async def wait() -> None:
        waiter = registry.watch(registry.busy(ranges(tensor)))
        assert waiter is not None
        registry.drop(dropped)
        await asyncio.wait_for(waiter.future, 5)

    asyncio.run(wait())


async def test_unwatch_forgets(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    _, dropped = leases.export(tensor)
    waiter = registry.watch(registry.busy(ranges(tensor)))
    assert waiter is not None
    registry.unwatch(waiter)
    registry.unwatch(waiter)
    registry.drop(dropped)
    await asyncio.sleep(0)
    assert not waiter.future.done()


async def test_close_wakes_every_waiter(registry: Registry, leases: Leases) -> None:  # CLS-2
    tensor = torch.zeros(8)
    leases.export(tensor)
    waiter = registry.watch(registry.busy(ranges(tensor)))
    assert waiter is not None
    registry.close()
    await asyncio.wait_for(waiter.future, 5)
    registry.unwatch(waiter)
    assert registry.counts() == (0, 0)


def test_outstanding_exports_are_named_oldest_first(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    old = leases.export(tensor, label="Trainer.publish()")[0]
    leases.export(tensor, tensor[1:], label="put() in main")
    leases.export(torch.zeros(1), label="another storage")
    registry.seen(old.key, b"peer")
    rows = registry.outstanding(registry.busy(ranges(tensor)))
    assert [row.label for row in rows] == ["Trainer.publish()", "put() in main"]
    assert str(rows[0]).endswith("s old, pulled by 1 processes")
    assert "2 tensors" in str(rows[1])


# --- looking up and serving ---------------------------------------------------------------------


def test_local_gives_the_tensor_itself(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    export, dropped = leases.export(tensor)
    assert registry.local(export.key, 0)[1] is tensor
    for key, index in ((export.key, 1), (b"unknown key.....", 0)):
        with pytest.raises(TensorFreedError):
            registry.local(key, index)
    registry.drop(dropped)
    with pytest.raises(TensorFreedError, match="gave this tensor up"):
        registry.local(export.key, 0)


def test_seen_is_counted_for_known_exports(registry: Registry, leases: Leases) -> None:
    export, _ = leases.export(torch.zeros(8))
    assert registry.seen(export.key, b"peer") is export
    assert registry.seen(export.key, b"peer") is export
    assert export.seen_by == {b"peer"}
    assert registry.seen(b"unknown", b"peer") is None


async def read(registry: Registry, items: Sequence[Item], nbytes: int) -> bytes:
    async with registry.open(items, nbytes) as served:
        return b"".join(served.views)


async def test_open_gives_the_bytes_in_order(registry: Registry, leases: Leases) -> None:
    tensor = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    strided = torch.arange(40, dtype=torch.uint8).reshape(4, 10)[:, 2:5]
    export, _ = leases.export(tensor, tensor.T, strided, torch.empty(0))
    cuts = [Cut(0, (4, 3), (10, 1), 1), None, Cut(0, (3, 4), (4, 1), 1), None]
    items = [(export.key, index, cut) for index, cut in zip((2, 0, 1, 3), cuts, strict=True)]
    data = await read(registry, items, 12 + 12 + 12)
    assert data[:12] == bytes(strided.contiguous().numpy().tobytes())
    assert data[12:24] == data[24:] == bytes(range(12)), "a transposed one as it lies in memory"


async def test_a_transfer_holds_what_it_serves(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)  # OWN-1
    export, dropped = leases.export(tensor)
    async with registry.open([(export.key, 0, None)], 32):
        registry.drop(dropped)
        assert is_busy(registry, tensor), "OWN-1: lent until the transfer has ended"
        waiter = registry.watch(registry.busy(ranges(tensor)))
        assert waiter is not None
    await asyncio.wait_for(waiter.future, 5)
    assert not is_busy(registry, tensor)


async def test_a_cancelled_transfer_lets_go(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    export, dropped = leases.export(tensor)
    entered = asyncio.Event()

    async def serve() -> None:
        async with registry.open([(export.key, 0, None)], 32):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await entered.wait()
    registry.drop(dropped)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not is_busy(registry, tensor), what="the tensor is free")


async def test_open_refuses_what_is_not_exported(registry: Registry, leases: Leases) -> None:
    export, dropped = leases.export(torch.zeros(8))
    with pytest.raises(TensorFreedError):
        await read(registry, [(export.key, 0, None), (b"unknown key.....", 0, None)], 64)
    registry.drop(dropped)
    with pytest.raises(TensorFreedError):
        await read(registry, [(export.key, 0, None)], 32)
    assert registry.counts() == (0, 0), "a refused transfer holds nothing"


async def test_open_refuses_another_size(registry: Registry, leases: Leases) -> None:
    tensor = torch.zeros(8)
    export, dropped = leases.export(tensor)
    with pytest.raises(UsageError, match=r"32 bytes there, not 28.*resized"):
        await read(registry, [(export.key, 0, None)], 28)
    registry.drop(dropped)
    assert not is_busy(registry, tensor), "a refused transfer holds nothing"


async def test_open_of_nothing_is_refused_or_empty(registry: Registry) -> None:
    """A peer may ask for no tensors at all; that is no reason to fall over."""
    with contextlib.suppress(UsageError):
        assert await read(registry, [], 0) == b""


async def test_close_during_a_transfer_is_quiet(registry: Registry, leases: Leases) -> None:
    export, _ = leases.export(torch.zeros(8))
    async with registry.open([(export.key, 0, None)], 32):
        registry.close()
    assert registry.counts() == (0, 0)


# --- what can be exported -----------------------------------------------------------------------


class Wrapping(torch.Tensor):
    """As a DTensor: a tensor without memory of its own, around others."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override, explicit-override]  # as torch calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Plain(torch.Tensor):
    """A subclass that adds behaviour and no memory."""


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the API is in prototype stage"
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.ones(4, 4).to_sparse(), "sparse_coo"),
        (lambda: torch.ones(4, 4).to_sparse_csr(), "sparse_csr"),
        (quantized, "quantized"),
        (lambda: torch.empty(4, device="meta"), "meta"),
        (lambda: torch.ones(4).as_subclass(Wrapping), "Wrapping"),
        (nested, "nested"),
    ],
    ids=["sparse", "csr", "quantized", "meta", "wrapper", "nested"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_what_cannot_arrive_as_it_is_is_refused(make: Any, what: str) -> None:
    with pytest.raises(InvalidValueError, match=what):
        check_exportable(make())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4),
        torch.nn.Parameter(torch.ones(4)),
        torch.ones(4).as_subclass(Plain),
        torch.ones(2, 3).T,
        torch.ones(1).expand(5),
        torch.ones(4, dtype=torch.complex64).conj(),
        torch.empty(0),
        torch.tensor(1),
    ],
    ids=["dense", "parameter", "subclass", "strided", "expanded", "conj", "empty", "scalar"],
)
def test_what_can_arrive_is_allowed(tensor: torch.Tensor) -> None:
    check_exportable(tensor)


def test_what_is_claimed_outlives_rays_count(registry: Registry, leases: Leases) -> None:  # REG-4
    tensors = torch.zeros(MIB), torch.zeros(MIB)
    export, (one, other) = leases.export(*tensors)
    registry.claim([one, "unknown"], b"first")
    registry.claim([one], b"second")
    registry.drop([one, other])
    assert registry.busy(ranges(tensors[0]))
    assert not registry.busy(ranges(tensors[1]))
    registry.local(export.key, 0)
    registry.unclaim(None, b"first")
    registry.unclaim([one, "unknown"], b"third")
    assert registry.claimed_by(b"second")
    assert registry.busy(ranges(tensors[0]))
    registry.unclaim([one], b"second")
    assert not registry.busy(ranges(tensors[0]))
    assert registry.counts() == (0, 0)


def test_a_claim_that_ends_first_leaves_the_rest_to_ray(
    registry: Registry, leases: Leases
) -> None:  # REG-4
    tensor = torch.zeros(MIB)
    _, (lease,) = leases.export(tensor)
    registry.claim([lease], b"first")
    registry.unclaim([lease], b"first")
    assert registry.busy(ranges(tensor))
    registry.drop([lease])
    assert not registry.busy(ranges(tensor))
    registry.claim([lease], b"first")
    assert not registry.claimed_by(b"first"), "too late"
