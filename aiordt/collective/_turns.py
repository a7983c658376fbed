"""Backends that must see the operations of a group in the same order on all members."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from aiordt.collective._call import Mover
from aiordt.collective._engine import UNTAGGED
from aiordt.collective._steps import Pending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.collective._call import Buffers, Call
    from aiordt.collective._engine import Engine
    from aiordt.collective._steps import Steps


class _Turns:
    """Who may use a process group: operations have it to themselves, in one order on all members.

    Those of a call without a tag are in order by themselves. With tags, the order in which the
    members are ready may differ, so rank 0 says it.
    """

    def __init__(self, engine: Engine, *, agreed: bool) -> None:
        self._engine = engine
        self._agreed = agreed
        self._order: deque[tuple[int, int]] = deque()
        self._waiting: dict[tuple[int, int], Pending] = {}
        self._busy = False
        if agreed:
            engine.on_turn(self._told)

    def take(self, key: tuple[int, int]) -> Steps:
        """Wait for an operation's turn. On the group's thread, as all of this."""
        pending = self._waiting[key] = Pending()
        if not self._agreed or self._engine.rank == 0:
            self._order.append(key)
        if self._agreed and self._engine.rank == 0:
            self._engine.tell_turn(key)
        self._next()
        yield pending

    def _told(self, key: tuple[int, int]) -> None:
        self._order.append(key)
        self._next()

    def _next(self) -> None:
        if not self._busy and self._order and self._order[0] in self._waiting:
            self._busy = True
            self._waiting.pop(self._order.popleft()).finish()

    def leave(self) -> None:
        """The operation whose turn it is has ended."""
        self._busy = False
        self._next()


class TurnMover(Mover):
    """Has a group of the backend's for calls without tags, and one for those with.

    Operations on either have it to themselves, one after the other.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turns = {
            False: _Turns(engine, agreed=False),
            True: _Turns(engine, agreed=True),
        }

    @abstractmethod
    def _group(self, *, tagged: bool) -> Steps:
        """The backend's group, made if need be."""

    @abstractmethod
    def _move(self, call: Call, each: Buffers, group: Any) -> Steps:  # noqa: ANN401
        """Fill the ``out`` of a unit that is not empty."""

    @override
    def move(
        self, call: Call, buffers: Sequence[Buffers], announced: Sequence[memoryview]
    ) -> Steps:
        turns = self._turns[call.lane != UNTAGGED]
        yield from turns.take((call.lane, call.number))
        try:
            group = yield from self._group(tagged=call.lane != UNTAGGED)
            for each in buffers:
                if each.unit.numel:
                    yield from self._move(call, each, group)
        finally:
            turns.leave()
