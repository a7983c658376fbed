"""aiordt in a minute: one actor publishes weights, another pulls them while its loop stays free.

Run it with ``python examples/quickstart.py``.
"""

from __future__ import annotations

import asyncio

import ray
import torch

import aiordt


@ray.remote
class Trainer(aiordt.AsyncActor):
    """Owns the weights."""

    def __init__(self) -> None:
        self.weights = torch.zeros(2048, 2048)

    @aiordt.method  # the tensors in the result stay here; the caller gets refs
    async def publish(self) -> dict[str, torch.Tensor]:
        """Hand out the weights."""
        return {"w": self.weights}

    async def step(self) -> None:
        """Train, in place, once nobody refers to the weights any more."""
        await aiordt.wait_tensor_freed(self.weights)
        self.weights.add_(1)


@ray.remote
class Sampler(aiordt.AsyncActor):
    """Uses them."""

    async def load(self, params: dict[str, aiordt.TensorRef]) -> str:
        """Pull the weights from the trainer's memory; other methods go on meanwhile."""
        weights = await aiordt.get(params)
        w = weights["w"]
        return f"got {w.nbytes >> 20} MiB of {w.mean():.0f}s from {params['w'].owner.actor_name}"


async def main() -> None:
    """Train three steps; the driver never touches the bytes."""
    trainer, sampler = Trainer.remote(), Sampler.remote()
    for step in range(3):
        print(f"step {step}:", await sampler.load.remote(trainer.publish.remote()))
        await trainer.step.remote()


if __name__ == "__main__":
    ray.init()
    asyncio.run(main())
    ray.shutdown()
