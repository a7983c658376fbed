"""A short form of the soak; `make soak` lets a thousand peers come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import rich

from aiordt.transports import probe
from tests.soak.__main__ import report
from tests.soak.peers import Counts, Soak, soak

if TYPE_CHECKING:
    from collections.abc import Sequence

TRANSPORTS = [name for name in ("cma", "tcp", "shm", "ucx", "nixl") if probe(name).usable]


def check(found: Soak, peers: int, pulls: int) -> None:
    """All bytes were right, and nobody left anything with the owner."""
    assert (found.transfers, found.wrong) == (peers * pulls, 0)
    last = found.counts[peers]
    assert (last.exports, last.refs) == (0, 0)


def flat(counts: Sequence[Counts]) -> None:
    """What transports keep for those who come is there when the first have gone."""
    first, last = counts[0], counts[-1]
    # Connections to those that have just gone may still be there: three are at a time.
    assert last.fds <= first.fds + 12, counts
    assert last.threads <= first.threads + 4, counts
    assert last.tasks <= first.tasks + 4, counts


async def test_peers_come_and_go(cluster: None) -> None:
    found = await soak(8, 12, TRANSPORTS, at_once=2)
    check(found, 8, 12)
    assert "96 transfers with the right bytes, 0 with others, 8 peers" in report(found)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_thousand_peers_come_and_go(cluster: None) -> None:
    found = await soak(1000, 100, TRANSPORTS, say=print)
    rich.print(report(found))
    check(found, 1000, 100)
    flat([counts for gone, counts in sorted(found.counts.items()) if gone >= 100])
    assert found.drift < 0.01
