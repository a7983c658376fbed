"""The launcher's parts that need no MPI: its command line, its ranks' environment, its hub."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiordt import testing
from aiordt._errors import InvalidValueError, UsageError
from aiordt.mpi import _hub, _launch, _rank, _shim, _world, world
from aiordt.mpi._hub import Hub
from aiordt.mpi._link import inherited

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

RANK = str(Path(_rank.__file__))
THIS = __file__
NOBODY = 65534

# --- the command line ----------------------------------------------------------------------


def parsed(*words: str) -> _launch.Command:
    return _launch.parse([*words, "--", THIS])


def test_what_is_not_ours_goes_to_mpiexec() -> None:
    words = ["-genv", "NAME", "value", "-np", "3", "--mpiexec", sys.executable, "-hosts", "a,b"]
    command = _launch.parse([*words, "--", THIS, "-n", "5", "--", "x"])
    assert command.size == 3
    assert command.mpiexec == sys.executable
    assert command.options == ("-genv", "NAME", "value", "-hosts", "a,b")
    assert command.script == (THIS, "-n", "5", "--", "x")
    assert parsed("--np=2", f"--mpiexec={sys.executable}").size == 2
    assert _launch.parse(["-n", "2", "--", "-m", "json.tool"]).script == ("-m", "json.tool")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2", THIS], "after --"),
        (["--", THIS], "-n N is missing"),
        (["-n", "--", THIS], "takes a number"),
        (["-n", "two", "--", THIS], "takes a number, not 'two'"),
        (["-n", "1", "--", THIS], "2 or more"),
        (["-n", "2", "--"], "no script"),
        (["-n", "2", "--", "/nowhere.py"], "no script '/nowhere.py'"),
        (["-n", "2", "--mpiexec", "/nowhere", "--", THIS], "no such program"),
    ],
)
def test_a_wrong_command_line_says_why(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _launch.parse(words)


def test_no_mpiexec_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"install one .* or name it by --mpiexec"):
        _launch.find_mpiexec(None)
    (tmp_path / "mpiexec").touch(mode=0o755)
    assert _launch.find_mpiexec(None) == str(tmp_path / "mpiexec")


def test_the_exit_status_of_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _launch.run(["-n", "1", "--", THIS]) == 2
    assert "usage: python -m aiordt.mpi run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", "hydra"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11", "hydra"),
        ("mpiexec (Open MPI) 5.0.11", "openmpi"),
        ("prterun (PRRTE) 3.0", "openmpi"),
        ("slurm 23.02.6", "slurm"),
        ("something else", "unknown"),
    ],
)
def test_launchers_are_told_apart(version: str, kind: str) -> None:
    assert _launch.flavour(version) == kind


def test_the_line_of_mpiexec(tmp_path: Path) -> None:
    command = _launch.Command(3, str(tmp_path / "bin/mpiexec"), ("-x", "A"), ("s.py", "--b"))
    plain = [command.mpiexec, "-n", "3", "-x", "A", sys.executable, "-P", RANK, "s.py", "--b"]
    assert _launch.mpiexec_line(command, "hydra") == plain
    assert _launch.mpiexec_line(command, "unknown") == plain
    line = _launch.mpiexec_line(command, "openmpi")
    assert line[3:5] == ["-x", _rank.HUB], "the name only: the value is a secret"
    assert line[-7:] == plain[3:]


def test_mpi4py_is_told_of_the_library_beside_mpiexec(tmp_path: Path) -> None:
    command = _launch.Command(2, str(tmp_path / "bin/mpiexec"), (), ("s.py",))
    assert "MPI4PY_LIBMPI" not in _launch.environment_for(command, "hub", {})
    library = tmp_path / "lib/libmpi.so.40"
    library.parent.mkdir()
    library.touch()
    made = _launch.environment_for(command, "hub", {"A": "b"})
    assert (made["MPI4PY_LIBMPI"], made[_rank.HUB], made["A"]) == (str(library), "hub", "b")
    chosen = _launch.environment_for(command, "hub", {"MPI4PY_LIBMPI": "mine"})
    assert chosen["MPI4PY_LIBMPI"] == "mine"


# --- a rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID", "SLURM_PROCID"]
)
def test_a_rank_knows_its_number(name: str) -> None:
    assert _rank.own_rank({name: "7"}) == 7


def test_an_unknown_launcher() -> None:
    with pytest.raises(LookupError, match="does not know this launcher"):
        _rank.own_rank({"OTHER": "1"})


def test_the_environment_of_a_rank_that_becomes_a_worker() -> None:  # MPI-1
    of_worker = {
        "PMI_RANK": "0",  # of the script, which started the Ray node
        _rank.STASH: "{}",
        "PYTHONPATH": "/a",
        "LD_LIBRARY_PATH": "/lib/worker",
        "RAY_JOB": "1",
        "UCX_TLS": "all",
        _rank.RAY_HOOK: "mine.hook",
    }
    of_rank = {
        "PMI_RANK": "2",
        "PMI_FD": "9",
        "UCX_TLS": "tcp",
        "LD_LIBRARY_PATH": "/lib/mpi",
        "HOME": "/elsewhere",
        _rank.HUB: "the key",
    }
    made = _rank.worker_environment(of_worker, of_rank, "t:2:4", 5)
    assert made == {
        "PMI_RANK": "2",
        "PMI_FD": "9",
        "UCX_TLS": "tcp",
        "RAY_JOB": "1",
        "PYTHONPATH": f"/a{os.pathsep}{Path(RANK).parents[2]}",
        "LD_LIBRARY_PATH": f"/lib/worker{os.pathsep}/lib/mpi",
        _rank.RAY_HOOK: _rank.OUR_HOOK,
        _rank.HOOK: "mine.hook",
        _rank.WORLD: "t:2:4",
        _rank.HUB_FD: f"5:{os.getpid()}",
    }


def test_children_do_not_take_the_connection_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_rank.HUB_FD, f"5:{os.getppid()}")
    assert inherited() is None
    monkeypatch.setenv(_rank.HUB_FD, f"5:{os.getpid()}")
    assert inherited() == 5
    assert inherited() is None


def test_the_shim_knows_the_names_of_the_rank() -> None:
    assert (_shim._REFUSED, _shim._RAY_HOOK, _shim._OUR_HOOK) == (
        _rank.REFUSED,
        _rank.RAY_HOOK,
        _rank.OUR_HOOK,
    )
    from ray._private import ray_constants  # noqa: PLC0415

    assert ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR == _rank.RAY_HOOK


# --- options of actors -----------------------------------------------------------------------

SHIM = ["/my python", "-I", "-S", "shim.py", "t", "1"]


def adoption(job: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return _world.adoption(SHIM, "node", options, job or {})


def test_options_are_merged() -> None:
    made = adoption(
        num_gpus=1,
        runtime_env={"env_vars": {"A": "b"}},
        label_selector={"zone": "a"},
        job={"py_executable": "uv run"},
    )
    assert made == {
        "num_gpus": 1,
        "runtime_env": {"env_vars": {"A": "b"}, "py_executable": shlex.join(SHIM)},
        "label_selector": {"zone": "a", "ray.io/node-id": "node"},
        "max_restarts": 0,
        "lifetime": "detached",
    }
    assert shlex.split(made["runtime_env"]["py_executable"]) == SHIM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime_env": {"py_executable": "python"}}, "py_executable"),
        ({"runtime_env": {"conda": "env"}}, "conda"),
        ({"runtime_env": {"uv": ["a"]}}, "uv"),
        ({"runtime_env": {"container": {"image": "a"}}}, "container"),
        ({"job": {"pip": ["a"]}}, "pip"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"lifetime": "non_detached"}, "lifetime"),
        ({"label_selector": {"ray.io/node-id": "other"}}, "label_selector"),
    ],
)
def test_what_cannot_be_merged_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        adoption(**options)


def test_there_is_no_world_in_other_processes() -> None:
    with pytest.raises(UsageError, match="not rank 0 of an MPI world"):
        world()


# --- the hub ---------------------------------------------------------------------------------


class Peer:
    """A rank's end of a connection to the hub."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await asyncio.wait_for(self.reader.readline(), 10))
        return found

    def tell(self, **message: str) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


