"""What this process exports: tensors by export key, storages by address range.

The counting is `_refcount`'s; this shell adds tensors, locking and waiters. Any thread may
call it: actor methods on the loops of their concurrency groups, the io thread, drivers.

Invariants:
    REG-1  A storage is identified by where it lies (address and size), never by a Python
           object's id; it is kept alive for as long as it is exported.
    REG-2  Between `busy` finding nothing and the caller's next await nothing on the same loop
           can export, so the caller may write.
    REG-3  What is being exported counts from the moment the export began.
"""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections import deque
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from typing_extensions import override

from aiordt import _device
from aiordt._errors import ClosedError, InvalidValueError, TensorFreedError
from aiordt._memory import storage_range, view_memory
from aiordt._progress import post, settle
from aiordt._refcount import Freed, Held, Released, State, step
from aiordt._types import DTYPE_CODES, DTYPES, MIB
from aiordt._wire import new_key
from aiordt.abc import Served, Source

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterable, Sequence

    from aiordt._layout import Cut
    from aiordt._progress import Workers
    from aiordt._wire import Item
    from aiordt.abc import Event

#: Storages from this size on have a lease each; the smaller ones of a result share one.
LEASE_NBYTES: Final = 1 * MIB

StorageKey: TypeAlias = tuple[int, int]


class SharedTensorWarning(UserWarning):
    """A tensor is used by its owner and, at the same time, by others; in-place writes show."""


@dataclass(slots=True)
class Export:
    """The tensors of one result that this process holds for others.

    Attributes:
        key: 16 random bytes; whoever knows them may pull.
        tensors: By index; ``None`` once their lease is gone.
        storages: Where each one's storage lay when it was exported.
        groups: Indices that share a lease.
        label: Where it was made, for people.
        created: `time.monotonic` when it was made.
        ready: What must have happened on the device before the bytes may be read.
        others: What this process awaits instead of a tensor: the array that it was made of.
        seen_by: Runtime ids of processes that said they pulled it.
        local: Whether it was awaited in this process.
        warned: Whether the warning about that was given.
    """

    key: bytes
    tensors: list[torch.Tensor | None]
    storages: list[StorageKey]
    groups: list[list[int]]
    label: str
    created: float
    ready: Event
    others: dict[int, object] = field(default_factory=dict)
    seen_by: set[bytes] = field(default_factory=set)
    local: bool = False
    warned: bool = False


@dataclass(frozen=True, slots=True)
class Outstanding:
    """An export that keeps storages in use, for people.

    Attributes:
        label: Where it was made.
        age: Seconds since then.
        num_tensors: How many of its tensors are still held.
        seen_by: How many other processes are known to have pulled it.
    """

    label: str
    age: float
    num_tensors: int
    seen_by: int

    @override
    def __str__(self) -> str:
        pulled = f", pulled by {self.seen_by} processes" if self.seen_by else ""
        plural = "" if self.num_tensors == 1 else "s"
        return f"{self.label}: {self.num_tensors} tensor{plural}, {self.age:.1f} s old{pulled}"


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
        export = self._prepare(tensors, label, ready)
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
        export = self._prepare(tensors, label, ready)
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

    @staticmethod
    def _prepare(tensors: Sequence[torch.Tensor], label: str, ready: Event | None) -> Export:
        small: list[int] = []
        large: dict[StorageKey, list[int]] = {}
        storages = list(map(storage_range, tensors))
        for index, where in enumerate(storages):
            if where[1] < LEASE_NBYTES:
                small.append(index)
            else:
                large.setdefault(where, []).append(index)
        groups = [*large.values(), *([small] if small else [])]
        return Export(
            key=new_key(),
            tensors=list(tensors),
            storages=storages,
            groups=groups,
            label=label,
            created=time.monotonic(),
            ready=ready or _device.record(tensors),
        )

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

    def drop(self, leases: Iterable[object]) -> None:
        """These leases are gone, over the whole cluster. Unknown ones are ignored."""
        dead: list[object] = []  # freed outside the lock
        with self._lock:
            for lease in leases:
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
            events: list[tuple[int, int, int, StorageKey]] = []
            for kind, keys in ((0, wanted), (1, self._state.counts)):
                for key in keys:
                    if not key[1]:
                        continue
                    events.append((key[0], 1, kind, key))
                    events.append((key[0] + key[1], 0, kind, key))
        events.sort()
        open_now: tuple[set[StorageKey], set[StorageKey]] = (set(), set())
        found: set[StorageKey] = set()
        for _, starts, kind, key in events:
            if not starts:
                open_now[kind].discard(key)
                continue
            open_now[kind].add(key)
            if kind == 1 and open_now[0]:
                found.add(key)
            elif kind == 0:
                found |= open_now[1]
        return found

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
                _cut_out(tensor, cut) for tensor, (_, _, cut) in zip(tensors, items, strict=True)
            ]
            dtypes = [
                _sent_dtype(view, cut) for view, (_, _, cut) in zip(views, items, strict=True)
            ]
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
            yield Served(pieces, _device.DONE)

    def close(self) -> None:
        """Give everything up; waiters are woken and see that the runtime has ended."""
        with self._lock:
            waiters = {waiter for group in self._waiters.values() for waiter in group}
            self._waiters.clear()
            for key in list(self._ends):
                self._ended(key)
            self._exports.clear()
            self._leases.clear()
            self._state = State()
            self._nbytes = 0
            queued, self._queue = self._queue, deque()
        for each in queued:
            error = ClosedError(f"Ray was shut down while {each.export.label} waited for room")
            post(each.loop, settle, each.future, None, error)
        for waiter in waiters:
            post(waiter.loop, settle, waiter.future, None, None)


