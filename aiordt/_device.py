"""Streams, events and staging behind one small interface; for host memory, nearly no-ops.

Exports record an event on the stream that made the tensor, whoever reads the memory waits for
it first, and the stream of whoever awaits a tensor waits for its arrival.

Invariants:
    DEV-1  The bytes of an export are read, staged or served only after the work that was queued
           on its devices when it was exported has finished.
    DEV-2  Waiting for a device blocks no event loop, and never waits for a whole device.
    DEV-3  A tensor is handed out only after the caller's current stream was told to wait for it.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

import torch
from typing_extensions import override

from aiordt._errors import InvalidValueError, TransferError
from aiordt._progress import Workers, finish, post, settle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Threads that wait for devices; one for each export that somebody waits for.
_MAX_WAITING: Final = 64


class Event(Protocol):
    """Work that was queued on a device, to be waited for."""

    def done(self) -> bool:
        """Whether the work has finished. Never blocks."""
        ...

    async def wait(self) -> None:
        """Wait for the work without blocking the loop."""
        ...


class DeviceWarning(UserWarning):
    """A tensor arrived in other memory than its owner has it in."""


class DeviceLayer(ABC):
    """Streams, events and staging for one type of device."""

    @abstractmethod
    def record(self, device: torch.device) -> Event:
        """An event for all work queued so far on the caller's current stream."""

    @abstractmethod
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        """Make the caller's current stream wait for ``event``, without blocking the host."""

    @abstractmethod
    def identity(self, device: torch.device) -> str:
        """What names the device in every process of its host, however devices are numbered."""

    @abstractmethod
    async def stage(
        self,
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        workers: Workers,
    ) -> list[torch.Tensor]:
        """Copy finished tensors to contiguous host memory, to be sent from there.

        Cancelled, it ends when the tensors are no longer read (OWN-1).

        Args:
            tensors: All on one device.
            dtypes: What to convert each one to.
            workers: Threads for what blocks.
        """

    @abstractmethod
    async def unstage(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy a tensor in host memory to ``device``; the caller's stream waits (DEV-3).

        Cancelled, it ends when ``host`` is no longer read (OWN-1).
        """


class Completion:
    """An event that any thread completes, and that tasks on any loop wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._completed = False
        self._error: Exception | None = None
        self._waiters: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}

    def done(self) -> bool:
        """Whether it is complete."""
        return self._completed

    def complete(self, error: Exception | None = None) -> None:
        """Complete it, and wake who waits. Idempotent."""
        with self._lock:
            if self._completed:
                return
            self._error = error
            self._completed = True
            waiters, self._waiters = self._waiters, {}
        for future, loop in waiters.items():
            post(loop, settle, future, None, error)

    async def wait(self) -> None:
        """Wait for it.

        Raises:
            Exception: What it was completed with.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if self._completed:
                settle(future, None, self._error)
            else:
                self._waiters[future] = loop
        try:
            await future
        finally:
            with self._lock:
                self._waiters.pop(future, None)


class _Done:
    """The event of a device that queues nothing."""

    def done(self) -> bool:
        return True

    async def wait(self) -> None:
        return


class _All:
    """Several events as one."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events

    def done(self) -> bool:
        return all(event.done() for event in self.events)

    async def wait(self) -> None:
        for event in self.events:
            await event.wait()


DONE: Final = _Done()


