"""How things end: exports that are given up, closed links, dead owners. HLD-1, CLS-*, DTH-1."""

from __future__ import annotations

import asyncio
import select
import time
from typing import TYPE_CHECKING

from aiordt._errors import AiordtError, ClosedError, OwnerDiedError
from aiordt._types import MIB
from aiordt.testing._checks import (
    DEATH_SECONDS,
    END_SECONDS,
    OtherLoop,
    Target,
    ended,
    made,
    noise,
    read,
    start,
    ticks,
)

if TYPE_CHECKING:
    from aiordt.testing._pair import MakePair, Pair


# --- HLD-1 --------------------------------------------------------------------------------------


async def check_hold(pair: Pair) -> None:
    """HLD-1: exports are given up, and written over, while they are read."""
    for nbytes, delay in ((300, 1), (70_000, 2), (9 * MIB, 1), (32 * MIB, 4), (32 * MIB, 30)):
        rows = noise(min(nbytes, 4 * MIB), 9).view(-1, 4)
        whole, strided = await pair.export([noise(nbytes, delay), rows])
        sources = [whole, strided.cut(strided.like[:, 1:3]), whole]
        targets = [Target(each) for each in sources]
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await ticks(delay)
        await pair.overwrite(whole)
        await ended(tasks, END_SECONDS, "HLD-1: reads of what is given up must end")
        for task, target in zip(tasks, targets, strict=True):
            error = None if task.cancelled() else task.exception()
            assert error is None or isinstance(error, AiordtError), (
                f"HLD-1: a read of what is given up must arrive or raise an AiordtError: {error!r}"
            )
            assert error is not None or target.arrived, (
                f"HLD-1: of {target.nbytes} bytes some had been written over before they were read"
            )
            assert target.margins_clean, "HLD-1: written beside the target"
        late = start(read(pair.link, [Target(whole)], "what was given up"))
        await ended([late], END_SECONDS, "HLD-1: a read of what was given up must end")
        assert isinstance(late.exception(), AiordtError), (
            f"HLD-1: what was given up must be refused, not end with {late.exception()!r}"
        )
    (alive,) = await pair.export([noise(70_000, 5)])
    await read(pair.link, [Target(alive)], "after exports that were given up")


# --- CLS-1, CLS-2 -------------------------------------------------------------------------------


async def check_close(make_pair: MakePair, settle: float) -> None:
    """CLS-1 and CLS-2: a link is closed while reads run, and used again."""
    async with made(make_pair) as pair:
        exported = await pair.export([noise(size, size) for size in (1000, 9 * MIB, 9 * MIB + 1)])
        await read(pair.link, [Target(exported[0])], "before closing")
        targets = [Target(each) for each in exported]
        if pair.can_pause:
            pair.pause()
        tasks = [start(pair.link.read([target.part])) for target in targets]
        if pair.can_pause:
            await asyncio.sleep(settle)
        else:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        closing = start(pair.link.aclose())
        await asyncio.sleep(0)
        closing.cancel()  # CLS-1: it closes even so
        await ended([closing], END_SECONDS, "CLS-1: aclose() must end")
        if not closing.cancelled():
            closing.result()
        try:
            await ended(tasks, DEATH_SECONDS, "CLS-2: aclose() must wake every waiter")
        finally:
            if pair.can_pause:
                pair.resume()
        for task, target in zip(tasks, targets, strict=True):
            error = task.exception()
            if error is None:
                target.check("a read that ended before its link was closed")
                continue
            assert isinstance(error, ClosedError), (
                f"CLS-2: aclose() must wake waiters with ClosedError, not {error!r}"
            )
            target.wipe()
        try:
            await pair.link.aclose()
        except Exception as exc:
            raise AssertionError(f"CLS-1: a second aclose() must do nothing, not {exc!r}") from exc
        for target in targets[:2]:
            try:
                await read(pair.link, [target], "after closing")
            except ClosedError:
                continue
            except Exception as exc:
                raise AssertionError(f"CLS-2: a closed link must say so, not {exc!r}") from exc
            raise AssertionError("CLS-2: a closed link must raise ClosedError")
        await asyncio.sleep(settle)
        assert all(
            target.untouched
            for task, target in zip(tasks, targets, strict=True)
            if task.exception()
        ), "OWN-1: a target was written after its read had ended with ClosedError"


