"""How the members of a group reach each other by MPI.

Ranks of one ``mpiexec`` are in one world, and get communicators of their own out of it. Of others
each is a world of one rank. Two of these connect when they are first in a group together, and keep
that connection: a communicator of the two. All groups that both are in use it, each with a number
of its own that makes its tags. So members that know each other form a group without any call of
MPI: nothing of MPI is made for a group, nor left of one.

What MPICH 5.0 needs for connections, and does not say:

* While two worlds connect, messages are told apart by the number in the port's name alone, not by
  their sender. So a number that a connection failed with is not used again, at either end.
* While a process waits for who connects, every other MPI call in it waits, too. So both enter
  when both have said that they are there, and the wait has an end.
* Who connects crashes if the other dies before it has: MPICH looks at a request that UCX has
  refused it. Who accepts only waits in vain. So it is the older process that accepts: of a group
  that forms again the survivors, while a new actor connects to them.
* One thread at a time calls MPI (MPG-7), and must not wait for one that waits for it. So a process
  takes part in one group's forming at a time: see `_Place`.

Invariants:
    MPG-5  A member that dies while a group forms keeps the others from MPI for some seconds at
           most, and leaves at most one thread behind in each, asleep for good.
    MPG-8  A number is in use here from before a message may be sent with it until none can be
           under way. A group gets one that none of its members uses.
"""

from __future__ import annotations

import ctypes
import re
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aiordt._errors import GroupError
from aiordt.mpi._library import unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiordt.collective._engine import Engine
    from aiordt.mpi._library import Library

#: How long a process that has said that it is there may need to connect. Whole seconds.
_CONNECT_SECONDS: Final = 5
#: What a group has on its connections: one for calls without tags, and one for those with.
_LANES: Final = 2
#: Of tags: how many bits tell those of a lane apart, and how many MPICH's have.
LANE_BITS: Final = 15
_TAG_BITS: Final = 29
_MAX_NUMBERS: Final = (1 << (_TAG_BITS - LANE_BITS)) // _LANES
#: By how much the kernel may be late in waking a thread that waits in MPI.
_SLACK_NS: Final = 1_000_000
_PR_SET_TIMERSLACK: Final = 29


class JoinError(GroupError):
    """A member did not come."""


class _Numbers:
    """The numbers of ports that are in use in this process, at either end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: set[int] = set()

    def open(self, library: Library) -> tuple[str, int]:
        """A new port, and its number."""
        unfit: list[str] = []
        api, calls = library.api, library.calls
        with self._lock:
            while True:
                with calls:
                    port = str(api.Open_port())
                found = re.match(r"tag#(\d+)\$", port)
                if found is None:
                    raise unavailable(f"ports of this library are called {port!r}")
                number = int(found[1])
                if number not in self._used:
                    break
                unfit.append(port)
            self._used.add(number)
        with calls:
            for each in unfit:
                api.Close_port(each)
        return port, number

    def take(self, number: int) -> bool:
        """Use the number of another process's port, unless it is in use here."""
        with self._lock:
            free = number not in self._used
            self._used.add(number)
        return free

    def give_back(self, number: int) -> None:
        """It is not used any more."""
        with self._lock:
            self._used.discard(number)


class _Place:
    """This process, which one group has to itself while it forms.

    A group takes its members in the order of their places, so that no two groups wait for each
    other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False

    def take(self, engine: Engine) -> None:
        """Wait for it.

        Raises:
            GroupError: The group has ended.
        """
        engine.on_end(self._look)
        with self._changed:
            self._changed.wait_for(lambda: engine.over is not None or not self._taken)
            engine.check()
            self._taken = True

    def give_back(self) -> None:
        """Let the next group have it."""
        with self._changed:
            self._taken = False
            self._changed.notify_all()

    def _look(self) -> None:
        """A group has ended, maybe one that waits."""
        with self._changed:
            self._changed.notify_all()


class _Known:
    """What this process has to do with others: connections, and the numbers of groups.

    Connections change only in the hands of who has the `_Place`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: dict[str, Any] = {}  # by world
        self._used: set[int] = set()

    def says(self, worlds: Sequence[str]) -> bytes:
        """For the others of a group: numbers in use, and to which worlds there is a connection."""
        with self._lock:
            return msgpack.packb(
                (sorted(self._used), [world in self._connections for world in worlds])
            )

    def connection(self, world: str) -> Any:  # noqa: ANN401
        return self._connections[world]

    def connected(self, world: str, comm: Any) -> None:  # noqa: ANN401
        """From now on it is reached by that communicator."""
        self._connections[world] = comm

    def lost(self, world: str) -> None:
        """One of both does not count on the connection."""
        self._connections.pop(world, None)

    def use(self, number: int) -> None:
        """A group has this number."""
        with self._lock:
            self._used.add(number)

    def give_back(self, number: int) -> None:
        """Nothing will be sent or received with it any more."""
        with self._lock:
            self._used.discard(number)


