"""Every transport of aiordt keeps every promise of `aiordt.abc`, between real processes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import uvloop
from typing_extensions import override

from aiordt._config import TRANSPORTS
from aiordt._errors import UnavailableError
from aiordt.testing import (
    FaultPlan,
    FaultyTransport,
    Leaks,
    check_huge_part,
    check_transport,
    process_pairs,
)
from aiordt.testing._process import ServingProcess
from aiordt.transports import load, probe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aiordt.testing import MakePair, Pair

#: What is `mpi`'s is in test_mpi.py: it needs a group, and MPI a process of its own.
ALONE = [name for name in TRANSPORTS if name != "mpi"]
LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


def skip_unless_usable(transport: str) -> None:
    available = probe(transport)
    if available.usable:
        available = load(transport).probe()
    if not available.usable:
        pytest.skip(f"{transport}: {available.reason}")


@pytest.fixture(scope="module")
def spare() -> Iterator[list[ServingProcess]]:
    """A process that starts while a test runs, for the next one: that takes 2 s."""
    processes = [ServingProcess()]
    yield processes
    processes[0].close()


class PairsOf(process_pairs):
    """As `process_pairs`, of a process that was started before."""

    def __init__(self, transport: str, process: ServingProcess) -> None:
        super().__init__(transport)
        self._started: ServingProcess | None = process

    @override
    def _start(self) -> ServingProcess:
        self._process, self._started = self._started, None
        return super()._start() if self._process is None else self._process


async def check(
    transport: str,
    suite: Callable[[MakePair], Awaitable[None]],
    spare: list[ServingProcess],
) -> None:
    process, spare[0] = spare[0], ServingProcess()
    leaks = Leaks()
    with PairsOf(transport, process) as make_pair:
        await suite(make_pair)
    await leaks.wait_none()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("transport", ALONE)
def test_conformance(transport: str, loop: str, spare: list[ServingProcess]) -> None:
    skip_unless_usable(transport)
    make_loop: Callable[[], asyncio.AbstractEventLoop] = LOOPS[loop]
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(check(transport, check_transport, spare))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_with_a_plan_of_no_faults(transport: str, spare: list[ServingProcess]) -> None:
    """A `FaultyTransport` whose plan is empty keeps every promise, too."""
    faults = FaultyTransport(FaultPlan())

    async def suite(make_pair: MakePair) -> None:
        async def make_spoilt() -> Pair:
            pair = await make_pair()
            faults.spoil(pair.link)
            return pair

        await check_transport(make_spoilt)

    await check(transport, suite, spare)
    assert faults.operations > 100


@pytest.mark.parametrize("transport", ALONE)
async def test_more_than_4_gib(transport: str, spare: list[ServingProcess]) -> None:  # DAT-3
    skip_unless_usable(transport)
    try:
        await check(transport, check_huge_part, spare)
    except UnavailableError as exc:
        pytest.skip(exc.reason)
