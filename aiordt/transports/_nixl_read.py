"""What this process knows of another one's NIXL agent, and how it reads from there."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgpack
import numpy as np

from aiordt._errors import (
    AiordtError,
    ClosedError,
    ProtocolViolationError,
    UnavailableError,
)
from aiordt._metrics import phase
from aiordt._progress import post, settle, yield_core
from aiordt._registration import Region, Registration, Registrations, region_of
from aiordt._types import KIB, MIB
from aiordt._wire import TransportMessage
from aiordt.transports._nixl_agent import SLAB_NBYTES, Chunk, Range, device_id

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from aiordt.abc import Io, Part, Peer
    from aiordt.transports._nixl_agent import Engine

#: Smaller parts are received in registered memory of our own: copying 64 KiB costs 4 µs,
#: registering it with a network card 50 µs and more.
BOUNCE_NBYTES: Final = 64 * KIB
#: One transfer: 1 ms, for so long the lock is held where the call itself copies.
CHUNK_NBYTES: Final = 16 * MIB
_CHUNK_ROWS: Final = 512
#: Transfers of one read under way at once, where the network card does them.
_WINDOW: Final = 4
#: What is known of a peer's memory can only be forgotten as a whole; so many ranges first.
MAX_KNOWN: Final = 4096
_MAX_ITEMS: Final = 4096
WIRING_SECONDS: Final = 5.0
_PROOF_SECONDS: Final = 1.0
#: A read that is stuck for so long needs the owner; one that merely takes long does not mind.
_STALL_SECONDS: Final = 0.02


class Remote:
    """One owner's agent, as this process knows it; shared by all links to it."""

    def __init__(self, peer: Peer, engine: Engine, io: Io) -> None:
        self.peer = peer
        self.name = ""
        self.links = 0
        self.broken = True  # it is to be wired up (again) before the next read
        self.closed = False  # it is not to be wired up any more
        self._engine = engine
        self._io = io
        self._turn = asyncio.Lock()
        self._idle = asyncio.Event()
        self._mutex = threading.Lock()  # never held for long
        self._users = 0
        self._draining = False
        self._stalled = 0
        self._moving = asyncio.Event()
        self._helping: asyncio.Task[None] | None = None
        self._known: dict[tuple[bytes, int] | int, Range] = {}
        self._ranges: set[Range] = set()

    def try_enter(self, parts: Sequence[Part]) -> list[Range] | None:
        """The ranges that ``parts`` are in, kept until `leave`; ``None``: use `enter`."""
        with self._mutex:
            if self.broken or self._draining:
                return None
            try:
                found = [self._known[part.segment or (part.key, part.index)] for part in parts]
            except KeyError:
                return None
            self._users += 1
            return found

    def post(self, function: Callable[[], None]) -> None:
        """Call ``function`` on the io loop."""
        post(self._io.loop, function)

    def leave(self) -> None:
        """The read has ended. Any thread."""
        with self._mutex:
            self._users -= 1
            idle = self._draining and not self._users
        if idle:
            post(self._io.loop, self._idle.set)

    async def enter(self, parts: Sequence[Part]) -> list[Range]:
        """As `try_enter`, after asking the owner. On the io loop."""
        async with self._turn:
            while (found := self.try_enter(parts)) is None:
                if self.broken:
                    await self._renew()
                missing = {
                    part.segment or (part.key, part.index): (part.key, part.index) for part in parts
                }
                missing = {name: item for name, item in missing.items() if name not in self._known}
                if missing:
                    await self._ask_for(missing)
            return found

    async def wire(self) -> None:
        """Make sure that the owner's agent can be read from. On the io loop."""
        async with self._turn:
            if self.broken:
                await self._renew()

    async def aclose(self) -> bool:
        """Forget it, as soon as no read uses it; whether no link does. On the io loop."""
        async with self._turn:
            if not self.links:
                await self._forget()
            return not self.links

    async def _forget(self) -> None:
        with self._mutex:
            self.broken = self._draining = True
        while True:  # NIX-4
            self._idle.clear()
            if not self._users:
                break
            await self._idle.wait()
        self._known.clear()
        self._ranges.clear()
        self._draining = False
        name, self.name = self.name, ""
        if name:
            await self._engine.run(lambda: self._engine.agent.forget(name))

    async def _renew(self) -> None:
        await self._forget()
        fields = await self._ask("hello", [])
        name, connection, blobs, address, number, token = fields
        self.name = name
        where = Range(address, len(token), "cpu", number)
        try:
            try:
                await self._load([connection, *blobs])
            except AiordtError:
                raise
            except Exception as exc:
                raise unavailable(
                    "NIXL finds no way to the owner's memory: it takes an RDMA device on both "
                    f"hosts, or one host that permits reads as cma does ({exc})"
                ) from exc
            await self._prove(where, token, WIRING_SECONDS)
        finally:
            await self._ask("wired", [])
        await self._prove(where, token, _PROOF_SECONDS)  # NIX-1
        self.broken = False

    async def _load(self, blobs: Sequence[bytes]) -> None:
        phase("nixl.loading")
        await self._engine.run(lambda: self._engine.agent.load(blobs, self.name))

    async def _prove(self, where: Range, token: bytes, seconds: float) -> None:
        engine = self._engine
        chunk = Chunk()
        target = ctypes.create_string_buffer(len(token))

        def begin() -> bool:
            here, slab = engine.bounce(chunk, ctypes.addressof(target), len(token))
            chunk.local.append((here, len(token), slab))
            chunk.remote.append((where.address, len(token), where.device_id))
            return engine.agent.post(chunk, self.name)

        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        pause = 0.0002
        try:
            done = await engine.run(begin)
            phase("nixl.proving")
            while not done and loop.time() < deadline:
                if self.closed:
                    raise ClosedError("NIXL's transport was closed")
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.005)
                done = await engine.run(lambda: engine.agent.poll(chunk))
            if done:
                await engine.run(lambda: engine.land(chunk))
        except AiordtError:
            raise
        except Exception as exc:
            raise await self.peer.verdict(exc, transport="nixl", nbytes=len(token)) from exc
        finally:
            engine.abandon(chunk)
        if not done:
            raise unavailable(
                "UCX found only ways between these processes that need the owner's help for every "
                "read (TCP): there must be an RDMA device at both ends, or one host"
            )
        if target.raw != token:
            raise unavailable("what was read is not what the owner has there")

    async def _ask_for(self, missing: dict[Any, tuple[bytes, int]]) -> None:
        if self._known and len(self._known) + len(missing) > MAX_KNOWN:
            await self._renew()
            return
        names, items = list(missing), list(missing.values())
        for start in range(0, len(items), _MAX_ITEMS):
            some = items[start : start + _MAX_ITEMS]
            blobs, rows = await self._ask("ranges", some)
            ranges = [Range(*row) for row in rows]
            if self._clashes(ranges):
                await self._renew()
                return
            await self._load(blobs)
            self._ranges.update(ranges)
            with self._mutex:
                self._known.update(zip(names[start:], ranges, strict=False))

    def _clashes(self, ranges: Sequence[Range]) -> bool:
        """Whether device memory came where other memory was: NIXL cannot tell them apart."""
        known = [each for each in self._ranges if each.device != "cpu"]
        return any(
            old.device == new.device
            and old.address < new.address + new.nbytes
            and new.address < old.address + old.nbytes
            for new in ranges
            if new not in self._ranges
            for old in known
        )

    def stalled(self) -> None:
        """A read does not get on: the owner is asked to help. On the io loop."""
        self._stalled += 1
        if self._helping is None:
            self._helping = asyncio.ensure_future(self._help())

    def unstalled(self) -> None:
        """A read that did not get on has ended. On the io loop."""
        self._stalled -= 1
        if not self._stalled:
            self._moving.set()

    async def _help(self) -> None:
        # UCX may need the owner once more, e.g. to finish wiring up when the first large read
        # takes another way than the small ones before it.
        with suppress(AiordtError):
            while self._stalled:
                self._moving.clear()
                await self._ask("help", [])
                with suppress(TimeoutError):
                    async with asyncio.timeout(WIRING_SECONDS):
                        await self._moving.wait()
                if not self._stalled:
                    await self._ask("wired", [])
        self._helping = None

    async def _ask(self, what: str, arguments: Sequence[object]) -> Any:  # noqa: ANN401
        body: bytes = msgpack.packb([what, arguments])
        reply = await self.peer.call(TransportMessage("nixl", body))
        if not isinstance(reply, TransportMessage):
            raise ProtocolViolationError("a reply of another kind was expected")
        return unpacked(reply.body)


