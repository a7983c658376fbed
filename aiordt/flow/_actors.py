"""Groups of actors, and what is called on them.

Invariants:
    ACT-1  Actors are made when they are first used, after what they are used on.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from typing_extensions import override

from aiordt import _ray
from aiordt._actor import AsyncActor
from aiordt._errors import InvalidTypeError, OwnerDiedError
from aiordt._progress import post, run_all
from aiordt.flow._context import Context, Located
from aiordt.flow._element import Group, all_values, check_size, locate, sent
from aiordt.flow._policy import Request
from aiordt.flow._shared import Shared
from aiordt.flow._tasks import BroadcastGroup, ShuffleGroup, renewed

if TYPE_CHECKING:
    from aiordt.flow._element import Element
    from aiordt.flow._policy import Cluster, Decision

#: A method's name, or the function itself.
Method: TypeAlias = str | Callable[..., Any]


def method_name(method: Any, what: str) -> str:  # noqa: ANN401
    """The name of a method that is given by name or as a function.

    Raises:
        InvalidTypeError: It is neither.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", None)
    if name is None:  # a method of a class that ray.remote has decorated
        name = getattr(method, "_method_name", None)
    if not isinstance(name, str) or not (isinstance(method, str) or callable(method)):
        raise InvalidTypeError(f"{what}: a method or its name, not {method!r}")
    return name


def _remote_class(cls: Any) -> Any:  # noqa: ANN401
    """A class as Ray's; a plain one becomes an `AsyncActor` that asks for no CPU."""
    if isinstance(cls, ray.actor.ActorClass):
        return cls
    if not issubclass(cls, AsyncActor):
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        cls = type(cls.__name__, (cls, AsyncActor), {**body, "__doc__": cls.__doc__})
    return ray.remote(num_cpus=0)(cls)


class ActorGroup(Group):
    """Actors of one class."""

    def __init__(
        self,
        cls: Any,  # noqa: ANN401
        n: int,
        args: Sequence[Sequence[Any]] | None,
        restore: Method | None,
    ) -> None:
        if not isinstance(cls, type | ray.actor.ActorClass):
            raise InvalidTypeError(f"InitActors takes a class, not {cls!r}")
        metadata = getattr(cls, "__ray_metadata__", None)
        name = cls.__name__ if metadata is None else metadata.class_name
        super().__init__(f"InitActors({name})")
        if args is not None:
            check_size(len(args), n, f"{self.label}: lists of args, and actors")
        self._cls = cls
        self._n = n
        self._args = args
        self._restore = None if restore is None else method_name(restore, "restore=")
        self._located: list[Located] = []
        self._made_all = Shared(self._make_all)
        self._handles: list[Any] = []
        self._context: Context | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._replacing: dict[int, Shared[Any]] = {}

    @property
    @override
    def size(self) -> int:
        return self._n

    @override
    async def make(self, index: int) -> Any:
        await self._made_all.join()
        return self._handles[index]

    async def handle(self, index: int, located: Sequence[Located]) -> Any:  # noqa: ANN401
        """An actor; if there are none yet, they are made beside what they are used on (ACT-1)."""
        if not self._located:
            self._located = list(located)
        await self._made_all.join()
        return self._handles[index]

    async def _make_all(self) -> None:
        context = self._context = Context.current()
        self._loop = asyncio.get_running_loop()
        await context.look()
        located = self._located or [Located() for _ in range(self._n)]
        data = [each.data for each in located]
        request = Request(self.number, data, located[0].near if located else {}, actors=True)
        decisions = context.decide(request)
        self.decisions.update(enumerate(decisions))
        cls = _remote_class(self._cls)
        makes = [self._one(cls, index, each.node) for index, each in enumerate(decisions)]
        try:
            self._handles = await run_all(makes) if makes else []
        except BaseException:
            self._unplace()
            raise

    async def _one(self, cls: Any, index: int, node: str | None) -> Any:  # noqa: ANN401
        args = self._args[index] if self._args is not None else ()
        context = Context.current()
        if _ray.says_where(cls):
            node = None  # the user knows better

        def make(options: dict[str, Any]) -> Any:  # noqa: ANN401
            return cls.options(**options).remote(*args)

        handle = await context.make_actor(make, node)
        try:
            await _ray.wait_made(handle)
        except OwnerDiedError as exc:
            exc.add_note(f"in {self.label}[{index}], an actor of a flow")
            raise
        return handle

    def _unplace(self) -> None:
        """The actors count no more (FLW-2). Any thread: the counting is done on the loop."""
        context, loop, decisions = self._context, self._loop, tuple(self.decisions.values())
        self._context = None
        if context is not None and loop is not None:
            post(loop, _end_all, context.cluster, self.number, decisions)

    @override
    def unpin(self) -> None:
        super().unpin()
        if not self.pinned:
            self._handles = []
            self._made_all.forget()
            self._unplace()

    async def replaced(self, index: int, dead: Any) -> bool:  # noqa: ANN401
        """Make an actor anew that died, once for all who saw it dead.

        Returns:
            Whether there is a way to restore it.
        """
        if self._restore is None:
            return False
        if self._handles[index] is not dead:
            return True
        shared = self._replacing.get(index)
        if shared is None:
            shared = self._replacing[index] = Shared(lambda: self._replace(index))
        try:
            await shared.join()
        finally:
            self._replacing.pop(index, None)
        return True

    async def _replace(self, index: int) -> None:
        context = Context.current()
        await context.look(now=True)
        old = self.decisions.get(index)
        if old is not None and old.node is not None:
            context.cluster.end(self.number, old.node, actor=True)
        near = self._located[index] if self._located else Located()
        (decision,) = context.decide(Request(self.number, [near.data], near.near, actors=True))
        self.decisions[index] = decision
        handle = await self._one(_remote_class(self._cls), index, decision.node)
        await _ray.fetch(getattr(handle, self._restore or "").remote())
        self._handles[index] = handle
        if self.known:
            self.known[index].forget()  # it has the dead one


