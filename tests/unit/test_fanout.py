"""Who gets an export from whom: properties of the tree, however hosts come and go."""

from __future__ import annotations

from collections import Counter
from math import log2
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from aiordt._fanout import WIDTH, Plan

MEMBERS = st.integers(0, 9)
STEPS = st.one_of(
    st.tuples(st.just("join"), MEMBERS),
    st.tuples(st.just("failed"), MEMBERS),
    st.tuples(st.just("leave"), MEMBERS),
)


def way(plan: Plan[int], member: int) -> list[int]:
    """Everybody on the way from a member to the owner, or to somebody who has left."""
    found = [member]
    place = plan.places[member]
    while place.parent is not None and place.parent in plan.places:
        found.append(place.parent)
        assert len(found) <= len(plan.places), "FAN-1: round and round"
        place = plan.places[place.parent]
    return found


#: A member that comes back has children from before.
BACK = [("join", 0), ("leave", 0), ("join", 0), ("join", 2), ("leave", 0)]
BACK += [("join", member) for member in (0, 1, 3)]


@example(BACK)
@given(st.lists(STEPS, max_size=80))
def test_every_way_leads_to_the_owner(steps: list[Any]) -> None:
    """FAN-1, FAN-2: with members that leave, and members whose parent failed."""
    plan: Plan[int] = Plan()
    failed: dict[int, set[int]] = {}
    for what, member in steps:
        if what == "join" and member not in plan.places:
            plan.join(member)
        elif what == "leave":
            plan.leave(member)
            failed.pop(member, None)
        elif what == "failed" and member in plan.places:
            parent = plan.places[member].parent
            if parent is None:
                continue
            failed.setdefault(member, set()).add(parent)
            assert plan.join(member, failed[member]).parent not in failed[member]
        for each in plan.places:
            way(plan, each)
        children = Counter(place.parent for place in plan.places.values())
        assert all(count <= WIDTH for parent, count in children.items() if parent is not None)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 100])
def test_the_owner_sends_twice(count: int) -> None:
    """FAN-2, FAN-3."""
    plan: Plan[int] = Plan()
    for member in range(count):
        plan.join(member)
    children = Counter(place.parent for place in plan.places.values())
    assert children[None] <= 2
    assert max(children.values()) <= WIDTH
    assert max(place.depth for place in plan.places.values()) <= log2(count + 2)
    for member in range(count):
        assert len(way(plan, member)) == plan.places[member].depth


@given(st.permutations(range(16)))
def test_those_who_lost_their_parent_find_another(order: list[int]) -> None:
    """FAN-2: what was sent to one that died was sent; the owner serves whom nobody else can."""
    plan: Plan[int] = Plan()
    sent: Counter[int | None] = Counter(plan.join(member).parent for member in range(16))
    for dead in order[:8]:
        orphans = [member for member, place in plan.places.items() if place.parent == dead]
        plan.leave(dead)
        for orphan in orphans:
            others = set(plan.places) - {orphan}
            free = [each for each in others if sent[each] < WIDTH and orphan not in way(plan, each)]
            parent = plan.join(orphan, [dead]).parent
            if parent is None:
                assert sent[None] < WIDTH or not free
            else:
                assert parent in free
            sent[parent] += 1
    assert len(plan.places) == 8
