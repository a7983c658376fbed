"""Run the scenarios of tests/cluster between two hosts: ``python -m tests.hosts --by tcp,ucx``.

pytest runs on host 1, once for each transport, and tells as ever which test was what. Of the
three actors that most tests use, the first and the last are on host 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from typing import Final

from aiordt.testing._hosts import hosts_unavailable, two_hosts
from tests import worker

#: What each transport is tested by; nothing here is only true of one host.
FILES: Final = [
    f"tests/cluster/test_{name}.py"
    for name in (
        "every_transport",
        "pass",
        "methods",
        "refs",
        "leaves",
        "slices",
        "state_dict",
        "into",
        "items",
        "wait",
        "lifetime",
        "failure",
        "weights",
        "reshard",
        "channels",
        "groups",
        "group_ops",
        "group_failure",
        "refs_collectives",
        "flow",
    )
]
#: By which a test says that it is about one host.
NOT_ABOUT: Final = "not cma and not shm"
#: These are, too, though their names do not say so: they read what another actor wrote to a file,
#: look at its process, expect shared memory, or stop at a phase of a same-host transport.
ONE_HOST: Final = {
    "channels": ["a_killed_receiver_ends_the_channel"],
    "failure": [
        "forced_transports",
        "a_transport_that_is_switched_off_is_unavailable",
        "owner_killed",
        "release_during_a_pull_does_not_free_what_is_read",
    ],
    "flow": [
        "a_broadcast_is_not_copied_within_a_host",
        "what_all_actors_get_is_not_copied_within_a_host",
        "an_idle_worker_gives_memory_back",
        "lost_results_are_made_again",
    ],
    "group_failure": [
        "a_member_that_raises_ends_the_group",
        "nothing_is_left_of_a_group",
        "a_member_that_stops_is_named",
    ],
    "group_ops": [
        "tensors_in_shared_memory",
        "the_same_as_torch_distributed",
        "calls_are_matched_by_their_order",
    ],
    "groups": [
        "a_group_has_members_and_ranks",
        "many_overlapping_groups_work_at_once",
        "from_inside_an_actor_and_passed_on",
        "beside_the_default_group_of_torch",
    ],
    "leaves": ["arrays_in_shared_memory"],
    "methods": ["an_actor_configures_itself"],
    "refs": ["strided_pulls_move_only_what_is_needed", "stats_say_what_moved"],
    "state_dict": [
        "conversion_keeps_ties",
        "over_four_gib_in_one_dict",
        "a_cancelled_batch_writes_nothing_afterwards",
    ],
    "weights": ["a_version_that_was_not_held_does_not_count"],
}
_SECONDS_A_TEST: Final = 300.0


def run(transport: str, arguments: list[str]) -> int:
    """Test a transport; pytest's exit status."""
    environment = {
        **worker.environment(),
        "TESTS_ACROSS": transport,
        "AIORDT_TRANSPORTS": ",".join(dict.fromkeys((transport, "tcp"))),  # some demand tcp
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *arguments]
    with two_hosts(environment=environment) as hosts, hosts.h1.start_command(*command) as program:
        with suppress(EOFError):
            while True:
                print(transport, program.expect("", seconds=_SECONDS_A_TEST), flush=True)  # noqa: T201
        return program.wait(seconds=60).exit_code


def main() -> int:
    """Test what was asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    parser.add_argument("--by", default="tcp,ucx,nixl", help="transports, separated by commas")
    options, arguments = parser.parse_known_args()
    reason = hosts_unavailable()
    if reason is not None:
        print(reason)  # noqa: T201
        return 1
    if "-k" not in arguments:
        arguments += ["-k", NOT_ABOUT]
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments += FILES
    arguments += [
        f"--deselect=tests/cluster/test_{file}.py::test_{name}"
        for file, names in ONE_HOST.items()
        for name in names
    ]
    begun = time.monotonic()
    statuses = {name: run(name, arguments) for name in options.by.split(",")}
    print(f"{statuses} in {time.monotonic() - begun:.0f} s")  # noqa: T201
    return int(any(statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
