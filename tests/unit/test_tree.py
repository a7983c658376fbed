"""Finding tensors anywhere in a value, and putting something else in their places."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from typing_extensions import override

from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._tree import Flat, TensorDictRefs, match


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@dataclass(frozen=True)
class Mark:
    """Stands in the place of a tensor, as a ref does."""

    number: int


def is_mark(value: object) -> bool:
    return isinstance(value, Mark)


def marked(tree: Any) -> tuple[Any, list[torch.Tensor]]:
    """The tree with marks in the places of its tensors, and the tensors."""
    flat = Flat(tree, is_tensor)
    return flat.rebuild([Mark(number) for number in range(len(flat.leaves))]), flat.leaves


def restored(tree: Any, tensors: list[torch.Tensor]) -> Any:
    flat = Flat(tree, is_mark)
    return flat.rebuild([tensors[mark.number] for mark in flat.leaves])


A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


# --- containers ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any = None


class Attributed(dict[str, Any]):
    """A dict with state of its own."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.note = note


class Stack(list[Any]):
    """A list with state of its own."""

    name = ""


@dataclass
class Plain:
    tensor: Any
    name: str = "plain"


@dataclass(frozen=True)
class Frozen:
    tensor: Any
    name: str = "frozen"


@dataclass(frozen=True, slots=True)
class Slotted:
    tensor: Any
    name: str = "slotted"


@dataclass
class Derived:
    tensor: Any
    norm: Any = field(init=False)

    def __post_init__(self) -> None:
        runs_of_post_init.append(type(self).__name__)
        self.norm = self.tensor * 2


@dataclass
class Keyed:
    key: dataclasses.InitVar[str]
    tensor: Any

    def __post_init__(self, key: str) -> None:
        runs_of_post_init.append(key)


runs_of_post_init: list[str] = []


def attributed() -> Attributed:
    made = Attributed("note")
    made["a"] = A
    return made


def stack() -> Stack:
    made = Stack([A, 1])
    made.name = "stack"
    return made


def with_attribute() -> Plain:
    made = Plain(1)
    made.extra = A  # type: ignore[attr-defined]
    return made


def default_dict() -> Any:
    made: Any = collections.defaultdict(list)
    made["a"] = [A]
    return made


