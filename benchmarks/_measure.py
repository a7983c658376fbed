"""Samples and what is said of them; the machine's facts; CPU clocks; the heartbeat."""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib.metadata
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

#: Seconds that the heartbeat sleeps between two ticks.
PERIOD: Final = 0.001


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` % of ``values`` lie, interpolated between two.

    Raises:
        ValueError: There are no values, or ``percent`` is not in 0..100.
    """
    if not values:
        raise ValueError("no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in 0..100, not {percent}")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Samples in short; all but ``num_samples`` in seconds."""

    num_samples: int
    low: float
    p10: float
    p50: float
    p90: float
    p99: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise ``samples``, of which there is at least one."""
        return cls(
            num_samples=len(samples),
            low=min(samples),
            p10=percentile(samples, 10),
            p50=percentile(samples, 50),
            p90=percentile(samples, 90),
            p99=percentile(samples, 99),
            high=max(samples),
        )


# --- words ---------------------------------------------------------------------------------


def format_nbytes(nbytes: int) -> str:
    """``1048576`` as ``1 MiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def format_seconds(seconds: float) -> str:
    """Three digits and the unit that fits."""
    if seconds == 0:
        return "0"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{_three_digits(seconds / unit)} {name}"
    return f"{seconds * 1e9:.0f} ns"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# --- loop lag ------------------------------------------------------------------------------


class Heartbeat:
    """A coroutine that wants to run every `PERIOD`, and writes down when it did."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin anew, on the running loop."""
        self.ticks = []
        self._task = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            due = time.perf_counter() + PERIOD
            await asyncio.sleep(PERIOD)
            self.ticks.append((due, time.perf_counter()))

    def stop(self) -> list[tuple[float, float]]:
        """End; when each tick was due and when it came, by `time.perf_counter`."""
        if self._task is not None:
            self._task.cancel()
        return self.ticks


def lateness(
    ticks: Iterable[tuple[float, float]],
    windows: Sequence[tuple[float, float]],
    *,
    corrected: bool = True,
) -> list[float]:
    """How late ticks were that were due, or came, in one of ``windows``.

    A blocked loop ticks once where it should have ticked many times, so that a plain count
    of ticks would hide the blocking. As in HdrHistogram, each tick that was ``n`` periods late
    also stands for those that it kept from coming, which were ``n - 1``, ``n - 2`` ... late.
    """
    late = []
    for due, came in ticks:
        if any(due <= end and came >= start for start, end in windows):
            delay = came - due
            late.append(delay)
            if corrected:
                late.extend(delay - PERIOD * missed for missed in range(1, int(delay / PERIOD)))
    return late


# --- CPU -----------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU time that a process of this machine has used, in all its threads."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


# --- the machine ---------------------------------------------------------------------------


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip().splitlines()[0]
    except (OSError, IndexError):
        return None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def available_nbytes() -> int:
    """Memory that may still be used, by the kernel's estimate."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIB
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or ``None``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """Where the figures come from."""
    names = (
        "aiordt",
        "ray",
        "torch",
        "nixl-cu13",
        "nixl-cu12",
        "ucxx-cu13",
        "libucx-cu13",
        "uvloop",
        "numpy",
    )
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := version_of(name))},
        "thp": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "ptrace_scope": _first_line("/proc/sys/kernel/yama/ptrace_scope"),
        "load_average": list(os.getloadavg()),
        "command": sys.argv,
    }
