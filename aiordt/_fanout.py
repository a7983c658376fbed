"""One tensor for many hosts: who gets it from whom, so that its owner sends it twice at most.

The first process of a host that wants an export asks its owner from whom to get it, and is given
another host's first, or the owner itself: a tree, in the order in which they come, so that whoever
is above began earlier. `Plan` is pure; `Fanout` is the owner's end of the asking.

Invariants:
    FAN-1  Every way leads to the owner: nobody gets an export from itself, nor from somebody who
           gets it, over whatever others, from them.
    FAN-2  The owner, and every other, gives an export to `WIDTH` hosts at most; the owner to more
           only when there is nobody else.
    FAN-3  Of ``n`` hosts that came and stayed, nobody is more than ``log2(n + 2)`` steps away.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from aiordt._registry import Registry
    from aiordt.abc import PeerAddress

#: Two: a host that sends twice what it receives is busy as long as its link's two directions are.
WIDTH: Final = 2

_M = TypeVar("_M", bound="Hashable")


class Place(NamedTuple, Generic[_M]):
    """Where a member is.

    Attributes:
        parent: From whom it gets the export; ``None``: from the owner.
        depth: Steps to the owner.
    """

    parent: _M | None
    depth: int


class Plan(Generic[_M]):
    """The tree of one export. Pure."""

    def __init__(self) -> None:
        self.places: dict[_M, Place[_M]] = {}  # in the order in which they came
        self._given: dict[_M | None, int] = {}  # how often, ever: what was sent was sent

    def join(self, member: _M, failed: Collection[_M] = ()) -> Place[_M]:
        """Find a member its place, or another one.

        Args:
            member: Who.
            failed: From whom it could not get the export.
        """
        if self.places.pop(member, None) is None:
            # Who got it from there before it left may still do so (FAN-2).
            self._given[member] = sum(place.parent == member for place in self.places.values())
        best: Place[_M] | None = None
        if self._given.get(None, 0) < WIDTH:
            best = Place(None, 1)
        for other, place in self.places.items():
            if best is not None and best.depth <= place.depth + 1:
                continue
            free = self._given.get(other, 0) < WIDTH and other not in failed
            if free and not self._is_above(member, other):  # FAN-1
                best = Place(other, place.depth + 1)
        found = best or Place(None, 1)
        self._given[found.parent] = self._given.get(found.parent, 0) + 1
        self.places[member] = found
        return found

    def _is_above(self, member: _M, other: _M) -> bool:
        """Whether ``other`` gets it from ``member``, over whatever others."""
        place = self.places.get(other)
        while place is not None and place.parent is not None:
            if place.parent == member:
                return True
            place = self.places.get(place.parent)
        return False

    def leave(self, member: _M) -> None:
        """Somebody is gone, or has it no more; who got it from there asks again, if it must."""
        self.places.pop(member, None)
        self._given.pop(member, None)


class Fanout:
    """The plans of what this process exports. On the io loop."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._plans: dict[bytes, Plan[bytes]] = {}
        self._addresses: dict[bytes, PeerAddress] = {}
        self._ends: dict[bytes, asyncio.Task[None]] = {}

    def plan(self, key: bytes) -> Plan[bytes] | None:
        """Of an export, if another host has asked."""
        return self._plans.get(key)

    def join(
        self, key: bytes, address: PeerAddress, failed: Collection[bytes]
    ) -> tuple[PeerAddress | None, int]:
        """From whom a host is to get an export, and how many steps that is from here."""
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan()
            self._ends[key] = asyncio.get_running_loop().create_task(self._end(key))
        self._addresses[address.runtime_id] = address
        place = plan.join(address.runtime_id, failed)
        return None if place.parent is None else self._addresses[place.parent], place.depth

    async def _end(self, key: bytes) -> None:
        try:
            await self._registry.wait_gone(key)
        finally:
            del self._plans[key], self._ends[key]

    async def watch(self, key: bytes, member: bytes) -> None:
        """Wait until an export is gone; who waits has a copy until then, or until cancelled."""
        try:
            await self._registry.wait_gone(key)
        finally:
            plan = self._plans.get(key)
            if plan is not None:
                plan.leave(member)

    def forget(self, member: bytes) -> None:
        """A process is gone."""
        self._addresses.pop(member, None)
        for plan in self._plans.values():
            plan.leave(member)

    def close(self) -> None:
        """Forget everything."""
        for task in list(self._ends.values()):
            task.cancel()
