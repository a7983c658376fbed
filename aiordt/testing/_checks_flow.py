"""Many reads at once, and some that are cancelled: DAT-1, FAIR-1, BLK-1, CAN-1, ISO-1."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from aiordt._errors import AiordtError
from aiordt._types import MIB
from aiordt.testing._checks import END_SECONDS, OtherLoop, Target, ended, noise, read, start, ticks

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from aiordt.abc import Link
    from aiordt.testing._pair import Exported, Pair

#: So often must a loop turn while something large arrives; one that is blocked turns twice.
_MIN_TICKS: Final = 10
#: Tries in one of which a small read must overtake large ones: one may lose by bad luck.
_TRIES: Final = 5


# --- DAT-1 --------------------------------------------------------------------------------------


async def check_concurrency(pair: Pair) -> None:
    """DAT-1: reads of other tensors, of the same and of overlapping batches, all at once."""
    sizes = (100, 5000, 70_000, 300_000, MIB + 5)
    exported = await pair.export([noise(size, size) for size in sizes])
    rows = exported[4].like[: 1000 * 1024].view(1000, 1024)
    cuts = [exported[4].cut(rows[number::7, number:700]) for number in range(7)]
    reads = [read(pair.link, [Target(exported[number % 5])], _AT_ONCE) for number in range(50)]
    reads += [read(pair.link, [Target(cut)], _AT_ONCE) for cut in cuts]
    for first in range(5):
        batch = [exported[(first + number) % 5] for number in range(3)]
        targets = [Target(each) for each in [*batch, cuts[first], batch[0]]]
        reads.append(read(pair.link, targets, "overlapping batches at once"))
    tasks = [start(each) for each in reads]
    await ended(tasks, 3 * END_SECONDS, f"DAT-1: {_AT_ONCE} must all end")
    for task in tasks:
        task.result()


_AT_ONCE: Final = "60 reads at once"


async def check_other_loops(pair: Pair) -> None:
    """DAT-1: reads at once from three loops, in three threads."""
    exported = await pair.export([noise(size, size) for size in (100, 70_000, 9 * MIB)])

    async def read_all() -> None:
        tasks = []
        for number in range(2 * len(exported)):
            target = Target(exported[number % len(exported)])
            tasks.append(start(read(pair.link, [target], "reads from three loops at once")))
        await ended(tasks, END_SECONDS, "DAT-1: reads from other loops must end")
        for task in tasks:
            task.result()

    others = [OtherLoop(read_all) for _ in range(2)]
    await read_all()
    for other in others:
        error = await other.ended("DAT-1: reads from other loops must end")
        if error is not None:
            raise AssertionError(f"DAT-1: a link must work from any loop: {error!r}") from error


# --- FAIR-1 -------------------------------------------------------------------------------------


async def check_fairness(pair: Pair, large: Exported) -> None:
    """FAIR-1: a small read that starts after three large ones does not end after all of them."""
    small, strided = await pair.export([noise(300, 3), noise(90_000, 4).reshape(300, 300)])
    for late in (small, strided.cut(strided.like[::2, 5:80])):
        for _ in range(_TRIES):
            if await _overtakes(pair, large, late):
                break
        else:
            raise AssertionError(
                f"FAIR-1: a read of {late.nbytes} bytes waited until reads of {large.nbytes} bytes "
                f"before it had ended, {_TRIES} times of {_TRIES}"
            )


async def _overtakes(pair: Pair, large: Exported, late: Exported) -> bool:
    targets = [Target(large) for _ in range(3)]
    tasks = [start(pair.link.read([target.part])) for target in targets]
    await ticks(3)
    target = Target(late)
    task = start(pair.link.read([target.part]))
    await asyncio.wait({task})
    overtaken = not all(task.done() for task in tasks)
    await ended([task, *tasks], END_SECONDS, "FAIR-1: large reads and a small one must all end")
    for ended_task in (task, *tasks):
        ended_task.result()
    for each in (target, *targets):
        each.check("a small read among large ones")
    return overtaken


# --- BLK-1 --------------------------------------------------------------------------------------


async def check_loop_turns(pair: Pair, exported: Exported) -> None:
    """BLK-1: the loop turns while something large arrives."""
    target = Target(exported)
    await read(pair.link, [target], "a large read")  # connections, page faults
    target.wipe()
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = start(tick())
    await asyncio.sleep(0)
    turns = 0
    await pair.link.read([target.part])
    seen = turns
    ticking.cancel()
    target.check("a large read")
    assert seen >= _MIN_TICKS, (
        f"BLK-1: while {exported.nbytes} bytes were read the loop turned {seen} times: "
        "it was blocked"
    )


# --- CAN-1, OWN-1 -------------------------------------------------------------------------------


async def _cancel_once(
    link: Link, target: Target, wait: Callable[[asyncio.Task[None]], Coroutine[Any, Any, None]]
) -> bool:
    """Cancel a read; whether it was still going on."""
    target.wipe()
    task = start(link.read([target.part]))
    await wait(task)
    if not task.cancel():
        task.result()
        target.check("a read that ended before it could be cancelled")
        return False
    await ended([task], END_SECONDS, "CAN-1: a cancelled read must end")
    if not task.cancelled():
        raise AssertionError(
            f"CAN-1: a cancelled read must raise CancelledError, not end with {task.exception()!r}"
        ) from task.exception()
    target.wipe()  # from here on the memory is the caller's again
    return True


def _after_ticks(count: int) -> Callable[[asyncio.Task[None]], Coroutine[Any, Any, None]]:
    return lambda _: ticks(count)


def _after_seconds(seconds: float) -> Callable[[asyncio.Task[None]], Coroutine[Any, Any, None]]:
    async def wait(task: asyncio.Task[None]) -> None:
        await asyncio.wait({task}, timeout=seconds)

    return wait


async def check_cancel(pair: Pair, settle: float) -> None:
    """CAN-1 and OWN-1: reads that are cancelled at ten points."""
    (exported,) = await pair.export([noise(9 * MIB, 2)])
    warm = Target(exported)
    started = time.monotonic()
    await read(pair.link, [warm], "before any cancellation")
    duration = time.monotonic() - started
    waits = [_after_ticks(count) for count in (1, 2, 3, 5, 8)]
    waits += [_after_seconds(duration * step / 6) for step in range(1, 6)]
    targets = []
    for wait in waits:
        target = Target(exported)
        if await _cancel_once(pair.link, target, wait):
            targets.append(target)
    assert targets, "CAN-1: no read could be cancelled: do its calls block the loop (BLK-1)?"
    if pair.can_pause:
        pair.pause()
        for wait in (_after_ticks(3), _after_seconds(settle)):
            target = Target(exported)
            if await _cancel_once(pair.link, target, wait):
                targets.append(target)
        pair.resume()
    await asyncio.sleep(settle)
    for target in targets:
        assert target.untouched, "OWN-1: the target was written after the read had ended"
    warm.wipe()
    await read(pair.link, [warm], "after cancellations")


# --- ISO-1 --------------------------------------------------------------------------------------


async def check_isolation(pair: Pair, settle: float) -> None:
    """ISO-1: one of four reads is cancelled, or fails."""
    exported = await pair.export([noise(4 * MIB + number, number) for number in range(4)])
    for delay in (0, 1, 3, 8):
        targets = [Target(each) for each in exported]
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await ticks(delay + 1)
        tasks[0].cancel()
        await _check_others(tasks, targets, f"one was cancelled after {delay + 1} ticks")
    small, large = exported[0].bogus(), exported[1].bogus()
    for bogus in (small, large):
        targets = [Target(bogus), *map(Target, exported[1:])]
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await _check_others(tasks, targets, "one failed")
        error = tasks[0].exception()
        assert isinstance(error, AiordtError), (
            f"ISO-1: reading what is not exported must raise an AiordtError, not {error!r}"
        )
    if pair.can_pause:
        targets = [Target(each) for each in exported]
        pair.pause()
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await asyncio.sleep(settle)
        tasks[0].cancel()
        await ended(tasks[:1], END_SECONDS, "CAN-1: a cancelled read must end, peer paused")
        pair.resume()
        await _check_others(tasks, targets, "one was cancelled while the peer was paused")


async def _check_others(
    tasks: Sequence[asyncio.Task[None]], targets: Sequence[Target], event: str
) -> None:
    await ended(tasks, END_SECONDS, f"ISO-1: {event}; the others must end")
    for task, target in zip(tasks[1:], targets[1:], strict=True):
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            raise AssertionError(f"ISO-1: {event}; another ended with {error!r}") from error
        try:
            target.check("another")
        except AssertionError as exc:
            raise AssertionError(f"ISO-1: {event}; another is wrong: {exc}") from exc
