"""A rank of mpiexec, before it becomes what it is for: the script, or a Ray worker.

mpiexec runs this file, and not the package, which takes seconds to import: only the standard
library is used here.

Invariants:
    MPI-1  A rank becomes a worker for a process of its own user only, once, and with the
           environment, directory and standard streams of the worker that Ray wanted to start,
           beside what the MPI library needs from mpiexec.
    MPI-2  Nobody joins a world who does not know its key, which never leaves the environment of
           the ranks: Ray does not see it.
"""

from __future__ import annotations

import array
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

#: ``<address>,<port>,<key>`` of the launcher; of ranks only.
HUB: Final = "AIORDT_MPI_HUB"
#: ``<token>:<rank>:<size>`` of a rank that became a Ray worker.
WORLD: Final = "AIORDT_MPI_WORLD"
#: ``<descriptor>:<pid>``: the connection to the launcher that this very process inherits.
HUB_FD: Final = "AIORDT_MPI_HUB_FD"
#: What mpiexec told rank 0, which its children must not take for theirs.
STASH: Final = "AIORDT_MPI_ENVIRONMENT"
#: Why a worker is not the rank that it should be.
REFUSED: Final = "AIORDT_MPI_REFUSED"
#: The user's own hook, which ours runs.
HOOK: Final = "AIORDT_MPI_HOOK"
#: By which Ray (2.57 to 2.60) runs a function as a worker starts.
RAY_HOOK: Final = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
OUR_HOOK: Final = "aiordt.mpi._adopted.begin"

#: Variables by which mpiexec, prterun and srun tell a process which rank it is.
LAUNCHED: Final = ("PMI", "HYD", "MPI_LOCAL", "OMPI_", "OPAL_", "PRTE_", "PALS_", "MV2_COMM_")
#: ... and those by which libraries under MPI are configured.
CONFIGURED: Final = ("MPI", "I_MPI_", "MV2_", "SLURM_", "UCX_", "FI_")
#: Names of a rank's number, in order of preference: Open MPI sets PMIX_RANK too.
_RANK_NAMES: Final = (
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "PALS_RANKID",
    "SLURM_PROCID",
)

_ROOT: Final = str(Path(__file__).resolve().parents[2])
_SHIM: Final = str(Path(__file__).resolve().with_name("_shim.py"))
#: What MPICH keeps in shared memory until it is finalised.
_SEGMENT: Final = "/dev/shm/mpich_shm_"  # noqa: S108  (MPICH's choice)
_SIOCGIFADDR: Final = 0x8915
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


def socket_name(token: str, rank: int) -> str:
    """The abstract Unix socket at which a rank waits; hosts that share no network may share it."""
    return f"\0aiordt-mpi-{token}-{rank}"


def same_user(peer: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket is of our user (MPI-1)."""
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1]) == os.getuid()


def own_rank(environment: dict[str, str]) -> int:
    """Which rank mpiexec says this is.

    Raises:
        LookupError: It does not say.
    """
    for name in _RANK_NAMES:
        if name in environment:
            return int(environment[name])
    raise LookupError(
        f"mpiexec has set none of {', '.join(_RANK_NAMES)}: aiordt does not know this launcher"
    )


def addresses() -> list[str]:
    """The IPv4 addresses of this host, by which its Ray node may be known."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", name.encode()[:15]))
            try:
                fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            found.append(socket.inet_ntoa(request[20:24].tobytes()))
    return found


def send_line(sock: socket.socket, message: object) -> None:
    """Write a message: a line of JSON."""
    sock.sendall(json.dumps(message).encode() + b"\n")


