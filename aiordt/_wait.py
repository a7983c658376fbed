"""`wait`, `as_completed`, `wait_tensor_freed`, `explain`, `stats`."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import torch
from ray import ObjectRef

from aiordt import _ray, _ref
from aiordt._arena import arena
from aiordt._errors import ClosedError, InvalidTypeError, InvalidValueError
from aiordt._export import check_transport
from aiordt._get import get, is_ref
from aiordt._leaves import has_memory, memory_range
from aiordt._ref import TensorRef
from aiordt._runtime import current_for, current_or_none
from aiordt._tree import Flat
from aiordt._types import Stats, Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from typing import Self

    from aiordt._runtime import Runtime
    from aiordt._types import Explanation

_log = logging.getLogger(__name__)

_R = TypeVar("_R", bound="TensorRef | ObjectRef[Any]")

#: `wait_tensor_freed` says what it is waiting for each time this many seconds have passed.
WARN_SECONDS: Final = 10.0


async def wait(
    refs: Sequence[_R],
    *,
    num_returns: int = 1,
    timeout: float | None = None,  # noqa: ASYNC109  (ray.wait's signature)
) -> tuple[list[_R], list[_R]]:
    """Wait until refs are ready: exactly as ``ray.wait``, and nothing is pulled.

    A ref is ready when its tensor can be pulled, or its task has failed. A `TensorRef` always
    is: it exists once its tensor does.

    Args:
        refs: TensorRefs and ObjectRefs, each once.
        num_returns: How many to wait for.
        timeout: Seconds after which to return with what is ready; ``None``: no limit.

    Returns:
        At most ``num_returns`` that are ready, and the rest, both in the order of ``refs``.

    Raises:
        UsageError: ``refs`` is no list of distinct refs, or ``num_returns`` does not fit.
    """
    _check_wait(refs, num_returns, timeout)
    tasks = {
        asyncio.ensure_future(_ray.object_ready(ref)): index
        for index, ref in enumerate(refs)
        if isinstance(ref, ObjectRef)
    }
    ready = {index for index, ref in enumerate(refs) if isinstance(ref, TensorRef)}
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    pending = set(tasks)
    try:
        if pending:
            await asyncio.sleep(0)
        while len(ready) < num_returns and pending:
            left = None if deadline is None else max(0.0, deadline - loop.time())
            done, pending = await asyncio.wait(
                pending, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
                ready.add(tasks[task])
            if not done:  # what is ready is told by another thread: ask once more
                now = set(_ray.ready_now([refs[tasks[task]] for task in pending]))
                ready |= {tasks[task] for task in pending if refs[tasks[task]] in now}
                break
    finally:
        for task in pending:
            task.cancel()
    first = sorted(ready)[:num_returns]
    chosen = set(first)
    rest = [ref for index, ref in enumerate(refs) if index not in chosen]
    return [refs[index] for index in first], rest


def _check_wait(refs: Any, num_returns: Any, timeout: float | None) -> None:  # noqa: ANN401
    if is_ref(refs) or not isinstance(refs, list | tuple):
        raise InvalidTypeError(f"wait() takes a list of refs, not {type(refs).__name__}")
    for ref in refs:
        if not is_ref(ref):
            raise InvalidTypeError(f"wait() takes a list of refs; one is {type(ref).__name__}")
    if len(set(refs)) != len(refs):
        raise InvalidValueError("wait() takes each ref once; one is there twice")
    if not isinstance(num_returns, int) or num_returns < 1:
        raise InvalidValueError(f"num_returns must be a positive int, not {num_returns!r}")
    if refs and num_returns > len(refs):
        raise InvalidValueError(f"num_returns is {num_returns}, but there are {len(refs)} refs")
    if timeout is not None and timeout < 0:
        raise InvalidValueError(f"timeout must not be negative, not {timeout!r}")


class as_completed(Generic[_R]):  # noqa: N801  (named after asyncio's)
    """Pull all of ``refs`` and iterate over ``(ref, tensor)`` in order of completion.

    For an ObjectRef the second is its value, with everything in it pulled. A failure is
    raised when its turn comes; iteration may go on after it. When the loop is left early,
    what is still on its way is cancelled once the iterator is closed or collected.

    Args:
        refs: TensorRefs and ObjectRefs.
        transport: Use this transport only.
    """

    def __init__(self, refs: Iterable[_R], *, transport: str | None = None) -> None:
        check_transport(transport)
        self._refs = list(refs)
        for ref in self._refs:
            if not is_ref(ref):
                raise InvalidTypeError(f"as_completed() takes refs; one is {type(ref).__name__}")
        self._transport = transport
        self._tasks: dict[asyncio.Task[Any], _R] | None = None
        self._done: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[tuple[_R, Any]]:
        return self

    async def __anext__(self) -> tuple[_R, Any]:
        if self._tasks is None:
            self._tasks = {}
            for ref in self._refs:
                task = asyncio.create_task(get(ref, transport=self._transport))
                self._tasks[task] = ref
                task.add_done_callback(self._done.put_nowait)
            self._refs = []
        if not self._tasks:
            raise StopAsyncIteration
        task = await self._done.get()
        ref = self._tasks.pop(task)
        return ref, task.result()

    async def aclose(self) -> None:
        """Cancel what is still on its way and wait for its end. Idempotent."""
        tasks = list(self._tasks or ())
        self._tasks = {}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        for task in self._tasks or ():
            if not task.get_loop().is_closed():
                task.cancel()


async def wait_tensor_freed(
    tensor_or_tree: Any,  # noqa: ANN401
    timeout: float | None = None,  # noqa: ASYNC109  (Ray's signature)
) -> None:
    """Wait until nobody in the cluster refers to these tensors any more: they may be written.

    What counts is the storage: views, slices and tensors that overlap are one with it. Of an
    array, what counts is the memory from its first element to its last. A
    tensor that was never exported, or only by value or as a snapshot, is free. Between the
    last check and the return nothing is awaited, so the caller may write at once.

    After 10 s, and then each time they have passed again, a warning is logged that names the
    exports that are still held.

    Args:
        tensor_or_tree: A tensor or array, or any value with such in it.
        timeout: Seconds to wait; ``None``: no limit.

    Raises:
        TimeoutError: The time is over; the message names the exports that are held.
        UsageError: The tree holds an object that cannot be searched for tensors.
        ClosedError: Ray was shut down meanwhile.

    Cost:
        A few µs when free; the notice of the last drop takes a few ms, 2 s if its holder was
        killed, and until Ray gives its node up if that was lost: tens of seconds, or minutes where
        the host vanished without closing its connections.
    """
    runtime = current_or_none()
    if runtime is None:
        return
    leaves = Flat(tensor_or_tree, has_memory, strict=True).leaves
    ranges = [
        memory_range(leaf)
        for leaf in leaves
        if not isinstance(leaf, torch.Tensor) or leaf.layout is torch.strided
    ]
    loop = asyncio.get_running_loop()
    started = loop.time()
    warn_at = started + WARN_SECONDS
    while busy := runtime.registry.busy(ranges):
        waiter = runtime.registry.watch(busy)
        if waiter is None:
            continue
        try:
            while not waiter.future.done():
                now = loop.time()
                left = warn_at - now
                if timeout is not None:
                    left = min(left, started + timeout - now)
                await asyncio.wait({waiter.future}, timeout=max(left, 0.0))
                if waiter.future.done():
                    break
                if timeout is not None and loop.time() >= started + timeout:
                    held = "; ".join(map(str, runtime.registry.outstanding(busy)))
                    raise TimeoutError(f"tensors are still in use after {timeout} s: {held}")
                if loop.time() >= warn_at:
                    warn_at += WARN_SECONDS
                    _warn(runtime, busy, loop.time() - started)
        finally:
            runtime.registry.unwatch(waiter)
    if runtime.closed:
        raise ClosedError("Ray was shut down while a tensor was waited for")


def _warn(runtime: Runtime, busy: set[tuple[int, int]], seconds: float) -> None:
    if not runtime.session.alive:
        raise ClosedError("Ray was shut down while a tensor was waited for")
    rows = runtime.registry.outstanding(busy)
    shown = "; ".join(map(str, rows[:5])) + (f"; and {len(rows) - 5} more" if rows[5:] else "")
    _log.warning(
        "wait_tensor_freed has waited %.0f s. Still held: %s. Refs nested in the arguments of a "
        "call that has not returned are held until it does",
        seconds,
        shown,
    )


async def explain(ref: TensorRef) -> Explanation:
    """Which transport this process would use for ``ref``, and why not each other; prints well.

    Raises:
        ClosedError: The ref belongs to a Ray session that has ended.
        OwnerDiedError: Its owner is gone.
    """
    if not isinstance(ref, TensorRef):
        raise InvalidTypeError(f"explain() takes a TensorRef, not {type(ref).__name__}")
    return await current_for(ref).explain(ref)


def stats() -> Stats:
    """A snapshot of what this process exports, holds and has received."""
    runtime = current_or_none()
    if runtime is None:
        shared = arena.nbytes, arena.used_nbytes
        return Stats(0, 0, len(_ref.live), 0, 0, 0, 0, *shared, 0, 0, 0, 0, Tally({}))
    exports, exported_bytes = runtime.registry.counts()
    registrations, registered_bytes = runtime.transports.registered
    by_transport = runtime.counters.by_transport()
    return Stats(
        exports=exports,
        exported_bytes=exported_bytes,
        held_refs=len(_ref.live),
        pulls=sum(entry.pulls for entry in by_transport.values()),
        bytes_pulled=sum(entry.nbytes for entry in by_transport.values()),
        in_flight=runtime.counters.in_flight,
        pool_bytes=runtime.pool.idle_nbytes,
        arena_bytes=arena.nbytes,
        arena_used_bytes=arena.used_nbytes,
        mapped_bytes=runtime.routes.mapped_nbytes,
        relay_bytes=runtime.relay.nbytes,
        registrations=registrations,
        registered_bytes=registered_bytes,
        by_transport=by_transport,
    )
