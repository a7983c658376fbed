"""Which transfers may run: bounded by bytes, and fair between the processes they come from.

Invariants:
    ADM-1  Who waits is let in in the order of arrival, but for those whose own peer has its share.
    ADM-2  A peer that stands still keeps no more than its share busy: others go on.
    ADM-3  A small transfer never waits for a large one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiordt._progress import post, settle
from aiordt._types import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Hashable

#: Up to here a transfer is small.
SMALL_NBYTES: Final = 1 * MIB
#: What the smallest one counts for: the limit is one on their number, too.
_LEAST_NBYTES: Final = 64 * KIB
#: A peer has one part of so many of the limit; all small ones have one of so many beside it.
_PEER_PARTS: Final = 2
_SMALL_PARTS: Final = 4


@dataclass(slots=True, eq=False)
class _Waiting:
    """One that waits to be let in.

    Attributes:
        number: In the order of arrival.
        peer: Where its bytes come from.
        cost: What it counts for.
        future: Of the loop that it waits on.
        left: Whether it waits no more: it was let in, or cancelled.
    """

    number: int
    peer: Hashable
    cost: int
    future: asyncio.Future[None]
    left: bool = False


class _Lane:
    """Transfers under one limit. The caller has the lock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.share = max(1, limit // _PEER_PARTS)
        self._least = min(_LEAST_NBYTES, self.share)
        self._used = 0
        self._used_by: Counter[Hashable] = Counter()
        self._queues: dict[Hashable, deque[_Waiting]] = {}
        self._arrived = 0

    def cost(self, nbytes: int) -> int:
        """What a transfer counts for: one that is larger than a share as one share."""
        return min(max(nbytes, self._least), self.share)

    def take(self, peer: Hashable, cost: int) -> bool:
        """Let a transfer in if nobody waits and there is room."""
        return not self._queues and self._fits(cost) and self._take(peer, cost)

    def _fits(self, cost: int) -> bool:
        return self._used + cost <= self._limit

    def _take(self, peer: Hashable, cost: int) -> bool:
        if self._used_by[peer] + cost > self.share:
            return False
        self._used += cost
        self._used_by[peer] += cost
        return True

    def give_back(self, peer: Hashable, cost: int) -> None:
        """It has ended."""
        self._used -= cost
        self._used_by[peer] -= cost
        if not self._used_by[peer]:
            del self._used_by[peer]

    def queue(self, peer: Hashable, cost: int, future: asyncio.Future[None]) -> _Waiting:
        """Let one wait."""
        self._arrived += 1
        waiting = _Waiting(self._arrived, peer, cost, future)
        self._queues.setdefault(peer, deque()).append(waiting)
        return waiting

    def next(self) -> _Waiting | None:
        """Let the next one in that can be (ADM-1)."""
        for peer in [peer for peer, queue in self._queues.items() if _is_empty(queue)]:
            del self._queues[peer]
        for queue in sorted(self._queues.values(), key=lambda queue: queue[0].number):
            first = queue[0]
            if not self._fits(first.cost):
                return None  # who overtook it might make it wait for ever
            if self._take(first.peer, first.cost):
                return queue.popleft()
        return None


def _is_empty(queue: deque[_Waiting]) -> bool:
    """Whether nobody waits in it any more."""
    while queue and queue[0].left:
        queue.popleft()
    return not queue


class Admission:
    """Lets transfers in while their bytes fit under a limit. Works across event loops.

    Args:
        limit: In bytes. A peer may have half of it, and what is larger than that counts as
            that. Transfers of at most `SMALL_NBYTES` have a quarter as much for themselves.
    """

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._large = _Lane(limit)
        self._small = _Lane(max(1, limit // _SMALL_PARTS))

    @property
    def share(self) -> int:
        """The most bytes that come from one peer at a time."""
        return self._large.share

    def _lane(self, nbytes: int) -> _Lane:
        return self._small if nbytes <= SMALL_NBYTES else self._large

    async def acquire(self, peer: Hashable, nbytes: int) -> None:
        """Wait for room; a cancelled wait takes none.

        Args:
            peer: Where the bytes come from.
            nbytes: How many.
        """
        lane = self._lane(nbytes)
        cost = lane.cost(nbytes)
        with self._lock:
            if lane.take(peer, cost):
                return
            waiting = lane.queue(peer, cost, asyncio.get_running_loop().create_future())
        self._admit(lane)  # those that wait may all be of another peer
        try:
            await waiting.future
        except asyncio.CancelledError:
            with self._lock:
                if waiting.left:  # let in at the same moment
                    lane.give_back(peer, cost)
                waiting.left = True
            self._admit(lane)
            raise

    def release(self, peer: Hashable, nbytes: int) -> None:
        """Give the room of a transfer back."""
        lane = self._lane(nbytes)
        with self._lock:
            lane.give_back(peer, lane.cost(nbytes))
        self._admit(lane)

    def _admit(self, lane: _Lane) -> None:
        """Let all in that can be."""
        while True:
            with self._lock:
                waiting = lane.next()
                if waiting is None:
                    return
                waiting.left = True
                loop = waiting.future.get_loop()
                if loop.is_closed():  # whoever waited is gone with it
                    lane.give_back(waiting.peer, waiting.cost)
                    continue
            post(loop, settle, waiting.future, None, None)
