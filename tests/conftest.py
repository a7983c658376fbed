"""One Ray cluster for all tests that need one, with out-of-band refs forbidden."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

from tests.support import Node, drained, start_flusher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

ROOT = Path(__file__).parent.parent
# Read by Ray at import in every process: pickling a ref outside Ray's count is an error.
os.environ["RAY_allow_out_of_band_object_ref_serialization"] = "0"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine, with room for many small actors."""
    ray.init(
        num_cpus=4,  # Ray starts so many workers ahead; our actors ask for none
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=512 << 20,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": str(ROOT),
                "RAY_allow_out_of_band_object_ref_serialization": "0",
            },
            "worker_process_setup_hook": start_flusher,
        },
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _nodes(cluster: None) -> list[Any]:
    return [Node.options(num_cpus=0).remote() for _ in range(3)]


@pytest.fixture
async def nodes(_nodes: list[Any]) -> AsyncIterator[list[Any]]:
    """Three long-lived actors; after the test they must export and hold nothing."""
    yield _nodes
    gc.collect()
    for node in _nodes:
        await node.run.remote(forget)
    await drained(*_nodes)


def forget(node: Any) -> None:
    """What a test kept in an actor."""
    node.kept.clear()
    gc.collect()


@pytest.fixture
def spawn(cluster: None) -> Iterator[Callable[..., Any]]:
    """Make actors that end with the test: ``spawn()``, ``spawn(cls, ...)``, ``options=``."""
    made: list[Any] = []

    def make(cls: Any = Node, *args: Any, options: dict[str, Any] | None = None) -> Any:
        actor = cls.options(num_cpus=0, **(options or {})).remote(*args)
        made.append(actor)
        return actor

    yield make
    for actor in made:
        ray.kill(actor)
