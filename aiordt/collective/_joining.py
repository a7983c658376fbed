"""How the members of a group become one MPI communicator.

Ranks of one ``mpiexec`` are in one already, of which theirs is a part. Of others each is a world
of one rank. Two of them connect, then two such pairs, and so on, as in a tree:
one group accepts and the other connects, both by their first rank, and they merge. The steps of a
level concern different processes, and are made at once.

What MPICH 5.0 needs for that, and does not say:

* While two groups merge, messages are told apart by a number that another merging may have, too.
  So a process takes part in one group's forming at a time: see `_Place`. That is also because
  one thread at a time calls MPI (MPG-7), and must not wait for one that waits for it.
* While a process waits for who connects, every other MPI call in it waits, too. So both enter
  when all of both groups have said that they are there, and the wait has an end.
* The first messages of two processes are told apart by the number in the port's name alone, not
  by their sender. So a number that a connection failed with is not used again, at either end.

Invariants:
    MPG-5  A member that dies while a group forms leaves at most one thread behind in each other
           member; it sleeps, but for some looks. MPI is not asked for another group there, if it
           is still busy with that one.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aiordt._errors import GroupError
from aiordt.mpi._library import unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt.collective._engine import Engine
    from aiordt.mpi._library import Library

#: The worlds of both groups must fit into tables of MPICH: 100 on either side.
MAX_MEMBERS: Final = 128
#: How long a process that has said that it is there may need to connect. Whole seconds.
_CONNECT_SECONDS: Final = 5
#: After so long nothing that a group left behind will end.
_STUCK_SECONDS: Final = 3 * _CONNECT_SECONDS
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
                with calls.by(unfit):
                    port = str(api.Open_port())
                found = re.match(r"tag#(\d+)\$", port)
                if found is None:
                    raise unavailable(f"ports of this library are called {port!r}")
                number = int(found[1])
                if number not in self._used:
                    break
                unfit.append(port)
            self._used.add(number)
        with calls.by(unfit):
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
        self._holder: Engine | None = None
        self._since_end: float | None = None  # when the holder's group ended

    def take(self, engine: Engine) -> None:
        """Wait for it.

        Raises:
            GroupError: The group has ended.
            UnavailableError: MPI is stuck in the forming of a group that has ended.
        """
        engine.on_end(self._look)
        with self._changed:
            while self._holder is not None:
                engine.check()
                left = None
                if self._since_end is not None:
                    left = self._since_end + _STUCK_SECONDS - time.monotonic()
                    if left <= 0:
                        raise unavailable(
                            f"{engine.label(engine.rank)}: a member of a group died while it "
                            "formed, and MPI is still busy with that; make a new actor"
                        )
                self._changed.wait(left)
            engine.check()
            self._holder = engine

    def give_back(self) -> None:
        """Let the next group have it."""
        with self._changed:
            self._holder = self._since_end = None
            self._changed.notify_all()

    def _look(self) -> None:
        """A group has ended: maybe one that waits, maybe the one that has it."""
        with self._changed:
            if self._since_end is None and self._holder is not None and self._holder.over:
                self._since_end = time.monotonic()
            self._changed.notify_all()


_numbers: Final = _Numbers()
_place: Final = _Place()


class Joining:
    """Makes the communicators of a group. For a thread of its own: see MPG-5.

    Args:
        engine: The group.
        library: MPI.
        places: Of each member, by rank: its world, and its rank in that. No other process has
            the same, and they order the members.
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

    def run(self) -> list[Any]:
        """Two communicators, whose ranks are the group's."""
        self._take_places()
        try:
            comm = self._grown() if self._library.alone else self._of_world()
            with self._library.calls.by(self._engine):
                comm.Set_errhandler(self._api.ERRORS_RETURN)
                return [comm, comm.Dup()]
        finally:
            _place.give_back()

    def _of_world(self) -> Any:  # noqa: ANN401
        """Of some ranks of a world that ``mpiexec`` started."""
        world = self._api.COMM_WORLD
        with self._library.calls.by(self._engine):
            whole = world.Get_group()
            chosen = whole.Incl([rank for _, rank in self._places])
            try:
                return world.Create_group(chosen)
            finally:
                chosen.Free()
                whole.Free()

    def _grown(self) -> Any:  # noqa: ANN401
        with self._library.calls.by(self._engine):
            comm = self._api.COMM_SELF.Dup()
        span = 1
        while span < self._engine.size:
            comm = self._double(comm, span)
            span *= 2
        return comm

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

    def _double(self, comm: Any, span: int) -> Any:  # noqa: ANN401
        """The communicator of twice as many members as ``comm`` has."""
        rank, size = self._engine.rank, self._engine.size
        first = rank - rank % (2 * span)
        second = first + span
        if second >= size:
            return comm
        members = range(first, min(second + span, size))
        key = f"mpi/{span}/{first}/"
        lower = first if self._places[first] < self._places[second] else second
        upper = first + second - lower
        port, number = "", -1
        if rank == lower:
            port, number = self._offer(key)
        elif rank == upper:
            port, number = self._choose(key)
        self._meet(key, members)
        accepting = (rank < second) == (lower == first)
        with self._library.calls.by(self._engine):
            other = upper if accepting else lower
            joined = self._connect(comm, port, other, accepting=accepting)
            merged = joined.Merge(rank >= second)
            joined.Free()
            comm.Free()
            if rank == lower:
                self._api.Close_port(port)
        if number >= 0:
            _numbers.give_back(number)
        return merged

    def _connect(self, comm: Any, port: str, other: int, *, accepting: bool) -> Any:  # noqa: ANN401
        """Connect two groups, of which ``other`` is a member of the other one."""
        info = self._api.Info.Create({"timeout": str(_CONNECT_SECONDS)})
        try:
            return comm.Accept(port, info) if accepting else comm.Connect(port, info)
        except self._api.Exception as exc:
            # The number stays in use: what comes late must find nobody.
            said = str(exc).splitlines()
            why = f"{self._engine.label(other)} did not connect: {said[0]} {said[-1]}"
            raise JoinError(self._engine.said(why)) from exc
        finally:
            info.Free()

    def _offer(self, key: str) -> tuple[str, int]:
        """A port whose number the other end can use, too."""
        unfit = []
        attempt = 0
        while True:
            port, number = _numbers.open(self._library)
            self._engine.store(f"{key}port/{attempt}", msgpack.packb((port, number)))
            (taken,) = self._engine.stored([f"{key}taken/{attempt}"], self._seconds)
            if taken == b"1":
                break
            unfit.append((port, number))
            attempt += 1
        for each, its in unfit:
            with self._library.calls.by(self._engine):
                self._api.Close_port(each)
            _numbers.give_back(its)
        return port, number

    def _choose(self, key: str) -> tuple[str, int]:
        attempt = 0
        while True:
            (packed,) = self._engine.stored([f"{key}port/{attempt}"], self._seconds)
            port, number = msgpack.unpackb(packed)
            taken = _numbers.take(number)
            self._engine.store(f"{key}taken/{attempt}", b"1" if taken else b"0")
            if taken:
                return port, number
            attempt += 1

    def _meet(self, key: str, members: Sequence[int]) -> None:
        """Wait until all of both groups are about to make the next step."""
        self._engine.store(f"{key}here/{self._engine.rank}", b"")
        self._engine.stored([f"{key}here/{rank}" for rank in members], self._seconds)


def apart(engine: Engine, library: Library, make: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What ``make`` returns, called on a thread that is left to itself if the group ends.

    Raises:
        GroupError: The group ended meanwhile, or making it failed.
    """
    done = threading.Event()
    made: list[Any] = []
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
    if not (made or failed):
        late = threading.Timer(_CONNECT_SECONDS + 1, library.calls.abandon, [engine])
        late.daemon = True
        late.start()
    engine.check()
    if failed:
        raise failed[0]
    return made[0]


def _sleep_long() -> None:
    """Let MPI look less often, while it waits in this thread."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
