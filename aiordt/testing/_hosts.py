"""Two real hosts on one machine, out of Linux namespaces, with a Ray cluster across them.

Each host has network, pid, ipc and mount namespaces of its own, with a private ``/proc``,
``/tmp`` and ``/dev/shm``; both are plugged into a switch, a bridge in a third network
namespace. Everything is anonymous: nothing of it appears in the machine's own network
namespace, so any number of pairs may run side by side with the same addresses, and no name
has to be cleaned up.

Invariants:
    HST-1  A host lives as long as its init, and that as long as a pipe which only the process
           that made the host holds: whatever ends that process, SIGKILL included, ends every
           process of the host, and with the last one its namespaces and links go.
"""

from __future__ import annotations

import functools
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiordt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

#: What a slow link lets through at once if it had nothing to carry before.
SLOW_BURST_NBYTES: Final = 256 << 10

_ROOT: Final = Path(aiordt.__file__).resolve().parent.parent
_ADDRESSES: Final = ("10.77.0.1", "10.77.0.2")
_GCS_PORT: Final = 6379
_START_SECONDS: Final = 60.0
_PRIVATE: Final = ("--net", "--ipc", "--mount", "--pid", "--fork", "--mount-proc")
_PROBE: Final = (
    "ip link add v0 type veth peer name v1 && ip link add br0 type bridge && "
    "tc qdisc add dev v0 root tbf rate 1mbit burst 32kb latency 50ms"
)
# `echo` says that the mounts are there; `cat` ends with the pipe (HST-1). The shell is the init,
# and buries orphans: to Ray's workers, a raylet that is a zombie is alive.
_INIT: Final = (
    'for at in /dev/shm "$0"; do mount -t tmpfs tmpfs "$at" || exit; done; echo; cat; exit'
)


@functools.cache
def hosts_unavailable() -> str | None:
    """Why `two_hosts` cannot work here; ``None`` if it can. Takes some 20 ms, once."""
    if not sys.platform.startswith("linux"):
        return "two hosts need Linux's namespaces"
    if os.geteuid() != 0:
        return "two hosts need root, to make network namespaces"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"two hosts need {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        _execute(["unshare", *_PRIVATE, "sh", "-c", _PROBE])
    except (OSError, subprocess.SubprocessError) as exc:
        return f"two hosts cannot be made here: {exc}"
    return None


