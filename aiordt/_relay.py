"""One crossing per node: what a process pulled from another host, its neighbours read here.

The first process of a host that pulls a part of an export keeps a copy of it in shared
memory, and answers for that export on a local socket whose name follows from the export's
key: binding the name is what makes it the first. Others connect there, learn who it is, ask
it over an ordinary control connection, and read its copy by `shm`.

A copy holds no lease. It goes when the owner says that the export is gone, when the owner
is lost, when room is needed, or with its process; whoever comes then is the next first.
Whatever goes wrong on the way, a pull ends up going straight to the owner.

The first of a host need not get it from the owner either: the owner tells it which other host's
first to ask (`aiordt._fanout`). That one exports what it has, for as long as it is read there.

Invariants:
    RLY-1  A copy's memory is not given away while a neighbour reads it.
    RLY-2  A pull through a neighbour ends: its death, silence or failure only makes it go
           straight to the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import logging
import socket
from typing import TYPE_CHECKING, Final

import msgpack
import torch

from aiordt._arena import arena
from aiordt._copies import (
    DONE,
    FETCH,
    FETCH_FAR,
    JOIN,
    NAME,
    WATCH,
    Copy,
    Entry,
    Origin,
    Pin,
    done_note,
    fetch_request,
    meeting_name,
    pack_address,
    same_user,
    steps,
    unpack_address,
    unpacked,
)
from aiordt._errors import (
    AiordtError,
    OutOfMemoryError,
    OwnerDiedError,
    PeerLostError,
    ProtocolViolationError,
    UnavailableError,
)
from aiordt._fanout import Fanout
from aiordt._metrics import phase
from aiordt._progress import finish, post, run_all
from aiordt._types import MIB, Owner
from aiordt._wire import pack_items, unpack_items
from aiordt.abc import Part, PeerAddress, TransportMessage
from aiordt.transports._job import Job, copy_piece, pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from aiordt._metrics import Counters
    from aiordt._progress import IoThread, Workers
    from aiordt._registry import Registry
    from aiordt._route import Routes
    from aiordt._wire import Message
    from aiordt.abc import Link

_log = logging.getLogger(__name__)

#: Less than this of one export is not worth asking around for.
MIN_NBYTES: Final = 1 * MIB
#: A neighbour that is silent for so long, and as long as this rate takes, is given up.
_PATIENCE_SECONDS: Final = 2.0
_LEAST_RATE: Final = 50 * MIB
_ATTEMPTS: Final = 3


class Relay:
    """This process among its neighbours. What is not said otherwise runs on the io loop.

    Args:
        address: This process's.
        io: The io thread.
        registry: What this process exports.
        routes: The ways to others.
        counters: Where what crossed is counted.
        workers: Threads that copy.
        limit: Bytes of copies to keep at most; 0: none, every pull goes to its owner.
    """

    def __init__(
        self,
        address: PeerAddress,
        io: IoThread,
        *,
        registry: Registry,
        routes: Routes,
        counters: Counters,
        workers: Workers,
        limit: int,
    ) -> None:
        self._address = address
        self._io = io
        self._registry = registry
        self._routes = routes
        self._counters = counters
        self._workers = workers
        self._limit = limit
        self._copies: dict[bytes, Copy] = {}  # least recently used first
        self._pins: dict[tuple[bytes, int], Pin] = {}
        self._numbers = itertools.count(1)
        self._distrusted: set[bytes] = set()
        self.fanout = Fanout(registry)

    @property
    def nbytes(self) -> int:
        """Bytes of copies that are kept for neighbours. Any thread."""
        return sum(copy.nbytes for copy in list(self._copies.values()))

    def wants(self, parts: Sequence[Part]) -> bool:
        """Whether a read is worth being shared with neighbours. Any thread."""
        return bool(self._limit) and sum(part.nbytes for part in parts) >= MIN_NBYTES

    async def read(
        self, address: PeerAddress, parts: Sequence[Part], name: str, link: Link
    ) -> None:
        """Read ``parts`` of an owner on another host: as `Link.read`, from any loop."""
        exports: dict[bytes, list[Part]] = {}
        for part in parts:
            exports.setdefault(part.key, []).append(part)
        direct: list[Part] = []
        reads = []
        for key, group in exports.items():
            nbytes = sum(part.nbytes for part in group)
            if MIN_NBYTES <= nbytes <= self._limit and key not in self._distrusted:
                reads.append(self._read_export(address, key, group, name, link))
            else:
                direct += group
        if direct:
            reads.append(self._read_direct(direct, name, link))
        await run_all(reads)

    def distrust(self, key: bytes) -> None:
        """What came of an export was wrong: have it from its owner only, from now on. Any thread.

        What this process keeps of it goes; others find out by themselves.
        """
        self._distrusted.add(key)
        post(self._io.loop, self._drop, key)

    async def _read_direct(self, parts: Sequence[Part], name: str, link: Link) -> None:
        await link.read(parts)
        self._counters.pulled(name, len(parts), sum(part.nbytes for part in parts))

    async def _read_export(
        self, address: PeerAddress, key: bytes, parts: Sequence[Part], name: str, link: Link
    ) -> None:
        for _ in range(_ATTEMPTS):
            try:
                first = await self._io.run(self._first(key))
                if first is not None:
                    await self._read_neighbour(first, address, key, parts)
                    return
            except (OwnerDiedError, PeerLostError, UnavailableError) as exc:
                _log.debug("a neighbour has gone: %s", exc)  # RLY-2: who is it now?
                continue
            except (AiordtError, OSError, TimeoutError) as exc:
                _log.debug("no help from a neighbour: %s", exc)
                break
            try:
                await self._read_own(address, key, parts)
            except (OutOfMemoryError, UnavailableError) as exc:
                _log.debug("no copy for neighbours: %s", exc)
                break
            return
        await self._read_direct(parts, name, link)

    # --- the first: brings it, and keeps it ------------------------------------------------

    async def _first(self, key: bytes) -> PeerAddress | None:
        """Who keeps an export on this host; ``None``: this process, from now on.

        Raises:
            OSError: The question cannot be answered.
        """
        if key in self._copies:
            return None
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(0)
        try:
            try:
                sock.bind(meeting_name(key))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                sock.listen(128)
                self._copies[key] = Copy(sock)
                loop.add_reader(sock, self._asked, sock)
                return None
            async with asyncio.timeout(_PATIENCE_SECONDS):
                try:
                    await loop.sock_connect(sock, meeting_name(key))
                    if not same_user(sock):
                        raise PermissionError(errno.EPERM, "another user's process has the name")
                    data = await loop.sock_recv(sock, 1024)
                except (ConnectionError, BlockingIOError) as exc:  # it has just gone
                    raise UnavailableError(str(exc), reason=str(exc), transport=NAME) from exc
        except BaseException:
            sock.close()
            raise
        sock.close()
        if not data:
            raise UnavailableError("it has just gone", reason="it has just gone", transport=NAME)
        return unpack_address(data)

    def _asked(self, listener: socket.socket) -> None:
        """A neighbour wants to know who keeps an export."""
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            with sock:
                if same_user(sock):
                    sock.send(pack_address(self._address), socket.MSG_DONTWAIT)

    async def _read_own(self, address: PeerAddress, key: bytes, parts: Sequence[Part]) -> None:
        entries = await self._io.run(self._fetch(address, key, parts))
        try:
            chunks = itertools.chain.from_iterable(
                pieces(entry.tensor.data_ptr(), part.target, part.nbytes)
                for entry, part in zip(entries, parts, strict=True)
            )
            job = Job(chunks, copy_piece, "relay.chunk")
            await finish(job.start(self._workers, 2), job.stop)
        finally:
            self._io.loop.call_soon_threadsafe(self._unpin, entries)

    async def _fetch(self, address: PeerAddress, key: bytes, parts: Sequence[Part]) -> list[Entry]:
        """Bring parts here, each once for all who ask.

        Returns:
            Where they are, pinned (RLY-1).
        """
        copy = self._copies.get(key)
        if copy is None:
            raise UnavailableError("not kept any more", reason="not kept any more", transport=NAME)
        self._copies[key] = self._copies.pop(key)  # the most recently used
        missing = [part for part in parts if (part.index, part.cut) not in copy.entries]
        if missing:
            try:
                self._bring(copy, address, key, missing)
            except AiordtError:
                self._drop_if_empty(key, copy)
                raise
        entries = [copy.entries[part.index, part.cut] for part in parts]
        for entry in entries:
            entry.pins += 1
        try:
            for task in dict.fromkeys(entry.task for entry in entries):
                await asyncio.shield(task)
        except BaseException:
            self._unpin(entries)
            self._give_up(copy, {entry.task for entry in entries})
            raise
        return entries

    @staticmethod
    def _give_up(copy: Copy, tasks: Collection[asyncio.Task[None]]) -> None:
        """Cancel those of ``tasks`` that nobody waits for; nor does who asks from now on."""
        wanted = {entry.task for entry in copy.entries.values() if entry.pins}
        unwanted = {task for task in tasks if task not in wanted and not task.done()}
        copy.forget(unwanted)
        for task in unwanted:
            task.cancel()

    def _bring(self, copy: Copy, address: PeerAddress, key: bytes, parts: Sequence[Part]) -> None:
        nbytes = sum(part.nbytes for part in parts)
        for other, kept in list(self._copies.items()):  # least recently used first
            if self.nbytes + nbytes <= self._limit:
                break
            if kept is not copy and not kept.pinned:
                self._drop(other)
        if self.nbytes + nbytes > self._limit:
            raise OutOfMemoryError("no room is left for copies for neighbours")
        tensors = [arena.empty((part.nbytes,), torch.uint8) for part in parts]
        wanted = [
            dataclasses.replace(part, target=tensor.data_ptr(), tensor=tensor)
            for part, tensor in zip(parts, tensors, strict=True)
        ]
        before: asyncio.Task[None] | None = None
        for step in steps(wanted):
            before = self._io.loop.create_task(self._get(before, copy, address, step))
            before.add_done_callback(lambda task: self._brought(task, copy, address, key))
            for part in step:
                assert part.tensor is not None  # noqa: S101  (see above)
                copy.entries[part.index, part.cut] = Entry(part.tensor, before)

    async def _get(
        self,
        before: asyncio.Task[None] | None,
        copy: Copy,
        address: PeerAddress,
        parts: list[Part],
    ) -> None:
        """Get parts from the owner of an export, or from another host; ``before``: first that."""
        if before is not None:
            await asyncio.wait({before})
        phase("relay.fetching")
        for _ in range(_ATTEMPTS):
            source = await self._source(copy, address, parts[0].key)
            if source.address is None:
                break
            try:
                await self._read_far(source, copy, address, parts)
            except (AiordtError, OSError, TimeoutError) as exc:
                _log.debug("another host fails, %s: %s", source.address, exc)
                copy.failed.append(source.address.runtime_id)
                if copy.source is source:
                    copy.source = None
            else:
                return
        name, link = await self._routes.find(address, Owner("", address.pid), None)
        await link.read(parts)
        self._counters.pulled(name, len(parts), sum(part.nbytes for part in parts))

    async def _source(self, copy: Copy, address: PeerAddress, key: bytes) -> Origin:
        if copy.source is None:
            body = msgpack.packb((JOIN, key, pack_address(self._address), copy.failed))
            reply = await self._routes.peer(address).call(TransportMessage(NAME, body))
            assert isinstance(reply, TransportMessage)  # noqa: S101  (else `call` raised)
            packed, depth = unpacked(reply.body)
            copy.source = Origin(unpack_address(packed) if packed else None, depth)
        return copy.source

    async def _read_far(
        self, source: Origin, copy: Copy, address: PeerAddress, parts: list[Part]
    ) -> None:
        """Read parts from another host's first."""
        far = source.address
        assert far is not None  # noqa: S101  (the caller's case)
        seconds = source.depth * (_PATIENCE_SECONDS + copy.nbytes / _LEAST_RATE)
        async with asyncio.timeout(seconds):
            name, link = await self._routes.find(far, Owner("", far.pid), None)
            peer = self._routes.peer(far)
            number = next(self._numbers)
            try:
                reply = await peer.call(fetch_request(FETCH_FAR, number, address, parts))
                assert isinstance(reply, TransportMessage)  # noqa: S101  (else `call` raised)
                items, there = unpacked(reply.body)
                phase("relay.far")
                rows = zip(parts, unpack_items(items), there, strict=True)
                copies = [
                    Part(key, index, at, to.target, to.nbytes, None, segment, "cpu", to.tensor)
                    for to, (key, index, _), (segment, at) in rows
                ]
                await link.read(copies)
            finally:
                self._io.spawn(peer.note(done_note(number)))
        self._counters.pulled(name, len(parts), sum(part.nbytes for part in parts))

    def _brought(
        self, task: asyncio.Task[None], copy: Copy, address: PeerAddress, key: bytes
    ) -> None:
        if task.cancelled() or task.exception() is not None:
            copy.forget({task})
            self._drop_if_empty(key, copy)
        elif copy.watch is None and self._copies.get(key) is copy:
            copy.watch = self._io.loop.create_task(self._watch(address, key))

    async def _watch(self, address: PeerAddress, key: bytes) -> None:
        """Keep a copy until its export is gone, as far as anybody can tell."""
        try:
            body = msgpack.packb((WATCH, key))
            await self._routes.peer(address).call(TransportMessage(NAME, body))
        except (AiordtError, OSError) as exc:
            _log.debug("a copy's owner is lost: %s", exc)
        finally:
            self._drop(key)

    def _drop_if_empty(self, key: bytes, copy: Copy) -> None:
        if not copy.entries and self._copies.get(key) is copy:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        copy = self._copies.pop(key, None)
        if copy is None:
            return
        self._io.loop.remove_reader(copy.listener)
        copy.listener.close()
        if copy.watch is not None and copy.watch is not asyncio.current_task():
            copy.watch.cancel()

    @staticmethod
    def _unpin(entries: Sequence[Entry]) -> None:
        for entry in entries:
            entry.pins -= 1

    # --- serving neighbours, and being one -------------------------------------------------

    async def serve(self, message: TransportMessage, peer_id: bytes) -> Message:
        """Answer a neighbour."""
        kind, *rest = unpacked(message.body)
        if kind == DONE:
            self._let_go((peer_id, rest[0]))
            return TransportMessage(NAME, b"")
        if kind == WATCH:
            await self.fanout.watch(rest[0], peer_id)
            return TransportMessage(NAME, b"")
        if kind == JOIN:
            key, packed, failed = rest
            parent, depth = self.fanout.join(key, unpack_address(packed), failed)
            found = b"" if parent is None else pack_address(parent)
            return TransportMessage(NAME, msgpack.packb((found, depth)))
        if kind not in {FETCH, FETCH_FAR} or not self._limit:
            raise ProtocolViolationError("unknown request to a neighbour")
        number, packed, items, places = rest
        address = unpack_address(packed)
        parts = [
            Part(key, index, where, 0, nbytes, cut, segment, device)
            for (key, index, cut), (where, nbytes, segment, device) in zip(
                unpack_items(items), places, strict=True
            )
        ]
        entries = await self._fetch(address, parts[0].key, parts)
        pin = self._pins[peer_id, number] = Pin(entries, [])  # RLY-1
        addresses = [entry.tensor.data_ptr() for entry in entries]
        there = [(arena.locate(where), where) for where in addresses]
        if kind == FETCH:
            return TransportMessage(NAME, msgpack.packb(there))
        export = self._registry.begin([entry.tensor for entry in entries], "a copy for other hosts")
        pin.leases += [(export.key, place) for place in range(len(export.groups))]
        self._registry.commit(export, pin.leases)
        named = pack_items([(export.key, place, None) for place in range(len(entries))])
        return TransportMessage(NAME, msgpack.packb((named, there)))

    def _let_go(self, which: tuple[bytes, int]) -> None:
        pin = self._pins.pop(which, None)
        if pin is not None:
            self._unpin(pin.entries)
            self._registry.drop(pin.leases)

    def forget(self, peer_id: bytes) -> None:
        """A neighbour is gone."""
        for which in [which for which in self._pins if which[0] == peer_id]:
            self._let_go(which)
        self.fanout.forget(peer_id)

    async def _read_neighbour(
        self, first: PeerAddress, address: PeerAddress, key: bytes, parts: Sequence[Part]
    ) -> None:
        owner = Owner("", first.pid)
        nbytes = sum(part.nbytes for part in parts)
        _, link = await self._routes.find(first, owner, "shm")
        number = next(self._numbers)
        peer = self._routes.peer(first)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS + nbytes / _LEAST_RATE):
                reply = await self._io.run(peer.call(fetch_request(FETCH, number, address, parts)))
            assert isinstance(reply, TransportMessage)  # noqa: S101  (else `call` raised)
            there = unpacked(reply.body)
            phase("relay.reading")
            await link.read(
                [
                    Part(key, part.index, where, part.target, part.nbytes, segment=segment)
                    for part, (segment, where) in zip(parts, there, strict=True)
                ]
            )
        finally:
            done = done_note(number)
            self._io.loop.call_soon_threadsafe(lambda: self._io.spawn(peer.note(done)))
        self._counters.pulled("shm", len(parts), nbytes)

    async def aclose(self) -> None:
        """Keep nothing any more."""
        for key in list(self._copies):
            self._drop(key)
        self.fanout.close()
