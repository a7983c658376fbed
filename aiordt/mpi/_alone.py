"""A process as an MPI world of its own, of one rank, that can connect to others.

A process that no launcher started is a singleton to MPICH, and all singletons have the same name,
so that none of them can connect to another. Here the process serves PMI 1, the protocol by which
a rank learns of its world, to itself: at the other end of a socket pair, under a unique name.

Source: the wire format is that of MPICH's ``src/pmi`` (5.0).
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from aiordt.mpi._rank import unlink_segments

if TYPE_CHECKING:
    from collections.abc import Generator

#: By what variables a launcher tells a rank of its world.
_LAUNCHERS: Final = ("PMI_", "PMIX_")


@contextmanager
def alone(name: str) -> Generator[None]:
    """While MPI is initialised: make it a world of one rank.

    Args:
        name: Of the world; no other process may have it.
    """
    ours, theirs = socket.socketpair()
    # MPICH keeps the descriptor for good. The server lives as long: a client that finds its
    # connection closed ends the process.
    number = theirs.detach()
    threading.Thread(target=_serve, args=(ours, name), name="aiordt-mpi-pmi", daemon=True).start()
    # Another launcher's, of the node's daemons say: this process is none of its ranks.
    before = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith(_LAUNCHERS)}
    variables = {"PMI_FD": str(number), "PMI_RANK": "0", "PMI_SIZE": "1"}
    os.environ.update(variables)
    try:
        yield
    finally:
        for variable in variables:  # what this process starts is not our rank
            os.environ.pop(variable, None)
        os.environ.update(before)
        unlink_segments()


def _serve(sock: socket.socket, name: str) -> None:
    """Answer the questions of a client until it goes."""
    kept: dict[str, str] = {}
    plain = {
        "init": "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=1",
        "get_maxes": "cmd=maxes rc=0 kvsname_max=256 keylen_max=256 vallen_max=1024",
        "get_appnum": "cmd=appnum rc=0 appnum=0",
        "get_universe_size": "cmd=universe_size rc=0 size=1",
        "get_my_kvsname": f"cmd=my_kvsname rc=0 kvsname={name}",
        "barrier_in": "cmd=barrier_out rc=0",
        "finalize": "cmd=finalize_ack rc=0",
        "put": "cmd=put_result rc=0",
    }
    with sock, sock.makefile("rb") as lines:
        for line in lines:
            said = dict(word.partition("=")[::2] for word in line.decode().split())
            command = said.get("cmd", "")
            answer = plain.get(command, f"cmd={command}_result rc=-1 msg=not_supported")
            if command == "put":
                kept[said["key"]] = said["value"]
            elif command == "get":
                value = kept.get(said["key"])
                answer = (
                    "cmd=get_result rc=-1 msg=key_not_found found=FALSE value=unknown"
                    if value is None
                    else f"cmd=get_result rc=0 found=TRUE value={value}"
                )
            sock.sendall(f"{answer}\n".encode())
