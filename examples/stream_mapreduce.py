"""A stream of text, counted as it comes: maps, a shuffle and stateful reducers, by `aiordt.flow`.

Every 100 ms a batch of lines enters. Maps cut them into words, a shuffle parts those by word, and
each reducer adds its own to the counts that it keeps. Batches overlap: a new one enters while
earlier ones are being reduced. The time from a line's arrival until all its words are counted is
shown live, and as a CDF at the end; the counts are compared with those of one loop. The text is
that of Python's own help pages. Run it with ``python examples/stream_mapreduce.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.live import Live
from rich.table import Table

import aiordt
from aiordt import flow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

PERIOD = 0.1  # seconds from batch to batch
VOCABULARY = 1 << 16  # words are numbered by their hash

Line = tuple[float, str]  # when it arrived, and what it says


def words_of(line: str) -> list[int]:
    """The numbers of a line's words."""
    return [crc32(word.encode()) % VOCABULARY for word in line.lower().split()]


def tokenize(lines: Sequence[Line]) -> dict[str, torch.Tensor]:
    """The words of some lines, and when each one arrived."""
    rows = [(stamp, word) for stamp, line in lines for word in words_of(line)]
    return {
        "words": torch.tensor([word for _, word in rows], dtype=torch.int64),
        "stamps": torch.tensor([stamp for stamp, _ in rows], dtype=torch.float64),
    }


def part(parts: int, tokens: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The words of each reducer."""
    owner = tokens["words"] % parts
    chosen = [owner == number for number in range(parts)]
    return [{name: each[mine] for name, each in tokens.items()} for mine in chosen]


class WordCount(aiordt.AsyncActor):
    """Counts its part of the words."""

    def __init__(self) -> None:
        self.counts = torch.zeros(VOCABULARY, dtype=torch.int64)

    async def add(self, *pieces: dict[str, aiordt.TensorRef]) -> np.ndarray[Any, Any]:
        """Count words; how long ago they had arrived, in seconds."""
        tokens = await aiordt.get(list(pieces))  # before anything changes
        words = torch.cat([each["words"] for each in tokens])
        self.counts += torch.bincount(words, minlength=VOCABULARY)
        stamps: np.ndarray[Any, Any] = torch.cat([each["stamps"] for each in tokens]).numpy()
        return time.time() - stamps

    @aiordt.method
    async def result(self) -> torch.Tensor:
        """All counts so far."""
        return self.counts


async def arrivals(batches: int, lines_per_batch: int) -> AsyncIterator[list[Line]]:
    """Batches as they come; each line at its own time within the period."""
    text = [line for topic in sorted(topics) for line in topics[topic].splitlines() if line.strip()]
    begun = time.time()
    for number in range(batches):
        first = number * lines_per_batch
        opens = begun + number * PERIOD
        await asyncio.sleep(max(opens + PERIOD - time.time(), 0.0))
        yield [
            (opens + PERIOD * index / lines_per_batch, text[(first + index) % len(text)])
            for index in range(lines_per_batch)
        ]


class Display:
    """What is seen while it runs.

    Args:
        lines_per_batch: As of the options.
    """

    def __init__(self, lines_per_batch: int) -> None:
        self.seconds: list[np.ndarray[Any, Any]] = []
        self._lines = lines_per_batch

    def add(self, latencies: Sequence[np.ndarray[Any, Any]]) -> None:
        """One more batch."""
        self.seconds.append(np.concatenate(latencies))

    def table(self) -> Table:
        """The last batches."""
        table = Table(title="from a word's arrival until it is counted (ms)")
        for heading in ("batch", "words", "p50", "p99", "max"):
            table.add_column(heading, justify="right")
        for number in range(max(len(self.seconds) - 8, 0), len(self.seconds)):
            values = self.seconds[number] * 1e3
            p50, p99, high = np.percentile(values, (50, 99, 100))
            table.add_row(str(number), str(len(values)), f"{p50:.0f}", f"{p99:.0f}", f"{high:.0f}")
        return table


def plot(path: Path, seconds: np.ndarray[Any, Any]) -> None:
    """Draw how many words were counted within which time."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.sort(seconds) * 1e3, np.linspace(0, 1, len(seconds)))
    axes.set(xlabel="ms from arrival until counted", ylabel="share of words", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


async def run(options: argparse.Namespace, console: Console) -> int:
    """Count, and say how it went."""
    reducers = flow.InitActors(WordCount, options.reducers)
    display = Display(options.lines)
    expected: Counter[int] = Counter()

    def build(lines: list[Line]) -> flow.Node:
        shares = [lines[number :: options.maps] for number in range(options.maps)]
        tokens = flow.Map(tokenize, shares)
        into = [[options.reducers]] * options.maps
        parts = flow.Shuffle(part, tokens, options.reducers, args=into)
        return flow.ReduceActors(WordCount.add, reducers, parts)

    async with flow.Context(workers=options.workers):
        console.print("Starting workers and reducers ...")
        warm_up = [(time.time(), "")] * options.maps
        await build(warm_up)
        with Live(display.table(), console=console, refresh_per_second=4) as live:
            batches = arrivals(options.batches, options.lines)
            async for latencies in flow.stream(_counted(batches, expected), build):
                display.add(latencies)
                live.update(display.table())
        handles = await reducers
        counts = sum(await aiordt.get([await handle.result.remote() for handle in handles]))

    seconds = np.concatenate(display.seconds)
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    plot(options.plot, seconds)
    console.print(f"{len(seconds)} words: p50 {p50:.0f} ms, p99 {p99:.0f} ms; CDF: {options.plot}")
    agree = {word: count for word, count in enumerate(counts.tolist()) if count} == dict(expected)
    console.print(f"the counts are {'those' if agree else 'NOT those'} of one loop")
    return 0 if agree else 1


async def _counted(
    batches: AsyncIterator[list[Line]], counts: Counter[int]
) -> AsyncIterator[list[Line]]:
    """The batches, counted on their way by one loop, for comparison."""
    async for lines in batches:
        for _, line in lines:
            counts.update(words_of(line))
        yield lines


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description="Word counts of a stream, by aiordt.flow.")
    parser.add_argument("--batches", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--lines", type=int, default=200, help="of a batch (default: 200)")
    parser.add_argument("--maps", type=int, default=4, help="of a batch (default: 4)")
    parser.add_argument("--reducers", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--workers", type=int, default=2, help="how many at most (default: 2)")
    parser.add_argument("--plot", type=Path, default=Path("stream_mapreduce.png"), metavar="FILE")
    options = parser.parse_args()
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False)
    try:
        return asyncio.run(run(options, Console(highlight=False)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
