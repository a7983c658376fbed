"""MPI: payloads of groups move by its non-blocking requests.

The group's own connections match the calls, and tell of a member's death, which MPI does not. Of
MPI there are only messages from one member to another: see `aiordt.collective._joining`. Its own
collectives cannot be recalled, and go on sending to a member that has died: that crashes MPICH 5.0.
Ours send no more bytes than the best of them; shares are reduced in the order of the ranks, each
by one member, so all get the same bits.

Invariants:
    MPG-6  Once a group has ended no request of it is begun, what has not begun to arrive is
           recalled, and within 0.5 s nobody waits for the rest. The tags of a group that did not
           end in order are never used again: another could get what was sent with them.
"""

from __future__ import annotations

import itertools
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgpack
import torch
from typing_extensions import override

from aiordt._errors import (
    AiordtError,
    GroupError,
    OwnerDiedError,
    TransferError,
    UnavailableError,
)
from aiordt._progress import yield_core
from aiordt._types import MIB
from aiordt.collective._joining import LANE_BITS, Joining, apart
from aiordt.collective._kernels import Reduction
from aiordt.collective._rules import REDUCING, working_dtype
from aiordt.collective._steps import Ended, Pending
from aiordt.collective._turns import TurnMover
from aiordt.mpi._library import library, unavailable, version
from aiordt.mpi._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt.collective._call import Buffers, Call
    from aiordt.collective._engine import Engine
    from aiordt.collective._steps import Steps
    from aiordt.mpi._library import Library

#: What requests have to end by themselves, once their group has.
_GRACE_SECONDS: Final = 0.5
#: Of reductions: pieces of all members fit into a core's cache.
_PIECE_NBYTES: Final = MIB // 2
#: The tag of all that collectives send: a lane has one of them at a time. Those of messages
#: follow; any that are under way at once, of two members, have different ones.
_COLLECTIVE: Final = 0
_NUM_MESSAGES: Final = (1 << LANE_BITS) - 1

#: What goes to a rank, or comes from it.
_Parts: TypeAlias = "list[tuple[int, torch.Tensor]]"


class _Member(NamedTuple):
    """What a member says of its MPI."""

    version: str
    world: str
    rank: int
    alone: bool
    reason: str


_progress_lock: Final = threading.Lock()
_progress: Final[list[Progress]] = []


def _progress_of(mpi: Library) -> Progress:
    with _progress_lock:
        if not _progress:
            _progress.append(Progress(mpi))
        return _progress[0]


