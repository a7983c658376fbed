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
from aiordt.testing._hosts import hosts_unavailable, two_hosts
from tests import worker

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(hosts_unavailable() is not None, reason=str(hosts_unavailable())),
    pytest.mark.timeout(240),
]

SCRIPTS = Path(__file__).parent.parent / "cluster/mpi_scripts.py"


async def test_ranks_of_two_hosts_become_actors() -> None:  # MPI-1
    # hydra says what it would run on each host by ssh; we are its ssh.
    options = ["-n", "4", "-ppn", "2", "-launcher", "manual", "-iface", "eth0"]
    options += ["-hosts", "10.77.0.1,10.77.0.2"]
    command = [sys.executable, "-m", "aiordt.mpi", "run", *options, "--", str(SCRIPTS), "hosts"]
    with two_hosts(environment=worker.environment()) as hosts, ExitStack() as stack:
        launcher = stack.enter_context(hosts.h1.start_command(*command))
        for host in (hosts.h1, hosts.h2):
            proxy = shlex.split(launcher.expect("HYDRA_LAUNCH: ", seconds=60))
            stack.enter_context(host.start_command(*proxy))
        found = json.loads(launcher.expect("RESULT", seconds=100))
        done = launcher.wait(seconds=60)
        assert done.exit_code == 0, done.output
        ranks = re.compile(r"_rank\.py|hydra_pmi_proxy")

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