_numbers: Final = _Numbers()
_place: Final = _Place()
_known: Final = _Known()


class Line(NamedTuple):
    """How another member is reached.

    Attributes:
        comm: The communicator.
        rank: The other's in that.
        first: The first of the tags that may be used.
    """

    comm: Any
    rank: int
    first: int


class Lines(NamedTuple):
    """How a member reaches the others.

    Attributes:
        lanes: For calls without tags, and for those with: by the other's rank in the group.
        let_go: To be called when the group has ended in order, and nothing is under way.
    """

    lanes: Sequence[dict[int, Line]]
    let_go: Callable[[], None]


class Joining:
    """Connects the members of a group. For a thread of its own: see MPG-5.

    Args:
        engine: The group.
        library: MPI.
        places: Of each member, by rank: its world, and its rank in that. No other process has
            the same, and they order the members, the older first.
        seconds: How long the others may need.
    """

    def __init__(
        self,
        engine: Engine,
        library: Library,
        places: Sequence[tuple[str, int]],
        seconds: float,
    ) -> None:
        self._engine = engine
        self._api = library.api
        self._library = library
        self._places = places
        self._seconds = seconds

    def run(self) -> Lines:
        """How this member reaches the others."""
        self._take_places()
        try:
            return self._connected() if self._library.alone else self._of_world()
        finally:
            _place.give_back()

    def _of_world(self) -> Lines:
        """Out of a world that ``mpiexec`` started."""
        world = self._api.COMM_WORLD
        with self._library.calls:
            whole = world.Get_group()
            chosen = whole.Incl([rank for _, rank in self._places])
            try:
                comm = world.Create_group(chosen)
            finally:
                chosen.Free()
                whole.Free()
            comm.Set_errhandler(self._api.ERRORS_RETURN)
            comms = [comm, comm.Dup()]

        def let_go() -> None:
            with self._library.calls:
                for each in comms:
                    each.Free()

        others = self._engine.others
        return Lines([{rank: Line(each, rank, 0) for rank in others} for each in comms], let_go)

    def _connected(self) -> Lines:
        """Connect to those to whom there is no connection."""
        engine, rank = self._engine, self._engine.rank
        worlds = [world for world, _ in self._places]
        engine.store(f"mpi/has/{rank}", _known.says(worlds))
        packed = engine.stored([f"mpi/has/{each}" for each in range(engine.size)], self._seconds)
        said = [msgpack.unpackb(each) for each in packed]
        number = _free([numbers for numbers, _ in said])
        _known.use(number)
        for other in in_turn(engine.size, rank):
            if not (said[rank][1][other] and said[other][1][rank]):
                self._connect(other)
        lanes = []
        for lane in range(_LANES):
            first = (number * _LANES + lane) << LANE_BITS
            lanes.append(
                {each: Line(_known.connection(worlds[each]), 0, first) for each in engine.others}
            )
        return Lines(lanes, lambda: _known.give_back(number))

    def _take_places(self) -> None:
        """Wait until all members form no other group."""
        engine = self._engine
        order = sorted(range(engine.size), key=self._places.__getitem__)
        mine = order.index(engine.rank)
        if mine:
            engine.stored([f"mpi/taken/{order[mine - 1]}"], self._seconds)
        _place.take(engine)
        try:
            engine.store(f"mpi/taken/{engine.rank}", b"")
            engine.stored([f"mpi/taken/{order[-1]}"], self._seconds)
        except BaseException:
            _place.give_back()
            raise

    def _connect(self, other: int) -> None:
        """Connect to another member, which does the same now."""
        engine, api, calls = self._engine, self._api, self._library.calls
        world = self._places[other][0]
        _known.lost(world)
        key = f"mpi/{min(engine.rank, other)}/{max(engine.rank, other)}/"
        accepting = self._places[engine.rank] < self._places[other]
        port, number = (self._offer if accepting else self._choose)(key, other)
        self._meet(key, other)
        with calls:
            alone = api.COMM_SELF
            info = api.Info.Create({"timeout": str(_CONNECT_SECONDS)})
            try:
                comm = (alone.Accept if accepting else alone.Connect)(port, info)
                if accepting:
                    api.Close_port(port)
            except api.Exception as exc:
                # The number stays in use: what comes late must find nobody.
                said = str(exc).splitlines()
                why = f"{engine.label(other)} did not connect: {said[0]} {said[-1]}"
                raise JoinError(engine.said(why)) from exc
            finally:
                info.Free()
        _numbers.give_back(number)
        _known.connected(world, comm)

    def _offer(self, key: str, other: int) -> tuple[str, int]:
        """A port whose number the other end can use, too."""
        unfit = []
        attempt = 0
        while True:
            port, number = _numbers.open(self._library)
            self._engine.store(f"{key}port/{attempt}", msgpack.packb((port, number)), [other])
            (taken,) = self._engine.stored([f"{key}taken/{attempt}"], self._seconds)
            if taken == b"1":
                break
            unfit.append((port, number))
            attempt += 1
        for each, its in unfit:
            with self._library.calls:
                self._api.Close_port(each)
            _numbers.give_back(its)
        return port, number

    def _choose(self, key: str, other: int) -> tuple[str, int]:
        attempt = 0
        while True:
            (packed,) = self._engine.stored([f"{key}port/{attempt}"], self._seconds)
            port, number = msgpack.unpackb(packed)
            taken = _numbers.take(number)
            self._engine.store(f"{key}taken/{attempt}", b"1" if taken else b"0", [other])
            if taken:
                return port, number
            attempt += 1

    def _meet(self, key: str, other: int) -> None:
        """Wait until both are about to make the next step."""
        self._engine.store(f"{key}here/{self._engine.rank}", b"", [other])
        self._engine.stored([f"{key}here/{other}"], self._seconds)


