"""`FaultyTransport`: what a plan says happens, at the operation and the byte that it names."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiordt._errors import ClosedError, TransferError
from aiordt._types import MIB
from aiordt.abc import Cut, Part
from aiordt.testing import (
    FaultPlan,
    FaultyTransport,
    Leaks,
    Pair,
    check_transport,
    eventually,
)
from aiordt.testing._faults import split
from tests.fakes import MemoryLink, MemoryPair, PackingLink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiordt.testing import Exported, MakePair

_NBYTES = 100_000


def error(text: str = "told to") -> TransferError:
    return TransferError(text, transport="fake", peer="nobody", nbytes=3)


class Reading:
    """A pair whose link goes wrong, and something to read by it."""

    def __init__(self, plan: FaultPlan) -> None:
        self.faults = FaultyTransport(plan)
        self.pair = MemoryPair(PackingLink)
        self.faults.spoil(self.pair.link)
        self.exported: Exported

    async def start(self) -> Reading:
        data = torch.arange(_NBYTES).remainder(251).to(torch.uint8) + 1
        (self.exported,) = await self.pair.export([data])
        return self

    async def read(self, target: torch.Tensor) -> None:
        await self.pair.link.read([self.exported.part(target.data_ptr())])

    def begin(self) -> tuple[asyncio.Task[None], torch.Tensor]:
        target = torch.zeros(_NBYTES, dtype=torch.uint8)
        return asyncio.ensure_future(self.read(target)), target

    def arrived(self, target: torch.Tensor) -> int:
        """How many bytes are there, from the first on; the rest is as it was."""
        count = int((target != 0).sum())
        assert torch.equal(target[:count], self.exported.content[:count])
        return count


@pytest.fixture
async def readings() -> AsyncIterator[list[Reading]]:
    """What is put there is closed."""
    made: list[Reading] = []
    leaks = Leaks()
    yield made
    for reading in made:
        reading.faults.close()
        await reading.pair.aclose()
    await leaks.wait_none()


async def reading_by(readings: list[Reading], plan: FaultPlan) -> Reading:
    reading = await Reading(plan).start()
    readings.append(reading)
    return reading


# --- it is a link like any other -----------------------------------------------------------


async def check(plan: FaultPlan, make_pair: MakePair) -> FaultyTransport:
    faults = FaultyTransport(plan)

    async def spoilt() -> Pair:
        pair = await make_pair()
        faults.spoil(pair.link)
        return pair

    await check_transport(spoilt, settle=0.03, large_nbytes=10 * MIB)
    return faults


@pytest.mark.parametrize("make_link", [MemoryLink, PackingLink])
async def test_an_empty_plan_keeps_every_promise(make_link: type[MemoryLink]) -> None:
    async def make_pair() -> Pair:
        return MemoryPair(make_link)

    assert (await check(FaultPlan(), make_pair)).operations > 100
    with pytest.raises(TransferError, match="told to"):
        await check(FaultPlan(fail={50: error()}), make_pair)


# --- faults --------------------------------------------------------------------------------


async def test_operations_fail_by_their_number(readings: list[Reading]) -> None:
    reading = await reading_by(readings, FaultPlan(fail={2: error(), 4: OSError("other")}))
    ends = []
    for _ in range(5):
        task, target = reading.begin()
        await asyncio.wait({task})
        ends.append((type(task.exception()), reading.arrived(target)))
    whole = (type(None), _NBYTES)
    assert ends == [whole, (TransferError, 0), whole, (OSError, 0), whole]
    assert reading.faults.operations == 5


async def test_a_plan_keeps_no_frames(readings: list[Reading]) -> None:  # ERR-1
    plan = FaultPlan(fail={1: error(), 2: error()})
    reading = await reading_by(readings, plan)
    for number in (1, 2):
        with pytest.raises(TransferError) as caught:
            await reading.read(torch.zeros(_NBYTES, dtype=torch.uint8))
        assert caught.value.peer == "nobody"
        assert len(traceback.extract_tb(caught.value.__traceback__)) > 1
        assert plan.fail[number].__traceback__ is None


@pytest.mark.parametrize("after", [0, 1, 777, _NBYTES - 1])
async def test_a_read_stands_still_at_the_byte(readings: list[Reading], after: int) -> None:
    reading = await reading_by(readings, FaultPlan(stall_after=after))
    task, target = reading.begin()
    other, untouched = reading.begin()
    await eventually(lambda: reading.arrived(target) == after, what="it has come so far")
    for _ in range(20):
        await asyncio.sleep(0)
    assert reading.faults.standing == 2
    assert (reading.arrived(target), reading.arrived(untouched)) == (after, 0)
    reading.faults.release()
    await asyncio.gather(task, other)
    third, last = reading.begin()
    await third
    assert [reading.arrived(each) for each in (target, untouched, last)] == [_NBYTES] * 3
    assert (reading.faults.standing, reading.faults.operations) == (0, 3)


async def test_bytes_are_counted_over_all_operations(readings: list[Reading]) -> None:
    reading = await reading_by(readings, FaultPlan(stall_after=_NBYTES + 5))
    first, whole = reading.begin()
    await first
    second, target = reading.begin()
    await eventually(lambda: reading.faults.standing == 1, what="it stands still")
    await eventually(lambda: reading.arrived(target) == 5, what="it has come so far")
    assert reading.arrived(whole) == _NBYTES
    reading.faults.release()
    await second


async def test_cancelled_where_it_stands(readings: list[Reading]) -> None:  # OWN-1, CAN-1
    reading = await reading_by(readings, FaultPlan(stall_after=10))
    task, target = reading.begin()
    await eventually(lambda: reading.arrived(target) == 10, what="it has come so far")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert reading.faults.standing == 0
    reading.faults.release()
    another, whole = reading.begin()
    await another
    assert reading.arrived(whole) == _NBYTES
    assert reading.arrived(target) == 10, "nothing is written after its end"


async def test_closing_ends_what_stands_still(readings: list[Reading]) -> None:  # CLS-2
    reading = await reading_by(readings, FaultPlan(stall_after=10))
    task, target = reading.begin()
    await eventually(lambda: reading.faults.standing == 1, what="it stands still")
    await reading.pair.link.aclose()
    with pytest.raises(ClosedError):
        await task
    assert reading.arrived(target) == 10


async def test_an_end_is_late(readings: list[Reading]) -> None:
    """By then all bytes are there; a cancellation is not late."""
    reading = await reading_by(readings, FaultPlan(delay=3600))
    task, target = reading.begin()
    await eventually(lambda: reading.arrived(target) == _NBYTES, what="the bytes are there")
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_afterwards_the_link_is_what_it_was(readings: list[Reading]) -> None:
    reading = await reading_by(readings, FaultPlan(fail={1: error()}, stall_after=0))
    reading.faults.close()
    task, target = reading.begin()
    await task
    assert reading.arrived(target) == _NBYTES
    assert reading.faults.operations == 0
    assert not vars(reading.pair.link).keys() & {"read", "read_nowait", "nowait_nbytes", "aclose"}


# --- cutting -------------------------------------------------------------------------------


def part(nbytes: int, number: int, cut: Cut | None) -> Part:
    return Part(b"k" * 16, number, 1000 * number, 5000 * number, nbytes, cut)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["whole", "run", "pieces", "other"]))),
    st.integers(0, 100),
)
def test_a_read_in_two_is_the_read(sizes: list[tuple[int, str]], after: int) -> None:
    cuts: dict[str, Callable[[int], Cut | None]] = {
        "whole": lambda _: None,
        "run": lambda nbytes: Cut(7, (nbytes,), (1,), 1),
        "pieces": lambda nbytes: Cut(7, (nbytes, 1), (3, 1), 1),
        "other": lambda nbytes: Cut(7, (nbytes,), (1,), 4, 3),
    }
    parts = [part(nbytes, n, cuts[kind](nbytes)) for n, (nbytes, kind) in enumerate(sizes)]
    before, later = split(parts, after)
    total = sum(each.nbytes for each in before)
    assert total + sum(each.nbytes for each in later) == sum(each.nbytes for each in parts)
    kinds = [kind for nbytes, kind in sizes if nbytes > 1]
    if not {"pieces", "other"} & set(kinds):
        assert total == min(after, sum(each.nbytes for each in parts))
    assert total <= after
    joined = [*before, *later]
    if len(joined) == len(parts):
        assert joined == parts
        return
    place = len(before) - 1
    first, rest, one = before[-1], later[0], parts[place]
    assert [*before[:-1], one, *later[1:]] == parts
    assert first.cut is not None
    assert rest.cut is not None
    assert first.nbytes + rest.nbytes == one.nbytes
    assert (first.address, first.target) == (one.address, one.target)
    assert (rest.address, rest.target) == (one.address + first.nbytes, one.target + first.nbytes)
    start = 0 if one.cut is None else one.cut.offset
    assert (first.cut.offset, first.cut.span) == (start, first.nbytes)
    assert (rest.cut.offset, rest.cut.span) == (start + first.nbytes, rest.nbytes)
