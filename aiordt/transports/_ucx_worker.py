"""One UCX worker on a thread of its own: tagged messages, awaited.

ucxx's asyncio layer spins, blocks and forgets buffers, so only its low-level classes are
used. The thread sleeps in its loop until UCX's epoll descriptor is readable, and then lets
UCX do all there is to do in one call, without the GIL: on the io loop that call (milliseconds
for a copy, more over TCP) would hold up every peer, and beside a busy interpreter each of
many calls would wait for the GIL.

Parts smaller than 1 MiB are packed into blocks by their sender, a few blocks ahead of its
receiver, and taken apart there unless they go to memory that is in one piece. UCX would do
that by itself, for a list of buffers, but takes many times as long.

Invariants:
    UCX-1  A transfer ends when UCX has let go of all its memory, not earlier: its messages
           are complete, or their endpoint is closed.
    UCX-2  Nothing spins: without work the thread sleeps, whatever is pending.
"""

from __future__ import annotations

import asyncio
import mmap
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from typing_extensions import override

from aiordt._errors import ClosedError
from aiordt._memory import ALIGNMENT, view_memory
from aiordt._progress import finish, settle
from aiordt._types import MIB
from aiordt.transports._ucp import Ucp, UcxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aiordt.abc import Part
    from aiordt.transports._ucp import Endpoint, Request

#: Smaller parts share a message, since each costs tens of microseconds ...
_OWN_MESSAGE_NBYTES: Final = 1 * MIB
#: ... up to this size: the processor's cache still has it when it is copied once more.
_BLOCK_NBYTES: Final = 2 * MIB
#: Blocks for such messages that a worker keeps warm; while so many are taken, a transfer takes
#: another one only if it waits for nothing else.
_NUM_BLOCKS: Final = 8
#: No message is larger: a cancelled transfer waits for those that are on their way.
_SEGMENT_NBYTES: Final = 64 * MIB
#: Receives that UCX is given at once; a cancelled transfer has to wait for its own.
_WINDOW_NBYTES: Final = 256 * MIB
#: Before UCX is ended, what waits for TCP may take so long.
_FLUSH_SECONDS: Final = 1.0
#: A cancelled transfer on an endpoint where nothing moves for so long ends with it.
_PATIENCE_SECONDS: Final = 1.0


class Piece(NamedTuple):
    """Some of a read's memory: of its part number ``place``, so many bytes from ``start`` on."""

    place: int
    start: int
    nbytes: int


