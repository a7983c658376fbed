"""Building graphs: nothing runs, and what does not fit is refused at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import ray

import aiordt
from aiordt import flow as typed_flow
from aiordt.flow._context import _shared_out

flow: Any = typed_flow  # what is refused here, type checkers refuse, too


def one() -> int:
    return 1


class Plain:
    def take(self, *items: Any) -> int:
        return len(items)


def test_graphs_are_built_without_ray() -> None:
    many = flow.Broadcast(one, 4)
    maps = flow.Map(one, (many, [1, 2, 3, 4]), args=[[i] for i in range(4)])
    parts = flow.Shuffle(one, maps, 3)
    actors = flow.InitActors(Plain, 3, args=[[]] * 3, restore="take")
    out = flow.ReduceActors(Plain.take, actors, parts)
    assert [len(node) for node in (many, maps, parts, actors, out)] == [4, 4, 3, 3, 3]
    assert repr(out) == "<flow.ReduceActors(take) x 3>"
    assert out.placements == []
    unknown = flow.Map(one, flow.Source(_numbers()))
    assert "x ?" in repr(unknown)
    with pytest.raises(TypeError, match="once it was evaluated"):
        len(unknown)
    assert not ray.is_initialized() or out.explain()


async def _numbers() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: flow.Broadcast(one, -1), "negative"),
        (lambda: flow.Broadcast(one, 1.5), "int"),
        (lambda: flow.Broadcast(3, 1), "function"),
        (lambda: flow.Broadcast(one, 1, args=5), "args"),
        (lambda: flow.Map(one, 7), "inputs"),
        (lambda: flow.Map(one, "text"), "inputs"),
        (lambda: flow.Map(one, [1, 2], args=[[1]]), "1 for 2"),
        (lambda: flow.Map(one, [1, 2], args=[1, 2]), "list of arguments"),
        (lambda: flow.Map(one, [flow.Source([1])]), "tuple"),
        (lambda: flow.Map(one, (flow.Source([1]), [1, 2])), "differ"),
        (lambda: flow.Map(4, [1]), "function"),
        (lambda: flow.Shuffle(one, [1], -2), "negative"),
        (lambda: flow.InitActors(one, 2), "class"),
        (lambda: flow.InitActors(Plain, 2, args=[[1]]), "1 for 2"),
        (lambda: flow.InitActors(Plain, 2, restore="nothing"), "nothing"),
        (lambda: flow.ReduceActors("take", [Plain()], [1]), "handle"),
        (lambda: flow.ReduceActors("take", flow.Source([1]), [1]), "InitActors"),
        (lambda: flow.ReduceActors(5, flow.InitActors(Plain, 1), [1]), "method"),
        (lambda: flow.Context("near"), "group, default"),
        (lambda: flow.Context(flow.GroupPolicy), "Policy"),  # the class
        (lambda: flow.Context(workers=0), "workers"),
        (lambda: flow.Context(workers=True), "workers"),
        (lambda: flow.Context(max_in_flight=0), "max_in_flight"),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, words: str) -> None:
    with pytest.raises(aiordt.UsageError, match=words):
        build()


def test_workers_are_dealt_out_to_nodes() -> None:
    assert _shared_out({"A": 4, "B": 2, "head": 0}, None) == {"A": 4, "B": 2}
    assert _shared_out({"A": 4, "B": 2, "head": 0}, 3) == {"A": 2, "B": 1}
    assert _shared_out({"A": 1, "B": 3}, 4) == {"A": 1, "B": 3}
    assert _shared_out({"A": 1, "B": 3, "C": 1}, 4) == {"A": 1, "B": 2, "C": 1}
    assert _shared_out({"A": 2, "B": 2}, 1) == {"A": 1}
    assert _shared_out({}, None) == {}


def test_what_is_run() -> None:
    names = [flow.Map(each, [1]) for each in (one, ray.remote(one), len, partial(one), Plain)]
    assert [repr(each) for each in names] == [
        "<flow.Map(one) x 1>",
        "<flow.Map(one) x 1>",
        "<flow.Map(len) x 1>",
        "<flow.Map(partial) x 1>",
        "<flow.Map(Plain) x 1>",
    ]