def _execute(command: Sequence[str]) -> None:
    """Run a short command.

    Raises:
        SubprocessError: It failed; the message holds what it said.
    """
    done = subprocess.run(  # noqa: S603
        command, check=False, capture_output=True, text=True, timeout=_START_SECONDS
    )
    if done.returncode != 0:
        raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended.

    Attributes:
        exit_code: Its exit status; minus the signal's number if one killed it.
        output: What it wrote to stdout and stderr, together.
    """

    exit_code: int
    output: str


class Program:
    """A program that runs inside a host; leaving its context kills it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that `kill` reaches more than nsenter
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._seen.append(line)
                self._lines.put(line)
        self._lines.put(None)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return "".join(self._seen)

    def tell(self, line: str) -> None:
        """Write a line to its standard input.

        Raises:
            OSError: It has ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def end_input(self) -> None:
        """Let it read the end of its standard input. Idempotent."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def expect(self, prefix: str, *, seconds: float) -> str:
        """Wait for its next line that begins with ``prefix``.

        Returns:
            The rest of that line.

        Raises:
            TimeoutError: It did not come within ``seconds``.
            EOFError: The program ended without it.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                raise TimeoutError(f"no line {prefix!r} in {seconds} s:\n{self.output}") from None
            if line is None:
                raise EOFError(f"the program ended without a line {prefix!r}:\n{self.output}")
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip()

    def wait(self, *, seconds: float) -> Completed:
        """Wait for its end; it can read no more.

        Raises:
            TimeoutError: It did not end within ``seconds``; it has been killed.
        """
        self.end_input()
        try:
            exit_code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the program ran over {seconds} s:\n{self.output}") from None
        self._reader.join(1.0)  # daemons that it left behind may hold its stdout
        return Completed(exit_code, self.output)

    def kill(self) -> None:
        """Kill it. Idempotent."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.end_input()
        self._reader.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Host:
    """A network namespace, and in a host proper pid, ipc and mount namespaces too."""

    def __init__(
        self, name: str, address: str, *, unshare: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.address = address
        self._environment = dict(environment)
        hidden = "/tmp"  # noqa: S108  (a private one)
        if any(Path(path).is_relative_to(hidden) for path in (_ROOT, sys.prefix)):
            hidden = "/tmp/ray"  # noqa: S108  (all that Ray uses of it; the code is beside)
            Path(hidden).mkdir(exist_ok=True)
        init = _INIT if "--mount" in unshare else "echo; exec cat"
        self._init = subprocess.Popen(  # noqa: S603
            ["unshare", *unshare, "sh", "-c", init, hidden],  # noqa: S607
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the tests, which end the host
        )
        assert self._init.stdout is not None
        if not self._init.stdout.readline():
            self.kill()
            raise RuntimeError(f"host {name} did not start")
        pid = self._init.pid
        self._enter = ["nsenter", f"--target={pid}", "--net"]
        if "--pid" in unshare:
            self._enter += ["--ipc", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children"]

    @property
    def alive(self) -> bool:
        """Whether it has not been killed."""
        return self._init.poll() is None

    def execute(self, *command: str) -> None:
        """Run a short command inside.

        Raises:
            SubprocessError: It failed.
        """
        _execute([*self._enter, *command])

    def start(self, script: Path, *args: str, unshare: Sequence[str] = ()) -> Program:
        """Start a Python script inside, as a driver: ``ray.init()`` finds the cluster.

        Args:
            script: Its file.
            *args: Its arguments.
            unshare: Options of unshare(1): run it in further namespaces of its own, as in a
                container that shares this host's network.
        """
        return self.start_command(sys.executable, str(script), *args, unshare=unshare)

    def start_command(self, *command: str, unshare: Sequence[str] = ()) -> Program:
        """Start any program inside, in the directory that this process is in."""
        prefix = [*self._enter, "env", f"--chdir={Path.cwd()}"]
        if unshare:
            prefix += ["unshare", *unshare]
        return Program([*prefix, *command], self._environment)

    def run(self, script: Path, *args: str, seconds: float) -> Completed:
        """Run a Python script inside to its end; see `start` and `Program.wait`."""
        with self.start(script, *args) as program:
            return program.wait(seconds=seconds)

    def path(self, inside: str) -> Path:
        """A file of this host, as this process reaches it."""
        return Path(f"/proc/{self._init.pid}/root{inside}")

    def pids(self) -> list[int]:
        """The processes inside, by their ids outside."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (entry / "ns/pid").readlink() == self._pid_namespace:
                    found.append(int(entry.name))
        return found

    @functools.cached_property
    def _pid_namespace(self) -> Path:
        return Path(f"/proc/{self._init.pid}/ns/pid_for_children").readlink()

    def kill(self) -> None:
        """Kill every process inside, at once; returns when all are gone. Idempotent."""
        assert self._init.stdin is not None
        self._init.stdin.close()  # ends the init, and the kernel kills the rest
        try:
            self._init.wait(10)
        except subprocess.TimeoutExpired:
            self._init.kill()
            self._init.wait()
        if self._init.stdout is not None:
            self._init.stdout.close()


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """Two hosts and what joins them. Made by `two_hosts`.

    Attributes:
        h1: The host with the head node, resource ``h1``.
        h2: The other one, resource ``h2``.
    """

    h1: Host
    h2: Host
    _switch: Host
    _join: tuple[str, ...]

    def cut(self, *, silently: bool = False) -> None:
        """Cut the link between the hosts.

        Args:
            silently: The hosts keep their carrier, as when something in between fails; else
                ``h2``'s cable is pulled.
        """
        self._switch.execute("ip", "link", "set", "h2", "nomaster" if silently else "down")

    def restore(self) -> None:
        """Undo `cut`."""
        self._switch.execute("ip", "link", "set", "h2", "master", "br0", "up")

    def kill_node(self) -> None:
        """Kill the raylet of ``h2``, as Ray's node fails: its actors end by themselves."""
        for pid in self.h2.pids():
            with suppress(OSError):
                if Path(f"/proc/{pid}/exe").readlink().name == "raylet":
                    os.kill(pid, signal.SIGKILL)

    def start_node(self) -> None:
        """Start a node on ``h2``; there is one, until `kill_node`.

        Raises:
            RuntimeError: It did not start.
        """
        _start_ray(self.h2, *self._join)

    def slow(self, megabits: int | None) -> None:
        """Limit both directions to so many megabits a second; ``None`` lifts the limit."""
        for port in [host.name for host in (self.h1, self.h2) if host.alive]:
            if megabits is None:
                self._switch.execute("tc", "qdisc", "del", "dev", port, "root")
            else:
                limit = f"rate {megabits}mbit burst {SLOW_BURST_NBYTES} latency 50ms".split()
                qdisc = ("tc", "qdisc", "replace", "dev", port, "root", "tbf")
                self._switch.execute(*qdisc, *limit)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """One environment for every node and driver; no setting of the caller's Ray comes in."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "AIORDT_"))
    }
    python_path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(python_path),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": f"{_ADDRESSES[0]}:{_GCS_PORT}",
        # An address that is not loopback turns Ray's token authentication on.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_allow_out_of_band_object_ref_serialization": "0",
        **extra,
    }


def _start_ray(host: Host, *options: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    command += [f"--node-ip-address={host.address}", f'--resources={{"{host.name}": 1000}}']
    with host.start_command(*command) as program:
        done = program.wait(seconds=_START_SECONDS)
    if done.exit_code != 0:
        raise RuntimeError(f"Ray did not start on {host.name}:\n{done.output}")


@contextmanager
def two_hosts(
    *,
    num_cpus: int = 2,
    object_store_nbytes: int = 100 << 20,
    environment: Mapping[str, str] | None = None,
) -> Iterator[TwoHosts]:
    """Make two hosts with a Ray node each; ask `hosts_unavailable` first.

    Actors are placed by ``resources={"h1": 1}`` or ``{"h2": 1}``. Leaving the context kills
    all that runs in the hosts and leaves nothing behind.

    Args:
        num_cpus: CPUs that each node offers.
        object_store_nbytes: Size of each node's object store.
        environment: More variables for every node and driver.

    Raises:
        RuntimeError: A host or its Ray node did not start.
        SubprocessError: The network could not be made.

    Cost:
        About 8 s on two cores.
    """
    variables = _environment(environment or {})
    with ExitStack() as stack:
        switch = Host("switch", "", unshare=["--net"], environment=variables)
        stack.callback(switch.kill)
        switch.execute("ip", "link", "add", "br0", "type", "bridge")
        switch.execute("ip", "link", "set", "br0", "up")
        hosts = []
        for name, address in zip(("h1", "h2"), _ADDRESSES, strict=True):
            host = Host(name, address, unshare=_PRIVATE, environment=variables)
            stack.callback(host.kill)
            hosts.append(host)
            peer = ("peer", "name", "eth0", "netns", str(host._init.pid))  # noqa: SLF001
            switch.execute("ip", "link", "add", name, "type", "veth", *peer)
            switch.execute("ip", "link", "set", name, "master", "br0", "up")
            host.execute("ip", "address", "add", f"{address}/24", "dev", "eth0")
            host.execute("ip", "link", "set", "lo", "up")
            host.execute("ip", "link", "set", "eth0", "up")
            # Leads nowhere; Ray finds a node's address by the route to the internet.
            host.execute("ip", "route", "add", "default", "dev", "eth0")
        common = (f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_nbytes}")
        quiet = ("--include-dashboard=false", "--disable-usage-stats")
        _start_ray(hosts[0], "--head", f"--port={_GCS_PORT}", *quiet, *common)
        join = (f"--address={_ADDRESSES[0]}:{_GCS_PORT}", *common)
        made = TwoHosts(hosts[0], hosts[1], switch, join)
        made.start_node()
        yield made