def read_line(sock: socket.socket) -> Any:  # noqa: ANN401
    """Read a message and not a byte more: the next ones are for the program that comes.

    Raises:
        EOFError: The other end has closed.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            raise EOFError("the connection to the launcher of mpiexec is closed")
        line += byte
    return json.loads(line)


def proof(key: str, side: str, *nonces: str) -> str:
    """What shows that one side knows the key (MPI-2)."""
    return hmac.new(key.encode(), "/".join((side, *nonces)).encode(), hashlib.sha256).hexdigest()


def join(hub: str, hello: dict[str, object]) -> tuple[socket.socket, dict[str, Any]]:
    """Connect to the launcher, and let each prove to the other that it knows the key.

    Returns:
        The connection, and what the launcher says of the world.

    Raises:
        PermissionError: What answers there is not the launcher.
        OSError: It cannot be reached.
        EOFError: It refused.
    """
    address, port, key = hub.split(",")
    sock = socket.create_connection((address, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    theirs, ours = str(read_line(sock)["nonce"]), secrets.token_hex(16)
    send_line(sock, {**hello, "nonce": ours, "proof": proof(key, "rank", theirs, ours)})
    welcome = read_line(sock)
    if not hmac.compare_digest(str(welcome["proof"]), proof(key, "hub", theirs, ours)):
        raise PermissionError(f"{address}:{port} is not the launcher of this world")
    return sock, welcome


def of_rank(environment: dict[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The variables with these prefixes."""
    return {name: value for name, value in environment.items() if name.startswith(prefixes)}


def _passed(descriptor: int) -> str:
    """The value of `HUB_FD`; children inherit the variable, but not the connection."""
    return f"{descriptor}:{os.getpid()}"


def worker_environment(
    worker: dict[str, str], rank: dict[str, str], world: str, hub_fd: int
) -> dict[str, str]:
    """The environment of a rank that becomes a worker (MPI-1).

    Args:
        worker: The one of the worker that Ray wanted to start.
        rank: The rank's own.
        world: The value of `WORLD`.
        hub_fd: The connection to the launcher.
    """
    # The worker's has what the script handed to a Ray node that it started.
    foreign = (*LAUNCHED, "AIORDT_MPI_")
    merged = {name: value for name, value in worker.items() if not name.startswith(foreign)}
    merged |= of_rank(rank, LAUNCHED + CONFIGURED)
    for name, added in (("LD_LIBRARY_PATH", rank.get("LD_LIBRARY_PATH")), ("PYTHONPATH", _ROOT)):
        before = [path for path in worker.get(name, "").split(os.pathsep) if path]
        paths = [path for path in (added or "").split(os.pathsep) if path and path not in before]
        if paths:
            merged[name] = os.pathsep.join([*before, *paths])
    if RAY_HOOK in merged:
        merged[HOOK] = merged[RAY_HOOK]
    return merged | {WORLD: world, HUB_FD: _passed(hub_fd), RAY_HOOK: OUR_HOOK}


def unlink_segments() -> None:
    """Take the names from MPICH's shared memory, which all ranks of this host have mapped by now.

    Else it stays when a rank is killed.
    """
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        path = line.partition(_SEGMENT)[2]
        if path:
            with suppress(OSError):
                Path(_SEGMENT + path).unlink()


def hold_mpi() -> None:
    """Let ``from mpi4py import MPI`` neither initialise MPI nor, later, finalise it."""
    with suppress(ImportError):
        import mpi4py  # noqa: PLC0415  (optional)

        mpi4py.rc.initialize = mpi4py.rc.finalize = False


def load_mpi() -> Any:  # noqa: ANN401
    """The module ``mpi4py.MPI``, not initialised.

    Raises:
        ImportError: There is no mpi4py.
        RuntimeError: It finds no MPI library, or MPI is initialised.
    """
    hold_mpi()
    from mpi4py import MPI  # noqa: PLC0415  (optional, and loads the library)

    if MPI.Is_initialized():
        raise RuntimeError("code in it has initialised MPI itself")
    return MPI


