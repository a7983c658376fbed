"""From threads to asyncio and back: nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from aiordt._errors import ClosedError
from aiordt._progress import Inbox, IoThread, Workers, finish, run_all
from aiordt.testing import eventually, wait_until
from aiordt.transports import _job

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTLE = 0.03  # how long to wait for what must not happen


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("progress-test", 3)
    yield made
    made.close()


@pytest.fixture
def io() -> Iterator[IoThread]:
    made = IoThread()
    yield made
    made.close(_nothing(), 5)


async def _nothing() -> None:
    return


def threads_named(text: str) -> int:
    return sum(text in thread.name for thread in threading.enumerate())


# --- finish -------------------------------------------------------------------------------------


async def test_finish_outlasts_cancellation(workers: Workers) -> None:  # OWN-1, CAN-1
    release, finished = threading.Event(), threading.Event()
    stops: list[int] = []

    def work() -> None:
        release.wait(10)
        finished.set()

    task = asyncio.create_task(finish(workers.run(work), lambda: stops.append(1)))
    for _ in range(3):
        await asyncio.sleep(0.005)
        task.cancel()
    await asyncio.sleep(SETTLE)
    assert not task.done(), "OWN-1: the thread still has the memory"
    release.set()
    with pytest.raises(asyncio.CancelledError):  # CAN-1
        await task
    assert finished.is_set()
    assert stops == [1], "asked to stop once"


async def test_finish_gives_the_outcome(workers: Workers) -> None:
    assert await finish(workers.run(lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        await finish(workers.run(lambda: 1 // 0))


async def test_finish_prefers_the_cancellation_to_an_error(workers: Workers) -> None:  # CAN-1
    release = threading.Event()

    def work() -> None:
        release.wait(10)
        raise RuntimeError("the transfer was broken to end it")

    task = asyncio.create_task(finish(workers.run(work), release.set))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gc.collect()  # the error was seen: no "never retrieved"


# --- workers ------------------------------------------------------------------------------------


async def test_workers_run_at_most_so_many_at_once() -> None:
    workers = Workers("limited", 3)
    lock = threading.Lock()
    running, most = 0, 0
    release = threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(10)
        with lock:
            running -= 1

    works = [workers.run(work) for _ in range(10)]
    await eventually(lambda: running == 3, what="all workers are busy")
    assert threads_named("limited") == 3
    release.set()
    await asyncio.gather(*works)
    assert most == 3
    workers.close()


async def test_workers_start_when_needed_and_end_when_closed() -> None:
    workers = Workers("frugal", 8)
    assert threads_named("frugal") == 0
    for _ in range(20):
        await workers.run(lambda: None)
    assert threads_named("frugal") == 1, "an idle worker is used again"
    workers.close()
    workers.close()
    await eventually(lambda: threads_named("frugal") == 0, what="the threads have ended")
    with pytest.raises(ClosedError):
        workers.submit(lambda: None)


async def test_what_is_queued_still_runs_when_closed() -> None:
    workers = Workers("queued", 1)
    release = threading.Event()
    first = workers.run(lambda: release.wait(10))
    others = [workers.run(lambda n=n: n) for n in range(5)]  # type: ignore[misc]
    workers.close()
    release.set()
    assert await first
    assert await asyncio.gather(*others) == list(range(5))


async def test_a_worker_survives_what_a_function_raises(workers: Workers) -> None:
    def leave() -> None:
        raise SystemExit(3)

    for _ in range(4):
        with pytest.raises(SystemExit):
            await _caught(workers.run(leave))
    assert await workers.run(lambda: "alive") == "alive"


async def _caught(work: asyncio.Future[None]) -> None:
    await asyncio.wait({work})
    error = work.exception()
    assert error is not None
    raise error


def test_a_worker_shrugs_when_the_loop_is_gone(workers: Workers) -> None:
    release = threading.Event()

    async def leave() -> None:
        workers.run(lambda: release.wait(10)).add_done_callback(lambda _: None)

    asyncio.run(leave())
    release.set()
    done = threading.Event()
    workers.submit(done.set)
    assert done.wait(5)


# --- the io thread ------------------------------------------------------------------------------


async def test_io_runs_on_its_own_loop(io: IoThread) -> None:
    here = asyncio.get_running_loop()

    async def where() -> tuple[bool, str]:
        return asyncio.get_running_loop() is here, threading.current_thread().name

    assert await io.run(where()) == (False, "aiordt-io")

    async def nested() -> bool:
        return (await io.run(where()))[1] == "aiordt-io"

    assert await io.run(nested()), "on its own loop it simply awaits"


async def test_io_passes_errors(io: IoThread) -> None:
    async def fail() -> None:
        raise LookupError("over there")

    with pytest.raises(LookupError, match="over there"):
        await io.run(fail())


async def test_io_passes_cancellation_and_waits_for_the_end(io: IoThread) -> None:  # CAN-1, OWN-1
    started, cancelled, release = threading.Event(), threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await eventually(release.is_set, what="it may end", within=10)

    task = asyncio.create_task(io.run(work()))
    await eventually(started.is_set, what="it runs")
    task.cancel()
    await eventually(cancelled.is_set, what="the cancellation has arrived")
    await asyncio.sleep(SETTLE)
    assert not task.done(), "OWN-1: it has not ended over there"
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_cancelled_at_once_leaves_nothing_behind(io: IoThread) -> None:  # CAN-1
    ran: list[int] = []

    async def work() -> None:
        ran.append(1)
        await asyncio.Event().wait()

    for ticks in range(4):
        task = asyncio.create_task(io.run(work()))
        for _ in range(ticks + 1):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 5)

    async def others() -> int:
        return len(asyncio.all_tasks())

    assert await io.run(others()) == 1


async def test_a_cancellation_over_there_is_no_cancellation_here(io: IoThread) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(ClosedError):
        await io.run(cancelled())


def test_io_serves_many_loops(io: IoThread) -> None:
    async def double(value: int) -> int:
        await asyncio.sleep(0)
        return 2 * value

    results: list[int] = []

    async def main(value: int) -> None:
        results.append(await io.run(double(value)))

    threads = [threading.Thread(target=lambda v=v: asyncio.run(main(v))) for v in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 2, 4, 6, 8]
    assert io.run_sync(double(4)) == 8


async def test_close_wakes_what_waits_and_ends_the_thread() -> None:  # CLS-2, CLS-1
    io = IoThread()
    cleaned: list[int] = []
    started = threading.Event()

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    async def clean() -> None:
        cleaned.append(1)

    waiting = asyncio.create_task(io.run(wait()))
    await eventually(started.is_set, what="it waits")
    await asyncio.to_thread(io.close, clean(), 5)
    with pytest.raises(ClosedError):  # CLS-2
        await asyncio.wait_for(waiting, 5)
    assert cleaned == [1]
    io.close(clean(), 5)  # CLS-1
    assert cleaned == [1]
    with pytest.raises(ClosedError):
        await io.run(wait())


# --- the inbox ----------------------------------------------------------------------------------


async def test_the_inbox_coalesces() -> None:
    got: list[list[int]] = []
    inbox = Inbox(asyncio.get_running_loop(), got.append)
    for value in range(1000):
        inbox.put(value)
    assert got == []
    await asyncio.sleep(0)
    assert got == [list(range(1000))], "one wake-up for all"
    inbox.put(1000)
    await asyncio.sleep(0)
    assert got[1:] == [[1000]]


async def test_the_inbox_loses_nothing_from_many_threads() -> None:
    got: list[int] = []
    inbox = Inbox(asyncio.get_running_loop(), got.extend)

    def put(first: int) -> None:
        for value in range(first, first + 2000):
            inbox.put(value)

    threads = [threading.Thread(target=put, args=(first,)) for first in (0, 2000, 4000)]
    for thread in threads:
        thread.start()
    await eventually(lambda: len(got) == 6000, what="all have come")
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(6000))
    for first in (0, 2000, 4000):
        mine = [value for value in got if first <= value < first + 2000]
        assert mine == sorted(mine), "in the order of each thread"


def test_the_inbox_shrugs_when_the_loop_is_gone() -> None:
    loop = asyncio.new_event_loop()
    inbox = Inbox(loop, lambda _: None)
    loop.close()
    inbox.put(1)


# --- run_all ------------------------------------------------------------------------------------


async def test_run_all_keeps_the_order() -> None:
    async def give(value: int) -> int:
        await asyncio.sleep(0.001 * (5 - value))
        return value

    assert await run_all([give(value) for value in range(5)]) == list(range(5))


async def test_run_all_raises_the_first_failure_plain_when_the_rest_is_quiet(
    workers: Workers,
) -> None:
    started, release = threading.Event(), threading.Event()
    quiet: list[str] = []

    async def fail() -> None:
        await eventually(started.is_set, what="the others have begun")
        raise LookupError("first")

    def work(name: str) -> None:
        started.set()
        release.wait(10)
        quiet.append(name)

    async def transfer(name: str) -> None:
        await finish(workers.run(lambda: work(name)), release.set)

    with pytest.raises(LookupError, match="first"):
        await run_all([transfer("a"), fail(), transfer("b")])
    assert sorted(quiet) == ["a", "b"], "OWN-1: the others have ended before it is raised"


async def test_waiting_for_the_end_does_not_spin(workers: Workers) -> None:
    """anyio cancels again and again until a task ends; that must not cost a core."""
    release = threading.Event()
    timer = threading.Timer(0.5, release.set)

    async def fail() -> None:
        await asyncio.sleep(0.005)
        timer.start()
        raise LookupError("first")

    async def transfer() -> None:
        await finish(workers.run(lambda: release.wait(10)))

    before = time.thread_time()
    with pytest.raises(LookupError, match="first"):
        await run_all([transfer(), fail()])
    timer.join()
    assert time.thread_time() - before < 0.1, "the loop was busy while a thread was waited for"


async def test_run_all_is_cancelled_as_one() -> None:  # CAN-1
    ended: list[int] = []

    async def wait(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    task = asyncio.create_task(run_all([wait(number) for number in range(3)]))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [0, 1, 2]


def test_wait_until_says_what_did_not_come() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the moon"):
        wait_until(lambda: False, what="the moon", within=0.01)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_reader_on_anothers_core_moves_and_may_go_anywhere_again() -> None:
    allowed = os.sched_getaffinity(0)
    other = -1  # a thread's id that no thread has
    try:
        _job._cores[other] = core = min(allowed)
        os.sched_setaffinity(0, {core})
        _job._give_way()  # it may be nowhere else
        assert os.sched_getaffinity(0) == {core}

        os.sched_setaffinity(0, allowed)  # moves nobody
        _job._give_way()
        assert _job._cores[threading.get_ident()] != core
        assert os.sched_getaffinity(0) == allowed
    finally:
        os.sched_setaffinity(0, allowed)
        _job._cores.pop(other)
        _job._cores.pop(threading.get_ident(), None)
