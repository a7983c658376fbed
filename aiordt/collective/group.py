"""Groups of actors, as whoever makes them sees them: `create_group` and `Group`."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

import msgpack
from typing_extensions import override

from aiordt import _ray, _runtime
from aiordt._errors import (
    AiordtError,
    GroupError,
    InvalidTypeError,
    InvalidValueError,
    ProtocolViolationError,
    UnavailableError,
    UsageError,
)
from aiordt._progress import run_all
from aiordt.abc import AsyncResource, TransportMessage
from aiordt.collective._members import NAME, Member, find
from aiordt.collective._service import groups_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiordt._runtime import Runtime

BACKENDS: Final = ("auto", "shm", "gloo", "nccl", "mpi")


async def create_group(
    actors: Sequence[Any],
    backend: str = "auto",
    name: str | None = None,
    timeout: float = 30,  # noqa: ASYNC109
) -> Group:
    """Make a group of actors for collective operations.

    It forms while the actors are busy, if they are `AsyncActor`; others are asked as soon as
    they are free. An actor may be in any number of groups.

    Args:
        actors: Handles of different actors; their order is that of the ranks.
        backend: ``"shm"``: host memory, all actors on one host. ``"gloo"``: host memory.
            ``"mpi"``: host memory, by mpi4py; any actors with MPICH, or ranks of one ``mpiexec``.
            ``"nccl"``: CUDA memory. ``"auto"``: ``shm`` where it works, else ``gloo``, and beside
            it ``nccl`` for CUDA tensors, if every member has a GPU of its own.
        name: By which members find it (`AsyncActor.group`); one of its own by default.
        timeout: Within how many seconds it must form.

    Returns:
        The group, to be closed by `Group.aclose` or ``async with``.

    Raises:
        UsageError: An actor is in a group of that name already, or an argument is not valid.
        UnavailableError: The backend does not work for these actors; says why.
        GroupError: A member is dead, cannot be reached, or failed; names it.

    Cost:
        Some 50 ms for actors on one host.
    """
    handles = list(actors)
    ids = [_ray.actor_id_of(handle) for handle in handles]
    if not handles or None in ids:
        raise InvalidTypeError("create_group takes a list of at least one actor handle")
    if len(set(ids)) < len(ids):
        raise InvalidValueError("an actor is in the list twice")
    if backend not in BACKENDS:
        raise InvalidValueError(f"backend={backend!r}: there are {', '.join(BACKENDS)}")
    runtime = _runtime.current()
    name = name or f"group-{os.urandom(6).hex()}"
    try:
        async with asyncio.timeout(timeout):
            members = await run_all([_found(runtime, name, handle) for handle in handles])
    except TimeoutError:
        raise GroupError(f"group {name!r}: not all actors were found within {timeout} s") from None
    return await form(members, handles, backend, name, timeout)


async def _found(runtime: Runtime, name: str, handle: Any) -> Member:  # noqa: ANN401
    try:
        return await find(runtime, handle)
    except AiordtError as exc:
        raise GroupError(f"group {name!r}: {handle}: {exc}") from exc


async def form(
    members: Sequence[Member],
    handles: Sequence[Any],
    backend: str,
    name: str,
    timeout: float,  # noqa: ASYNC109
    *,
    bound: bool = False,
) -> Group:
    """Make a group of actors whose addresses are known; as `create_group`.

    With ``bound``, it ends with this process.
    """
    runtime = _runtime.current()
    group = os.urandom(16)
    made = Group(group, name, backend, tuple(members), () if bound else tuple(handles))
    formed, why = False, f"group {name!r}: it did not form"
    try:
        async with asyncio.timeout(timeout):
            packed = [member.pack() for member in members]
            await made.ask_all(runtime, "enter", lambda rank: [name, rank, packed, timeout, bound])
            met = await made.ask_all(runtime, "meet", lambda _: None)
            made.backend, cuda = _chosen(backend, met)
            await made.ask_all(runtime, "start", lambda _: [made.backend, cuda, timeout])
        formed = True
    except TimeoutError:
        raise GroupError(f"{why} within {timeout} s") from None
    except AiordtError as exc:
        why = f"{why}: {exc}"
        raise
    finally:
        if not formed:
            runtime.io.loop.call_soon_threadsafe(
                runtime.io.spawn,
                made.end(runtime, why, closed=False),
            )
    return made


def _chosen(backend: str, met: Sequence[Any]) -> tuple[str, bool]:
    """The backend for all members, and whether they have NCCL for CUDA tensors.

    Args:
        backend: What was asked for.
        met: Of each member, why it cannot read the others' memory, and its GPU, if it has one.

    Raises:
        UnavailableError: That one does not work here.
    """
    reasons = [reason for reason, _ in met if reason]
    gpus = [gpu for _, gpu in met if gpu]
    cuda = len(set(gpus)) == len(met)
    if backend == "shm" and reasons:
        raise UnavailableError(f"shm: {reasons[0]}", reason=reasons[0], transport="shm")
    if backend == "nccl" and not cuda:
        reason = "every member needs a GPU of its own"
        raise UnavailableError(f"nccl: {reason}", reason=reason, transport="nccl")
    if backend == "auto":
        return "gloo" if reasons else "shm", cuda
    return backend, backend == "nccl"


class Group(AsyncResource):
    """A group of actors, in any process: made by `create_group`, and may be passed on.

    Attributes:
        name: By which members find it.
        backend: By what tensors move.
    """

    def __init__(
        self,
        group: bytes,
        name: str,
        backend: str,
        members: tuple[Member, ...],
        handles: tuple[Any, ...] = (),
    ) -> None:
        self.name = name
        self.backend = backend
        self._group = group
        self._members = members
        self._handles = handles

    @property
    def members(self) -> tuple[Any, ...]:
        """The actors, in rank order."""
        return self._handles or tuple(_ray.weak_handle(member.state) for member in self._members)

    @property
    def size(self) -> int:
        """How many members it has."""
        return len(self._members)

    def rank_of(self, actor: Any) -> int:  # noqa: ANN401
        """The rank of an actor.

        Raises:
            UsageError: It is not in the group.
        """
        actor_id = _ray.actor_id_of(actor)
        for rank, member in enumerate(self._members):
            if member.owner.actor_id == actor_id:
                return rank
        raise UsageError(f"{actor!r} is not in group {self.name!r}")

    @override
    def __repr__(self) -> str:
        return f"<group {self.name!r} of {self.size}, {self.backend}>"

    @override
    async def aclose(self) -> None:
        """End the group on all members; pending calls raise `ClosedError`. Idempotent."""
        runtime = _runtime.current()
        await runtime.io.run(self.end(runtime, f"group {self.name!r} was closed", closed=True))

    async def reform(self, actors: Sequence[Any], timeout: float = 30) -> Group:  # noqa: ASYNC109
        """End this group, and make one of the same name and backend.

        Args:
            actors: The members of the new group.
            timeout: Within how many seconds it must form.

        Raises:
            UsageError: As `create_group`.
            GroupError: As `create_group`.
        """
        await self.aclose()
        return await create_group(actors, self.backend, self.name, timeout)

    # --- internal ----------------------------------------------------------------------------

    @property
    def bound(self) -> bool:
        """Whether it was made for a call on refs, and keeps no actor alive."""
        return not self._handles

    def member(self, rank: int) -> Member:
        """Where a member is."""
        return self._members[rank]

    async def end(self, runtime: Runtime, why: str, *, closed: bool) -> None:
        """Tell all members that are there. On the io loop."""
        asks = [self.ask(runtime, rank, "end", [closed, why]) for rank in range(len(self._members))]
        await asyncio.gather(*asks, return_exceptions=True)

    async def ask_all(
        self, runtime: Runtime, verb: str, body: Callable[[int], object]
    ) -> list[Any]:
        """Ask every member; the first failure is raised, and names its member."""

        async def ask(rank: int) -> Any:  # noqa: ANN401
            try:
                return await self.ask(runtime, rank, verb, body(rank))
            except UnavailableError:
                raise
            except AiordtError as exc:
                text = f"group {self.name!r}: rank {rank} ({self._members[rank].label}): {exc}"
                kind = UsageError if isinstance(exc, UsageError) else GroupError
                raise kind(text) from exc

        return await runtime.io.run(_all([ask(rank) for rank in range(len(self._members))]))

    async def ask(self, runtime: Runtime, rank: int, verb: str, body: object) -> Any:  # noqa: ANN401
        """Ask one member. On the io loop."""
        address = self._members[rank].address
        if address.runtime_id == runtime.address.runtime_id:
            return await groups_of(runtime).handle(
                self._group, verb, body, runtime.address.runtime_id
            )
        request = TransportMessage(NAME, msgpack.packb((self._group, verb, body)))
        reply = await runtime.routes.peer(address).call(request)
        if not isinstance(reply, TransportMessage):
            raise ProtocolViolationError("it answered something else")
        return msgpack.unpackb(reply.body, strict_map_key=False)


async def _all(asks: Sequence[Awaitable[Any]]) -> list[Any]:
    return await run_all(list(asks))  # type: ignore[arg-type]
