"""Transports that go wrong as a plan says: they fail, stand still, and are late."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping  # noqa: TC003  (documentation resolves it)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import RayError

from aiordt._device import Completion
from aiordt._runtime import current
from aiordt.abc import Cut, DrawingLink, SharedLink

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Sequence,
    )
    from types import TracebackType
    from typing import Self

    from aiordt._runtime import Runtime
    from aiordt.abc import Link, Part

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """What goes wrong in the reads of a process, and when; it may be sent to an actor.

    Operations are reads and views. They are counted from 1, in the order in which they begin,
    whoever is at the other end. All tensors of one owner that one call wants by one transport
    are one operation, up to ``max_in_flight_bytes``.

    Attributes:
        fail: By its number, what an operation raises, before it has read anything.
        stall_after: After so many bytes, of all operations together, nothing more is read until
            `FaultyTransport.release`. A tensor that is read as one run of memory is cut there;
            others wait as a whole.
        delay: Seconds by which the end of each operation is late; its bytes are there by then.
    """

    fail: Mapping[int, Exception] = field(default_factory=dict)
    stall_after: int | None = None
    delay: float = 0.0


class FaultyTransport:
    """Lets what this process reads from others go wrong as a plan says.

    While the context is open, every link of this process's runtime does so, whether it was made
    before or is made meanwhile::

        with FaultyTransport(FaultPlan(fail={2: TransferError(...)})) as faults:
            await aiordt.get(first)
            with pytest.raises(aiordt.TransferError):
                await aiordt.get(second)

    Owners notice nothing. A read that stands still ends by `release`, by its cancellation, and
    when its link is closed; that its owner has died it says only once it goes on. What groups and
    channels do is not concerned, beyond the pulls that they make.

    Args:
        plan: What goes wrong.
        transport: Name of the one that does; ``None``: all of them, counted together.

    Raises:
        AssertionError: Another one is active in this process (when it is entered).

    Attributes:
        plan: What goes wrong.
        transport: Of which transport.
    """

    def __init__(self, plan: FaultPlan, transport: str | None = None) -> None:
        self.plan = plan
        self.transport = transport
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None
        self._operations = 0
        self._room = plan.stall_after  # bytes that may yet be read; `None`: any number
        self._standing: dict[Completion, Link] = {}
        self._changed: list[tuple[Link, list[str]]] = []

    @property
    def operations(self) -> int:
        """How many operations have begun."""
        return self._operations

    @property
    def standing(self) -> int:
        """How many operations stand still."""
        return len(self._standing)

    def release(self) -> None:
        """Let all that stand still go on, and nothing stand still any more."""
        with self._lock:
            self._room = None
            standing = list(self._standing)
        for each in standing:
            each.complete()

    def __enter__(self) -> Self:
        with _installing:
            if _active:
                raise AssertionError("a FaultyTransport is active already; they cannot be nested")
            self._runtime = current()
            _active.append(self)
        self._runtime.routes.watch_links(self._seen)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._runtime is not None
        self._runtime.routes.watch_links(None)
        self.close()
        _active.remove(self)

    def close(self) -> None:
        """Let links be as they were; what stands still goes on."""
        for link, names in self._changed:
            for name in names:
                vars(link).pop(name, None)
        self._changed.clear()
        self.release()

    def _seen(self, name: str, link: Link) -> None:
        if self.transport in {None, name}:
            self.spoil(link)

    def spoil(self, link: Link) -> None:
        """Let a link go wrong: it stays what it is, but for what it does."""
        close, read = link.aclose, link.read

        async def faulty_read(parts: Sequence[Part]) -> None:
            await self._read(link, parts, read)

        async def aclose() -> None:
            for each in [each for each, of in list(self._standing.items()) if of is link]:
                each.complete()  # it goes on, and finds the link closed
            await close()

        changes: dict[str, object] = {
            "nowait_nbytes": 0,
            "read_nowait": lambda _: False,  # one that waits can be told to fail or to stand still
            "read": faulty_read,
            "aclose": aclose,
        }
        if isinstance(link, DrawingLink):
            drawn = link.read_drawn

            async def faulty_drawn(parts: Iterator[Part], segments: Iterable[int]) -> None:
                if self._room is None:
                    await self._operate(lambda: drawn(parts, segments))
                else:
                    await faulty_read([*parts])

            changes["read_drawn"] = faulty_drawn
        if isinstance(link, SharedLink):
            for name in ("view", "copy_on_write"):
                changes[name] = self._faulty(getattr(link, name))
        vars(link).update(changes)
        self._changed.append((link, list(changes)))

    def _faulty(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        return lambda *args: self._operate(lambda: call(*args))

    async def _operate(self, call: Callable[[], Awaitable[_T]]) -> _T:
        with self._lock:
            self._operations += 1
            error = self.plan.fail.get(self._operations)
        if error is not None:
            raise copy.copy(error)  # the plan's own would keep the frames that it came through
        result = await call()
        if self.plan.delay:
            await asyncio.sleep(self.plan.delay)
        return result

    async def _read(
        self,
        link: Link,
        parts: Sequence[Part],
        read: Callable[[Sequence[Part]], Awaitable[None]],
    ) -> None:
        async def by_and_by() -> None:
            nbytes = sum(part.nbytes for part in parts)
            stop = Completion()
            with self._lock:
                now = nbytes if self._room is None else min(nbytes, self._room)
                if self._room is not None:
                    self._room -= now
                if now < nbytes:
                    self._standing[stop] = link
            if now == nbytes:
                await read(parts)
                return
            before, after = split(parts, now)
            try:
                if before:
                    await read(before)
                await stop.wait()
            finally:
                self._standing.pop(stop, None)
            await read(after)

        await self._operate(by_and_by)


def split(parts: Sequence[Part], nbytes: int) -> tuple[list[Part], list[Part]]:
    """What to read first, and what after so many bytes of it; only single runs are cut."""
    for number, part in enumerate(parts):
        if part.nbytes > nbytes:
            before, after = list(parts[:number]), list(parts[number:])
            if nbytes and part.contiguous and (part.cut is None or part.cut.dtype is None):
                offset = 0 if part.cut is None else part.cut.offset
                left = part.nbytes - nbytes
                before.append(replace(part, nbytes=nbytes, cut=Cut(offset, (nbytes,), (1,), 1)))
                after[0] = replace(
                    part,
                    address=part.address + nbytes,
                    target=part.target + nbytes,
                    nbytes=left,
                    cut=Cut(offset + nbytes, (left,), (1,), 1),
                )
            return before, after
        nbytes -= part.nbytes
    return list(parts), []


_installing = threading.Lock()
_active: list[FaultyTransport] = []


class ActorFaults:
    """A `FaultyTransport` in an actor's process. Made by `faults_in`."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  (a handle of Ray's)
        self._actor = actor

    async def operations(self) -> int:
        """How many operations have begun there."""
        count: int = await self._actor.__ray_call__.remote(_count_operations)
        return count

    async def standing(self) -> int:
        """How many operations stand still there."""
        count: int = await self._actor.__ray_call__.remote(_count_standing)
        return count

    async def release(self) -> None:
        """As `FaultyTransport.release`."""
        await self._actor.__ray_call__.remote(_release)


