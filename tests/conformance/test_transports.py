"""Every transport of aiordt keeps every promise of `aiordt.abc`, between real processes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import uvloop

from aiordt._config import TRANSPORTS
from aiordt.testing import Leaks, check_transport, process_pairs
from aiordt.transports import load, probe

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_conformance(transport: str, loop: str) -> None:
    available = probe(transport)
    if available.usable:
        available = load(transport).probe()
    if not available.usable:
        pytest.skip(f"{transport}: {available.reason}")
    make_loop: Callable[[], asyncio.AbstractEventLoop] = LOOPS[loop]

    async def check() -> None:
        leaks = Leaks()
        with process_pairs(transport) as make_pair:
            await check_transport(make_pair)
        await leaks.wait_none()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(check())
