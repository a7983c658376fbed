"""What runs graphs: places what is ready, gives it to workers, and brings back what is lost.

Invariants:
    FLW-1  A task that lost its worker or its inputs is run again, with inputs that are made
           again from theirs; after ``retries`` of that its awaiter gets an error.
    FLW-2  What was placed is counted until it has ended, however it ends.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import itertools
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import cloudpickle
from typing_extensions import override

from aiordt import _ray, _runtime
from aiordt._errors import (
    AiordtError,
    ClosedError,
    InvalidTypeError,
    InvalidValueError,
    OwnerDiedError,
    UsageError,
)
from aiordt._progress import settle
from aiordt.abc import AsyncResource
from aiordt.flow._policy import Cluster, Decision, DefaultPolicy, GroupPolicy, Policy, Request
from aiordt.flow._pool import Pool, beside
from aiordt.flow._worker import lost_owner

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import Self

    from aiordt.flow._pool import Remote

_POLICIES: Final[Mapping[str, Callable[[], Policy]]] = {
    "group": GroupPolicy,
    "default": DefaultPolicy,
}
#: How old what is known of the nodes may be.
_NODES_SECONDS: Final = 1.0
#: A function whose pickle is larger is sent by Ray's object store.
_MAX_CODE_NBYTES: Final = 64 << 10

_group_numbers = itertools.count(1)
_chosen: contextvars.ContextVar[Context | None] = contextvars.ContextVar("flow", default=None)
_defaults: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Context] = (
    weakref.WeakKeyDictionary()
)
_pools: weakref.WeakKeyDictionary[Any, Pool] = weakref.WeakKeyDictionary()


async def release_workers() -> int:
    """End this process's workers that have no task, and the tensors that they hold.

    Those are made again if they are needed. Without it, workers stay until the process or
    its Ray session ends, and keep all but one CPU of each node.

    Returns:
        How many there were.
    """
    pool = _pool()
    idle = [remote for remote in pool.workers if not remote.active]
    for remote in idle:
        pool.drop(remote)
    return len(idle)


def _pool() -> Pool:
    session = _ray.session()
    found = _pools.get(session)
    if found is None:
        found = _pools[session] = Pool()
    return found


def next_group() -> int:
    """A number for a group of tasks or actors."""
    return next(_group_numbers)


class Function:
    """What a group runs, as it goes to workers.

    Args:
        function: A function, a coroutine function, or either as a remote function of Ray's.
        what: How errors call it.
    """

    def __init__(self, function: Any, what: str) -> None:  # noqa: ANN401
        function = _ray.undecorated(function)
        if not callable(function) or isinstance(function, ray.actor.ActorClass):
            raise InvalidTypeError(f"{what} takes a function, not {function!r}")
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._pickled: tuple[bytes, Any] | None = None

    async def pickled(self) -> tuple[bytes, Any]:
        """Its key and its code, or an ObjectRef of it if that is large."""
        if self._pickled is None:
            self._pickled = await _runtime.current().workers.run(self._pickle)
        return self._pickled

    def _pickle(self) -> tuple[bytes, Any]:
        code = cloudpickle.dumps(self._function)
        key = hashlib.blake2b(code, digest_size=16).digest()
        return key, code if len(code) <= _MAX_CODE_NBYTES else ray.put(code)


@dataclass(slots=True)
class Located:
    """Where a task's inputs lie.

    Attributes:
        data: What only this task needs: bytes by node.
        near: What all tasks of its group need.
        owners: Bytes of ``data`` by the actor that has them.
    """

    data: Counter[str] = field(default_factory=Counter)
    near: Counter[str] = field(default_factory=Counter)
    owners: Counter[str] = field(default_factory=Counter)

    @property
    def owner(self) -> str | None:
        """The actor that has most of ``data``."""
        return max(self.owners, key=self.owners.__getitem__, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One task: what is the same however often it is tried.

    Attributes:
        group: The number of its group.
        label: How errors and Ray's tools call it.
        function: What runs.
        arguments: Brings its arguments, with refs.
        located: Where they lie.
        renew: Forgets the inputs that a process took with it, so that they are made again;
            whether there were any, and which actors are gone.
        placed: Told where it goes.
        wide: Whether many use what it returns.
    """

    group: int
    label: str
    function: Function
    arguments: Callable[[], Awaitable[list[Any]]]
    located: Callable[[list[Any]], Located]
    renew: Callable[[str, list[Any]], Awaitable[tuple[bool, set[str]]]]
    placed: Callable[[Decision], None]
    wide: bool


@dataclass(slots=True)
class _Asked:
    """What waits to be placed with the rest of its group."""

    near: Mapping[str, int]
    data: list[Mapping[str, int]] = field(default_factory=list)
    futures: list[asyncio.Future[Decision]] = field(default_factory=list)


