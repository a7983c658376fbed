"""The sender's buffers: which bytes of them items have, and how much credit is left.

Places are given back in any order, since receivers may hold items. The lowest free ones are
taken first: what a receiver has just done with is still in the processor's cache.

Invariants:
    CRD-1  Items that a receiver has not done with cost at most the capacity, unless a single
           one costs more; that one goes alone.
    CRD-2  Bytes that a receiver may look at are not written to.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import torch

from aiordt._arena import Extents, arena
from aiordt._memory import aligned
from aiordt.channels._frames import Place

if TYPE_CHECKING:
    from collections.abc import Callable

#: What an item costs beside its bytes, about: it is kept track of.
ITEM_COST: Final = 256


class Buffer:
    """Some shared memory.

    Attributes:
        tensor: Its bytes.
        place: What receivers are told of it.
        single: Whether it was made for one item that is larger than all credit.
    """

    def __init__(
        self, number: int, nbytes: int, *, single: bool, export: Callable[[torch.Tensor], bytes]
    ) -> None:
        self.tensor = arena.empty((nbytes,), torch.uint8)
        self.single = single
        self.extents = Extents(nbytes)
        address = self.tensor.data_ptr()
        key = export(self.tensor)
        self.place = Place(number, arena.locate(address), address, nbytes, key)


class Slot:
    """What one item has until all receivers have done with it.

    Attributes:
        buffer: Where its bytes are; ``None``: it has none.
        offset: Where they begin there.
        nbytes: How many.
        cost: How much credit it takes.
        waiting: Receivers that have not done with it.
    """

    __slots__ = ("buffer", "cost", "nbytes", "offset", "waiting")

    def __init__(self, buffer: Buffer | None, offset: int, nbytes: int, cost: int) -> None:
        self.buffer = buffer
        self.offset = offset
        self.nbytes = nbytes
        self.cost = cost
        self.waiting: set[int] = set()


class Ring:
    """All buffers of one channel.

    Args:
        capacity: Credit, in bytes.
        export: Exports a buffer, for receivers that ask by its key; gives the key, or nothing.
        unexport: Ends that.

    Attributes:
        used: Credit that items have.
        buffers: By number.
    """

    def __init__(
        self,
        capacity: int,
        export: Callable[[torch.Tensor], bytes],
        unexport: Callable[[bytes], object],
    ) -> None:
        self.capacity = capacity
        self.used = 0
        self.buffers: dict[int, Buffer] = {}
        self._export = export
        self._unexport = unexport
        self._numbers = itertools.count(1)
        self._main: Buffer | None = None

    def take(self, nbytes: int, rest: int) -> Slot | None:
        """A place for an item, if there is credit for it (CRD-1).

        Args:
            nbytes: Of its tensors.
            rest: Bytes of what it has besides.

        Raises:
            OutOfMemoryError: There is no shared memory to be had.
        """
        size = aligned(nbytes)
        cost = size + rest + ITEM_COST
        if self.used and self.used + cost > self.capacity:
            return None
        if not size:
            slot = Slot(None, 0, 0, cost)
        elif size > self.capacity:
            slot = Slot(self._made(size, single=True), 0, size, cost)
        else:
            if self._main is None:
                self._main = self._made(self.capacity, single=False)
            start = self._main.extents.take(size)
            if start is None:  # there is room, but not in one piece
                return None
            slot = Slot(self._main, start, size, cost)
        self.used += cost
        return slot

    def _made(self, nbytes: int, *, single: bool) -> Buffer:
        made = Buffer(next(self._numbers), nbytes, single=single, export=self._export)
        self.buffers[made.place.number] = made
        return made

    def give(self, slot: Slot) -> None:
        """All receivers have done with an item (CRD-2)."""
        self.used -= slot.cost
        buffer = slot.buffer
        if buffer is None:
            return
        if buffer.single:
            self._drop(buffer)
        else:
            buffer.extents.give(slot.offset, slot.nbytes)

    def _drop(self, buffer: Buffer) -> None:
        del self.buffers[buffer.place.number]
        if buffer.place.key:
            self._unexport(buffer.place.key)

    def close(self) -> None:
        """Let all memory go."""
        for buffer in list(self.buffers.values()):
            self._drop(buffer)
        self._main = None
