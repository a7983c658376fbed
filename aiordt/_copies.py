"""What a process keeps of other hosts' exports for its own, and the words in which they ask."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

from aiordt._errors import ProtocolViolationError
from aiordt._types import MIB
from aiordt._wire import KEY_NBYTES, Item, pack_items
from aiordt.abc import Part, PeerAddress, TransportMessage

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Sequence

    import torch

NAME: Final = "relay"
FETCH: Final = 0  # the asker's number, address, items, places there -> [(segment, address)]
DONE: Final = 1  # number: the asker has read what it was told, or wants it no more
WATCH: Final = 2  # key -> answered when the export is gone
JOIN: Final = 3  # key, address, ids -> from whom to get it instead of those, and its depth
FETCH_FAR: Final = 4  # as FETCH -> items, [(segment, address)]
#: The first of a host gets so much at a time, so that the next host need not wait for all.
_STEP_NBYTES: Final = 16 * MIB
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


What: TypeAlias = tuple[int, Any]  # index and cut


@dataclass(slots=True, eq=False)
class Entry:
    """A part that was brought here, or is on its way."""

    tensor: torch.Tensor
    task: asyncio.Task[None]
    pins: int = 0


@dataclass(slots=True, eq=False)
class Pin:
    """What another process reads here (RLY-1).

    Attributes:
        entries: The parts.
        leases: Of their export, if it reads from another host.
    """

    entries: list[Entry]
    leases: list[object]


@dataclass(frozen=True, slots=True)
class Origin:
    """From whom this host gets an export; ``None``: the owner."""

    address: PeerAddress | None
    depth: int


@dataclass(slots=True, eq=False)
class Copy:
    """What this process keeps of one export."""

    listener: socket.socket
    entries: dict[What, Entry] = field(default_factory=dict)
    watch: asyncio.Task[None] | None = None
    source: Origin | None = None
    failed: list[bytes] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.tensor.nbytes for entry in self.entries.values())

    @property
    def pinned(self) -> bool:
        return any(entry.pins or not entry.task.done() for entry in self.entries.values())

    def forget(self, tasks: Collection[asyncio.Task[None]]) -> None:
        """Have no more what these were to bring."""
        self.entries = {
            what: entry for what, entry in self.entries.items() if entry.task not in tasks
        }


def same_user(neighbour: socket.socket) -> bool:
    """Whether the process at the other end of a local socket is of our user.

    Who meets for an export has proved nothing: another user's process might have taken the name.
    """
    data = neighbour.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1]) == os.getuid()


def meeting_name(key: bytes) -> bytes:
    """Where a host's processes meet for an export; the name does not give the key away."""
    return b"\0aiordt-relay-" + blake2b(key, digest_size=16).hexdigest().encode()


def steps(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in portions of about `_STEP_NBYTES`, in order."""
    steps: list[list[Part]] = []
    room = 0
    for part in parts:
        if not steps or room < part.nbytes:
            steps.append([])
            room = _STEP_NBYTES
        steps[-1].append(part)
        room -= part.nbytes
    return steps


def fetch_request(
    kind: int, number: int, address: PeerAddress, parts: Sequence[Part]
) -> TransportMessage:
    """Ask for parts of an export, whose owner is at ``address``."""
    items: list[Item] = [part.item for part in parts]
    places = [(part.address, part.nbytes, part.segment, part.device) for part in parts]
    body = msgpack.packb((kind, number, pack_address(address), pack_items(items), places))
    return TransportMessage(NAME, body)


def done_note(number: int) -> TransportMessage:
    """What `fetch_request` asked for is needed no more."""
    return TransportMessage(NAME, msgpack.packb((DONE, number)))


def unpacked(body: bytes) -> list[Any]:
    try:
        values = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as exc:
        raise ProtocolViolationError("not a message between neighbours") from exc
    if type(values) is not list or not values:
        raise ProtocolViolationError("not a message between neighbours")
    return values


def pack_address(address: PeerAddress) -> bytes:
    packed: bytes = msgpack.packb(dataclasses.astuple(address))
    return packed


def unpack_address(data: bytes) -> PeerAddress:
    """An address that may come from anybody: one that can be connected to.

    Raises:
        ProtocolViolationError: It is not that.
    """
    values = unpacked(data)
    types = (str, int, bytes, int, bytes, int)
    if len(values) < len(types) or any(
        type(value) is not kind for value, kind in zip(values, types, strict=False)
    ):
        raise ProtocolViolationError("not the address of a neighbour")
    address = PeerAddress(*values[: len(types)])
    try:
        ipaddress.ip_address(address.host)
    except ValueError as exc:
        raise ProtocolViolationError("not the address of a neighbour") from exc
    if not (
        0 < address.port < 1 << 16
        and len(address.runtime_id) == len(address.host_id) == KEY_NBYTES
        and 0 < address.pid < 1 << 31
        and 0 <= address.token_address < 1 << 64
    ):
        raise ProtocolViolationError("not the address of a neighbour")
    return address
