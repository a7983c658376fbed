"""One UCX worker on a thread of its own: tagged messages, awaited.

ucxx's asyncio layer spins, blocks and forgets buffers, so only its low-level classes are
used. The thread sleeps in its loop until UCX's epoll descriptor is readable, and then lets
UCX do all there is to do in one call, without the GIL: on the io loop that call (milliseconds
for a copy, more over TCP) would hold up every peer, and beside a busy interpreter each of
many calls would wait for the GIL.

Endpoints are made with error handling: only these can be closed while something is pending,
and end what is pending when the other process dies. UCX would give up shared memory and
cross-memory attach for that, unless it is told that both support it (`_SETTINGS`).

Invariants:
    UCX-1  A transfer ends when UCX has let go of all its memory, not earlier: its messages
           are complete, or their endpoint is closed.
    UCX-2  Nothing spins: without work the thread sleeps, whatever is pending.
    UCX-3  The process's environment and signal handlers are what they were before ucxx came.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from typing_extensions import override

from aiordt._errors import ClosedError
from aiordt._progress import finish, settle
from aiordt._types import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence


@contextmanager
def _environment() -> Generator[None]:
    """The process's environment as UCX needs it while it is loaded or started (UCX-3)."""
    before = set(os.environ)
    for name, value in (
        ("UCX_WARN_UNUSED_ENV_VARS", "n"),
        ("UCX_MEMTYPE_CACHE", "n"),  # it misses some of what torch allocates
        ("UCX_DEBUG_SIGNO", "0"),  # else UCX takes SIGHUP, which no longer ends the process
    ):
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("UCX_")]:
            if name not in before:
                del os.environ[name]


with _environment():
    from ucxx._lib import libucxx
    from ucxx._lib.arr import Array

#: What UCX raises.
UcxError: Final[type[Exception]] = libucxx.UCXError

#: Settings of UCX, unless the environment has others.
_SETTINGS: Final = {
    # With error handling UCX uses shared memory and reads the other process's memory (10 GB/s
    # in place of 1.4) only if these say that both support it. What the second one promises is
    # that nobody touches a failed endpoint's memory; here the other end may read it, at most.
    "MM_ERROR_HANDLING": "y",
    "CMA_MEMORY_INVALIDATE": "y",
}
#: Smaller parts share a message, since each costs some 5 µs at both ends.
_OWN_MESSAGE_NBYTES: Final = 16 * KIB
#: ... of this size.
_SHARED_NBYTES: Final = 256 * KIB
#: No message is larger: a cancelled transfer waits for those that are on their way.
_SEGMENT_NBYTES: Final = 8 * MIB
#: Receives that UCX is given at once; a cancelled transfer has to wait for its own.
_WINDOW_NBYTES: Final = 64 * MIB
#: A cancelled transfer on an endpoint where nothing moves for so long ends with it.
_PATIENCE_SECONDS: Final = 1.0


class _Request(Protocol):
    completed: bool

    def check_error(self) -> None: ...


class Endpoint(Protocol):
    """The way to another process's worker."""

    alive: bool

    def tag_send(self, array: object, tag: object, /) -> _Request:
        """Post a message."""
        ...

    def tag_recv(self, array: object, tag: object, /) -> _Request:
        """Post a receive; ends with the endpoint, at the latest."""
        ...

    def close_blocking(self) -> None:
        """Close it at once (it handles errors); what is pending ends with the next progress."""
        ...


class _Worker(Protocol):
    address: Any
    epoll_file_descriptor: int

    def init_blocking_progress_mode(self) -> None: ...
    def progress(self) -> None: ...
    def arm(self) -> bool: ...
    def create_endpoint_from_worker_address(
        self, address: object, *, endpoint_error_handling: bool
    ) -> Endpoint: ...


def messages(views: Sequence[memoryview], *, shared: bool) -> Iterator[list[memoryview]]:
    """The messages in which memory travels, each of them pieces laid end to end.

    Both ends compute it, from their own views.

    Args:
        views: What is to be sent, or where it is to go.
        shared: Whether small ones may share a message; not where the host cannot touch them.
    """
    small: list[memoryview] = []
    nbytes = 0
    for view in views:
        if shared and len(view) < _OWN_MESSAGE_NBYTES:
            if view:
                small.append(view)
                nbytes += len(view)
            if nbytes >= _SHARED_NBYTES:
                yield small
                small, nbytes = [], 0
            continue
        for start in range(0, len(view), _SEGMENT_NBYTES):
            yield [view[start : start + _SEGMENT_NBYTES]]
    if small:
        yield small


