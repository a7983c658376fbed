"""From threads to asyncio and back: worker threads, the io loop, waiting to the end.

Invariants:
    ERR-1  No frame that an error came through refers to that error: such a circle would keep what
           else is in the frames, refs with their leases among them, until the garbage collector
           comes by.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from aiordt._errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

_T = TypeVar("_T")

#: Let whoever wants this core have it. Not `os.sched_yield`, which keeps the GIL: a thread that
#: woke up on the core would wait for that.
yield_core: Callable[[], int] = ctypes.CDLL(None).sched_yield


def _ignore(_: object) -> None:
    return


class Workers:
    """Daemon threads for calls that block.

    Unlike ``ThreadPoolExecutor``'s they never hold up the interpreter's exit, and unlike
    asyncio's default pool they are shared with nobody (BLK-1). Threads are started when
    needed, up to ``limit``, and sleep when idle.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None] = (
            SimpleQueue()
        )
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0
        self._closed = False

    def submit(self, job: Callable[[], _T], then: Callable[[_T], None] = _ignore) -> None:
        """Run ``job``, which must not raise, on a worker; first come, first served.

        Args:
            job: What to do.
            then: Gets what ``job`` returned, once the worker counts as idle: whoever hears of
                the end and submits more does not make another thread start.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._name} was closed")
            self._pending += 1
            start = self._pending > self._threads and self._threads < self._limit
            if start:
                self._threads += 1
            number = self._threads
        self._jobs.put((job, then))
        if start:
            name = f"aiordt-{self._name}-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, then = entry
            outcome = job()
            del entry, job  # it may hold the last reference to memory
            with self._lock:
                self._pending -= 1
            then(outcome)
            del outcome, then

    def run(self, function: Callable[[], _T]) -> asyncio.Future[_T]:
        """Run ``function`` on a worker, for the running loop.

        Returns:
            Its outcome. Cancelling the future does not stop the function: use `finish`.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def job() -> tuple[_T | None, BaseException | None]:
            try:
                return function(), None
            except BaseException as exc:  # noqa: BLE001  (handed to the waiter)
                return None, exc

        self.submit(job, lambda outcome: post(loop, settle, future, *outcome))
        return future

    def close(self) -> None:
        """Let the threads end when they are idle. Idempotent; what is queued still runs."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = self._threads
        for _ in range(threads):
            self._jobs.put(None)


def settle(future: asyncio.Future[Any], result: object, exc: BaseException | None) -> None:
    """Give ``future`` its outcome, unless it has one (was cancelled)."""
    if future.done():
        return
    if exc is not None:
        future.set_exception(exc)
    else:
        future.set_result(result)


def post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """``loop.call_soon_threadsafe`` that shrugs when the loop is closed: nobody waits there."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def track(tasks: set[asyncio.Task[Any]]) -> None:
    """Keep the running task among ``tasks`` until it has ended.

    Not in a variable of its own coroutine: a task has its error, and that the coroutine's frame,
    so all that the error has would live until the garbage collector comes by (ERR-1).
    """
    task = asyncio.current_task()
    if task is not None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def finish(work: asyncio.Future[_T], stop: Callable[[], object] | None = None) -> _T:
    """Wait for ``work`` to its end, cancellation or not, and give its outcome.

    Used where memory must not be given back before a thread or another loop has let go of
    it (OWN-1). A cancellation that arrives meanwhile is raised at the end (CAN-1).

    Args:
        work: What is waited for.
        stop: Called once when a cancellation arrives, to make the end come sooner.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})  # unlike `await work`, does not cancel it
        except asyncio.CancelledError as exc:
            if cancelled is None and stop is not None:
                stop()
            cancelled = exc
            with anyio.CancelScope(shield=True):  # a scope would cancel again and again
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({work})
    try:
        if cancelled is not None:
            if not work.cancelled():
                work.exception()  # seen: no "never retrieved" warning
            raise cancelled
        return work.result()
    finally:
        del cancelled, work  # ERR-1


class IoThread:
    """A daemon thread with an event loop of its own, which serves peers whatever users do."""

    def __init__(self, name: str = "io") -> None:
        # Not the policy's: under Ray that is uvloop, whose add_reader makes a socket
        # non-blocking behind the back of the thread that sends on it.
        self.loop = asyncio.SelectorEventLoop()
        self._lock = threading.Lock()
        self._ending = False  # no more work is taken
        self._thread = threading.Thread(target=self._run, name=f"aiordt-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(run_all([_nothing(), _nothing()]))  # anyio loads 18 ms here
        self.loop.run_forever()

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run ``coroutine`` on the io loop and await it from whatever loop is running.

        A cancellation is passed on, and raised here only when the coroutine has ended there.
        """
        here = asyncio.get_running_loop()
        if here is self.loop:
            return await coroutine
        outcome: asyncio.Future[_T] = here.create_future()
        task: asyncio.Task[_T] | None = None
        asked = False

        def done(task: asyncio.Task[_T]) -> None:
            if task.cancelled():
                error: BaseException | None = (
                    None if asked else ClosedError("aiordt's runtime was closed")
                )
            else:
                error = task.exception()
            if error is not None:
                post(here, settle, outcome, None, error)
            elif task.cancelled():
                post(here, outcome.cancel)
            else:
                post(here, settle, outcome, task.result(), None)

        def start() -> None:
            nonlocal task
            task = self.loop.create_task(coroutine)
            task.add_done_callback(done)

        def stop() -> None:
            nonlocal asked
            asked = True
            if task is not None:
                task.cancel()

        with self._lock:
            if self._ending:
                coroutine.close()
                raise ClosedError("aiordt's runtime was closed")
            self.loop.call_soon_threadsafe(start)
        return await finish(outcome, lambda: post(self.loop, stop))

    def run_sync(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run ``coroutine`` on the io loop and block this thread, which has no loop, for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Start ``coroutine`` on the io loop; called on that loop. It must not raise."""
        task = self.loop.create_task(coroutine)
        _background.add(task)
        task.add_done_callback(_background.discard)

    def close(self, cleanup: Coroutine[Any, Any, object], timeout: float) -> None:
        """Run ``cleanup``, cancel what is left and end the thread, within ``timeout`` seconds."""

        async def end() -> None:
            try:
                await cleanup
            finally:
                current = asyncio.current_task()
                rest = [task for task in asyncio.all_tasks() if task is not current]
                for task in rest:
                    task.cancel()
                await asyncio.wait(rest, timeout=timeout / 2) if rest else None
                self.loop.call_soon(self.loop.stop)

        with self._lock:
            if self._ending:
                cleanup.close()
                return
            self._ending = True
            self.loop.call_soon_threadsafe(lambda: self.spawn(end()))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self.loop.close()


_background: set[asyncio.Task[object]] = set()


class Inbox:
    """Hands values from any thread to a loop with one wake-up for many.

    ``put`` is O(1) and takes no lock, so that Ray's callback thread may call it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, receive: Callable[[list[Any]], None]
    ) -> None:
        self._loop = loop
        self._receive = receive
        self._values: deque[Any] = deque()
        self._woken = False

    def put(self, value: object) -> None:
        """Add one value."""
        self._values.append(value)
        if not self._woken:
            self._woken = True
            post(self._loop, self._drain)

    def _drain(self) -> None:
        self._woken = False  # before reading, so that a later put wakes again
        values = []
        while self._values:
            values.append(self._values.popleft())
        if values:
            self._receive(values)


async def _nothing() -> None:
    return


async def run_all(coroutines: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run ``coroutines`` concurrently; their results in order.

    The first failure is raised as it is, once the others have been cancelled and have ended.
    """
    if len(coroutines) == 1:
        return [await coroutines[0]]
    results: dict[int, _T] = {}
    failures: list[Exception] = []

    async def run(index: int, coroutine: Coroutine[Any, Any, _T]) -> None:
        try:
            results[index] = await coroutine
        except Exception as exc:  # noqa: BLE001  (raised below)
            failures.append(exc)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for index, coroutine in enumerate(coroutines):
            group.start_soon(run, index, coroutine)
    if failures:
        try:
            raise failures[0]
        finally:
            failures.clear()  # ERR-1
    return [results[index] for index in range(len(coroutines))]
