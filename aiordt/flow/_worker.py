"""The actor that runs the tasks of flows, one at a time, and keeps what they return.

What tasks have let go stays with the process while there is work, for what the next ones make:
to touch new memory costs twice what it costs to fill it (a tensor of 40 MiB, plus 1: 16 ms in
new memory, 6 ms in old).
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import cloudpickle

from aiordt._actor import AsyncActor, method
from aiordt._errors import OwnerDiedError, PeerLostError
from aiordt._export import export, in_shared_memory
from aiordt._exports import SharedTensorWarning
from aiordt._get import get
from aiordt._progress import Workers, finish
from aiordt._wait import stats

if TYPE_CHECKING:
    from collections.abc import Callable

#: Tasks that a worker has at a time: while one runs, the inputs of the next are brought.
DEPTH: Final = 2
#: Functions that a worker keeps unpickled.
_MAX_FUNCTIONS: Final = 128
#: Without a task for so long, a worker gives unused memory back to the system.
_IDLE_SECONDS: Final = 5.0
# mallopt(3): what is let go at the end of the heap stays there up to so many bytes, and what is
# smaller is no mapping of its own.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_NBYTES: Final = 1 << 30
_libc: Final = ctypes.CDLL(None)


class FlowWorker(AsyncActor):
    """Runs functions beside their data. Not for users."""

    def __init__(self) -> None:
        # That tasks here see the tensors of earlier ones, and others copies, is what flows do.
        warnings.filterwarnings("ignore", category=SharedTensorWarning)
        self._functions: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()
        self._gate = asyncio.Semaphore(DEPTH)
        self._slot = asyncio.Lock()
        self._thread = Workers("flow", 1)
        self._tidying: asyncio.TimerHandle | None = None
        if hasattr(_libc, "mallopt"):  # not everywhere
            _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_NBYTES)
            _libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_NBYTES)

    async def where(self) -> str:
        """The node that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    @method
    async def run(
        self, key: bytes, code: bytes, args: list[Any], *, wide: bool
    ) -> tuple[bool, Any]:
        """Run a function on what ``args`` refer to.

        Args:
            key: Of the function.
            code: The function, pickled.
            args: Its arguments, with refs.
            wide: Whether many use what it returns: those of this host without a copy.

        Returns:
            True and what it returned; False and why an argument could not be had.
        """
        self._tidy_later()
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
                result = await self._called(function, values)
                if wide:
                    result = await finish(self._thread.run(lambda: in_shared_memory(result)))
            label = "a task of a flow"
            return True, await export(result, label, transport=None, snapshot=False, frozen=True)

    def _tidy_later(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
        self._tidying = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._tidy)

    def _tidy(self) -> None:
        """Give unused memory back; again later, while there is something that may be let go."""
        if hasattr(_libc, "malloc_trim"):
            self._thread.submit(lambda: _libc.malloc_trim(0))
            if stats().exports:
                self._tidy_later()

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
