"""The thread that moves this process's MPI requests on, and says when they have ended.

Who waits for requests that soon end may move them on itself, which saves two ways from thread to
thread; what has not ended by then is the thread's.

Invariants:
    MPG-3  Memory of a request stays referenced here until MPI has let go of it, however long after
           its group has ended that is.
    MPG-4  Without requests the thread sleeps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiordt._progress import yield_core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt.mpi._library import Library

_log = logging.getLogger(__name__)

#: For so long after the last event it only yields, then sleeps from 20 µs up to 1 ms. Requests of
#: many bytes move on only while it looks: so longer, as if they took 1 ns for each of them, which
#: is slower than within a host.
_EAGER_SECONDS: Final = 300e-6
_EAGER_SECONDS_PER_BYTE: Final = 1e-9
_LEAST_SECONDS: Final = 20e-6
_MOST_SECONDS: Final = 1e-3


@dataclass(slots=True, eq=False)
class _Work:
    """Some requests.

    Attributes:
        owner: Whose.
        keep: What MPI reads or writes.
        done: To be called when all have ended; with the error, if one failed.
        left: How many have not ended.
        receives: Those that can be recalled.
        error: Of one that failed.
    """

    owner: object
    keep: object
    done: Callable[[Exception | None], None]
    left: int
    receives: Sequence[Any]
    error: Exception | None = None


@dataclass(slots=True)
class _Leaving:
    """An owner that soon waits no longer.

    Attributes:
        owner: Who.
        until: By the monotonic clock.
        then: To be called at the end.
    """

    owner: object
    until: float
    then: Callable[[], None]


class Progress:
    """See above. One in a process.

    Args:
        library: MPI.
    """

    def __init__(self, library: Library) -> None:
        self._api = library.api
        self._calls = library.calls
        self._requests: list[Any] = []
        self._works: list[_Work] = []  # of the requests
        self._leaving: list[_Leaving] = []
        self._parked: list[Any] = []  # requests that were given up
        self._kept: list[object] = []  # what they read or write
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._delay = _LEAST_SECONDS
        self._eager_until = 0.0  # by the performance counter
        self._turning = threading.Lock()  # one thread at a time
        self._drivers = 0  # threads that drive, or are about to; under the lock
        threading.Thread(target=self._run, name="aiordt-mpi", daemon=True).start()

    def watch(
        self,
        owner: object,
        receives: Sequence[Any],
        sends: Sequence[Any],
        keep: object,
        done: Callable[[Exception | None], None],
        *,
        nbytes: int,
        driven: bool = False,
    ) -> None:
        """Call ``done``, on the thread or in `drive`, when all requests have ended. Any thread.

        Args:
            owner: As for `give_up`.
            receives: Requests; not touched by the caller any more.
            sends: More of them; at least one in all.
            keep: What MPI reads or writes.
            done: Must not raise; gets the error, if one failed.
            nbytes: How much MPI reads and writes.
            driven: Whether the caller now calls `drive`; the thread moves nothing on until that
                returns.
        """
        work = _Work(owner, keep, done, len(receives) + len(sends), receives)

        def add() -> None:
            for request in (*receives, *sends):
                self._requests.append(request)
                self._works.append(work)
            self._happened(nbytes)

        if driven:
            with self._turning:
                self._drivers += 1
                self._jobs.append(add)
        else:
            self._do(add)

    def drive(self, ended: Callable[[], bool]) -> None:
        """Move all requests on until ``ended``, or nothing has happened for a while; after `watch`.

        Blocks, for some hundred µs or about as long as the bytes of the requests take.
        """
        while not ended():
            with self._turning:
                self._turn()
            if time.perf_counter() >= self._eager_until:
                break
            yield_core()
        with self._turning:
            self._drivers -= 1
        if self._requests or self._leaving or self._jobs:
            self._wake.set()

    def begin(
        self,
        owner: object,
        make: Callable[[], Any],
        keep: object,
        done: Callable[[Exception | None], None],
        *,
        receiving: bool,
        nbytes: int,
    ) -> None:
        """As `watch`, of one request, which ``make`` makes on the thread; never waits. Any thread.

        Args:
            owner: As for `give_up`.
            make: What it raises goes to ``done``.
            keep: What MPI reads or writes.
            done: Must not raise; gets the error, if it failed.
            receiving: Whether it can be recalled.
            nbytes: How much MPI reads or writes.
        """

        def start() -> None:
            try:
                request = make()
            except Exception as exc:  # noqa: BLE001  (told to who waits)
                done(exc)
                return
            self._requests.append(request)
            self._works.append(_Work(owner, keep, done, 1, [request] if receiving else []))
            self._happened(nbytes)

        self._do(start)

    def give_up(self, owner: object, seconds: float, then: Callable[[bool], None]) -> None:
        """Wait no longer for an owner's requests; it makes no more of them. Any thread.

        Args:
            owner: As of `watch`.
            seconds: In which they may still end. What has not begun to arrive is recalled.
            then: Called, on the thread, at the end: whether all had ended by themselves.
        """

        def start() -> None:
            clean = not any(work.owner is owner for work in self._works)
            self._recall(owner)
            self._sweep()
            until = time.monotonic() + seconds
            self._leaving.append(_Leaving(owner, until, lambda: then(clean)))

        self._do(start)

    def _do(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._wake.set()

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not (self._requests or self._leaving):
                self._wake.wait()
            with self._turning:
                if not self._drivers:
                    self._turn()
            self._rest()

    def _turn(self) -> None:
        """Do what there is to do. Under the lock."""
        self._wake.clear()
        while self._jobs:
            self._jobs.popleft()()
            self._happened()
        if self._requests and self._test():
            self._happened()
        if self._leaving:
            self._let_go()

    def _recall(self, owner: object) -> None:
        """Let MPI forget receives for which nothing has come."""
        null = self._api.REQUEST_NULL
        for work in {id(work): work for work in self._works if work.owner is owner}.values():
            for request in work.receives:
                with self._calls, suppress(self._api.Exception):
                    if request != null:
                        request.Cancel()

    def _sweep(self) -> None:
        """Let go of the memory of requests that were given up, and have ended since."""
        for place in reversed(range(len(self._parked))):
            try:
                with self._calls:
                    ended = self._parked[place].Test()
            except self._api.Exception:
                ended = True
            if ended:
                del self._parked[place], self._kept[place]

    def _happened(self, nbytes: int = 0) -> None:
        eager = time.perf_counter() + _EAGER_SECONDS + nbytes * _EAGER_SECONDS_PER_BYTE
        self._eager_until = max(self._eager_until, eager)
        self._delay = _LEAST_SECONDS

    def _rest(self) -> None:
        if not (self._requests or self._leaving):
            return
        if self._drivers:
            self._wake.wait(_MOST_SECONDS)
            return
        if time.perf_counter() < self._eager_until:
            yield_core()
            return
        self._wake.wait(self._delay)
        self._delay = min(self._delay * 1.5, _MOST_SECONDS)

    def _test(self) -> bool:
        """Look at all requests; whether one has ended."""
        error: Exception | None = None
        try:
            with self._calls:
                ended = self._api.Request.Testsome(self._requests)
        except self._api.Exception as exc:
            null = self._api.REQUEST_NULL
            ended = [place for place, each in enumerate(self._requests) if each == null]
            error = exc
            if not ended:  # it concerns none of them
                _log.error("MPI could not look at its requests", exc_info=exc)
                ended = list(range(len(self._requests)))
        for place in sorted(ended or (), reverse=True):
            del self._requests[place]
            work = self._works.pop(place)
            work.error = work.error or error
            work.left -= 1
            if not work.left:
                work.done(work.error)
        return bool(ended)

    def _let_go(self) -> None:
        """End what nobody waits for any more."""
        now = time.monotonic()
        for leaving in list(self._leaving):
            mine = [place for place, work in enumerate(self._works) if work.owner is leaving.owner]
            if mine and now < leaving.until:
                continue
            self._leaving.remove(leaving)
            parked = []
            for place in reversed(mine):
                work = self._works.pop(place)
                self._parked.append(self._requests.pop(place))
                self._kept.append(work.keep)
                if work not in parked:
                    parked.append(work)
            for work in parked:
                work.done(None)
            leaving.then()
