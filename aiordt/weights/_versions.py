"""Which version is in which buffer, and who reads it. Pure: no I/O, no clock, no tensors.

Invariants:
    WGT-1  A buffer is written only while nobody holds the version in it.
    WGT-2  Only the newest version is given out, and what was given out is kept until it is let go.
    WGT-3  There are never more buffers than the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Hashable

#: A reader, and which of its reads.
Holder: TypeAlias = tuple[bytes, int]


@dataclass(slots=True, eq=False)
class Slot:
    """A buffer.

    Attributes:
        number: Its own; never used again.
        layout: What fits into it.
        version: What is in it; 0: nothing that anybody may read.
        holders: Who reads that.
        writing: Whether the next version is being written to it.
    """

    number: int
    layout: Hashable
    version: int = 0
    holders: set[Holder] = field(default_factory=set)
    writing: bool = True

    @property
    def idle(self) -> bool:
        """Whether it may be written to."""
        return not self.writing and not self.version


class Versions:
    """The buffers of one publisher.

    Args:
        limit: How many there may be.

    Attributes:
        latest: Where the newest version is, if there is one.
        slots: All buffers, by number.
    """

    def __init__(self, limit: int) -> None:
        self.latest: Slot | None = None
        self.slots: dict[int, Slot] = {}
        self._limit = limit
        self._numbers = 0

    def begin(self, layout: Hashable) -> tuple[Slot | None, list[Slot]]:
        """Choose a buffer for the next version: an idle one, a new one, or the newest unread one's.

        Returns:
            The buffer, or ``None`` if all are being read; and those whose version has ended.
        """
        idle = [slot for slot in self.slots.values() if slot.idle]
        fitting = next((slot for slot in idle if slot.layout == layout), None)
        if fitting is not None:
            fitting.writing = True
            return fitting, []
        for slot in idle:
            del self.slots[slot.number]
        if len(self.slots) < self._limit:
            return self._new(layout), []
        newest = self.latest
        if newest is None or newest.holders:
            return None, []
        self.latest = None
        newest.version = 0
        if newest.layout == layout:
            newest.writing = True
            return newest, [newest]
        del self.slots[newest.number]
        return self._new(layout), [newest]

    def _new(self, layout: Hashable) -> Slot:
        slot = Slot(self._numbers, layout)
        self._numbers += 1
        self.slots[slot.number] = slot
        return slot

    def commit(self, slot: Slot, version: int) -> list[Slot]:
        """A version has been written; those whose version has ended by that."""
        slot.writing = False
        slot.version = version
        before, self.latest = self.latest, slot
        return self._ended(before)

    @staticmethod
    def abandon(slot: Slot) -> None:
        """What was to be written will not be."""
        slot.writing = False

    def take(self, holder: Holder, after: int) -> Slot | None:
        """Hold the newest version for a reader, if it is later than ``after``."""
        slot = self.latest
        if slot is None or slot.version <= after:
            return None
        slot.holders.add(holder)
        return slot

    def done(self, holder: Holder) -> tuple[bool, list[Slot]]:
        """A reader lets go: whether it has held a version, and what has ended by that."""
        for slot in self.slots.values():
            if holder in slot.holders:
                slot.holders.discard(holder)
                return True, self._ended(slot)
        return False, []

    def lost(self, reader: bytes) -> list[Slot]:
        """A reader is gone; those whose version has ended by that."""
        ended = []
        for slot in self.slots.values():
            gone = {holder for holder in slot.holders if holder[0] == reader}
            if gone:
                slot.holders -= gone
                ended += self._ended(slot)
        return ended

    def close(self) -> list[Slot]:
        """Give out nothing any more; those whose version has ended by that."""
        before, self.latest = self.latest, None
        return self._ended(before)

    def _ended(self, slot: Slot | None) -> list[Slot]:
        if slot is None or slot is self.latest or slot.holders or not slot.version:
            return []
        slot.version = 0
        return [slot]
