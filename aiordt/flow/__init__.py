"""Lazy graphs of broadcasts, maps and reduces, whose groups are placed next to their data."""

from __future__ import annotations

from aiordt.flow._context import Context, release_workers
from aiordt.flow._graph import (
    Broadcast,
    Gather,
    InitActors,
    Map,
    Node,
    ReduceActors,
    Shuffle,
    Source,
    stream,
)
from aiordt.flow._policy import Cluster, Decision, DefaultPolicy, GroupPolicy, Policy, Request

__all__ = [
    "Broadcast",
    "Cluster",
    "Context",
    "Decision",
    "DefaultPolicy",
    "Gather",
    "GroupPolicy",
    "InitActors",
    "Map",
    "Node",
    "Policy",
    "ReduceActors",
    "Request",
    "Shuffle",
    "Source",
    "release_workers",
    "stream",
]
