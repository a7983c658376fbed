"""The simulator of `benchmarks flow`: bytes and times of cases that are counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from aiordt.flow import GroupPolicy
from benchmarks._flow_simulator import Machine, Program, RayLike, Simulation, optimum

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nodes", "slots", "maps", "reducers", "mebibytes"),
    [
        (3, 4, 12, 4, 32),  # 2 x 4 for the broadcast, 3 x 8 pieces
        (3, 4, 24, 4, 56),
        (3, 4, 12, 8, 56),  # two nodes of reducers
        (3, 4, 6, 4, 10),  # 4 and 2 maps
        (1, 4, 9, 2, 0),
    ],
)
def test_group_placement_crosses_the_least(
    nodes: int, slots: int, maps: int, reducers: int, mebibytes: int
) -> None:
    program = Program(maps=maps, reducers=reducers, nbytes=4 * MIB, piece=MIB, batches=3)
    assert optimum(nodes, slots, program) == mebibytes * MIB
    machine = Machine(nodes=nodes, slots=slots)
    found = Simulation(machine, GroupPolicy(), actors_first=False).run(program)
    assert found.crossed == mebibytes * MIB
    assert len(found.latencies) == 3


def test_actors_that_are_spread_cost_what_they_must() -> None:
    """By hand: the broadcast, and of each round's 12 pieces 8 to each of three nodes."""
    program = Program(maps=12, reducers=4, nbytes=4 * MIB, piece=MIB, batches=3)
    found = Simulation(Machine(nodes=3, slots=4), RayLike(1), actors_first=True).run(program)
    assert found.crossed == (2 * 4 + 3 * 3 * 8) * MIB


def test_times_are_those_of_links_and_work() -> None:
    machine = Machine(nodes=2, slots=1, bandwidth=1e6, latency=0.5, call=1.0, rate=1e12)
    program = Program(maps=2, reducers=1, nbytes=1_000_000, piece=1_000_000, batches=1)
    found = Simulation(machine, GroupPolicy(), actors_first=False).run(program)
    # Broadcast 1; it crosses 1.5, map 1; map 1; cut 1; a piece crosses 1.5; reduce 1.
    assert found.latencies == [pytest.approx(8.0, abs=1e-3)]
    slow = dataclasses.replace(machine, fabric=5e5)
    found = Simulation(slow, GroupPolicy(), actors_first=False).run(program)
    assert found.latencies == [pytest.approx(10.0, abs=1e-3)]
    quick = dataclasses.replace(machine, burst=250_000)  # of each crossing, when it was idle
    found = Simulation(quick, GroupPolicy(), actors_first=False).run(program)
    assert found.latencies == [pytest.approx(7.5, abs=1e-3)]


def test_what_is_too_small_for_the_relay_crosses_for_each_who_uses_it() -> None:
    program = Program(maps=12, reducers=4, nbytes=4 * MIB, piece=MIB, batches=3)
    machine = Machine(nodes=3, slots=4, relayed=MIB + 1)
    found = Simulation(machine, GroupPolicy(), actors_first=False).run(program)
    # The broadcast to two nodes, once; of each round's 12 pieces 8 to each of four reducers.
    assert found.crossed == (2 * 4 + 3 * 4 * 8) * MIB
