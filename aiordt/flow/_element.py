"""Parts of graphs as they are evaluated: elements, and what a group of them has in common.

Invariants:
    ELM-1  Each element is made once, for all who wait for it, and again only when it was lost,
           or is asked for after it had been forgotten.
    ELM-2  A value is forgotten when no `Node` of the user's stands for its group and everything
           that was built on the group has been made.
"""

from __future__ import annotations

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ray import ObjectRef
from typing_extensions import override

from aiordt import _ray
from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._export import export
from aiordt._progress import finish, run_all
from aiordt._ref import TensorRef
from aiordt._runtime import current
from aiordt._types import MIB
from aiordt.flow._context import Context, Located, next_group
from aiordt.flow._shared import Shared

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence

    from aiordt._types import Owner
    from aiordt.flow._policy import Decision

#: An object of Ray's up to this size is looked into, for refs in it.
_PEEK_NBYTES: Final = MIB


class Element:
    """One value of a group.

    Args:
        group: The group.
        index: Which one.
    """

    def __init__(self, group: Group, index: int) -> None:
        self._group = group
        self._index = index
        self._shared: Shared[Any] = Shared(self._start)

    async def _start(self) -> Any:  # noqa: ANN401
        value = await self._group.make(self._index)
        self._group.note_made(self)
        return value

    async def value(self) -> Any:  # noqa: ANN401
        """The value, made if need be (ELM-1)."""
        value = await self._shared.join()
        if not self._group.pinned:
            self.forget()
        return value

    @property
    def pure(self) -> bool:
        """Whether it can be made again."""
        return self._group.pure

    def forget(self) -> None:
        """Let go of the value, if it can be made again."""
        if self.pure:
            self._shared.forget()

    def behind(self) -> Sequence[Element]:
        """Elements whose values are in its own."""
        return self._group.behind()

    def refs(self) -> list[TensorRef]:
        """The refs in its value, if it has one."""
        return refs_in(self._shared.now())


