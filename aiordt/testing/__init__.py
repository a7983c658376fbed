"""Tools to test aiordt itself, transports for it, and programs that use it.

* `check_transport` checks every promise of a `aiordt.abc.Link`, and `check_huge_part` the one
  about more than 4 GiB; a `Pair` is what they are given, and `process_pairs` makes pairs for
  aiordt's transports and for yours.
* `at_phase`, `record_phases`, `cancel_from_anywhere` and `cancel_randomly` strike at exact
  points of a transfer, and at random ones; `strike_at_phase` kills or stops an actor there.
* `FakeDevice` queues the work that makes tensors, and finishes it when the test says so.
* `FaultyTransport` lets what this process reads fail, stand still or be late, by a `FaultPlan`;
  `faults_in` does so in an actor.
* `TcpProxy` stands between two processes, and stalls, ends, breaks or garbles what they say.
* `check_leaks` and `Leaks` list what was left behind.
* `eventually` and `wait_until` wait for a condition, with a deadline.
"""

from __future__ import annotations

from aiordt.testing._conformance import check_transport
from aiordt.testing._device import FakeDevice
from aiordt.testing._faults import ActorFaults, FaultPlan, FaultyTransport, faults_in
from aiordt.testing._huge import check_huge_part
from aiordt.testing._leaks import Leaks, check_leaks
from aiordt.testing._pair import Exported, MakePair, Pair
from aiordt.testing._phases import (
    Phases,
    at_phase,
    cancel_from_anywhere,
    cancel_randomly,
    record_phases,
    strike_at_phase,
)
from aiordt.testing._polling import eventually, wait_until
from aiordt.testing._process import ServingProcess, process_pairs
from aiordt.testing._proxy import TcpProxy

__all__ = [
    "ActorFaults",
    "Exported",
    "FakeDevice",
    "FaultPlan",
    "FaultyTransport",
    "Leaks",
    "MakePair",
    "Pair",
    "Phases",
    "ServingProcess",
    "TcpProxy",
    "at_phase",
    "cancel_from_anywhere",
    "cancel_randomly",
    "check_huge_part",
    "check_leaks",
    "check_transport",
    "eventually",
    "faults_in",
    "process_pairs",
    "record_phases",
    "strike_at_phase",
    "wait_until",
]
