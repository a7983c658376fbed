"""One-sided reads over RDMA and of device memory, by NIXL (``pip install aiordt[nixl]``).

An agent has no progress thread: that would spin a core in every process. Without an RDMA
device it is set up so that even the first contact needs nothing of the owner, and so that it
listens on no port; with one, the owner progresses its agent while a peer wires up.

Invariants:
    NIX-1  A link exists only if a random token was read from the owner's memory, at last while
           the owner did nothing for it: what would work only with its help (TCP) is refused.
    NIX-2  All calls of an agent are made under its one lock; an event loop makes one only if
           the lock is free and the read takes microseconds (BLK-1).
    NIX-3  Only ranges are read that the owner named on the authenticated connection, for that
           very export or one in the same shared segment; each registration has a number of its
           own there, so that what is known of memory that died never answers for memory that
           came after it.
    NIX-4  What is known of a peer is dropped only while no read uses it.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgpack
from typing_extensions import override

from aiordt._errors import (
    AiordtError,
    ClosedError,
    OwnerDiedError,
    ProtocolViolationError,
    TensorFreedError,
    TransferError,
    UnavailableError,
)
from aiordt._progress import finish, post, track
from aiordt._registration import Registration, region_of
from aiordt._types import MIB
from aiordt._wire import TransportMessage
from aiordt.abc import Availability, Link, Transport
from aiordt.transports._nixl_agent import Chunk, Engine, device_id, has_rdma
from aiordt.transports._nixl_read import (
    BOUNCE_NBYTES,
    WIRING_SECONDS,
    Read,
    Remote,
    register_target,
    unavailable,
    unpacked,
)
from aiordt.transports.cma import CmaTransport, host_id

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from aiordt._wire import Message
    from aiordt.abc import Context, Part, Peer
    from aiordt.transports._nixl_agent import Range
    from aiordt.transports.cma import CmaLink

#: Up to here a read on the caller's own thread costs about as much as a thread hop.
INLINE_NBYTES: Final = 1 * MIB
#: How long a loop polls for a small read that a network card does.
_INLINE_SECONDS: Final = 100e-6
_SWEEP_SECONDS: Final = 5.0


class NixlLink(Link):
    """Reads one process's memory. Made by `NixlTransport.connect`."""

    def __init__(
        self, remote: Remote, watch: CmaLink | None, transport: NixlTransport, engine: Engine
    ) -> None:
        self.nowait_nbytes = BOUNCE_NBYTES if engine.rdma else INLINE_NBYTES
        self.death_fd = None if watch is None else watch.death_fd
        self._remote = remote
        self._watch = watch
        self._transport = transport
        self._engine = engine
        self._io = transport.io
        self._jobs: set[Read] = set()
        self._entering: set[asyncio.Task[Any]] = set()
        self._closed = False
        transport.links.add(self)

    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        self._check_open()
        nbytes = 0
        for part in parts:
            if not part.contiguous or not (part.tensor is None or part.tensor.is_cpu):
                return False
            nbytes += part.nbytes
        if nbytes > (self.nowait_nbytes if len(parts) == 1 else BOUNCE_NBYTES) or len(parts) > 16:
            return False
        if nbytes:
            parts = [part for part in parts if part.nbytes]
            ranges = self._remote.try_enter(parts)
            if ranges is None:
                return False
            try:
                for part, there in zip(parts, ranges, strict=True):
                    if there.device != "cpu" or not _inside(part, there):
                        return False
                if not self._engine.lock.acquire(blocking=False):  # NIX-2
                    return False
                try:
                    if not self._read_now(parts, ranges):
                        return False
                finally:
                    self._engine.lock.release()
            finally:
                self._remote.leave()
        self._check_alive()
        return True

    def _read_now(self, parts: Sequence[Part], ranges: Sequence[Range]) -> bool:
        engine = self._engine
        chunk = Chunk()
        registered = None
        if parts[0].nbytes > BOUNCE_NBYTES:
            registered = register_target(engine.memory, parts[0])
        try:
            for part, there in zip(parts, ranges, strict=True):
                if registered is None:
                    target, local_id = engine.bounce(chunk, part.target, part.nbytes)
                else:
                    target, local_id = part.target, device_id("cpu", registered.number)
                chunk.local.append((target, part.nbytes, local_id))
                chunk.remote.append((part.address, part.nbytes, there.device_id))
            done = engine.agent.post(chunk, self._remote.name)
            if not done:
                deadline = time.monotonic() + _INLINE_SECONDS
                # Without a network card the call copies; it must not be left half done.
                while not done and (registered is not None or time.monotonic() < deadline):
                    done = engine.agent.poll(chunk)
            if done:
                engine.land(chunk)
            else:
                engine.abandon(chunk)
        except Exception:  # noqa: BLE001  (`read` finds out, and says what it was)
            engine.drop(chunk)
            self._remote.broken = True
            return False
        finally:
            if registered is not None:
                engine.memory.release(registered)
        return done

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self._check_open()
        parts = [part for part in parts if part.nbytes]
        if parts:
            ranges = self._remote.try_enter(parts)
            if ranges is None:
                await self._io.run(self._enter(parts))
            else:
                await self._transfer(parts, ranges)
        self._check_alive()
        self._check_open()

    async def _enter(self, parts: Sequence[Part]) -> None:
        """Read what is not known yet. On the io loop to its end: see `_transfer`."""
        track(self._entering)
        self._check_open()
        try:
            ranges = await self._remote.enter(parts)
        except AiordtError:
            raise
        except Exception as exc:
            raise await self._verdict(exc, parts) from exc
        await self._transfer(parts, ranges)

    async def _transfer(self, parts: Sequence[Part], ranges: Sequence[Range]) -> None:
        """Read, and leave.

        From entering to leaving nothing needs the caller's loop, which may stand still until this
        link is closed, and that waits until all have left.
        """
        job = Read(self._engine, self._remote, parts, ranges)
        self._jobs.add(job)
        try:
            try:
                self._check_open()
                for part, there in zip(parts, ranges, strict=True):
                    if not _inside(part, there):
                        raise TransferError(
                            f"nixl: {part.nbytes} bytes of {self._name} are outside of what it "
                            "exports",
                            transport="nixl",
                            peer=self._name,
                            nbytes=sum(part.nbytes for part in parts),
                        )
                reading = job.start()
            except BaseException:
                self._remote.leave()
                raise
            await finish(reading, job.stop)
        except AiordtError:
            raise
        except Exception as exc:
            raise await self._verdict(exc, parts) from exc
        finally:
            self._jobs.discard(job)

    async def _verdict(self, exc: Exception, parts: Sequence[Part]) -> Exception:
        """The error to raise for one of NIXL's."""
        self._remote.broken = True  # UCX does not use an endpoint again that has failed
        self._check_alive()
        nbytes = sum(part.nbytes for part in parts)
        return await self._io.run(self._remote.peer.verdict(exc, transport="nixl", nbytes=nbytes))

    @property
    def _name(self) -> str:
        return str(self._remote.peer.address)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the link to {self._name} was closed")

    def _check_alive(self) -> None:
        if self._watch is not None and not self._watch.alive:
            raise OwnerDiedError(f"{self._name} died, and its tensors with it", owner=self._name)

    @override
    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        for job in list(self._jobs):
            job.stop()
        post(self._io.loop, self._close)

    def _close(self) -> None:
        for task in list(self._entering):
            task.cancel()  # its `Io.run` raises ClosedError (CLS-2)
        self._transport.dropped(self._remote)

    def __del__(self) -> None:
        if not self._closed:
            post(self._io.loop, self._transport.dropped, self._remote)


