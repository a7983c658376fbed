"""The tools for tests can fail: each broken fake is refused, by the name of what it breaks."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from aiordt._errors import ClosedError, OwnerDiedError, TransferError
from aiordt._metrics import phase
from aiordt._types import KIB, MIB
from aiordt.abc import Link
from aiordt.testing import (
    Exported,
    Leaks,
    Pair,
    at_phase,
    cancel_from_anywhere,
    cancel_randomly,
    check_leaks,
    check_transport,
    record_phases,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from aiordt.abc import Part

SETTLE = 0.03  # how long to wait for what must not happen
CHUNK = 256 * KIB


class Owner:
    """A process that is none: its memory is ours."""

    def __init__(self) -> None:
        self.tensors: dict[bytes, torch.Tensor] = {}
        self.paused = False
        self.dead = False


class MemoryLink(Link):
    """Keeps every promise, by ``memmove`` in chunks on the caller's loop."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.closed = False
        self.death_fd, self._alive = os.pipe()

    def died(self) -> None:
        self.owner.dead = True
        os.close(self._alive)
        self._alive = -1

    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")
        if self.owner.dead:
            raise OwnerDiedError("dead", owner="fake")

    async def turn(self) -> None:
        """Let others run, and wait while the owner is paused."""
        self.check()
        await asyncio.sleep(0)
        while self.owner.paused:
            self.check()
            await asyncio.sleep(0.001)
        self.check()

    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """Source, target and size of every run, cut into chunks."""
        run_nbytes, offsets = part.runs()
        for number, offset in enumerate(offsets.tolist()):
            for start in range(0, run_nbytes, CHUNK):
                nbytes = min(CHUNK, run_nbytes - start)
                target = part.target + number * run_nbytes + start
                yield part.address + offset + start, target, nbytes

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await self.turn()
        moved = 0
        for part in parts:
            if part.key not in self.owner.tensors:
                raise TransferError("no such key", transport="fake", peer="fake", nbytes=0)
            for source, target, nbytes in self.runs(part):
                ctypes.memmove(target, source, nbytes)
                moved += nbytes
                if moved >= CHUNK:
                    moved = 0
                    await self.turn()

    @override
    async def aclose(self) -> None:
        self.closed = True


class MemoryPair(Pair):
    can_pause = True

    def __init__(self, make_link: type[MemoryLink]) -> None:
        self.owner = Owner()
        self.fake = make_link(self.owner)
        self.link = self.fake

    @override
    async def export(self, tensors: Sequence[torch.Tensor]) -> list[Exported]:
        exported = []
        for tensor in tensors:
            key = os.urandom(16)
            self.owner.tensors[key] = tensor
            exported.append(Exported(key, 0, tensor.data_ptr(), tensor))
        return exported

    @override
    async def kill(self) -> None:
        self.fake.died()

    @override
    def pause(self) -> None:
        self.owner.paused = True

    @override
    def resume(self) -> None:
        self.owner.paused = False

    @override
    async def aclose(self) -> None:
        if not self.owner.dead:
            self.fake.died()
        assert self.link.death_fd is not None
        os.close(self.link.death_fd)
        self.fake.closed = True


async def check(make_link: type[MemoryLink]) -> None:
    async def make_pair() -> Pair:
        return MemoryPair(make_link)

    await check_transport(make_pair, settle=SETTLE, large_nbytes=10 * MIB)


async def test_a_link_that_keeps_its_promises_passes() -> None:
    leaks = Leaks()
    await check(MemoryLink)
    await leaks.wait_none()