def messages(sizes: Iterable[int], *, shared: bool) -> Iterator[list[Piece]]:
    """The messages in which the parts of a read travel: pieces of them, laid end to end.

    Both ends compute it.

    Args:
        sizes: Bytes of each part.
        shared: Whether small ones may share a message: not where they are on several devices.
    """
    small: list[Piece] = []
    room = _BLOCK_NBYTES
    for place, size in enumerate(sizes):
        if shared and 0 < size < _OWN_MESSAGE_NBYTES:
            taken = -(-size // ALIGNMENT) * ALIGNMENT  # as where they may arrive in one piece
            if taken > room:
                yield small
                small, room = [], _BLOCK_NBYTES
            small.append(Piece(place, 0, size))
            room -= taken
            continue
        for start in range(0, size, _SEGMENT_NBYTES):
            yield [Piece(place, start, min(size - start, _SEGMENT_NBYTES))]
    if small:
        yield small


def memory_to_send(views: Sequence[memoryview], *, shared: bool) -> Iterator[list[memoryview]]:
    """The memory of each message, from that of each part."""
    for pieces in messages(map(len, views), shared=shared):
        yield [views[place][start : start + nbytes] for place, start, nbytes in pieces]


def memory_to_receive(parts: Sequence[Part], *, shared: bool) -> Iterator[list[memoryview]]:
    """The memory of each message, in one where it lies end to end."""
    for pieces in messages([part.nbytes for part in parts], shared=shared):
        runs: list[tuple[int, int]] = []
        end = 0
        for place, start, nbytes in pieces:
            at = parts[place].target + start
            if runs and at == end:
                runs[-1] = (runs[-1][0], runs[-1][1] + nbytes)
            else:
                runs.append((at, nbytes))
            end = at + nbytes
        yield [view_memory(at, nbytes, writable=True) for at, nbytes in runs]


def _places(
    block: memoryview, pieces: Sequence[memoryview]
) -> Iterator[tuple[memoryview, memoryview]]:
    """Each piece, and its place in the block."""
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        yield piece, block[start:end]


class Blocks:
    """Memory in which small pieces travel together, kept warm."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []
        self._num_taken = 0

    @property
    def exhausted(self) -> bool:
        """Whether those that have one are to take no more."""
        return self._num_taken >= _NUM_BLOCKS

    def take(self) -> memoryview:
        """A block of `_BLOCK_NBYTES`."""
        self._num_taken += 1
        return self._free.pop() if self._free else memoryview(mmap.mmap(-1, _BLOCK_NBYTES))

    def give(self, block: memoryview) -> None:
        """Give one back."""
        self._num_taken -= 1
        if len(self._free) < _NUM_BLOCKS:
            self._free.append(block)


class _Posted(NamedTuple):
    """A message that UCX was given."""

    request: Request
    pieces: Sequence[memoryview]
    nbytes: int
    block: memoryview | None  # where they are laid end to end, if they do not lie so


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

    _sends: ClassVar[bool]

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
        self._posted: deque[_Posted] = deque()
        self._stopped = False

    @property
    def num_left(self) -> int:
        """Messages that were not posted, or were taken back."""
        return len(self._left)

    def stop(self, ucp: Ucp) -> None:
        """Post nothing more, and take back what can be; it ends when the rest has."""
        self._stopped = True
        for posted in self._posted:
            ucp.cancel(posted.request)

    def advance(self, ucp: Ucp, blocks: Blocks, room: int) -> bool:
        """Take what UCX has completed, and post what fits into ``room`` bytes.

        Returns:
            Whether anything was posted, or taken back: UCX has something to do.
        """
        while self._posted and self._posted[0].request.done:
            self._complete(self._posted.popleft(), ucp, blocks)
        changed = False
        try:
            if self._posted and not self._stopped:
                self.endpoint.check()  # receives that have met no message end with it, too
            while self._left and not self._stopped and (room > 0 or not self._posted):
                pieces = self._left[0]
                if len(pieces) > 1 and self._posted and blocks.exhausted:
                    break
                posted = self._post(ucp, pieces, blocks)
                self._left.popleft()
                self._posted.append(posted)
                self.in_flight += posted.nbytes
                room -= posted.nbytes
                changed = True
        except UcxError as exc:
            self._fail(exc, ucp)
            changed = True
        if not self._posted and (self._stopped or not self._left) and self.ended is not None:
            settle(self.ended, None, self.error)
        return changed

    def _complete(self, posted: _Posted, ucp: Ucp, blocks: Blocks) -> None:
        self.in_flight -= posted.nbytes
        self.num_done += 1
        error = posted.request.error
        if posted.request.canceled and self._stopped:
            self._left.append(posted.pieces)
        elif error is not None:
            self._fail(error, ucp)
        if posted.block is not None:
            if error is None and not self._sends:
                for piece, place in _places(posted.block, posted.pieces):
                    piece[:] = place
            blocks.give(posted.block)

    def _post(self, ucp: Ucp, pieces: Sequence[memoryview], blocks: Blocks) -> _Posted:
        self.endpoint.check()  # of an `Incoming`, nothing would come
        memory, block = pieces[0], None
        if len(pieces) > 1:
            block = blocks.take()
            memory = block[: sum(map(len, pieces))]
            if self._sends:
                for piece, place in _places(block, pieces):
                    place[:] = piece
        return _Posted(self._give(ucp, memory), pieces, len(memory), block)

    def _fail(self, error: UcxError, ucp: Ucp) -> None:
        self.error = self.error or error
        self.stop(ucp)

    @abstractmethod
    def _give(self, ucp: Ucp, memory: memoryview) -> Request: ...


class Outgoing(Transfer):
    """Messages to send."""

    _sends: ClassVar[bool] = True

    @override
    def _give(self, ucp: Ucp, memory: memoryview) -> Request:
        return self.endpoint.send(memory, self._tag)


class Incoming(Transfer):
    """Messages to receive."""

    _sends: ClassVar[bool] = False

    @override
    def _give(self, ucp: Ucp, memory: memoryview) -> Request:
        return ucp.receive(memory, self._tag)


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
        self._blocks = Blocks()
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
            return transfer.advance(
                self._running, self._blocks, 1 << 62
            )  # the other end sets the pace
        before = transfer.in_flight
        changed = transfer.advance(self._running, self._blocks, _WINDOW_NBYTES - self._receiving)
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
