"""MPI, two-sided, between members of a group that moves its payloads by MPI.

A consumer asks over the control connection for pieces of what it reads, a few at a time, each
with a tag of its own. The owner gives each to MPI as one message, and replies; then the consumer
receives it: both attend to MPI at the same time. Up to `REPLY_NBYTES` come in the reply.

MPI can neither take back what it sends, nor recall what it has begun to receive. So it is never
given a user's memory: both ends copy each piece from or to a buffer of theirs, and a cancelled
read leaves its buffers to MPI. Nothing but the pieces that were asked for is on its way then.

The requests are authenticated; the messages of MPI are not, nor are they encrypted.

Invariants:
    MPT-1  A tag is used for one message at a time. One that may have been sent is received,
           whether anybody wants it or not, or its group ends.
    MPT-2  A buffer is used again only when MPI has moved all of it.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Protocol

import msgpack
import numpy as np
import torch
from typing_extensions import override

from aiordt._errors import (
    AiordtError,
    ClosedError,
    GroupError,
    OwnerDiedError,
    PeerLostError,
    ProtocolViolationError,
    TransferError,
    UnavailableError,
)
from aiordt._memory import view_memory
from aiordt._metrics import phase
from aiordt._progress import post, run_all, settle, track
from aiordt._types import DTYPES, KIB, MIB
from aiordt._wire import pack_items, unpack_items
from aiordt.abc import Availability, Cut, Link, Transport, TransportMessage

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from typing import Any

    from aiordt._wire import Item, Message
    from aiordt.abc import Context, Part, Peer

#: Up to here the payload is in the reply: one round trip.
REPLY_NBYTES: Final = 64 * KIB
#: One message: the processor's cache still has it when it is copied once more.
PIECE_NBYTES: Final = 1 * MIB
#: Items of a message.
_MAX_ITEMS: Final = 512
#: Pieces that one read, and all reads of one peer, have on their way.
_READ_PIECES: Final = 4
_LINK_PIECES: Final = 8
#: Buffers that are kept for the next ones.
_MAX_BUFFERS: Final = 16
#: MPI has these at least, from 1 on.
_MAX_TAG: Final = 32767
_NO_GROUP: Final = (
    "this process is in no group by MPI with the tensor's owner: make one of both by "
    'aiordt.create_group(..., backend="mpi")'
)


class Carrier(Protocol):
    """A group by MPI, as pulls see it. Any thread; its methods never wait."""

    def carry(
        self,
        memory: torch.Tensor,
        other: int,
        tag: int,
        done: Callable[[Exception | None], None],
        *,
        sending: bool,
    ) -> None:
        """Send a message to a member, or receive one from it.

        Args:
            memory: Bytes; kept until MPI has let go of them.
            other: The member.
            tag: From 1 on.
            done: Called once, on some thread: without an error if all bytes were moved; else the
                group has ended, or is about to.
            sending: Whether to send.
        """


@dataclass(slots=True, eq=False)
class Way:
    """A group by MPI that this process is in.

    Attributes:
        group: Its id, known to all members.
        ranks: Of the members, by their runtime ids.
        carrier: What moves bytes in it.
    """

    group: bytes
    ranks: dict[bytes, int]
    carrier: Carrier
    _used: set[int] = field(default_factory=set)
    _next: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(1, _MAX_TAG + 1)))

    def take_tag(self) -> int:
        """A tag that no message to this process has (MPT-1). On the io loop.

        Raises:
            GroupError: There is none.
        """
        tag = next((each for each in itertools.islice(self._next, _MAX_TAG) if self._free(each)), 0)
        if not tag:
            raise GroupError("this group has no tags left for messages by MPI: make a new one")
        self._used.add(tag)
        return tag

    def _free(self, tag: int) -> bool:
        return tag not in self._used

    def give_tag(self, tag: int) -> None:
        """No message with that tag will come any more."""
        self._used.discard(tag)


class Ways:
    """The groups by MPI that this process is in. Any thread."""

    def __init__(self) -> None:
        self._ways: dict[bytes, Way] = {}
        self._refused: dict[bytes, str] = {}

    def add(self, way: Way) -> None:
        """A group has formed."""
        self._ways[way.group] = way
        for member in way.ranks:
            self._refused.pop(member, None)

    def remove(self, group: bytes) -> None:
        """A group has ended."""
        self._ways.pop(group, None)

    def refuse(self, members: Sequence[bytes], reason: str) -> None:
        """A group of these could not be made."""
        self._refused.update(dict.fromkeys(members, reason))

    def forget(self, member: bytes) -> None:
        """A process is gone."""
        self._refused.pop(member, None)

    def to(self, member: bytes) -> Way | None:
        """The newest group that another process is in, too."""
        ways = reversed(list(self._ways.values()))
        return next((way for way in ways if member in way.ranks), None)

    def named(self, group: bytes, member: bytes) -> Way:
        """A group that another process says both are in.

        Raises:
            GroupError: They are not (any more).
        """
        way = self._ways.get(group)
        if way is None or member not in way.ranks:
            raise GroupError("the owner is not in that group by MPI any more")
        return way

    def obstacle(self, member: bytes) -> str:
        """Why there is no way to another process; empty if there is one."""
        if self.to(member) is not None:
            return ""
        refused = self._refused.get(member)
        return _NO_GROUP if refused is None else f"{_NO_GROUP} (the last one failed: {refused})"


#: Of this process.
ways: Final = Ways()


class _Piece(NamedTuple):
    """Some of a read.

    Attributes:
        items: What to ask the owner for.
        targets: Where the bytes go, in that order.
        nbytes: How many.
    """

    items: list[Item]
    targets: list[memoryview]
    nbytes: int


def pieces(parts: Sequence[Part], limit: int = PIECE_NBYTES) -> Iterator[_Piece]:
    """What to read, in pieces of at most ``limit`` bytes."""
    items: list[Item] = []
    targets: list[memoryview] = []
    total = 0
    for part in parts:
        target = part.target
        for cut, nbytes in _cuts(part, limit):
            if items and (total + nbytes > limit or len(items) == _MAX_ITEMS):
                yield _Piece(items, targets, total)
                items, targets, total = [], [], 0
            items.append((part.key, part.index, cut))
            targets.append(view_memory(target, nbytes, writable=True))
            target += nbytes
            total += nbytes
    if items:
        yield _Piece(items, targets, total)


def _cuts(part: Part, limit: int) -> Iterator[tuple[Cut | None, int]]:
    """Cuts of one part of a read, in the order of its bytes, and the bytes of each."""
    cut = part.cut
    if part.nbytes <= limit:
        yield cut, part.nbytes
    elif cut is None or (cut.contiguous and cut.dtype is None):
        for start in range(0, part.nbytes, limit):
            nbytes = min(limit, part.nbytes - start)
            yield Cut((cut.offset if cut else 0) + start, (nbytes,), (1,), 1), nbytes
    else:
        dtype = None if cut.dtype is None or cut.dtype >= len(DTYPES) else DTYPES[cut.dtype]
        yield from _slices(cut, cut.itemsize if dtype is None else dtype.itemsize, limit)


def _slices(cut: Cut, itemsize: int, limit: int) -> Iterator[tuple[Cut, int]]:
    """Slices of a cut of more than one element, whose elements have ``itemsize`` bytes here."""
    axis = next(axis for axis, size in enumerate(cut.shape) if size > 1)
    count = cut.shape[axis]
    row_nbytes = itemsize
    for size in cut.shape[axis + 1 :]:
        row_nbytes *= size
    step = max(1, limit // row_nbytes)
    for start in range(0, count, step):
        some = min(step, count - start)
        slice_ = Cut(
            cut.offset + start * cut.stride[axis] * cut.itemsize,
            (*cut.shape[:axis], some, *cut.shape[axis + 1 :]),
            cut.stride,
            cut.itemsize,
            cut.dtype,
        )
        nbytes = some * row_nbytes
        if nbytes > limit and nbytes > itemsize:
            yield from _slices(slice_, itemsize, limit)
        else:
            yield slice_, nbytes


def _copy(source: memoryview, target: memoryview) -> None:
    """Copy bytes; without the GIL, if they are many."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def _request(*values: object) -> bytes:
    body: bytes = msgpack.packb(values)
    return body


