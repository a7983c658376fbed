"""What all checks of a `aiordt.abc.Link` are made of: targets, reads, and ends in time."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from aiordt._memory import view_memory
from aiordt._types import KIB

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence

    from aiordt.abc import Link, Part
    from aiordt.testing._pair import Exported, MakePair, Pair

#: What every call that must end may take, on a machine that does other things too.
END_SECONDS: Final = 10.0
#: What a pending call may take once the other process is gone (DTH-1).
DEATH_SECONDS: Final = 2.0
_CANARY: Final = 0xA5
_CANARY_BYTE: Final = bytes([_CANARY])
_PERIOD: Final = 65_521
#: Bytes before and after a target, which nobody may write.
_MARGIN: Final = 64


class Target:
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
        """What to read."""
        return self.exported.part(self.memory.data_ptr() + _MARGIN)

    @property
    def untouched(self) -> bool:
        """Whether nothing was written."""
        return _is_canary(self.memory)

    @property
    def arrived(self) -> bool:
        """Whether the content has come."""
        return torch.equal(self.memory[_MARGIN : _MARGIN + self.nbytes], self.exported.content)

    def check(self, what: str, promise: str = "DAT-1") -> None:
        """The content has come, and only that."""
        if not self.arrived:
            found = self.memory[_MARGIN : _MARGIN + self.nbytes]
            wanted = self.exported.content
            first = int((found != wanted).nonzero()[0])
            raise AssertionError(
                f"{promise}: {what}: of {self.nbytes} bytes the one at {first} is wrong "
                f"({int(found[first]):#04x}, not {int(wanted[first]):#04x})"
            )
        assert self.margins_clean, f"{promise}: {what}: written beside the target"

    @property
    def margins_clean(self) -> bool:
        """Whether nothing was written beside the target."""
        return _is_canary(self.memory[:_MARGIN]) and _is_canary(self.memory[-_MARGIN:])


def _is_canary(memory: torch.Tensor) -> bool:
    if memory.numel() > 64 * KIB:
        return bool((memory == _CANARY).all())
    return bytes(view_memory(memory.data_ptr(), memory.numel())) == _CANARY_BYTE * memory.numel()


def noise(nbytes: int, seed: int) -> torch.Tensor:
    """Bytes that repeat only after a prime number of them, so that no shift goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(0, 256, (min(nbytes, _PERIOD),), dtype=torch.uint8, generator=generator)
    if nbytes <= _PERIOD:
        return period
    return period.repeat(-(-nbytes // _PERIOD))[:nbytes].clone()


async def read(link: Link, targets: Sequence[Target], what: str, *, promise: str = "DAT-1") -> None:
    """As aiordt's runtime reads: at once if that is possible, else by and by."""
    parts = [target.part for target in targets]
    if not link.read_nowait(parts):
        for target in targets:
            assert target.untouched, f"OWN-1: {what}: read_nowait said no, but wrote"
        await link.read(parts)
    for target in targets:
        target.check(what, promise)


async def ended(tasks: Sequence[asyncio.Task[Any]], seconds: float, promise: str) -> None:
    """Wait until tasks have ended, for so long."""
    done, pending = await asyncio.wait(tasks, timeout=seconds)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending, timeout=1)
    assert len(done) == len(tasks), promise


def start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run ``coroutine`` as a task whose error need not be looked at."""
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(_see)
    return task


def _see(task: asyncio.Task[Any]) -> None:
    """Its error is looked at, if not by a check that failed before: no "never retrieved"."""
    if not task.cancelled():
        task.exception()


async def ticks(count: int) -> None:
    """Let the loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


class OtherLoop:
    """A coroutine on an event loop of its own, in a thread."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._make = make
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        async def main() -> None:
            async with asyncio.timeout(END_SECONDS):
                await self._make()

        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001  (given to who asks)
            self._error = exc

    async def ended(self, promise: str) -> BaseException | None:
        """Wait until it has ended; what it raised."""
        deadline = time.monotonic() + 2 * END_SECONDS
        while self._thread.is_alive():
            assert time.monotonic() < deadline, promise
            await asyncio.sleep(0.005)
        return self._error


@asynccontextmanager
async def made(make_pair: MakePair) -> AsyncGenerator[Pair]:
    """A pair that is closed at the end."""
    pair = await make_pair()
    try:
        yield pair
    finally:
        await pair.aclose()
