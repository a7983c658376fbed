"""Weights in a runtime: serves the readers of what this process publishes, and asks others.

A reader *takes* the newest version, which is held for it from then on; where that is later than
what it asked for, it is answered once there is one. It reads the tensors as any ref's, and then
asks its publisher to let go: only if the version was held until then, it counts.

Invariants:
    WGT-4  What a reader gets is one version as it was published: it was held, and so not written,
           from before the first byte was read until after the last.
    WGT-5  Every take ends: with a version, with the end of its publisher, or with the reader's own.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from typing import TYPE_CHECKING, Any, Final

import msgpack
from typing_extensions import override

from aiordt import _ray, _runtime
from aiordt._errors import (
    AiordtError,
    OwnerDiedError,
    ProtocolViolationError,
    TensorFreedError,
    UsageError,
)
from aiordt._progress import post, settle
from aiordt._ref import header_of
from aiordt._runtime import Runtime, Service
from aiordt._wire import new_key
from aiordt.abc import TransportMessage
from aiordt.weights._layout import Known
from aiordt.weights._names import Names, Record, digest
from aiordt.weights._stream import Offer, Stream, fields

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    from aiordt._wire import Message

_NAME: Final = "weights"
#: A description comes in pieces of so many bytes: a frame is limited.
_PIECE_NBYTES: Final = 1 << 20

_HELLO: Final = 0  # token -> whether that publisher is here and open
_TAKE: Final = 1  # token, number, after -> an offer; nothing: it has closed
_DESCRIBE: Final = 2  # token, slot, generation, start -> bytes
_DONE: Final = 3  # token, number -> whether a version was held until now
_HERE: Final = 4  # a name's digest: it has a publisher now


class Weights(Service):
    """See above. Made with each runtime."""

    name = _NAME

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.numbers = itertools.count(1)
        self._streams: dict[bytes, Stream] = {}
        self._waiting: dict[bytes, set[asyncio.Future[None]]] = {}

    # --- serving, on the io loop -----------------------------------------------------------

    @override
    async def serve(self, request: TransportMessage, peer_id: bytes) -> Message:
        try:
            kind, *rest = msgpack.unpackb(request.body)
            reply = await self._serve(kind, rest, peer_id)
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise ProtocolViolationError("not a request about weights") from exc
        return TransportMessage(_NAME, msgpack.packb(reply))

    async def _serve(self, kind: int, rest: list[Any], peer_id: bytes) -> Any:  # noqa: ANN401
        if kind == _HERE:
            for future in self._waiting.get(rest[0], ()):
                settle(future, None, None)
            return None
        token, *more = rest
        stream = self._streams.get(token)
        if kind == _HELLO:
            return stream is not None and not stream.closed
        if stream is None:
            return None
        if kind == _TAKE:
            number, after = more
            return fields(await stream.take((peer_id, number), after))
        if kind == _DESCRIBE:
            slot, generation, start = more
            return stream.described(slot, generation)[start : start + _PIECE_NBYTES]
        if kind == _DONE:
            held = stream.done((peer_id, more[0]))
            self._tidy(stream)
            return held
        raise ProtocolViolationError(f"unknown request {kind!r} about weights")

    def _tidy(self, stream: Stream) -> None:
        """Forget a stream that has closed, once nobody reads from it."""
        if stream.closed and not stream.in_use:
            self._streams.pop(stream.record.token, None)

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        return False

    @override
    def lost(self, peer_id: bytes) -> None:
        for stream in list(self._streams.values()):
            stream.lost(peer_id)
            self._tidy(stream)

    @override
    async def aclose(self) -> None:
        for stream in list(self._streams.values()):
            stream.close()
        self._streams.clear()

    # --- publishers, on their loops --------------------------------------------------------

    async def open(self, name: str, limit: int) -> Stream:
        """Become the publisher of a name.

        Raises:
            UsageError: It has one, which is alive.
            PeerLostError: It has one that cannot be reached, and may be alive.
        """
        runtime = self.runtime
        names, key = await self._names(name)
        while True:
            before = await runtime.workers.run(names.latest)
            if before is not None and await runtime.io.run(self._is_open(before)):
                raise UsageError(
                    f"weights {name!r} are published by {before.owner} already: close that "
                    "publisher first, or choose another name"
                )
            epoch = 1 if before is None else before.epoch + 1
            record = Record(epoch, new_key(), runtime.address, runtime.owner)
            stream = Stream(runtime, record, limit, f"publisher of {name!r}")
            self._streams[record.token] = stream
            claimed = False
            try:
                claimed = await self._blocking(functools.partial(names.claim, record))
            finally:
                if not claimed:
                    self._streams.pop(record.token, None)
            if claimed:
                self._blocking_nowait(self._call_waiting(names, key))
                return stream

    async def shut(self, name: str, stream: Stream) -> None:
        """End a publisher; its readers are told."""
        stream.close()
        post(self.runtime.io.loop, self._tidy, stream)
        names, _ = await self._names(name)
        await self._blocking(lambda: names.close(stream.record))

    async def _blocking(self, function: Callable[[], Any]) -> Any:  # noqa: ANN401
        return await self.runtime.workers.run(function)

    def _blocking_nowait(self, coroutine: Coroutine[Any, Any, None]) -> None:
        post(self.runtime.io.loop, self.runtime.io.spawn, coroutine)

    async def _call_waiting(self, names: Names, key: bytes) -> None:
        """Tell who waits for a publisher that there is one (NAM-3)."""
        here = TransportMessage(_NAME, msgpack.packb((_HERE, key)))
        try:
            waiting = await self.runtime.workers.run(names.waiting)
        except AiordtError:  # closed meanwhile
            return
        for address in waiting:
            if address.runtime_id == self.runtime.address.runtime_id:
                await self.serve(here, address.runtime_id)
            else:
                self.runtime.io.spawn(self.runtime.routes.peer(address).note(here))

    async def _names(self, name: str) -> tuple[Names, bytes]:
        key = digest(await self._blocking(_ray.namespace), name)
        return Names(self.runtime.session, key), key

    # --- readers ---------------------------------------------------------------------------

    async def find(self, name: str, past: int) -> Record:
        """The publisher of a name, of a later epoch than ``past``; waits until there is one.

        Raises:
            PeerLostError: There is one that cannot be reached, and may be alive.
        """
        names, key = await self._names(name)
        return await self.runtime.io.run(self._find(names, key, past))

    async def _find(self, names: Names, key: bytes, past: int) -> Record:
        found = await self._look(names, past)
        while found is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(key, set())
            waiting.add(future)
            try:
                await self._blocking(lambda: names.wait(self.runtime.address))
                found = await self._look(names, past)
                if found is None:
                    await future
                    found = await self._look(names, past)
            finally:
                waiting.discard(future)
        return found

    async def _look(self, names: Names, past: int) -> Record | None:
        record = await self._blocking(names.latest)
        if record is None or record.epoch <= past or not await self._is_open(record):
            return None
        found: Record = record
        return found

    async def _is_open(self, record: Record) -> bool:
        """Whether a publisher is there. A record alone proves nothing."""
        if record.closed:
            return False
        try:
            return bool(await self.ask(record, _HELLO))
        except OwnerDiedError:
            return False

    async def ask(self, record: Record, kind: int, *rest: object) -> Any:  # noqa: ANN401
        """Ask a publisher something. On the io loop.

        Raises:
            OwnerDiedError: It is dead.
            PeerLostError: It cannot be reached.
        """
        request = TransportMessage(_NAME, msgpack.packb((kind, record.token, *rest)))
        here = self.runtime.address.runtime_id
        if record.address.runtime_id == here:
            reply = await self.serve(request, here)
        else:
            header = header_of(record.address, record.owner, record.token)
            peer = self.runtime.routes.peer(record.address)
            reply = await self.runtime.reached(header, peer.call(request))
        assert isinstance(reply, TransportMessage)  # noqa: S101  (else `call` raised)
        return msgpack.unpackb(reply.body)

    async def take(self, record: Record, number: int, after: int) -> Offer | None:
        """See `Stream.take`. On the io loop."""
        reply = await self.ask(record, _TAKE, number, after)
        return None if reply is None else Offer(*reply)

    async def describe(self, record: Record, offer: Offer) -> Known:
        """What the buffer of an offer looks like. On the io loop.

        Raises:
            TensorFreedError: The version is not held any more.
        """
        data = b""
        while len(data) < offer.nbytes:
            piece = await self.ask(record, _DESCRIBE, offer.slot, offer.generation, len(data))
            if not piece:
                raise TensorFreedError("the publisher has let go of that version")
            data += piece
        if len(data) > _PIECE_NBYTES:
            return await self.runtime.workers.run(lambda: Known.unpack(data))
        return Known.unpack(data)

    async def done(self, record: Record, number: int) -> bool:
        """See `Stream.done`. On the io loop."""
        return bool(await self.ask(record, _DONE, number))

    def let_go(self, record: Record, number: int) -> None:
        """As `done`, of what nobody asks for any more. Any thread; never waits."""

        async def tell() -> None:
            try:
                await self.ask(record, _DONE, number)
            except (AiordtError, OSError):
                return  # it is gone, and with it what it held

        post(self.runtime.io.loop, lambda: self.runtime.io.spawn(tell()))

    def local(self, record: Record) -> Stream | None:
        """The stream itself, if this process is the publisher."""
        return self._streams.get(record.token)


def weights_of(runtime: Runtime) -> Weights:
    """The weights of a runtime."""
    return next(each for each in runtime.services if isinstance(each, Weights))


_runtime.add_service(Weights)
