"""Every transport of aiordt keeps every promise of `aiordt.abc`, between real processes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import uvloop

from aiordt._config import TRANSPORTS
from aiordt._errors import UnavailableError
from aiordt.testing import Leaks, check_huge_part, check_transport, process_pairs
from aiordt.transports import load, probe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiordt.testing import MakePair

LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


def skip_unless_usable(transport: str) -> None:
    available = probe(transport)
    if available.usable:
        available = load(transport).probe()
    if not available.usable:
        pytest.skip(f"{transport}: {available.reason}")


async def check(transport: str, suite: Callable[[MakePair], Awaitable[None]]) -> None:
    leaks = Leaks()
    with process_pairs(transport) as make_pair:
        await suite(make_pair)
    await leaks.wait_none()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_conformance(transport: str, loop: str) -> None:
    skip_unless_usable(transport)
    make_loop: Callable[[], asyncio.AbstractEventLoop] = LOOPS[loop]
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(check(transport, check_transport))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_more_than_4_gib(transport: str) -> None:  # DAT-3
    skip_unless_usable(transport)
    try:
        await check(transport, check_huge_part)
    except UnavailableError as exc:
        pytest.skip(exc.reason)
