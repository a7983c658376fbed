"""Who holds which storage: the pure core of a tensor's lifetime.

Events go in, effects come out; nothing here waits, locks, or knows tensors, Ray or time.

A *holder* is anything that keeps storages in use: a lease (counted by Ray over the cluster),
an export that is still being made, a transfer that this process serves. A *storage* is free
when no holder has it.

Invariants:
    CNT-1  A storage is held exactly while at least one of its holders has not released.
    CNT-2  `Freed` is emitted once for each time that a storage becomes free.
    CNT-3  An illegal event raises and leaves the state unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeAlias, TypeVar

from aiordt._errors import ProtocolViolationError

Holder: TypeAlias = Hashable
S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Held(Generic[S]):
    """Event: ``holder`` took all of ``storages``."""

    holder: Holder
    storages: frozenset[S]


@dataclass(frozen=True, slots=True)
class Released:
    """Event: ``holder`` let go of everything it held."""

    holder: Holder


@dataclass(frozen=True, slots=True)
class Freed(Generic[S]):
    """Effect: nobody holds ``storage`` any more."""

    storage: S


@dataclass(slots=True)
class State(Generic[S]):
    """Holders and counts. Change it only through `step`."""

    holders: dict[Holder, frozenset[S]] = field(default_factory=dict)
    counts: dict[S, int] = field(default_factory=dict)


def _held(state: State[S], event: Held[S]) -> list[Freed[S]]:
    state.holders[event.holder] = event.storages
    for storage in event.storages:
        state.counts[storage] = state.counts.get(storage, 0) + 1
    return []


def _released(state: State[S], event: Released) -> list[Freed[S]]:
    freed = []
    for storage in state.holders.pop(event.holder):
        state.counts[storage] -= 1
        if not state.counts[storage]:
            del state.counts[storage]
            freed.append(Freed(storage))
    return freed


# (event, the holder is known) -> what happens; a pair that is missing is illegal.
_TABLE: Final[dict[tuple[type, bool], Callable[[Any, Any], list[Any]]]] = {
    (Held, False): _held,
    (Released, True): _released,
}


def step(state: State[S], event: Held[S] | Released) -> list[Freed[S]]:
    """Apply one event.

    Returns:
        What the caller must do.

    Raises:
        ProtocolViolationError: The event is illegal here; ``state`` is unchanged (CNT-3).

    Cost:
        O(storages of the event).
    """
    handler = _TABLE.get((type(event), event.holder in state.holders))
    if handler is None:
        known = "already holds" if isinstance(event, Held) else "does not hold"
        raise ProtocolViolationError(f"holder {event.holder!r} {known} storages")
    return handler(state, event)
