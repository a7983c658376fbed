"""Weights from a trainer to samplers that go on sampling: a small transformer that learns to write.

The trainer learns to predict the next byte of a text, and publishes its weights as it goes, without
waiting for anybody. Each sampler writes text, token by token, and takes the newest weights whenever
there are some: they arrive while it writes. ``--store`` does the same by Ray's object store, as it
is often done: the trainer puts a state dict, and each sampler gets it between two of its steps.

Run it with ``python examples/weight_sync.py``, and with ``--store`` for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from typing_extensions import override

import aiordt
from aiordt.weights import publisher, subscriber

if TYPE_CHECKING:
    from aiordt.weights import Publisher, Subscriber

NAME = "policy"
CONTEXT = 64
BATCH = 8
SEED = 0
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
    """Learns, and publishes."""

    def __init__(self, width: int, layers: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(SEED)
        self.model = Writer(width, layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.text = encoded()
        self.published: list[float] = []
        self.pub: Publisher | None = None

    async def open(self) -> None:
        """Be there for subscribers."""
        self.pub = await publisher(NAME)

    def step(self) -> float:
        """One step; the loss."""
        starts = torch.randint(len(self.text) - CONTEXT - 1, (BATCH,))
        rows = torch.stack([self.text[start : start + CONTEXT + 1] for start in starts])
        scores = self.model(rows[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss)

    async def train(self, steps: int, every: int) -> tuple[list[float], list[float]]:
        """Train, and publish every few steps; the losses, and the seconds of each publish."""
        losses = []
        assert self.pub is not None  # noqa: S101  (`open`)
        async with self.pub as pub:
            for number in range(steps):
                losses.append(self.step())
                if number % every == every - 1:
                    begun = time.perf_counter()
                    await pub.publish(self.model.state_dict(), version=number + 1)
                    self.published.append(time.perf_counter() - begun)
                await asyncio.sleep(0)  # whoever calls gets a turn
        return losses, self.published

    async def train_by_store(
        self, steps: int, every: int, samplers: list[Any]
    ) -> tuple[list[float], list[float]]:
        """As `train`, by the object store."""
        losses = []
        for number in range(steps):
            losses.append(self.step())
            if number % every == every - 1:
                begun = time.perf_counter()
                put = ray.put(self.model.state_dict())
                for sampler in samplers:
                    sampler.offer.remote([put], number + 1)
                self.published.append(time.perf_counter() - begun)
            await asyncio.sleep(0)
        await asyncio.gather(*(sampler.stop.remote() for sampler in samplers))
        return losses, self.published


@dataclass
class Report:
    """What a sampler did.

    Attributes:
        tokens: How many it wrote.
        seconds: In how long.
        versions: Of the weights that it used.
        stalls: Seconds in which it could not write, at each change of weights.
        text: What it wrote last.
    """

    tokens: int = 0
    seconds: float = 0.0
    versions: list[int] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    text: str = ""


@ray.remote(num_cpus=0)
class Sampler(aiordt.AsyncActor):
    """Writes, with the newest weights that it has."""

    def __init__(self, width: int, layers: int) -> None:
        torch.set_num_threads(1)
        self.model = Writer(width, layers).eval()
        self.offered: tuple[list[Any], int] | None = None
        self.arrived: tuple[int, dict[str, torch.Tensor]] | None = None
        self.over = False
        self.report = Report()
        self.sub: Subscriber | None = None

    async def open(self) -> None:
        """Find the trainer."""
        self.sub = await subscriber(NAME)

    async def sample(self) -> Report:
        """Write until the trainer is done."""
        assert self.sub is not None  # noqa: S101  (`open`)
        async with self.sub as sub:
            receiving = asyncio.create_task(self._receive(sub))
            await self._write()
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await receiving
        return self.report

    async def _receive(self, sub: Subscriber) -> None:
        async for version, weights in sub:
            self.arrived = version, weights
        self.over = True  # the trainer has closed its publisher

    async def sample_by_store(self) -> Report:
        """Write until the trainer is done; weights by the object store."""
        await self._write()
        return self.report

    async def offer(self, put: list[Any], version: int) -> None:
        """There are new weights in the object store."""
        self.offered = put, version

    async def stop(self) -> None:
        """The trainer is done."""
        self.over = True

    def _renew(self) -> None:
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
        self.report.stalls.append(time.perf_counter() - begun)
        self.report.versions.append(version)

    async def _write(self) -> None:
        written = encoded()[:8].tolist()
        begun = time.perf_counter()
        with torch.inference_mode():
            while not self.over:
                self._renew()
                scores = self.model(torch.tensor([written[-CONTEXT:]]))[0, -1]
                written.append(int(scores.argmax()))
                self.report.tokens += 1
                await asyncio.sleep(0)
        self.report.seconds = time.perf_counter() - begun
        self.report.text = bytes(written[-CONTEXT:]).decode("ascii")


async def run(options: argparse.Namespace) -> tuple[list[float], list[float], list[Report]]:
    """Train and sample; the losses, the seconds of each publish, and what the samplers did."""
    shape = (options.width, options.layers)
    trainer = Trainer.remote(*shape)
    samplers = [Sampler.remote(*shape) for _ in range(options.samplers)]
    plan = (options.steps, options.every)
    await asyncio.gather(*(each.open.remote() for each in (trainer, *samplers)))
    if options.store:
        sampling = [sampler.sample_by_store.remote() for sampler in samplers]
        losses, published = await trainer.train_by_store.remote(*plan, samplers)
    else:
        sampling = [sampler.sample.remote() for sampler in samplers]
        losses, published = await trainer.train.remote(*plan)
    return losses, published, list(await asyncio.gather(*sampling))


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    return f"{sorted(seconds)[len(seconds) // 2] * 1e3:.1f} ms" if seconds else "-"


def main() -> None:
    """Train and sample, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samplers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between two publishes")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--store", action="store_true", help="by Ray's object store instead")
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    size = sum(weight.nbytes for weight in Writer(options.width, options.layers).parameters())
    losses, published, reports = asyncio.run(run(options))
    ray.shutdown()
    how = "Ray's object store" if options.store else "aiordt.weights"
    console = Console()
    console.print(f"{size / (1 << 20):.1f} MiB of weights by {how}")
    console.print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; publish {milliseconds(published)}")
    table = Table("sampler", "tokens/s", "versions", "stall at a change", "wrote")
    for number, report in enumerate(reports):
        rate = report.tokens / max(report.seconds, 1e-9)
        versions = f"{len(report.versions)} of {options.steps // options.every}"
        stall = milliseconds(report.stalls)
        table.add_row(str(number), f"{rate:.0f}", versions, stall, report.text[-40:])
    console.print(table)


if __name__ == "__main__":
    main()
