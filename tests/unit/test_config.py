"""Settings: one frozen object, from the environment and `configure`, refused when wrong."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

import aiordt
from aiordt import _config
from aiordt._config import TRANSPORTS, Config, from_environment
from aiordt._errors import InvalidTypeError, InvalidValueError


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the test's own; this process's are put back afterwards."""
    monkeypatch.setattr(_config, "_settings", _config._Settings())
    for field in dataclasses.fields(Config):
        monkeypatch.delenv(f"AIORDT_{field.name.upper()}", raising=False)


def test_defaults_are_those_of_the_design() -> None:
    config = Config()
    assert config.inline_nbytes == 16 << 10
    assert config.inline_result_nbytes == 64 << 10
    assert config.transports == TRANSPORTS == ("shm", "cma", "nixl", "tcp", "ucx", "mpi")
    assert from_environment({}) == config == aiordt.Config()


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().inline_nbytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"inline_nbytes": -1}, InvalidValueError, "inline_nbytes must be at least 0, not -1"),
        ({"max_in_flight_bytes": 0}, InvalidValueError, "at least 1"),
        ({"tcp_streams": 0}, InvalidValueError, "tcp_streams"),
        ({"item_seconds": 0}, InvalidValueError, "item_seconds"),
        ({"pool_nbytes": 1.5}, InvalidTypeError, "pool_nbytes must be an int, not 1.5"),
        ({"inline_nbytes": True}, InvalidTypeError, "not True"),
        ({"inline_nbytes": "1"}, InvalidTypeError, "not '1'"),
        ({"checksums": 1}, InvalidTypeError, "checksums must be a bool, not 1"),
        ({"transports": "tcp"}, InvalidTypeError, "sequence of str"),
        ({"transports": [1]}, InvalidTypeError, "sequence of str"),
        ({"transports": ()}, InvalidValueError, "at least one"),
        ({"transports": ("tcp", "carrier pigeon")}, InvalidValueError, "cma"),
    ],
)
def test_wrong_values_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Config(**options)
    with pytest.raises(error, match=words):
        aiordt.configure(**options)
    assert _config.take() == Config(), "what was refused left nothing behind"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_every_setting_has_its_variable(field: str) -> None:
    others: dict[str, Any] = {"transports": ("tcp, cma", ("tcp", "cma")), "checksums": ("1", True)}
    text, value = others.get(field, ("7", 7))
    config = from_environment(
        {f"AIORDT_{field.upper()}": text, "OTHER_NBYTES": "x", "AIORDT_MPI_WORLD": "t:0:2"}
    )
    assert config == dataclasses.replace(Config(), **{field: value})


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("AIORDT_INLINE", "1", "AIORDT_INLINE: no such setting"),
        ("AIORDT_INLINE_NBYTES", "many", "AIORDT_INLINE_NBYTES='many' is not an integer"),
        ("AIORDT_INLINE_NBYTES", "-1", "at least 0"),
        ("AIORDT_TRANSPORTS", "", "at least one"),
        ("AIORDT_CHECKSUMS", "yes", "AIORDT_CHECKSUMS='yes' is neither 0 nor 1"),
    ],
)
def test_wrong_variables_are_refused_by_name(variable: str, text: str, words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        from_environment({variable: text})


def test_checksums_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_environment({"AIORDT_CHECKSUMS": "0"}) == Config()
    monkeypatch.setitem(sys.modules, "xxhash", None)  # as if it were not installed
    with pytest.raises(InvalidValueError, match=r"pip install aiordt\[checksums\]"):
        aiordt.configure(checksums=True)
    assert _config.take() == Config()


def test_configure_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIORDT_INLINE_NBYTES", "5")
    monkeypatch.setenv("AIORDT_TCP_STREAMS", "3")
    aiordt.configure(inline_nbytes=6)
    aiordt.configure(pool_nbytes=0)
    assert _config.take() == Config(inline_nbytes=6, tcp_streams=3, pool_nbytes=0)


def test_unknown_settings_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidValueError, match=r"no such setting: inline; .*'inline_nbytes'"):
        aiordt.configure(inline=3)


def test_configure_is_refused_once_the_settings_are_taken() -> None:
    aiordt.configure(inline_nbytes=1)
    assert _config.take().inline_nbytes == 1
    with pytest.raises(aiordt.UsageError, match="too late"):
        aiordt.configure(inline_nbytes=2)
    _config.release()
    aiordt.configure(inline_nbytes=2)
    assert _config.take().inline_nbytes == 2
