"""``python -m aiordt.mpi run``: one mpiexec, whose ranks are the script and Ray's workers to be.

Invariants:
    MPI-6  When the launcher ends, nothing that it started goes on; its exit status is the
           script's, or tells that a rank died, and then it says which.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiordt._errors import UsageError
from aiordt.mpi._hub import Hub, State
from aiordt.mpi._rank import HUB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USAGE: Final = """\
usage: python -m aiordt.mpi run -n N [--mpiexec PATH] [MPIEXEC OPTIONS] -- SCRIPT [ARGUMENTS]

Start N ranks by one mpiexec. Rank 0 runs the script; the others become actors where the script
uses aiordt.mpi.world(). SCRIPT may also be options of Python, such as -m MODULE.

  -n, -np, --np N   how many ranks, the script's among them; at least 2
  --mpiexec PATH    mpiexec, mpirun or srun; by default the mpiexec beside Python, else of PATH

Everything else before -- is for mpiexec.
"""

#: From the end of the script, or of an actor, to that of all ranks; else they are killed, and
#: with them what mpiexec says. Open MPI takes 2 s after a death, and more than 5 on a busy machine.
_END_SECONDS: Final = 15.0
#: From a signal until the ranks that do not heed it are killed.
_GRACE_SECONDS: Final = 15.0
_KILL_SECONDS: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Command:
    """What to run.

    Attributes:
        size: How many ranks.
        mpiexec: The launcher of the MPI library.
        options: What is passed on to it.
        script: What is passed on to Python in rank 0.
    """

    size: int
    mpiexec: str
    options: tuple[str, ...]
    script: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Command:
    """Understand the arguments that follow ``run``.

    By hand: parsers for words take mpiexec's ``-genv`` for ``-g -e -n v``.

    Raises:
        UsageError: They are not valid; says what is wrong.
    """
    if "--" not in arguments:
        raise UsageError("the script goes after --")
    at = list(arguments).index("--")
    script = tuple(arguments[at + 1 :])
    size, mpiexec, options = None, None, []
    words = iter(arguments[:at])
    for word in words:
        name, equals, value = word.partition("=")
        if name in {"-n", "-np", "--np", "--mpiexec"}:
            value = value if equals else next(words, "")
            if name == "--mpiexec":
                mpiexec = value
            elif value.isdecimal():
                size = int(value)
            else:
                raise UsageError(f"{name} takes a number, not {value!r}")
        else:
            options.append(word)
    if size is None:
        raise UsageError("-n N is missing: how many ranks")
    if size < 2:
        raise UsageError(f"-n {size}: rank 0 runs the script, so that there must be 2 or more")
    if not script:
        raise UsageError("there is no script after --")
    if not script[0].startswith("-") and not Path(script[0]).is_file():
        raise UsageError(f"there is no script {script[0]!r}")
    return Command(size, find_mpiexec(mpiexec), tuple(options), script)


def find_mpiexec(given: str | None) -> str:
    """The path of mpiexec.

    Raises:
        UsageError: There is none.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise UsageError(f"--mpiexec {given}: there is no such program")
        return found
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if found is None:
        raise UsageError(
            "there is no mpiexec, neither beside Python nor in PATH: install one "
            "(pip install aiordt[mpi] brings MPICH's), or name it by --mpiexec"
        )
    return found


def flavour(version: str) -> str:
    """Which family a launcher is of, by what it answers to ``--version``."""
    for mark, name in (
        ("Open MPI", "openmpi"),
        ("OpenRTE", "openmpi"),
        ("prterun", "openmpi"),
        ("HYDRA", "hydra"),
        ("Intel", "hydra"),
        ("slurm", "slurm"),
    ):
        if mark in version:
            return name
    return "unknown"


def library_of(mpiexec: str) -> str | None:
    """The MPI library that is installed with an mpiexec, so that mpi4py loads that one."""
    for folder in ("lib", "lib64"):
        for name in ("libmpi.so.40", "libmpi.so.12", "libmpi.so"):
            path = Path(mpiexec).absolute().parent.parent / folder / name
            if path.is_file():
                return str(path)
    return None


def mpiexec_line(command: Command, kind: str) -> list[str]:
    """What to execute."""
    line = [command.mpiexec, "-n", str(command.size)]
    if kind == "openmpi":  # the others pass the whole environment on
        line += ["-x", HUB, "-x", "MPI4PY_LIBMPI", "-x", "PYTHONPATH", "-x", "PATH"]
    rank = str(Path(__file__).with_name("_rank.py"))
    # Not isolated (-I): mpi4py may be found by PYTHONPATH.
    return [*line, *command.options, sys.executable, "-P", rank, *command.script]