def in_turn(size: int, rank: int) -> Iterator[int]:
    """The others, in an order in which all can meet: who is first for one has it as its first, too.

    It is that of a tournament: in round r those meet whose ranks add up to r, modulo the number of
    players but one; the last player meets who would meet itself, or, of an odd size, is not there.
    """
    last = size - 1 + size % 2
    for turn in range(last):
        if rank == last:
            yield turn * (last + 1) // 2 % last
            continue
        other = (turn - rank) % last
        if other == rank:
            other = last
        if other < size:
            yield other


def _free(used: Sequence[Sequence[int]]) -> int:
    """A number that nobody uses."""
    taken = set().union(*used)
    number = next((each for each in range(_MAX_NUMBERS) if each not in taken), None)
    if number is None:
        raise unavailable(
            f"{_MAX_NUMBERS} groups of these processes go on, or ended while messages were under "
            "way; make new actors"
        )
    return number


def apart(engine: Engine, make: Callable[[], Lines]) -> Lines:
    """What ``make`` returns, called on a thread that is left to itself if the group ends.

    Raises:
        GroupError: The group ended meanwhile, or making it failed.
    """
    done = threading.Event()
    made: list[Lines] = []
    failed: list[Exception] = []

    def run() -> None:
        _sleep_long()
        try:
            made.append(make())
        except Exception as exc:  # noqa: BLE001  (raised below)
            failed.append(exc)
        done.set()
        if failed and isinstance(failed[0], JoinError):
            # MPI may still write to the stack of this thread, if who did not come comes late.
            threading.Event().wait()

    threading.Thread(target=run, name="aiordt-mpi-join", daemon=True).start()
    engine.on_end(done.set)
    done.wait()
    engine.check()
    if failed:
        raise failed[0]
    return made[0]


def _sleep_long() -> None:
    """Let MPI look less often, while it waits in this thread."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
