"""Ray's workers that are ranks of mpiexec."""

from __future__ import annotations

import atexit
import os
import socket
import time
from typing import Final

from aiordt import _ray
from aiordt.mpi._link import Link, inherited
from aiordt.mpi._rank import HOOK, REFUSED, WORLD

#: How long Ray may take to end a worker: it waits for those who hold refs of its.
_RAY_SECONDS: Final = 2.0


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
    link = Link.current
    if orderly and link is not None:
        # mpiexec wants to see 0. Ray's own way out tells its node that this is no crash, but then
        # ends with 1, or in one, where its worker is used while Python ends: by whatever holds an
        # ObjectRef (2.60). So it goes only so far.
        atexit.register(link.leave)
        _ray.end_worker("its MPI world has ended", failed=False)
        time.sleep(_RAY_SECONDS)
        link.leave()
    _ray.end_worker("the launcher of its MPI world is gone", failed=True)
