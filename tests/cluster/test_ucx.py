"""UCX in Ray's processes: asked for by name, since cma and tcp come before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aiordt
from aiordt._runtime import current
from aiordt.transports import probe
from tests.support import MIB, arange

pytestmark = pytest.mark.skipif(not probe("ucx").usable, reason=f"ucx: {probe('ucx').reason}")


async def pull(_: Any, ref: aiordt.TensorRef) -> bool:
    return torch.equal(await aiordt.get(ref, transport="ucx"), arange(9 * MIB))


def num_sessions(_: Any) -> int:
    made: Any = current().transports.made.get("ucx")
    return 0 if made is None else len(made._served)


async def test_actors_and_the_driver_pull_by_ucx(nodes: Any) -> None:
    ref = await nodes[0].make.remote(lambda _: arange(9 * MIB))
    assert await nodes[1].run.remote(pull, ref)
    assert await nodes[0].run.remote(num_sessions) >= 1
    assert await pull(None, ref)
    assert (await aiordt.explain(ref)).chosen != "ucx"
