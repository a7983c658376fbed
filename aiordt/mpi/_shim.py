"""What Ray starts in place of a worker: asks a rank of mpiexec to become it, and ends.

Ray runs this file: only the standard library is used here, and as little of it as possible.

Invariants:
    MPI-3  No actor waits for ever for a rank: where none becomes the worker, an ordinary one
           starts, which says why not, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys

#: Of `aiordt.mpi._rank`, which this file cannot import.
_REFUSED = "AIORDT_MPI_REFUSED"
_RAY_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
_OUR_HOOK = "aiordt.mpi._adopted.begin"
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
#: A rank answers at once, unless it has been stopped.
_ANSWER_SECONDS = 20.0


def ask(token: str, rank: str, arguments: list[str]) -> str | None:
    """Ask a rank to become the worker; says why it does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(f"\0aiordt-mpi-{token}-{rank}")
        except OSError:
            return "it does not wait on this host (any more): it was used before, or has ended"
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] != os.getuid():
            return "it belongs to another user"
        sock.settimeout(_ANSWER_SECONDS)
        wanted = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}
        try:
            socket.send_fds(sock, [b" "], [0, 1, 2])
            sock.sendall(json.dumps(wanted).encode() + b"\n")
            with sock.makefile("rb") as stream:
                answer = json.loads(stream.readline() or b'{"refused": "it ended just now"}')
        except OSError as exc:
            return f"it does not answer: {exc}"
    refused: str | None = answer.get("refused")
    return refused


def main() -> None:
    """Hand this process's place to a rank, or be an ordinary worker that says why not (MPI-3)."""
    token, rank, *arguments = sys.argv[1:]
    reason = ask(token, rank, arguments)
    if reason is None:
        return
    os.environ[_REFUSED] = f"this actor cannot become rank {rank} of its MPI world: {reason}"
    os.environ[_RAY_HOOK] = _OUR_HOOK
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.environ.get("PYTHONPATH", ""), _ROOT])
    )
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
