"""Memory that was registered with a network device: what is, since when, and until when.

Registering pins pages and takes from microseconds to milliseconds, so it is done once for a
storage and kept. Nobody tells when a storage dies, so each entry knows how to ask.

Invariants:
    RGN-1  Two entries that can be found never overlap, so that a range has one answer.
    RGN-2  An entry answers only while the memory that it was made for is there: a recycled
           address is registered anew, under a new number.
    RGN-3  What is in use or held is not deregistered, whatever else happens.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from torch import UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from aiordt._arena import arena
from aiordt._memory import block_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

_H = TypeVar("_H")
#: Key of an export, and number of a tensor in it.
Holder: TypeAlias = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that is allocated and freed as a whole.

    Attributes:
        address: Where it starts.
        nbytes: Its size.
        device: Where it is, e.g. ``"cpu"`` or ``"cuda:0"``.
        alive: Whether it is still there, at that address. Quick; never blocks.
    """

    address: int
    nbytes: int
    device: str
    alive: Callable[[], bool]


def region_of(tensor: torch.Tensor) -> Region:
    """The memory behind ``tensor``: its storage, or what of aiordt's memory this is on.

    Cost:
        ~2 µs.
    """
    storage = tensor.untyped_storage()
    address, nbytes, device = storage.data_ptr(), storage.nbytes(), str(tensor.device)
    number = arena.locate(address)
    lender = arena.segment(number) if number else block_at(address)
    if lender is not None and lender.address + lender.nbytes >= address + nbytes:
        lent = weakref.ref(lender)
        return Region(lender.address, lender.nbytes, device, lambda: lent() is not None)
    known = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def alive() -> bool:
        found: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(known.cdata)  # noqa: SLF001
        # A storage that was resized is alive, but its bytes are elsewhere.
        return found is not None and found.data_ptr() == address and found.nbytes() >= nbytes

    return Region(address, nbytes, device, alive)


@dataclass(slots=True, eq=False)
class Registration(Generic[_H]):
    """A registered range.

    Attributes:
        address: Where it starts.
        nbytes: Its size.
        device: Where it is.
        number: Its own; never used again.
        handle: What registering it returned.
    """

    address: int
    nbytes: int
    device: str
    number: int
    handle: _H
    _regions: tuple[Region, ...]
    _uses: int = 0
    _holders: set[Holder] = field(default_factory=set)

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.nbytes

    @property
    def alive(self) -> bool:
        """Whether all that it was made for is still there."""
        return all(region.alive() for region in self._regions)

    @property
    def busy(self) -> bool:
        """Whether it is in use or held."""
        return bool(self._uses or self._holders)

    def covers(self, region: Region) -> bool:
        """Whether all of ``region`` is in it."""
        return self.address <= region.address and region.address + region.nbytes <= self.end


