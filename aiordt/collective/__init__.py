"""Groups of actors, and operations on the tensors of all their members."""

from __future__ import annotations

from aiordt.collective._member import MemberGroup
from aiordt.collective.group import Group, create_group
from aiordt.collective.refs import (
    allgather_refs,
    allreduce_refs,
    alltoall_refs,
    broadcast_refs,
    gather_refs,
    reduce_refs,
    reducescatter_refs,
    scatter_refs,
    spawn,
)

__all__ = [
    "Group",
    "MemberGroup",
    "allgather_refs",
    "allreduce_refs",
    "alltoall_refs",
    "broadcast_refs",
    "create_group",
    "gather_refs",
    "reduce_refs",
    "reducescatter_refs",
    "scatter_refs",
    "spawn",
]
