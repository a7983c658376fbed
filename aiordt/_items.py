"""Refs in items of generators: held by who yielded them, since Ray does not count them.

Ray (2.60) counts what is nested in an item only if its consumer was waiting for that item. If it
comes later, or holds the item, what is nested is free as soon as the producer has dropped it: a
request to watch the consumer's use of it overtakes the item itself, and is answered by "not in
use". So the producer keeps the leases that it yields, and consumers tell it, over their control
connections, which of them they took and which they have dropped.

Invariants:
    ITM-1  A lease that was yielded is held until every process that took it has dropped it, or
           has had Ray count it; one that nobody takes is held for ``Config.item_seconds``.
    ITM-2  A lease that came in an item and is passed on is not dropped here before Ray counts it:
           its producer sends it once more as the result of a call, which Ray does count.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack
from typing_extensions import override

from aiordt import _ray
from aiordt._errors import AiordtError, ClosedError, OwnerDiedError, TensorFreedError
from aiordt._progress import Inbox, post, settle
from aiordt._ref import Lease, TensorRef, origin_of, unpack_origin
from aiordt._runtime import Runtime, Service, add_service, current
from aiordt._tree import Flat
from aiordt.abc import TransportMessage

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from ray import ObjectRef

    from aiordt._landing import Item
    from aiordt._wire import Message

_NAME: Final = "items"
#: A consumer whose connection has ended, but that lives, takes its leases again within this time.
_RETURN_SECONDS: Final = 30.0
_RETURN_TRIES: Final = 20
#: An item may be passed on by its ObjectRef, to several processes. Who called for it knows when
#: nobody has that any more; others that open it do not, so they may yet be followed for so long.
_OTHERS_SECONDS: Final = 5.0


def yielded(item: Any) -> Any:  # noqa: ANN401
    """An item that a generator is about to yield: its leases are held from its pickling on."""
    items: Items | None = None
    for ref in Flat(item, _is_ref).leaves:
        lease = ref.lease
        if lease is not None and not isinstance(lease.item, _Yielded):
            items = items or of(current())
            lease.item = _Yielded(items, lease.item)
    return item


def _is_ref(value: object) -> bool:
    return type(value) is TensorRef


class _Yielded:
    """Of a lease that this process yields: holds it whenever it is pickled."""

    __slots__ = ("_items", "before")

    def __init__(self, items: Items, before: Item | None) -> None:
        self._items = items
        self.before = before  # this process may have it from another's generator

    async def confirmed(self) -> None:
        before = self.before
        if before is not None:
            await before.confirmed()

    def reduce(self, lease: Lease) -> tuple[object, ...]:
        before = self.before
        if before is not None:
            before.reduce(lease)
        key = self._items.keep(lease)
        return _rebuild, (lease.marker, origin_of(self._items.runtime), key)


class _Taken:
    """Of a lease that came in an item: tells its producer that it is here, and its end."""

    __slots__ = ("_asked", "_confirmed", "_items", "_key", "_last", "_origin")

    def __init__(self, items: Items, origin: bytes, key: bytes, *, last: bool) -> None:
        self._items = items
        self._origin = origin
        self._key = key
        self._last = last
        self._asked = False
        self._confirmed = False
        items.tell(origin, _Took(key))

    async def confirmed(self) -> None:
        if not self._confirmed:
            await self._items.runtime.io.run(self._items.confirm(self._origin, self._key))
            self._confirmed = True

    def reduce(self, lease: Lease) -> tuple[object, ...]:
        if not self._asked:
            self._asked = True
            self._items.tell(self._origin, _Passed(self._key, lease))
        return Lease, (lease.marker,)

    def __del__(self) -> None:
        self._items.tell(self._origin, _Dropped(self._key, self._last))


def _rebuild(marker: ObjectRef[None], origin: bytes, key: bytes) -> Lease:
    """A lease as it comes out of an item. On any thread, Ray's callback thread too; never waits."""
    lease = Lease(marker)
    try:
        items = of(current())
    except AiordtError:  # Ray is shutting down
        return lease
    outer = _ray.watch_outer(items.outer_gone)
    lease.item = _Taken(items, origin, key, last=outer is not None)
    if outer is not None:
        items.tell(origin, _Inside(key, outer))
    return lease


class _Took(NamedTuple):
    """A lease has come in an item."""

    key: bytes


class _Inside(NamedTuple):
    """It is in an object of this process, from which it can be taken out again."""

    key: bytes
    outer: bytes


class _Dropped(NamedTuple):
    """One that came is garbage; ``last``: no other process opens its item later."""

    key: bytes
    last: bool


class _Passed(NamedTuple):
    """One that came is being pickled for others."""

    key: bytes
    lease: Lease


_Event = _Took | _Inside | _Dropped | _Passed


