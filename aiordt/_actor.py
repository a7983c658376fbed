"""`AsyncActor` and `@method`: the actor's side."""

from __future__ import annotations

import functools
import inspect
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from typing_extensions import override

from aiordt._errors import InvalidTypeError, UsageError
from aiordt._export import check_transport, export, export_blocking
from aiordt._get import get, get_blocking
from aiordt._items import yielded
from aiordt.collective._members import announce
from aiordt.collective._service import group_here

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from aiordt.collective._member import MemberGroup

_F = TypeVar("_F", bound="Callable[..., Any]")

#: Set on what `method` makes; holds the function and the options.
_MARK: Final = "__aiordt_method__"


class AsyncActor:
    """Mixin for a class decorated with ``@ray.remote`` whose methods return tensors as refs.

    It adds no public name to the class but `group`. It works with the class's own ``__init__``,
    which need not call this one's, with inheritance, ``max_concurrency``, concurrency groups, async
    generators, named and detached actors and ``max_restarts``::

        @ray.remote
        class Trainer(aiordt.AsyncActor):
            @aiordt.method
            async def weights(self) -> dict[str, torch.Tensor]:
                return self.model.state_dict()
    """

    if TYPE_CHECKING:
        # Ray's decorator gives the class these; type checkers do not see that.
        @classmethod
        def remote(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            """Make an actor (Ray's)."""

        @classmethod
        def options(cls, **options: Any) -> Any:  # noqa: ANN401
            """Ray's options for an actor."""

    def group(self, name: str) -> MemberGroup:
        """The group of that name that this actor is a member of; never waits.

        Raises:
            UsageError: There is none; says which there are.
            GroupError: There was one, and it has failed.
            ClosedError: There was one, and it was closed.
        """
        return group_here(name)

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Where a class has async methods, make its decorated ``def`` methods async.

        Ray runs a ``def`` of such a class on the loop's thread, where it could not wait for
        a lease without blocking everything. Ray makes subclasses of its own, so this runs
        several times.
        """
        super().__init_subclass__(**kwargs)
        if "__ray_actor_class__" in vars(cls):  # the one that Ray makes of the user's, and runs
            setattr(cls, "__init__", _announced(cls))  # noqa: B010
        members = {
            name: inspect.getattr_static(cls, name) for name in dir(cls) if name != "__class__"
        }
        functions = [member for member in members.values() if inspect.isfunction(member)]
        if not any(
            inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
            for member in functions
        ):
            return
        for name, member in members.items():
            options = getattr(member, _MARK, None)
            if isinstance(options, _Options) and not (
                inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
            ):
                setattr(cls, name, options.wrap(asynchronous=True, attributes=vars(member)))


def _announced(cls: type) -> Callable[..., None]:
    """A class's ``__init__``, after which other processes find the actor (ADR-1)."""
    original: Any = getattr(cls, "__init__", None)
    if not inspect.isfunction(original):

        def construct(self: Any) -> None:  # noqa: ANN401, ARG001
            announce()

        return construct

    @functools.wraps(original)
    def construct_with(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        original(self, *args, **kwargs)
        announce()

    return construct_with


class _Options:
    """A decorated function and how to treat what goes in and comes out."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        transport: str | None,
        resolve: bool,
        snapshot: bool,
    ) -> None:
        self.function = function
        self.transport = transport
        self.resolve = resolve
        self.snapshot = snapshot

    def wrap(self, *, asynchronous: bool, attributes: dict[str, Any]) -> Callable[..., Any]:
        """The method that Ray calls.

        Args:
            asynchronous: Whether a ``def`` becomes an ``async def``.
            attributes: The function's own, such as those that ``@ray.method`` sets.
        """
        function = self.function
        wrapper: Callable[..., Any]
        if inspect.isasyncgenfunction(function):
            wrapper = self._async_generator()
        elif inspect.isgeneratorfunction(function):
            wrapper = self._sync_generator_on_loop() if asynchronous else self._sync_generator()
        elif inspect.iscoroutinefunction(function):
            wrapper = self._coroutine()
        else:
            wrapper = self._function_on_loop() if asynchronous else self._function()
        functools.update_wrapper(wrapper, function)
        wrapper.__dict__.update(attributes)
        # Ray unwraps through __wrapped__ and would lose @ray.method's options, and ours.
        del wrapper.__dict__["__wrapped__"]
        wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        setattr(wrapper, _MARK, self)
        return wrapper

    def _label(self, actor: object) -> str:
        if not isinstance(actor, AsyncActor):
            raise UsageError(
                f"@aiordt.method on {type(actor).__name__}.{self.function.__name__}: the class "
                "must have aiordt.AsyncActor among its bases"
            )
        return f"{type(actor).__name__}.{self.function.__name__}()"

    async def _arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401
        if self.resolve:
            args, kwargs = await get((args, kwargs))
        return args, kwargs

    def _arguments_blocking(self, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401
        if self.resolve:
            args, kwargs = get_blocking((args, kwargs))
        return args, kwargs

    async def _export(self, result: Any, label: str) -> Any:  # noqa: ANN401
        return await export(result, label, transport=self.transport, snapshot=self.snapshot)

    def _export_blocking(self, result: Any, label: str) -> Any:  # noqa: ANN401
        return export_blocking(result, label, transport=self.transport, snapshot=self.snapshot)

    def _coroutine(self) -> Callable[..., Any]:
        async def call(actor: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            label = self._label(actor)
            args, kwargs = await self._arguments(args, kwargs)
            return await self._export(await self.function(actor, *args, **kwargs), label)

        return call

    def _function_on_loop(self) -> Callable[..., Any]:
        async def call(actor: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            label = self._label(actor)
            args, kwargs = await self._arguments(args, kwargs)
            return await self._export(self.function(actor, *args, **kwargs), label)

        return call

    def _function(self) -> Callable[..., Any]:
        def call(actor: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            label = self._label(actor)
            args, kwargs = self._arguments_blocking(args, kwargs)
            return self._export_blocking(self.function(actor, *args, **kwargs), label)

        return call

    def _async_generator(self) -> Callable[..., Any]:
        async def call(actor: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:  # noqa: ANN401
            label = self._label(actor)
            args, kwargs = await self._arguments(args, kwargs)
            async with aclosing(self.function(actor, *args, **kwargs)) as items:
                async for item in items:
                    yield yielded(await self._export(item, label))

        return call

    def _sync_generator_on_loop(self) -> Callable[..., Any]:
        async def call(actor: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:  # noqa: ANN401
            label = self._label(actor)
            args, kwargs = await self._arguments(args, kwargs)
            with closing(self.function(actor, *args, **kwargs)) as items:
                for item in items:
                    yield yielded(await self._export(item, label))

        return call

    def _sync_generator(self) -> Callable[..., Any]:
        def call(actor: Any, *args: Any, **kwargs: Any) -> Generator[Any]:  # noqa: ANN401
            label = self._label(actor)
            args, kwargs = self._arguments_blocking(args, kwargs)
            with closing(self.function(actor, *args, **kwargs)) as items:
                for item in items:
                    yield yielded(self._export_blocking(item, label))

        return call


@overload
def method(function: _F, /) -> _F: ...
@overload
def method(
    *, transport: str | None = None, resolve: bool = False, snapshot: bool = False
) -> Callable[[_F], _F]: ...
def method(
    function: Any = None,
    /,
    *,
    transport: str | None = None,
    resolve: bool = False,
    snapshot: bool = False,
) -> Any:
    """Decorate a method of an `AsyncActor`: tensors and arrays in its result stay here, as refs.

    For ``async def``, ``def`` and generator methods of either kind. A result without tensors
    passes through untouched. Composes with ``@ray.method`` in either order.

    Args:
        function: The method, when used without parentheses.
        transport: Only this transport may move the tensors; it also turns inlining off.
        resolve: Pull every ref in the arguments, at any depth, before the body runs:
            TensorRefs, and ObjectRefs that are nested (Ray has resolved the others).
        snapshot: Export copies, so that later in-place changes are not seen.

    Raises:
        UsageError: There is no such transport, or this is no function.
    """
    check_transport(transport)

    def decorate(function: Any) -> Any:  # noqa: ANN401
        if not inspect.isfunction(function):
            raise InvalidTypeError(
                f"@aiordt.method decorates methods, not {type(function).__name__}"
            )
        options = _Options(function, transport=transport, resolve=resolve, snapshot=snapshot)
        return options.wrap(asynchronous=False, attributes={})

    return decorate if function is None else decorate(function)
