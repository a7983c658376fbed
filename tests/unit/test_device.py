"""The device layer: events, staging, devices that aiordt does not know.

There is no GPU here: `FakeDevice` stands in for one, in the place of host memory's layer.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from typing import TYPE_CHECKING

import pytest
import torch

from aiordt import _device
from aiordt._device import DONE, Completion, DeviceWarning
from aiordt._errors import InvalidValueError, TensorFreedError, TransferError
from aiordt._exports import check_exportable
from aiordt._layout import Cut
from aiordt._progress import Workers
from aiordt._registry import Registry
from aiordt.abc import Part
from aiordt.testing import FakeDevice, eventually
from aiordt.testing._process import _Half

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiordt._exports import Export

CPU = torch.device("cpu")


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("test", 2)
    yield made
    made.close()


@pytest.fixture
def registry(workers: Workers) -> Registry:
    return Registry(workers)


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with FakeDevice() as made:
        yield made


async def waited_for(event: Completion, times: int = 1) -> None:
    await eventually(lambda: len(event._waiters) == times, what=f"{times} waiters")


async def test_a_completion_wakes_waiters_on_every_loop() -> None:
    event = Completion()
    seen: list[str] = []

    async def wait(name: str) -> None:
        await event.wait()
        seen.append(name)

    thread = threading.Thread(target=lambda: asyncio.run(wait("thread")))
    thread.start()
    tasks = [asyncio.create_task(wait(name)) for name in ("a", "b", "cancelled")]
    await waited_for(event, 4)
    tasks[2].cancel()
    await asyncio.wait({tasks[2]})
    assert tasks[2].cancelled()
    assert len(event._waiters) == 3
    assert not event.done()
    event.complete()
    event.complete()
    await asyncio.gather(*tasks[:2])
    await asyncio.to_thread(thread.join)
    assert sorted(seen) == ["a", "b", "thread"]
    assert event.done()
    await event.wait()
    assert not event._waiters


async def test_a_completion_raises_what_it_was_completed_with() -> None:
    event = Completion()
    waiting = asyncio.create_task(event.wait())
    await waited_for(event)
    event.complete(TransferError("kernel", transport="cuda", peer="", nbytes=0))
    for raising in (waiting, event.wait()):
        with pytest.raises(TransferError, match="kernel"):
            await raising


def test_host_memory_queues_nothing() -> None:
    assert _device.record([torch.ones(3), torch.ones(2)]) is DONE
    assert _device.layer(CPU).identity(CPU) == "cpu"
    _device.wait_on_stream(torch.ones(1), DONE)


def test_cpu_use_does_not_wake_cuda() -> None:
    program = """
import torch, aiordt
from aiordt import _device
woken = []
torch.cuda.is_available = lambda: woken.append(1)
_device.record([torch.ones(2)])
assert _device.home("") is None
assert not woken and not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)  # noqa: S603


def test_an_event_for_each_device(device: FakeDevice) -> None:
    event = _device.record([torch.ones(1), torch.ones(2)])
    assert device.log == ["record"]
    assert event is device.events[0]
    several = _device._All([event, Completion()])
    device.finish()
    assert event.done()
    assert not several.done()
    _device.wait_on_stream(torch.ones(1), several)
    assert device.waited_for == list(several.events)


async def test_several_events_as_one() -> None:
    one, two = Completion(), Completion()
    both = _device._All([one, two])
    waiting = asyncio.create_task(both.wait())
    two.complete()
    await asyncio.sleep(0)
    assert not both.done()
    one.complete()
    await waiting
    assert both.done()


def test_other_devices_are_refused_with_advice() -> None:
    with pytest.raises(InvalidValueError, match=r"on meta.*has none.*empty_like"):
        check_exportable(torch.empty(2, device="meta"))
    for kind in ("xpu", "mps", "cuda"):
        with pytest.raises(InvalidValueError, match=rf"this one is on {kind}.*\.cpu\(\)"):
            _device.layer(torch.device(kind))


def test_a_tensor_without_a_home_warns_once() -> None:
    _device._homeless.clear()
    with pytest.warns(DeviceWarning, match=r"cuda:1 arrived in host memory"):
        assert _device.home("cuda:1") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _device.home("cuda:0") is None
        assert _device.home("") is None


