"""Groups of actors, and operations on the tensors of all their members."""

from __future__ import annotations

from aiordt.collective._member import MemberGroup
from aiordt.collective.group import Group, create_group

__all__ = ["Group", "MemberGroup", "create_group"]
