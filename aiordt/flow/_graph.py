"""The nodes that users build graphs of. Building one does nothing; awaiting it evaluates it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import ObjectRef
from typing_extensions import override

from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._progress import finish
from aiordt.flow._actors import ActorGroup, GivenActors, ReduceGroup, is_method_of
from aiordt.flow._element import Group, SourceGroup, as_async
from aiordt.flow._shared import Shared
from aiordt.flow._tasks import BroadcastGroup, GatherGroup, MapGroup, ShuffleGroup

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
        Callable,
        Generator,
        Iterable,
        Sequence,
    )

    from aiordt.flow._policy import Decision


class Node:
    """A part of a graph; what is common to all of them.

    ``await node`` evaluates it and what it needs, once, however many tasks await it, and gives
    its list. ``async for`` gives the elements one by one, in order, as they are there. When the
    last one that awaits it is cancelled, so is all that was begun for it. An error that a
    function or method raised is raised here, with a note of where; it is kept, as a result is.

    What it came to is kept while the node is, and while others that were built on it are not
    evaluated.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        group.pin()
        self._all = Shared(group.values)

    def __del__(self) -> None:
        group = getattr(self, "_group", None)  # there is none if it was refused
        if group is not None:
            group.unpin()

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self.eval().__await__()

    async def eval(self) -> list[Any]:
        """Evaluate it; the same as to await it.

        Returns:
            Its elements.

        Raises:
            UsageError: Ray is not initialized, or what was given does not fit together.
            OwnerDiedError: An actor died, or workers did again and again, or what a task needs is
                lost and cannot be made again.
            Exception: Whatever a function or method raised, with a note that says where.

        Cost:
            About 1 ms for a task, besides its own time and its transfers.

        Cancellation:
            Ends what nobody else waits for: tasks that have not begun do not begin, and
            coroutine functions are cancelled. An ordinary function cannot be stopped: its
            worker takes the next task when it has ended.
        """
        values = await self._all.join()
        self._all.forget()  # the elements have them, or better ones if some are lost
        return values

    async def __aiter__(self) -> AsyncGenerator[Any]:
        async with aclosing(self._group.stream()) as values:
            async for value in values:
                yield value

    def __len__(self) -> int:
        size = self._group.size
        if size is None:
            raise TypeError(f"{self._group.label}: its length is known once it was evaluated")
        return size

    def __bool__(self) -> bool:
        return True

    @property
    def placements(self) -> list[Decision | None]:
        """Where each element was placed, and why; ``None``: not yet, or nowhere."""
        decisions = self._group.decisions
        return [decisions.get(index) for index in range(max(decisions, default=-1) + 1)]

    def explain(self) -> str:
        """Where its elements were placed and why, to be read: a line for each."""
        rows = [f"[{index}] {where or 'not placed'}" for index, where in enumerate(self.placements)]
        return "\n".join([self._group.label, *rows])

    @override
    def __repr__(self) -> str:
        size = self._group.size
        return f"<flow.{self._group.label} x {'?' if size is None else size}>"


def _count(n: Any, what: str) -> int:  # noqa: ANN401
    if not isinstance(n, int) or isinstance(n, bool):
        raise InvalidTypeError(f"{what}: n must be an int, not {n!r}")
    if n < 0:
        raise InvalidValueError(f"{what}: n must not be negative, not {n}")
    return n


def _rows(args: Any, what: str) -> list[tuple[Any, ...]] | None:  # noqa: ANN401
    """``args`` that are a list for each element."""
    if args is None:
        return None
    if not isinstance(args, list | tuple):
        raise InvalidTypeError(f"{what}: args must be a list of lists, not {type(args).__name__}")
    for row in args:
        if not isinstance(row, list | tuple):
            raise InvalidTypeError(
                f"{what}: args has one list of arguments for each element; one is {row!r}"
            )
    return [tuple(row) for row in args]


def _group(inputs: Any, what: str) -> Group:  # noqa: ANN401
    if isinstance(inputs, Node):
        return inputs._group  # noqa: SLF001
    if isinstance(inputs, list) and any(isinstance(each, Node) for each in inputs):
        raise InvalidTypeError(
            f"{what}: a list of nodes: give several inputs as a tuple, or await them first"
        )
    if isinstance(inputs, list | tuple | ObjectRef) or hasattr(inputs, "__aiter__"):
        return SourceGroup(inputs)
    if hasattr(inputs, "__iter__") and not isinstance(inputs, str | bytes | dict):
        return SourceGroup(list(inputs))
    raise InvalidTypeError(
        f"{what}: inputs must be a node, a list, an ObjectRef of one or an async iterable, "
        f"not {type(inputs).__name__}"
    )


