"""Plain values that the other modules share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# The position is the code on the wire (`TensorMeta.dtype`): append, never reorder.
_DTYPE_NAMES: Final = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "bool", "complex64", "complex128", "complex32", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "uint16", "uint32", "uint64",
    "float4_e2m1fn_x2",
)  # fmt: skip
DTYPES: Final[tuple[torch.dtype | None, ...]] = tuple(
    getattr(torch, name, None) for name in _DTYPE_NAMES
)
DTYPE_CODES: Final[Mapping[torch.dtype, int]] = MappingProxyType(
    {dtype: code for code, dtype in enumerate(DTYPES) if dtype is not None}
)
ITEMSIZES: Final[tuple[int, ...]] = tuple(
    0 if dtype is None else dtype.itemsize for dtype in DTYPES
)


class Secret(bytes):
    """Bytes that do not show themselves where errors, logs or asyncio's debug mode print them."""

    __slots__ = ()

    @override
    def __repr__(self) -> str:
        return "Secret()"

    @override
    def __str__(self) -> str:
        return "Secret()"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a tensor: a plain record, which does not keep an actor alive.

    Attributes:
        node_id: Ray's id of the node, in hex.
        pid: Process id on that node.
        actor_id: Ray's id of the actor in hex, or ``None`` for a driver or a task's worker.
        actor_name: The actor's class, or its name if it has one.
    """

    node_id: str
    pid: int
    actor_id: str | None = None
    actor_name: str | None = None

    @override
    def __str__(self) -> str:
        if self.actor_id is None:
            return f"process {self.pid} on node {self.node_id[:8]}"
        name = self.actor_name or "actor"
        return f"{name} {self.actor_id[:12]} (pid {self.pid}, node {self.node_id[:8]})"


@dataclass(frozen=True, slots=True)
class TransportStats:
    """What one transport has brought into this process.

    Attributes:
        pulls: Tensors received.
        nbytes: Payload bytes received.
    """

    pulls: int
    nbytes: int


class Tally(Mapping[str, TransportStats]):
    """What came by each transport: an immutable mapping that pickles and copies."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, TransportStats]) -> None:
        self._entries = dict(entries)

    @override
    def __getitem__(self, name: str) -> TransportStats:
        return self._entries[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @override
    def __len__(self) -> int:
        return len(self._entries)

    @override
    def __repr__(self) -> str:
        return repr(self._entries)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of this process's runtime.

    Attributes:
        exports: Tensors that this process holds for others.
        exported_bytes: Bytes of the storages behind them, each counted once.
        held_refs: `TensorRef` objects alive in this process.
        pulls: Tensors received so far, whatever the transport.
        bytes_pulled: Payload bytes that crossed a process boundary into this process.
        in_flight: Tensors being received now.
        pool_bytes: Bytes of receive memory kept for reuse.
        arena_bytes: Bytes of shared memory that this process has.
        arena_used_bytes: ... and of it, what tensors have now.
        mapped_bytes: Bytes of other processes' shared memory that are mapped here.
        relay_bytes: Bytes of copies of other hosts' tensors that are kept for this host.
        registrations: Ranges of memory that are registered with network devices.
        registered_bytes: Bytes of them.
        by_transport: Per transport, the pulls and their bytes.
    """

    exports: int
    exported_bytes: int
    held_refs: int
    pulls: int
    bytes_pulled: int
    in_flight: int
    pool_bytes: int
    arena_bytes: int
    arena_used_bytes: int
    mapped_bytes: int
    relay_bytes: int
    registrations: int
    registered_bytes: int
    by_transport: Mapping[str, TransportStats]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which transport this process would use for a ref, and why not another.

    Attributes:
        chosen: Name of the transport, or ``None`` when none can be used.
        reasons: For every transport in order of preference, one sentence.
    """

    chosen: str | None
    reasons: Mapping[str, str]

    @override
    def __str__(self) -> str:
        width = max(map(len, self.reasons), default=0)
        rows = [
            f"{'->' if name == self.chosen else '  '} {name:<{width}}  {reason}"
            for name, reason in self.reasons.items()
        ]
        return "\n".join(rows)