class Served:
    """A hub that listens."""

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub = hub
        self.port = port
        self.peers: list[Peer] = []

    async def join(self, rank: int, key: str | None = None) -> Peer:
        """Say hello as a rank."""
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.port))
        self.peers.append(peer)
        theirs, ours = (await peer.told())["nonce"], "ours"
        hello = {"rank": rank, "host": "h", "pid": 100 + rank, "addresses": [], "shim": []}
        proof = _rank.proof(key or self.hub.key, "rank", theirs, ours)
        peer.tell(**hello, nonce=ours, proof=proof)  # type: ignore[arg-type]
        return peer

    async def all(self, *said: str) -> list[Peer]:
        """All ranks, each of which says one thing."""
        peers = [await self.join(rank) for rank in range(self.hub.size)]
        for peer, word in zip(peers, said, strict=True):
            assert (await peer.told())["size"] == self.hub.size
            peer.tell(say=word)
        assert [each["rank"] for each in (await peers[0].told())["ranks"]] == [*range(len(peers))]
        return peers


@asynccontextmanager
async def serving(size: int) -> AsyncIterator[Served]:
    hub = Hub(size)
    server = await asyncio.start_server(hub.serve, "127.0.0.1", 0)
    served = Served(hub, server.sockets[0].getsockname()[1])
    try:
        yield served
    finally:
        server.close()
        for peer in served.peers:
            peer.writer.close()
        await hub.aclose()