class LateWrite(MemoryLink):
    """As a background task that nobody waits for."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except asyncio.CancelledError:
            late = parts[0]
            asyncio.get_running_loop().call_later(
                SETTLE / 3, ctypes.memset, late.target + late.nbytes - 1, 0, 1
            )
            raise


class SwallowCancel(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except BaseException as exc:
            raise ClosedError("channel closed") from exc


class IgnoresCancel(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except asyncio.CancelledError:
            return


class NoWake(MemoryLink):
    """Looks whether it is closed only where a read begins."""

    @override
    async def turn(self) -> None:
        await asyncio.sleep(0)
        while self.owner.paused:  # noqa: ASYNC110  (a fake may poll)
            await asyncio.sleep(0.001)


class WakesWithTheWrongError(MemoryLink):
    @override
    def check(self) -> None:
        if self.closed:
            raise OwnerDiedError("as if it had died", owner="fake")
        super().check()


class ClosesOnce(MemoryLink):
    @override
    async def aclose(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        await super().aclose()


class WorksWhenClosed(MemoryLink):
    waiting = 0

    @override
    def check(self) -> None:
        if not (self.closed and self.waiting):
            super().check()

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self.waiting = 0 if self.owner.paused else 1
        await super().read(parts)


class BlocksLoop(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        paused = self.owner.paused
        if paused or sum(part.nbytes for part in parts) < 10 * MIB:
            await super().read(parts)
            return
        time.sleep(0.02)  # noqa: ASYNC251  (that is what it breaks)
        for part in parts:
            for source, target, nbytes in self.runs(part):
                ctypes.memmove(target, source, nbytes)


class TornStripes(MemoryLink):
    """The last stripe of a large part never comes."""

    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        found = list(super().runs(part))
        yield from found[:-1] if part.nbytes > 8 * MIB else found


class BreaksOthers(MemoryLink):
    """One cancelled read breaks the connection for all."""

    broken = False

    @override
    async def turn(self) -> None:
        await super().turn()
        if self.broken:
            raise TransferError("broken", transport="fake", peer="fake", nbytes=0)

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        if not self.reading:
            self.broken = False
        self.reading += 1
        try:
            await super().read(parts)
        except asyncio.CancelledError:
            self.broken = True
            raise
        finally:
            self.reading -= 1

    reading = 0


class FailureBreaksOthers(BreaksOthers):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await MemoryLink.read(self, parts)
        except TransferError:
            self.owner.dead = True
            raise


class IgnoresOffsets(MemoryLink):
    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        yield part.address, part.target, part.nbytes


class WritesBeside(MemoryLink):
    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        yield from super().runs(part)
        if part.nbytes == 4095:
            yield part.address, part.target + part.nbytes, 1


class Only1024Parts(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read(parts[:1024])


class HangsOnDeath(MemoryLink):
    @override
    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    @override
    async def turn(self) -> None:
        await super().turn()
        while self.owner.dead:  # noqa: ASYNC110  (a fake may poll)
            await asyncio.sleep(0.001)


class ReadsTheDead(MemoryLink):
    @override
    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")


class NoDeathFd(MemoryLink):
    @override
    def died(self) -> None:
        self.owner.dead = True


class OneLoop(MemoryLink):
    """Works only where it was used first."""

    loop: asyncio.AbstractEventLoop | None = None

    @override
    async def turn(self) -> None:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")
        await super().turn()


class WritesAndSaysNo(MemoryLink):
    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        if len(parts) == 1 and parts[0].nbytes:
            ctypes.memset(parts[0].target, 0, 1)
        return False


class SaysYesAndDoesNothing(MemoryLink):
    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        return parts[0].nbytes == 4096


@pytest.mark.parametrize(
    ("broken", "invariant"),
    [
        (LateWrite, "OWN-1"),
        (SwallowCancel, "CAN-1"),
        (IgnoresCancel, "CAN-1"),
        (NoWake, "CLS-2"),
        (WakesWithTheWrongError, "CLS-2"),
        (ClosesOnce, "CLS-1"),
        (WorksWhenClosed, "CLS-2"),
        (BlocksLoop, "BLK-1"),
        (TornStripes, "DAT-1"),
        (IgnoresOffsets, "DAT-1"),
        (WritesBeside, "DAT-1"),
        (Only1024Parts, "DAT-1"),
        (OneLoop, "DAT-1"),
        (SaysYesAndDoesNothing, "DAT-1"),
        (WritesAndSaysNo, "OWN-1"),
        (BreaksOthers, "ISO-1"),
        (FailureBreaksOthers, "ISO-1"),
        (HangsOnDeath, "DTH-1"),
        (ReadsTheDead, "DTH-1"),
        (NoDeathFd, "DTH-1"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
async def test_a_broken_link_is_refused(broken: type[MemoryLink], invariant: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{invariant}: "):
        await check(broken)


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
