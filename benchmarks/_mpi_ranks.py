"""mpi4py's collective operations between processes of ``mpiexec``.

Run by itself, this file is a rank, which needs nothing but mpi4py and numpy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

MPI: Final = "mpi4py"
_TIMEOUT: Final = 60.0
_WARMUPS: Final = 2
#: Open MPI refuses root, and more ranks than cores, unless it is told otherwise.
_ENVIRONMENT: Final = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def _mpiexec() -> str | None:
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def missing() -> str | None:
    """Why there is nothing to measure."""
    if find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return None if _mpiexec() else "there is no mpiexec"


def spans(kind: str, nbytes: int, size: int, count: int) -> list[list[tuple[float, float]]]:
    """Of each rank, when it called and when it had the result; checks the values.

    Raises:
        RuntimeError: It failed, or the values were wrong.
    """
    process = subprocess.Popen(  # noqa: S603  (our own command)
        [
            _mpiexec() or "mpiexec",
            "-n",
            str(size),
            sys.executable,
            "-m",
            "mpi4py",  # a rank that raises ends the others
            __file__,
            json.dumps([kind, nbytes, count]),
        ],
        env=_ENVIRONMENT | os.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            out, errors = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpiexec then ends its ranks
            raise RuntimeError(f"nothing came within {_TIMEOUT:.0f} s") from None
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip()]
        raise RuntimeError(f"mpiexec: {lines[-1] if lines else process.returncode}")
    return [[(begun, over) for begun, over in rank] for rank in json.loads(out)]


def _rank(kind: str, nbytes: int, count: int) -> None:
    import numpy as np  # noqa: PLC0415
    from mpi4py import MPI as mpi  # noqa: N811, PLC0415

    world = mpi.COMM_WORLD
    rank, size = world.rank, world.size
    numel = nbytes // 4 - (nbytes // 4 % size if kind == "reducescatter" else 0)
    every = np.stack([np.arange(numel) % 50 + other for other in range(size)]).astype(np.float32)
    mine = every[rank].copy()
    operations: dict[str, tuple[Any, Any, Any]] = {
        "allreduce": (mine, every.sum(0), lambda _: world.Allreduce(mpi.IN_PLACE, mine)),
        "broadcast": (mine, every[0], lambda _: world.Bcast(mine)),
        "allgather": (
            np.empty_like(every),
            every,
            lambda out: world.Allgather(mine, out),
        ),
        "reducescatter": (
            np.empty(numel // size, np.float32),
            every.sum(0)[rank * (numel // size) : (rank + 1) * (numel // size)],
            lambda out: world.Reduce_scatter_block(mine, out),
        ),
    }
    out, expected, call = operations[kind]
    call(out)
    if not np.array_equal(out, expected):
        raise RuntimeError(f"{kind}: rank {rank} got wrong values")
    mine.fill(0)
    found = []
    for _ in range(_WARMUPS + count):
        world.Barrier()
        begun = time.perf_counter()
        call(out)
        found.append((begun, time.perf_counter()))
    ranks = world.gather(found[_WARMUPS:])
    if rank == 0:
        print(json.dumps(ranks), flush=True)


if __name__ == "__main__":
    _rank(*json.loads(sys.argv[1]))
