"""Stream ordering: who reads an export waits for the device work that made it.

No GPU here, so a layer that stands in for one is put in the place of host memory's: its
events are done when the test says so.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

import aiordt
from aiordt import _device
from tests.support import MIB, arange, eventually

if TYPE_CHECKING:
    from aiordt.abc import Event


class FakeEvent:
    """Done when it is told to be."""

    def __init__(self) -> None:
        self.happened = False

    def done(self) -> bool:
        return self.happened

    async def wait(self) -> None:
        while not self.happened:  # noqa: ASYNC110  (set on another loop)
            await asyncio.sleep(0.005)


class FakeLayer(_device.DeviceLayer):
    """A device whose queue moves by hand."""

    def __init__(self) -> None:
        self.recorded: list[FakeEvent] = []
        self.arrivals = 0

    @override
    def record(self, device: torch.device) -> Event:
        self.recorded.append(FakeEvent())
        return self.recorded[-1]

    @override
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        self.arrivals += 1


def install(node: Any) -> None:
    node.kept["layer"] = FakeLayer()
    _device._layers["cpu"] = node.kept["layer"]


def restore(node: Any) -> None:
    _device._layers["cpu"] = _device._Host()


async def test_an_export_is_read_only_after_the_work_that_made_it(nodes: Any) -> None:
    a, b, _ = nodes
    await a.run.remote(install)
    try:
        refs = await a.make_tcp.remote(lambda _: [arange(MIB), arange(2000)])
        pulls = [b.pull.remote([ref]) for ref in refs]
        done, _ = await aiordt.wait(pulls, timeout=0.5)
        assert not done, "read before the device had finished"

        def finish(node: Any) -> int:
            for event in node.kept["layer"].recorded:
                event.happened = True
            return len(node.kept["layer"].recorded)

        assert await a.run.remote(finish) == 1
        for out, nbytes in zip(pulls, (MIB, 2000), strict=True):
            (got,) = await out
            assert torch.equal(got, arange(nbytes))
    finally:
        await a.run.remote(restore)


async def test_the_callers_stream_waits_for_what_arrives(nodes: Any) -> None:
    a, b, _ = nodes
    await b.run.remote(install)
    try:
        ref = await a.make.remote(lambda _: arange(2 * MIB))

        async def pull(node: Any, refs: list[Any]) -> int:
            await refs[0]
            return int(node.kept["layer"].arrivals)

        assert await b.run.remote(pull, [ref]) == 1
    finally:
        await b.run.remote(restore)


async def test_other_devices_are_refused_clearly(nodes: Any) -> None:
    async def refused(_: Any) -> str:
        try:
            await aiordt.put(torch.empty(4, device="meta"))
        except aiordt.UsageError as exc:
            return str(exc)
        return ""

    text = await eventually(lambda: nodes[0].run.remote(refused))
    assert "this one is on meta" in text
    assert ".cpu()" in text