class Context(AsyncResource):
    """Where graphs are evaluated: ``async with flow.Context():``, or the default one.

    Args:
        placement: ``"group"``: groups next to their data. ``"default"``: blind to data, as Ray
            places actors. Or a `Policy`.
        workers: How many workers to have at most; ``None``: one for each CPU of the cluster.
            They are started when there is work, and kept for later contexts.
        retries: How often a task may lose its worker or its inputs before that is an error.
        max_in_flight: Elements of one node that are evaluated at a time.

    Raises:
        UsageError: An argument is not valid.
    """

    def __init__(
        self,
        placement: str | Policy = "group",
        workers: int | None = None,
        *,
        retries: int = 3,
        max_in_flight: int = 1024,
    ) -> None:
        if isinstance(placement, str):
            if placement not in _POLICIES:
                raise InvalidValueError(
                    f"placement={placement!r}: there are {', '.join(_POLICIES)}, or give a Policy"
                )
            placement = _POLICIES[placement]()
        if not isinstance(placement, Policy):
            raise InvalidTypeError(
                f"placement must be a str or a flow.Policy, not {type(placement).__name__}"
            )
        for name, value, least in (
            ("workers", workers, 1),
            ("retries", retries, 0),
            ("max_in_flight", max_in_flight, 1),
        ):
            if name == "workers" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidTypeError(f"{name} must be an int, not {value!r}")
            if value < least:
                raise InvalidValueError(f"{name} must be at least {least}, not {value}")
        self.policy = placement
        self.max_in_flight = max_in_flight
        self.retries = retries
        self._max_workers = workers
        self._cluster = Cluster()
        self._cpus: dict[str, int] = {}
        self._asked: dict[int, _Asked] = {}
        self._looked = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._closed = False
        self._session: _ray.Session | None = None
        self._tokens: list[contextvars.Token[Context | None]] = []

    @staticmethod
    def current() -> Context:
        """The context of the running task, or the default one."""
        chosen = _chosen.get()
        if chosen is not None:
            return chosen
        loop = asyncio.get_running_loop()
        found = _defaults.get(loop)
        if found is None or not found.is_of(_ray.session()):
            found = _defaults[loop] = Context()
        return found

    def is_of(self, session: _ray.Session) -> bool:
        """Whether it has been used in no other session."""
        return self._session in {None, session}

    @override
    async def __aenter__(self) -> Self:
        self._check_open()
        self._tokens.append(_chosen.set(self))
        return self

    @override
    async def __aexit__(self, *exc_info: object) -> None:
        if self._tokens:
            _chosen.reset(self._tokens.pop())
        if not self._tokens:
            await self.aclose()

    @override
    async def aclose(self) -> None:
        """Take no more work; idempotent. Workers stay, and so does what they made."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this flow.Context was closed: make another")
        session = _ray.session()
        if not self.is_of(session):
            raise ClosedError("this flow.Context is of a Ray session that has ended")
        self._session = session

    @property
    def cluster(self) -> Cluster:
        """What is known of the nodes and of what runs on them."""
        return self._cluster

    @property
    def pool(self) -> Pool:
        """The workers of this session."""
        return _pool()

    # --- nodes -----------------------------------------------------------------------------

    async def look(self, *, now: bool = False) -> None:
        """See which nodes there are, if that is not known of late.

        Args:
            now: Look in any case.
        """
        loop = asyncio.get_running_loop()
        if not now and loop.time() - self._looked < _NODES_SECONDS:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        found = await _runtime.current().workers.run(_ray.nodes)
        self._looked = asyncio.get_running_loop().time()
        slots = _shared_out(found, self._max_workers)
        for node in self._cluster.nodes:
            if node not in slots:
                self._cluster.leave(node)
        for node, count in slots.items():
            if self._cluster.slots(node) != count:
                self._cluster.join(node, count)
        self._cpus = found

    # --- placing ---------------------------------------------------------------------------

    async def _place(
        self, group: int, data: Mapping[str, int], near: Mapping[str, int]
    ) -> Decision:
        """Where a task goes, decided together with all of its group that are ready now."""
        loop = asyncio.get_running_loop()
        asked = self._asked.get(group)
        if asked is None:
            asked = self._asked[group] = _Asked(near)
            # After this turn of the loop, in which all that waited for the same are woken.
            loop.call_soon(self._decide, group)
        future: asyncio.Future[Decision] = loop.create_future()
        asked.data.append(data)
        asked.futures.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                self._ended(group, future.result())
            raise

    def _decide(self, group: int) -> None:
        asked = self._asked.pop(group)
        rows = [
            (data, future)
            for data, future in zip(asked.data, asked.futures, strict=True)
            if not future.done()
        ]
        if not rows:
            return
        try:
            request = Request(group, [data for data, _ in rows], asked.near)
            decisions = self.decide(request)
        except Exception as exc:  # noqa: BLE001  (a user's policy; all who asked are told)
            for _, future in rows:
                settle(future, None, exc)
            return
        for (_, future), decision in zip(rows, decisions, strict=True):
            future.set_result(decision)

    def decide(self, request: Request) -> list[Decision]:
        """Ask the policy, and count what it decided (FLW-2).

        Raises:
            UsageError: It did not decide as it must.
        """
        decisions = list(self.policy.place(request, self._cluster))
        name = type(self.policy).__name__
        if len(decisions) != len(request.data):
            raise UsageError(
                f"{name}.place gave {len(decisions)} decisions for {len(request.data)} tasks"
            )
        for decision in decisions:
            if not isinstance(decision, Decision):
                raise InvalidTypeError(f"{name}.place gave a {type(decision).__name__}")
            if decision.node is not None and not self._cluster.slots(decision.node):
                raise InvalidValueError(f"{name}.place chose {decision.node!r}: no such node")
        for decision in decisions:
            if decision.node is not None:
                self._cluster.begin(request.group, decision.node, actor=request.actors)
        return decisions

    def _ended(self, group: int, decision: Decision) -> None:
        if decision.node is not None:
            self._cluster.end(group, decision.node)

    # --- running ---------------------------------------------------------------------------

    async def run(self, work: Work) -> Any:  # noqa: ANN401
        """Run a task to its end (FLW-1).

        Raises:
            OwnerDiedError: It lost its worker, or inputs that cannot be made again.
            Exception: What the function raised, with a note that says where.
        """
        lost: AiordtError | None = None
        for _ in range(1 + self.retries):
            self._check_open()
            arguments = await work.arguments()
            await self.look(now=lost is not None)
            located = work.located(arguments)
            decision = await self._place(work.group, located.data, located.near)
            work.placed(decision)
            try:
                remote = await self._acquire(decision.node, located.owner)
                try:
                    done, result = await self._call(work, remote, arguments)
                except _WorkerLostError as exc:
                    self.pool.drop(remote)
                    why = f"{work.label}: its worker on node {str(remote.node)[:8]} died: {exc}"
                    lost = OwnerDiedError(why, owner=f"worker {remote.actor_id[:12]}")
                    continue
                finally:
                    self.pool.release(remote)
            finally:
                self._ended(work.group, decision)
            if done:
                return result
            lost = result
            again, gone = await work.renew(lost_owner(result), arguments)
            if not again:
                break
            self.drop_workers(gone)
        assert lost is not None  # noqa: S101
        lost.add_note(f"in {work.label}, a task of a flow")
        raise lost

    async def _acquire(self, node: str | None, owner: str | None) -> Remote:
        cpus = self._cpus.get(node or "", 1)
        limit = self._cluster.slots(node) if node else 0
        return await self.pool.acquire(node, limit, cpus, self._cluster.nodes, owner)

    @staticmethod
    async def _call(work: Work, remote: Remote, arguments: list[Any]) -> tuple[bool, Any]:
        key, code = await work.function.pickled()
        call = remote.handle.run.options(name=work.label)
        ref = call.remote(key, code, arguments, wide=work.wide)
        try:
            done, result = await _ray.fetch(ref)
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except ray.exceptions.RayActorError as exc:
            raise _WorkerLostError(str(exc).splitlines()[0]) from exc
        except ray.exceptions.TaskCancelledError as exc:
            raise _WorkerLostError("its task was cancelled there") from exc
        except ray.exceptions.RayTaskError as exc:
            exc.add_note(
                f"in {work.label}, a task of a flow, on worker {remote.actor_id[:12]} of node "
                f"{str(remote.node)[:8]}"
            )
            raise
        return done, result

    def drop_workers(self, actor_ids: set[str]) -> None:
        """Give up workers that are gone or cannot be reached."""
        for remote in self.pool.workers:
            if remote.actor_id in actor_ids:
                self.pool.drop(remote)

    async def make_actor(self, make: Callable[[dict[str, Any]], Any], node: str | None) -> Any:  # noqa: ANN401
        """Make an actor on a node, or beside; off the loop."""
        options = beside(node, self._cluster.nodes) if node else {}
        return await _runtime.current().workers.run(lambda: make(options))


class _WorkerLostError(Exception):
    """A worker died with a task."""


def _shared_out(cpus: Mapping[str, int], most: int | None) -> dict[str, int]:
    """The slots of each node: its CPUs, but ``most`` in all, dealt out in turn."""
    able = {node: count for node, count in cpus.items() if count > 0}
    if most is None or most >= sum(able.values()):
        return able
    slots = dict.fromkeys(able, 0)
    while most > 0:
        for node, count in able.items():
            if most > 0 and slots[node] < count:
                slots[node] += 1
                most -= 1
    return {node: count for node, count in slots.items() if count}