async def test_staging_copies_only_what_must_be(workers: Workers) -> None:
    plain, strided, cast = torch.arange(4), torch.arange(12).reshape(3, 4).T, torch.ones(3)
    dtypes = [torch.int64, torch.int64, torch.float16]
    staged = await _device.stage([plain, strided, cast], dtypes, workers)
    assert staged[0] is plain
    assert staged[1].is_contiguous()
    assert torch.equal(staged[1], strided)
    assert staged[2].dtype is torch.float16


def exported(registry: Registry, *tensors: torch.Tensor) -> Export:
    export = registry.begin(tensors, "test")
    registry.commit(export, [object() for _ in export.groups])
    return export


async def test_open_waits_for_all_exports_before_it_reads(
    registry: Registry, device: FakeDevice
) -> None:
    tensors = [torch.zeros(6, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8).T]
    first, second = (exported(registry, tensor) for tensor in tensors)
    cut = Cut(0, (4, 3), (1, 4), 1)

    async def read() -> bytes:
        async with registry.open([(first.key, 0, None), (second.key, 0, cut)], 18) as served:
            return b"".join(served.views)

    reading = asyncio.create_task(read())
    waiting = device.events
    await waited_for(waiting[0])
    device.events[0].complete()
    await waited_for(waiting[1])
    assert "stage" not in device.log  # DEV-1
    tensors[0].fill_(1)  # what the device does
    tensors[1].fill_(2)
    device.finish()
    assert await reading == bytes([1] * 6 + [2] * 12)
    assert device.log == ["record", "record", "stage"]


async def test_other_work_is_not_waited_for(registry: Registry, device: FakeDevice) -> None:
    first, second = (exported(registry, torch.ones(3, dtype=torch.uint8)) for _ in range(2))

    async def read(export: Export) -> bytes:
        async with registry.open([(export.key, 0, None)], 3) as served:
            return b"".join(served.views)

    reading = asyncio.create_task(read(first))
    await waited_for(device.events[0])
    device.events[1].complete()
    assert await read(second) == b"\1\1\1"  # DEV-2: neither the loop nor the device is held up
    assert not reading.done()
    device.finish()
    await reading


async def test_a_cancelled_open_lets_go_of_the_tensor(
    registry: Registry, device: FakeDevice
) -> None:
    tensor = torch.zeros(6, dtype=torch.uint8)
    export = registry.begin([tensor], "test")
    lease = object()
    registry.commit(export, [lease])

    async def read() -> None:
        async with registry.open([(export.key, 0, None)], 6):
            raise AssertionError

    reading = asyncio.create_task(read())
    await waited_for(device.events[0])
    registry.drop([lease])
    ranges = [(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())]
    assert registry.busy(ranges)
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()  # CAN-1
    assert not registry.busy(ranges)
    assert not device.events[0]._waiters


@pytest.mark.parametrize("nbytes", [1000, 1 << 20])
async def test_tcp_serves_after_the_work_and_forgets_who_does_not_wait(
    device: FakeDevice, nbytes: int
) -> None:
    owner, consumer = _Half(), _Half()
    try:
        tensor = torch.zeros(nbytes, dtype=torch.uint8)
        export = exported(owner.registry, tensor)
        link = await consumer.connect("tcp", owner.address)
        target = torch.zeros(nbytes, dtype=torch.uint8)
        part = Part(export.key, 0, tensor.data_ptr(), target.data_ptr(), nbytes)
        reading = asyncio.create_task(link.read([part]))
        await waited_for(device.events[0])
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled()
        await waited_for(device.events[0], 0)
        reading = asyncio.create_task(link.read([part]))
        await waited_for(device.events[0])
        tensor.fill_(5)
        device.finish()
        await reading
        assert bool((target == 5).all())  # DEV-1
    finally:
        owner.close()
        consumer.close()


async def test_work_that_fails_fails_whoever_reads(registry: Registry, device: FakeDevice) -> None:
    export = exported(registry, torch.zeros(6, dtype=torch.uint8))
    device.finish(TransferError("illegal address", transport="cuda", peer="", nbytes=0))
    with pytest.raises(TransferError, match="illegal address"):
        await registry.wait_ready([export.key])
    with pytest.raises(TensorFreedError):
        await registry.wait_ready([b"unknown"])


def test_the_fake_gives_its_place_back() -> None:
    before = _device.layer(CPU)
    with FakeDevice() as device:
        assert _device.layer(CPU) is not before
        event = _device.record([torch.ones(1)])
        assert not event.done()
    device.remove()
    assert event.done()
    assert _device.layer(CPU) is before