class Read:
    """One read, done by the agent's thread chunk by chunk, in turns with other reads.

    Once started, it leaves the remote when it has ended.
    """

    def __init__(
        self, engine: Engine, remote: Remote, parts: Sequence[Part], ranges: Sequence[Range]
    ) -> None:
        self._engine = engine
        self._remote = remote
        self._stalled = False
        self._pairs = list(zip(parts, ranges, strict=True))
        self._registered: list[Registration[Any]] = []
        self._chunks: Generator[Chunk] | None = None
        self._posted: list[Chunk] = []
        self._stopped = False
        self._error: Exception | None = None
        self._since = 0.0

    def start(self) -> asyncio.Future[None]:
        """Begin; the future is done when nothing is written any more (OWN-1)."""
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._engine.workers.submit(self._run)
        return self._future

    def stop(self) -> None:
        """Start no further transfer: one that was started cannot be recalled."""
        self._stopped = True

    def _run(self) -> None:
        """One turn."""
        ended = False
        while not ended:
            with self._engine.lock:
                moved = self._step()
                ended = not self._posted and (self._stopped or self._chunks is None)
                if ended:
                    if self._chunks is not None:
                        self._chunks.close()
                    for each in self._registered:
                        self._engine.memory.release(each)
            if ended:
                break
            if moved:
                self._since = time.monotonic()
                yield_core()
            else:  # NIXL has nothing to wait on: a quarter more than it took, up to 1 ms
                waited = time.monotonic() - self._since
                if waited > _STALL_SECONDS and not self._stalled:
                    self._stalled = True
                    self._remote.post(self._remote.stalled)
                time.sleep(min(1e-3, max(2e-5, waited / 4)))
            with suppress(ClosedError):
                self._engine.workers.submit(self._run)
                return
            self._stopped = True  # the thread ends after this: see it through
        if self._stalled:
            self._remote.post(self._remote.unstalled)
        self._remote.leave()
        post(self._loop, settle, self._future, None, self._error)

    def _step(self) -> bool:
        """See what has arrived and start what there is room for; whether anything happened."""
        moved = False
        for chunk in list(self._posted):
            moved |= self._advance(chunk, self._engine.agent.poll)
        while not self._stopped and len(self._posted) < _WINDOW:
            coming: Chunk | None = None
            try:
                if self._chunks is None:
                    self._chunks = self._all_chunks()
                    self._since = time.monotonic()
                coming = next(self._chunks)
                phase("nixl.chunk")
            except StopIteration:
                self._chunks = None
                self._stopped = True
                break
            except Exception as exc:  # noqa: BLE001  (handed to the waiter)
                if coming is not None:
                    self._engine.drop(coming)
                self._fail(exc)
                break
            self._posted.append(coming)
            if self._advance(
                coming, lambda chunk: self._engine.agent.post(chunk, self._remote.name)
            ):
                return True  # the call copied: let others have a turn
            moved = True
        return moved

    def _advance(self, chunk: Chunk, step: Callable[[Chunk], bool]) -> bool:
        try:
            if not step(chunk):
                return False
            self._engine.land(chunk)
        except Exception as exc:  # noqa: BLE001  (handed to the waiter)
            self._engine.drop(chunk)
            self._fail(exc)
        self._posted.remove(chunk)
        return True

    def _fail(self, exc: Exception) -> None:
        self._error = self._error or exc
        self._stopped = True

    def _all_chunks(self) -> Generator[Chunk]:
        """What to transfer, in pieces; registers targets on the way."""
        batches: dict[tuple[str, str], Chunk] = {}
        try:
            for part, there in self._pairs:
                yield from self._chunks_of(part, there, batches)
            while batches:
                yield batches.popitem()[1]
        finally:
            for chunk in batches.values():
                self._engine.drop(chunk)

    def _chunks_of(
        self, part: Part, there: Range, batches: dict[tuple[str, str], Chunk]
    ) -> Iterator[Chunk]:
        here = "cpu" if part.tensor is None else str(part.tensor.device)
        bounced = part.nbytes <= BOUNCE_NBYTES and here == "cpu"
        local_id = 0 if bounced else self._register(part, here)
        kinds = (here, there.device)
        if not part.contiguous:
            yield from self._strided(part, there, kinds, local_id, bounced=bounced)
            return
        for start in range(0, part.nbytes, CHUNK_NBYTES):
            nbytes = min(CHUNK_NBYTES, part.nbytes - start)
            chunk = batches.get(kinds)
            if chunk is None:
                chunk = batches[kinds] = Chunk(*kinds)
            elif (
                chunk.nbytes + nbytes > CHUNK_NBYTES
                or len(chunk.local) == _CHUNK_ROWS
                or (bounced and chunk.filled + nbytes > SLAB_NBYTES)
            ):
                yield batches.pop(kinds)
                chunk = batches[kinds] = Chunk(*kinds)
            target = part.target + start
            if bounced:
                target, local_id = self._engine.bounce(chunk, target, nbytes)
            chunk.local.append((target, nbytes, local_id))
            chunk.remote.append((part.address + start, nbytes, there.device_id))
            chunk.nbytes += nbytes

    def _strided(
        self, part: Part, there: Range, kinds: tuple[str, str], local_id: int, *, bounced: bool
    ) -> Iterator[Chunk]:
        run, offsets = part.runs()
        offsets = offsets + part.address
        step = min(run, CHUNK_NBYTES)
        rows = max(1, min(_CHUNK_ROWS, CHUNK_NBYTES // run))
        for first in range(0, len(offsets), rows):
            some = offsets[first : first + rows]
            for start in range(0, run, step):  # several only where a run is a chunk or more
                nbytes = min(step, run - start)
                chunk = Chunk(*kinds, nbytes=nbytes * len(some))
                target = part.target + first * run + start
                if bounced:
                    target, local_id = self._engine.bounce(chunk, target, len(some) * run)
                chunk.local = np.empty((len(some), 3), dtype=np.uint64)
                chunk.local[:, 0] = np.arange(len(some), dtype=np.uint64) * run + target
                chunk.remote = np.empty((len(some), 3), dtype=np.uint64)
                chunk.remote[:, 0] = some + start
                chunk.local[:, 1] = chunk.remote[:, 1] = nbytes
                chunk.local[:, 2] = local_id
                chunk.remote[:, 2] = there.device_id
                yield chunk

    def _register(self, part: Part, here: str) -> int:
        registered = register_target(self._engine.memory, part)
        self._registered.append(registered)
        return device_id(here, registered.number)


def register_target(memory: Registrations[Any], part: Part) -> Registration[Any]:
    """The registered memory that a part goes to; without its tensor, for this read only."""
    if part.tensor is not None:
        return memory.acquire(region_of(part.tensor))
    return memory.acquire(Region(part.target, part.nbytes, "cpu", lambda: False))


def unpacked(body: bytes) -> Any:  # noqa: ANN401
    """What msgpack made of a message of ours.

    Raises:
        ProtocolViolationError: It did not.
    """
    try:
        return msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as exc:
        raise ProtocolViolationError("not a message of NIXL's transport") from exc


def unavailable(reason: str) -> UnavailableError:
    """The error that says why NIXL cannot be used."""
    return UnavailableError(f"nixl: {reason}", reason=reason, transport="nixl")