@pytest.mark.parametrize("case", ["key", "twice", "number"])
async def test_the_hub_lets_in_only_its_ranks(case: str) -> None:  # MPI-2
    async with serving(2) as served:
        await (await served.join(1)).told()
        key, rank = ("wrong" if case == "key" else None), {"key": 0, "twice": 1, "number": 2}[case]
        stranger = await served.join(rank, key)
        assert await asyncio.wait_for(stranger.reader.read(), 10) == b""
        assert sorted(served.hub.members) == [1]


@pytest.mark.parametrize(
    "said",
    [
        b"[]", b"3", b'{"nonce": 1}', b"noise \xff", b"[" * 100_000, b"",
        b'{"nonce": "n", "proof": "\\u00e9"}',
    ],
    ids=["list", "number", "incomplete", "noise", "deep", "empty", "not ASCII"],
)  # fmt: skip
async def test_nonsense_at_the_hub_is_cut_off(
    said: bytes, caplog: pytest.LogCaptureFixture
) -> None:  # MPI-2
    async with serving(1) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(said + b"\n")
        await asyncio.wait_for(reader.readline(), 10)
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        assert (await (await served.join(0)).told())["size"] == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_who_says_nothing_at_the_hub_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub, "MEETING_SECONDS", 0.1)  # MPI-2
    async with serving(1) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        await asyncio.wait_for(reader.readline(), 10)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
    assert not served.hub.members


async def test_a_rank_does_not_believe_another_hub() -> None:  # MPI-2
    async with serving(2) as served:
        hub = f"127.0.0.1,{served.port},{served.hub.key}"
        hello = {"rank": 1, "host": "h", "pid": 1, "addresses": [], "shim": []}
        sock, told = await asyncio.to_thread(_rank.join, hub, hello)
        with closing(sock):
            assert (told["token"], told["size"]) == (served.hub.token, 2)

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            writer.write(b'{"nonce": "a"}\n')
            await reader.readline()
            writer.write(b'{"proof": "b", "token": "c", "size": 2}\n')

    async with await asyncio.start_server(lie, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PermissionError, match="not the launcher"):
            await asyncio.to_thread(_rank.join, f"127.0.0.1,{port},key", hello)


async def prepared(peers: Sequence[Peer], *libraries: str) -> None:
    for peer, library in zip(peers, libraries, strict=True):
        assert await peer.told() == {"do": "prepare"}
        peer.tell(say="prepared", library=library)


async def test_mpi_begins_when_every_rank_can() -> None:  # MPI-5
    async with serving(3) as served:
        peers = script, worker, _ = await served.all("ready", "adopted", "waiting")
        worker.tell(ask="init")
        await testing.eventually(lambda: served.hub._wanted, what="the hub has heard it")
        assert not any(member.asked for member in served.hub.members.values())
        worker.tell(say="ready")  # it starts only now
        await prepared(peers, "a", "a", "a")
        for peer in peers:
            assert await peer.told() == {"do": "init"}
            peer.tell(say="initialised")
        for peer in peers:
            assert await peer.told() == {"do": "up"}
        script.tell(ask="init")
        assert await script.told() == {"do": "up"}


async def test_a_rank_may_become_a_worker_while_mpi_begins() -> None:  # MPI-5
    async with serving(2) as served:
        peers = script, waiting = await served.all("ready", "waiting")
        script.tell(ask="init")
        assert await waiting.told() == {"do": "prepare"}
        waiting.tell(say="adopted")
        waiting.tell(say="ready")
        await prepared(peers, "a", "a")
        for peer in peers:
            assert await peer.told() == {"do": "init"}


async def test_ranks_with_different_libraries_are_refused() -> None:  # MPI-5
    async with serving(2) as served:
        peers = await served.all("ready", "waiting")
        peers[0].tell(ask="init")
        await prepared(peers, "MPICH 5", "Open MPI 5")
        reason = (await peers[0].told())["reason"]
        assert "MPICH 5" in reason
        assert "rank 1 (host h, pid 101, unused): Open MPI 5" in reason
        assert not served.hub.broken.is_set()


