"""Each benchmark's smallest run, and what its figures are held against."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiordt.transports import probe
from benchmarks import (
    _mpi_ranks,
    channels,
    collectives,
    fanout,
    flow,
    reshard,
    slices,
    statedict,
    view,
    weights,
)
from benchmarks._collective_ranks import ALLREDUCE, KINDS, RAW, RAY, expected, slowest
from benchmarks._figures import Figures
from benchmarks._measure import GIB, MIB
from benchmarks._pages import ORDINARY
from benchmarks._raw_peers import RAW_LIBRARIES, RawPair, missing
from benchmarks._results import (
    AIORDT,
    CMA,
    MAPPED_ONE,
    NIXL_PULL,
    RAW_NIXL,
    RAW_ONE,
    RAW_UCXX,
    SHM,
    STORE,
    TCP,
    UCX,
)
from tests.support import PROGRAM_SECONDS

ROOT = Path(__file__).parents[1]
RAW_MISSING = ((RAW_NIXL, missing("nixl")), (RAW_UCXX, missing("ucxx")))
WAYS_MISSING = tuple(
    (way, None if probe(name).usable else name) for way, name in ((NIXL_PULL, "nixl"), (UCX, "ucx"))
)


def bench(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a command; its figures, and what it printed."""
    target = tmp_path / "figures.json"
    kept_out = ("RAY_", "COVERAGE_")  # it takes a dozen processes, which show nothing new
    environment = {k: value for k, value in os.environ.items() if not k.startswith(kept_out)}
    done = subprocess.run(  # noqa: S603  (our own command)
        [sys.executable, "-m", "benchmarks", *arguments, "--quick", "--json", str(target)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Goals of the design" in done.stdout
    return json.loads(target.read_text(encoding="utf-8")), done.stdout


def test_a_tiny_run(tmp_path: Path) -> None:
    figures, _ = bench(
        tmp_path, "p2p", "--sizes", "1024", "--only", "aiordt,store", "--parts", "actors,pull"
    )
    expected = {name: why for name, why in (*RAW_MISSING, *WAYS_MISSING) if why}
    assert set(figures["unavailable"]) == set(expected)
    assert {entry["name"] for entry in figures["actors"]} == {AIORDT, STORE}
    pulls = {entry["name"] for entry in figures["pulls"]}
    assert pulls >= {CMA, SHM, TCP, RAW_ONE, MAPPED_ONE}
    assert pulls >= {NIXL_PULL, UCX, RAW_NIXL, RAW_UCXX} - set(expected)
    assert all(entry["spread"]["p50"] > 0 for entry in figures["actors"] + figures["pulls"])


def test_a_tiny_run_of_channels(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "channels", "--sizes", "65536")
    assert figures["unavailable"] == {}
    groups = {name: {row["name"] for row in figures["rows"] if row["group"] == name}
              for name in ("echo 64 KiB", "stream 64 KiB")}  # fmt: skip
    assert groups["echo 64 KiB"] == set(channels.NAMES)
    assert groups["stream 64 KiB"] == {channels.OURS, channels.COPIES, channels.GLOO}


def test_a_tiny_run_of_reshard(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "reshard", "--side", "768")
    assert figures["unavailable"] == {}
    assert {row["name"] for row in figures["rows"]} == set(reshard.NAMES)
    assert all(goal["met"] for goal in figures["goals"]), "as few bytes as are needed"


def test_a_tiny_run_of_view(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "view", "--sizes", "65536")
    assert figures["unavailable"] == {}
    assert {row["name"] for row in figures["rows"]} == set(view.NAMES) - {view.TORCH}


def test_a_tiny_run_of_slices(tmp_path: Path) -> None:
    picture = tmp_path / "slices.png"
    figures, _ = bench(tmp_path, "slices", "--side", "512", "--plot", str(picture))
    ways = {way for way in slices.WAYS if way not in figures["unavailable"]}
    assert ways >= {"shm", "cma", "tcp"}
    assert len(figures["rows"]) == len(slices.cuts(512)) * len(ways) * 2
    # What moved is counted, and does not depend on the machine.
    assert all(goal["met"] for goal in figures["goals"] if goal["figure"].split()[-1] in ways)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_tiny_run_of_statedict(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "statedict", "--counts", "20", "--only", "cma,tcp,aiordt,store")
    assert figures["unavailable"] == {}
    names = {row["name"] for row in figures["rows"]}
    assert {"aiordt cma: export", "aiordt tcp: pull", statedict.MEMCPY} <= names
    assert "object store: actor to actor" in names
    assert all(goal["met"] is not None for goal in figures["goals"])


def test_a_tiny_run_of_flow(tmp_path: Path) -> None:
    figures, printed = bench(tmp_path, "flow", "--plot", str(tmp_path / "flow.png"))
    assert figures["unavailable"] == {}
    groups = {(row["group"], row["name"]) for row in figures["rows"]}
    timed = {(group, name) for group, name in groups if group.startswith("a batch")}
    batch = "a batch of 2 x 1 MiB"
    ways = (flow.GROUP, flow.RAY)
    assert timed == {(group, way) for group in (batch, f"{batch}, {flow.FREE}") for way in ways}
    # What crosses is counted, and does not depend on the machine.
    crossed = [goal for goal in figures["goals"] if "the optimum" in goal["goal"]]
    assert len(crossed) == 2
    assert all(goal["met"] for goal in crossed), printed
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_a_tiny_run_of_collectives(tmp_path: Path) -> None:
    figures, _ = bench(tmp_path, "collectives", "--ranks", "2", "--sizes", "8")
    names = {"aiordt shm", "aiordt shm, aiordt.empty", "aiordt gloo", RAW, RAY}
    if why := _mpi_ranks.missing():
        assert figures["unavailable"].pop(f"{_mpi_ranks.MPI} x 2") == why
        assert figures["unavailable"].keys() <= {f"{collectives.ATTACH} x 2"}
    else:
        assert figures["unavailable"] == {}
        names |= {_mpi_ranks.MPI, collectives.ATTACH}
    rows = figures["rows"]
    for kind in KINDS:
        assert {row["name"] for row in rows if row["group"].startswith(kind)} == names
    refs = {row["name"] for row in rows if row["group"].startswith("refs")}
    assert refs == {collectives.REFS, collectives.BY_DRIVER, collectives.PLAIN}
    lags = {row["name"] for row in rows if row["group"].startswith("lag")}
    assert lags == names - {_mpi_ranks.MPI} | {"idle"}
    met = [goal["met"] for goal in figures["goals"]]
    assert len(met) == 6
    assert None not in met[:3], "8 B were measured"


def test_a_tiny_run_of_weights(tmp_path: Path) -> None:
    arguments = ("--nbytes", "2097152", "--readers", "1", "--only", "store")
    figures, _ = bench(tmp_path, "weights", *arguments)
    assert figures["unavailable"] == {}
    names = {row["name"] for row in figures["rows"]}
    assert names >= {weights.MEMCPY, weights.PUT, weights.OURS, weights.OURS_INTO, weights.FRESH}
    assert {weights.publishing(0), weights.publishing(1)} <= names
    assert all(goal["met"] is not None for goal in figures["goals"])


@pytest.mark.parametrize("library", RAW_LIBRARIES)
def test_raw_ends_bring_the_bytes(library: str) -> None:
    if why := missing(library):
        pytest.skip(why)
    pair = RawPair(library)
    try:
        for nbytes in (8, 3 * MIB + 5):
            pair.make(nbytes, ORDINARY)  # which checks them
            assert all(seconds > 0 for seconds in pair.pull(3))
        pair._puller._process.kill()
        with pytest.raises(RuntimeError, match="died"):
            pair.pull(1)
    finally:
        pair.close()


# --- figures in groups ---------------------------------------------------------------------


def figures_of(*rows: tuple[str, str, float]) -> Figures:
    found = Figures("", {})
    for group, name, seconds in rows:
        found.add(group, name, [seconds])
    return found


def test_a_state_dict_is_held_against_memcpy_and_one_tensor() -> None:
    group = "1,000 x 64 KiB"
    found = figures_of(
        (group, statedict.MEMCPY, 0.010),
        (group, statedict.FLOOR, 0.002),
        (group, "aiordt cma: export", 0.005),
        (group, "aiordt cma: two calls with the refs, less export", 0.007),
        (group, "aiordt cma: pull", 0.025),
        (group, "aiordt cma: pull of one tensor of that size", 0.020),
    )
    statedict.judge(found, ("cma", "tcp"), 1000)
    verdicts = [(goal.measured, goal.met) for goal in found.goals]
    assert verdicts[:3] == [("15.0 µs", True), ("25.0 µs", False), ("1.25 x", True)]
    assert [met for _, met in verdicts[3:]] == [None] * 3


def test_slices_that_moved_too_much_or_came_from_elsewhere_are_no_success() -> None:
    found = Figures("", {})
    for name, ratio in (("shm", 1.0), ("cma", 1.2), ("nixl", 0.0)):
        facts = {"moved / needed": f"{ratio:.4f}"}
        found.add("every 2nd row", f"aiordt {name}", [1.0], **facts)
    slices.judge(found, 512)
    met = {goal.figure.split()[-1]: goal.met for goal in found.goals if "2nd" in goal.figure}
    assert met == {"shm": True, "cma": False, "nixl": False, "ucx": None, "tcp": None}


def test_views_are_held_against_a_millisecond() -> None:
    found = figures_of(("1 GiB", view.FIRST, 2e-3), ("1 GiB", view.AGAIN, 1e-5))
    view.judge(found, (GIB, MIB))
    assert [goal.met for goal in found.goals] == [False, True, None, None]


def test_collectives_are_held_against_the_process_group_alone() -> None:
    small, large = (collectives.Job(ALLREDUCE, nbytes).group(3) for nbytes in (8, 64 << 10))
    found = figures_of(
        (small, RAW, 500e-6),
        (small, "aiordt shm", 450e-6),
        (small, "aiordt gloo", 590e-6),
        (small, collectives.ATTACH, 590e-6),
        (small, _mpi_ranks.MPI, 450e-6),
        (large, RAW, 500e-6),
        (large, "aiordt gloo", 610e-6),
    )
    collectives.judge(found, (3,))
    verdicts = [(goal.measured, goal.met) for goal in found.goals]
    assert verdicts == [
        ("-50.0 µs", True),
        ("+90.0 µs", True),
        ("+140 µs", True),
        ("not measured", None),
        ("+110 µs", False),
        ("not measured", None),
    ]


def test_publishing_is_held_against_publishing_to_nobody() -> None:
    settings = weights.Settings.choose(quick=True, readers=(1, 4))
    publish, _, stall = weights.groups(settings)
    found = figures_of(
        (publish, weights.publishing(0), 0.010),
        (publish, weights.publishing(1), 0.012),
        (publish, weights.publishing(4), 0.013),
        (stall, weights.OURS, 0.006),
    )
    weights.judge(found, settings)
    assert [goal.met for goal in found.goals] == [True, False, False, None]


def test_what_an_owner_sends_is_held_against_twice_the_tensor() -> None:
    settings = fanout.Settings.choose(quick=True, nbytes=100 * MIB, hosts=(2, 4))
    rows = [
        {"count": count, "alone": alone, "seconds": 1.0, "sent": sent * 100 * MIB}
        for count, alone, sent in ((2, False, 2.05), (4, False, 3.1), (4, True, 4.1))
    ]
    found = Figures("", {})
    fanout.show(found, settings, rows)
    assert [goal.met for goal in found.goals] == [True, False]


def test_a_collective_takes_from_the_last_call_to_the_last_result() -> None:
    early, late = [(0.0, 5.0), (10.0, 12.0)], [(3.0, 4.0), (10.5, 14.0)]
    assert slowest([early, late]) == [2.0, 3.5]


def test_what_collectives_must_give() -> None:
    # Ranks 0, 1 and 2 bring 0 1 2, 1 2 3 and 2 3 4.
    given = {kind: expected(kind, 3, 1, 3).tolist() for kind in KINDS}
    assert given == {
        "allreduce": [3, 6, 9],
        "broadcast": [0, 1, 2],
        "allgather": [0, 1, 2, 1, 2, 3, 2, 3, 4],
        "reducescatter": [6],
    }


def test_bytes_that_the_kernel_received() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            before = slices.received_nbytes()
            near.sendall(b"x" * 10_000)
            got = 0
            while got < 10_000:
                got += len(far.recv(1 << 16))
            assert slices.received_nbytes() - before == 10_000


def test_settings_of_the_other_commands() -> None:
    with pytest.raises(ValueError, match="none of"):
        statedict.Settings.choose(quick=True, only=("carrier pigeon",))
    with pytest.raises(ValueError, match="64"):
        slices.Settings.choose(quick=True, side=100)
    with pytest.raises(ValueError, match="positive"):
        view.Settings.choose(quick=True, sizes=(0,))
    with pytest.raises(ValueError, match="at least 2"):
        collectives.Settings.choose(quick=True, ranks=(1,))
    with pytest.raises(ValueError, match="multiples of 8"):
        collectives.Settings.choose(quick=True, sizes=(8, 12))
    with pytest.raises(ValueError, match="none of"):
        weights.Settings.choose(quick=True, only=("carrier pigeon",))
    with pytest.raises(ValueError, match="at least"):
        fanout.Settings.choose(quick=True, hosts=(0,))
    assert view.Settings.choose(quick=False).sizes[-1] == GIB
    assert collectives.Settings.choose(quick=False).ranks == (2, 3)
    assert statedict.Settings.choose(quick=False).counts == (1_000, 10_000)
