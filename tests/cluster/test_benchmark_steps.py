"""Benchmarks that need no cluster of their own, as small as they can be."""

from __future__ import annotations

import shutil

import pytest

from aiordt._types import MIB
from benchmarks import crowd, overhead
from benchmarks._figures import Figures


def test_a_small_crowd(cluster: None) -> None:
    settings = crowd.Settings.choose(quick=True, consumers=2, nbytes=MIB, only=("cma",))
    figures = Figures("crowd", {})
    crowd.measure(settings, "cma", figures)
    names = {row.name for row in figures.rows}
    assert names == {crowd.ALONE, crowd.BESIDE, crowd.AMONG, crowd.LARGE}
    crowd.judge(figures)
    assert [goal.goal for goal in figures.goals] == ["p99 ≤ 50 ms"] * 2


def test_each_step_is_timed(cluster: None) -> None:
    samples = overhead.measure(overhead.Settings(rounds=1, steps=3, count=False))
    assert {len(some) for some in samples.values()} == {1}
    named = [name for names in overhead._GROUPS.values() for name in names]
    assert sorted(samples) == sorted(named)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_are_counted() -> None:
    few, many = (overhead.instructions(f"sum(range({number}))") for number in (10, 1000))
    assert 0 < few < many


@pytest.mark.parametrize("wrong", [{"consumers": -1}, {"nbytes": -1}, {"only": ("smoke",)}])
def test_a_crowd_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no such transport|must be a consumer"):
        crowd.Settings.choose(quick=True, **wrong)  # type: ignore[arg-type]