class _Held:
    """A lease in one item that this process yielded.

    Attributes:
        lease: It.
        takers: The processes that have it.
        timer: Of its end.
    """

    __slots__ = ("lease", "takers", "timer")

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.takers: set[bytes] = set()
        self.timer: asyncio.TimerHandle | None = None


class _Producer:
    """A process whose items came here.

    Attributes:
        origin: Who.
        address: Where.
        events: What it has not been told yet.
        held: How often each lease is here.
        confirmed: Whether it holds it, by each lease that it was asked for.
        passed: Those that were passed on, and that Ray is to count.
        telling: Whether somebody is telling it.
        asking: Who waits until it has been told.
    """

    def __init__(self, origin: bytes) -> None:
        self.origin = origin
        self.address = unpack_origin(origin)[0]
        self.events: list[_Event] = []
        self.held: Counter[bytes] = Counter()
        self.confirmed: dict[bytes, bool] = {}
        self.passed: dict[bytes, Lease] = {}
        self.telling = False
        self.asking: set[asyncio.Future[None]] = set()

    def sorted(self) -> tuple[list[bytes], list[tuple[bytes, bool]]]:
        """What is new since the last time: the leases that came, and those that are gone."""
        events, self.events = self.events, []
        before = {event.key: self.held[event.key] for event in events}
        lasts = {}
        for event in events:
            if isinstance(event, _Took):
                self.held[event.key] += 1
            elif isinstance(event, _Dropped):
                self.held[event.key] -= 1
                lasts[event.key] = event.last
            elif isinstance(event, _Passed):
                self.passed[event.key] = event.lease
        self.held += Counter()  # forgets what is 0
        gone = [(key, last) for key, last in lasts.items() if not self.held[key]]
        for key, _ in gone:
            self.confirmed.pop(key, None)
        return [key for key, count in before.items() if not count], gone

    def answer(self, error: AiordtError | None = None) -> None:
        """Let those go on who wait until it has been told."""
        for future in self.asking:
            settle(future, None, error)
        self.asking.clear()