@asynccontextmanager
async def faults_in(
    actor: Any,  # noqa: ANN401  (a handle of Ray's)
    plan: FaultPlan,
    transport: str | None = None,
) -> AsyncGenerator[ActorFaults]:
    """Let what an actor reads from others go wrong, while the context is open.

    As `FaultyTransport` in its process. It may have died by the end.

    Args:
        actor: The handle of the actor.
        plan: What goes wrong.
        transport: As of `FaultyTransport`.

    Raises:
        AssertionError: A `FaultyTransport` is active there; Ray brings it.
        ray.exceptions.RayError: The actor cannot be called.
    """
    await actor.__ray_call__.remote(_install, plan, transport)
    try:
        yield ActorFaults(actor)
    finally:
        with suppress(RayError):
            await actor.__ray_call__.remote(_remove)


# What runs in the actor. Named functions, which are not copied, nor is what they refer to.


def _install(_actor: object, plan: FaultPlan, transport: str | None) -> None:
    FaultyTransport(plan, transport).__enter__()


def _count_operations(_actor: object) -> int:
    return _active[0].operations


def _count_standing(_actor: object) -> int:
    return _active[0].standing


def _release(_actor: object) -> None:
    _active[0].release()


def _remove(_actor: object) -> None:
    _active[0].__exit__(None, None, None)