def _fields(body: bytes) -> tuple[bytes, int, bytes, int]:
    """Of a request: the group, the tag (0: in the reply), the items, and their bytes."""
    try:
        group, tag, items, nbytes, *_ = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.UnpackException) as exc:
        raise ProtocolViolationError("not a request of mpi") from exc
    values = (group, tag, items, nbytes)
    if tuple(map(type, values)) != (bytes, int, bytes, int) or not 0 <= tag <= _MAX_TAG:
        raise ProtocolViolationError("not a request of mpi")
    if not 0 <= nbytes <= (PIECE_NBYTES if tag else REPLY_NBYTES):
        raise ProtocolViolationError("that is too large for a message of mpi")
    return values


class MpiLink(Link):
    """Reads from one peer. Made by `MpiTransport.connect`."""

    packs: ClassVar[bool] = True

    def __init__(self, transport: MpiTransport, peer: Peer) -> None:
        self._transport = transport
        self._peer = peer
        self._io = transport.io
        self._room = asyncio.Semaphore(_LINK_PIECES)
        self._reads: set[asyncio.Task[object]] = set()
        self._closed = False

    @property
    @override
    def obstacle(self) -> str:
        return ways.obstacle(self._peer.address.runtime_id)

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self._check_open()
        if parts:
            await self._io.run(self._read(parts))

    async def _read(self, parts: Sequence[Part]) -> None:
        track(self._reads)
        self._check_open()
        way = ways.to(self._peer.address.runtime_id)
        if way is None:
            await self._peer.reach()  # one that is gone is in no group, either
            reason = self.obstacle or _NO_GROUP
            raise UnavailableError(f"mpi: {reason}", reason=reason, transport="mpi")
        nbytes = sum(part.nbytes for part in parts)
        try:
            if nbytes <= REPLY_NBYTES:
                await self._read_reply(way, parts, nbytes)
            else:
                coming = pieces(parts)
                await run_all([self._read_pieces(way, coming) for _ in range(_READ_PIECES)])
        except (GroupError, ProtocolViolationError) as exc:
            self._check_open()
            raise await self._peer.verdict(exc, transport="mpi", nbytes=nbytes) from exc

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the link to {self._peer.address} was closed")

    async def _ask(self, way: Way, tag: int, items: list[Item], nbytes: int) -> bytes:
        body = _request(way.group, tag, pack_items(items), nbytes)
        reply = await self._peer.call(TransportMessage(self._transport.name, body))
        if not isinstance(reply, TransportMessage):
            raise ProtocolViolationError("not a reply of mpi")
        return reply.body

    async def _read_reply(self, way: Way, parts: Sequence[Part], nbytes: int) -> None:
        payload = await self._ask(way, 0, [part.item for part in parts], nbytes)
        if len(payload) != nbytes:
            raise ProtocolViolationError("the owner sent another number of bytes than was asked")
        position = 0
        for part in parts:
            view = view_memory(part.target, part.nbytes, writable=True)
            view[:] = payload[position : position + len(view)]
            position += len(view)

    async def _read_pieces(self, way: Way, coming: Iterator[_Piece]) -> None:
        for piece in coming:
            # On its own: a cancelled read must not wait for MPI (OWN-1).
            bringing = self._transport.spawn(self._bring(way, piece.items, piece.nbytes))
            buffer = await asyncio.shield(bringing)
            memory = view_memory(buffer.data_ptr(), piece.nbytes)
            position = 0
            for target in piece.targets:
                _copy(memory[position : position + len(target)], target)
                position += len(target)
            self._transport.give_buffer(buffer)

    async def _bring(self, way: Way, items: list[Item], nbytes: int) -> torch.Tensor:
        """Receive a piece into a buffer of ours."""
        async with self._room:
            buffer, tag = self._transport.take_buffer(), way.take_tag()
            memory, rank = buffer[:nbytes], way.ranks[self._peer.address.runtime_id]
            lost: AiordtError | None = None
            try:
                phase("mpi.asking")
                await self._ask(way, tag, items, nbytes)
            except (OwnerDiedError, PeerLostError, TransferError) as exc:
                lost = exc  # MPT-1
            except AiordtError:  # so it sends nothing
                way.give_tag(tag)
                raise
            phase("mpi.receiving")
            receiving = self._transport.carry(way, memory, rank, tag, sending=False)
            if lost is not None:
                raise lost
            error = await receiving
            if error is not None:
                raise error
            way.give_tag(tag)
            return buffer

    @override
    async def aclose(self) -> None:
        self._closed = True
        post(self._io.loop, self._close)

    def _close(self) -> None:
        for task in list(self._reads):
            task.cancel()  # its `Io.run` raises ClosedError (CLS-2)


