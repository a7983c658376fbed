"""Who holds a ref says so to its owner: beside Ray's count, for when that loses a holder.

Ray (2.60) knows of a process that got a ref from a third one only through that third one. If it
is killed before it has let go, Ray tells the owner that nobody holds the tensor any more, while
somebody does. So a process in which a ref stays for a while tells its owner, and tells it when
the ref is gone. What Ray gives up meanwhile is freed only then.

Invariants:
    CLM-1  A lease that Ray has given up is held for as long as a process that lives claims it, or
           one that cannot be reached, until Ray says that its node is gone, and for
           `_APART_SECONDS` at most.
    CLM-2  A ref that comes and goes costs no message, and its arrival at most one wake-up of the
           io thread in `STAY_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgpack

from aiordt._copies import pack_address, unpack_address
from aiordt._errors import AiordtError, OwnerDiedError, ProtocolViolationError
from aiordt._progress import Inbox, post
from aiordt.abc import TransportMessage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiordt._progress import IoThread
    from aiordt._registry import Registry
    from aiordt._route import Routes
    from aiordt.abc import PeerAddress

_log = logging.getLogger(__name__)

NAME: Final = "claims"
#: Refs that stay for less are not told; an argument of a call has gone with it.
STAY_SECONDS: Final = 0.25
#: A holder that cannot be reached for so long is taken to be dead.
_APART_SECONDS: Final = 60.0
_AGAIN_SECONDS: Final = 1.5
#: Told in one message: of 30 bytes each, a quarter of what a frame may have.
_MAX_LEASES: Final = 16_384


class Holding(Protocol):
    """A lease, as far as it must be known here."""

    marker: Any


class _Stay(weakref.ref["Holding"]):
    """A lease that has stayed; its end is told."""

    __slots__ = ("id", "owner")

    id: bytes
    owner: _Owner


class _Owner:
    """A process whose refs are here.

    Attributes:
        address: Where it is.
        count: How many leases of each marker there are here.
        told: Which markers it knows to be here.
        changed: Those of which it may know something else than is true.
        telling: Whether it is being told.
    """

    def __init__(self, address: PeerAddress) -> None:
        self.address = address
        self.count: Counter[bytes] = Counter()
        self.told: set[bytes] = set()
        self.changed: set[bytes] = set()
        self.telling = False


class Claims:
    """Of one runtime, both ends. What is not said otherwise runs on the io loop.

    Args:
        address: This process's.
        io: The io thread.
        registry: What this process exports.
        routes: The ways to others.
        is_gone: Whether Ray knows that there is no node at an address any more.
    """

    def __init__(
        self,
        address: PeerAddress,
        io: IoThread,
        *,
        registry: Registry,
        routes: Routes,
        is_gone: Callable[[PeerAddress], Awaitable[bool]],
    ) -> None:
        self._is_gone = is_gone
        self._address = address
        self._io = io
        self._registry = registry
        self._routes = routes
        self._arrived: deque[tuple[weakref.ref[Holding], PeerAddress]] = deque()
        self._waiting = False
        self._stays: set[_Stay] = set()
        self._owners: dict[bytes, _Owner] = {}
        self._ended = Inbox(io.loop, self._end)
        self._holders: dict[bytes, PeerAddress] = {}

    # --- of refs that are here --------------------------------------------------------------

    def arrived(self, lease: Holding, address: PeerAddress) -> None:
        """A lease of the process at ``address`` came here. Any thread, Ray's callback thread too.

        Cost:
            0.5 µs.
        """
        if address.runtime_id == self._address.runtime_id:
            return
        self._arrived.append((weakref.ref(lease), address))
        if not self._waiting:
            self._waiting = True
            post(self._io.loop, self._io.loop.call_later, STAY_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Those that are still here have stayed."""
        self._waiting = False  # before looking, so that what comes now is looked at, too
        owners = set()
        for _ in range(len(self._arrived)):
            ref, address = self._arrived.popleft()
            lease = ref()
            if lease is None:
                continue
            owner = self._owners.get(address.runtime_id)
            if owner is None:
                owner = self._owners[address.runtime_id] = _Owner(address)
            stay = _Stay(lease, self._ended.put)
            stay.id, stay.owner = bytes(lease.marker.binary()), owner
            self._stays.add(stay)
            owner.count[stay.id] += 1
            owner.changed.add(stay.id)
            owners.add(owner)
            del lease
        for owner in owners:
            self._tell_soon(owner)

    def _end(self, stays: list[_Stay]) -> None:
        for stay in stays:
            self._stays.discard(stay)
            owner = stay.owner
            owner.count[stay.id] -= 1
            if not owner.count[stay.id]:
                del owner.count[stay.id]
                owner.changed.add(stay.id)
        for owner in {stay.owner for stay in stays}:
            self._tell_soon(owner)

    def _tell_soon(self, owner: _Owner) -> None:
        if owner.changed and not owner.telling:
            owner.telling = True
            self._io.spawn(self._tell(owner))

    async def _tell(self, owner: _Owner) -> None:
        """Tell an owner what has changed, until it knows."""
        while owner.changed:
            changed = set(islice(owner.changed, _MAX_LEASES))
            owner.changed -= changed
            here = {id_ for id_ in changed if id_ in owner.count}
            took, dropped = list(here - owner.told), list((changed & owner.told) - here)
            if not took and not dropped:
                continue
            body = msgpack.packb((pack_address(self._address), took, dropped))
            try:
                await self._routes.peer(owner.address).call(TransportMessage(NAME, body))
            except OwnerDiedError:  # and its tensors with it
                owner.changed.clear()
                owner.told.clear()
                break
            except AiordtError as exc:
                _log.debug("%s is told later: %s", owner.address, exc)
                owner.changed |= changed
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                owner.told.update(took)
                owner.told.difference_update(dropped)
        owner.telling = False
        if not owner.count:
            self._owners.pop(owner.address.runtime_id, None)

    # --- of what this process exports -------------------------------------------------------

    async def serve(self, request: TransportMessage, peer_id: bytes) -> TransportMessage:
        """A holder says what it has, and what it has no more.

        Raises:
            ProtocolViolationError: It does not.
        """
        try:
            address, took, dropped = msgpack.unpackb(request.body)
            holder = unpack_address(address)
            took, dropped = [[bytes(id_) for id_ in ids] for ids in (took, dropped)]
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise ProtocolViolationError("not a claim") from exc
        if holder.runtime_id != peer_id:
            raise ProtocolViolationError("a claim for another process")
        self._registry.claim(took, peer_id)
        self._registry.unclaim(dropped, peer_id)
        if took:
            self._holders[peer_id] = holder
        return TransportMessage(NAME, b"")

    def lost(self, peer_id: bytes) -> None:
        """The connection to a process has ended: does it live?"""
        if peer_id in self._holders:
            self._io.spawn(self._look_after(peer_id, self._holders[peer_id]))

    async def _look_after(self, peer_id: bytes, address: PeerAddress) -> None:
        deadline = self._io.loop.time() + _APART_SECONDS
        while self._registry.claimed_by(peer_id) and self._io.loop.time() < deadline:
            try:
                await self._routes.peer(address).reach()
            except OwnerDiedError:
                break
            except AiordtError:  # it cannot be reached, and may yet live
                if await self._is_gone(address):
                    break
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                return  # the end of this connection is told here as well
        self._holders.pop(peer_id, None)
        self._registry.unclaim(None, peer_id)
