"""The groups that this process is a member of: how they form, and how they end.

A group forms in three steps, each told to all members at once: they *enter* (and are ready for
the others' connections), *meet* (and connect), and *start* the backend that suits them all. Busy
members take part: this is done on the io thread, and on threads of its own.

Invariants:
    FRM-1  A group forms on all of its members or on none: what one of them cannot do is raised
           where the group was asked for, and names that member.
    FRM-2  A process is in at most one group of a name at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import TYPE_CHECKING, Any, Final

import msgpack
import torch
from typing_extensions import override

from aiordt import _runtime
from aiordt._device import layer
from aiordt._errors import (
    AiordtError,
    GroupError,
    ProtocolViolationError,
    UnavailableError,
    UsageError,
)
from aiordt._progress import Workers, finish, post
from aiordt._runtime import Runtime, Service
from aiordt._wire import TransportMessage
from aiordt.collective._direct import DirectMover
from aiordt.collective._engine import Engine
from aiordt.collective._member import MemberGroup
from aiordt.collective._members import NAME, Member
from aiordt.collective._mesh import Mesh
from aiordt.collective._requests import GONE, Requests
from aiordt.collective._steps import Ended
from aiordt.transports.cma import CmaLink
from aiordt.transports.mpi import Way, ways
from aiordt.transports.shm import ShmLink

if TYPE_CHECKING:
    import socket

    from aiordt._memory import Pool
    from aiordt._wire import Message
    from aiordt.collective._call import Mover
    from aiordt.collective._message import Carrier

_log = logging.getLogger(__name__)

#: Groups that may start their backends at once.
_MAX_STARTING: Final = 8
#: Names of groups that have ended, and why.
_MAX_REMEMBERED: Final = 100


class Membership:
    """This process as a member of one group.

    Attributes:
        name: The group's name.
        members: All of them, in rank order.
        rank: Of this process.
        backend: By what payloads move.
        engine: The operations; there once the members have met.
        links: To the memory of the others, where it can be read.
        carrier: Of messages, if the backend has its own.
        movers: By type of device.
        pool: Where memory for results comes from.
        bound_to: The process with which it ends; empty: none.
    """

    def __init__(
        self, group: bytes, name: str, rank: int, members: list[Member], pool: Pool
    ) -> None:
        self.group = group
        self.pool = pool
        self.name = name
        self.rank = rank
        self.members = members
        self.backend = ""
        self.engine: Engine | None = None
        self.links: dict[int, CmaLink] = {}
        self.carrier: Carrier | None = None
        self.movers: dict[str, Mover] = {}
        self.started = False
        self.socks: dict[int, asyncio.Future[socket.socket]] = {}
        self.expiry: asyncio.TimerHandle | None = None
        self.bound_to = b""

    @property
    def ids(self) -> list[bytes]:
        """Of the members' runtimes."""
        return [member.address.runtime_id for member in self.members]

    @property
    def labels(self) -> list[str]:
        """Of the members, for messages."""
        return [member.label for member in self.members]


def _stream_id(group: bytes, low: int, high: int) -> bytes:
    """Names the connection of two members."""
    return hashlib.blake2b(b"%d %d" % (low, high), key=group, digest_size=16).digest()


def _gpu() -> str:
    """Which GPU this process uses by default; empty: none. Blocks: it may wake CUDA."""
    if not torch.cuda.is_available():
        return ""
    device = torch.device("cuda", torch.cuda.current_device())  # pragma: no cover  (needs a GPU)
    return layer(device).identity(device)  # pragma: no cover