class Items(Service):
    """See above. Made with each runtime.

    Attributes:
        runtime: It.
    """

    name = _NAME

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._loop = runtime.io.loop
        self._seconds = runtime.config.item_seconds
        self._numbers = itertools.count()
        self._held: dict[bytes, _Held] = {}
        self._producers: dict[bytes, _Producer] = {}
        self._inside: dict[bytes, set[tuple[bytes, bytes]]] = {}
        self._inbox = Inbox(self._loop, self._sort)

    # --- of what this process yields --------------------------------------------------------

    def keep(self, lease: Lease) -> bytes:
        """Hold a lease that is being pickled in an item. Any thread.

        Returns:
            By what the lease in that item is known.
        """
        key = bytes(lease.marker.binary()) + next(self._numbers).to_bytes(8)
        post(self._loop, self._keep, key, lease)
        return key

    def _keep(self, key: bytes, lease: Lease) -> None:
        held = self._held[key] = _Held(lease)
        self._end_in(self._seconds, key, held)

    def _end_in(self, seconds: float, key: bytes, held: _Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
        held.timer = self._loop.call_later(seconds, self._expire, key)

    def _expire(self, key: bytes) -> None:
        held = self._held[key]
        held.timer = None
        if not held.takers:
            del self._held[key]

    def _take(self, key: bytes, peer_id: bytes) -> bool:
        held = self._held.get(key)
        if held is not None:
            held.takers.add(peer_id)
        return held is not None

    def _drop(self, key: bytes, peer_id: bytes, last: bool) -> None:  # noqa: FBT001
        held = self._held.get(key)
        if held is None:
            return
        held.takers.discard(peer_id)
        if held.takers:
            return
        if not last:
            self._end_in(_OTHERS_SECONDS, key, held)
            return
        if held.timer is not None:
            held.timer.cancel()
        del self._held[key]

    def marker(self, key: bytes) -> ObjectRef[None] | None:
        """The marker of a lease that is held. Any thread."""
        held = self._held.get(key)
        return None if held is None else held.lease.marker

    @override
    async def serve(self, request: TransportMessage, peer_id: bytes) -> Message:
        takes, drops, asks = msgpack.unpackb(request.body)
        held = [self._take(key, peer_id) for key in takes]
        for key, last in drops:
            self._drop(key, peer_id, last)
        return TransportMessage(_NAME, msgpack.packb((held, _ray.own_handle() if asks else b"")))

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        return False

    @override
    def lost(self, peer_id: bytes) -> None:
        for key, held in self._held.items():
            if peer_id in held.takers:
                held.takers.discard(peer_id)
                if not held.takers:
                    self._end_in(_RETURN_SECONDS, key, held)
        for producer in self._producers.values():
            if producer.address.runtime_id == peer_id and not producer.telling:
                producer.telling = True
                self.runtime.io.spawn(self._tell(producer, again=True))

    # --- of what others yield ---------------------------------------------------------------

    def tell(self, origin: bytes, event: _Event) -> None:
        """Let the producer of an item know. Any thread, at any time; never waits."""
        with suppress(RuntimeError):  # the loop has ended
            self._inbox.put((origin, event))

    def outer_gone(self, outer: bytes) -> None:
        """Nobody can open an item any more. Any thread."""
        self._inbox.put((b"", outer))

    def _sort(self, told: list[tuple[bytes, _Event | bytes]]) -> None:
        for origin, event in told:
            if isinstance(event, bytes):
                for producer, key in self._inside.pop(event, ()):
                    self._add(producer, _Dropped(key, last=True))
            elif isinstance(event, _Inside):
                inside = self._inside.setdefault(event.outer, set())
                if (origin, event.key) not in inside:
                    inside.add((origin, event.key))
                    self._add(origin, _Took(event.key))
            else:
                self._add(origin, event)

    def _add(self, origin: bytes, event: _Event) -> None:
        producer = self._producers.get(origin)
        if producer is None:
            producer = self._producers[origin] = _Producer(origin)
        producer.events.append(event)
        if not producer.telling:
            producer.telling = True
            self.runtime.io.spawn(self._tell(producer))

    async def _tell(self, producer: _Producer, *, again: bool = False) -> None:
        """Tell a producer what is new; ``again``: what is here, since it may have forgotten."""
        tries = _RETURN_TRIES
        while producer.events or again:
            took, dropped = producer.sorted()
            if again:
                took = list(producer.held)
            try:
                await self._call(producer, took, dropped)
            except AiordtError as exc:
                producer.answer(exc)
                tries -= 1
                again = tries > 0 and not isinstance(exc, OwnerDiedError)
                if again:
                    await asyncio.sleep(_RETURN_SECONDS / _RETURN_TRIES)
                else:
                    producer.held.clear()
                    producer.passed.clear()
            else:
                producer.answer()
                again = False
                tries = _RETURN_TRIES
        producer.telling = False
        if not producer.held:
            self._producers.pop(producer.origin, None)

    async def _call(
        self, producer: _Producer, took: list[bytes], dropped: list[tuple[bytes, bool]]
    ) -> None:
        body = msgpack.packb((took, dropped, bool(producer.passed)))
        request = TransportMessage(_NAME, body)
        here = self.runtime.address
        if producer.address == here:
            reply = await self.serve(request, here.runtime_id)
        else:
            reply = await self.runtime.routes.peer(producer.address).call(request)
        assert isinstance(reply, TransportMessage)  # noqa: S101  (what `serve` returns)
        held, handle = msgpack.unpackb(reply.body)
        producer.confirmed.update(zip(took, held, strict=True))
        if producer.passed:
            passed, producer.passed = producer.passed, {}
            self.runtime.io.spawn(self._count(handle, passed))

    async def confirm(self, origin: bytes, key: bytes) -> None:
        """Wait until the producer of an item holds a lease in it. On the io loop.

        Raises:
            TensorFreedError: It does not.
            AiordtError: It cannot be asked.
        """
        producer = self._producers.get(origin)
        while producer is not None and producer.telling and key not in producer.confirmed:
            waiter: asyncio.Future[None] = self._loop.create_future()
            producer.asking.add(waiter)
            await waiter
        if producer is not None and not producer.confirmed.get(key, True):
            raise TensorFreedError(
                "the tensor came in an item of a generator that was taken too late: its producer "
                "keeps items for Config.item_seconds (and for 5 s after the first process that "
                "took one by its ObjectRef has dropped it); raise that there, or take items sooner"
            )

    async def _count(self, handle: bytes, passed: dict[bytes, Lease]) -> None:
        """Let Ray count leases for this process (ITM-2); they are held meanwhile."""
        asked = functools.partial(_markers, list(passed))
        with suppress(AiordtError):  # dead, and its tensors with it
            counted = await _ray.ask_actor(_ray.weak_handle(handle), asked)
            for lease, marker in zip(passed.values(), counted, strict=True):
                if marker is None:
                    continue
                if isinstance(lease.item, _Yielded):
                    lease.item.before = None
                else:
                    lease.item = None

    @override
    async def aclose(self) -> None:
        self._held.clear()
        for producer in self._producers.values():
            producer.answer(ClosedError("aiordt's runtime was closed"))
        self._producers.clear()


def _markers(keys: Sequence[bytes], _actor: object) -> list[ObjectRef[None] | None]:
    """On the producer: the markers of leases that it holds, in a result, where Ray counts them."""
    items = of(current())
    return [items.marker(key) for key in keys]


def of(runtime: Runtime) -> Items:
    """A runtime's."""
    return next(each for each in runtime.services if isinstance(each, Items))


add_service(Items)