def _inside(part: Part, there: Range) -> bool:
    """Whether all that a part reads is in a range (NIX-3)."""
    nbytes = part.nbytes if part.cut is None else part.cut.span
    return there.address <= part.address and part.address + nbytes <= there.address + there.nbytes


class NixlTransport(Transport):
    """Both ends. The agent is made in the background, from the first use on."""

    name: ClassVar[str] = "nixl"

    @override
    def __init__(self, context: Context) -> None:
        self.io = context.io
        self._context = context
        self._source = context.source
        self._engine = Engine(rdma=has_rdma())
        self.links: weakref.WeakSet[NixlLink] = weakref.WeakSet()
        self._closed = False
        self._remotes: dict[bytes, Remote] = {}
        self._wiring: dict[bytes, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._progressing = False
        self._watcher = CmaTransport(context)
        self._starting = self._engine.workers.run(self._engine.start)
        self._starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._timer = self.io.loop.call_later(_SWEEP_SECONDS, self._sweep)

    @classmethod
    @override
    def probe(cls) -> Availability:
        if has_rdma():
            return Availability(usable=True)
        reason = "there is no RDMA device here, so it is used only on demand"
        return Availability(usable=True, on_demand=True, reason=reason)

    @property
    @override
    def registered(self) -> tuple[int, int]:
        return self._engine.memory.count, self._engine.memory.nbytes

    async def _started(self) -> None:
        try:
            await asyncio.shield(self._starting)  # shared: see Transports.get
        except AiordtError:
            raise
        except Exception as exc:
            raise unavailable(f"NIXL's agent cannot be made: {exc!r}") from exc

    @override
    async def connect(self, peer: Peer) -> NixlLink:
        if only_tcp():
            raise unavailable("UCX_TLS leaves it TCP only, where reads need the owner's help")
        if not self._engine.rdma and peer.address.host_id != host_id():
            raise unavailable(
                "the owner is on another host, there is no RDMA device here, and "
                "over TCP its reads would need the owner's help"
            )
        return await self.io.run(self._connect(peer))

    async def _connect(self, peer: Peer) -> NixlLink:
        await self._started()
        watch = None
        try:
            watch = await self._watcher.connect(peer)
        except UnavailableError as exc:  # on another host, or in another container
            if not self._engine.rdma:  # then it has no other way, nor would it see a death
                raise unavailable(
                    f"there is no RDMA device here, and without one it reads as cma does: "
                    f"{exc.reason}"
                ) from exc
        remote = self._remotes.get(peer.address.runtime_id)
        if remote is None:
            remote = Remote(peer, self._engine, self.io)
            self._remotes[peer.address.runtime_id] = remote
        remote.links += 1
        try:
            await remote.wire()
        except BaseException:
            self.dropped(remote)
            raise
        return NixlLink(remote, watch, self, self._engine)

    def dropped(self, remote: Remote) -> None:
        """A link is gone. On the io loop."""
        if self._closed:  # then all are let go
            return
        remote.links -= 1
        if not remote.links:
            self._begin(self._let_go(remote))

    async def _let_go(self, remote: Remote) -> None:
        with suppress(AiordtError):
            if await remote.aclose():
                self._remotes.pop(remote.peer.address.runtime_id, None)

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = self.io.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the owner's end -------------------------------------------------------------------

    @override
    async def serve(self, request: Message, peer_id: bytes) -> Message | None:
        if not isinstance(request, TransportMessage) or request.transport != self.name:
            return None
        await self._started()
        try:
            what, arguments = unpacked(request.body)
            if what == "hello":
                reply = await self._hello(peer_id)
            elif what == "wired":
                reply = await self._wired(peer_id)
            elif what == "help":
                self._help(peer_id)
                reply = []
            elif what == "ranges":
                reply = await self._ranges([(bytes(key), int(index)) for key, index in arguments])
            else:
                raise ProtocolViolationError("an unknown request to NIXL's transport")
        except (TypeError, ValueError) as exc:
            raise ProtocolViolationError("a malformed request to NIXL's transport") from exc
        body: bytes = msgpack.packb(reply)
        return TransportMessage(self.name, body)

    async def _hello(self, peer_id: bytes) -> list[object]:
        engine = self._engine
        if engine.rdma:
            self._help(peer_id)

        def describe() -> list[object]:
            return [
                engine.agent.name,
                engine.agent.connection(),
                engine.agent.metadata([engine.known]),
                engine.token.data_ptr(),
                device_id("cpu", engine.known.number),
                bytes(engine.token.tolist()),
            ]

        return await engine.run(describe)

    def _help(self, peer_id: bytes) -> None:
        """Make progress for a peer until it says that it is wired up, or is gone."""
        self._wiring[peer_id] = self.io.loop.time() + 2 * WIRING_SECONDS
        if not self._progressing:
            self._progressing = True
            self._begin(self._make_progress())

    async def _wired(self, peer_id: bytes) -> list[object]:
        self._wiring.pop(peer_id, None)
        await self._engine.run(self._engine.agent.progress)  # take what came in meanwhile
        return []

    async def _make_progress(self) -> None:
        """Answer those that wire up; only while there are some."""
        while self._wiring:
            now = self.io.loop.time()
            for peer_id in [each for each, end in self._wiring.items() if end < now]:
                del self._wiring[peer_id]
            await self._engine.run(self._engine.agent.progress)
            await asyncio.sleep(0.001)
        self._progressing = False

    async def _ranges(self, items: Sequence[tuple[bytes, int]]) -> list[object]:
        tensors = [self._source.exported(key, index) for key, index in items]
        memory = self._engine.memory

        def describe() -> list[object]:
            found: dict[int, Registration[Any]] = {}
            rows = []
            for item, tensor in zip(items, tensors, strict=True):
                with self._engine.lock:  # not for all of them: a network card takes its time
                    registered = memory.acquire(region_of(tensor))
                    memory.hold(item, [registered])
                    memory.release(registered)
                found[registered.number] = registered
                rows.append(
                    (
                        registered.address,
                        registered.nbytes,
                        registered.device,
                        device_id(registered.device, registered.number),
                    )
                )
            with self._engine.lock:
                return [self._engine.agent.metadata(list(found.values())), rows]

        return await finish(self._engine.workers.run(describe))

    def _sweep(self) -> None:
        """Let go of what is no longer exported, and of memory that died."""
        self._timer = self.io.loop.call_later(_SWEEP_SECONDS, self._sweep)
        gone: list[tuple[bytes, int]] = []
        for holder in self._engine.memory.holders:
            try:
                self._source.exported(*holder)
            except TensorFreedError:
                gone.append(holder)

        def sweep() -> None:
            with self._engine.lock:
                for holder in gone:
                    self._engine.memory.let_go(holder)
                self._engine.sweep()

        self._engine.workers.submit(sweep)

    @override
    def forget(self, peer_id: bytes) -> None:
        self._wiring.pop(peer_id, None)

    @override
    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._wiring.clear()
        for link in list(self.links):
            await link.aclose()
        for remote in self._remotes.values():
            remote.links = 0
            remote.closed = True
            self._begin(self._let_go(remote))
        if self._tasks:
            await finish(asyncio.ensure_future(asyncio.wait(list(self._tasks))))
        self._engine.workers.submit(self._engine.stop)
        self._engine.workers.close()
        await self._watcher.aclose()


def only_tcp() -> bool:
    """Whether the environment leaves UCX nothing but TCP."""
    named = {name.strip() for name in os.environ.get("UCX_TLS", "").split(",")} - {""}
    return bool(named) and named <= {"tcp", "self"}