def _groups(inputs: Any, what: str) -> list[Group]:  # noqa: ANN401
    """One input, or a tuple of several."""
    if isinstance(inputs, tuple) and any(isinstance(each, Node) for each in inputs):
        return [_group(each, what) for each in inputs]
    return [_group(inputs, what)]


class Source(Node):
    """Values that are there, as a node.

    Args:
        values: A list of values, tensors or refs, an ``ObjectRef`` of one, or an async iterable,
            which is read to its end when it is first needed.

    Raises:
        UsageError: It is none of these.
    """

    def __init__(self, values: Any) -> None:  # noqa: ANN401
        super().__init__(_group(values, "Source"))


class Broadcast(Node):
    """Run ``fn(*args)`` once, and give ``n`` handles to what it returns.

    Args:
        fn: A function, a coroutine function, or a remote function of Ray's, whose options do
            not count. It gets tensors in the places of refs. Like that of a `Map`, it may be
            run again when what it made is lost, and must not write to what it gets.
        n: How many handles.
        args: Its arguments.

    Raises:
        UsageError: An argument is not valid.
    """

    def __init__(self, fn: Any, n: int, args: Sequence[Any] | None = None) -> None:  # noqa: ANN401
        if args is not None and not isinstance(args, list | tuple):
            raise InvalidTypeError(f"Broadcast: args must be a list, not {type(args).__name__}")
        super().__init__(BroadcastGroup(fn, _count(n, "Broadcast"), tuple(args or ())))


class Map(Node):
    """Run ``fn(*args[i], x_i)`` on each element of ``inputs``.

    An element is run as soon as its input is there. Its tensors stay in the worker that made
    them; its value is what the function returned, with refs in their places.

    Args:
        fn: As of a `Broadcast`.
        inputs: A node, a list of values, tensors or refs, an ``ObjectRef`` of such a list, or an
            async iterable. Or a tuple of several of them with at least one node, equally
            long: ``fn(*args[i], x_i, y_i, ...)``.
        args: A list of arguments for each element.

    Raises:
        UsageError: An argument is not valid, or lengths differ.
    """

    def __init__(self, fn: Any, inputs: Any, args: Sequence[Sequence[Any]] | None = None) -> None:  # noqa: ANN401
        super().__init__(MapGroup(fn, _groups(inputs, "Map"), _rows(args, "Map")))


