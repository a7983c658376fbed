"""The counting core against a model of ten lines: holders, and who has what."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiordt._errors import ProtocolViolationError
from aiordt._refcount import Freed, Held, Released, State, step

HOLDERS = st.integers(0, 6)
STORAGES = st.frozensets(st.integers(0, 8), max_size=5)


class Counting(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state: State[int] = State()
        self.model: dict[int, frozenset[int]] = {}

    def in_use(self) -> set[int]:
        return {storage for storages in self.model.values() for storage in storages}

    @rule(holder=HOLDERS, storages=STORAGES)
    def hold(self, holder: int, storages: frozenset[int]) -> None:
        if holder in self.model:
            self.refused(Held(holder, storages))
            return
        assert step(self.state, Held(holder, storages)) == []
        self.model[holder] = storages

    @rule(holder=HOLDERS)
    def release(self, holder: int) -> None:
        if holder not in self.model:
            self.refused(Released(holder))
            return
        before = self.in_use()
        del self.model[holder]
        freed = step(self.state, Released(holder))
        wanted = [Freed(storage) for storage in before - self.in_use()]
        assert Counter(freed) == Counter(wanted), "CNT-2: each freed storage once, no other"

    def refused(self, event: Held | Released) -> None:
        before = copy.deepcopy(self.state)
        with pytest.raises(ProtocolViolationError):
            step(self.state, event)
        assert self.state == before, "CNT-3: an illegal event leaves the state unchanged"

    @invariant()
    def held_as_the_model_says(self) -> None:
        assert set(self.state.counts) == self.in_use(), "CNT-1"
        assert set(self.state.holders) == set(self.model)
        assert all(count > 0 for count in self.state.counts.values())


TestCounting = Counting.TestCase
TestCounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_storage_is_free_when_its_last_holder_is_gone() -> None:  # CNT-1, CNT-2
    state: State[str] = State()
    step(state, Held("lease", frozenset({"a", "b"})))
    step(state, Held("transfer", frozenset({"a"})))
    assert step(state, Released("lease")) == [Freed("b")]
    assert step(state, Released("transfer")) == [Freed("a")]
    assert state == State(), "nothing is left behind"


def test_illegal_events_say_who(  # CNT-3
) -> None:
    state: State[str] = State()
    step(state, Held("lease-7", frozenset({"a"})))
    with pytest.raises(ProtocolViolationError, match="'lease-7' already holds"):
        step(state, Held("lease-7", frozenset({"b"})))
    with pytest.raises(ProtocolViolationError, match="'lease-8' does not hold"):
        step(state, Released("lease-8"))
    assert state.counts == {"a": 1}