class Groups(Service):
    """See above. Made with each runtime."""

    name = NAME

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._workers = Workers("group", _MAX_STARTING)
        self._by_id: dict[bytes, Membership] = {}
        self._by_name: dict[str, Membership] = {}
        self._streams: dict[bytes, tuple[Membership, int]] = {}
        self.requests = Requests(runtime)
        self._over: dict[str, Ended] = {}  # the last ones
        self._trying: dict[bytes, list[bytes]] = {}  # to start MPI; who

    def find(self, name: str) -> Membership:
        """The group of that name. Any thread.

        Raises:
            UsageError: There is none (yet).
            GroupError: There was one, and it has failed.
            ClosedError: There was one, and it was closed.
        """
        found = self._by_name.get(name)
        if found is not None and found.started:
            return found
        over = self._over.get(name)
        if over is not None:
            raise over.error()
        named = [each for each in list(self._by_name.values()) if not each.bound_to]
        names = sorted(each.name for each in named if each.started)
        there = f"its groups: {', '.join(map(repr, names))}" if names else "it is in no group"
        raise UsageError(f"this actor is not in a group {name!r}; {there}")

    # --- on the io loop --------------------------------------------------------------------

    @override
    async def serve(self, request: TransportMessage, peer_id: bytes) -> Message:
        try:
            group, verb, body = msgpack.unpackb(request.body, strict_map_key=False)
        except (ValueError, TypeError) as exc:
            raise ProtocolViolationError("not a request about a group") from exc
        reply = await self.handle(group, verb, body, peer_id)
        return TransportMessage(NAME, msgpack.packb(reply))

    async def handle(self, group: bytes, verb: str, body: Any, peer_id: bytes) -> object:  # noqa: ANN401
        """Do what the creator of a group, or its user, asks for."""
        if verb == "hello":
            return None
        if verb == "enter":
            await self._free(body[0])
            self._enter(group, body, peer_id)
            return None
        if verb == "end":
            self._leave(group, Ended(bool(body[0]), str(body[1])))
            return None
        if verb == "drop":
            self.requests.drop(body)
            return None
        membership = self._by_id.get(group)
        if verb == "collect":
            if membership is None or not membership.started:
                return [GONE]
            return await self.requests.serve(membership, body, peer_id)
        if membership is None:
            raise GroupError("the group has ended here")
        if verb == "meet":
            return await self._meet(membership)
        if verb == "start":
            await self._start(membership, *body)
            return None
        raise ProtocolViolationError(f"unknown request {verb!r} about a group")

    async def _free(self, name: str) -> None:
        """Let go of a group of that name that has ended, though its thread may not know yet."""
        membership = self._by_name.get(name)
        if membership is None or membership.engine is None:
            return
        await membership.engine.catch_up()
        if membership.engine.over is not None:
            self._forget(membership.group)

    def _enter(self, group: bytes, body: Any, peer_id: bytes) -> None:  # noqa: ANN401
        name, rank, packed, timeout, bound = body
        if name in self._by_name:
            raise UsageError(f"it is in a group {name!r} already: close that, or choose a name")
        members = [Member.unpack(each) for each in packed]
        if members[rank].address.runtime_id != self._runtime.address.runtime_id:
            raise GroupError("it was restarted meanwhile")
        membership = Membership(group, name, rank, members, self._runtime.pool)
        membership.bound_to = peer_id if bound else b""
        loop = asyncio.get_running_loop()
        for other in range(len(members)):
            if other != rank:
                membership.socks[other] = loop.create_future()
                stream = _stream_id(group, min(rank, other), max(rank, other))
                self._streams[stream] = (membership, other)
        self._by_id[group] = self._by_name[name] = membership
        self._over.pop(name, None)
        why = f"group {name!r}: it did not form within {timeout} s"
        late = Ended(closed=False, why=why)
        membership.expiry = loop.call_later(timeout, self._leave, group, late)

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        membership, rank = self._streams.get(stream, (None, -1))
        if membership is None or membership.members[rank].address.runtime_id != peer_id:
            return False
        if membership.socks[rank].done():
            return False
        membership.socks[rank].set_result(sock)
        return True

    async def _meet(self, membership: Membership) -> object:
        """Connect to the members of higher rank, and wait for the others to connect."""
        others = [rank for rank in membership.socks if rank > membership.rank]
        links = await asyncio.gather(*(self._reach(membership, rank) for rank in membership.socks))
        reasons = [reason for reason in links if reason]
        await asyncio.gather(*(self._connect(membership, rank) for rank in others))
        socks = {rank: await future for rank, future in membership.socks.items()}
        if self._by_id.get(membership.group) is not membership:
            raise GroupError("the group has ended here")
        mesh = Mesh(socks, f"aiordt-group-{membership.name}")
        membership.socks = {}
        group = membership.group
        membership.engine = Engine(
            membership.name,
            membership.labels,
            membership.rank,
            mesh,
            lambda: post(self._runtime.io.loop, self._forget, group),
        )
        return [reasons[0] if reasons else "", await self._workers.run(_gpu)]

    async def _reach(self, membership: Membership, rank: int) -> str:
        """Find out whether a member's memory can be read; why not, if not."""
        member = membership.members[rank]
        try:
            _, link = await self._runtime.routes.find(member.address, member.owner, "cma")
        except UnavailableError as exc:
            return f"rank {membership.rank} cannot read the memory of rank {rank}: {exc.reason}"
        if isinstance(link, CmaLink):
            membership.links[rank] = link
        return ""

    async def _share(self, membership: Membership, rank: int) -> ShmLink:
        """The link to a member's shared memory.

        Raises:
            UnavailableError: There is none.
        """
        member = membership.members[rank]
        _, link = await self._runtime.routes.find(member.address, member.owner, "shm")
        assert isinstance(link, ShmLink)  # noqa: S101  (it was asked for)
        return link

    async def _connect(self, membership: Membership, rank: int) -> None:
        address = membership.members[rank].address
        peer = self._runtime.routes.peer(address)
        stream = _stream_id(membership.group, membership.rank, rank)
        sock = None
        if address.host_id == self._runtime.address.host_id:
            try:
                sock = await peer.open_local(stream)  # twice as quick
            except (AiordtError, OSError):
                _log.debug("no local socket of %s here", address)  # another network namespace
        if sock is None:
            sock = await peer.open_stream(stream)
        future = membership.socks.get(rank)
        if future is None or future.done():
            sock.close()
            raise GroupError("the group has ended here")
        future.set_result(sock)

    async def _start(self, membership: Membership, backend: str, *rest: Any) -> None:  # noqa: ANN401
        cuda, seconds = rest
        engine = membership.engine
        if engine is None:
            raise ProtocolViolationError("a group that has not met cannot start")
        membership.backend = backend
        if backend == "mpi":
            self._trying[membership.group] = membership.ids
        host, io = self._runtime.address.host, self._runtime.io

        def connect() -> None:
            # Not earlier: importing it takes a while, and others need neither of them.
            if backend == "gloo":
                from aiordt.collective.process_group import GlooMover  # noqa: PLC0415

                membership.movers["cpu"] = GlooMover(engine, host, seconds)
            if backend == "mpi":
                from aiordt.collective.mpi import MpiMover  # noqa: PLC0415

                mover = MpiMover(engine, seconds)
                membership.movers["cpu"] = membership.carrier = mover
                ranks = {member: rank for rank, member in enumerate(membership.ids)}
                ways.add(Way(membership.group, ranks, mover))
                engine.on_end(lambda: ways.remove(membership.group))
            if cuda:  # pragma: no cover  (needs GPUs)
                from aiordt.collective.process_group import NcclMover  # noqa: PLC0415

                membership.movers["cuda"] = NcclMover(engine, seconds)

        if backend == "shm":
            membership.movers["cpu"] = DirectMover(
                engine, membership.links, lambda rank: self._share(membership, rank), io
            )
        if backend in {"gloo", "mpi"} or cuda:
            cancelled = Ended(closed=False, why=engine.said("starting it was cancelled"))
            await finish(self._workers.run(connect), lambda: engine.end(cancelled))
        membership.started = True
        self._trying.pop(membership.group, None)
        if membership.expiry is not None:
            membership.expiry.cancel()

    def _leave(self, group: bytes, ended: Ended) -> None:
        """End a group here, formed or not."""
        ways.refuse(self._trying.pop(group, ()), ended.why)
        membership = self._by_id.get(group)
        if membership is None:
            return
        if membership.engine is not None:
            membership.engine.end(ended)
        self._forget(group)

    def _forget(self, group: bytes) -> None:
        membership = self._by_id.pop(group, None)
        if membership is None:
            return
        if self._by_name.get(membership.name) is membership:
            del self._by_name[membership.name]
            if membership.started and membership.engine is not None and membership.engine.over:
                self._over[membership.name] = membership.engine.over
                while len(self._over) > _MAX_REMEMBERED:
                    del self._over[next(iter(self._over))]
        if membership.expiry is not None:
            membership.expiry.cancel()
        for other in range(len(membership.members)):
            low, high = sorted((membership.rank, other))
            self._streams.pop(_stream_id(group, low, high), None)
        for future in membership.socks.values():
            if future.done() and not future.cancelled():
                future.result().close()
            future.cancel()

    @override
    def lost(self, peer_id: bytes) -> None:
        self.requests.forget(peer_id)
        for group, membership in list(self._by_id.items()):
            if membership.bound_to == peer_id:
                why = f"group {membership.name!r}: the process that made it is gone"
                self._leave(group, Ended(False, why))  # noqa: FBT003

    @override
    async def aclose(self) -> None:
        for group in list(self._by_id):
            name = self._by_id[group].name
            self._leave(group, Ended(True, f"group {name!r}: aiordt's runtime was closed"))  # noqa: FBT003
        self._workers.close()


def groups_of(runtime: Runtime) -> Groups:
    """The groups of a runtime."""
    return next(each for each in runtime.services if isinstance(each, Groups))


def group_here(name: str) -> MemberGroup:
    """The group of that name that this process is a member of; never waits.

    Raises:
        UsageError: There is none.
    """
    return MemberGroup(groups_of(_runtime.current()).find(name))


_runtime.add_service(Groups)