class Shuffle(Node):
    """Cut each element of ``inputs`` into ``n`` pieces, and put those of a number together.

    ``fn(*args[i], x_i)`` returns a list of ``n`` pieces. Element ``j`` is the list of the ``j``-th
    pieces of all inputs: a `Map` over it gets one partition at a time, and `ReduceActors` over
    it, with ``n`` actors, gives each actor its own. Only the pieces that are used are moved.

    Args:
        fn: As of a `Broadcast`; pieces may be views of one tensor.
        inputs: As of a `Map`.
        n: How many partitions.
        args: As of a `Map`.

    Raises:
        UsageError: As of a `Map`; when it is evaluated, if ``fn`` returns no ``n`` pieces.
    """

    def __init__(
        self,
        fn: Any,  # noqa: ANN401
        inputs: Any,  # noqa: ANN401
        n: int,
        args: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        groups = _groups(inputs, "Shuffle")
        pieces = MapGroup(fn, groups, _rows(args, "Shuffle"), kind="Shuffle")
        super().__init__(ShuffleGroup(pieces, _count(n, "Shuffle")))


class Gather(Node):
    """The elements of a node with their tensors brought here.

    What is lost on the way is made again, which a user's own ``await`` of a ref cannot do.

    Args:
        inputs: As of a `Map`.

    Raises:
        UsageError: They are not valid.
    """

    def __init__(self, inputs: Any) -> None:  # noqa: ANN401
        super().__init__(GatherGroup(_group(inputs, "Gather")))


class InitActors(Node):
    """Make ``n`` actors ``cls(*args[i])``, when they are first used.

    `ReduceActors` makes them once its inputs are there, next to those.

    Args:
        cls: A class: `aiordt.AsyncActor`, or a plain one, which becomes one. Its actors ask
            for no CPU. Or a class that ``ray.remote`` has decorated, with its options.
        n: How many.
        args: A list of arguments for each.
        restore: A method, or its name, that brings a new actor to where a dead one was. Without
            it, the death of an actor is an error.

    Raises:
        UsageError: An argument is not valid.
    """

    def __init__(
        self,
        cls: Any,  # noqa: ANN401
        n: int,
        args: Sequence[Sequence[Any]] | None = None,
        *,
        restore: str | Callable[..., Any] | None = None,
    ) -> None:
        rows = _rows(args, "InitActors")
        group = ActorGroup(cls, _count(n, "InitActors"), rows, restore)
        if restore is not None and not is_method_of(restore, cls):
            raise InvalidValueError(f"InitActors: {cls!r} has no method {restore!r}")
        super().__init__(group)


class ReduceActors(Node):
    """Call ``actor_i.method(*args[i], *inputs)`` on each actor, with all elements of ``inputs``.

    The method gets refs, and pulls what it needs. The node's elements are what the methods
    returned. Over a `Shuffle` with as many partitions as there are actors, each gets the pieces
    of its own.

    A call is repeated if its inputs were lost before it had them: let the method pull them
    before it changes anything. Calls of several nodes on the same actors come in the order in
    which their inputs are there.

    Args:
        method: A method, or its name.
        actors: `InitActors`, or a list of actor handles.
        inputs: As of a `Map`; of several, the elements come one after the other.
        args: A list of arguments for each actor.

    Raises:
        UsageError: An argument is not valid.
    """

    def __init__(
        self,
        method: str | Callable[..., Any],
        actors: Any,  # noqa: ANN401
        inputs: Any,  # noqa: ANN401
        args: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        if isinstance(actors, InitActors):
            group = _group(actors, "ReduceActors")
        elif isinstance(actors, list | tuple):
            group = GivenActors(actors)
        else:
            raise InvalidTypeError(
                f"ReduceActors: actors must be InitActors or a list of handles, not {actors!r}"
            )
        groups = _groups(inputs, "ReduceActors")
        super().__init__(ReduceGroup(method, group, groups, _rows(args, "ReduceActors")))


async def stream(
    items: Iterable[Any] | AsyncIterable[Any],
    build: Callable[[Any], Node],
    *,
    max_in_flight: int = 4,
) -> AsyncGenerator[list[Any]]:
    """Evaluate a graph for each of ``items``, several at a time.

    Later ones enter while earlier ones are still being reduced.

    Args:
        items: What comes; the next is taken when there is room for it.
        build: Makes the node that is to be evaluated for an item.
        max_in_flight: How many are evaluated, or have been and wait to be taken, at a time.

    Yields:
        What each node gives, in the order of ``items``.

    Raises:
        UsageError: ``max_in_flight`` is less than 1, or ``build`` gives no node.
        Exception: Whatever the evaluation of a node raises, when its turn comes.
    """
    if max_in_flight < 1:
        raise InvalidValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
    running: deque[asyncio.Task[list[Any]]] = deque()
    room = asyncio.Semaphore(max_in_flight)
    ended = object()
    source = aiter(as_async(items))

    async def evaluate(item: Any) -> list[Any]:  # noqa: ANN401
        node = build(item)
        if not isinstance(node, Node):
            raise InvalidTypeError(f"build must give a node, not {type(node).__name__}")
        return await node

    async def feed() -> Any:  # noqa: ANN401
        await room.acquire()
        return await anext(source, ended)

    feeding: asyncio.Task[Any] | None = asyncio.create_task(feed())
    try:
        while feeding is not None or running:
            waiting = {each for each in (feeding, running[0] if running else None) if each}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if feeding is not None and feeding.done():
                item = feeding.result()
                feeding = None
                if item is not ended:
                    running.append(asyncio.create_task(evaluate(item)))
                    feeding = asyncio.create_task(feed())
            if running and running[0].done():
                room.release()  # only now: results that nobody has taken are bounded, too
                yield running.popleft().result()
    finally:
        rest: list[asyncio.Task[Any]] = [*running, *([feeding] if feeding is not None else [])]
        for task in rest:
            task.cancel()
        if rest:
            await finish(asyncio.ensure_future(_quiet(rest)))


async def _quiet(tasks: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
