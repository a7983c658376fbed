"""What a test left behind: file descriptors, threads, shared memory, tasks, exports."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiordt
from aiordt._arena import arena

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_FDS: Final = Path("/proc/self/fd")
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  (looked at, not written)


def _fds() -> Counter[str]:
    found: Counter[str] = Counter()
    for name in os.listdir(_FDS):
        try:
            target = os.readlink(_FDS / name)
        except OSError:  # the one that listed the directory
            continue
        if target.startswith("/memfd:aiordt"):  # kept warm; what of it is in use counts below
            continue
        found[f"fd {name} -> {target}"] += 1
    return found


def _threads() -> Counter[str]:
    return Counter(f"thread {thread.name}" for thread in threading.enumerate())


def _shared_memory() -> Counter[str]:
    try:
        names = os.listdir(_SHARED_MEMORY)
    except OSError:
        names = []
    found = Counter(f"/dev/shm/{name}" for name in names if "aiordt" in name)  # noqa: S108
    found["byte of shared memory"] = arena.used_nbytes
    return +found


def _tasks() -> Counter[str]:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return Counter()
    return Counter(
        f"task {task.get_name()} of {getattr(task.get_coro(), '__qualname__', '?')}"
        for task in asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    )


def _runtime() -> Counter[str]:
    stats = aiordt.stats()
    return Counter(
        {
            "exported tensor": stats.exports,
            "held TensorRef": stats.held_refs,
            "pull in flight": stats.in_flight,
        }
    )


def _everything_counts(_: str) -> bool:
    """Ignore nothing."""
    return False


@dataclass(frozen=True)
class Leaks:
    """A snapshot of what this process holds.

    Only names are kept, never the things. What counts: open file descriptors, threads,
    aiordt's entries in ``/dev/shm``, shared memory that tensors have, the other tasks of the
    running loop, and aiordt's exports, refs and pulls in flight.

    Args:
        ignore: Says of a name whether it does not count.
    """

    ignore: Callable[[str], bool] = _everything_counts
    held: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", self._now())

    def _now(self) -> Counter[str]:
        found = _fds() + _threads() + _shared_memory() + _tasks() + _runtime()
        return Counter({name: count for name, count in found.items() if not self.ignore(name)})

    def new(self) -> list[str]:
        """What is held now and was not then, sorted, with the count where it is not one."""
        more = self._now() - self.held
        return [f"{count} x {name}" if count > 1 else name for name, count in sorted(more.items())]

    def check(self, *, within: float = 5.0) -> None:
        """Wait until nothing new is held; blocks.

        Raises:
            AssertionError: Something still is after ``within`` seconds; lists it.
        """
        deadline = time.monotonic() + within
        gc.collect()
        while leaked := self.new():
            if time.monotonic() > deadline:
                raise AssertionError(_message(leaked, within))
            time.sleep(0.01)
            gc.collect()

    async def wait_none(self, *, within: float = 5.0) -> None:
        """As `check`, without blocking the loop, so that its tasks can end.

        Raises:
            AssertionError: Something still is held after ``within`` seconds; lists it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within
        gc.collect()
        while leaked := self.new():
            if loop.time() > deadline:
                raise AssertionError(_message(leaked, within))
            await asyncio.sleep(0.01)
            gc.collect()


def _message(leaked: list[str], within: float) -> str:
    return f"leaked (still held after {within} s):\n  " + "\n  ".join(leaked)


@contextmanager
def check_leaks(
    *, within: float = 5.0, ignore: Callable[[str], bool] = _everything_counts
) -> Generator[Leaks]:
    """Check that the block leaves nothing behind; what it raises goes first.

    Args:
        within: Seconds that clean-up may still take after the block.
        ignore: Says of a name whether it does not count.

    Raises:
        AssertionError: Something leaked; lists it.
    """
    leaks = Leaks(ignore)
    yield leaks
    leaks.check(within=within)
