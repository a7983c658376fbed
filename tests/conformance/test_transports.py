"""Every transport of aiordt keeps every promise of `aiordt.abc`, between real processes."""

from __future__ import annotations

import pytest

from aiordt.testing import Leaks, check_transport, process_pairs
from aiordt.transports import names, probe


@pytest.mark.parametrize("name", names())
async def test_conformance(name: str) -> None:
    available = probe(name)
    if not available.usable:
        pytest.skip(f"{name}: {available.reason}")
    leaks = Leaks()
    with process_pairs(name) as make_pair:
        await check_transport(make_pair)
    await leaks.wait_none()
