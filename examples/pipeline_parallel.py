"""Pipeline-parallel training of a small transformer over three actors, by channels.

The transformer learns to continue the source of Python's asyncio, character by character. Each
actor has a third of its layers. Activations go forward through channels and gradients back, for
several microbatches at a time, so that all actors work at once; no call of Ray is made for any
of it: each actor is called once, to train. A single process that trains the whole model gives
the same losses: run it with ``python examples/pipeline_parallel.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import itertools
import time
from typing import TYPE_CHECKING

import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from typing_extensions import override

import aiordt

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_STAGES = 3
LAYERS = 6
WIDTH = 96
HEADS = 4
CONTEXT = 64
MICROBATCH = 8
NUM_MICROBATCHES = 4
LEARNING_RATE = 2e-3
SEED = 0


def text() -> torch.Tensor:
    """The source of asyncio's tasks, as bytes."""
    source = inspect.getsource(asyncio.tasks)
    return torch.tensor(list(source.encode("ascii", "replace")))


class Block(nn.Module):
    """A layer of the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to what came before, and think about it."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        found: torch.Tensor = x + self.mlp(x)
        return found


class Embedding(nn.Module):
    """Characters and their places as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)

    @override
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look them up."""
        found: torch.Tensor = self.characters(tokens) + self.places.weight
        return found


def model() -> list[nn.Module]:
    """The whole model, the same in each process that makes it."""
    torch.manual_seed(SEED)
    blocks = [Block() for _ in range(LAYERS)]
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))
    return [Embedding(), *blocks, head]


def stage(index: int) -> nn.Sequential:
    """The layers of one actor."""
    layers = model()
    size = LAYERS // NUM_STAGES
    first = 0 if index == 0 else 1 + index * size
    last = len(layers) if index == NUM_STAGES - 1 else 1 + (index + 1) * size
    return nn.Sequential(*layers[first:last])


def batches() -> Iterator[list[torch.Tensor]]:
    """Microbatches of pieces of the text, one character longer than the context."""
    source, generator = text(), torch.Generator().manual_seed(SEED)
    while True:
        starts = torch.randint(
            len(source) - CONTEXT, (NUM_MICROBATCHES, MICROBATCH), generator=generator
        )
        yield [source[each[:, None] + torch.arange(CONTEXT + 1)] for each in starts]


def loss_of(predicted: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A microbatch's share of the loss."""
    loss = functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
    return loss / NUM_MICROBATCHES


@ray.remote(num_cpus=0)
class Stage(aiordt.AsyncActor):
    """An actor with a third of the model."""

    def __init__(self, index: int) -> None:
        torch.set_num_threads(1)
        self.layers = stage(index)
        self.optimizer = torch.optim.AdamW(self.layers.parameters(), LEARNING_RATE)

    async def train(
        self,
        num_steps: int,
        before: tuple[aiordt.Receiver, aiordt.Sender] | None,
        after: tuple[aiordt.Sender, aiordt.Receiver] | None,
    ) -> list[float]:
        """Train; the losses, of the last stage.

        Args:
            num_steps: How many batches.
            before: Where activations come from, and their gradients go; the first stage has none.
            after: Where activations go, and their gradients come from; the last stage has none.
        """
        losses = []
        data = batches()
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            tokens = next(data)
            passed: list[tuple[torch.Tensor, torch.Tensor]] = []
            for microbatch in tokens:
                if before is None:
                    x = microbatch[:, :-1]
                else:
                    x = await before[0].recv()
                    before[0].hold()  # until the backward pass has done with it
                y = self.layers(x)
                if after is None:
                    y = loss_of(y, microbatch)
                else:
                    await after[0].send(y)
                passed.append((x, y))
            losses.append(0.0 if after else sum(float(loss.detach()) for _, loss in passed))
            for x, y in passed:
                gradient = None if after is None else await after[1].recv()
                y.backward(gradient)  # type: ignore[no-untyped-call]
                if before is not None:
                    await before[1].send(x.grad)
            self.optimizer.step()
        for channel in (*(before or ()), *(after or ())):
            await channel.aclose()
        return losses


async def train(num_steps: int) -> list[float]:
    """Train over all stages."""
    stages = [Stage.remote(index) for index in range(NUM_STAGES)]
    before: list[tuple[aiordt.Receiver, aiordt.Sender] | None] = [None]
    after: list[tuple[aiordt.Sender, aiordt.Receiver] | None] = []
    for one, other in itertools.pairwise(stages):
        activations, take_activations = await aiordt.channel(one, other, name="activations")
        gradients, take_gradients = await aiordt.channel(other, one, name="gradients")
        after.append((activations, take_gradients))
        before.append((take_activations, gradients))
    after.append(None)
    ends = zip(stages, before, after, strict=True)
    losses = await asyncio.gather(*(one.train.remote(num_steps, *both) for one, *both in ends))
    return list(losses[-1])


def train_alone(num_steps: int) -> list[float]:
    """The same in this process."""
    torch.set_num_threads(1)
    layers = nn.Sequential(*model())
    optimizer = torch.optim.AdamW(layers.parameters(), LEARNING_RATE)
    losses = []
    data = batches()
    for _ in range(num_steps):
        optimizer.zero_grad()
        total = 0.0
        for tokens in next(data):
            loss = loss_of(layers(tokens[:, :-1]), tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def main() -> None:
    """Train both ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    ray.init("local", num_cpus=NUM_STAGES, include_dashboard=False, logging_level="ERROR")
    began = time.monotonic()
    losses = asyncio.run(train(options.steps))
    took = time.monotonic() - began
    ray.shutdown()
    began = time.monotonic()
    alone = train_alone(options.steps)
    took_alone = time.monotonic() - began
    table = Table("step", f"loss, {NUM_STAGES} actors", "loss, one process")
    for step in range(0, options.steps, max(1, options.steps // 10)):
        table.add_row(str(step), f"{losses[step]:.6f}", f"{alone[step]:.6f}")
    console = Console()
    console.print(table)
    difference = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
    console.print(f"{took:.1f} s with actors and their start, {took_alone:.1f} s alone")
    console.print(f"last loss {losses[-1]:.3f}")
    console.print(f"largest difference of the losses: {difference:.1e}")


if __name__ == "__main__":
    main()
