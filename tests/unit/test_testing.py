"""The other tools for tests can fail, too: phases, random cancellation, leak checks."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

import pytest

from aiordt._errors import ClosedError, TransferError
from aiordt._metrics import phase
from aiordt.testing import (
    Leaks,
    at_phase,
    cancel_from_anywhere,
    cancel_randomly,
    check_leaks,
    record_phases,
)

# --- phases -------------------------------------------------------------------------------------


def test_at_phase_acts_once_at_the_nth() -> None:
    acted: list[int] = []
    with at_phase("here", lambda: acted.append(1), occurrence=2) as phases:
        phase("here")
        assert acted == []
        assert not phases.reached.is_set()
        phase("there")
        phase("here")
        phase("here")
    assert acted == [1]
    assert phases.reached.is_set()
    assert phases.names == ["here", "there", "here", "here"]
    phase("here")
    assert phases.count("here") == 3, "afterwards nobody watches"


def test_at_phase_raises_where_it_is() -> None:
    def fail() -> None:
        raise TransferError("injected", transport="t", peer="p", nbytes=0)

    with at_phase("here", fail), pytest.raises(TransferError, match="injected"):
        phase("here")


def test_watchers_do_not_nest() -> None:
    with record_phases(), pytest.raises(AssertionError, match="nested"), record_phases():
        pass
    with record_phases() as phases:
        phase("again")
    assert phases.names == ["again"]


async def test_a_phase_that_never_comes_is_told_with_those_that_did() -> None:
    with at_phase("never", lambda: None) as phases:
        phase("other")
        with pytest.raises(AssertionError, match="'other'"):
            await phases.wait_reached(within=0.01)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_cancel_from_anywhere(elsewhere: bool) -> None:  # noqa: FBT001
    task = asyncio.create_task(asyncio.Event().wait())
    await asyncio.sleep(0)
    with at_phase("here", lambda: cancel_from_anywhere(task)) as phases:
        if elsewhere:
            thread = threading.Thread(target=lambda: phase("here"))
            thread.start()
            thread.join()
        else:
            phase("here")
        await phases.wait_reached()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancel_randomly_counts_and_repeats() -> None:
    async def work() -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    ticks = [await cancel_randomly(work, times=40, seed=3, longest=0.0) for _ in range(2)]
    assert 0 < ticks[0] <= 40
    assert ticks[0] == ticks[1], "the same seed, the same moments"
    assert await cancel_randomly(lambda: asyncio.sleep(60), times=10, seed=1) == 10


async def test_cancel_randomly_refuses_a_swallowed_cancellation() -> None:
    async def swallow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as exc:
            raise ClosedError("instead") from exc

    with pytest.raises(AssertionError, match=r"^CAN-1: .*ClosedError"):
        await cancel_randomly(swallow, times=30, seed=1)

    async def ignore() -> None:
        for _ in range(200):
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    with pytest.raises(AssertionError, match=r"^CAN-1: .*had not ended"):
        await cancel_randomly(ignore, times=30, seed=1, within=0.05)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait({task})


# --- leaks --------------------------------------------------------------------------------------


def leaked(leak: Any) -> str:
    with pytest.raises(AssertionError) as info, check_leaks(within=0.05):
        kept = leak()
    undo = kept if callable(kept) else lambda: None
    undo()
    return str(info.value)


def test_leaked_descriptors_are_named(tmp_path: Any) -> None:
    path = tmp_path / "left-open"
    path.touch()

    def leak() -> Any:
        fd = os.open(path, os.O_RDONLY)
        return lambda: os.close(fd)

    assert f"-> {path}" in leaked(leak)


def test_leaked_threads_are_named() -> None:
    end = threading.Event()

    def leak() -> Any:
        threading.Thread(target=end.wait, name="left-running", daemon=True).start()
        return end.set

    assert "thread left-running" in leaked(leak)


async def test_leaked_tasks_are_named() -> None:
    async def left_waiting() -> None:
        await asyncio.Event().wait()

    leaks = Leaks()
    task = asyncio.create_task(left_waiting())
    with pytest.raises(AssertionError, match="left_waiting"):
        await leaks.wait_none(within=0.05)
    task.cancel()
    await leaks.wait_none()


def test_what_goes_away_in_time_is_no_leak() -> None:
    with check_leaks():
        threading.Timer(0.05, lambda: None).start()
    with check_leaks(within=0.05, ignore=lambda name: "timer" in name.lower()) as leaks:
        timer = threading.Thread(target=time.sleep, args=(0.2,), name="Timer")
        timer.start()
    timer.join()
    assert leaks.new() == []


def test_an_error_inside_goes_first() -> None:
    with pytest.raises(LookupError), check_leaks(within=0.0):
        raise LookupError
