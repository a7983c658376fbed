"""Inside the first of two hosts: one owner here, readers there; prints what `fanout` shows.

``_fanout_driver.py <bytes> <samples> <numbers of readers, by commas>``. Each reader is as on a host
of its own: it does not know the others, and reads their memory by no other way than the network's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import ray
import torch

import aiordt
from aiordt import _copies, _relay

_TENSOR: Final = 1 << 20


@ray.remote(num_cpus=0, resources={"h2": 1})
class _Reader(aiordt.AsyncActor):
    def __init__(self, number: int) -> None:
        torch.set_num_threads(1)
        aiordt.configure(transports=("shm", "tcp"))
        here = _copies.meeting_name
        vars(_relay)["meeting_name"] = lambda key: here(key) + b"%d" % number

    async def pull(self, refs: list[aiordt.TensorRef], *, alone: bool) -> bool:
        """Whether all came; ``alone``: straight from the owner."""
        got = await aiordt.get(refs, transport="tcp" if alone else None)
        return all(bool((tensor[::4096] == number).all()) for number, tensor in enumerate(got))


def _sent() -> int:
    (row,) = [row for row in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in row]
    return int(row.split(":")[1].split()[8])


async def _measure(nbytes: int, samples: int, counts: list[int]) -> list[dict[str, Any]]:
    tensors = [torch.full((_TENSOR // 4,), n, dtype=torch.int32) for n in range(nbytes // _TENSOR)]
    readers = [_Reader.remote(number) for number in range(max(counts))]
    warm = await aiordt.put(tensors[:1])
    await asyncio.gather(*(reader.pull.remote(warm, alone=True) for reader in readers))
    del warm
    rows = []
    for count in counts:
        for alone in (False, True):
            for number in range(samples + 1):
                refs = await aiordt.put(tensors)
                before, begun = _sent(), time.perf_counter()
                some = readers[:count]
                whole = await asyncio.gather(
                    *(each.pull.remote(refs, alone=alone) for each in some)
                )
                seconds = time.perf_counter() - begun
                if not all(whole):
                    raise RuntimeError("wrong values arrived")
                sent = _sent() - before
                del refs
                if number:  # the first one warms up
                    rows.append({"count": count, "alone": alone, "seconds": seconds, "sent": sent})
    return rows


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="error")
    torch.set_num_threads(1)
    found = asyncio.run(
        _measure(int(sys.argv[1]), int(sys.argv[2]), [int(each) for each in sys.argv[3].split(",")])
    )
    print("RESULT", json.dumps(found), flush=True)
    ray.shutdown()
