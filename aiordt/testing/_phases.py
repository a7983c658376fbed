"""Striking at exact points: named phases of a transfer, and cancellation at random ones."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from aiordt._metrics import phase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

_installing: Final = threading.Lock()


class Phases:
    """What was announced while `at_phase` or `record_phases` was active.

    Attributes:
        names: The phases in order, from all threads.
        reached: Set once the action has run.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.reached = threading.Event()

    def count(self, name: str) -> int:
        """How often a phase was announced."""
        return self.names.count(name)

    async def wait_reached(self, *, within: float = 5.0) -> None:
        """Wait, without blocking the loop, until the action has run.

        Raises:
            AssertionError: It did not run in time; says which phases there were.
        """
        deadline = asyncio.get_running_loop().time() + within
        while not self.reached.is_set():
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(
                    f"the phase was not reached within {within} s; there were {set(self.names)}"
                )
            await asyncio.sleep(0.001)


@contextmanager
def _hooked(hook: Callable[[str], None]) -> Generator[None]:
    with _installing:
        if phase.hook is not None:
            raise AssertionError("phases are being watched already; these cannot be nested")
        phase.hook = hook
    try:
        yield
    finally:
        phase.hook = None


@contextmanager
def record_phases() -> Generator[Phases]:
    """Record the phases that are announced meanwhile."""
    phases = Phases()
    with _hooked(phases.names.append):
        yield phases


@contextmanager
def at_phase(name: str, action: Callable[[], object], *, occurrence: int = 1) -> Generator[Phases]:
    """Run ``action`` when the phase ``name`` is reached.

    It runs on the thread that is there, which waits for it: a worker thread may be held
    with ``event.wait``, a task cancelled with `cancel_from_anywhere`, a process killed. What
    the action raises is raised inside aiordt at that point, as a failure would be.

    Args:
        name: Name of the phase, e.g. ``"cma.chunk"``.
        action: What to do.
        occurrence: At which of its announcements, from 1.

    Raises:
        AssertionError: Another watcher is active.
    """
    phases = Phases()
    lock = threading.Lock()

    def hook(announced: str) -> None:
        with lock:
            phases.names.append(announced)
            now = announced == name and phases.count(name) == occurrence
        if now:
            try:
                action()
            finally:
                phases.reached.set()

    with _hooked(hook):
        yield phases


async def strike_at_phase(
    actor: Any,  # noqa: ANN401  (a handle of Ray's)
    name: str,
    number: int = signal.SIGKILL,
    *,
    occurrence: int = 1,
) -> int:
    """Let an actor's process send itself a signal at the moment when it reaches a phase.

    SIGKILL ends it there. SIGSTOP stops all of it, until somebody sends SIGCONT to its process.

    Args:
        actor: The handle of the actor.
        name: Name of the phase, e.g. ``"cma.chunk"``.
        number: The signal.
        occurrence: At which of the phase's announcements from now on, from 1.

    Returns:
        The id of its process; the strike is prepared, for once.

    Raises:
        AssertionError: Another watcher of phases is active there; Ray brings it.
        ray.exceptions.RayError: The actor cannot be called.
    """
    pid: int = await actor.__ray_call__.remote(_prepare_strike, name, int(number), occurrence)
    return pid


def _prepare_strike(_actor: object, name: str, number: int, occurrence: int) -> int:
    prepared = ExitStack()  # the hook keeps it

    def strike() -> None:
        prepared.close()
        os.kill(os.getpid(), number)

    prepared.enter_context(at_phase(name, strike, occurrence=occurrence))
    return os.getpid()


def cancel_from_anywhere(task: asyncio.Task[object]) -> None:
    """Cancel ``task`` from any thread: at once on its own loop's, else by a message to it."""
    loop = task.get_loop()
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is loop:
        task.cancel()
    else:
        loop.call_soon_threadsafe(task.cancel)


async def cancel_randomly(
    make_awaitable: Callable[[], Awaitable[object]],
    *,
    times: int,
    seed: int,
    longest: float = 0.005,
    within: float = 10.0,
) -> int:
    """Run a coroutine again and again, cancelling it at random moments.

    Half of the moments are a number of loop ticks (0 to 8) after the start, half a random
    delay.

    Args:
        make_awaitable: Makes what is run, new each time.
        times: How often.
        seed: Of the random numbers; the same seed gives the same moments.
        longest: The longest delay, in seconds; about as long as one run takes.
        within: Seconds in which each run must have ended after its cancellation.

    Returns:
        How many runs were cancelled; the others had ended before.

    Raises:
        AssertionError: CAN-1: a cancelled run ended with something else, or not at all.
        Exception: What a run raised that had not been cancelled.
    """
    choose = random.Random(seed)  # noqa: S311  (repeatable, not secret)
    cancelled = 0
    for number in range(times):

        async def run() -> object:
            return await make_awaitable()

        task = asyncio.get_running_loop().create_task(run())
        if choose.random() < 0.5:
            for _ in range(choose.randrange(9)):
                await asyncio.sleep(0)
        else:
            await asyncio.wait({task}, timeout=choose.uniform(0, longest))
        if not task.cancel():
            task.result()
            continue
        done, _ = await asyncio.wait({task}, timeout=within)
        if not done:
            raise AssertionError(f"CAN-1: run {number} had not ended {within} s after its cancel()")
        if not task.cancelled():
            error = task.exception()
            raise AssertionError(
                f"CAN-1: run {number} was cancelled, but ended with {error!r}"
            ) from error
        cancelled += 1
    return cancelled