def environment_for(command: Command, hub: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of mpiexec, and of the ranks."""
    environment = dict(inherited) | {HUB: hub}
    library = library_of(command.mpiexec)
    if library is not None:
        environment.setdefault("MPI4PY_LIBMPI", library)
    environment.setdefault("PYTHONPATH", "")
    return environment


def own_address() -> str:
    """The address by which other hosts reach this one, or the loopback's if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))  # sends nothing: asks for the route
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def say(text: str) -> None:
    """Tell the user, beside what the script says."""
    print(f"aiordt.mpi: {text}", file=sys.stderr, flush=True)  # noqa: T201


class _Launch:
    """One mpiexec, from its start to its end."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._hub = Hub(command.size)
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._signal: signal.Signals | None = None

    async def run(self) -> int:
        """Run it to its end; its exit status."""
        address = own_address()
        server = await asyncio.start_server(self._hub.serve, address, 0, limit=1 << 24)
        port = server.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        try:
            version = await _version(self._command.mpiexec)
            process = await asyncio.create_subprocess_exec(
                *mpiexec_line(self._command, flavour(version)),
                env=environment_for(self._command, f"{address},{port},{self._hub.key}", os.environ),
                start_new_session=True,  # a terminal's Ctrl-C is for us, and we tell the script
                preexec_fn=functools.partial(_end_with_parent, ctypes.CDLL(None)),
            )
            try:
                status = await self._attend(process)
            finally:
                await _kill(process)
        finally:
            server.close()
            await self._hub.aclose()
        return status

    async def _attend(self, process: asyncio.subprocess.Process) -> int:
        ended = asyncio.create_task(process.wait())
        watches = [
            asyncio.create_task(watch)
            for watch in (self._heed_signals(process), self._watch_death(), self._watch_end())
        ]
        try:
            done, _ = await asyncio.wait({ended, *watches}, return_when=asyncio.FIRST_COMPLETED)
            for watch in watches:
                if watch in done:
                    watch.result()
            status = ended.result() if ended in done else None
        finally:
            for task in (ended, *watches):
                task.cancel()
            await asyncio.wait({ended, *watches})
        return self._status(status)

    def _status(self, status: int | None) -> int:
        """The launcher's own, given mpiexec's, which is ``None`` if it must be killed."""
        if self._signal is not None:
            return 128 + self._signal
        if status is not None and status < 0:
            status = 128 - status
        if status != 0 and self._hub.trouble:
            told = "" if status is None else f"; mpiexec says: exit status {status}"
            say(f"{self._hub.trouble}{told}")
        return 1 if status is None else status

    async def _heed_signals(self, process: asyncio.subprocess.Process) -> None:
        """Pass a signal on to the script; a second one, or none heeded, ends all at once."""
        self._signal = await self._signals.get()
        script = self._hub.members.get(0)
        if script is None or not script.local or script.state is State.ENDED:
            process.send_signal(self._signal)
        else:
            with suppress(ProcessLookupError):
                os.kill(script.pid, self._signal)
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                await self._signals.get()

    async def _watch_death(self) -> None:
        await self._hub.broken.wait()
        await asyncio.sleep(_END_SECONDS)

    async def _watch_end(self) -> None:
        """Wait until the ranks are late that should have ended by themselves."""
        await self._hub.ending.wait()
        await asyncio.sleep(_END_SECONDS)
        members = self._hub.members.values()
        left = [str(each) for each in members if each.rank and each.state is not State.ENDED]
        if not left:
            await self._hub.script_gone.wait()  # it may go on without them
            await asyncio.sleep(_END_SECONDS)
        say(f"killed, since the world has ended and they have not: {', '.join(left) or 'mpiexec'}")


def _end_with_parent(libc: Any) -> None:  # noqa: ANN401
    """Let the kernel end this process when the launcher is killed; it passes that on."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def _version(mpiexec: str) -> str:
    process = await asyncio.create_subprocess_exec(
        mpiexec, "--version", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode(errors="replace")


async def _kill(process: asyncio.subprocess.Process) -> None:
    """End mpiexec, which ends its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await process.wait()


def run(arguments: Sequence[str]) -> int:
    """Run a script and its ranks; the exit status."""
    try:
        command = parse(arguments)
    except UsageError as exc:
        say(f"{exc}\n\n{USAGE}")
        return 2
    return asyncio.run(_Launch(command).run())
