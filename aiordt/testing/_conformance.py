"""The promises of `aiordt.abc.Link`, checked on a real or a fake one.

Besides the invariants of `aiordt.abc` there are these about the bytes:

    DAT-1  When a read returns, the target holds every byte of the source, and nothing beside
           the target was written.
    DAT-2  Of a cut the selected elements arrive, in C order, converted where it says so. What
           is not within the exported storage is refused (two-sided links).
    DAT-3  The same holds for more than 4 GiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aiordt._types import KIB, MIB
from aiordt.testing import _checks_data, _checks_end, _checks_flow
from aiordt.testing._checks import made, noise

if TYPE_CHECKING:
    from aiordt.testing._pair import MakePair


async def check_transport(
    make_pair: MakePair, *, settle: float = 0.05, large_nbytes: int = 64 * MIB
) -> None:
    """Check every promise of a `aiordt.abc.Link`, on links that ``make_pair`` makes.

    Checked are, by the names of `aiordt.abc`: the bytes of all sizes from 0 to 9 MiB, of no
    parts and of 1500 in one read, of strided tensors and of cuts (DAT-1, DAT-2); what no key
    names (KEY-1); 60 reads at once and reads from three loops (DAT-1); a small read among large
    ones (FAIR-1); BLK-1; CAN-1 and OWN-1 with cancellation at ten points; ISO-1; exports that
    are given up while they are read (HLD-1); closing in several ways (CLS-1, CLS-2); DTH-1. For
    more than 4 GiB there is `check_huge_part`.

    Args:
        make_pair: Makes a connected pair; called five times, and each is closed. The last
            one's process is killed.
        settle: How long to wait for something that must *not* happen, in seconds.
        large_nbytes: Size of the reads during which the loop must turn, and smaller ones be
            done; so large that one takes well over a millisecond.

    Raises:
        AssertionError: A promise is broken; the message begins with its name.

    Cost:
        About 5 s, most of it for starting processes.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its own would compete with the transport's
    try:
        async with made(make_pair) as pair:
            await _checks_data.check_sizes(pair)
            await _checks_data.check_nothing(pair)
            await _checks_data.check_many_parts(pair)
            await _checks_data.check_strides(pair)
            await _checks_data.check_cuts(pair)
            if pair.link.packs:
                await _checks_data.check_conversions(pair)
            await _checks_data.check_keys(pair)
            await _checks_flow.check_concurrency(pair)
            await _checks_flow.check_other_loops(pair)
            (large,) = await pair.export([noise(max(large_nbytes, 256 * KIB), 1)])
            await _checks_flow.check_loop_turns(pair, large)
            await _checks_flow.check_fairness(pair, large)
            await _checks_flow.check_cancel(pair, settle)
            await _checks_flow.check_isolation(pair, settle)
            if pair.link.packs:  # who reads one-sidedly holds the export by a lease
                await _checks_end.check_hold(pair)
        await _checks_end.check_close(make_pair, settle)
        await _checks_end.check_close_elsewhere(make_pair, settle)
        await _checks_end.check_close_all(make_pair)
        await _checks_end.check_death(make_pair, settle)
    finally:
        torch.set_num_threads(num_threads)
