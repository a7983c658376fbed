"""Data-parallel training on the handwritten digits of scikit-learn, by ``allreduce_refs``.

Each worker computes the gradient of its part of every batch, and keeps it. The driver declares the
sum of these gradients over all workers; it never touches them. The workers add them up straight
from each other's memory, and step. A single process that trains on whole batches gives the same
loss curve, to rounding: run it with ``python examples/data_parallel.py``.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

import ray
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import aiordt
from aiordt.collective import allreduce_refs

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 256
HIDDEN = 256
LEARNING_RATE = 0.1
MOMENTUM = 0.9
SEED = 0


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 images of 8 x 8 pixels, from 0 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()


class Training:
    """A model, and its part of each batch: every ``size``-th image from ``rank`` on."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        torch.manual_seed(SEED)  # all start alike
        self.images, self.labels = digits()
        self.rank, self.size = rank, size
        self.model = nn.Sequential(
            nn.Linear(64, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, 10),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE, MOMENTUM)
        self.batches = self._batches()

    def _batches(self) -> Iterator[torch.Tensor]:
        order = torch.Generator().manual_seed(SEED)
        while True:
            shuffled = torch.randperm(len(self.labels), generator=order)
            yield from torch.split(shuffled, BATCH)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The loss of this part of the next batch, and its gradient, as shares of the batch's."""
        whole = next(self.batches)
        part = whole[self.rank :: self.size]
        predicted = self.model(self.images[part])
        loss = functional.cross_entropy(predicted, self.labels[part], reduction="sum") / len(whole)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: weight.grad for name, weight in self.model.named_parameters()}
        return {"loss": loss.detach(), **{name: g for name, g in found.items() if g is not None}}

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        """Move the weights."""
        for name, weight in self.model.named_parameters():
            weight.grad = gradients[name]
        self.optimizer.step()

    def accuracy(self) -> float:
        """Share of all images that are recognised."""
        with torch.no_grad():
            right = self.model(self.images).argmax(1) == self.labels
        return float(right.float().mean())


@ray.remote(num_cpus=0)
class Worker(aiordt.AsyncActor):
    """One of the processes that train."""

    def __init__(self, rank: int, size: int) -> None:
        torch.set_num_threads(1)
        self.training = Training(rank, size)

    @aiordt.method  # the gradient stays here
    async def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of this worker's part of the next batch."""
        return self.training.gradients()

    async def step(self, total: dict[str, aiordt.TensorRef]) -> float:
        """Step by the sum of all gradients, which is here already; the batch's loss."""
        gradients = await aiordt.get(total)
        self.training.step(gradients)
        return float(gradients["loss"])

    async def accuracy(self) -> float:
        """Share of all images that are recognised."""
        return self.training.accuracy()


async def train(num_workers: int, num_steps: int) -> tuple[list[float], float]:
    """Train on several workers; the losses, and the accuracy."""
    workers = [Worker.remote(rank, num_workers) for rank in range(num_workers)]
    losses = []
    for _ in range(num_steps):
        totals = await allreduce_refs([worker.gradients.remote() for worker in workers])
        steps = [worker.step.remote(total) for worker, total in zip(workers, totals, strict=True)]
        losses.append((await asyncio.gather(*steps))[0])
    return losses, await workers[0].accuracy.remote()


def train_alone(num_steps: int) -> tuple[list[float], float]:
    """The same in this process."""
    training = Training()
    losses = []
    for _ in range(num_steps):
        gradients = training.gradients()
        training.step(gradients)
        losses.append(float(gradients["loss"]))
    return losses, training.accuracy()


def main() -> None:
    """Train both ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    ray.init(num_cpus=options.workers, include_dashboard=False, logging_level="ERROR")
    losses, accuracy = asyncio.run(train(options.workers, options.steps))
    ray.shutdown()
    alone, accuracy_alone = train_alone(options.steps)
    table = Table("step", f"loss, {options.workers} workers", "loss, one process")
    for step in range(0, options.steps, max(1, options.steps // 10)):
        table.add_row(str(step), f"{losses[step]:.6f}", f"{alone[step]:.6f}")
    console = Console()
    console.print(table)
    difference = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
    console.print(f"accuracy {accuracy:.3f}, alone {accuracy_alone:.3f}")
    console.print(f"largest difference of the losses: {difference:.1e}")


if __name__ == "__main__":
    main()
