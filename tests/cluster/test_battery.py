"""Some trials of the battery; `make battery` runs a thousand, of all faults and transports."""

from __future__ import annotations

from typing import Final

import pytest

from aiordt.transports import probe
from tests.battery import trials
from tests.battery.__main__ import table
from tests.battery.trials import FAULTS, LIMIT_SECONDS, READING, Actors, Trial

CASES = [
    ("kill the owner", "tcp"),
    ("kill the reader", "cma"),
    ("cancel", "shm"),
    ("raise", "tcp"),
    ("restart the owner", "cma"),
    ("many at once", "shm"),
    ("network", "tcp"),
]
#: The network has more ways to fail than others: these seeds choose each of them.
_SEEDS: Final = {"network": range(6)}


@pytest.fixture(scope="module")
def actors(cluster: None) -> Actors:
    return Actors()


@pytest.mark.parametrize(("fault", "transport"), CASES)
async def test_a_trial(actors: Actors, fault: str, transport: str) -> None:
    for seed in _SEEDS.get(fault, range(2)):
        trial = trials.make(seed, (transport,), (fault,))
        await trials.run(trial, actors)
        assert not trial.failed, f"{trial}: {trial.failed}"


def test_a_seed_gives_the_same_trial() -> None:
    every = [trials.make(seed, tuple(READING), tuple(FAULTS)) for seed in range(200)]
    again = [trials.make(seed, tuple(READING), tuple(FAULTS)) for seed in range(200)]
    assert every == again
    assert {trial.fault for trial in every} == set(FAULTS)
    assert all(probe(transport) for transport in {trial.transport for trial in every})


@pytest.mark.parametrize(
    ("outcome", "seconds", "why"),
    [
        ("WRONG DATA", 0.1, "it ended with WRONG DATA"),
        ("HUNG", 15.0, "it ended with HUNG"),
        ("PeerLostError", 0.1, "it ended with PeerLostError"),
        ("data", LIMIT_SECONDS + 1, "it took 11.0 s"),
    ],
)
def test_what_is_wrong_is_said(outcome: str, seconds: float, why: str) -> None:
    trial = Trial(seed=7, fault="cancel", transport="cma", nbytes=8)
    trial.outcome, trial.seconds = outcome, seconds
    trials._expect(trial, "CancelledError", "data")
    assert trial.failed.startswith(why)
    assert "| cancel | cma | 1 | 0 |" in table([trial])
