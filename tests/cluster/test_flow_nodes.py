"""A flow on several nodes, in a process of its own: a session has one cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import PROGRAM_SECONDS

SCRIPT = Path(__file__).with_name("flow_nodes.py")


def test_groups_are_placed_and_a_lost_node_is_made_up_for() -> None:  # FLW-1
    kept_out = ("RAY_ADDRESS", "COVERAGE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(kept_out)}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    environment["RAY_allow_out_of_band_object_ref_serialization"] = "0"
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    assert found["total"] == found["expected"]
    assert found["distinct"] == 2, "a map on each node, which has one slot"
    assert found["as_decided"]
    assert found["reducer_beside"], "next to the first half of its inputs"
    assert found["right"] == [True, True], "what was lost is made again"
    assert found["left"], "the dead node is not chosen any more"
    assert found["again_on"] == [True]
