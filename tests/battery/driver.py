"""A driver that is to be killed: it has made actors that outlive it, and has tensors of its own.

``python -m tests.battery.driver ADDRESS NUMBER SEED NBYTES TRANSPORT``; a line ``READY`` says that
the actors are there, that the reader holds a tensor of this process and one of the holder's, and
that this process holds the latter, too.
"""

from __future__ import annotations

import asyncio
import sys

import ray

from tests.battery.actors import Holder, Reader, exported, pattern
from tests.battery.host_trials import NAMESPACE


async def _work(number: str, seed: int, nbytes: int, transport: str) -> None:
    options = {"namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    holder = ray.remote(Holder).options(name=f"holder {number}", **options).remote()
    reader = ray.remote(Reader).options(name=f"reader {number}", **options).remote()
    kept = await exported(pattern(seed, nbytes), transport)
    held = await holder.export.remote(seed, nbytes, transport)
    await reader.hold.remote([kept[1], *held])
    print("READY", flush=True)  # noqa: T201  (for who started it)
    await asyncio.to_thread(sys.stdin.read)
    del kept, held


def main() -> None:
    """Run until it is killed."""
    address, number, seed, nbytes, transport = sys.argv[1:]
    ray.init(address, log_to_driver=False, logging_level="error")
    asyncio.run(_work(number, int(seed), int(nbytes), transport))


if __name__ == "__main__":
    main()