def _cut_out(tensor: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    """The part of an exported tensor that a peer asks for.

    Raises:
        InvalidValueError: It is not within the tensor's storage.
    """
    if cut is None:
        if not tensor.is_contiguous():
            raise InvalidValueError("a pull of a strided tensor does not say how it lies")
        return tensor
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr() + cut.offset
    dtype = tensor.dtype if cut.itemsize == tensor.itemsize else torch.uint8
    if cut.itemsize != dtype.itemsize or start % cut.itemsize:
        raise InvalidValueError(f"elements of {cut.itemsize} bytes of a tensor of {tensor.dtype}")
    if start + cut.span > storage.nbytes():
        raise InvalidValueError("a pull goes beyond the tensor: was it resized in place?")
    view = torch.empty(0, dtype=dtype, device=tensor.device)
    return view.set_(storage, start // cut.itemsize, cut.shape, cut.stride)


def _sent_dtype(view: torch.Tensor, cut: Cut | None) -> torch.dtype:
    """The dtype in which the part travels.

    Raises:
        InvalidValueError: This PyTorch does not have it.
    """
    if cut is None or cut.dtype is None:
        return view.dtype
    dtype = DTYPES[cut.dtype] if cut.dtype < len(DTYPES) else None
    if dtype is None:
        raise InvalidValueError(f"this PyTorch ({torch.__version__}) lacks a dtype that was asked")
    return dtype


def warn_if_shared(export: Export) -> None:
    """Warn, once, when a tensor is used both here, as itself, and elsewhere, as copies."""
    if export.local and export.seen_by and not export.warned:
        export.warned = True
        warnings.warn(
            f"a tensor exported by {export.label} was awaited both by its owner, which got the "
            "tensor itself, and by other processes, which got copies: in-place changes by the "
            "owner may or may not be seen there. Clone it, or export it with snapshot=True",
            SharedTensorWarning,
            stacklevel=2,
        )


def check_exportable(tensor: torch.Tensor) -> None:
    """Refuse, before anything is exported, what cannot arrive as it is.

    Raises:
        InvalidValueError: Says what the tensor is and what to do.
    """
    if tensor.is_nested:
        raise InvalidValueError("a nested tensor cannot be exported: export its .unbind()")
    if tensor.layout is not torch.strided:
        raise InvalidValueError(
            f"a tensor with layout {tensor.layout} cannot be exported: export its parts "
            "(.indices(), .values()), or .to_dense()"
        )
    if tensor.is_quantized:
        raise InvalidValueError(
            "a quantized tensor cannot be exported: export .int_repr() and its scale"
        )
    if tensor.dtype not in DTYPE_CODES:
        raise InvalidValueError(
            f"a tensor of {tensor.dtype} cannot be exported: export its .view(torch.uint8)"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise InvalidValueError(
            f"{type(tensor).__qualname__} wraps other tensors (it defines __torch_dispatch__); "
            "export what it wraps, for a DTensor .to_local()"
        )
    if not tensor.is_cpu:
        _device.layer(tensor.device)
