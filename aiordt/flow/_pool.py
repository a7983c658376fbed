"""The workers of this process's flows: started when there is work, kept for the next.

A worker is an actor that has a slot of its node. It asks Ray for a little less than a CPU, so
that one CPU of each node is left: for the user's own actors, which Ray places only where one
is free.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray

from aiordt import _ray
from aiordt._progress import post, settle
from aiordt._runtime import current
from aiordt.flow._worker import DEPTH, remote_class

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

#: A worker that has not started in so many seconds is told of.
_PATIENCE_SECONDS: Final = 15.0
#: So many other nodes are named where a worker may go instead.
_MAX_OTHERS: Final = 50
_RESOLUTION: Final = 1e-4  # of Ray's resources


def beside(node: str, others: Iterable[str]) -> dict[str, Any]:
    """Ray's options that put an actor on a node, or on one of ``others`` where that is full.

    A soft affinity is not honoured for actors that ask for no CPU (Ray 2.60); labels are.
    """
    rest = [each for each in others if each != node][:_MAX_OTHERS]
    options: dict[str, Any] = {"label_selector": {"ray.io/node-id": node}}
    if rest:
        fallback = {"label_selector": {"ray.io/node-id": f"in({','.join(rest)})"}}
        options["fallback_strategy"] = [fallback]
    return options


@dataclass(slots=True, eq=False)
class Remote:
    """A worker, as seen from here.

    Attributes:
        handle: Of the actor.
        actor_id: Its id, in hex.
        node: Where it was asked for; once it runs, where it is.
        active: Tasks that it has.
    """

    handle: Any
    actor_id: str
    node: str | None
    active: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    node: str | None
    limit: int
    future: asyncio.Future[Remote | None]


class Pool:
    """All workers of one Ray session."""

    def __init__(self) -> None:
        self._workers: dict[str | None, list[Remote]] = {}
        self._starting: dict[str | None, int] = {}
        self._waiting: deque[_Waiter] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def workers(self) -> list[Remote]:
        """Those that there are."""
        return [remote for some in self._workers.values() for remote in some]

    async def acquire(
        self, node: str | None, limit: int, cpus: int, others: Iterable[str], owner: str | None
    ) -> Remote:
        """A worker of a node that has room for a task; to be given back by `release`.

        Args:
            node: The node; ``None``: any.
            limit: How many workers it may have.
            cpus: How many CPUs it has.
            others: Where else it may go.
            owner: The actor that has the task's data: the best choice.
        """
        while True:
            found = self._free(node, limit, owner)
            if (found is None or found.active) and self._may_start(node, limit):
                await self._start(node, cpus, others)
                found = self._free(node, limit, owner)
            if found is not None:
                found.active += 1
                return found
            if (given := await self._turn(node, limit)) is not None:
                return given

    async def _turn(self, node: str | None, limit: int) -> Remote | None:
        """Wait for a worker of a node; ``None``: it has lost its last one."""
        waiter = _Waiter(node, limit, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            with suppress(ValueError):
                self._waiting.remove(waiter)
            if waiter.future.done() and not waiter.future.cancelled():
                given = waiter.future.result()
                if given is not None:
                    self.release(given)
            raise

    def release(self, remote: Remote) -> None:
        """A task has ended there; the next may begin."""
        remote.active -= 1
        self._admit()

    def drop(self, remote: Remote) -> None:
        """A worker is dead, or is to be."""
        some = self._workers.get(remote.node, [])
        if remote in some:
            some.remove(remote)
            if not some:
                del self._workers[remote.node]
            with suppress(Exception):  # it may be gone
                _ray.kill(remote.handle)
        self._admit()

    def _of(self, node: str | None, limit: int) -> list[Remote]:
        if node is None:
            return self.workers[:limit] if limit else self.workers
        return self._workers.get(node, [])[:limit]

    def _free(self, node: str | None, limit: int, owner: str | None) -> Remote | None:
        able = [remote for remote in self._of(node, limit) if remote.active < DEPTH]
        return min(able, key=lambda remote: (remote.actor_id != owner, remote.active), default=None)

    def _may_start(self, node: str | None, limit: int) -> bool:
        there = len(self._of(node, limit)) + self._starting.get(node, 0)
        return there < max(limit, 1)

    def _admit(self) -> None:
        """Give those who wait the workers that have room, first come first served."""
        for waiter in list(self._waiting):
            loop = waiter.future.get_loop()
            if waiter.future.done() or loop.is_closed():
                self._waiting.remove(waiter)
                continue
            found = self._free(waiter.node, waiter.limit, None)
            if found is not None:
                found.active += 1
            elif self._of(waiter.node, waiter.limit) or self._starting.get(waiter.node):
                continue
            self._waiting.remove(waiter)
            post(loop, settle, waiter.future, found, None)

    async def _start(self, node: str | None, cpus: int, others: Iterable[str]) -> None:
        self._starting[node] = self._starting.get(node, 0) + 1
        try:
            remote = await current().workers.run(lambda: _start(node, cpus, others))
        finally:
            self._starting[node] -= 1
        self._workers.setdefault(node, []).append(remote)
        watch = asyncio.create_task(self._watch(remote))
        self._tasks.add(watch)
        watch.add_done_callback(self._tasks.discard)
        self._admit()

    async def _watch(self, remote: Remote) -> None:
        """Learn where a worker came to be."""
        asked = asyncio.ensure_future(_ray.fetch(remote.handle.where.remote()))
        await asyncio.wait({asked}, timeout=_PATIENCE_SECONDS)
        if not asked.done():
            where = f"on node {remote.node[:8]}" if remote.node else "anywhere"
            _log.warning(
                "a flow's worker (less than a CPU) has not started %s in %.0f s: is no CPU free?",
                where,
                _PATIENCE_SECONDS,
            )
        try:
            node = await asked
        except ray.exceptions.RayError:
            return  # whoever calls it sees that
        if node != remote.node and remote in self._workers.get(remote.node, []):
            self._workers[remote.node].remove(remote)
            remote.node = node
            self._workers.setdefault(node, []).append(remote)
            self._admit()


def _start(node: str | None, cpus: int, others: Iterable[str]) -> Remote:
    share = 1 - 1 / cpus if cpus > 1 else 0.0
    options: dict[str, Any] = {"num_cpus": int(share / _RESOLUTION) * _RESOLUTION}
    if node is None:
        options["num_cpus"] = 1  # there is no node yet: an autoscaler is to bring one
    else:
        options |= beside(node, others)
    handle = remote_class().options(max_restarts=0, **options).remote()
    return Remote(handle, str(_ray.actor_id_of(handle)), node)
