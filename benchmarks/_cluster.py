"""A Ray cluster of our own on this machine, and actors that are surely gone when killed."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

from benchmarks._measure import GIB, available_nbytes

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

#: Longer than RDT's own deadline, so that its error is what is shown.
TIMEOUT: Final = 60.0
_DEATH_TIMEOUT: Final = 10.0


@contextmanager
def cluster() -> Generator[None]:
    """Start Ray, quietly and away from other clusters on the machine; shut it down."""
    ray.init(
        address="local",
        num_cpus=2,  # as many workers are started ahead
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=int(min(4 * GIB, available_nbytes() // 3)),
    )
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        ray.shutdown()


def start(actor_class: Any, *args: object, **options: object) -> Any:  # noqa: ANN401
    """Make an actor; `ray.remote` leaves a class without a type that says so."""
    return actor_class.options(**options).remote(*args)


def get(refs: Any) -> Any:  # noqa: ANN401  (whatever the actor returned)
    """`ray.get` with a limit."""
    return ray.get(refs, timeout=TIMEOUT)


def end(actors: Sequence[Any]) -> None:
    """Kill actors and wait until their processes are gone: a dying one disturbs the next."""
    pids = []
    for actor in actors:
        with suppress(ray.exceptions.RayError, TimeoutError):
            pids.append(ray.get(actor.pid.remote(), timeout=5.0))
        ray.kill(actor)
    deadline = time.monotonic() + _DEATH_TIMEOUT
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def reason(exc: BaseException) -> str:
    """An exception in one line: Ray's have the remote traceback in them."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    return f"{type(exc).__name__}: {text}"[:300]
