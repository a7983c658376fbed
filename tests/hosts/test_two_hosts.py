"""Tensors between two real hosts: network, pid, ipc and mount namespaces of their own.

The scenarios run in `drivers.py`, inside host 1; here is what they must come to.
"""

from __future__ import annotations

import errno
import json
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiordt.testing._hosts import hosts_unavailable, two_hosts
from tests import worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiordt.testing._hosts import Program, TwoHosts

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(hosts_unavailable() is not None, reason=str(hosts_unavailable())),
    pytest.mark.timeout(400),  # of which the first test that needs the driver starts 12 processes
]

DRIVERS = Path(__file__).with_name("drivers.py")
KIB, MIB = 1 << 10, 1 << 20
#: So slow that a transfer of 48 MiB (1 s) is surely under way when a test strikes.
SLOW_MEGABITS = 400


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts(environment=worker.environment()) as made:
        yield made


@contextmanager
def slow(hosts: TwoHosts, megabits: int = SLOW_MEGABITS) -> Iterator[None]:
    hosts.slow(megabits)
    try:
        yield
    finally:
        hosts.slow(None)


class Driver:
    """A driver inside host 1, for all scenarios that need none of their own."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._hosts = hosts
        self._exits = ExitStack()
        self._program: Program | None = None

    def begin(self, name: str) -> Program:
        """Begin a scenario."""
        if self._program is None:
            self._program = self._exits.enter_context(self._hosts.h1.start(DRIVERS))
            self._program.tell("begin")
            self.end(self._program, seconds=180)
        self._program.tell(name)
        return self._program

    def run(self, name: str) -> dict[str, Any]:
        """Run a scenario to its end."""
        return self.end(self.begin(name))

    def end(self, program: Program, *, seconds: float = 60) -> dict[str, Any]:
        """What a scenario came to; a driver that failed ends, and its actors with it."""
        try:
            return result(program, seconds=seconds)
        except (EOFError, TimeoutError):
            self._program = None
            program.kill()
            raise

    def close(self) -> None:
        """It ends as a driver should."""
        with self._exits:
            if self._program is not None:
                done = self._program.wait(seconds=20)
                assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def driver(hosts: TwoHosts) -> Iterator[Driver]:
    made = Driver(hosts)
    yield made
    made.close()


def result(program: Program, *, seconds: float = 60) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(program.expect("RESULT ", seconds=seconds))
    return found


def finish(program: Program) -> dict[str, Any]:
    found = result(program)
    done = program.wait(seconds=20)
    assert done.exit_code == 0, done.output
    return found


def test_a_flow_moves_the_least_between_hosts(driver: Driver) -> None:
    found = driver.run("flow_graph")
    assert found["total"] == 2 * 2 * MIB
    assert found["hosts"] == 2
    assert found["beside"]
    assert found["tcp"] == 5 * MIB, "the broadcast, and the other host's piece"


def test_tensors_of_all_sizes_and_layouts_arrive_by_tcp(driver: Driver) -> None:
    found = driver.run("sizes")
    results = found["results"]
    assert all(result["equal"] for result in results.values()), results
    assert results[str(KIB)]["moved"] == {"inline": KIB}
    for nbytes in (100 * KIB, MIB, 64 * MIB):
        assert results[str(nbytes)]["moved"] == {"tcp": nbytes}
    for kind in ("transposed", "columns", "rows", "expanded"):
        assert set(results[kind]["moved"]) == {"tcp"}
    assert results["columns"]["moved"]["tcp"] == 512 * 171 * 4, "only the bytes of the view"
    assert found["back"]["equal"]
    assert found["back"]["moved"] == {"tcp": MIB}
    print("64 MiB between hosts, seconds:", found["seconds"])  # noqa: T201
    explained = found["explained"]
    assert explained["chosen"] == "tcp"
    assert_refused(explained["reasons"]["cma"])
    assert "RDMA" in explained["reasons"]["nixl"]
    assert explained["reasons"]["ucx"].startswith("usable")
    assert found["ucx"]["equal"]
    assert found["ucx"]["moved"] == {"ucx": 64 * MIB}


def moved(results: list[dict[str, Any]], name: str) -> int:
    return sum(result["moved"].get(name, 0) for result in results)


def test_one_crossing_serves_all_of_a_host(driver: Driver) -> None:  # RLY-1
    found = driver.run("crossing")
    first, second, late = found["rounds"]
    for results in (first, second, late, found["small"]):
        assert all(result["equal"] for result in results), results
    assert moved(first, "tcp") == 64 * MIB, "it crossed once"
    assert moved(first, "shm") == 7 * 64 * MIB
    assert moved(second + late, "tcp") == 0
    assert moved(second, "shm") == 7 * 64 * MIB, "the first has it in its own memory"
    assert moved(late, "shm") == 64 * MIB
    assert sorted(found["keeping"]) == [0] * 8 + [64 * MIB], "one copy for all"
    assert moved(found["small"], "tcp") == 8 * 512 * 171 * 4, "too small to ask around for"


def test_weights_leave_their_host_twice(driver: Driver) -> None:  # FAN-2
    """Readers on four hosts (all on one, not knowing each other): the network device counts."""
    for version, each in enumerate(driver.run("weights_to_many")["rounds"], 1):
        assert [found["version"] for found in each["found"]] == [version] * 4
        assert all(found["equal"] for found in each["found"])
        moved = [sum(found["moved"].values()) for found in each["found"]]
        assert moved == [48 * MIB] * 4, each["found"]
        assert 1.9 * 48 * MIB < each["sent"] < 2.1 * 48 * MIB


def test_a_broadcast_crosses_once_for_a_host(driver: Driver) -> None:  # REQ-4, RLY-1, FAN-2
    together, apart = driver.run("broadcast")["rounds"]
    for each in (together, apart):
        assert all(found["equal"] and not found["moved"] for found in each["found"]), each
    assert 0.95 * 48 * MIB < together["sent"] < 1.1 * 48 * MIB
    assert 1.9 * 48 * MIB < apart["sent"] < 2.1 * 48 * MIB


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_the_end_of_a_neighbour_harms_no_pull(
    hosts: TwoHosts, driver: Driver, end: str
) -> None:  # RLY-2
    with slow(hosts):
        found = driver.run(f"neighbour_{end}")
    if end == "stopped":
        hosts.h2.execute("kill", "-KILL", str(found["pids"][found["first"]]))
    assert [result["equal"] for result in found["others"]] == [True, True]


def test_the_end_of_an_owner_is_told_to_all_of_a_host(
    hosts: TwoHosts, driver: Driver
) -> None:  # RLY-2
    with slow(hosts):
        found = driver.run("shared_owner_killed")
    assert [kind for kind, _, _ in found["ended"]] == ["OwnerDiedError"] * 3, found["ended"]
    assert max(seconds for _, _, seconds in found["ended"]) < 3.0, found["ended"]


def assert_refused(reason: str) -> None:
    """The same-host proof failed, and its reason says why."""
    assert "another pid namespace" in reason or "is another one" in reason, reason


def test_a_process_with_the_owners_id_is_not_read(hosts: TwoHosts) -> None:  # CMA-1
    # The driver owns the tensor; ids like its own are not in use on h2, which counts from 1.
    found: dict[str, Any] = {}
    for base in (20_000, 24_000, 28_000):
        hosts.h1.execute("sh", "-c", f"echo {base} > /proc/sys/kernel/ns_last_pid")
        with hosts.h1.start(DRIVERS, "proof") as program:
            found = finish(program)
        assert found["pid"] > base
        if {found[kind]["pid"] for kind in ("process", "thread")} == {found["pid"]}:
            break  # else a worker of Ray's that was just starting took it
    assert found["absent"]["chosen"] == "tcp"
    assert "another pid namespace" in found["absent"]["reasons"]["cma"]
    for kind in ("process", "thread"):
        assert found[kind]["pid"] == found["pid"], f"the {kind} has the owner's id"
        assert found[kind]["chosen"] == "tcp"
        assert found[kind]["equal"], "never the decoy's memory"
        assert found[kind]["moved"] == {"tcp": MIB}
        forced = found[kind]["forced"]
        assert_refused(forced["cma"])
        assert_refused(forced["nixl"])
        assert "another network namespace" in forced["shm"]
        assert forced["ucx"] == f"equal: True, moved: {{'ucx': {MIB}}}"
    assert "is another one" in found["process"]["reasons"]["cma"]
    assert_refused(found["thread"]["reasons"]["cma"])


def test_a_container_on_the_same_host_is_not_read(hosts: TwoHosts) -> None:  # CMA-1
    own = ["--pid", "--fork", "--ipc", "--mount-proc"]
    with hosts.h1.start(DRIVERS, "container", hosts.h1.address, unshare=own) as program:
        found = finish(program)
    assert found["pid"] == 1, "the driver has a pid namespace of its own"
    for side in ("node", "driver"):
        assert found[side]["chosen"] == "tcp"
        assert found[side]["equal"]
        assert_refused(found[side]["reasons"]["cma"])


def test_a_tensor_is_free_once_the_other_host_lets_go(driver: Driver) -> None:  # LSE-1
    found = driver.run("lifetime")
    for end, limit in (("drop", 1.0), ("kill", 5.0)):
        assert not found[end]["early"], "freed while the other host held it"
        assert found[end]["seconds"] < limit, (end, found)


def test_owner_killed_in_a_transfer_ends_every_pull(
    hosts: TwoHosts, driver: Driver
) -> None:  # RPC-1
    with slow(hosts):
        found = driver.run("owner_killed")
    assert [kind for kind, _, _ in found["ended"]] == ["OwnerDiedError"] * 3, found["ended"]
    assert max(seconds for _, _, seconds in found["ended"]) < 2.0, found["ended"]
    assert found["again"]["equal"], "the consumer can pull from another owner"


def test_channels_go_from_host_to_host_and_end_there(driver: Driver) -> None:
    found = driver.run("channel")
    for end in ("far", "near"):
        assert found[end]["equal"] == [True] * 15, found[end]
        assert not found[end]["error"]
    assert found["far"]["moved"] == {"tcp": found["nbytes"]}
    assert found["near"]["moved"] == {}, "seen in the sender's memory"
    assert found["killed"]["error"] == "OwnerDiedError"
    assert found["killed"]["equal"][:1] == [True]
    assert found["killed"]["seconds"] < 5


def test_cancelled_pull_harms_no_other(hosts: TwoHosts, driver: Driver) -> None:  # OWN-1, CAN-1
    with slow(hosts):
        found = driver.run("cancel")
    assert found["cancelled"]
    assert found["seconds"] < 1.0, "a cancellation does not wait for the transfer"
    assert found["unchanged"], "written after the cancelled await had ended"
    assert found["whole"] == [False, True], "it was cut short, and the other was not"
    assert found["in_flight"] == 0
    assert found["again"]["equal"]


def test_link_cut_in_a_transfer_ends_the_pull(hosts: TwoHosts, driver: Driver) -> None:
    outcomes, restored = hosts.h2.path("/dev/shm/outcomes"), hosts.h1.path("/dev/shm/restored")  # noqa: S108
    for path in (outcomes, restored):
        path.unlink(missing_ok=True)
    hosts.slow(SLOW_MEGABITS)
    program = driver.begin("link")
    try:
        program.expect("BEGUN", seconds=60)
        hosts.cut(silently=True)  # a pulled cable, seen once, does no different
        cut = time.monotonic()
        while not outcomes.exists():
            assert time.monotonic() < cut + 20, "the pull goes on without a link"
            time.sleep(0.01)
    finally:
        hosts.restore()
        hosts.slow(None)
    restored.touch()
    found = driver.end(program)
    kind, text, when = found["outcomes"][0]
    print(f"cut: {kind} after {when - cut:.1f} s ({text}); Ray back {found['reached']:.1f} s")  # noqa: T201
    assert kind == "PeerLostError", (kind, text)
    assert when - cut < 10.0
    assert found["again"]["equal"], "the same ref can be pulled again"
    assert found["new"]["equal"]


@pytest.mark.parametrize("transport", [pytest.param("tcp", marks=pytest.mark.soak), "ucx"])
def test_hosts_that_do_not_see_each_other_for_a_while(
    hosts: TwoHosts, driver: Driver, transport: str
) -> None:  # OWN-1, CAN-1, LSE-1
    signs = [hosts.h1.path(f"/dev/shm/{name}") for name in ("cut", "restored")]  # noqa: S108
    for path in signs:
        path.unlink(missing_ok=True)
    hosts.slow(SLOW_MEGABITS)
    program = driver.begin(f"partition {transport}")
    try:
        program.expect("BEGUN", seconds=60)
        hosts.cut(silently=True)
        signs[0].touch()
        program.expect("ENDED", seconds=60)
    finally:
        hosts.restore()
        hosts.slow(None)
    signs[1].touch()
    found = driver.end(program)
    assert found["cancelled"] == {"cancelled": True, "unchanged": True}
    # A transfer may fail before the control connection shows that it is the network.
    for when, kinds in (
        ("under way", {"PeerLostError", "TransferError"}),
        ("begun meanwhile", {"PeerLostError"}),
    ):
        kind, text, _ = found[when]
        assert kind in kinds, (when, kind, text)
    assert found["early"] == [False, False], "freed while the other host held them"
    for again in found["again"]:
        assert again["equal"]
        assert again["moved"] == {transport: 48 * MIB}
    assert found["counts"] == [[0, 0, 0], [0, 0, 0]]


def test_listeners_are_bound_to_the_nodes_address_only(hosts: TwoHosts, driver: Driver) -> None:
    found = driver.run("listeners")
    assert [host for host, _ in found["listeners"]] == [hosts.h1.address, hosts.h2.address]
    assert found["bound"] == [hosts.h1.address]
    assert found["own"] == 0
    assert found["loopback"] == errno.ECONNREFUSED


def test_lost_host_ends_pulls_and_frees_what_it_held() -> None:
    # By default Ray takes half a minute to give a node up, and over four minutes to see that a
    # borrower there, whose kernel said no goodbye, has gone with it.
    health = {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "2",
        "RAY_grpc_client_keepalive_time_ms": "2000",
        "RAY_grpc_client_keepalive_timeout_ms": "3000",
        **worker.environment(),
    }
    with two_hosts(environment=health) as hosts, slow(hosts):
        with hosts.h1.start(DRIVERS, "host_lost") as program:
            program.expect("BEGUN", seconds=60)
            hosts.cut(silently=True)  # its kernel must not say goodbye
            hosts.h2.kill()
            lost = time.monotonic()
            found = finish(program)
        assert not hosts.h2.alive
        assert not hosts.h2.pids()
    kind, text, when = found["outcomes"][0]
    print(f"host lost: {kind} after {when - lost:.1f} s; freed {found['freed'] - lost:.1f} s")  # noqa: T201
    assert kind == "PeerLostError", (kind, text)
    assert when - lost < 10.0
    assert not found["early"]
    assert found["freed"] - lost < 30.0
    assert found["again"]["equal"]