class HostLayer(DeviceLayer):
    """Host memory: everything has happened when the call that did it returned."""

    @override
    def record(self, device: torch.device) -> Event:
        return DONE

    @override
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        return

    @override
    def identity(self, device: torch.device) -> str:
        return "cpu"

    @override
    async def stage(
        self,
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        workers: Workers,
    ) -> list[torch.Tensor]:
        def pack() -> list[torch.Tensor]:
            return [
                tensor.detach().to(dtype).contiguous()
                for tensor, dtype in zip(tensors, dtypes, strict=True)
            ]

        return await finish(workers.run(pack))

    @override
    async def unstage(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.wait_on_stream(device, DONE)
        return host


class _CudaEvent(Completion):  # pragma: no cover  (needs a GPU)
    """Work on a CUDA stream. The first to wait for it starts the one thread that does."""

    def __init__(self, device: torch.device, workers: Workers) -> None:
        super().__init__()
        # blocking: `synchronize` sleeps in the driver instead of spinning (and without the GIL).
        self.raw = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.raw.record(torch.cuda.current_stream(device))
        self._device = device
        self._workers = workers
        self._started = False

    @override
    def done(self) -> bool:
        return super().done() or bool(self.raw.query())  # type: ignore[no-untyped-call]

    @override
    async def wait(self) -> None:
        if self.done():
            return
        with self._lock:
            start, self._started = not self._started, True
        if start:
            self._workers.submit(self._synchronize)
        await super().wait()

    def _synchronize(self) -> None:
        try:
            self.raw.synchronize()
        except RuntimeError as exc:
            text = f"the work that makes a tensor on {self._device} failed: {exc}"
            self.complete(TransferError(text, transport=str(self._device), peer="", nbytes=0))
        else:
            self.complete()


class _CudaLayer(DeviceLayer):  # pragma: no cover  (needs a GPU)
    """CUDA, through PyTorch's streams and caching allocators.

    Copies run on a stream of their own for each device. `record_stream` tells the allocator, so
    that memory which one stream frees is not lent again while the other still uses it.
    """

    def __init__(self) -> None:
        self._workers = Workers("cuda", _MAX_WAITING)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            made = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams.setdefault(device, made)
        return stream

    @override
    def record(self, device: torch.device) -> Event:
        return _CudaEvent(device, self._workers)

    @override
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        if isinstance(event, _CudaEvent):
            torch.cuda.current_stream(device).wait_event(event.raw)

    @override
    def identity(self, device: torch.device) -> str:
        return f"cuda {torch.cuda.get_device_properties(device).uuid}"

    @override
    async def stage(
        self,
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        workers: Workers,
    ) -> list[torch.Tensor]:
        device = tensors[0].device
        stream = self._side(device)

        def copy() -> list[torch.Tensor]:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                copies = [
                    torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
                    for tensor, dtype in zip(tensors, dtypes, strict=True)
                ]
                for pinned, tensor in zip(copies, tensors, strict=True):
                    pinned.copy_(tensor.detach(), non_blocking=True)
                    tensor.record_stream(stream)
                event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                event.record(stream)
            event.synchronize()  # on a worker: DEV-2
            return copies

        return await finish(self._workers.run(copy))

    @override
    async def unstage(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        def copy() -> tuple[torch.Tensor, _CudaEvent]:
            stream = self._side(device)  # may wake CUDA, which takes a while: not on the loop
            with torch.cuda.device(device), torch.cuda.stream(stream):
                made = host.to(device, non_blocking=True)
                event = _CudaEvent(device, self._workers)
            event.raw.synchronize()  # on a worker: ``host`` is no longer read (OWN-1)
            return made, event

        made, event = await finish(self._workers.run(copy))
        self.wait_on_stream(device, event)
        made.record_stream(torch.cuda.current_stream(device))
        return made


_layers: dict[str, DeviceLayer] = {"cpu": HostLayer()}


def install(kind: str, made: DeviceLayer) -> DeviceLayer | None:
    """Put a layer in its place for a type of device.

    Returns:
        What was there before.
    """
    before = _layers.get(kind)
    _layers[kind] = made
    return before


def layer(device: torch.device) -> DeviceLayer:
    """The layer for a device.

    Raises:
        InvalidValueError: aiordt cannot move tensors of such a device.
    """
    found = _layers.get(device.type)
    if found is None:
        # Looked up here, not at import: it must not wake CUDA in processes that have no use for it.
        if device.type == "cuda" and torch.cuda.is_available():  # pragma: no cover
            return _layers.setdefault("cuda", _CudaLayer())
        if device.type == "meta":
            raise InvalidValueError(
                "aiordt moves data, and this tensor, which is on meta, has none: export one that "
                "has (torch.empty_like(tensor, device='cpu') makes one)"
            )
        raise InvalidValueError(
            f"aiordt moves tensors in host and in CUDA memory; this one is on {device}. Call "
            ".cpu() first"
        )
    return found


def record(tensors: Iterable[torch.Tensor]) -> Event:
    """One event for all work queued so far on the devices of these tensors."""
    devices = {tensor.device for tensor in tensors}
    events = [layer(device).record(device) for device in devices]
    pending = [event for event in events if not event.done()]
    if not pending:
        return DONE
    return pending[0] if len(pending) == 1 else _All(pending)


def wait_on_stream(tensor: torch.Tensor, event: Event) -> None:
    """Make the caller's current stream on the tensor's device wait for ``event`` (DEV-3)."""
    for one in event.events if isinstance(event, _All) else (event,):
        layer(tensor.device).wait_on_stream(tensor.device, one)


async def stage(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], workers: Workers
) -> list[torch.Tensor]:
    """These tensors, in host memory, contiguous and of these dtypes; copied where they are not.

    The work that makes them must have finished. Cancelled, it ends when they are no longer read.
    """
    staged = list(tensors)
    groups: dict[torch.device, list[int]] = {}
    for index, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if not (tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous()):
            groups.setdefault(tensor.device, []).append(index)
    for device, indices in groups.items():
        copies = await layer(device).stage(
            [tensors[index] for index in indices], [dtypes[index] for index in indices], workers
        )
        for index, copied in zip(indices, copies, strict=True):
            staged[index] = copied
    return staged


def home(device: str) -> torch.device | None:
    """Where a tensor that its owner has on ``device`` arrives here; ``None``: in host memory.

    A process without such devices says so, once.
    """
    if not device:
        return None
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():  # pragma: no cover  (needs a GPU)
        # Asking for the current device would wake CUDA, on the loop.
        awake = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device() if awake else 0)
    if kind not in _homeless:
        _homeless.add(kind)
        warnings.warn(
            f"a tensor that its owner has on {device} arrived in host memory: there is no "
            f"{kind} device here",
            DeviceWarning,
            stacklevel=2,
        )
    return None


_homeless: set[str] = set()


async def move(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None, workers: Workers
) -> torch.Tensor:
    """A detached tensor on another device, of another dtype, without blocking the loop.

    For CUDA at one end at least; the caller's stream waits for what arrives (DEV-3).
    """
    if tensor.is_cpu:
        moved = await layer(device).unstage(tensor, device)
        return moved if dtype is None else moved.to(dtype)
    if device.type != "cpu":  # pragma: no cover  (between GPUs PyTorch orders both streams)
        return tensor.to(device=device, dtype=dtype, non_blocking=True)
    await layer(tensor.device).record(tensor.device).wait()
    (staged,) = await layer(tensor.device).stage([tensor], [dtype or tensor.dtype], workers)
    return staged