def _end_all(cluster: Cluster, group: int, decisions: Sequence[Decision]) -> None:
    for decision in decisions:
        if decision.node is not None:
            cluster.end(group, decision.node, actor=True)


class GivenActors(Group):
    """Actors that the user has made."""

    def __init__(self, actors: Sequence[Any]) -> None:
        super().__init__("actors")
        for actor in actors:
            if _ray.actor_id_of(actor) is None:
                raise InvalidTypeError(f"actors: a {type(actor).__name__} is no actor handle")
        self._actors = list(actors)

    @property
    @override
    def size(self) -> int:
        return len(self._actors)

    @override
    async def make(self, index: int) -> Any:
        return self._actors[index]


class ReduceGroup(Group):
    """A call of a method on each of some actors, with all elements of the inputs."""

    pure = False  # actors remember

    def __init__(
        self,
        method: Method,
        actors: Group,
        inputs: Sequence[Group],
        args: Sequence[Sequence[Any]] | None,
    ) -> None:
        self._method = method_name(method, "ReduceActors")
        super().__init__(f"ReduceActors({self._method})", [*inputs, actors])
        size = actors.size or 0
        if args is not None:
            check_size(len(args), size, f"{self.label}: lists of args, and actors")
        self._n = size
        self._args = args
        self._actors = actors
        self._given = tuple(inputs)
        # Of a shuffle with a partition for each actor, each gets its own.
        self._by_partition = (
            len(inputs) == 1 and isinstance(inputs[0], ShuffleGroup) and inputs[0].size == size
        )
        for group in inputs if size > 1 and not self._by_partition else ():
            group.wide = True

    @property
    @override
    def size(self) -> int:
        return self._n

    @override
    async def make(self, index: int) -> Any:
        context = Context.current()
        rows = [await group.elements() for group in self._given]
        elements = [element for row in rows for element in row]
        if self._by_partition:
            elements = [rows[0][index]]
        own = tuple(self._args[index]) if self._args is not None else ()
        for left in reversed(range(1 + context.retries)):
            values = await all_values(elements)  # before the actors (ACT-1)
            handle = await self._handle(index, rows, values)
            sending = [sent(value) for value in (values[0] if self._by_partition else values)]
            try:
                return await self._call(handle, own, sending, index)
            except ray.exceptions.RayActorError as exc:
                if left and await self._replaced(index, handle):
                    continue
                raise OwnerDiedError(
                    f"{self.label}[{index}]: its actor died: {str(exc).splitlines()[0]}. What it "
                    "knew is lost: give InitActors a restore= method to have it made anew",
                    owner=f"actor {str(_ray.actor_id_of(handle))[:12]}",
                ) from exc
            except Exception as exc:
                used = list(zip(elements, values, strict=True))
                if left and await renewed(context, used, exc):
                    continue
                exc.add_note(
                    f"in {self.label}[{index}], a call of a flow, on actor "
                    f"{str(_ray.actor_id_of(handle))[:12]}"
                )
                raise
        raise AssertionError

    async def _handle(self, index: int, rows: Sequence[list[Element]], values: list[Any]) -> Any:  # noqa: ANN401
        if not isinstance(self._actors, ActorGroup):
            return await (await self._actors.elements())[index].value()
        located: list[Located] = []
        if self._by_partition:
            for value in await all_values(rows[0]):
                located.append(Located())
                locate(value, located[-1])
        else:
            each = Located()
            seen: set[int] = set()
            positions = [
                (group, element)
                for group, row in zip(self._given, rows, strict=True)
                for element in row
            ]
            for (group, element), value in zip(positions, values, strict=True):
                if not isinstance(group, BroadcastGroup) or id(element) not in seen:
                    locate(value, each, shared=True)
                seen.add(id(element))
            located = [each] * self._n
        return await self._actors.handle(index, located)

    async def _replaced(self, index: int, dead: Any) -> bool:  # noqa: ANN401
        actors = self._actors
        return isinstance(actors, ActorGroup) and await actors.replaced(index, dead)

    async def _call(self, handle: Any, own: Sequence[Any], sending: list[Any], index: int) -> Any:  # noqa: ANN401
        method = getattr(handle, self._method, None)
        if method is None:
            raise InvalidTypeError(f"{self.label}: {handle!r} has no method {self._method!r}")
        ref = method.options(name=f"{self.label}[{index}]").remote(*own, *sending)
        if not isinstance(ref, ray.ObjectRef):
            raise InvalidTypeError(f"{self.label}: the method yields items, not one value")
        try:
            return await _ray.fetch(ref)
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise


def is_method_of(method: Method, cls: Any) -> bool:  # noqa: ANN401
    """Whether a class has such a method, as far as that can be seen."""
    plain = getattr(cls, "__ray_metadata__", None)
    plain = plain.modified_class if plain is not None else cls
    return inspect.isclass(plain) and hasattr(plain, method_name(method, "method"))
