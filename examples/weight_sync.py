"""Weights from a sharded trainer to samplers that go on sampling: a small transformer that writes.

The trainer learns to predict the next byte of a text, in processes of which each holds a part of
every weight (FSDP). It publishes the weights every few steps, without waiting for anybody. Each
sampler writes text, token by token, and takes the newest weights whenever there are some: they
arrive while it writes. In the end each takes columns of the weights straight from the trainer's
processes, which hold rows, and compares them with the whole.

The same is done by Ray's object store, as it often is: the trainer puts a state dict, and each
sampler gets it between two tokens; and, to compare with, without any updates. The three take short
turns in one run, with the same trainer at the same pace, since processes that compute without a
pause share the machine's cores: how many tokens a second there are depends first on how many cores
the samplers get, which is shown beside it, with the tokens that each second of a core gave.

Run it with ``python examples/weight_sync.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from typing_extensions import override

import aiordt
from aiordt.weights import Shard, export_shards, load_shards, publisher, subscriber

if TYPE_CHECKING:
    from aiordt.weights import Part, Publisher, Subscriber

NAME = "policy"
CONTEXT = 64
BATCH = 4  # of each of the trainer's processes
SEED = 0
NONE, AIORDT, STORE = "nothing", "aiordt.weights", "object store"
WAYS = (NONE, STORE, AIORDT)
TEXT = (
    "the trainer steps and does not wait. the samplers write and do not wait. "
    "what is new comes while they write, and comes whole. "
) * 40


class Writer(nn.Module):
    """A transformer that predicts the next byte."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(128, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True
            )
            for _ in range(layers)
        )
        self.out = nn.Linear(width, 128)

    @override
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of the next byte at each place; ``tokens``: (batch, length)."""
        length = tokens.shape[1]
        hidden = self.tokens(tokens) + self.places(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        scores: torch.Tensor = self.out(hidden)
        return scores


def encoded() -> torch.Tensor:
    """The text as bytes."""
    return torch.tensor(list(TEXT.encode("ascii")))


@ray.remote(num_cpus=0)
class Trainer(aiordt.AsyncActor):
    """One of the processes that train. Of each weight it holds some rows; the first publishes."""

    def __init__(self, rank: int, of: int, meeting: str, shape: tuple[int, int]) -> None:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=of)
        torch.manual_seed(SEED)
        model: Any = Writer(*shape)
        self.model: Any = fully_shard(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        torch.manual_seed(rank)  # each has its own batches
        self.text = encoded()
        self.rank = rank
        self.num_steps = 0
        self.pub: Publisher | None = None

    async def open(self) -> None:
        """Be there for subscribers."""
        if self.rank == 0:
            self.pub = await publisher(NAME)

    async def train(
        self, way: str, updates: int, seconds: float, samplers: list[Any]
    ) -> tuple[list[float], list[float]]:
        """Train, and publish after each step.

        Args:
            way: By what.
            updates: How often.
            seconds: From one step to the next, at least; it rests for what is left, as a trainer
                does whose accelerator computes.
            samplers: Who read.

        Returns:
            The losses, and the seconds of each publish.
        """
        losses, published = [], []
        due = time.perf_counter()
        for _ in range(updates):
            losses.append(self._step())
            self.model.unshard()  # the next step wants all of it anyway
            if self.rank == 0 and way != NONE:
                begun = time.perf_counter()
                await self._publish(way, samplers)
                published.append(time.perf_counter() - begun)
            due += seconds
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return losses, published

    async def parts(self) -> dict[str, Part]:
        """What this process holds of the weights."""
        self.model.reshard()
        return await export_shards(self.model.state_dict())  # DTensors say what they are

    def _step(self) -> float:
        starts = torch.randint(len(self.text) - CONTEXT - 1, (BATCH,))
        rows = torch.stack([self.text[start : start + CONTEXT + 1] for start in starts])
        scores = self.model(rows[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.num_steps += 1
        return float(loss.detach())

    async def _publish(self, way: str, samplers: list[Any]) -> None:
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        if way == STORE:
            put = ray.put(weights)
            for sampler in samplers:
                sampler.offer.remote([put], self.num_steps)
        elif self.pub is not None:
            await self.pub.publish(weights, version=self.num_steps)


@dataclass
class Report:
    """What a sampler did.

    Attributes:
        tokens: How many it wrote.
        seconds: In how long.
        cpu_seconds: Of its process, meanwhile.
        versions: Of the weights that it used.
        stalls: Seconds in which it could not write, at each change of weights.
        text: What it wrote last.
    """

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    versions: list[int] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    text: str = ""

    def add(self, other: Report) -> None:
        """Count another turn too."""
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds
        self.versions += other.versions
        self.stalls += other.stalls
        self.text = other.text


@ray.remote(num_cpus=0)
class Sampler(aiordt.AsyncActor):
    """Writes, with the newest weights that it has."""

    def __init__(self, shape: tuple[int, int]) -> None:
        torch.set_num_threads(1)
        self.model = Writer(*shape).eval()
        self.offered: tuple[list[Any], int] | None = None
        self.arrived: tuple[int, dict[str, torch.Tensor]] | None = None
        self.over = False
        self.sub: Subscriber | None = None

    async def open(self) -> None:
        """Find the trainer."""
        self.sub = await subscriber(NAME)

    async def sample(self) -> Report:
        """Write until told to stop. Weights arrive meanwhile, or are offered."""
        self.over = False
        self.arrived = self.offered = None  # of the last turn
        receiving = asyncio.create_task(self._receive())
        report = await self._write()
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await receiving
        return report

    async def _receive(self) -> None:
        assert self.sub is not None  # noqa: S101  (`open`)
        async for version, weights in self.sub:
            self.arrived = version, weights

    async def offer(self, put: list[Any], version: int) -> None:
        """There are new weights in the object store."""
        self.offered = put, version

    async def stop(self) -> None:
        """Enough is written."""
        self.over = True

    async def check(self, parts: list[dict[str, Part]], index: int, of: int) -> tuple[int, bool]:
        """Take some columns of every weight, as tensor parallelism does, from those who have rows.

        Returns:
            How many bytes moved, and whether the columns are those of the whole.
        """
        assert self.sub is not None  # noqa: S101  (`open`)
        before = aiordt.stats().bytes_pulled
        columns = await load_shards(parts, lambda _, shape: Shard(len(shape) - 1, index, of))
        moved = aiordt.stats().bytes_pulled - before
        _, whole = await self.sub.latest()
        right = columns.keys() == whole.keys() and all(
            torch.equal(columns[name], whole[name].chunk(of, -1)[index]) for name in whole
        )
        return moved, right

    def _renew(self, report: Report) -> None:
        """Take the newest weights, if there are some."""
        begun = time.perf_counter()
        if self.arrived is not None:
            version, weights = self.arrived
            self.arrived = None
        elif self.offered is not None:
            (put,), version = self.offered
            self.offered = None
            weights = ray.get(put)
        else:
            return
        self.model.load_state_dict(weights, assign=True)
        report.stalls.append(time.perf_counter() - begun)
        report.versions.append(version)

    async def _write(self) -> Report:
        report = Report()
        written = encoded()[:8].tolist()
        begun, cpu_begun = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            while not self.over:
                self._renew(report)
                scores = self.model(torch.tensor([written[-CONTEXT:]]))[0, -1]
                written.append(int(scores.argmax()))
                report.tokens += 1
                await asyncio.sleep(0)
            self._renew(report)  # what came last, for the next turn
        report.seconds = time.perf_counter() - begun
        report.cpu_seconds = time.process_time() - cpu_begun
        report.text = bytes(written[-CONTEXT:]).decode("ascii")
        return report


@dataclass
class Way:
    """What came of one way of handing on weights, in all its turns."""

    reports: list[Report]
    published: list[float] = field(default_factory=list)


class Run:
    """A trainer and samplers, and what they do in turns."""

    def __init__(self, options: argparse.Namespace, meeting: str) -> None:
        shape, of = (options.width, options.layers), options.trainers
        self.trainers = [Trainer.remote(rank, of, meeting, shape) for rank in range(of)]
        self.samplers = [Sampler.remote(shape) for _ in range(options.samplers)]
        self.losses: list[float] = []
        self.ways: dict[str, Way] = {}

    async def turn(self, name: str, updates: int, seconds: float) -> None:
        """Train and sample, and note how that went."""
        way = self.ways[name]
        sampling = [sampler.sample.remote() for sampler in self.samplers]
        plan = (name, updates, seconds, self.samplers)
        (losses, published), *_ = await asyncio.gather(
            *(trainer.train.remote(*plan) for trainer in self.trainers)
        )
        way.published += published
        self.losses += losses
        await asyncio.gather(*(sampler.stop.remote() for sampler in self.samplers))
        for report, more in zip(way.reports, await asyncio.gather(*sampling), strict=True):
            report.add(more)

    async def take_turns(self, turns: int, updates: int, seconds: float) -> None:
        """Go all ways."""
        await asyncio.gather(*(each.open.remote() for each in (*self.trainers, *self.samplers)))
        for count, length in ((1, 2), (turns, updates)):  # what the first time costs is not counted
            self.ways = {name: Way([Report() for _ in self.samplers]) for name in WAYS}
            for number in range(count):
                # There and back, so that a drift hits all alike. What is published last is the end.
                for name in WAYS if (count - number) % 2 else WAYS[::-1]:
                    await self.turn(name, length, seconds)

    async def reshard(self) -> list[tuple[int, bool]]:
        """Have each sampler take some columns."""
        parts = await asyncio.gather(*(trainer.parts.remote() for trainer in self.trainers))
        of = len(self.samplers)
        checks = [each.check.remote(parts, index, of) for index, each in enumerate(self.samplers)]
        return list(await asyncio.gather(*checks))


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    return f"{sorted(seconds)[len(seconds) // 2] * 1e3:.1f} ms" if seconds else "-"


async def run(options: argparse.Namespace, meeting: str, console: Console) -> None:
    """Do it all, and say how it went."""
    runs = Run(options, meeting)
    await runs.take_turns(options.turns, options.updates, options.seconds)
    console.print(f"loss {runs.losses[0]:.2f} -> {runs.losses[-1]:.2f}")
    table = Table("weights by", "tokens/s", "cores", "per CPU s", "versions", "stall", "publish")
    for name, way in runs.ways.items():
        tokens = sum(report.tokens for report in way.reports)
        seconds = sum(report.seconds for report in way.reports) / len(way.reports)
        cpu_seconds = sum(report.cpu_seconds for report in way.reports)
        fewest = min(len(report.versions) for report in way.reports)
        table.add_row(
            name,
            f"{tokens / seconds:.0f}",
            f"{cpu_seconds / seconds:.2f}",
            f"{tokens / cpu_seconds:.0f}",
            f"{fewest} of {len(way.published)}",
            milliseconds([stall for report in way.reports for stall in report.stalls]),
            milliseconds(way.published),
        )
    console.print(table)
    console.print(f"sampler 0 wrote: {runs.ways[AIORDT].reports[0].text}")
    for index, (moved, right) in enumerate(await runs.reshard()):
        verdict = "they are those of the whole" if right else "THEY DIFFER FROM THE WHOLE"
        part = f"columns {index + 1}/{options.samplers} from {options.trainers} trainers"
        console.print(f"{part}: {moved / 2**20:.1f} MiB, {verdict}")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trainers", type=int, default=2)
    parser.add_argument("--samplers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=4, help="of each way")
    parser.add_argument("--updates", type=int, default=4, help="of the weights in each turn")
    parser.add_argument("--seconds", type=float, default=0.4, help="from step to step, at least")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    size = sum(weight.nbytes for weight in Writer(options.width, options.layers).parameters())
    console = Console(highlight=False)
    console.print(f"{size / 2**20:.1f} MiB of weights")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(options, (Path(folder) / "meeting").as_uri(), console))
    ray.shutdown()


if __name__ == "__main__":
    main()
