"""The operations of one member of a group: matched, moved forward, ended.

An operation is a generator that yields `Step`s: what to tell the other members, and whether to
wait for what they say. It runs on the group's thread, or on the caller's while that costs only
microseconds.

Invariants:
    GRP-2  Calls are matched by their order, or by the order among those with the same tag; any
           number may be pending.
    GRP-3  Every pending call ends: with its result, with `GroupError` once a member is gone, one
           timed out or failed, or with `ClosedError` once the group was closed.
    GRP-4  A call raises only after its operation has stopped touching its tensors; only a
           cancelled caller leaves earlier, and the operation then keeps them until it ends.
    GRP-5  Whoever ends a group tells all others why, and they pass it on.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack
from typing_extensions import override

from aiordt._errors import (
    AiordtError,
    OwnerDiedError,
    UnavailableError,
    UsageError,
)
from aiordt._progress import post, settle
from aiordt.collective._mesh import Frame, Listener, Mesh
from aiordt.collective._steps import Ended, Pending, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt.collective._steps import Steps

_log = logging.getLogger(__name__)

#: Kinds of frames: of a collective; of a message, to its receiver and back; of the store; the end.
COLLECTIVE: Final = 0
TO_RECEIVER: Final = 1
TO_SENDER: Final = 2
STORE: Final = 3
END: Final = 4
#: Whose turn it is, among operations that each member finds ready in another order.
TURN: Final = 5
#: The lane of calls without a tag; those with tag t have lane t.
UNTAGGED: Final = -1
#: For how long one waits for news of a member's end before blaming something else.
_VERDICT_SECONDS: Final = 1.0


_Key: TypeAlias = tuple[int, int, int, int]


class _Operation:
    """One call."""

    __slots__ = (
        "deadline", "future", "key", "light", "loop", "name", "others", "received", "running",
        "said", "steps", "thread", "waiting",
    )  # fmt: skip

    def __init__(
        self, key: _Key, name: object, others: Sequence[int], steps: Steps, *, light: bool
    ) -> None:
        self.key = key
        self.light = light
        self.name = name
        self.others = others
        self.steps = steps
        self.said = b""
        self.received = 0  # exchanges that are over
        self.waiting = False  # for the others
        self.running = False  # some thread is at it
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.deadline: float | None = None


class Engine(Listener):
    """One member's end of a group.

    Args:
        name: The group's name.
        labels: Of the members, for messages.
        rank: Of this member.
        mesh: The connections to the others.
        ended: Called once, on any thread, when the group has ended here.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        rank: int,
        mesh: Mesh,
        ended: Callable[[], None],
    ) -> None:
        self.name = name
        self.labels = labels
        self.rank = rank
        self.size = len(labels)
        self.mesh = mesh
        self.over: Ended | None = None
        self.others = [other for other in range(self.size) if other != rank]
        self._on_end = ended
        self._lock = threading.Lock()
        self._numbers: defaultdict[tuple[int, int, int], itertools.count[int]] = defaultdict(
            itertools.count
        )
        self._operations: dict[_Key, _Operation] = {}
        self._arrived: dict[_Key, dict[int, list[bytes]]] = {}
        self._deadlines: list[tuple[float, int, _Operation]] = []
        self._tick = itertools.count()
        self._stored: dict[str, bytes] = {}
        self._news = threading.Condition()
        self._stops: list[Callable[[], None]] = []
        self._ready: deque[_Operation] = deque()
        self._ready_here: deque[_Operation] = deque()
        self._turns: deque[tuple[int, int]] = deque()  # in one order, whoever has read them
        self._told: Callable[[tuple[int, int]], None] = lambda _: None
        self._attending = 0  # inside how many operations the thread takes turns
        mesh.start(self)

    def label(self, rank: int) -> str:
        """A member, in messages."""
        return f"rank {rank} ({self.labels[rank]})"

    # --- calls -----------------------------------------------------------------------------

    async def call(
        self,
        name: object,
        steps: Steps,
        *,
        lane: int = UNTAGGED,
        kind: int = COLLECTIVE,
        other: int = -1,
        timeout: float | None = None,  # noqa: ASYNC109
        light: bool = False,
        numbered: Callable[[int], None] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation to its end.

        Args:
            name: Of the call, for messages; made a string only then.
            steps: What it does.
            lane: The sequence of calls that it belongs to.
            kind: `COLLECTIVE`; of a message, `TO_RECEIVER` for its sender, else `TO_SENDER`.
            other: The member at the other end of a message.
            timeout: In seconds, after which the whole group ends.
            light: Whether it costs only microseconds once all others have spoken.
            numbered: Told which call of its lane it is.

        Raises:
            GroupError: The group has ended.
            ClosedError: It was closed.
            UsageError: The members do not agree (GRP-1).
        """
        first = next(steps)  # before anything is said: packing may raise
        assert isinstance(first, Step)  # noqa: S101  (for the type checker)
        others = self.others if kind == COLLECTIVE else [other]
        with self._lock:
            if self.over is not None:
                raise self.over.error()
            number = next(self._numbers[kind, other, lane])
            if numbered is not None:
                numbered(number)
            operation = _Operation((kind, other, lane, number), name, others, steps, light=light)
            if timeout is not None:
                operation.deadline = time.monotonic() + timeout
                heapq.heappush(self._deadlines, (operation.deadline, next(self._tick), operation))
            self._operations[operation.key] = operation
            self._take(operation, first)  # under the lock: in the order of the numbers
            ready = self._claim(operation)
            if ready and not light:
                self._ready.append(operation)
        if not light:
            self.mesh.reclaim()
        if ready and light:
            self._advance(operation)
        elif ready:
            self.mesh.run(self._advance_ready)
        elif timeout is not None:
            self.mesh.wake()
        if light and not operation.future.done() and self.mesh.look():
            if operation.future.done():  # the others had spoken
                return operation.future.result()
            if self.mesh.borrow():
                try:
                    return await operation.future
                finally:
                    self.mesh.give_back(keep=not self._operations)
        return await operation.future

    def _take(self, operation: _Operation, step: Step) -> None:
        """Say what a step says. Under the lock."""
        operation.waiting = step.wait
        if step.say is None:
            return
        operation.said = step.say
        kind, _, lane, number = operation.key
        self.mesh.send(operation.others, Frame(kind, lane, number, step.say))

    def _claim(self, operation: _Operation) -> bool:
        """Whether an operation can go on, and is the caller's to do so. Under the lock."""
        if operation.running:
            return False
        arrived = self._arrived.get(operation.key, {})
        if operation.waiting and any(not arrived.get(other) for other in operation.others):
            return False
        operation.running = True
        return True

    def _heard(self, operation: _Operation) -> list[bytes]:
        """What the others said, by rank. Under the lock."""
        heard = [b""] * self.size
        if operation.waiting:
            operation.received += 1
            arrived = self._arrived.get(operation.key, {})
            for other in operation.others:
                heard[other] = arrived[other].pop(0)
        heard[self.rank] = operation.said
        return heard

    def _advance(self, operation: _Operation) -> None:
        """Run a claimed operation until it must wait."""
        while True:
            with self._lock:
                if self.over is not None:
                    break
                heard = self._heard(operation)
            try:
                step = operation.steps.send(heard)
            except StopIteration as stop:
                self._finish(operation, stop.value, None)
                return
            except UsageError as exc:
                self._finish(operation, None, exc)
                return
            except Exception as exc:  # noqa: BLE001  (told to all members)
                self._blame(operation, exc)
                break
            if isinstance(step, Pending):
                operation.waiting = False
                if step.then(lambda: self.mesh.run(lambda: self._advance(operation))):
                    return
                continue
            with self._lock:
                if self.over is not None:
                    break
                self._take(operation, step)
                operation.running = False
                if not self._claim(operation):
                    return
        operation.steps.close()
        assert self.over is not None  # noqa: S101  (for the type checker)
        self._finish(operation, None, self.over.error())

    def _blame(self, operation: _Operation, exc: Exception) -> None:
        """An operation failed here: end the group, for the reason that it really has."""
        if self.mesh.on_thread and not isinstance(exc, UnavailableError):
            deadline = time.monotonic() + _VERDICT_SECONDS
            self._attending += 1
            while self.over is None and (left := deadline - time.monotonic()) > 0:
                self.mesh.turn(left)  # what failed may be a member that is gone
            self._attending -= 1
        if isinstance(exc, OwnerDiedError):
            why = str(exc)
        else:
            why = f"{operation.name} failed on {self.label(self.rank)}: {exc}"
            if not isinstance(exc, AiordtError):
                _log.error("an operation of group %r failed", self.name, exc_info=exc)
        self.end(Ended(closed=False, why=self.said(why)))

    def _finish(self, operation: _Operation, result: object, exc: Exception | None) -> None:
        with self._lock:
            self._operations.pop(operation.key, None)
            left = self._arrived.get(operation.key)
            if left is not None and not any(left.values()):
                del self._arrived[operation.key]
        if operation.thread != threading.get_ident():
            post(operation.loop, settle, operation.future, result, exc)
        else:
            settle(operation.future, result, exc)

    @property
    def busy(self) -> bool:
        """Whether a call is pending."""
        return bool(self._operations)

    def unheard(self, lane: int) -> bool:
        """Whether the first call of a lane waits for the first word of another member."""
        with self._lock:
            operation = self._operations.get((COLLECTIVE, -1, lane, 0))
            return operation is not None and not operation.running and not operation.received

    def check(self) -> None:
        """For operations that work for long: stop once the group has ended.

        Raises:
            GroupError: It has.
        """
        if self.over is not None:
            raise self.over.error()

    def attend(self) -> None:
        """`check`, for operations that work for long on the thread, after hearing the others."""
        if self.mesh.on_thread:
            self._attending += 1
            self.mesh.turn(0)
            self._attending -= 1
        self.check()

    async def catch_up(self) -> None:
        """Wait until the thread has acted on what has arrived."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self.mesh.run(lambda: post(loop, settle, future, None, None))
        await future

    # --- the end ---------------------------------------------------------------------------

    def said(self, why: str) -> str:
        """A reason, with the group that it concerns."""
        return f"group {self.name!r}: {why}"

    def on_end(self, stop: Callable[[], None]) -> None:
        """Call ``stop`` when the group ends."""
        with self._lock:
            if self.over is None:
                self._stops.append(stop)
                return
        stop()

    def end(self, ended: Ended) -> None:
        """End the group here, and tell the others (GRP-5). Any thread; idempotent."""
        with self._lock:
            if self.over is not None:
                return
            self.over = ended
            body = msgpack.packb((ended.closed, ended.why))
            self.mesh.send(self.others, Frame(END, 0, 0, body))
            idle = [each for each in self._operations.values() if not each.running]
            for operation in idle:
                operation.running = True
            stops, self._stops = self._stops, []
        for stop in stops:
            stop()
        for operation in idle:
            operation.steps.close()
            self._finish(operation, None, ended.error())
        with self._news:
            self._news.notify_all()
        self.mesh.close()
        self._on_end()

    # --- on the thread, or on the loop that reads ----------------------------------------------

    @override
    def received(self, rank: int, frame: Frame) -> None:
        kind, lane, number, body = frame
        if kind == END:
            closed, why = msgpack.unpackb(body)
            self.end(Ended(bool(closed), str(why)))
            return
        if kind == STORE:
            key, value = msgpack.unpackb(body)
            with self._news:
                self._stored[str(key)] = bytes(value)
                self._news.notify_all()
            return
        if kind == TURN:
            self._turns.append((lane, number))
            return
        if kind == COLLECTIVE:
            key = (COLLECTIVE, -1, lane, number)
        else:
            key = (TO_SENDER if kind == TO_RECEIVER else TO_RECEIVER, rank, lane, number)
        with self._lock:
            self._arrived.setdefault(key, {}).setdefault(rank, []).append(body)
            operation = self._operations.get(key)
            if operation is not None and self._claim(operation):
                # Not now: its thread may be in the middle of a frame.
                here = operation.light and not self.mesh.on_thread
                (self._ready_here if here else self._ready).append(operation)

    @override
    def lost(self, rank: int, why: str) -> None:
        text = why if rank < 0 else f"{self.label(rank)} is gone: {why}"
        self.end(Ended(closed=False, why=self.said(text)))

    @override
    def deadline(self) -> float | None:
        if not self._deadlines:
            return None
        with self._lock:
            while self._deadlines and not self._is_late(self._deadlines[0][2]):
                heapq.heappop(self._deadlines)
            if not self._deadlines:
                return None
            return max(0.0, self._deadlines[0][0] - time.monotonic())

    def _is_late(self, operation: _Operation) -> bool:
        """Whether an operation goes on and somebody waits for it. Under the lock."""
        there = self._operations.get(operation.key) is operation
        return there and not operation.future.cancelled()

    @override
    def due(self) -> None:
        if self._attending:
            return
        self._advance_ready()
        if not self._deadlines or self.deadline() != 0.0:
            return
        with self._lock:
            if not self._deadlines:
                return
            _, _, operation = self._deadlines[0]
            arrived = self._arrived.get(operation.key, {})
            late = [other for other in operation.others if not arrived.get(other)]
            if not operation.waiting:
                late = []
        missing = ", ".join(map(self.label, late)) or "its transfers"
        why = f"{operation.name} timed out on rank {self.rank}, waiting for {missing}"
        self.end(Ended(closed=False, why=self.said(why)))

    @override
    def due_here(self) -> None:
        while self._ready_here:
            self._advance(self._ready_here.popleft())
        if self._ready or self._turns:
            self.mesh.wake()

    def _advance_ready(self) -> None:
        """Go on with what was claimed, in that order: backends take calls as they come."""
        while True:
            if self._turns:
                self._told(self._turns.popleft())
                continue
            try:
                operation = self._ready.popleft()
            except IndexError:
                return
            self._advance(operation)

    # --- turns -----------------------------------------------------------------------------

    def on_turn(self, told: Callable[[tuple[int, int]], None]) -> None:
        """Call ``told``, on the thread, with the lane and number that `tell_turn` was given."""
        self._told = told

    def tell_turn(self, key: tuple[int, int]) -> None:
        """Tell all others that the operation of this lane and number is next."""
        self.mesh.send(self.others, Frame(TURN, *key, b""))

    # --- the store -------------------------------------------------------------------------

    def store(self, key: str, value: bytes, to: Sequence[int] | None = None) -> None:
        """Tell a value to some members, or to all."""
        with self._news:
            self._stored[key] = value
            self._news.notify_all()
        ranks = self.others if to is None else to
        self.mesh.send(ranks, Frame(STORE, 0, 0, msgpack.packb((key, value))))

    def has_stored(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        with self._news:
            return all(key in self._stored for key in keys)

    def stored(self, keys: Sequence[str], timeout: float | None) -> list[bytes]:
        """The values of keys, once all are there. Blocks; not on the mesh's thread.

        Raises:
            TimeoutError: One did not come in time.
            GroupError: The group has ended.
        """
        with self._news:
            self._news.wait_for(
                lambda: self.over is not None or all(key in self._stored for key in keys), timeout
            )
            self.check()
            missing = [key for key in keys if key not in self._stored]
            if missing:
                raise TimeoutError(f"group {self.name!r}: {missing[0]!r} did not come")
            return [self._stored[key] for key in keys]
