"""The MPI library of this process: loaded and initialised once, when a group first needs it.

A process that a rank of ``mpiexec`` became keeps its place in that world. Any other makes itself
a world of one rank, from which groups grow: see `aiordt.collective.mpi`.

Invariants:
    MPG-1  Initialising MPI holds neither the GIL nor waits for another process, but for the other
           ranks of a world that ``mpiexec`` started.
    MPG-2  What user code initialised is left alone.
    MPG-7  One thread at a time is in a call of MPI.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aiordt._errors import UnavailableError
from aiordt.mpi._alone import alone
from aiordt.mpi._link import Link, init_thread
from aiordt.mpi._rank import WORLD, hold_mpi

if TYPE_CHECKING:
    from collections.abc import Generator

_NETMOD: Final = "MPIR_CVAR_CH4_NETMOD"
#: MPICH 5 has room for 1024 worlds in a process, and does not look whether there is any left.
_MAX_WORLDS: Final = 1000
_lock: Final = threading.Lock()
_started: list[Library] = []


def unavailable(reason: str) -> UnavailableError:
    """The error that says so."""
    return UnavailableError(f"mpi: {reason}", reason=reason, transport="mpi")


@dataclass(slots=True)
class Library:
    """MPI, initialised.

    Attributes:
        api: The module ``mpi4py.MPI``.
        version: What the library calls itself.
        world: The world of this process; no other has that name.
        rank: Of this process in it.
        alone: Whether it is a world of one rank, made here.
        calls: Held by who calls it. MPICH 5.0 lets the others wait anyhow while one waits to be
            connected, and its own locks cost as much. That it crashes otherwise, though it grants
            ``MPI_THREAD_MULTIPLE``, was suspected and is not proven.
    """

    api: Any
    version: str
    world: str
    rank: int
    alone: bool
    calls: threading.Lock = field(default_factory=threading.Lock)
    _met: set[str] = field(default_factory=set)

    def meet(self, worlds: set[str]) -> None:
        """Note which other worlds this process is about to connect to.

        Raises:
            UnavailableError: It has met as many as the library can take.
        """
        with _lock:
            if len(self._met | worlds) > _MAX_WORLDS:
                raise unavailable(
                    f"this process has been in groups with {len(self._met)} other processes, and "
                    "MPICH has no room for more; make new actors"
                )
            self._met |= worlds


def library() -> Library:
    """The library, initialised. Blocks; any thread.

    Raises:
        UnavailableError: It cannot be used here; says why.

    Cost:
        Some 50 ms, once.
    """
    with _lock:
        if not _started:
            _started.append(_start())
        return _started[0]


def version() -> str:
    """Which library it is, ``MPICH 5.0.2`` say; empty if there is none. Blocks; any thread."""
    try:
        return _version(_load())
    except UnavailableError:
        return ""


def _load() -> Any:  # noqa: ANN401
    try:
        hold_mpi()  # it would hold the GIL, and initialise in another way than ours
        if WORLD not in os.environ and "mpi4py.MPI" not in sys.modules:
            _load_ucx()
        from mpi4py import MPI as api  # noqa: N811, PLC0415
    except ImportError as exc:
        raise unavailable(f"{exc}: install aiordt[mpi]") from exc
    except RuntimeError as exc:
        raise unavailable(f"mpi4py finds no MPI library: {str(exc).splitlines()[0]}") from exc
    return api


def _load_ucx() -> None:
    """Load the UCX that the transport ``ucx`` has, before MPICH brings its own.

    Libraries of one name are loaded once, and that UCX cannot be loaded beside MPICH's older one,
    which MPICH does not insist on. The other way round is a crash: some of its libraries would
    be loaded, and the rest be MPICH's.
    """
    with suppress(ImportError):
        import libucx  # noqa: PLC0415  (optional)

        libucx.load_library()


def _start() -> Library:
    api = _load()
    version = _version(api)
    link = Link.current
    place = "" if link is None else os.environ.get(WORLD, "")
    name = f"aiordt-{time.time_ns():020}-{os.urandom(8).hex()}"  # in the order of their ages
    if api.Is_finalized():
        raise unavailable("this process has finalised MPI")
    if link is not None and place:
        link.initialise()  # in all ranks at once
    elif api.Is_initialized():
        raise unavailable(
            "code of this actor has initialised MPI itself (mpi4py does when MPI is imported, "
            "unless mpi4py.rc.initialize is False): leave that to aiordt, or start the actor "
            "by mpiexec, with python -m aiordt.mpi run"
        )
    else:
        _check_alone(api, version)
        with alone(name), _settings():
            if not init_thread(api):
                raise unavailable("the MPI library does not support MPI_THREAD_MULTIPLE")
    for communicator in (api.COMM_WORLD, api.COMM_SELF):
        communicator.Set_errhandler(api.ERRORS_RETURN)
    if link is None or not place:
        return Library(api, version, name, 0, alone=True)
    world, rank, _ = place.split(":")
    if api.COMM_WORLD.Get_rank() != int(rank):
        raise unavailable(f"{WORLD}={place}, but this is rank {api.COMM_WORLD.Get_rank()}")
    made = Library(api, version, world, int(rank), alone=False)
    link.before_finalise(made.calls.acquire)  # nobody calls any more
    return made


def _version(api: Any) -> str:  # noqa: ANN401
    text = str(api.Get_library_version())
    found = re.search(r"(Open MPI|MPICH|Intel\S* MPI Library|MVAPICH)\D*([\d.]+)", text)
    return f"{found[1]} {found[2]}" if found else text.splitlines()[0].strip()


def _check_alone(api: Any, version: str) -> None:  # noqa: ANN401
    """Refuse what cannot connect one process to another without a launcher.

    Raises:
        UnavailableError: This library cannot.
    """
    device = re.search(r"MPICH Device:\s*(.*)", str(api.Get_library_version()))
    if not version.startswith("MPICH ") or device is None:
        raise unavailable(
            f"actors that no mpiexec started need MPICH 5, and this is {version}: start them by "
            "python -m aiordt.mpi run"
        )
    if int(version.removeprefix("MPICH ").partition(".")[0]) < 5 or "ucx" not in device[1]:
        raise unavailable(
            f"actors that no mpiexec started need MPICH 5 with ch4:ucx, and this is {version} with "
            f"{device[1].strip()}: start them by python -m aiordt.mpi run"
        )
    if os.environ.get(_NETMOD, "ucx") != "ucx":
        raise unavailable(f"{_NETMOD} must be ucx, not {os.environ[_NETMOD]}")


@contextmanager
def _settings() -> Generator[None]:
    """While MPI is initialised: variables that it then reads, unless the user has set them."""
    made = {
        _NETMOD: "ucx",
        # Nothing that a process may leave broken in another when it dies. All that write to the
        # memory of one share its queue there; who is killed between taking a place in it and
        # marking that as written stops it for good, for all of them. And UCX ends the process when
        # it reads the memory of one that has died. By TCP each has a connection of its own.
        "UCX_TLS": "^shm",
        # How much one system call can move: while it does, no loop gets that core (megabytes and
        # milliseconds with the kernel's own sizes; p99 of a loop's lag 0.9 ms in place of 4).
        "UCX_TCP_SNDBUF": "512K",
        "UCX_TCP_RCVBUF": "512K",
        # Calls that block, of which there are some while a group forms, sleep between two looks
        # instead of spinning: one that waits for a member that is gone cannot be ended.
        "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
    }
    for variable in set(made) & set(os.environ):
        del made[variable]
    os.environ.update(made)
    try:
        yield
    finally:
        for variable in made:
            os.environ.pop(variable, None)
