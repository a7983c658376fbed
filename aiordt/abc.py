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
    FAIR-1 A small read is not kept until all larger ones before it have ended.
    HLD-1  Two-sided: what is sent is held (`Source.open`) until the transport has let go of
           it; its owner may write over it as soon as it is free.
    KEY-1  Two-sided: an owner gives out what the key of a part names, and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
from typing_extensions import override

from aiordt._layout import Cut
from aiordt._wire import TransportMessage, pack_items, unpack_items

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Coroutine, Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self

    import torch

    from aiordt._config import Config
    from aiordt._wire import Item, Message

__all__ = [
    "AsyncResource",
    "Availability",
    "Context",
    "Cut",
    "DrawingLink",
    "Io",
    "Link",
    "Part",
    "Peer",
    "PeerAddress",
    "Served",
    "SharedLink",
    "Source",
    "Transport",
    "TransportMessage",
    "pack_items",
    "unpack_items",
]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether something can be used in this process, and if not, why.

    Attributes:
        usable: Whether it can.
        reason: Why not, and what to do; or why it is used only on demand.
        on_demand: It can be used, but is never chosen unless somebody asks for it by name.
    """

    usable: bool
    reason: str = ""
    on_demand: bool = False


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
        address: Address of the first byte to read, in the owner.
        target: Address of ``nbytes`` writable bytes here.
        nbytes: Bytes that arrive.
        cut: Which elements of the exported tensor; ``None``: all, and it is contiguous.
        segment: Number of the owner's shared segment that the tensor is in; 0: in none.
        device: Where the owner has it, e.g. ``"cuda:0"``.
        tensor: The tensor that ``target`` is in, for transports that register memory.
    """

    key: bytes
    index: int
    address: int
    target: int
    nbytes: int
    cut: Cut | None = None
    segment: int = 0
    device: str = "cpu"
    tensor: torch.Tensor | None = None

    @property
    def contiguous(self) -> bool:
        """Whether the bytes are one run at ``address``."""
        return self.cut is None or self.cut.contiguous

    def runs(self) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Bytes of each contiguous run to read, and the runs' offsets from ``address``."""
        if self.cut is None:
            return self.nbytes, np.zeros(1, dtype=np.int64)
        return self.cut.runs()

    @property
    def item(self) -> Item:
        """What to ask the owner for."""
        return self.key, self.index, self.cut


@dataclass(slots=True)
class Served:
    """Exported tensors that a transport reads from, held until it is done.

    Attributes:
        views: Their bytes in the order of a `Part`, in host memory (packed, or staged there, where
            they are not contiguous, or on a device), whole.
    """

    views: list[memoryview]


class Source(ABC):
    """The exports of this process, as a serving transport sees them."""

    @abstractmethod
    def open(self, items: Sequence[Item], nbytes: int) -> AbstractAsyncContextManager[Served]:
        """Hold tensors, or cuts of them, for as long as the context is open.

        It opens once the work that makes them has finished on their devices.

        Raises:
            TensorFreedError: One of them is not (or no longer) exported.
            UsageError: They are not ``nbytes`` long together.
        """

    @abstractmethod
    def exported(self, key: bytes, index: int) -> torch.Tensor:
        """An exported tensor itself, to be registered with a device of the network.

        Raises:
            TensorFreedError: It is not (or no longer) exported.
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
            stream: 16 bytes, by which a later request names the stream: random ones, but for
                a beginning by which your `Transport.accept` knows them.
        """

    @abstractmethod
    async def open_local(self, stream: bytes) -> socket.socket:
        """As `open_stream`, over a socket of this host, which can carry file descriptors.

        Raises:
            OwnerDiedError: There is no such socket here: on another host, or gone.
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
        packs: Two-sided: the owner lays the bytes of a `Cut` end to end before it sends them,
            and converts them where the cut says so; what is on a device it stages in host memory.
        devices: Types of devices whose memory it reads by itself.
    """

    death_fd: int | None = None
    nowait_nbytes: int = 0
    packs: ClassVar[bool] = False
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})

    @property
    def obstacle(self) -> str:
        """Why it cannot read at present, though it may later; empty if it can."""
        return ""

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


class DrawingLink(Link):
    """A link whose threads prepare what they read: while one reads, another prepares."""

    @abstractmethod
    async def read_drawn(self, parts: Iterator[Part], segments: Iterable[int]) -> None:
        """As `Link.read`, of parts that are prepared as they are drawn.

        Args:
            parts: More than ``nowait_nbytes`` bytes. To be drawn off the loop, by one thread at
                a time; what it raises goes to the caller.
            segments: Those of the owner that the parts are in.
        """


class SharedLink(Link):
    """A link through which the other process's memory can be seen without a copy.

    Attributes:
        mapped_nbytes: Bytes of that memory that are mapped here.
    """

    @property
    @abstractmethod
    def mapped_nbytes(self) -> int:
        """See above."""

    @abstractmethod
    async def view(self, segment: int, address: int, nbytes: int) -> torch.Tensor:
        """The owner's memory itself, as a flat tensor of bytes; callable from any event loop.

        Args:
            segment: Number of the owner's segment.
            address: Where the bytes are, in the owner.
            nbytes: How many.

        Raises:
            OwnerDiedError: The other process is gone.
            TransferError: It cannot be mapped here.
            ClosedError: This link was closed.
        """

    @abstractmethod
    async def copy_on_write(
        self, segment: int, address: int, nbytes: int, keep: object
    ) -> torch.Tensor:
        """As `view`, to be written to: what is written is seen by this process only.

        Args:
            segment: Number of the owner's segment.
            address: Where the bytes are, in the owner.
            nbytes: How many.
            keep: Let go when nothing uses the memory any more. The owner must not write to its
                own until then, for what has not been written here is still the owner's.
        """


class Io(Protocol):
    """aiordt's own thread with an event loop, which serves peers whatever users do."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """That loop."""
        ...

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run ``coroutine`` on that loop, and await it from whatever loop is running.

        A cancellation is passed on, and raised here only when the coroutine has ended there.

        Raises:
            ClosedError: The coroutine was cancelled over there, or that loop has ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a transport is made with.

    Attributes:
        io: The thread that serves peers.
        source: What this process exports.
        config: This process's settings.
    """

    io: Io
    source: Source
    config: Config


class Transport(AsyncResource):
    """One way of moving bytes between processes, both ends.

    Made when first used, with a `Context`, on aiordt's io loop; its module is imported on a
    worker thread before. Requests of its own travel in a `TransportMessage` with its name.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, context: Context) -> None:
        """Make this process's end. Must be quick: what takes longer is done in `connect`."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Availability:
        """Say whether this transport can run here. Cheap, without side effects."""

    @property
    def registered(self) -> tuple[int, int]:
        """How many ranges of memory it has registered with a device, and their bytes."""
        return 0, 0

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

        Streams that others take are asked about, too: let the ids of yours begin alike.

        Returns:
            Whether this transport takes it, and closes it in the end.
        """
        return False

    def forget(self, peer_id: bytes) -> None:
        """A peer is gone: let go of what is kept for it. On the io loop."""
