"""The actor that runs the tasks of flows, one at a time, and keeps what they return."""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import cloudpickle

from aiordt._actor import AsyncActor, method
from aiordt._errors import OwnerDiedError, PeerLostError
from aiordt._exports import SharedTensorWarning
from aiordt._get import get
from aiordt._progress import Workers, finish

if TYPE_CHECKING:
    from collections.abc import Callable

#: Tasks that a worker has at a time: while one runs, the inputs of the next are brought.
DEPTH: Final = 2
#: Functions that a worker keeps unpickled.
_MAX_FUNCTIONS: Final = 128


class FlowWorker(AsyncActor):
    """Runs functions beside their data. Not for users."""

    def __init__(self) -> None:
        # That tasks here see the tensors of earlier ones, and others copies, is what flows do.
        warnings.filterwarnings("ignore", category=SharedTensorWarning)
        self._functions: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()
        self._gate = asyncio.Semaphore(DEPTH)
        self._slot = asyncio.Lock()
        self._thread = Workers("flow", 1)

    async def where(self) -> str:
        """The node that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    @method
    async def run(self, key: bytes, code: bytes, args: list[Any]) -> tuple[bool, Any]:
        """Run a function on what ``args`` refer to.

        Args:
            key: Of the function.
            code: The function, pickled.
            args: Its arguments, with refs.

        Returns:
            True and what it returned; False and why an argument could not be had.
        """
        async with self._gate:
            function = self._functions.get(key)
            if function is None:
                function = await self._loaded(key, code)
            self._functions.move_to_end(key)
            try:
                values = await get(args)
            except (OwnerDiedError, PeerLostError) as exc:
                return False, exc
            del args
            async with self._slot:
                return True, await self._called(function, values)

    async def _loaded(self, key: bytes, code: bytes) -> Callable[..., Any]:
        # To import what it needs may take long.
        function: Callable[..., Any] = await self._thread.run(lambda: cloudpickle.loads(code))
        self._functions[key] = function
        while len(self._functions) > _MAX_FUNCTIONS:
            self._functions.popitem(last=False)
        return function

    async def _called(self, function: Callable[..., Any], args: list[Any]) -> Any:  # noqa: ANN401
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        # To its end, even if cancelled: the slot is not free before.
        result = await finish(self._thread.run(functools.partial(_call, function, args)))
        return await result if inspect.isawaitable(result) else result


def _call(function: Callable[..., Any], args: list[Any]) -> Any:  # noqa: ANN401
    try:
        return function(*args)
    except StopIteration as exc:  # which no future may hold
        raise RuntimeError("the function raised StopIteration") from exc


@functools.cache
def remote_class() -> Any:  # noqa: ANN401
    """`FlowWorker` as Ray's."""
    return ray.remote(FlowWorker)


def lost_owner(exc: BaseException) -> str:
    """Who is gone, of an error that says that a tensor is; of any other an empty string."""
    if isinstance(exc, OwnerDiedError):
        return exc.owner
    return exc.peer if isinstance(exc, PeerLostError) else ""
