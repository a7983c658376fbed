"""One UCX worker on a thread of its own: tagged messages, awaited.

ucxx's asyncio layer spins, blocks and forgets buffers, so only its low-level classes are
used. The thread sleeps in its loop until UCX's epoll descriptor is readable, and then lets
UCX do all there is to do in one call, without the GIL: on the io loop that call (milliseconds
for a copy, more over TCP) would hold up every peer, and beside a busy interpreter each of
many calls would wait for the GIL.

Invariants:
    UCX-1  A transfer ends when UCX has let go of all its memory, not earlier: its messages
           are complete, or their endpoint is closed.
    UCX-2  Nothing spins: without work the thread sleeps, whatever is pending.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from aiordt._errors import ClosedError
from aiordt._progress import finish, settle
from aiordt._types import KIB, MIB
from aiordt.transports._ucp import Ucp, UcxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aiordt.transports._ucp import Endpoint, Request

#: Smaller parts share a message, since each costs tens of microseconds ...
_OWN_MESSAGE_NBYTES: Final = 64 * KIB
#: ... up to this size and number.
_SHARED_NBYTES: Final = 256 * KIB
_SHARED_NUM: Final = 256
#: No message is larger: a cancelled transfer waits for those that are on their way.
_SEGMENT_NBYTES: Final = 8 * MIB
#: Receives that UCX is given at once; a cancelled transfer has to wait for its own.
_WINDOW_NBYTES: Final = 64 * MIB
#: Before UCX is ended, what waits for TCP may take so long.
_FLUSH_SECONDS: Final = 1.0
#: A cancelled transfer on an endpoint where nothing moves for so long ends with it.
_PATIENCE_SECONDS: Final = 1.0


def messages(views: Sequence[memoryview], *, shared: bool) -> Iterator[list[memoryview]]:
    """The messages in which memory travels, each of them pieces laid end to end.

    Both ends compute it, from their own views.

    Args:
        views: What is to be sent, or where it is to go.
        shared: Whether small ones may share a message: not where they are on several devices.
    """
    small: list[memoryview] = []
    nbytes = 0
    for view in views:
        if shared and len(view) < _OWN_MESSAGE_NBYTES:
            if view:
                small.append(view)
                nbytes += len(view)
            if nbytes >= _SHARED_NBYTES or len(small) == _SHARED_NUM:
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

    Attributes:
        in_flight: Bytes that UCX was given.
        num_done: Messages that UCX has let go of.
        error: Why it failed.
        ended: Done when UCX has let go of all its memory (UCX-1).
    """

    def __init__(
        self, endpoint: Endpoint, tag: int, messages: Iterable[Sequence[memoryview]]
    ) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self.num_done = 0
        self.error: UcxError | None = None
        self.ended: asyncio.Future[None] | None = None
        self._tag = tag
        self._left = deque(messages)
        self._posted: deque[tuple[Request, Sequence[memoryview]]] = deque()
        self._stopped = False

    @property
    def num_left(self) -> int:
        """Messages that were not posted, or were taken back."""
        return len(self._left)

    def stop(self, ucp: Ucp) -> None:
        """Post nothing more, and take back what can be; it ends when the rest has."""
        self._stopped = True
        for request, _ in self._posted:
            ucp.cancel(request)

    def advance(self, ucp: Ucp, room: int) -> bool:
        """Take what UCX has completed, and post what fits into ``room`` bytes.

        Returns:
            Whether anything was posted, or taken back: UCX has something to do.
        """
        while self._posted and self._posted[0][0].done:
            request, pieces = self._posted.popleft()
            self.in_flight -= sum(map(len, pieces))
            self.num_done += 1
            if request.canceled and self._stopped:
                self._left.append(pieces)
            elif request.error is not None:
                self._fail(request.error, ucp)
        changed = False
        try:
            if self._posted and not self._stopped:
                self.endpoint.check()  # receives that have met no message end with it, too
            while self._left and not self._stopped and (room > 0 or not self._posted):
                pieces = self._left[0]
                self._posted.append((self._post(ucp, pieces), pieces))
                self._left.popleft()
                nbytes = sum(map(len, pieces))
                self.in_flight += nbytes
                room -= nbytes
                changed = True
        except UcxError as exc:
            self._fail(exc, ucp)
            changed = True
        if not self._posted and (self._stopped or not self._left) and self.ended is not None:
            settle(self.ended, None, self.error)
        return changed

    def _fail(self, error: UcxError, ucp: Ucp) -> None:
        self.error = self.error or error
        self.stop(ucp)

    @abstractmethod
    def _post(self, ucp: Ucp, pieces: Sequence[memoryview]) -> Request: ...


