"""Groups of tasks: what is run once, on each input, and in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._export import export
from aiordt._get import get
from aiordt.flow._context import Context, Function, Located, Work
from aiordt.flow._element import Element, Group, all_values, check_size, forget_lost, locate, sent
from aiordt.flow._worker import lost_owner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.flow._policy import Decision


class TaskGroup(Group):
    """Elements that workers make.

    Args:
        kind: What the user called it.
        function: What is run.
        inputs: The groups whose elements it is run on.
    """

    def __init__(self, kind: str, function: Any, inputs: Sequence[Group] = ()) -> None:  # noqa: ANN401
        self.function = Function(function, kind)
        super().__init__(f"{kind}({self.function.name})", inputs)

    async def run(self, index: int, own: Sequence[Any]) -> Any:  # noqa: ANN401
        """Run the task of an element.

        Args:
            index: Which one.
            own: Its arguments before those from inputs.
        """
        label = f"{self.label}[{index}]"
        rows = [await group.elements() for group in self.inputs]
        elements = [row[index] for row in rows]
        shared = [isinstance(group, BroadcastGroup) for group in self.inputs]

        async def arguments() -> list[Any]:
            values = await all_values(elements)
            first = await export(list(own), label, transport=None, snapshot=False)
            return [*first, *map(sent, values)]

        def located(arguments: list[Any]) -> Located:
            found = Located()
            locate(arguments[: len(own)], found)
            for value, is_shared in zip(arguments[len(own) :], shared, strict=True):
                locate(value, found, shared=is_shared)
            return found

        def placed(decision: Decision) -> None:
            self.decisions[index] = decision

        async def renew(owner: str, arguments: list[Any]) -> tuple[bool, set[str]]:
            used = zip(elements, arguments[len(own) :], strict=True)
            return await forget_lost(list(used), owner)

        return await Context.current().run(
            Work(
                group=self.number,
                label=label,
                function=self.function,
                arguments=arguments,
                located=located,
                renew=renew,
                placed=placed,
                wide=self.wide,
            )
        )


class BroadcastGroup(TaskGroup):
    """One task, whose value stands for all elements."""

    def __init__(self, function: Any, n: int, args: Sequence[Any]) -> None:  # noqa: ANN401
        super().__init__("Broadcast", function)
        self.wide = n > 1
        self._n = n
        self._args = args

    @property
    @override
    def size(self) -> int:
        return self._n

    @override
    def _all(self, size: int) -> list[Element]:
        return [Element(self, 0)] * size

    @override
    async def make(self, index: int) -> Any:
        return await self.run(index, self._args)


class MapGroup(TaskGroup):
    """A task for each element of the inputs."""

    def __init__(
        self,
        function: Any,  # noqa: ANN401
        inputs: Sequence[Group],
        args: Sequence[Sequence[Any]] | None,
        kind: str = "Map",
    ) -> None:
        super().__init__(kind, function, inputs)
        self._args = args
        sizes = [group.size for group in self.inputs]
        self._size = next((size for size in sizes if size is not None), None)
        self._check(sizes)

    def _check(self, sizes: Sequence[int | None]) -> None:
        for size in sizes:
            check_size(size, self._size, f"{self.label}: inputs differ in length")
        if self._args is not None:
            check_size(len(self._args), self._size, f"{self.label}: lists of args, and inputs")

    @property
    @override
    def size(self) -> int | None:
        known = all(group.size is not None for group in self.inputs)
        return self._size if known else None

    @override
    async def count(self) -> int:
        sizes = [len(await group.elements()) for group in self.inputs]
        self._size = sizes[0]
        self._check(sizes)
        return sizes[0]

    @override
    async def make(self, index: int) -> Any:
        return await self.run(index, self._args[index] if self._args is not None else ())


class ShuffleGroup(Group):
    """The pieces of all elements of a group, by their number."""

    def __init__(self, pieces: MapGroup, n: int) -> None:
        super().__init__(pieces.label, [pieces])
        self._n = n
        self.decisions = pieces.decisions

    @property
    @override
    def size(self) -> int:
        return self._n

    @override
    async def make(self, index: int) -> Any:
        return [value[index] for value in await self._pieces()]

    @override
    def behind(self) -> Sequence[Element]:
        return self.inputs[0].known

    async def _pieces(self) -> list[Any]:
        values = await all_values(await self.inputs[0].elements())
        for number, value in enumerate(values):
            if not isinstance(value, list | tuple):
                raise InvalidTypeError(
                    f"{self.label}[{number}] returned a {type(value).__name__}: a Shuffle's "
                    f"function returns a list of {self._n} pieces"
                )
            if len(value) != self._n:
                raise InvalidValueError(
                    f"{self.label}[{number}] returned {len(value)} pieces, not {self._n}"
                )
        return values


class GatherGroup(Group):
    """Values with their tensors brought to this process."""

    def __init__(self, inputs: Group) -> None:
        super().__init__(f"Gather of {inputs.label}", [inputs])

    @property
    @override
    def size(self) -> int | None:
        return self.inputs[0].size

    @override
    async def count(self) -> int:
        return len(await self.inputs[0].elements())

    @override
    async def make(self, index: int) -> Any:
        element = (await self.inputs[0].elements())[index]
        context = Context.current()
        for left in reversed(range(1 + context.retries)):
            value = await element.value()
            try:
                return await get(sent(value))
            except Exception as exc:
                if not left or not await renewed(context, [(element, value)], exc):
                    raise
        raise AssertionError


async def renewed(context: Context, used: Sequence[tuple[Element, Any]], exc: Exception) -> bool:
    """Whether an error means that some of these values are lost, and they were forgotten."""
    cause = getattr(exc, "cause", exc)  # of what Ray carries
    who = lost_owner(cause)
    if not who:
        return False
    again, gone = await forget_lost(used, who)
    context.drop_workers(gone)
    return again
