"""One Ray cluster for all tests that need one, with out-of-band refs forbidden."""

from __future__ import annotations

import gc
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest
import ray

from tests import worker
from tests.support import ACROSS, Node, clean

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parent.parent
# The same examples in each run, however slow the machine; `make explore` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("repeatable")
# Read by Ray at import in every process: pickling a ref outside Ray's count is an error.
os.environ["RAY_allow_out_of_band_object_ref_serialization"] = "0"


def pytest_collection_finish() -> None:
    """What is there by now is not looked through at each ``gc.collect()``: that took 0.15 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine, with room for many small actors.

    Workers inherit its environment: with a runtime environment of their own they could not be
    started ahead. To import torch takes each of them 2 s.
    """
    if ACROSS:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)  # that of the two hosts
        yield
        ray.shutdown()
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        for name, value in worker.environment().items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=4,  # our actors ask for none
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=512 << 20,
        )
    yield
    ray.shutdown()


def _start(cls: Any, *args: Any, host: str = "h1", **options: Any) -> Any:
    """Start an actor; of two hosts on ``host``. Only of host 1's do the tests kill any, by pid."""
    if ACROSS:
        options = {"resources": {host: 1}, **options}
    return cls.options(num_cpus=0, **options).remote(*args)


@pytest.fixture(scope="session")
def _nodes(cluster: None) -> list[Any]:
    return [_start(Node, host=host) for host in ("h2", "h1", "h2")]


@pytest.fixture(scope="session")
def _spare(cluster: None) -> list[Any]:
    """A node that starts while tests run, for the next one that needs one of its own."""
    return [_start(Node)]


@pytest.fixture
async def nodes(_nodes: list[Any]) -> AsyncIterator[list[Any]]:
    """Three long-lived actors; after the test they must export and hold nothing."""
    yield _nodes
    await clean(*_nodes)


class Spawn(Protocol):
    """See `spawn`."""

    def __call__(
        self, cls: Any = Node, *args: Any, options: dict[str, Any] | None = None
    ) -> Any: ...


@contextmanager
def _spawning(spare: list[Any]) -> Iterator[Spawn]:
    made: list[Any] = []

    def make(cls: Any = Node, *args: Any, options: dict[str, Any] | None = None) -> Any:
        if cls is Node and not args and not options:
            actor, spare[0] = spare[0], _start(Node)
        else:
            actor = _start(cls, *args, **(options or {}))
        made.append(actor)
        return actor

    yield make
    for actor in made:
        ray.kill(actor)


@pytest.fixture
def spawn(_spare: list[Any]) -> Iterator[Spawn]:
    """Make actors that end with the test: ``spawn()``, ``spawn(cls, ...)``, ``options=``."""
    with _spawning(_spare) as make:
        yield make


@pytest.fixture(scope="module")
def spawn_for_all(_spare: list[Any]) -> Iterator[Spawn]:
    """As `spawn`, for all tests of a module."""
    with _spawning(_spare) as make:
        yield make
