"""What a transport is: the small interface that every way of moving bytes implements.

Invariants, cited from code and tests:

    OWN-1  Memory is lent from the call until the call returns *or raises*, cancellation
           included: after that nothing writes to (or reads from) it.
    CAN-1  `asyncio.CancelledError` is never turned into anything else.
    CLS-1  ``aclose()`` may be called twice, and closes even when cancelled.
    CLS-2  ``aclose()`` wakes every waiter, with `ClosedError`.
    BLK-1  No blocking call on an event loop that is not aiordt's own thread's.
    ISO-1  A transfer that fails or is cancelled leaves every other transfer alone.
    DTH-1  When the other process is gone, every pending call raises within 2 s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from typing_extensions import override

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self

    import numpy as np

    from aiordt._wire import Message

__all__ = [
    "AsyncResource",
    "Availability",
    "Event",
    "Link",
    "Part",
    "Peer",
    "PeerAddress",
    "Served",
    "Source",
    "Transport",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether something can be used in this process, and if not, why."""

    usable: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a process is, as it travels inside its refs.

    Attributes:
        host: Address of its control listener.
        port: Port of its control listener.
        runtime_id: 16 random bytes, new for every runtime.
        pid: Its process id, in its own namespace.
        host_id: Says which booted kernel it runs on.
        token_address: Where in its memory ``runtime_id`` lies, for the same-host proof.
    """

    host: str
    port: int
    runtime_id: bytes
    pid: int
    host_id: bytes
    token_address: int

    @override
    def __str__(self) -> str:
        return f"pid {self.pid} at {self.host}:{self.port}"


@dataclass(slots=True)
class Part:
    """One tensor of a read: where its bytes are over there, and where they go here.

    Attributes:
        key: Key of the export.
        index: Which tensor of the export.
        address: Address of its element 0 in the owner.
        target: Address of ``nbytes`` writable bytes here.
        nbytes: Bytes to move.
        run_nbytes: The source is runs of this many contiguous bytes ...
        offsets: ... at these offsets from ``address``, in bytes; ``None``: one run at 0.
    """

    key: bytes
    index: int
    address: int
    target: int
    nbytes: int
    run_nbytes: int
    offsets: np.ndarray[tuple[int], np.dtype[np.int64]] | None


class Event(Protocol):
    """Work that was queued on a device, to be waited for."""

    def done(self) -> bool:
        """Whether the work has finished. Never blocks."""
        ...

    async def wait(self) -> None:
        """Wait for the work without blocking the loop."""
        ...


@dataclass(slots=True)
class Served:
    """Exported tensors that a transport reads from, held until it is done.

    Attributes:
        views: Their bytes in the order of a `Part` (packed where they are not contiguous).
        ready: What must have finished on their device before the bytes may be read.
    """

    views: list[memoryview]
    ready: Event


class Source(ABC):
    """The exports of this process, as a serving transport sees them."""

    @abstractmethod
    def open(
        self, items: Sequence[tuple[bytes, int]], nbytes: int
    ) -> AbstractAsyncContextManager[Served]:
        """Hold tensors for as long as the context is open.

        Raises:
            TensorFreedError: One of them is not (or no longer) exported.
            UsageError: They are not ``nbytes`` long together.
        """


class AsyncResource(ABC):
    """Something that must be closed."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release everything. Idempotent; still closes when cancelled (CLS-1)."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class Peer(ABC):
    """Another process, as a transport sees it. Its methods run on aiordt's io loop."""

    address: PeerAddress

    @abstractmethod
    async def reach(self) -> None:
        """Make sure that there is a control connection.

        Raises:
            OwnerDiedError: The process is gone.
            PeerLostError: It cannot be reached.
            AuthenticationError: It does not know the cluster's secret.
        """

    @abstractmethod
    async def call(self, request: Message) -> Message:
        """Send a request over the authenticated control connection and await its reply.

        Raises:
            OwnerDiedError: The process is gone.
            PeerLostError: It cannot be reached.
            AuthenticationError: It does not know the cluster's secret.
            AiordtError: What the request raised over there.
        """

    @abstractmethod
    async def open_stream(self, stream: bytes) -> socket.socket:
        """Open an authenticated payload stream: a connected, blocking socket.

        Args:
            stream: 16 random bytes, by which a later request names the stream.
        """

    @abstractmethod
    async def verdict(self, cause: Exception, *, transport: str, nbytes: int) -> Exception:
        """The error to raise for ``cause``; takes at most a second to find out.

        Returns:
            `OwnerDiedError` when the process is gone, `PeerLostError` when the network is,
            else `TransferError`.
        """


class Link(AsyncResource):
    """The way from this process to the memory of one other; any number of tasks use it.

    Attributes:
        death_fd: A file descriptor that is readable once the other process is gone, valid for
            as long as the link exists; ``None`` if there is none.
        nowait_nbytes: Up to how many bytes `read_nowait` may succeed.
    """

    death_fd: int | None = None
    nowait_nbytes: int = 0

    def read_nowait(self, parts: Sequence[Part]) -> bool:  # noqa: ARG002
        """Read all of ``parts`` at once if that takes only microseconds.

        Returns:
            Whether it was done; if not, nothing was written and `read` is to be used.

        Raises:
            AiordtError: As `read`.
        """
        return False

    @abstractmethod
    async def read(self, parts: Sequence[Part]) -> None:
        """Read all of ``parts`` into their targets; callable from any event loop.

        Ownership (OWN-1): the targets are lent until the call returns *or raises*; a
        cancelled call therefore ends only when they can no longer be written.

        Raises:
            OwnerDiedError: The other process is gone.
            TensorFreedError: A part is not exported (two-sided transports only).
            TransferError: The transfer failed.
            ClosedError: This link was closed.
        """


class Transport(AsyncResource):
    """One way of moving bytes between processes, both ends."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def probe(cls) -> Availability:
        """Say whether this transport can run here. Cheap, without side effects."""

    @abstractmethod
    async def connect(self, peer: Peer) -> Link:
        """Make a link to ``peer``, and prove that it works; callable from any event loop.

        Raises:
            UnavailableError: It cannot work between these two processes; says why.
            OwnerDiedError: The process is gone.
        """

    async def serve(self, request: Message, peer_id: bytes) -> Message | None:  # noqa: ARG002
        """Answer a peer's request on the io loop.

        Args:
            request: What the peer asked.
            peer_id: Its runtime id.

        Returns:
            The reply, or ``None`` when the request is not for this transport.
        """
        return None

    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:  # noqa: ARG002
        """Take over an authenticated payload stream that a peer opened.

        Returns:
            Whether this transport takes it.
        """
        return False
