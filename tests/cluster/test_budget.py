"""`max_exported_bytes`: exports wait for room, in order, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch

import aiordt
from tests.support import MIB, Node, clean

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIMIT = 4 * MIB


@pytest.fixture(scope="module")
def _bounded(spawn_for_all: Any) -> Any:
    return spawn_for_all(Node, {"max_exported_bytes": LIMIT})


@pytest.fixture
async def bounded(_bounded: Any) -> AsyncIterator[Any]:
    yield _bounded
    await clean(_bounded)


def block(node: Any, nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


def same(node: Any, copies: int) -> list[torch.Tensor]:
    tensor = node.kept.setdefault("same", torch.ones(3 * MIB, dtype=torch.uint8))
    return [tensor[number:] for number in range(copies)]


async def test_an_export_waits_for_room(bounded: Any) -> None:
    first = await bounded.make.remote(block, 3 * MIB)
    second = asyncio.ensure_future(bounded.make.remote(block, 2 * MIB))
    done, _ = await asyncio.wait({second}, timeout=0.5)
    assert not done
    assert (await bounded.stats.remote()).exported_bytes == 3 * MIB
    first.release()
    ref = await asyncio.wait_for(second, 10)
    assert int((await ref).sum()) == 2 * MIB
    assert (await bounded.stats.remote()).exported_bytes == 2 * MIB


async def test_room_is_given_in_order(bounded: Any) -> None:
    first = await bounded.make.remote(block, 3 * MIB)
    large = asyncio.ensure_future(bounded.make.remote(block, 4 * MIB))
    await asyncio.wait({large}, timeout=0.5)
    small = asyncio.ensure_future(bounded.make.remote(block, MIB))  # it would fit now
    done, _ = await asyncio.wait({large, small}, timeout=0.5)
    assert not done, "the large one must not starve"
    first.release()
    ref = await asyncio.wait_for(large, 10)
    done, _ = await asyncio.wait({small}, timeout=0.3)
    assert not done
    ref.release()
    await asyncio.wait_for(small, 10)


async def test_a_storage_counts_once(bounded: Any) -> None:
    refs = [await bounded.make.remote(same, 3) for _ in range(3)]
    stats = await bounded.stats.remote()
    assert (stats.exports, stats.exported_bytes) == (9, 3 * MIB)
    del refs


async def test_what_never_fits_is_refused_at_once(bounded: Any) -> None:
    with pytest.raises(aiordt.UsageError, match="max_exported_bytes"):
        await bounded.make.remote(block, LIMIT + 1)
    assert (await bounded.stats.remote()).exports == 0
    assert int((await (await bounded.make.remote(block, LIMIT))).sum()) == LIMIT


async def cancelled_put(node: Any) -> str:
    held = await aiordt.put(torch.ones(LIMIT, dtype=torch.uint8))
    waiting = asyncio.ensure_future(aiordt.put(torch.ones(MIB, dtype=torch.uint8)))
    behind = asyncio.ensure_future(aiordt.put(torch.ones(100_000, dtype=torch.uint8)))
    await asyncio.wait({waiting, behind}, timeout=0.2)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    held.release()
    del held
    await asyncio.wait_for(behind, 10)
    return "behind came through"


async def test_a_cancelled_wait_leaves_the_queue(bounded: Any) -> None:  # CAN-1
    assert await bounded.run.remote(cancelled_put) == "behind came through"


class Blocking(aiordt.AsyncActor):
    """Its methods run on threads without a loop."""

    def __init__(self) -> None:
        aiordt.configure(max_exported_bytes=LIMIT)

    @aiordt.method
    def make(self, nbytes: int) -> torch.Tensor:
        return block(self, nbytes)


async def test_a_thread_without_a_loop_waits_for_room(spawn: Any) -> None:
    blocking = spawn(ray.remote(Blocking))
    first = await blocking.make.remote(3 * MIB)
    second = asyncio.ensure_future(blocking.make.remote(2 * MIB))
    done, _ = await asyncio.wait({second}, timeout=0.5)
    assert not done
    first.release()
    assert int((await (await asyncio.wait_for(second, 10))).sum()) == 2 * MIB


async def test_small_tensors_need_no_room(bounded: Any) -> None:
    held = await bounded.make.remote(block, LIMIT)
    ref = await asyncio.wait_for(bounded.make.remote(block, 1000), 10)
    assert int((await ref).sum()) == 1000
    del held
