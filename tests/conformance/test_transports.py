"""Every transport of aiordt keeps every promise of `aiordt.abc`, between real processes."""

from __future__ import annotations

import pytest

from aiordt.testing import Leaks, check_transport, process_pairs
from aiordt.transports.cma import CmaTransport
from aiordt.transports.tcp import TcpTransport


@pytest.mark.parametrize("transport", [CmaTransport, TcpTransport], ids=lambda each: each.name)
async def test_conformance(transport: type[CmaTransport | TcpTransport]) -> None:
    available = transport.probe()
    if not available.usable:
        pytest.skip(f"{transport.name}: {available.reason}")
    leaks = Leaks()
    with process_pairs(transport.name) as make_pair:
        await check_transport(make_pair)
    await leaks.wait_none()
