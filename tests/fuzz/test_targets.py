"""The fuzz targets hold for real bytes, and for some that hypothesis makes of them."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiordt import _wire
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True, scope="module")
def _network() -> Iterator[None]:
    yield
    targets.Harness.end()


def run_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_real_bytes(name: str) -> None:
    run_seeds(name)


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed of which a part was put in another place's stead, altered, or left out."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 8)))
        data[start:stop] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_altered_bytes(name: str) -> None:  # WIRE-2, AUTH-1, RPC-2
    target = TARGETS[name]

    @settings(max_examples=150)
    @given(mutated(target.seeds) | st.binary(max_size=300))
    def run(data: bytes) -> None:
        target.run(data)

    run()


# --- the targets can fail -----------------------------------------------------------------------


def _forgotten(*_: object) -> None:
    raise KeyError("a bug")


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "bug"),
    [
        ("decode", _wire, "_checked_ids", _forgotten),
        ("handshake", _wire, "unpack_hello", _forgotten),
        ("client", _wire, "unpack_challenge", _forgotten),
        ("connection", _wire, "decode", _forgotten),
    ],
)
def test_a_bug_is_found(
    name: str,
    owner: object,
    attribute: str,
    bug: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, attribute, bug)
    if name == "decode":
        monkeypatch.setattr(targets, "_DECODERS", (_wire.decode,))
    with pytest.raises((KeyError, AssertionError, BaseExceptionGroup)):
        run_seeds(name)


def test_a_stranger_who_is_let_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:  # AUTH-1
    monkeypatch.setattr(hmac, "compare_digest", lambda *_: True)
    with pytest.raises(AssertionError):
        run_seeds("handshake")