async def test_a_rank_that_has_ended_is_not_waited_for() -> None:  # MPI-5
    async with serving(3) as served:
        _, worker, waiting = await served.all("ready", "ready", "waiting")
        waiting.writer.close()
        await asyncio.wait_for(served.hub.broken.wait(), 10)
        assert served.hub.trouble.startswith("rank 2 (host h, pid 102, unused) died")
        worker.tell(ask="init")
        told = await worker.told()
        assert told["do"] == "refused"
        assert "rank 2 (host h, pid 102, unused) has ended" in told["reason"]


async def test_a_rank_that_cannot_load_mpi_refuses_for_all() -> None:  # MPI-5
    async with serving(2) as served:
        peers = await served.all("ready", "ready")
        peers[0].tell(ask="init")
        for peer in peers:
            assert await peer.told() == {"do": "prepare"}
        peers[1].tell(say="failed", error="no library")
        for peer in peers:
            assert "no library" in (await peer.told())["reason"]
        assert not served.hub.broken.is_set(), "the script may go on without MPI"


async def test_the_end_is_told_to_all_and_awaited() -> None:  # MPI-4
    async with serving(3) as served:
        script, worker, waiting = await served.all("ready", "ready", "waiting")
        script.tell(ask="end")
        for peer in (script, worker, waiting):
            assert await peer.told() == {"do": "end"}
        worker.writer.close()
        waiting.tell(say="ended")
        waiting.writer.close()
        assert await script.told() == {"do": "ended"}
        assert not served.hub.trouble


async def test_the_others_end_with_the_script() -> None:  # MPI-4
    async with serving(2) as served:
        script, waiting = await served.all("ready", "waiting")
        script.writer.close()
        assert await waiting.told() == {"do": "end"}
        assert served.hub.script_gone.is_set()


# --- a waiting rank and the shim -------------------------------------------------------------


@pytest.fixture
def waiting() -> Any:
    """A rank that waits, with the pair of its connection to the hub."""
    ours, theirs = socket.socketpair()
    token = os.urandom(8).hex()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(RANK).parent)!r}); import _rank, socket; "
        f"_rank.Waiting(1, {{'token': {token!r}, 'size': 2}}, "
        f"socket.socket(fileno={theirs.fileno()})).run()"
    )
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", code], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    ours.settimeout(20)
    assert _rank.read_line(ours) == {"say": "waiting"}
    yield token, process, ours
    ours.close()
    process.kill()
    process.wait()


def shim(token: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-I", "-S", _shim.__file__, token, "1", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **options,
    )


SHOW = "import os; print(os.getpid(), os.getcwd(), os.environ['GIVEN'], os.environ.get('{}'))"


def test_a_rank_becomes_what_the_shim_should_be(waiting: Any, tmp_path: Path) -> None:  # MPI-1
    token, process, hub = waiting
    environment = {"GIVEN": "value", "PATH": os.environ["PATH"]}
    done = shim(token, "-c", SHOW.format(_rank.WORLD), cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    process.wait(20)
    assert _rank.read_line(hub) == {"say": "adopted"}
    assert done.stdout.split() == [str(process.pid), str(tmp_path), "value", f"{token}:1:2"]
    again = shim(token, "-c", SHOW.format(_rank.REFUSED), cwd=tmp_path, env=environment)
    assert "cannot become rank 1" in again.stdout, "an ordinary worker says why (MPI-3)"
    assert not again.stdout.startswith(f"{process.pid} ")


def test_a_rank_ends_with_its_world_or_its_launcher(waiting: Any) -> None:
    _, process, hub = waiting
    hub.close()
    assert process.wait(20) == 1


def test_a_rank_that_is_not_used_ends_well(waiting: Any) -> None:  # MPI-4
    _, process, hub = waiting
    _rank.send_line(hub, {"do": "end"})
    assert _rank.read_line(hub) == {"say": "ended"}
    assert process.wait(20) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_a_rank_serves_its_own_user_only(waiting: Any) -> None:  # MPI-1
    token, process, _ = waiting
    stranger = f"""
import os, socket, sys
sys.path.insert(0, {str(Path(RANK).parent)!r})
import _shim
os.setuid({NOBODY})
sock = socket.socket(socket.AF_UNIX)
sock.connect({f"{chr(0)}aiordt-mpi-{token}-1"!r})
try:
    socket.send_fds(sock, [b" "], [0, 1, 2])
    sock.sendall(b"{{}}\\n")
    answer = sock.recv(100)
except OSError:
    answer = b""
print([answer, _shim.ask({token!r}, "1", [])])
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", stranger], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "[b'', 'it belongs to another user']", done.stderr
    assert process.poll() is None