class MpiMover(TurnMover):
    """MPI, by mpi4py.

    Args:
        engine: The group.
        seconds: How long the others may need.
    """

    def __init__(self, engine: Engine, seconds: float) -> None:
        """Connect to the others; blocks until they do, too.

        Raises:
            GroupError: The group ended meanwhile, or a member did not come.
            UnavailableError: MPI does not work for these members; names one, and why.
        """
        super().__init__(engine)
        self._mpi, members = _agreed(engine, seconds)
        self._api = self._mpi.api
        self._progress = _progress_of(self._mpi)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        places = _places(self._mpi, members)
        self._lines = apart(engine, Joining(engine, self._mpi, places, seconds).run)
        engine.on_end(self._end)

    def _end(self) -> None:
        """Begin nothing more; let go of what has ended."""
        orderly = self._engine.over is not None and self._engine.over.closed
        unused = orderly and not self._engine.busy
        with self._lock:
            pass  # who has seen that it goes on has made its requests

        def then(clean: bool) -> None:  # noqa: FBT001
            if unused and clean:
                self._lines.let_go()

        self._progress.give_up(self, _GRACE_SECONDS, then)

    @override
    def _group(self, *, tagged: bool) -> Steps:
        return int(tagged)
        yield

    def _exchange(self, which: int, sends: _Parts, receives: _Parts, tag: int) -> Steps:
        """Send and receive on a lane, wait for the end of all, and raise an error.

        What is empty is left out, by both ends.
        """
        sends = [part for part in sends if part[1].numel()]
        receives = [part for part in receives if part[1].numel()]
        if not (sends or receives):
            return
        pending = Pending()
        failed: list[Exception] = []

        def done(error: Exception | None) -> None:
            if error is not None:
                failed.append(error)
            pending.finish()

        coming: list[Any] = []
        going: list[Any] = []
        with self._lock:
            self._engine.check()
            lane = self._lines.lanes[which]
            with self._mpi.calls:
                try:
                    for rank, tensor in receives:
                        comm, place, first = lane[rank]
                        coming.append(comm.Irecv(self._memory(tensor), place, first + tag))
                    for rank, tensor in sends:
                        if not self._engine.mesh.is_there(rank):  # sending would crash MPICH 5.0
                            label = self._engine.label(rank)
                            raise OwnerDiedError(f"{label} is gone", owner=label)
                        comm, place, first = lane[rank]
                        going.append(comm.Isend(self._memory(tensor), place, first + tag))
                except (OwnerDiedError, self._api.Exception) as exc:
                    failed.append(exc)
            if coming or going:
                nbytes = sum(tensor.nbytes for _, tensor in (*sends, *receives))
                self._progress.watch(
                    self, coming, going, (sends, receives), done, nbytes=nbytes, driven=True
                )
        if coming or going:
            self._progress.drive(lambda: pending.ended)
            if not failed:
                yield pending
        if failed and isinstance(failed[0], OwnerDiedError):
            raise failed[0]
        if failed:
            text = _first_line(failed[0])
            raise TransferError(text, transport="mpi", peer="", nbytes=0) from failed[0]

    def _memory(self, tensor: torch.Tensor) -> list[Any]:
        """A tensor as MPI takes it: as bytes, so that every dtype can."""
        memory = self._api.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
        return [memory, tensor.nbytes, self._api.BYTE]

    # --- collectives -------------------------------------------------------------------------

    @override
    def _move(self, call: Call, each: Buffers, group: int) -> Steps:
        if call.kind in REDUCING:
            yield from self._reduce(call, each, group)
        elif call.kind == "broadcast":
            yield from self._broadcast(call, each, group)
        else:
            sends, receives, own = _parts(call, each)
            if own is not None:
                own[1].copy_(own[0])
            yield from self._exchange(group, sends, receives, _COLLECTIVE)

    def _broadcast(self, call: Call, each: Buffers, group: int) -> Steps:
        """Each gets its share, and gives it to the others."""
        out, root, others = each.out, call.root, call.others
        pieces = _cut(out, each)
        if call.rank == root:
            if out.data_ptr() != each.source.data_ptr():
                out.copy_(each.source)
            shares = [(rank, pieces[rank]) for rank in others]
            yield from self._exchange(group, shares, [], _COLLECTIVE)
            rest = [(rank, pieces[root]) for rank in others]
            yield from self._exchange(group, rest, [], _COLLECTIVE)
            return
        mine = pieces[call.rank]
        yield from self._exchange(group, [], [(root, mine)], _COLLECTIVE)
        sends = [(rank, mine) for rank in others if rank != root]
        receives = [(rank, pieces[rank]) for rank in others]
        yield from self._exchange(group, sends, receives, _COLLECTIVE)

    def _reduce(self, call: Call, each: Buffers, group: int) -> Steps:
        """Each reduces its share, and gives it to those who want it."""
        others = call.others
        brought = _cut(each.source, each)
        mine = brought[call.rank]
        room = call.empty(mine.numel() * len(others), mine.dtype)
        rooms = dict(zip(others, room.view(len(others), -1) if others else (), strict=True))
        sends = [(rank, brought[rank]) for rank in others]
        yield from self._exchange(group, sends, list(rooms.items()), _COLLECTIVE)
        if call.kind == "reducescatter":
            share = each.out
        elif call.receives:
            share = _cut(each.out, each)[call.rank]
        else:
            share = torch.empty_like(mine)
        rooms[call.rank] = mine
        _reduce_share(call.op, [rooms[rank] for rank in range(call.size)], share)
        if call.kind == "reducescatter":
            return
        wanting = [rank for rank in others if call.root in {-1, rank}]
        pieces = _cut(each.out, each) if call.receives else []
        receives = [(rank, pieces[rank]) for rank in others] if call.receives else []
        yield from self._exchange(group, [(rank, share) for rank in wanting], receives, _COLLECTIVE)

    # --- messages ----------------------------------------------------------------------------

    def next_number(self) -> int:
        """By which a message that is about to come is known to both ends."""
        return next(self._numbers) % _NUM_MESSAGES

    def give(self, flats: Sequence[torch.Tensor], other: int, number: int) -> Steps:
        """Send the payload of a message."""
        sends = [(other, flat) for flat in flats]
        yield from self._exchange(0, sends, [], _COLLECTIVE + 1 + number)

    def take(self, flats: Sequence[torch.Tensor], other: int, number: int) -> Steps:
        """Receive the payload of a message."""
        receives = [(other, flat) for flat in flats]
        yield from self._exchange(0, [], receives, _COLLECTIVE + 1 + number)

    # --- pulls: see `aiordt.transports.mpi.Carrier` -----------------------------------------------

    def carry(
        self,
        memory: torch.Tensor,
        other: int,
        tag: int,
        done: Callable[[Exception | None], None],
        *,
        sending: bool,
    ) -> None:
        """Send a message to a member, or receive one from it. If that fails the group ends."""

        def make() -> Any:  # noqa: ANN401
            with self._lock:
                self._engine.check()
                if not self._engine.mesh.is_there(other):  # sending would crash MPICH 5.0
                    raise GroupError(f"{self._engine.label(other)} is gone")
                # The lane where collectives leave these tags alone.
                comm, place, first = self._lines.lanes[1][other]
                call = comm.Isend if sending else comm.Irecv
                with self._mpi.calls:
                    return call(self._memory(memory), place, first + _COLLECTIVE + tag)

        def ended(error: Exception | None) -> None:
            engine = self._engine
            if error is not None and not isinstance(error, AiordtError):
                why = f"a message to or from {engine.label(other)} failed: {_first_line(error)}"
                engine.end(Ended(closed=False, why=engine.said(why)))
            if engine.over is not None:  # then a request may have been given up
                error = GroupError(engine.over.why)
            done(error)

        self._progress.begin(self, make, memory, ended, receiving=not sending, nbytes=memory.nbytes)