class Transfer(ABC):
    """Messages with one tag, in order.

    Args:
        endpoint: Where they go to, or come from.
        tag: 64 bits that no other transfer to the same process uses.
        messages: Pieces of memory; those of one message are laid end to end in it.
    """

    def __init__(
        self, endpoint: Endpoint, tag: int, messages: Iterable[Sequence[memoryview]]
    ) -> None:
        self.in_flight = 0
        self.num_done = 0
        self.error: Exception | None = None
        self.ended: asyncio.Future[None] | None = None
        self.endpoint = endpoint
        self._tag = libucxx.UCXXTag(tag)
        self._left = deque(messages)
        self._posted: deque[tuple[_Request, Sequence[memoryview], memoryview]] = deque()
        self._stopped = False

    @property
    def num_left(self) -> int:
        """Messages that were not posted."""
        return len(self._left)

    def stop(self) -> None:
        """Post nothing more; it ends when what is posted has ended."""
        self._stopped = True

    def advance(self, room: int) -> bool:
        """Take what UCX has completed, and post what fits into ``room`` bytes.

        Returns:
            Whether anything was posted.
        """
        while self._posted and self._posted[0][0].completed:
            request, message, memory = self._posted.popleft()
            self.num_done += 1
            self.in_flight -= len(memory)
            try:
                request.check_error()
            except UcxError as exc:
                self._fail(exc)
            else:
                self._landed(message, memory)
        posted = False
        while self._left and not self._stopped and (room > 0 or not self._posted):
            message = self._left[0]
            memory = self._memory(message)
            try:
                request = self._post(Array(memory))
            except UcxError as exc:
                self._fail(exc)
                break
            self._posted.append((request, self._left.popleft(), memory))
            self.in_flight += len(memory)
            room -= len(memory)
            posted = True
        if not self._posted and (self._stopped or not self._left) and self.ended is not None:
            settle(self.ended, None, self.error)
        return posted

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.stop()

    @abstractmethod
    def _memory(self, message: Sequence[memoryview]) -> memoryview:
        """One run of memory for a message."""

    @abstractmethod
    def _post(self, array: object) -> _Request: ...

    @abstractmethod
    def _landed(self, message: Sequence[memoryview], memory: memoryview) -> None:
        """A message is complete."""


class Outgoing(Transfer):
    """Messages to send."""

    @override
    def _memory(self, message: Sequence[memoryview]) -> memoryview:
        return message[0] if len(message) == 1 else memoryview(b"".join(message))

    @override
    def _post(self, array: object) -> _Request:
        return self.endpoint.tag_send(array, self._tag)

    @override
    def _landed(self, message: Sequence[memoryview], memory: memoryview) -> None:
        return


class Incoming(Transfer):
    """Messages to receive."""

    @override
    def _memory(self, message: Sequence[memoryview]) -> memoryview:
        return message[0] if len(message) == 1 else memoryview(bytearray(sum(map(len, message))))

    @override
    def _post(self, array: object) -> _Request:
        return self.endpoint.tag_recv(array, self._tag)

    @override
    def _landed(self, message: Sequence[memoryview], memory: memoryview) -> None:
        if len(message) == 1:
            return
        position = 0
        for piece in message:
            piece[:] = memory[position : position + len(piece)]
            position += len(piece)


class Unwanted(Incoming):
    """Messages that nobody wants any more.

    A receive that is too short ends a message without moving it, at both ends.
    """

    def __init__(self, endpoint: Endpoint, tag: int, count: int) -> None:
        super().__init__(endpoint, tag, [[memoryview(bytearray(1))]] * count)

    @override
    def _fail(self, error: Exception) -> None:
        if not self.endpoint.alive:
            super()._fail(error)


