"""A process's connection to the launcher of its MPI world, in rank 0 and in adopted workers.

MPI is initialised by all ranks of a world at once, or by none: the launcher, asked by one of them,
tells all, those that wait to be adopted among them. So no rank waits for one that never comes. It
happens on a thread of its own, without Python's lock: no event loop stands still meanwhile.

Invariants:
    MPI-4  The ranks of a world finalise MPI together, at its end, which is rank 0's.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from aiordt._errors import AiordtError, ClosedError, UnavailableError
from aiordt.mpi._rank import (
    HUB_FD,
    LAUNCHED,
    hold_mpi,
    load_mpi,
    of_rank,
    send_line,
    unlink_segments,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator, Mapping

_log = logging.getLogger(__name__)


class Link:
    """The connection, and the thread that listens to it.

    Args:
        sock: The connection.
        size: How many ranks the world has.
        environment: What mpiexec told this rank, if it is not in the environment.
        on_end: Called, on the thread, once MPI is finalised, or the launcher gone.
    """

    #: Of this process, if it is a rank.
    current: ClassVar[Link | None] = None

    def __init__(
        self,
        sock: socket.socket,
        size: int,
        environment: Mapping[str, str],
        on_end: Callable[[bool], None],
    ) -> None:
        sock.set_inheritable(False)
        self._sock = sock
        # Closed by nobody: the launcher is to see this end with the process, not with Python, which
        # closes its sockets while Ray still needs its node to let the process end well.
        os.dup(sock.fileno())
        self._lines = sock.makefile("rb")
        self._size = size
        self._environment = dict(environment)
        self._on_end = on_end
        self._sending = threading.Lock()
        self._up = threading.Event()
        self._ended = threading.Event()
        self._error: AiordtError | None = None
        self._mpi: Any = None
        self._initialised = False
        self._pmi: str | None = None
        self._callbacks: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run, name="aiordt-mpi-link", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        Link.current = self
        hold_mpi()
        self._say("ready")
        self._thread.start()

    def initialise(self) -> None:
        """Let all ranks initialise MPI; returns when they have. Blocks; idempotent.

        Raises:
            UnavailableError: MPI cannot be initialised; says why.
            ClosedError: The world has ended.
        """
        if not self._up.is_set():
            self._ask("init")
            self._up.wait()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """End the world in order (MPI-4); returns when its other ranks have. Blocks; idempotent."""
        if not self._ended.is_set():
            self._ask("end")
            self._ended.wait()

    @property
    def ended(self) -> bool:
        """Whether the world has."""
        return self._ended.is_set()

    def before_finalise(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` on the link's thread before MPI is finalised."""
        self._callbacks.append(callback)

    def leave(self) -> NoReturn:
        """End this process at once, with the status 0 that mpiexec wants to see."""
        if self._pmi is not None:
            # MPICH 5.0 says this at exit only, and hydra takes a rank that did not for a crash.
            os.write(int(self._pmi), b"cmd=finalize\n")
            os.read(int(self._pmi), 1024)
        os._exit(0)

    def _say(self, what: str, **more: object) -> None:
        with self._sending:
            send_line(self._sock, {"say": what, **more})

    def _ask(self, what: str) -> None:
        with suppress(OSError), self._sending:  # then `_run` sees the end
            send_line(self._sock, {"ask": what})

    # --- on the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        orderly = False
        try:
            for line in self._lines:
                message = json.loads(line)
                if message["do"] == "end":
                    self._finalise()
                    self._say("ended")
                    orderly = True
                    self._on_end(orderly)
                elif message["do"] == "ended":
                    break
                else:
                    self._obey(message)
        except OSError:
            _log.debug("the connection to the launcher broke", exc_info=True)
        self._fail(ClosedError("this MPI world has ended"))
        self._ended.set()
        if not orderly:
            self._on_end(orderly)

    def _obey(self, message: dict[str, Any]) -> None:
        match message["do"]:
            case "prepare":
                try:
                    self._mpi = load_mpi()
                except Exception as exc:  # noqa: BLE001  (others wait for the answer)
                    self._say("failed", error=f"{exc}")
                else:
                    self._say("prepared", library=self._mpi.Get_library_version())
            case "init":
                wrong = self._initialise()
                if wrong is None:
                    self._say("initialised")
                else:
                    self._say("failed", error=wrong)
            case "up":
                unlink_segments()
                self._up.set()
            case _:
                reason = str(message["reason"])  # "refused"
                self._fail(UnavailableError(f"mpi: {reason}", reason=reason, transport="mpi"))

    def _fail(self, error: AiordtError) -> None:
        if not self._up.is_set():
            self._error = error
            self._up.set()

    def _initialise(self) -> str | None:
        """Initialise MPI; what is wrong with the world that came of it."""
        with _set(self._environment):
            self._pmi = os.environ.get("PMI_FD")
            threaded = init_thread(self._mpi)
        self._initialised = True
        # An MPI program that this process starts is not its rank.
        for name in of_rank(dict(os.environ), LAUNCHED):
            del os.environ[name]
        if not threaded:
            return "the library does not support MPI_THREAD_MULTIPLE"
        size = self._mpi.COMM_WORLD.Get_size()
        if size != self._size:
            return f"its world has {size} ranks: mpiexec and mpi4py are of different MPIs"
        return None

    def _finalise(self) -> None:
        if not self._initialised or self._mpi.Is_finalized():
            return
        for callback in self._callbacks:
            callback()
        ctypes.CDLL(self._mpi.__file__).MPI_Finalize()


def init_thread(api: Any) -> bool:  # noqa: ANN401
    """``MPI_Init_thread`` without the GIL, which mpi4py's own would hold.

    Returns:
        Whether the library then grants ``MPI_THREAD_MULTIPLE``.
    """
    library, level = ctypes.CDLL(api.__file__), ctypes.c_int(-1)
    failed = library.MPI_Init_thread(None, None, api.THREAD_MULTIPLE, ctypes.byref(level))
    return not failed and level.value >= api.THREAD_MULTIPLE


@contextmanager
def _set(variables: Mapping[str, str]) -> Generator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


def inherited() -> int | None:
    """The descriptor of the connection that this process was started with; once."""
    number, _, pid = os.environ.pop(HUB_FD, "").partition(":")
    return int(number) if pid == str(os.getpid()) else None
