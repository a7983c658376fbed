"""One piece of work that several tasks wait for.

Invariants:
    SHR-1  It is done once, however many wait; when the last of them is cancelled, so is it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aiordt._errors import ClosedError, UsageError
from aiordt._progress import finish

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """See above. What it came to, result or error, is kept until `forget`.

    Args:
        start: Makes the coroutine that does the work.
    """

    def __init__(self, start: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._start = start
        self._task: asyncio.Task[_T] | None = None
        self._waiting = 0

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        task = self._task
        return task is not None and task.done() and not task.cancelled() and not task.exception()

    def now(self) -> _T | None:
        """The result, if there is one."""
        return self._task.result() if self._task is not None and self.done else None

    def forget(self) -> None:
        """Let go of what it came to: whoever asks next has it done again."""
        if self._task is not None and self._task.done():
            self._task = None

    async def join(self) -> _T:
        """Wait for the result, and have the work begun if it has not.

        Raises:
            ClosedError: It was cancelled by others than those who wait.
            UsageError: Another event loop is at it.
        """
        task = self._task
        if task is None or task.cancelled():
            task = self._task = asyncio.create_task(self._start())
        if not task.done():
            if task.get_loop() is not asyncio.get_running_loop():
                raise UsageError("this part of a flow is being evaluated by another event loop")
            self._waiting += 1
            try:
                await asyncio.wait({task})
            finally:
                self._waiting -= 1
                if not self._waiting and not task.done():
                    self._task = None
                    task.cancel()
                    await finish(_quiet(task))
            if task.cancelled():
                raise ClosedError("the flow's context was closed meanwhile")
        return task.result()


def _quiet(task: asyncio.Task[Any]) -> asyncio.Task[None]:
    async def ended() -> None:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()

    return asyncio.ensure_future(ended())