class UcxWorker:
    """UCX in this process. Lives on the loop of its thread, where all is to be called.

    Made in a few milliseconds, the first one in 0.1 s.

    Args:
        device: The network interface to use; ``None``: all.

    Attributes:
        address: What others need to make an endpoint to it.
    """

    def __init__(self, device: str | None) -> None:
        settings = dict(_SETTINGS)
        if device is not None:
            settings["NET_DEVICES"] = device
        chosen = {
            name: value for name, value in settings.items() if f"UCX_{name}" not in os.environ
        }
        features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        with _environment():
            context = libucxx.UCXContext(chosen, feature_flags=features)
            self._worker: _Worker | None = libucxx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self.address: bytes = self._worker.address.tobytes()
        self._fd = self._worker.epoll_file_descriptor
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._progress)
        self._woken = False
        self._transfers: list[Transfer] = []
        self._receiving = 0  # bytes of posted receives
        self._endpoints: set[Endpoint] = set()
        self._wake()

    def connect(self, address: bytes) -> Endpoint:
        """Make an endpoint to another worker.

        Raises:
            UcxError: It cannot be reached.
        """
        if self._worker is None:
            raise ClosedError("ucx was closed")
        endpoint = self._worker.create_endpoint_from_worker_address(
            libucxx.UCXAddress.create_from_buffer(address), endpoint_error_handling=True
        )
        self._endpoints.add(endpoint)
        self._wake()
        return endpoint

    def disconnect(self, endpoint: Endpoint) -> None:
        """Close an endpoint; its transfers end with an error. Idempotent."""
        if endpoint in self._endpoints:
            self._endpoints.discard(endpoint)
            endpoint.close_blocking()
            self._wake()

    async def carry_out(
        self, transfer: Transfer, started: Callable[[], object] | None = None
    ) -> None:
        """Carry out a transfer, and return when its memory is the caller's again (UCX-1).

        When cancelled, ends as soon as what has been posted has come; the caller looks at
        `Transfer.num_left`.

        Args:
            transfer: What to do.
            started: Called when UCX has been given the first messages, or all to be sent.

        Raises:
            UcxError: It failed.
        """
        if self._worker is None:
            raise ClosedError("ucx was closed")
        transfer.ended = self._loop.create_future()
        self._transfers.append(transfer)
        self._advance(transfer)
        self._wake()
        if started is not None and transfer.error is None:
            started()
        await finish(transfer.ended, lambda: self._stop(transfer))

    def _stop(self, transfer: Transfer) -> None:
        transfer.stop()
        self._wake()
        self._loop.call_later(
            _PATIENCE_SECONDS, self._check_moving, transfer, self._state(transfer)
        )

    def _state(self, transfer: Transfer) -> list[int]:
        """Changes whenever a message of the endpoint is complete."""
        endpoint = transfer.endpoint
        return [each.num_done for each in self._transfers if each.endpoint is endpoint]

    def _check_moving(self, transfer: Transfer, before: list[int]) -> None:
        """Give the endpoint up if a cancelled transfer waits for a process that stands still.

        UCX takes no receive back whose message has begun to come. What else the endpoint
        carries stands still, too.
        """
        if transfer.ended is None or transfer.ended.done():
            return
        now = self._state(transfer)
        if now == before:
            self.disconnect(transfer.endpoint)
        else:
            self._loop.call_later(_PATIENCE_SECONDS, self._check_moving, transfer, now)

    def _advance(self, transfer: Transfer) -> bool:
        if isinstance(transfer, Outgoing):
            return transfer.advance(room=1 << 62)  # all at once: the other end sets the pace
        before = transfer.in_flight
        posted = transfer.advance(_WINDOW_NBYTES - self._receiving)
        self._receiving += transfer.in_flight - before
        return posted

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        """Let UCX do all that it can now, and see that it tells us when there is more."""
        worker = self._worker
        if worker is None:
            return
        self._woken = False
        worker.progress()
        posted = False
        for transfer in self._transfers:
            posted |= self._advance(transfer)
        self._transfers = [each for each in self._transfers if each.ended and not each.ended.done()]
        if posted or not worker.arm():
            self._wake()

    async def aclose(self) -> None:
        """End all transfers, with errors, and UCX. Idempotent."""
        for endpoint in list(self._endpoints):
            self.disconnect(endpoint)
        while self._transfers:
            with suppress(UcxError):
                await asyncio.wait([each.ended for each in self._transfers if each.ended])
        if self._worker is not None:
            self._loop.remove_reader(self._fd)
            self._worker = None
