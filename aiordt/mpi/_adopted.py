"""Ray's workers that are ranks of mpiexec."""

from __future__ import annotations

import os
import socket

from aiordt import _ray
from aiordt.mpi._link import Link, inherited
from aiordt.mpi._rank import HOOK, REFUSED, WORLD


def begin() -> None:
    """What Ray runs as such a worker starts, or one that should have become a rank (MPI-3)."""
    refused = os.environ.pop(REFUSED, None)
    if refused is not None:
        _ray.end_worker(f"aiordt: {refused}", failed=True)
        return
    number = inherited()
    if number is not None:
        size = int(os.environ[WORLD].split(":")[2])
        Link(socket.socket(fileno=number), size, {}, _leave).start()
    hook = os.environ.pop(HOOK, None)
    if hook is not None:
        _ray.run_hook(hook)


def _leave(orderly: bool) -> None:  # noqa: FBT001
    """End the actor with its world."""
    if orderly and Link.current is not None:
        # mpiexec wants to see 0. Ray's own way out ends with 1, or in a crash, where its worker is
        # used while Python ends: by whatever holds an ObjectRef (2.60).
        Link.current.leave()
    _ray.end_worker("the launcher of its MPI world is gone", failed=True)