def _first_line(error: Exception) -> str:
    return f"mpi: {str(error).splitlines()[0]}"


def _cut(flat: torch.Tensor, each: Buffers) -> list[torch.Tensor]:
    """The share of each rank."""
    return [flat[low:high] for low, high in pairwise(each.unit.bounds)]


def _parts(
    call: Call, each: Buffers
) -> tuple[_Parts, _Parts, tuple[torch.Tensor, torch.Tensor] | None]:
    """What a member sends, receives, and copies, where each sends once."""
    others, rank, root = call.others, call.rank, call.root
    source, out = each.source, each.out
    if call.kind in {"allgather", "gather"}:
        wanting = [other for other in others if root in {-1, other}]
        sends = [(other, source) for other in wanting]
        if not call.receives:
            return sends, [], None
        rooms = out.view(call.size, -1)
        return sends, [(other, rooms[other]) for other in others], (source, rooms[rank])
    pieces = _cut(source, each) if call.kind == "alltoall" or rank == root else []
    sends = [(other, pieces[other]) for other in others] if pieces else []
    if call.kind == "scatter":
        if rank == root:
            return sends, [], (pieces[rank], out)
        return [], [(root, out)], None
    rooms = out.view(call.size, -1)
    return sends, [(other, rooms[other]) for other in others], (pieces[rank], rooms[rank])


def _reduce_share(op: str, sources: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Reduce in the order of the ranks; ``out`` may be one of them."""
    reduction = Reduction(op, out.dtype)
    step = _PIECE_NBYTES // out.dtype.itemsize
    room = torch.empty(min(step, out.numel()), dtype=working_dtype(out.dtype))
    flats = [reduction.flat(source) for source in sources]
    target, scratch = reduction.flat(out), reduction.flat(room)
    for low in range(0, out.numel(), step):
        high = min(low + step, out.numel())
        pieces = [flat[low:high] for flat in flats]
        reduction(pieces, target[low:high], scratch[: high - low])
        yield_core()  # a loop may wait for it


def _agreed(engine: Engine, seconds: float) -> tuple[Library, list[_Member]]:
    """MPI here, and what all members say of theirs.

    Raises:
        UnavailableError: One has none that works, or they have different libraries or worlds.
    """
    mpi = None
    try:
        mpi = library()
        said = _Member(mpi.version, mpi.world, mpi.rank, mpi.alone, "")
    except UnavailableError as exc:
        said = _Member(version(), "", -1, True, exc.reason)  # noqa: FBT003
    engine.store(f"mpi/who/{engine.rank}", msgpack.packb(said))
    packed = engine.stored([f"mpi/who/{rank}" for rank in range(engine.size)], seconds)
    members = [_Member(*msgpack.unpackb(each)) for each in packed]
    first = members[0]
    for rank, member in enumerate(members):
        pair = f"{engine.label(0)} and {engine.label(rank)}"
        if member.version and first.version and member.version != first.version:
            raise unavailable(
                f"{pair} have different MPI libraries: {first.version} and {member.version}"
            )
    for rank, member in enumerate(members):
        pair = f"{engine.label(0)} and {engine.label(rank)}"
        if member.reason:
            raise unavailable(f"{engine.label(rank)}: {member.reason}")
        if member.alone != first.alone or not (first.alone or member.world == first.world):
            raise unavailable(f"{pair} are not ranks of the same mpiexec")
    assert mpi is not None  # noqa: S101  (its reason was raised)
    return mpi, members


def _places(mpi: Library, members: Sequence[_Member]) -> list[tuple[str, int]]:
    """Where the members are, if they can be joined.

    Raises:
        UnavailableError: They are too many.
    """
    mpi.meet({member.world for member in members} - {mpi.world})
    return [(member.world, member.rank) for member in members]
