"""What this process exports: tensors by export key, storages by address range.

The counting is `_refcount`'s; this shell adds tensors, locking and waiters. Any thread may
call it: actor methods on the loops of their concurrency groups, the io thread, drivers.

Invariants:
    REG-1  A storage is identified by where it lies (address and size), never by a Python
           object's id; it is kept alive for as long as it is exported.
    REG-2  Between `busy` finding nothing and the caller's next await nothing on the same loop
           can export, so the caller may write.
    REG-3  What is being exported counts from the moment the export began.
    REG-4  A lease that Ray has given up is dropped when no process claims it any more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from aiordt import _device
from aiordt._errors import ClosedError, InvalidValueError, TensorFreedError
from aiordt._exports import Export, Outstanding, cut_out, overlapping, prepare, sent_dtype
from aiordt._memory import storage_range, view_memory
from aiordt._progress import post, settle
from aiordt._refcount import Freed, Held, Released, State, step
from aiordt.abc import Served, Source

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterable, Sequence

    import torch

    from aiordt._device import Event
    from aiordt._exports import StorageKey
    from aiordt._progress import Workers
    from aiordt._wire import Item


@dataclass(slots=True, eq=False)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    storages: set[StorageKey]


@dataclass(slots=True, eq=False)
class _Queued:
    """An export that waits for room."""

    export: Export
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


class Registry(Source):
    """All exports of one runtime.

    Args:
        workers: Threads on which tensors are packed.
        limit: Bytes of storages that may be exported at a time; 0: no limit.
    """

    def __init__(self, workers: Workers, limit: int = 0) -> None:
        self._workers = workers
        self._limit = limit  # bytes of storages; 0: none
        self._nbytes = 0
        self._queue: deque[_Queued] = deque()
        self._lock = threading.RLock()  # a tensor's death inside it may run anything
        self._state: State[StorageKey] = State()
        self._exports: dict[bytes, Export] = {}
        self._leases: dict[object, tuple[Export, list[int]]] = {}
        self._waiters: dict[StorageKey, set[_Waiter]] = {}
        self._ends: dict[bytes, list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]] = {}
        self._claims: dict[object, set[bytes]] = {}  # lease -> processes that say they have it
        self._given_up: set[object] = set()  # leases that Ray has dropped, and that are claimed

    def begin(
        self, tensors: Sequence[torch.Tensor], label: str, ready: Event | None = None
    ) -> Export:
        """Start an export; it holds its tensors' storages until `commit` or `abandon`.

        Args:
            tensors: What is exported.
            label: Where, for people.
            ready: The work that makes them; ``None``: what the caller's streams have queued.

        Returns:
            The export, whose ``groups`` say how many leases it needs and for what.
        """
        export = prepare(tensors, label, ready)
        self._hold(export)
        return export

    @property
    def limited(self) -> bool:
        """Whether there is a limit to exported bytes, so that `begin_when_room` is to be used."""
        return self._limit > 0

    async def begin_when_room(
        self, tensors: Sequence[torch.Tensor], label: str, ready: Event | None = None
    ) -> Export:
        """As `begin`, once the limit leaves room for it: first come, first served.

        Raises:
            InvalidValueError: It is over the limit by itself.
            ClosedError: The registry was closed meanwhile.
        """
        export = prepare(tensors, label, ready)
        self._check_limit(export)
        with self._lock:
            if not self._queue and self._fits(export):
                self._hold(export)
                return export
            loop = asyncio.get_running_loop()
            queued = _Queued(export, loop, loop.create_future())
            self._queue.append(queued)
        try:
            await queued.future
        except asyncio.CancelledError:
            with self._lock:
                if queued in self._queue:
                    self._queue.remove(queued)
            self.abandon(export)  # it may have been let in at the same moment
            with self._lock:
                self._admit()
            raise
        return export

    def _check_limit(self, export: Export) -> None:
        nbytes = sum(size for _, size in set(export.storages))
        if nbytes > self._limit:
            raise InvalidValueError(
                f"{export.label} exports {nbytes} bytes; max_exported_bytes is {self._limit}: "
                "export less at a time, or allow more"
            )

    def _fits(self, export: Export) -> bool:
        counts = self._state.counts
        more = sum(key[1] for key in set(export.storages) if key not in counts)
        return self._nbytes + more <= self._limit

    def _hold(self, export: Export) -> None:
        storages = frozenset(export.storages)
        with self._lock:
            self._exports[export.key] = export
            self._held(export.key, storages)  # REG-3

    def _held(self, holder: object, storages: frozenset[StorageKey]) -> None:
        counts = self._state.counts
        self._nbytes += sum(key[1] for key in storages if key not in counts)
        step(self._state, Held(holder, storages))

    def _admit(self) -> None:
        """Let in what has room now."""
        while self._queue and self._fits(self._queue[0].export):
            queued = self._queue.popleft()
            if not queued.loop.is_closed():  # else its waiter is gone with it
                self._hold(queued.export)
                post(queued.loop, settle, queued.future, None, None)

    def commit(self, export: Export, leases: Sequence[object]) -> None:
        """Let ``leases``, one for each group, hold the export from now on.

        Raises:
            ClosedError: The registry was closed since `begin`.
        """
        with self._lock:
            if export.key not in self._exports:
                raise ClosedError(f"Ray was shut down while {export.label} was being exported")
            for lease, group in zip(leases, export.groups, strict=True):
                storages = frozenset(export.storages[index] for index in group)
                self._held(lease, storages)
                self._leases[lease] = (export, group)
            self._apply(step(self._state, Released(export.key)))

    @contextmanager
    def holding(self, tensors: Sequence[torch.Tensor]) -> Generator[None]:
        """Count these storages as in use, as when they are being read here."""
        holder = object()
        with self._lock:
            self._held(holder, frozenset(map(storage_range, tensors)))
        try:
            yield
        finally:
            with self._lock:
                if holder in self._state.holders:  # the registry was not closed meanwhile
                    self._apply(step(self._state, Released(holder)))

    def abandon(self, export: Export) -> None:
        """Undo `begin`."""
        with self._lock:
            if self._exports.pop(export.key, None) is not None:
                self._apply(step(self._state, Released(export.key)))

    def claim(self, leases: Iterable[object], peer_id: bytes) -> None:
        """A process says that it has these leases. Unknown ones are ignored."""
        with self._lock:
            for lease in leases:
                if lease in self._leases:
                    self._claims.setdefault(lease, set()).add(peer_id)

    def unclaim(self, leases: Iterable[object] | None, peer_id: bytes) -> None:
        """It has them no more; ``None``: it has none any more."""
        free = []
        with self._lock:
            for lease in list(self._claims) if leases is None else leases:
                claims = self._claims.get(lease)
                if claims is None:
                    continue
                claims.discard(peer_id)
                if not claims:
                    del self._claims[lease]
                    if lease in self._given_up:
                        self._given_up.discard(lease)
                        free.append(lease)
        self.drop(free)

    def claimed_by(self, peer_id: bytes) -> bool:
        """Whether a process has said that it has a lease."""
        with self._lock:
            return any(peer_id in claims for claims in self._claims.values())

    def drop(self, leases: Iterable[object]) -> None:
        """These leases are gone, over the whole cluster, says Ray. Unknown ones are ignored."""
        dead: list[object] = []  # freed outside the lock
        with self._lock:
            for lease in leases:
                if lease in self._claims:  # REG-4
                    self._given_up.add(lease)
                    continue
                export, group = self._leases.pop(lease, (None, []))
                if export is None:
                    continue
                for index in group:
                    dead += (export.tensors[index], export.others.pop(index, None))
                    export.tensors[index] = None
                if all(tensor is None for tensor in export.tensors):
                    self._exports.pop(export.key, None)
                    self._ended(export.key)
                self._apply(step(self._state, Released(lease)))

    def _apply(self, effects: list[Freed[StorageKey]]) -> None:
        for effect in effects:
            storage = effect.storage
            self._nbytes -= storage[1]
            for waiter in self._waiters.pop(storage, ()):
                waiter.storages.discard(storage)
                if not waiter.storages:
                    post(waiter.loop, settle, waiter.future, None, None)
        if self._queue:
            self._admit()

    # --- waiting ---------------------------------------------------------------------------

    def busy(self, ranges: Iterable[StorageKey]) -> set[StorageKey]:
        """Exported storages that overlap any of ``ranges``: some, if there are any.

        Cost:
            A look-up for each range; only where none is found, a sweep over all exports for
            those that overlap in part.
        """
        wanted = {(address, nbytes) for address, nbytes in ranges if nbytes}
        with self._lock:
            if not self._state.counts or not wanted:
                return set()
            exact = {key for key in wanted if key in self._state.counts}
            if exact:
                return exact
            exported = list(self._state.counts)
        return overlapping(wanted, exported)

    def watch(self, storages: set[StorageKey]) -> _Waiter | None:
        """A waiter whose future is done when all of ``storages`` have become free.

        Returns:
            ``None`` if they are free now. End it with `unwatch`.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            held = {storage for storage in storages if storage in self._state.counts}
            if not held:
                return None
            waiter = _Waiter(loop, loop.create_future(), held)
            for storage in held:
                self._waiters.setdefault(storage, set()).add(waiter)
            return waiter

    def unwatch(self, waiter: _Waiter) -> None:
        """Forget a waiter."""
        with self._lock:
            for storage in waiter.storages:
                waiters = self._waiters.get(storage)
                if waiters is not None:
                    waiters.discard(waiter)
                    if not waiters:
                        del self._waiters[storage]

    def outstanding(self, storages: set[StorageKey]) -> list[Outstanding]:
        """The exports that keep any of ``storages`` in use, oldest first."""
        now = time.monotonic()
        with self._lock:
            found = []
            for export in self._exports.values():
                held = [
                    tensor
                    for tensor, storage in zip(export.tensors, export.storages, strict=True)
                    if tensor is not None and storage in storages
                ]
                if held:
                    age = now - export.created
                    found.append(Outstanding(export.label, age, len(held), len(export.seen_by)))
        return sorted(found, key=lambda row: -row.age)

    async def wait_ready(self, keys: Iterable[bytes]) -> None:
        """Wait until the work that makes these exports has finished on its devices (DEV-1).

        Raises:
            TensorFreedError: One of them is not exported any more.
        """
        for key in keys:
            with self._lock:
                export = self._exports.get(key)
            if export is None:
                raise TensorFreedError("the owner gave this tensor up while its device made it")
            await export.ready.wait()

    # --- looking up ------------------------------------------------------------------------

    def local(self, key: bytes, index: int) -> tuple[Export, torch.Tensor]:
        """The exported tensor itself.

        Raises:
            TensorFreedError: It is not exported any more, or its storage was resized.
        """
        with self._lock:
            export = self._exports.get(key)
            tensor = export.tensors[index] if export and index < len(export.tensors) else None
            if export is None or tensor is None:
                raise TensorFreedError(
                    "the owner gave this tensor up: no ref to it was left in the cluster"
                )
            if storage_range(tensor) != export.storages[index]:
                raise TensorFreedError(
                    f"the storage of a tensor that {export.label} exported was resized or replaced "
                    "by its owner: do that only after wait_tensor_freed, or export a snapshot"
                )
            return export, tensor

    def seen(self, key: bytes, peer_id: bytes) -> Export | None:
        """A peer says it pulled an export."""
        with self._lock:
            export = self._exports.get(key)
            if export is not None:
                export.seen_by.add(peer_id)
            return export

    async def wait_gone(self, key: bytes) -> None:
        """Wait until an export is gone as a whole."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if key not in self._exports:
                return
            end = (loop, loop.create_future())
            self._ends.setdefault(key, []).append(end)
        try:
            await end[1]
        finally:
            with self._lock:
                if end in self._ends.get(key, ()):
                    self._ends[key].remove(end)

    def _ended(self, key: bytes) -> None:
        for loop, future in self._ends.pop(key, ()):
            post(loop, settle, future, None, None)

    def counts(self) -> tuple[int, int]:
        """Tensors exported, and the bytes of the storages behind them."""
        with self._lock:
            num_tensors = sum(
                tensor is not None for export in self._exports.values() for tensor in export.tensors
            )
            return num_tensors, self._nbytes

    @override
    def exported(self, key: bytes, index: int) -> torch.Tensor:
        return self.local(key, index)[1]

    @override
    @asynccontextmanager
    async def open(self, items: Sequence[Item], nbytes: int) -> AsyncGenerator[Served]:
        if not items:
            raise InvalidValueError("a pull names no tensors")
        with ExitStack() as stack:
            with self._lock:
                found = [self.local(key, index) for key, index, _ in items]
                tensors = [tensor for _, tensor in found]
                stack.enter_context(self.holding(tensors))
            for export, _ in found:
                if not export.ready.done():
                    await export.ready.wait()  # DEV-1
            views = [
                cut_out(tensor, cut) for tensor, (_, _, cut) in zip(tensors, items, strict=True)
            ]
            dtypes = [sent_dtype(view, cut) for view, (_, _, cut) in zip(views, items, strict=True)]
            total = sum(
                view.numel() * dtype.itemsize for view, dtype in zip(views, dtypes, strict=True)
            )
            if total != nbytes:
                raise InvalidValueError(
                    f"the owner has {total} bytes there, not {nbytes}: was the tensor resized in "
                    "place after it was exported?"
                )
            views = await _device.stage(views, dtypes, self._workers)
            pieces = [view_memory(view.data_ptr(), view.nbytes) for view in views]
            yield Served(pieces)

    def close(self) -> None:
        """Give everything up; waiters are woken and see that the runtime has ended."""
        with self._lock:
            waiters = {waiter for group in self._waiters.values() for waiter in group}
            self._waiters.clear()
            for key in list(self._ends):
                self._ended(key)
            self._exports.clear()
            self._leases.clear()
            self._claims.clear()
            self._given_up.clear()
            self._state = State()
            self._nbytes = 0
            queued, self._queue = self._queue, deque()
        for each in queued:
            error = ClosedError(f"Ray was shut down while {each.export.label} waited for room")
            post(each.loop, settle, each.future, None, error)
        for waiter in waiters:
            post(waiter.loop, settle, waiter.future, None, None)