class Group(ABC):
    """What stands behind a `Node`: elements of one kind, and how they are made.

    Attributes:
        pure: Whether an element may be made more than once.
        wide: Whether many use the same element.

    Args:
        label: How errors call it.
        inputs: The groups that its elements are made from.
    """

    pure: ClassVar[bool] = True

    def __init__(self, label: str, inputs: Sequence[Group] = ()) -> None:
        self.label = label
        self.number = next_group()
        self.inputs = tuple(inputs)
        self.wide = False
        self.decisions: dict[int, Decision] = {}
        self._elements: list[Element] | None = None
        self._expanding = Shared(self._expanded)
        self._pins = 0
        self._unmade: set[int] = set()
        self._holds = True
        for group in self.inputs:
            group.pin()

    @property
    @abstractmethod
    def size(self) -> int | None:
        """How many elements there are; ``None``: not known yet."""

    @abstractmethod
    async def make(self, index: int) -> Any:  # noqa: ANN401
        """Make an element."""

    def behind(self) -> Sequence[Element]:
        """Elements of others whose values are in its own elements'."""
        return ()

    async def count(self) -> int:
        """How many elements there are, in the end; to be overridden where `size` is not known."""
        assert self.size is not None  # noqa: S101
        return self.size

    async def elements(self) -> list[Element]:
        """All elements."""
        if self._elements is None:
            await self._expanding.join()
        assert self._elements is not None  # noqa: S101
        return self._elements

    async def _expanded(self) -> None:
        elements = self._elements = self._all(await self.count())
        self._unmade = {id(element) for element in elements}
        if not elements:
            self._let_go()

    def _all(self, size: int) -> list[Element]:
        return [Element(self, index) for index in range(size)]

    def note_made(self, element: Element) -> None:
        """An element was made."""
        self._unmade.discard(id(element))
        if not self._unmade:
            self._let_go()

    # --- who needs it ------------------------------------------------------------------------

    @property
    def known(self) -> Sequence[Element]:
        """The elements, if that many are known."""
        return self._elements or ()

    @property
    def pinned(self) -> bool:
        """Whether somebody needs the values."""
        return self._pins > 0

    def pin(self) -> None:
        """Somebody needs the values (ELM-2)."""
        self._pins += 1

    def unpin(self) -> None:
        """... and no more. Any thread."""
        self._pins -= 1
        if self._pins == 0:
            for element in self._elements or ():
                element.forget()
            self._let_go()

    def _let_go(self) -> None:
        """All is made: the inputs are needed no more, unless something is lost."""
        if self._holds:
            self._holds = False
            for group in self.inputs:
                group.unpin()

    # --- all of it ---------------------------------------------------------------------------

    async def values(self) -> list[Any]:
        """All values, evaluated with as many at a time as the context allows."""
        return [value async for value in self.stream()]

    async def stream(self) -> AsyncGenerator[Any]:
        """Values in order, as they are there; a failure at once, when the rest has ended."""
        elements = await self.elements()
        window = Context.current().max_in_flight
        running: list[asyncio.Task[Any]] = []
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()

        def done(task: asyncio.Task[Any]) -> None:
            if _has_failed(task) and not failed.done():
                failed.set_result(None)

        async def begin(element: Element) -> Any:  # noqa: ANN401
            return await element.value()

        waiting = iter(elements)
        position = 0
        try:
            for _ in elements:
                while len(running) - position < window and (each := next(waiting, None)):
                    task = asyncio.create_task(begin(each))
                    task.add_done_callback(done)
                    running.append(task)
                head = running[position]
                if not head.done():
                    await asyncio.wait({head, failed}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    next(filter(_has_failed, running)).result()
                position += 1
                yield head.result()
        finally:
            rest = [task for task in running[position:] if not task.done()]
            for task in rest:
                task.cancel()
            if rest:
                await finish(asyncio.ensure_future(_ended(rest)))


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


class SourceGroup(Group):
    """Values that the user has: a sequence, an ObjectRef of one, or an async iterable."""

    def __init__(self, values: Any) -> None:  # noqa: ANN401
        super().__init__("Source")
        self._given = values
        self._read: list[Any] | None = list(values) if isinstance(values, list | tuple) else None

    @property
    @override
    def size(self) -> int | None:
        return None if self._read is None else len(self._read)

    @override
    async def count(self) -> int:
        if self._read is None:
            if isinstance(self._given, ObjectRef):
                values = await _ray.fetch(self._given)
                if not isinstance(values, list | tuple):
                    raise InvalidTypeError(
                        f"inputs: the ObjectRef is of a {type(values).__name__}, not of a list"
                    )
                self._read = list(values)
            else:
                self._read = [value async for value in self._given]
        return len(self._read)

    @override
    async def make(self, index: int) -> Any:
        assert self._read is not None  # noqa: S101
        value = self._read[index]
        if isinstance(value, ObjectRef):
            return await _looked_into(value)
        return await export(value, "the inputs of a flow", transport=None, snapshot=False)


async def _looked_into(ref: ObjectRef[Any]) -> Any:  # noqa: ANN401
    """The value of an ObjectRef, if that is small; the ref, if it is large."""
    await _ray.object_ready(ref)
    nbytes, nodes = await current().workers.run(lambda: _ray.object_place(ref))
    if nbytes > _PEEK_NBYTES and nodes:
        return Elsewhere(ref, nbytes, nodes[0])
    return await _ray.fetch(ref)


@dataclasses.dataclass(frozen=True, slots=True)
class Elsewhere:
    """A large object of Ray's.

    Attributes:
        ref: It.
        nbytes: Its size.
        node: A node that has it.
    """

    ref: ObjectRef[Any]
    nbytes: int
    node: str


def sent(value: Any) -> Any:  # noqa: ANN401
    """A value as it goes to a worker or an actor."""
    return value.ref if isinstance(value, Elsewhere) else value


def refs_in(tree: Any) -> list[TensorRef]:  # noqa: ANN401
    """The refs in containers; what is deep in other objects counts for nothing here."""
    if isinstance(tree, TensorRef):
        return [tree]
    children: Any = ()
    if isinstance(tree, dict):
        children = tree.values()
    elif isinstance(tree, list | tuple | set | frozenset):
        children = tree
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = [getattr(tree, each.name, None) for each in dataclasses.fields(tree)]
    return [ref for child in children for ref in refs_in(child)]


def locate(value: Any, located: Located, *, shared: bool = False) -> None:  # noqa: ANN401
    """Add where what is in a value lies; what travels by value lies nowhere."""
    table = located.near if shared else located.data
    if isinstance(value, Elsewhere):
        table[value.node] += value.nbytes
        return
    for ref in refs_in(value):
        if ref.inline is None:
            table[ref.owner.node_id] += ref.nbytes
            if not shared and ref.owner.actor_id:
                located.owners[ref.owner.actor_id] += ref.nbytes


async def all_values(elements: Sequence[Element]) -> list[Any]:
    """The values of some elements, made concurrently."""
    return await run_all([element.value() for element in elements]) if elements else []


async def forget_lost(used: Sequence[tuple[Element, Any]], who: str) -> tuple[bool, set[str]]:
    """Forget the values that have something of a process that is gone.

    Args:
        used: Elements, and the values that they had; they may have others by now.
        who: The process, as an error called it.

    Returns:
        Whether there were any, so that others are to be had, and the actors that are gone.
    """
    refs = [ref for _, value in used for ref in refs_in(value)]
    gone = {ref.owner for ref in refs if who in {str(ref.owner), str(ref.header.address)}}
    if not gone:
        owners = {ref.owner for ref in refs}
        gone = {owner for owner in owners if await current().workers.run(_gone(owner))}
    again = bool(gone)
    for element, _ in used:
        for each in (element, *element.behind()):
            if any(ref.owner in gone for ref in each.refs()):
                again = again and each.pure
                each.forget()
    return again, {owner.actor_id for owner in gone if owner.actor_id}


def _gone(owner: Owner) -> Callable[[], bool]:
    return lambda: _ray.is_gone(owner)


def check_size(given: int | None, wanted: int | None, what: str) -> None:
    """Two lists that belong together are equally long, as far as that is known.

    Raises:
        InvalidValueError: They are not.
    """
    if given is not None and wanted is not None and given != wanted:
        raise InvalidValueError(f"{what}: {given} for {wanted}")


def as_async(items: Any) -> AsyncIterable[Any]:  # noqa: ANN401
    """An iterable of either kind as an asynchronous one."""

    async def each() -> AsyncGenerator[Any]:
        for item in items:
            yield item

    return items if hasattr(items, "__aiter__") else each()