class Registrations(Generic[_H]):
    """The registered ranges of one process with one device library.

    Args:
        register: Registers ``(address, nbytes, device, number)``; what it returns is given to
            ``deregister``. Both are called with ``lock`` held.
        deregister: Undoes that.
        limit: Entries that are kept; the least recently used idle ones go first.
        lock: Guards everything here; reentrant.
    """

    def __init__(
        self,
        register: Callable[[int, int, str, int], _H],
        deregister: Callable[[_H], None],
        *,
        limit: int,
        lock: threading.RLock | None = None,
    ) -> None:
        self._register = register
        self._deregister = deregister
        self._limit = limit
        self._lock = lock or threading.RLock()
        self._next = 1
        # By device, in order of address; those that are found.
        self._found: dict[str, list[Registration[_H]]] = {}
        # All, the least recently used first; those that are not found any more are among them.
        self._all: dict[int, Registration[_H]] = {}
        self._held: dict[Holder, list[Registration[_H]]] = {}

    @property
    def count(self) -> int:
        """How many ranges are registered."""
        return len(self._all)

    @property
    def nbytes(self) -> int:
        """Bytes in them."""
        with self._lock:
            return sum(each.nbytes for each in self._all.values())

    @property
    def holders(self) -> list[Holder]:
        """Who holds something."""
        return list(self._held)

    def acquire(self, region: Region) -> Registration[_H]:
        """The registration that ``region`` is in, made if need be; to be released.

        Raises:
            Exception: What ``register`` raised.
        """
        with self._lock:
            found = self._find(region)
            if found is None:
                found = self._make(region)
            else:
                self._all[found.number] = self._all.pop(found.number)
            found._uses += 1  # noqa: SLF001
            return found

    def release(self, registration: Registration[_H]) -> None:
        """End one use."""
        with self._lock:
            registration._uses -= 1  # noqa: SLF001
            if not registration.busy and not registration.alive:
                self._retire(registration)
            self._trim()

    def hold(self, holder: Holder, registrations: Iterable[Registration[_H]]) -> None:
        """Keep registrations until ``holder`` lets go of them."""
        with self._lock:
            for each in registrations:
                if holder not in each._holders:  # noqa: SLF001
                    each._holders.add(holder)  # noqa: SLF001
                    self._held.setdefault(holder, []).append(each)

    def let_go(self, holder: Holder) -> None:
        """End all that ``holder`` holds."""
        with self._lock:
            for each in self._held.pop(holder, []):
                each._holders.discard(holder)  # noqa: SLF001
                if not each.busy and not each.alive:
                    self._retire(each)
            self._trim()

    def sweep(self) -> None:
        """Deregister what died."""
        with self._lock:
            for each in list(self._all.values()):
                if not each.busy and not each.alive:
                    self._retire(each)

    def clear(self) -> None:
        """Deregister everything; nothing may be in use."""
        with self._lock:
            self._found.clear()
            self._held.clear()
            while self._all:
                self._deregister(self._all.popitem()[1].handle)

    def _find(self, region: Region) -> Registration[_H] | None:
        found = self._found.get(region.device, [])
        place = bisect.bisect_right(found, region.address, key=_address) - 1
        if place < 0 or not found[place].covers(region):
            return None
        if not found[place].alive:
            self._retire(found[place])  # RGN-2
            return None
        return found[place]

    def _make(self, region: Region) -> Registration[_H]:
        merged = [region]
        overlapping = self._overlapping(region)
        for each in overlapping:
            if each.alive:  # two storages on one buffer
                merged += each._regions  # noqa: SLF001
        start = min(part.address for part in merged)
        end = max(part.address + part.nbytes for part in merged)
        number = self._next
        self._next += 1
        handle = self._register(start, end - start, region.device, number)
        made = Registration(start, end - start, region.device, number, handle, tuple(merged))
        for each in overlapping:
            self._retire(each)
        bisect.insort(self._found.setdefault(region.device, []), made, key=_address)
        self._all[number] = made
        return made

    def _overlapping(self, region: Region) -> Sequence[Registration[_H]]:
        """Those that overlap it; they do not overlap each other, so they are neighbours."""
        found = self._found.get(region.device, [])
        first = bisect.bisect_right(found, region.address, key=_address)
        if first and found[first - 1].end > region.address:
            first -= 1
        last = bisect.bisect_left(found, region.address + region.nbytes, key=_address)
        return found[first:last]

    def _retire(self, registration: Registration[_H]) -> None:
        """It is found no more; and it goes when nobody uses or holds it."""
        found = self._found.get(registration.device, [])
        place = bisect.bisect_left(found, registration.address, key=_address)
        if place < len(found) and found[place] is registration:
            del found[place]
        if registration.busy:  # RGN-3
            # Nothing makes it alive again, so that whoever ends its last use retires it.
            registration._regions = (_GONE,)  # noqa: SLF001
        elif self._all.pop(registration.number, None) is not None:
            self._deregister(registration.handle)

    def _trim(self) -> None:
        if len(self._all) <= self._limit:
            return
        for each in list(self._all.values()):
            if not each.busy:
                self._retire(each)
                if len(self._all) <= self._limit:
                    return


def _address(registration: Registration[_H]) -> int:
    return registration.address


_GONE = Region(0, 0, "", lambda: False)
