"""Counters of a runtime, and the phase hook that tests use to strike at exact points."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

from aiordt._types import Tally, TransportStats

PhaseHook: TypeAlias = Callable[[str], None]


class Phases:
    """The points of a transfer at which a test may kill, cancel or wait.

    ``hook`` is called with the point's name on the thread that is there; it is ``None``
    except in tests (`aiordt.testing.at_phase`).
    """

    def __init__(self) -> None:
        self.hook: PhaseHook | None = None

    def __call__(self, name: str) -> None:
        """Announce a point."""
        if self.hook is not None:
            self.hook(name)


phase = Phases()


class Counters:
    """What came into this process; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_transport: dict[str, tuple[int, int]] = {}
        self.in_flight = 0

    def started(self, num_tensors: int) -> None:
        """Tensors began to arrive."""
        with self._lock:
            self.in_flight += num_tensors

    def ended(self, num_tensors: int) -> None:
        """... and no longer do, for whatever reason."""
        with self._lock:
            self.in_flight -= num_tensors

    def pulled(self, transport: str, num_tensors: int, nbytes: int) -> None:
        """Tensors arrived whole."""
        with self._lock:
            pulls, total = self._by_transport.get(transport, (0, 0))
            self._by_transport[transport] = (pulls + num_tensors, total + nbytes)

    def by_transport(self) -> Tally:
        """An immutable copy."""
        with self._lock:
            return Tally({name: TransportStats(*pair) for name, pair in self._by_transport.items()})
