"""The promises of `aiordt.abc.Link`, checked on a real or a fake one.

Besides the invariants of `aiordt.abc` there is one that needs no more words there:

    DAT-1  When a read returns, the target holds every byte of the source, and nothing beside
           the target was written.
"""

from __future__ import annotations

import asyncio
import select
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from aiordt._errors import AiordtError, ClosedError, OwnerDiedError
from aiordt._memory import view_memory
from aiordt._types import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence

    from aiordt.abc import Link, Part
    from aiordt.testing._pair import Exported, MakePair, Pair

#: What every call that must end may take, on a machine that does other things too.
_END_SECONDS: Final = 10.0
#: What a pending call may take once the other process is gone (DTH-1).
_DEATH_SECONDS: Final = 2.0
_CANARY: Final = 0xA5
_CANARY_BYTE: Final = bytes([_CANARY])
_PERIOD: Final = 65_521
#: Bytes before and after a target, which nobody may write.
_MARGIN: Final = 64
_SIZES: Final = (0, 1, 4095, 4096, 65536, 65537, MIB + 3, 9 * MIB)
#: So often must a loop turn while something large arrives; one that is blocked turns twice.
_MIN_TICKS: Final = 10


class _Target:
    """Memory to receive into, between two margins."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.nbytes = exported.nbytes
        self.memory = torch.empty(self.nbytes + 2 * _MARGIN, dtype=torch.uint8)
        self.wipe()

    def wipe(self) -> None:
        """Fill everything with the canary."""
        self.memory.fill_(_CANARY)

    @property
    def part(self) -> Part:
        return self.exported.part(self.memory.data_ptr() + _MARGIN)

    @property
    def untouched(self) -> bool:
        return _is_canary(self.memory)

    def check(self, what: str) -> None:
        """The content has come, and only that."""
        found = self.memory[_MARGIN : _MARGIN + self.nbytes]
        wanted = self.exported.content
        if not torch.equal(found, wanted):
            first = int((found != wanted).nonzero()[0])
            raise AssertionError(
                f"DAT-1: {what}: of {self.nbytes} bytes the one at {first} is wrong "
                f"({int(found[first]):#04x}, not {int(wanted[first]):#04x})"
            )
        clean = _is_canary(self.memory[:_MARGIN]) and _is_canary(self.memory[-_MARGIN:])
        assert clean, f"DAT-1: {what}: written beside the target"


def _is_canary(memory: torch.Tensor) -> bool:
    if memory.numel() > 64 * KIB:
        return bool((memory == _CANARY).all())
    return bytes(view_memory(memory.data_ptr(), memory.numel())) == _CANARY_BYTE * memory.numel()


def _noise(nbytes: int, seed: int) -> torch.Tensor:
    """Bytes that repeat only after a prime number of them, so that no shift goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(0, 256, (min(nbytes, _PERIOD),), dtype=torch.uint8, generator=generator)
    if nbytes <= _PERIOD:
        return period
    return period.repeat(-(-nbytes // _PERIOD))[:nbytes].clone()


async def _read(link: Link, targets: Sequence[_Target], what: str) -> None:
    """As aiordt's runtime reads: at once if that is possible, else by and by."""
    parts = [target.part for target in targets]
    if not link.read_nowait(parts):
        for target in targets:
            assert target.untouched, f"OWN-1: {what}: read_nowait said no, but wrote"
        await link.read(parts)
    for target in targets:
        target.check(what)


async def _ended(tasks: Sequence[asyncio.Task[Any]], seconds: float, promise: str) -> None:
    """Wait until tasks have ended, for so long."""
    done, pending = await asyncio.wait(tasks, timeout=seconds)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending, timeout=1)
    assert len(done) == len(tasks), promise


def _start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(_see)
    return task


def _see(task: asyncio.Task[Any]) -> None:
    """Its error is looked at, if not by a check that failed before: no "never retrieved"."""
    if not task.cancelled():
        task.exception()


# --- DAT-1 --------------------------------------------------------------------------------------


async def _check_sizes(pair: Pair) -> None:
    exported = await pair.export([_noise(nbytes, nbytes) for nbytes in _SIZES])
    for each in exported:
        await _read(pair.link, [_Target(each)], f"{each.nbytes} bytes")
    await _read(pair.link, [_Target(each) for each in exported], "all sizes in one read")


async def _check_many_parts(pair: Pair) -> None:
    tensors = [_noise(37 + number % 101, number) for number in range(1500)]
    exported = await pair.export(tensors)
    await _read(pair.link, [_Target(each) for each in exported[:5]], "5 small parts in one read")
    await _read(pair.link, [_Target(each) for each in exported], "1500 parts in one read")
    await _read(pair.link, [_Target(each) for each in exported[::-1]], "1500 parts, reversed")


async def _check_strides(pair: Pair) -> None:
    matrix = torch.arange(300 * 700, dtype=torch.int32).reshape(300, 700)
    cube = torch.arange(24 * 50 * 60, dtype=torch.int16).reshape(24, 50, 60)
    wide = torch.arange(5 * 3 * MIB // 4, dtype=torch.int32).reshape(5, -1)
    tensors = {
        "columns": matrix[:, 100:350],
        "one column": matrix[:, 7],
        "5000 short runs": torch.arange(15_000).reshape(5000, 3)[:, 1],
        "3000 runs, 3 MB": torch.arange(900_000, dtype=torch.int32).reshape(3000, 300)[:, :257],
        "every third row": matrix[::3],
        "transposed": matrix.T,
        "inner block": cube[2:20, 5:45, 10:30],
        "permuted": cube.permute(2, 0, 1),
        "permuted block": cube.permute(2, 0, 1)[3:40, 2:9],
        "expanded": torch.arange(1000).expand(7, 1000),
        "long runs": wide[:, 1 : wide.shape[1] - 1],
    }
    exported = await pair.export(list(tensors.values()))
    for name, each in zip(tensors, exported, strict=True):
        await _read(pair.link, [_Target(each)], f"a strided tensor ({name})")
    await _read(pair.link, [_Target(each) for each in exported], "strided tensors in one read")


async def _check_concurrency(pair: Pair) -> None:
    nbytes = (100, 5000, 70_000, 300_000, MIB + 5)
    exported = await pair.export([_noise(size, size) for size in nbytes])
    tasks = [
        _start(_read(pair.link, [_Target(exported[number % 5])], "50 reads at once"))
        for number in range(50)
    ]
    await _ended(tasks, 3 * _END_SECONDS, "DAT-1: 50 reads at once must all end")
    for task in tasks:
        task.result()


async def _check_other_loop(pair: Pair) -> None:
    exported = await pair.export([_noise(size, size) for size in (100, 70_000, 9 * MIB)])
    errors: list[BaseException] = []

    def run() -> None:
        async def main() -> None:
            async with asyncio.timeout(_END_SECONDS):
                for each in exported:
                    await _read(pair.link, [_Target(each)], "a read from another loop")

        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001  (raised below)
            errors.append(exc)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * _END_SECONDS
    while any(thread.is_alive() for thread in threads):
        assert time.monotonic() < deadline, "DAT-1: reads from other loops must end"
        await asyncio.sleep(0.005)
    for error in errors:
        raise AssertionError(f"DAT-1: a link must work from any loop: {error!r}") from error


# --- BLK-1 --------------------------------------------------------------------------------------


async def _check_loop_turns(pair: Pair, large_nbytes: int) -> None:
    (exported,) = await pair.export([_noise(large_nbytes, 1)])
    target = _Target(exported)
    await _read(pair.link, [target], "a large read")  # connections, page faults
    target.wipe()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = _start(tick())
    await asyncio.sleep(0)
    ticks = 0
    await pair.link.read([target.part])
    seen = ticks
    ticking.cancel()
    target.check("a large read")
    assert seen >= _MIN_TICKS, (
        f"BLK-1: while {large_nbytes} bytes were read the loop turned {seen} times: it was blocked"
    )


# --- CAN-1, OWN-1 -------------------------------------------------------------------------------


async def _cancel_once(
    link: Link, target: _Target, wait: Callable[[asyncio.Task[None]], Coroutine[Any, Any, None]]
) -> bool:
    """Cancel a read; whether it was still going on."""
    target.wipe()
    task = _start(link.read([target.part]))
    await wait(task)
    if not task.cancel():
        task.result()
        target.check("a read that ended before it could be cancelled")
        return False
    await _ended([task], _END_SECONDS, "CAN-1: a cancelled read must end")
    if not task.cancelled():
        raise AssertionError(
            f"CAN-1: a cancelled read must raise CancelledError, not end with {task.exception()!r}"
        ) from task.exception()
    target.wipe()  # from here on the memory is the caller's again
    return True


def _after_ticks(count: int) -> Callable[[asyncio.Task[None]], Coroutine[Any, Any, None]]:
    async def wait(_: asyncio.Task[None]) -> None:
        for _tick in range(count):
            await asyncio.sleep(0)

    return wait


def _after_seconds(seconds: float) -> Callable[[asyncio.Task[None]], Coroutine[Any, Any, None]]:
    async def wait(task: asyncio.Task[None]) -> None:
        await asyncio.wait({task}, timeout=seconds)

    return wait


async def _check_cancel(pair: Pair, settle: float) -> None:
    (exported,) = await pair.export([_noise(9 * MIB, 2)])
    warm = _Target(exported)
    started = time.monotonic()
    await _read(pair.link, [warm], "before any cancellation")
    duration = time.monotonic() - started
    waits = [_after_ticks(count) for count in (1, 2, 3, 5, 8)]
    waits += [_after_seconds(duration * step / 6) for step in range(1, 6)]
    targets = []
    for wait in waits:
        target = _Target(exported)
        if await _cancel_once(pair.link, target, wait):
            targets.append(target)
    assert targets, "CAN-1: no read could be cancelled: do its calls block the loop (BLK-1)?"
    if pair.can_pause:
        pair.pause()
        for wait in (_after_ticks(3), _after_seconds(settle)):
            target = _Target(exported)
            if await _cancel_once(pair.link, target, wait):
                targets.append(target)
        pair.resume()
    await asyncio.sleep(settle)
    for target in targets:
        assert target.untouched, "OWN-1: the target was written after the read had ended"
    warm.wipe()
    await _read(pair.link, [warm], "after cancellations")


# --- ISO-1 --------------------------------------------------------------------------------------


async def _check_isolation(pair: Pair, settle: float) -> None:
    exported = await pair.export([_noise(4 * MIB + number, number) for number in range(4)])
    for delay in (0, 1, 3, 8):
        targets = [_Target(each) for each in exported]
        tasks = [_start(pair.link.read([target.part])) for target in targets]
        await _after_ticks(delay + 1)(tasks[0])
        tasks[0].cancel()
        await _check_others(tasks, targets, f"one was cancelled after {delay + 1} ticks")
    small, large = exported[0].bogus(), exported[1].bogus()
    for bogus in (small, large):
        targets = [_Target(bogus), *map(_Target, exported[1:])]
        tasks = [_start(pair.link.read([target.part])) for target in targets]
        await _check_others(tasks, targets, "one failed")
        error = tasks[0].exception()
        assert isinstance(error, AiordtError), (
            f"ISO-1: reading what is not exported must raise an AiordtError, not {error!r}"
        )
    if pair.can_pause:
        targets = [_Target(each) for each in exported]
        pair.pause()
        tasks = [_start(pair.link.read([target.part])) for target in targets]
        await asyncio.sleep(settle)
        tasks[0].cancel()
        await _ended(tasks[:1], _END_SECONDS, "CAN-1: a cancelled read must end, peer paused")
        pair.resume()
        await _check_others(tasks, targets, "one was cancelled while the peer was paused")


async def _check_others(
    tasks: Sequence[asyncio.Task[None]], targets: Sequence[_Target], event: str
) -> None:
    await _ended(tasks, _END_SECONDS, f"ISO-1: {event}; the others must end")
    for task, target in zip(tasks[1:], targets[1:], strict=True):
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            raise AssertionError(f"ISO-1: {event}; another ended with {error!r}") from error
        try:
            target.check("another")
        except AssertionError as exc:
            raise AssertionError(f"ISO-1: {event}; another is wrong: {exc}") from exc


# --- CLS-1, CLS-2 -------------------------------------------------------------------------------


async def _check_close(make_pair: MakePair, settle: float) -> None:
    async with _made(make_pair) as pair:
        exported = await pair.export([_noise(size, size) for size in (1000, 9 * MIB, 9 * MIB + 1)])
        await _read(pair.link, [_Target(exported[0])], "before closing")
        targets = [_Target(each) for each in exported]
        if pair.can_pause:
            pair.pause()
        tasks = [_start(pair.link.read([target.part])) for target in targets]
        if pair.can_pause:
            await asyncio.sleep(settle)
        else:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        closing = _start(pair.link.aclose())
        await asyncio.sleep(0)
        closing.cancel()  # CLS-1: it closes even so
        await _ended([closing], _END_SECONDS, "CLS-1: aclose() must end")
        if not closing.cancelled():
            closing.result()
        try:
            await _ended(tasks, _DEATH_SECONDS, "CLS-2: aclose() must wake every waiter")
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
                await _read(pair.link, [target], "after closing")
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


# --- DTH-1 --------------------------------------------------------------------------------------


async def _check_death(make_pair: MakePair, settle: float) -> None:
    async with _made(make_pair) as pair:
        exported = await pair.export([_noise(size, size) for size in (1000, 70_000, 9 * MIB)])
        await _read(pair.link, [_Target(exported[0])], "before the death")
        death_fd = pair.link.death_fd
        if death_fd is not None:
            assert not _readable(death_fd), "DTH-1: death_fd must not be readable while it lives"
        if pair.can_pause:
            pair.pause()
        targets = [_Target(each) for each in exported]
        tasks = [_start(pair.link.read([target.part])) for target in targets]
        await asyncio.sleep(settle if pair.can_pause else 0)
        killed = time.monotonic()
        await pair.kill()
        left = _DEATH_SECONDS - (time.monotonic() - killed)
        await _ended(tasks, max(left, 0.1), "DTH-1: every pending read must raise within 2 s")
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
            task = _start(_read(pair.link, [_Target(each)], "after the death"))
            await _ended([task], _DEATH_SECONDS, "DTH-1: a read of the dead must raise within 2 s")
            error = task.exception()
            assert isinstance(error, OwnerDiedError), (
                f"DTH-1: a read of the dead must raise OwnerDiedError, not end with {error!r}"
            )


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


@asynccontextmanager
async def _made(make_pair: MakePair) -> AsyncGenerator[Pair]:
    pair = await make_pair()
    try:
        yield pair
    finally:
        await pair.aclose()


async def check_transport(
    make_pair: MakePair, *, settle: float = 0.05, large_nbytes: int = 64 * MIB
) -> None:
    """Check every promise of a `aiordt.abc.Link`, on links that ``make_pair`` makes.

    Checked are, by the names of `aiordt.abc` and of this module: DAT-1 for sizes from 0 to
    9 MiB, 1500 parts in one read, strided parts, 50 reads at once and reads from other loops;
    BLK-1; CAN-1 and OWN-1 with cancellation at ten points; ISO-1; CLS-1 and CLS-2; DTH-1.

    Args:
        make_pair: Makes a connected pair; called three times, and each is closed. The third
            one's process is killed.
        settle: How long to wait for something that must *not* happen, in seconds.
        large_nbytes: Size of the read during which the loop must turn; so large that it takes
            well over a millisecond.

    Raises:
        AssertionError: A promise is broken; the message begins with its name.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its own would compete with the transport's
    try:
        async with _made(make_pair) as pair:
            await _check_sizes(pair)
            await _check_many_parts(pair)
            await _check_strides(pair)
            await _check_concurrency(pair)
            await _check_other_loop(pair)
            await _check_loop_turns(pair, max(large_nbytes, 256 * KIB))
            await _check_cancel(pair, settle)
            await _check_isolation(pair, settle)
        await _check_close(make_pair, settle)
        await _check_death(make_pair, settle)
    finally:
        torch.set_num_threads(num_threads)
