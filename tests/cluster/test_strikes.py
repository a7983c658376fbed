"""Actors that are killed or stopped at exact points, as users' tests would have them."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import ray

import aiordt
from aiordt.testing import strike_at_phase
from tests.support import MIB, arange, eventually, process_state

if TYPE_CHECKING:
    import torch

NBYTES = 24 * MIB


def keep(node: Any) -> torch.Tensor:
    node.kept["t"] = arange(NBYTES)
    return node.kept["t"]


async def freed(node: Any) -> None:
    await aiordt.wait_tensor_freed(node.kept["t"], timeout=20)


async def pull(_: Any, refs: list[Any]) -> float:
    return float((await refs[0]).double().sum())


@pytest.mark.parametrize(
    ("make", "point"), [("make_cma", "cma.chunk"), ("make_tcp", "tcp.receiving")]
)
async def test_an_actor_dies_where_it_is_told_to(
    nodes: Any, spawn: Any, make: str, point: str
) -> None:
    owner, victim = nodes[0], spawn()
    ref = await getattr(owner, make).remote(keep)
    pid = await strike_at_phase(victim, point)
    assert pid == await victim.pid.remote(), "nothing has happened yet"
    with pytest.raises(ray.exceptions.RayActorError):
        await victim.run.remote(pull, [ref])
    assert await nodes[1].run.remote(pull, [ref]) == float(arange(NBYTES).double().sum())
    del ref
    await owner.run.remote(freed)


async def test_an_actor_stands_still_where_it_is_told_to(nodes: Any, spawn: Any) -> None:
    owner, victim = nodes[0], spawn()
    ref = await owner.make_cma.remote(keep)
    pid = await strike_at_phase(victim, "cma.chunk", signal.SIGSTOP, occurrence=3)
    pulling = asyncio.ensure_future(victim.run.remote(pull, [ref]))
    await eventually(lambda: process_state(pid) == "T", what="it stands still")
    try:
        expected = float(arange(NBYTES).double().sum())
        assert await nodes[1].run.remote(pull, [ref]) == expected, "the others go on"
        assert not pulling.done()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await pulling == expected
    del ref, pulling
    await owner.run.remote(freed)
