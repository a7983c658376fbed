"""The script's side: the ranks that wait, and the options by which an actor becomes one."""

from __future__ import annotations

import json
import os
import shlex
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from aiordt import _ray
from aiordt._errors import ClosedError, InvalidValueError, UsageError
from aiordt._progress import Workers, run_all
from aiordt.mpi._link import Link, inherited
from aiordt.mpi._rank import STASH, read_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NODE: Final = "ray.io/node-id"
#: What of a runtime environment decides which program a worker is; a rank is one already.
_CONFLICTS: Final = (
    "conda", "container", "image_uri", "nsight", "_nsight", "pip", "rocprof_sys", "_rocprof_sys",
    "uv",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rank:
    """A process that mpiexec started.

    Attributes:
        rank: Its number in ``MPI_COMM_WORLD``.
        host: Its host's name.
        pid: Its process id there, which is that of the actor that it becomes.
        node_id: Of the Ray node on its host; ``None`` if there is none.
    """

    rank: int
    host: str
    pid: int
    node_id: str | None


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of one mpiexec, as its rank 0 sees them. Made by `world`.

    An actor that becomes a rank lives until the script ends, whoever holds its handle: MPI ends
    the whole job with any rank that dies. So ``ray.kill`` on it ends the job.

    Attributes:
        size: How many ranks there are.
        ranks: The ranks, in order; rank 0 is the script.
    """

    size: int
    ranks: tuple[Rank, ...]

    def worker(self, rank: int, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        """Ray's options for the one actor that becomes a rank's process.

        ``Actor.options(**world.worker(1, num_gpus=1)).remote()``. Never waits. Where the rank
        turns out to be gone, the actor dies at its start, and its error says why.

        Args:
            rank: Which one; not 0, and each only once.
            **options: More of Ray's options. A ``runtime_env`` is merged, as is a
                ``label_selector``.

        Raises:
            UsageError: The rank is in use, its host has no Ray node, there is no such rank, or an
                option cannot be had with MPI.
            ClosedError: The world has ended.
        """
        script = _Script.get_open()
        if not 1 <= rank < self.size:
            raise InvalidValueError(f"rank {rank}: actors become ranks 1 to {self.size - 1}")
        merged = self._merged(script, rank, options)
        script.take([rank])
        return merged

    async def spawn(
        self,
        actor_class: Any,  # noqa: ANN401
        n: int,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Make ``n`` actors of the first ranks that are free; waits until they are made.

        Args:
            actor_class: A class decorated with ``@ray.remote``.
            n: How many.
            args: Arguments of each.
            kwargs: Keyword arguments of each.
            options: More of Ray's options; see `worker`.

        Returns:
            The actors, in the order of their ranks.

        Raises:
            UsageError: There are not so many free ranks, or an option cannot be had with MPI.
            OwnerDiedError: One of them died at its start; says why.
            ClosedError: The world has ended.
        """
        script = _Script.get_open()
        free = [r.rank for r in self.ranks if r.node_id is not None and script.is_free(r.rank)]
        if not 1 <= n <= len(free):
            raise UsageError(f"spawn of {n}: {len(free)} of {self.size - 1} ranks are free")
        merged = [self._merged(script, rank, dict(options or {})) for rank in free[:n]]
        script.take(free[:n])
        actors = [actor_class.options(**each).remote(*args, **(kwargs or {})) for each in merged]
        await run_all([_ray.wait_made(actor) for actor in actors])
        return actors

    async def init_mpi(self) -> None:
        """Initialise MPI in all ranks, the script's and those that wait among them.

        From then on ``from mpi4py import MPI`` does in each of them what it does under mpiexec,
        and ranks that wait can no longer become actors. Groups with ``backend="mpi"`` do it by
        themselves.

        Raises:
            UnavailableError: MPI cannot be initialised; says why.
            ClosedError: The world has ended.
        """
        script = _Script.get()
        await script.workers.run(script.link.initialise)

    async def aclose(self) -> None:
        """Finalise MPI and end the actors that are ranks; idempotent.

        The end of the script does it, and ``ray.shutdown()``.
        """
        script = _Script.get()
        await script.workers.run(script.link.end)

    def _merged(self, script: _Script, rank: int, options: dict[str, Any]) -> dict[str, Any]:
        node_id = self.ranks[rank].node_id
        if node_id is None:
            raise UsageError(
                f"rank {rank}: there is no Ray node on its host {self.ranks[rank].host}"
            )
        return adoption(script.shim(rank), node_id, options, _ray.job_runtime_env())


def adoption(
    shim: Sequence[str], node_id: str, options: Mapping[str, Any], job: Mapping[str, Any]
) -> dict[str, Any]:
    """Ray's options for an actor that becomes a rank.

    Args:
        shim: What Ray starts in place of a worker.
        node_id: Of the node on the rank's host.
        options: The user's.
        job: The runtime environment of the user's job, which Ray adds.

    Raises:
        InvalidValueError: One of them cannot be had with MPI.
    """
    mine = dict(options.get("runtime_env") or {})
    for name in (*_CONFLICTS, "py_executable"):
        if mine.get(name) or (name in _CONFLICTS and job.get(name)):
            raise InvalidValueError(
                f"runtime_env {name!r} chooses the program of a worker, but mpiexec has started it"
            )
    if options.get("max_restarts"):
        raise InvalidValueError("max_restarts: a rank that died cannot come back")
    if options.get("lifetime", "detached") != "detached":
        raise InvalidValueError("lifetime: an actor that is a rank lives as long as its world")
    labels = dict(options.get("label_selector") or {})
    if labels.get(_NODE, node_id) != node_id:
        raise InvalidValueError(f"label_selector: this rank is on node {node_id}")
    return {
        **options,
        "runtime_env": {**mine, "py_executable": shlex.join(shim)},
        "label_selector": {**labels, _NODE: node_id},
        "max_restarts": 0,
        "lifetime": "detached",  # a handle that goes out of scope must not end the job
    }


class _Script:
    """This process as rank 0."""

    _one: ClassVar[_Script | None] = None
    _making: Final = threading.Lock()

    def __init__(self, number: int) -> None:
        stash = json.loads(os.environ.pop(STASH))
        sock = socket.socket(fileno=number)
        told = read_line(sock)
        self.token: str = told["token"]
        self.ranks: list[dict[str, Any]] = told["ranks"]
        self.link = Link(sock, len(self.ranks), stash, lambda _orderly: None)
        self.workers = Workers("aiordt-mpi", 2)
        self._used = {0}
        self._lock = threading.Lock()
        self.link.start()
        _ray.before_shutdown(self.link.end)

    @classmethod
    def get(cls) -> _Script:
        with cls._making:
            if cls._one is None:
                number = inherited()
                if number is None:
                    raise UsageError(
                        "this process is not rank 0 of an MPI world: start the script by "
                        "python -m aiordt.mpi run -n N -- script.py"
                    )
                cls._one = _Script(number)
            return cls._one

    @classmethod
    def get_open(cls) -> _Script:
        """As `get`.

        Raises:
            ClosedError: The world has ended.
        """
        script = cls.get()
        if script.link.ended:
            raise ClosedError("this MPI world has ended")
        return script

    def is_free(self, rank: int) -> bool:
        return rank not in self._used

    def take(self, ranks: Sequence[int]) -> None:
        """Mark ranks as used.

        Raises:
            UsageError: One of them is.
        """
        with self._lock:
            used = self._used.intersection(ranks)
            if used:
                raise UsageError(f"rank {min(used)} is used already: it can become one actor only")
            self._used.update(ranks)

    def shim(self, rank: int) -> list[str]:
        """The program that asks a rank to become a worker; needs none of Python's settings."""
        python, path = self.ranks[rank]["shim"]
        return [python, "-I", "-S", path, self.token, str(rank)]


def world() -> World:
    """The MPI world of this script, which ``python -m aiordt.mpi run`` started. Never waits.

    Raises:
        UsageError: This process is not its rank 0, or Ray is not initialized.
    """
    script = _Script.get()
    nodes = _ray.nodes_by_address()
    ranks = []
    for each in script.ranks:
        # Every host has the loopback's address: the last choice.
        addresses = sorted(each["addresses"], key=lambda address: address.startswith("127."))
        node_id = next((nodes[address] for address in addresses if address in nodes), None)
        ranks.append(Rank(each["rank"], each["host"], each["pid"], node_id))
    return World(len(ranks), tuple(ranks))