def _seen(future: asyncio.Future[Any]) -> None:
    """Its error is nobody's, if nobody waits any more."""
    if not future.cancelled():
        future.exception()


class MpiTransport(Transport):
    """Both ends."""

    name: ClassVar[str] = "mpi"

    @override
    def __init__(self, context: Context) -> None:
        self.io = context.io
        self._source = context.source
        self._buffers: list[torch.Tensor] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    @override
    def probe(cls) -> Availability:
        reason = 'used on demand (transport="mpi"), between members of a group by MPI'
        return Availability(usable=True, on_demand=True, reason=reason)

    # --- for both ends, on the io loop -----------------------------------------------------------

    def take_buffer(self) -> torch.Tensor:
        """Memory for a piece."""
        if self._buffers:
            return self._buffers.pop()
        return torch.empty(PIECE_NBYTES, dtype=torch.uint8)

    def give_buffer(self, buffer: torch.Tensor) -> None:
        """MPI has moved all of it (MPT-2)."""
        if len(self._buffers) < _MAX_BUFFERS:
            self._buffers.append(buffer)

    def carry(
        self, way: Way, memory: torch.Tensor, rank: int, tag: int, *, sending: bool
    ) -> asyncio.Future[Exception | None]:
        """Send or receive a message; gives the error once that has ended."""
        moved: asyncio.Future[Exception | None] = self.io.loop.create_future()
        way.carrier.carry(
            memory,
            rank,
            tag,
            lambda error: post(self.io.loop, settle, moved, error, None),
            sending=sending,
        )
        return moved

    def spawn(self, coroutine: Coroutine[Any, Any, torch.Tensor]) -> asyncio.Task[torch.Tensor]:
        """Start ``coroutine``, whose end nobody may wait for."""
        task = self.io.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_seen)
        return task

    # --- the consumer's end ----------------------------------------------------------------------

    @override
    async def connect(self, peer: Peer) -> MpiLink:
        return MpiLink(self, peer)  # groups come and go: see `MpiLink.obstacle`

    # --- the owner's end -------------------------------------------------------------------------

    @override
    async def serve(self, request: Message, peer_id: bytes) -> Message | None:
        if not isinstance(request, TransportMessage):
            return None
        group, tag, items, nbytes = _fields(request.body)
        way = ways.named(group, peer_id)
        async with self._source.open(unpack_items(items), nbytes) as served:
            if not tag:
                return TransportMessage(self.name, b"".join(served.views))
            buffer = self.take_buffer()
            target = view_memory(buffer.data_ptr(), nbytes, writable=True)
            position = 0
            for view in served.views:
                _copy(view, target[position : position + len(view)])
                position += len(view)
        phase("mpi.sending")
        sending = self.carry(way, buffer[:nbytes], way.ranks[peer_id], tag, sending=True)
        sending.add_done_callback(lambda sent: self._sent(buffer, sent))
        return TransportMessage(self.name, b"")

    def _sent(self, buffer: torch.Tensor, sent: asyncio.Future[Exception | None]) -> None:
        if not sent.cancelled() and sent.result() is None:
            self.give_buffer(buffer)

    @override
    def forget(self, peer_id: bytes) -> None:
        ways.forget(peer_id)

    @override
    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._buffers.clear()
