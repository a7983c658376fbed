"""MPI in one process: how it is initialised, and the thread that moves requests on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from aiordt._errors import UnavailableError
from aiordt.collective._joining import _MAX_NUMBERS, _free, in_turn
from aiordt.mpi._alone import _serve

# In a process of its own: MPI is initialised once in one.
PROGRAM = """
import os, sys, threading, time
os.environ["PMI_RANK"] = "3"  # of another launcher: nothing to us
from aiordt.mpi._library import library
before = dict(os.environ)
mpi = library()
assert library() is mpi
assert mpi.alone and mpi.rank == 0 and mpi.api.COMM_WORLD.size == 1
assert dict(os.environ) == before, "what is started from here is no rank of ours"
maps = open("/proc/self/maps", encoding="ascii").read()
assert "/SYSV" not in maps and "ucx_shm" not in maps, "queues that who dies could stop"
from aiordt.mpi._progress import Progress

progress = Progress(mpi)
ended, left = threading.Event(), threading.Event()
room, data = bytearray(5), b"hello"
byte, comm = mpi.api.BYTE, mpi.api.COMM_SELF
got = comm.Irecv([room, 5, byte], 0, 1)
never = comm.Irecv([bytearray(5), 5, byte], 0, 2)
progress.watch("never", [never], [], None, lambda error: left.set(), nbytes=5)
sent = comm.Isend([data, 5, byte], 0, 1)
progress.watch("a", [got], [sent], (room, data), lambda error: ended.set(), nbytes=10)
assert ended.wait(20) and room == data and not left.is_set()

# Who waits moves requests on by itself, in its own thread; the rest is the other's again.
here, driver = [], threading.get_ident()
for tag in (3, 4):
    got = comm.Irecv([room, 5, byte], 0, tag)
    note = lambda error: here.append(threading.get_ident())
    progress.watch("a", [got], [], room, note, nbytes=5, driven=True)
    if tag == 3:
        comm.Isend([data, 5, byte], 0, tag)
        progress.drive(lambda: bool(here))
        assert here == [driver]
progress.drive(lambda: len(here) > 1)
assert here == [driver], "it gives up waiting"
comm.Isend([data, 5, byte], 0, 4)
deadline = time.monotonic() + 20
while len(here) < 2 and time.monotonic() < deadline:
    time.sleep(0.001)
assert len(here) == 2 and here[1] != driver

# While somebody is in a call of MPI, nobody else is.
got, sent = comm.Irecv([room, 5, byte], 0, 5), comm.Isend([data, 5, byte], 0, 5)
moved = threading.Event()
with mpi.calls:
    progress.watch("a", [got], [sent], room, lambda error: moved.set(), nbytes=5)
    assert not moved.wait(0.05)
assert moved.wait(20)

clean = []
progress.give_up("never", 10.0, clean.append)
assert left.wait(20), "it is recalled"
(thread,) = [each for each in threading.enumerate() if each.name == "aiordt-mpi"]
deadline = time.monotonic() + 20
while True:  # it sleeps, for as long as there is nothing to do
    frame = sys._current_frames()[thread.ident]
    names = []
    while frame is not None:
        names.append((frame.f_code.co_name, frame.f_locals.get("timeout", 0)))
        frame = frame.f_back
    if ("wait", None) in names and names[-1][0] == "_bootstrap":
        break
    assert time.monotonic() < deadline, names
assert clean == [False]
print("done")
os._exit(0)
"""


def test_a_process_alone() -> None:  # MPG-1, MPG-3, MPG-4, MPG-7
    finished = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PROGRAM],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stdout == "done\n", finished.stderr


def test_the_server_of_a_world_of_one() -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=_serve, args=(theirs, "w1"), daemon=True)
    thread.start()
    with ours, ours.makefile("rw", encoding="ascii") as lines:

        def ask(text: str) -> str:
            lines.write(text + "\n")
            lines.flush()
            return lines.readline()

        assert ask("cmd=get_my_kvsname") == "cmd=my_kvsname rc=0 kvsname=w1\n"
        assert "found=FALSE" in ask("cmd=get kvsname=w1 key=a")
        assert "rc=0" in ask("cmd=put kvsname=w1 key=a value=b=c")
        assert ask("cmd=get kvsname=w1 key=a") == "cmd=get_result rc=0 found=TRUE value=b=c\n"
        assert "not_supported" in ask("cmd=spawn")
    thread.join(10)
    assert not thread.is_alive(), "it ends with its client"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 9, 32])
def test_members_meet_in_an_order_that_lets_all_go_on(size: int) -> None:
    left = [list(in_turn(size, rank)) for rank in range(size)]
    for rank, others in enumerate(left):
        assert sorted([*others, rank]) == list(range(size))
    while any(left):
        first = [others[0] if others else -1 for others in left]
        pairs = [rank for rank, other in enumerate(first) if other >= 0 and first[other] == rank]
        assert pairs, left
        for rank in pairs:
            del left[rank][0]


def test_a_group_gets_a_number_that_nobody_uses() -> None:  # MPG-8
    assert _free([[], []]) == 0
    assert _free([[0, 1], [3], [2, 0]]) == 4
    with pytest.raises(UnavailableError, match="make new actors"):
        _free([list(range(_MAX_NUMBERS))])