async def check_close_elsewhere(make_pair: MakePair, settle: float) -> None:
    """CLS-1 and CLS-2: a link is closed from another loop, twice at once, while reads run."""
    async with made(make_pair) as pair:
        exported = await pair.export([noise(size, size) for size in (1000, 9 * MIB)])
        targets = [Target(each) for each in exported]
        if pair.can_pause:
            pair.pause()
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await asyncio.sleep(settle if pair.can_pause else 0)
        try:
            closers = [OtherLoop(pair.link.aclose) for _ in range(2)]
            for closer in closers:
                error = await closer.ended("CLS-1: aclose() from another loop must end")
                if error is not None:
                    raise AssertionError(
                        f"CLS-1: aclose() must work from any loop, and twice at once: {error!r}"
                    ) from error
            promise = "CLS-2: aclose() from another loop must wake every waiter"
            await ended(tasks, DEATH_SECONDS, promise)
        finally:
            if pair.can_pause:
                pair.resume()
        for task, target in zip(tasks, targets, strict=True):
            error = task.exception()
            if error is None:
                target.check("a read that ended before its link was closed")
                continue
            assert isinstance(error, ClosedError), (
                f"CLS-2: aclose() from another loop must raise ClosedError here, not {error!r}"
            )


async def check_close_all(make_pair: MakePair) -> None:
    """CLS-2: the pair, and with it the transport, is closed while reads run."""
    pair = await make_pair()
    try:
        exported = await pair.export([noise(size, size) for size in (1000, 9 * MIB)])
        await read(pair.link, [Target(exported[0])], "before closing everything")
        targets = [Target(each) for each in exported]
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await ticks(2)
    finally:
        await pair.aclose()
    await ended(tasks, DEATH_SECONDS, "CLS-2: closing the transport must wake every waiter")
    for task, target in zip(tasks, targets, strict=True):
        error = task.exception()
        if error is None:
            target.check("a read that ended before its transport was closed")
        else:
            assert isinstance(error, ClosedError), (
                f"CLS-2: closing the transport must raise ClosedError, not {error!r}"
            )


# --- DTH-1 --------------------------------------------------------------------------------------


async def check_death(make_pair: MakePair, settle: float) -> None:
    """DTH-1: the other process ends while reads run."""
    async with made(make_pair) as pair:
        exported = await pair.export([noise(size, size) for size in (1000, 70_000, 9 * MIB)])
        await read(pair.link, [Target(exported[0])], "before the death")
        death_fd = pair.link.death_fd
        if death_fd is not None:
            assert not _readable(death_fd), "DTH-1: death_fd must not be readable while it lives"
        if pair.can_pause:
            pair.pause()
        targets = [Target(each) for each in exported]
        tasks = [start(pair.link.read([target.part])) for target in targets]
        await asyncio.sleep(settle if pair.can_pause else 0)
        killed = time.monotonic()
        await pair.kill()
        left = DEATH_SECONDS - (time.monotonic() - killed)
        await ended(tasks, max(left, 0.1), "DTH-1: every pending read must raise within 2 s")
        for task, target in zip(tasks, targets, strict=True):
            error = task.exception()
            if error is None:
                target.check("a read that ended before the other process did")
                continue
            assert isinstance(error, OwnerDiedError), (
                f"DTH-1: a pending read must raise OwnerDiedError, not {error!r}"
            )
        if death_fd is not None:
            assert _readable(death_fd), "DTH-1: death_fd must be readable after the death"
        for each in exported:
            task = start(read(pair.link, [Target(each)], "after the death"))
            await ended([task], DEATH_SECONDS, "DTH-1: a read of the dead must raise within 2 s")
            error = task.exception()
            assert isinstance(error, OwnerDiedError), (
                f"DTH-1: a read of the dead must raise OwnerDiedError, not end with {error!r}"
            )


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