CONTAINERS: dict[str, tuple[Any, Any]] = {  # name -> (tree, the same with marks)
    "tensor": (A, Mark(0)),
    "dict": ({"a": A, 2: 3}, {"a": Mark(0), 2: 3}),
    "list": ([1, A, [B]], [1, Mark(0), [Mark(1)]]),
    "tuple": ((A, "x", (B,)), (Mark(0), "x", (Mark(1),))),
    "set": ({A}, {Mark(0)}),
    "frozenset": (frozenset({A, 1}), frozenset({Mark(0), 1})),
    "namedtuple": (Pair(A, right=[B]), Pair(Mark(0), right=[Mark(1)])),
    "OrderedDict": (
        collections.OrderedDict([("z", A), ("a", B)]),
        collections.OrderedDict([("z", Mark(0)), ("a", Mark(1))]),
    ),
    "defaultdict": (default_dict(), collections.defaultdict(list, a=[Mark(0)])),
    "dataclass": (Plain(A), Plain(Mark(0))),
    "frozen dataclass": (Frozen([A]), Frozen([Mark(0)])),
    "slotted dataclass": (Slotted({"a": A}), Slotted({"a": Mark(0)})),
    "counter": (collections.Counter({"a": 1}), collections.Counter({"a": 1})),
    "deque": (collections.deque([A, 1], maxlen=5), collections.deque([Mark(0), 1], maxlen=5)),
    "namespace": (types.SimpleNamespace(a=[A]), types.SimpleNamespace(a=[Mark(0)])),
    "nested": (
        {"a": [(A, {"b": Plain(B)})], "c": Pair(C)},
        {"a": [(Mark(0), {"b": Plain(Mark(1))})], "c": Pair(Mark(2))},
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_keep_their_kind(name: str) -> None:
    tree, wanted = CONTAINERS[name]
    found, tensors = marked(tree)
    assert type(found) is type(wanted)
    assert found == wanted
    again = restored(found, tensors)
    assert type(again) is type(tree)
    assert all(one is other for one, other in zip(marked(again)[1], tensors, strict=True))


def test_containers_are_not_changed_in_place() -> None:
    tree: Any = {"a": [A, {"b": Plain(B)}], "c": attributed()}
    found, _ = marked(tree)
    assert found["a"][1]["b"].tensor == Mark(1)
    assert tree["a"][0] is A
    assert tree["a"][1]["b"].tensor is B
    assert tree["c"]["a"] is A


def test_order_and_default_factory_are_kept() -> None:
    found, _ = marked(collections.OrderedDict([("z", A), ("b", 1), ("a", B)]))
    assert list(found) == ["z", "b", "a"]
    found, _ = marked(default_dict())
    assert found["missing"] == []


def test_subclasses_keep_their_attributes() -> None:
    found, _ = marked(attributed())
    assert (type(found), found.note, found["a"]) == (Attributed, "note", Mark(0))
    found, _ = marked(stack())
    assert (type(found), found.name, list(found)) == (Stack, "stack", [Mark(0), 1])
    found, _ = marked(with_attribute())
    assert (found.tensor, found.extra) == (1, Mark(0))


def test_torchs_own_result_tuples() -> None:
    """``torch.max(t, dim=0)`` and its like are struct sequences, which have their own way."""
    tree = torch.max(torch.arange(6.0).reshape(2, 3), dim=0)
    found, tensors = marked(tree)
    assert type(found) is type(tree)
    assert list(found) == [Mark(0), Mark(1)]
    again = restored(found, tensors)
    assert again.values is tree.values
    assert again.indices is tree.indices


def test_dataclasses_are_rebuilt_without_running_their_code() -> None:
    derived, keyed = Derived(A), Keyed("key", B)
    runs_of_post_init.clear()
    found, tensors = marked([derived, keyed])
    assert runs_of_post_init == []
    assert (found[0].tensor, found[0].norm) == (Mark(0), Mark(1))
    assert tensors[1] is derived.norm
    assert found[1] == dataclasses.replace(found[1], tensor=Mark(2), key="")
    runs_of_post_init.clear()


def test_the_same_leaf_occurs_once() -> None:
    tree = [A, {"again": A}, (B, A)]
    flat = Flat(tree, is_tensor)
    assert [leaf is wanted for leaf, wanted in zip(flat.leaves, [A, B], strict=True)] == [True] * 2
    assert flat.rebuild(["x", "y"]) == ["x", {"again": "x"}, ("y", "x")]
    every = Flat(tree, is_tensor, every=True)
    assert len(every.leaves) == 4
    assert every.rebuild([1, 2, 3, 4]) == [1, {"again": 2}, (3, 4)]


def test_views_of_one_storage_are_different_leaves() -> None:
    assert len(Flat([B, B[:1], B.detach()], is_tensor).leaves) == 3


WITHOUT_TENSORS = [
    None,
    1,
    "text",
    {"a": [1, (2, {3})]},
    Frozen({"a": 1}),
    Pair(1),
    np.arange(5),
    np.array([{"a": 1}, None], dtype=object),
    torch.float32,
    torch.Size([1]),
    torch.device("cpu"),
    collections.deque([1]),
    ValueError("x"),
    int,
    threading.Lock(),
    range(3),
]


@pytest.mark.parametrize("tree", WITHOUT_TENSORS, ids=lambda tree: type(tree).__name__)
def test_what_has_no_tensor_is_untouched(tree: object) -> None:
    flat = Flat(tree, is_tensor)
    assert flat.leaves == []
    assert flat.rebuild([]) is tree


def test_branches_without_tensors_are_shared() -> None:
    branch = {"deep": [1, 2, 3]}
    found, _ = marked({"a": A, "b": branch})
    assert found["b"] is branch


TREES = st.recursive(
    st.one_of(st.integers(), st.none(), st.builds(torch.zeros, st.integers(1, 3))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Plain, inner),
        st.builds(Slotted, inner),
        st.builds(Pair, inner, inner),
        st.builds(lambda item: collections.deque([item]), inner),
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_any_tree_comes_back(tree: Any) -> None:
    found, tensors = marked(tree)
    assert Flat(found, is_tensor).leaves == [], "every tensor was found"
    again = restored(found, tensors)
    assert repr(again) == repr(tree)
    assert [id(leaf) for leaf in Flat(again, is_tensor).leaves] == [id(leaf) for leaf in tensors]


# --- objects ------------------------------------------------------------------------------------


class Thing:
    """An ordinary object."""

    a: Any
    inner: Any
    self: Any

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def test_tensors_in_attributes_are_found() -> None:
    thing = Thing(a=A, inner=Thing(b=[B, "x"]), text="t")
    found, tensors = marked({"thing": thing})
    assert type(found["thing"]) is Thing
    assert (found["thing"].a, found["thing"].inner.b) == (Mark(0), [Mark(1), "x"])
    assert thing.a is A, "the original is left alone"
    again = restored(found, tensors)
    assert again["thing"].inner.b[0] is B


def test_modules_are_found_with_their_sharing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model.tied = model[0].weight
    found, tensors = marked(model)
    assert len(tensors) == len(list(model.parameters())) + len(list(model.buffers()))
    again = restored(found, tensors)
    assert again[0].weight is model[0].weight
    assert again.tied is again[0].weight
    assert type(again[0].weight) is torch.nn.Parameter


def test_object_cycles() -> None:
    thing = Thing(a=A)
    thing.self = thing
    found, _ = marked([thing])
    assert found[0].self is found[0]
    assert found[0].a == Mark(0)


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_container_cycles(kind: str) -> None:
    tree: Any = [A, 1] if kind == "list" else {"a": A}
    tree.append(tree) if kind == "list" else tree.update(self=tree)
    found, tensors = marked(tree)
    assert [leaf is A for leaf in tensors] == [True]
    assert found[2 if kind == "list" else "self"] is found
    assert found[0 if kind == "list" else "a"] == Mark(0)


def test_tensors_in_closures_and_partials() -> None:
    def local() -> Any:
        return A

    found, tensors = marked({"function": local, "partial": functools.partial(len, [B])})
    assert [leaf is wanted for leaf, wanted in zip(tensors, (A, B), strict=True)] == [True] * 2
    assert found["function"]() == Mark(0)
    assert found["partial"].args == ([Mark(1)],)


def test_numpy_arrays_are_not_copied() -> None:
    array = np.arange(1000)
    found, _ = marked(Thing(array=array, tensor=A))
    assert np.shares_memory(found.array, array)
    assert found.array.flags.writeable
    assert found.tensor == Mark(0)


def test_tensors_in_arrays_of_objects() -> None:
    array = np.array([A, None], dtype=object)
    found, _ = marked(array)
    assert list(found) == [Mark(0), None]


class Unpicklable:
    """Holds a lock, which no pickler takes."""

    def __init__(self, **attributes: Any) -> None:
        self.lock = threading.Lock()
        self.__dict__.update(attributes)


def test_an_unpicklable_object_is_untouched_and_hides_nothing() -> None:
    hidden = Unpicklable(tensor=A)
    tree = {"bad": hidden, "good": [B, A]}
    found, tensors = marked(tree)
    assert found["bad"] is hidden
    assert [id(leaf) for leaf in tensors] == [id(B), id(A)]
    assert found["good"] == [Mark(0), Mark(1)]


class Guarded:
    """Makes its state when it is pickled; what is found there lives as long as the tree."""

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"made": torch.full((2,), 7.0)}


def test_tensors_that_are_made_while_pickling() -> None:
    flat = Flat([Guarded(), A], is_tensor)
    assert flat.leaves[0].tolist() == [7.0, 7.0]
    assert flat.rebuild(["x", "y"])[0].made == "x"


def test_other_tensors_pass_by_identity() -> None:
    """Looking for refs, the tensors beside them are not pickled."""
    thing = Thing(mark=Mark(0), tensor=B)
    flat = Flat(thing, is_mark)
    assert flat.rebuild([A]).tensor is B


# --- TensorDict ---------------------------------------------------------------------------------


def test_a_tensordict_becomes_refs_and_again_a_tensordict() -> None:
    inner = TensorDict({"b": torch.ones(3, 4)}, batch_size=[3])
    tree = TensorDict({"a": torch.zeros(3), "inner": inner}, batch_size=[3], names=["time"])
    found, tensors = marked({"td": tree.lock_()})
    refs = found["td"]
    assert isinstance(refs, TensorDictRefs)
    assert refs["a"] == Mark(0)
    assert isinstance(refs["inner"], TensorDictRefs)
    assert (set(refs), len(refs), refs.batch_size) == ({"a", "inner"}, 2, torch.Size([3]))
    again = restored(found, tensors)["td"]
    assert type(again) is TensorDict
    assert again.batch_size == tree.batch_size
    assert again["inner"].batch_size == inner.batch_size
    assert list(again.names) == ["time"]
    assert again.is_locked
    assert bool((again == tree).all())
    assert not restored(*marked(TensorDict({"a": A}))).is_locked


def test_an_empty_tensordict_is_untouched() -> None:
    tree = TensorDict({}, batch_size=[2])
    assert Flat(tree, is_tensor).rebuild([]) is tree


# --- into= --------------------------------------------------------------------------------------


def test_match_pairs_places() -> None:
    tree = {"a": [Mark(0), 1], "b": Plain(Mark(1)), "c": (Mark(0),)}
    like = {"a": [A, None], "b": Plain(B), "c": (C,)}
    found = match(tree, like, is_mark)
    assert [id(tensor) for tensor in found] == [id(A), id(B), id(C)]
    assert match(Mark(0), A, is_mark) == [A]


def test_match_names_the_place_that_is_wrong() -> None:
    tree = {"a": [Mark(0)], "b": Mark(1)}
    with pytest.raises(InvalidTypeError, match=r"into\['b'\] must be a tensor or .*, not int"):
        match(tree, {"a": [A], "b": 1}, is_mark)
    with pytest.raises(InvalidValueError, match=r"into\['a'\] has \['0', '1'\] where"):
        match(tree, {"a": [A, B], "b": C}, is_mark)
    with pytest.raises(InvalidValueError, match="into has"):
        match(tree, [A, B], is_mark)