class Waiting:
    """A rank that waits: to be adopted, to initialise MPI where it is, or for the end."""

    def __init__(self, rank: int, world: dict[str, Any], hub: socket.socket) -> None:
        self._rank = rank
        self._world = f"{world['token']}:{rank}:{world['size']}"
        self._hub = hub
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(socket_name(world["token"], rank))
        self._door.listen()
        self._mpi: Any = None
        self._initialised = False

    def run(self) -> NoReturn:
        """Wait; ends as another program, or ends the process."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._hub, selectors.EVENT_READ, self._told)
            selector.register(self._door, selectors.EVENT_READ, self._asked)
            send_line(self._hub, {"say": "waiting"})
            while True:
                for key, _ in selector.select():
                    key.data()

    def _told(self) -> None:
        """The launcher says something."""
        try:
            message = read_line(self._hub)
        except (EOFError, ConnectionError):
            sys.exit(f"rank {self._rank}: the launcher of this MPI world is gone")
        if message["do"] == "prepare":
            self._prepare()
        elif message["do"] == "init":
            self._mpi.Init_thread()
            self._initialised = True
            send_line(self._hub, {"say": "initialised"})
        elif message["do"] == "up":
            unlink_segments()
        elif message["do"] == "end":
            if self._initialised:
                self._mpi.Finalize()
            send_line(self._hub, {"say": "ended"})
            sys.exit(0)

    def _prepare(self) -> None:
        """Load MPI here, since the other ranks cannot initialise it without this one."""
        try:
            self._mpi = load_mpi()
        except (ImportError, RuntimeError) as exc:
            send_line(self._hub, {"say": "failed", "error": str(exc)})
        else:
            library = self._mpi.Get_library_version()
            send_line(self._hub, {"say": "prepared", "library": library})

    def _asked(self) -> None:
        """A process of this host wants this one to become a worker."""
        with self._door.accept()[0] as shim:
            if not same_user(shim):
                return
            data, descriptors, _, _ = socket.recv_fds(shim, 1, 3)
            if not data:
                return  # it ended before it had said anything
            with shim.makefile("rb") as stream:
                line = stream.readline()
            try:
                if not line.endswith(b"\n") or len(descriptors) != 3:
                    return
                if self._initialised:
                    refusal = "MPI was initialised in it before an actor was made with it"
                    send_line(shim, {"refused": refusal})
                    return
                self._become(json.loads(line), descriptors, shim)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _become(self, wanted: dict[str, Any], descriptors: list[int], shim: socket.socket) -> None:
        try:
            os.chdir(wanted["cwd"])
        except OSError as exc:
            send_line(shim, {"refused": str(exc)})
            return
        environment = worker_environment(
            wanted["environment"], dict(os.environ), self._world, self._hub.fileno()
        )
        send_line(self._hub, {"say": "adopted"})
        send_line(shim, {"adopted": os.getpid()})
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.set_inheritable(self._hub.fileno(), True)  # noqa: FBT003
        os.execve(sys.executable, [sys.executable, *wanted["arguments"]], environment)  # noqa: S606


def become_script(command: list[str], hub: socket.socket) -> NoReturn:
    """Rank 0: run the script; what mpiexec told this process is kept for a later `initialise`."""
    stash = of_rank(dict(os.environ), LAUNCHED)
    environment = {name: value for name, value in os.environ.items() if name not in stash}
    environment |= {STASH: json.dumps(stash), HUB_FD: _passed(hub.fileno())}
    os.set_inheritable(hub.fileno(), True)  # noqa: FBT003
    os.execve(sys.executable, [sys.executable, *command], environment)  # noqa: S606


def main(command: list[str]) -> NoReturn:
    """Be a rank of the world whose launcher the environment names."""
    hub_address = os.environ.pop(HUB, "")
    if not hub_address:
        sys.exit(f"{HUB} is not set: mpiexec hands no variables to its ranks")
    try:
        rank = own_rank(dict(os.environ))
        hello = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "addresses": addresses(),
            "shim": [sys.executable, _SHIM],
        }
        hub, world = join(hub_address, hello)
    except (LookupError, OSError, EOFError) as exc:
        sys.exit(f"aiordt.mpi: a rank on {socket.gethostname()} cannot join its world: {exc}")
    if rank == 0:
        become_script(command, hub)
    Waiting(rank, world, hub).run()


if __name__ == "__main__":
    main(sys.argv[1:])