class Outgoing(Transfer):
    """Messages to send."""

    @override
    def _post(self, ucp: Ucp, pieces: Sequence[memoryview]) -> Request:
        return self.endpoint.send(pieces, self._tag)


class Incoming(Transfer):
    """Messages to receive."""

    @override
    def _post(self, ucp: Ucp, pieces: Sequence[memoryview]) -> Request:
        self.endpoint.check()  # nothing would come
        return ucp.receive(pieces, self._tag)


class Unwanted(Incoming):
    """Messages that nobody wants any more.

    A receive that is too short ends a message without moving it, at both ends.
    """

    def __init__(self, endpoint: Endpoint, tag: int, count: int) -> None:
        super().__init__(endpoint, tag, [[memoryview(bytearray(1))]] * count)

    @override
    def _fail(self, error: UcxError, ucp: Ucp) -> None:
        if not self.endpoint.alive:
            super()._fail(error, ucp)


class UcxWorker:
    """UCX in this process. Lives on the loop of its thread, where all is to be called.

    Args:
        device: As of `Ucp`.

    Attributes:
        address: What others need to make an endpoint to it.

    Raises:
        UcxError: UCX does not start.
    """

    def __init__(self, device: str | None) -> None:
        self._ucp: Ucp | None = Ucp(device)
        self.address = self._ucp.address
        self._fd = self._ucp.fd
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._progress)
        self._woken = False
        self._transfers: list[Transfer] = []
        self._receiving = 0  # bytes of posted receives
        self._endpoints: set[Endpoint] = set()
        self._closing: set[Endpoint] = set()
        self._quiet: asyncio.Future[None] | None = None
        self._wake()

    @property
    def _running(self) -> Ucp:
        if self._ucp is None:
            raise ClosedError("ucx was closed")
        return self._ucp

    def connect(self, address: bytes) -> Endpoint:
        """Make an endpoint to another worker.

        Raises:
            UcxError: It cannot be reached.
        """
        endpoint = self._running.connect(address)
        self._endpoints.add(endpoint)
        self._wake()
        return endpoint

    def disconnect(self, endpoint: Endpoint) -> None:
        """Close an endpoint as soon as UCX can; its transfers end with an error. Idempotent."""
        if endpoint in self._endpoints:
            self._endpoints.discard(endpoint)
            if not endpoint.close():
                self._closing.add(endpoint)
            self._wake()

    async def carry_out(
        self, transfer: Transfer, started: Callable[[], object] | None = None
    ) -> None:
        """Carry out a transfer, and return when its memory is the caller's again (UCX-1).

        When cancelled, ends as soon as what has begun to come is there; the caller looks at
        `Transfer.num_left`.

        Args:
            transfer: What to do.
            started: Called when UCX has been given the first messages, or all to be sent.

        Raises:
            UcxError: It failed.
        """
        self._running  # noqa: B018  (raises)
        transfer.ended = self._loop.create_future()
        self._transfers.append(transfer)
        self._advance(transfer)
        self._wake()
        if started is not None and transfer.error is None:
            started()
        await finish(transfer.ended, lambda: self._stop(transfer))

    def _stop(self, transfer: Transfer) -> None:
        transfer.stop(self._running)
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
            return transfer.advance(self._running, 1 << 62)  # the other end sets the pace
        before = transfer.in_flight
        changed = transfer.advance(self._running, _WINDOW_NBYTES - self._receiving)
        self._receiving += transfer.in_flight - before
        return changed

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        """Let UCX do all that it can now, and see that it tells us when there is more."""
        if self._ucp is None:
            return
        self._woken = False
        self._ucp.progress()
        changed = False
        for transfer in self._transfers:
            changed |= self._advance(transfer)
        self._transfers = [each for each in self._transfers if each.ended and not each.ended.done()]
        closed = {endpoint for endpoint in self._closing if endpoint.close()}
        self._closing -= closed
        changed |= bool(closed)
        if self._quiet is not None and not self._transfers and not self._closing:
            settle(self._quiet, None, None)
        if changed or not self._ucp.arm():
            self._wake()

    async def aclose(self) -> None:
        """End all transfers, with errors, and UCX. Idempotent."""
        for endpoint in list(self._endpoints):
            self.disconnect(endpoint)
        if self._quiet is None:
            self._quiet = self._loop.create_future()
            self._wake()
        await asyncio.wait({self._quiet}, timeout=_FLUSH_SECONDS)
        for endpoint in self._closing:
            endpoint.close(force=True)
        self._wake()
        await self._quiet
        self._loop.remove_reader(self._fd)
        self._ucp = None
