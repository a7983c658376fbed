"""Every error travels between processes with its facts, and is what its class says."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from ray import cloudpickle

import aiordt
from aiordt import _errors
from aiordt._errors import AiordtError

FACTS: dict[str, dict[str, object]] = {
    "UnavailableError": {"reason": "pip install it", "transport": "nixl"},
    "TransferError": {"transport": "cma", "peer": "pid 7", "nbytes": 1 << 40},
    "ChecksumError": {"transport": "cma", "peer": "pid 7", "nbytes": 5, "overwritten": True},
    "OwnerDiedError": {"owner": "Trainer 12 (pid 7)"},
    "PeerLostError": {"peer": "10.0.0.1:1"},
    "AuthenticationError": {"peer": "10.0.0.1:1"},
}
CLASSES: list[type[AiordtError]] = [
    cls
    for _, cls in inspect.getmembers(_errors, inspect.isclass)
    if issubclass(cls, AiordtError) and cls.__module__ == "aiordt._errors"
]


def make(cls: type[AiordtError]) -> AiordtError:
    return cls("what happened", **FACTS.get(cls.__name__, {}))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_errors_pickle(cls: type[AiordtError], pickler: object, protocol: int) -> None:  # ERR-1
    error = make(cls)
    error.extra = [1, 2]  # type: ignore[attr-defined]
    error.add_note("seen by a test")
    again = pickle.loads(pickler.dumps(error, protocol=protocol))  # type: ignore[attr-defined]
    assert type(again) is cls
    assert str(again) == "what happened"
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert vars(again).items() >= FACTS.get(cls.__name__, {}).items()
    assert again.__notes__ == ["seen by a test"]
    assert str(pickle.loads(pickle.dumps(again))) == "what happened", "and again"


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_copy(cls: type[AiordtError]) -> None:  # ERR-1
    error = make(cls)
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert (type(again), str(again), vars(again)) == (cls, str(error), vars(error))


class _Sub(aiordt.TransferError):
    """What a transport's author makes."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message, transport="mine", peer="p", nbytes=3)
        self.code = code


def test_subclasses_pickle_with_no_help_of_theirs() -> None:  # ERR-1
    again = pickle.loads(pickle.dumps(_Sub("broke", code=7)))
    assert (str(again), again.code, again.nbytes) == ("broke", 7, 3)


def test_errors_pickle_with_cycles() -> None:  # ERR-1
    error = aiordt.ClosedError("over")
    error.me = error  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(error))
    assert again.me is again


def test_the_tree_is_the_documented_one() -> None:
    assert _errors.__doc__ is not None
    lines = _errors.__doc__.split("Hierarchy::")[1].split("Facts are")[0].splitlines()
    documented: dict[str, str] = {}
    path: list[str] = []
    for line in lines:
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ")
        if not words.strip():
            continue
        depth = (len(words) - len(words.lstrip()) - 4) // 4
        name = words.split()[0]
        path[depth:] = [name]
        documented[name] = path[depth - 1] if depth else "Exception"
    actual = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    inner = actual.pop("ProtocolViolationError")
    assert inner == "AiordtError"
    documented.pop("ProtocolViolationError", None)
    assert documented == actual


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (_errors.InvalidValueError, ValueError),
        (_errors.InvalidTypeError, TypeError),
        (_errors.RefPicklingError, pickle.PicklingError),
    ],
)
def test_usage_errors_are_what_python_users_expect(
    cls: type[AiordtError], builtin: type[Exception]
) -> None:
    assert issubclass(cls, aiordt.UsageError)
    assert issubclass(cls, builtin)
