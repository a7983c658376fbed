"""Waiting for a condition with a deadline, on a loop or on a thread."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_PERIOD_SECONDS: Final = 0.005


async def eventually(
    check: Callable[[], object | Awaitable[object]], *, what: str, within: float = 5.0
) -> Any:  # noqa: ANN401
    """Wait until ``check()`` is true; other tasks of the loop run meanwhile.

    Args:
        check: The condition, or a coroutine function that gives it.
        what: The condition in words, for the message.
        within: Seconds after which it is too late.

    Returns:
        What ``check`` gave.

    Raises:
        AssertionError: It did not come true in time.
    """
    deadline = time.monotonic() + within
    while True:
        value: Any = check()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}")
        await asyncio.sleep(_PERIOD_SECONDS)


def wait_until(check: Callable[[], object], *, what: str, within: float = 5.0) -> None:
    """As `eventually`, for threads without an event loop; blocks.

    Raises:
        AssertionError: It did not come true in time.
    """
    deadline = time.monotonic() + within
    while not check():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}")
        time.sleep(_PERIOD_SECONDS)
