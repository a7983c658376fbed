"""Where work goes: tables of cases, and properties held against exhaustive search."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiordt.flow._policy import Cluster, DefaultPolicy, GroupPolicy, Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB = 1 << 20
THREE = {"A": 4, "B": 4, "C": 4}


def placed(
    cluster: Cluster,
    count: int,
    *,
    near: Mapping[str, int] | None = None,
    data: Sequence[Mapping[str, int]] | None = None,
    actors: bool = False,
    group: int = 1,
    patience: float = 2.0,
) -> str:
    """The nodes of ``count`` things, as a word; they are begun."""
    request = Request(group, data or [{}] * count, near or {}, actors)
    decisions = GroupPolicy(patience).place(request, cluster)
    for each in decisions:
        assert each.node is not None
        assert each.why
        cluster.begin(group, each.node, actor=actors)
    return "".join(str(each.node) for each in decisions)


@pytest.mark.parametrize(
    ("count", "near", "expected"),
    [
        (3, {"B": 4}, "BBB"),  # packed where the group is
        (6, {"B": 4}, "BBBBAA"),  # full: then where there is the least
        (12, {"B": 4}, "BBBBAAAACCCC"),
        (14, {"B": 4}, "BBBBAAAACCCCBA"),  # all full: evenly
        (24, {"A": 4}, "AAAABBBBCCCC" + "ABC" * 4),
        (4, {"A": 1, "B": 2, "C": 1}, "BBBB"),  # to the most bytes
        (4, {"A": 2, "B": 2, "C": 2}, "AAAA"),  # ties by order
        (6, {"A": 1, "C": 3}, "CCCCAA"),
        (3, {}, "ABC"),  # needs nothing: to the least loaded
        (3, {"gone": 5}, "ABC"),
    ],
)
def test_of_groups(count: int, near: Mapping[str, int], expected: str) -> None:
    assert placed(Cluster(THREE), count, near=near) == expected


@pytest.mark.parametrize(
    ("slots", "count", "near", "expected"),
    [
        # One node that has room for all of them is better than two with more bytes.
        ({"A": 1, "B": 4}, 4, {"A": 9, "B": 1}, "BBBB"),
        # Two nodes are needed: the best two.
        ({"A": 1, "B": 3, "C": 3}, 4, {"A": 9, "B": 1, "C": 2}, "ACCC"),
        ({"A": 1, "B": 3, "C": 3}, 6, {"A": 9, "B": 1, "C": 2}, "CCCBBB"),
    ],
)
def test_actors_go_to_few_nodes(
    slots: Mapping[str, int], count: int, near: Mapping[str, int], expected: str
) -> None:
    assert placed(Cluster(slots), count, near=near, actors=True) == expected


def test_a_group_that_comes_in_parts_goes_on_where_it_is() -> None:
    cluster = Cluster(THREE)
    assert placed(cluster, 5, near={"A": 1}) == "AAAAB"
    assert placed(cluster, 4, near={"A": 1}) == "BBBC"


def test_single_dependencies_stay_where_their_data_is() -> None:
    cluster = Cluster(THREE)
    data = [{"C": 5}, {"A": 1, "B": 2}, {}, {"B": 1}, {"gone": 7}]
    assert placed(cluster, 5, data=data) == "CBABA"


def test_data_does_not_hold_what_would_wait_too_long() -> None:
    """All data on one node: it takes ``patience`` tasks a slot more than others."""
    cluster = Cluster({"A": 2, "B": 2})
    assert placed(cluster, 8, data=[{"A": 1}] * 8, patience=2) == "AAAABBBB"
    assert placed(Cluster({"A": 2, "B": 2}), 8, data=[{"A": 1}] * 8, patience=9) == "A" * 8


def test_what_ended_counts_no_more() -> None:  # PLC-2
    cluster = Cluster(THREE)
    assert placed(cluster, 4, near={"A": 1}) == "AAAA"
    assert placed(cluster, 1, near={"A": 1}) == "B"
    cluster.end(1, "A")
    assert placed(cluster, 1, near={"A": 1}) == "A"
    for node in "AAAAB":
        cluster.end(1, node)
    assert cluster.groups == ()
    assert cluster.least_loaded() == "A"


def test_a_node_that_left_is_not_chosen() -> None:  # PLC-2
    cluster = Cluster(THREE)
    assert placed(cluster, 6, near={"A": 1}) == "AAAABB"
    cluster.leave("A")
    assert placed(cluster, 4, near={"A": 1}, group=2) == "CBCB"
    cluster.end(1, "A")  # comes late
    cluster.join("A", 4)
    assert cluster.tasks("A") == 0
    assert placed(cluster, 2, near={"A": 1}, group=3) == "AA"


def test_actors_do_not_count_as_tasks() -> None:
    cluster = Cluster(THREE)
    placed(cluster, 4, near={"A": 1}, actors=True)
    assert placed(cluster, 2, near={"A": 1}, group=2) == "AA"
    assert placed(cluster, 3, actors=True, group=3) == "BCB"


def test_without_nodes() -> None:
    for policy in (GroupPolicy(), DefaultPolicy()):
        decisions = policy.place(Request(1, [{}, {"A": 1}], {"A": 2}), Cluster())
        assert [each.node for each in decisions] == [None, None]


def test_default_is_blind() -> None:
    cluster = Cluster(THREE)
    decisions = DefaultPolicy().place(Request(1, [{"C": 9}] * 4, {"C": 9}), cluster)
    assert "".join(str(each.node) for each in decisions) == "ABCA"
    actors = DefaultPolicy().place(Request(2, [{}], actors=True), cluster)
    assert actors[0].node is None


_nodes = st.dictionaries(st.sampled_from("ABCDE"), st.integers(1, 4), min_size=1)
_bytes = st.dictionaries(st.sampled_from("ABCDEF"), st.integers(0, 9))


@given(_nodes, _bytes, st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_bytes_to_bring_to_actors_are_near_the_least(
    slots: dict[str, int], near: dict[str, int], count: int
) -> None:
    """Of all ways to place them within slots; each node in use gets everything once."""
    near = {node: n for node, n in near.items() if node in slots and n}
    total = sum(near.values())

    def cost(nodes: set[str]) -> int:
        return sum(total - near.get(node, 0) for node in nodes)

    chosen = placed(Cluster(slots), count, near=near, actors=True)
    counts = {node: chosen.count(node) for node in chosen}
    if count > sum(slots.values()):
        return
    assert all(counts[node] <= slots[node] for node in counts)
    least = min(
        cost(set(nodes))
        for size in range(1, len(slots) + 1)
        for nodes in itertools.combinations(slots, size)
        if sum(slots[node] for node in nodes) >= count
    )
    assert cost(set(counts)) <= max(1.5 * least, least + 1)


_Event: TypeAlias = tuple[str, int, int, dict[str, int], str]
_events = st.lists(
    st.tuples(
        st.sampled_from(["tasks", "actors", "end", "leave", "join"]),
        st.integers(1, 3),
        st.integers(1, 6),
        _bytes,
        st.sampled_from("ABCDE"),
    ),
    max_size=30,
)


@given(_nodes, _events)
@settings(max_examples=200, deadline=None)
def test_any_history(slots: dict[str, int], events: list[_Event]) -> None:
    """Decisions are repeatable (PLC-1), of nodes that are there, and the counts come to zero."""
    clusters = [Cluster(slots), Cluster(slots)]
    running: list[tuple[int, str, bool]] = []
    for kind, group, count, near, node in events:
        if kind in {"tasks", "actors"}:
            words = [
                placed(each, count, near=near, group=group, actors=kind == "actors")
                if each.nodes
                else ""
                for each in clusters
            ]
            assert words[0] == words[1]
            assert set(words[0]) <= set(clusters[0].nodes)
            running += [(group, each, kind == "actors") for each in words[0]]
        elif kind == "end" and running:
            of, where, actor = running.pop(count % len(running))
            for each in clusters:
                each.end(of, where, actor=actor)
        elif kind == "leave":
            running = [entry for entry in running if entry[1] != node]
            for each in clusters:
                each.leave(node)
        elif kind == "join":
            for each in clusters:
                each.join(node, count)
    cluster = clusters[0]
    for node in cluster.nodes:
        tasks = sum(entry[1] == node and not entry[2] for entry in running)
        assert cluster.tasks(node) == tasks
    if cluster.nodes:
        least = cluster.least_loaded()
        assert least is not None
        assert cluster.load(least) == min(map(cluster.load, cluster.nodes))
    for group, where, actor in running:
        cluster.end(group, where, actor=actor)
    assert cluster.groups == ()
