"""What the ends of a channel tell each other. Pure: bytes in, values out.

An item's tensors lie in its sender's buffers; a frame says where, and carries the rest of it.

Invariants:
    CHF-1  Nothing of a frame is looked at before its authentication code was found right: what
           an item has besides tensors is unpickled.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgpack

from aiordt._errors import ProtocolViolationError
from aiordt._wire import HEADER, Sealer, frame_length

if TYPE_CHECKING:
    from collections.abc import Iterator

#: From the sender: an item, a piece of what is too long for one frame, the end.
ITEM: Final = 0
MORE: Final = 1
END: Final = 2
#: From a receiver: items that it has done with; it is leaving, but for these items.
CREDIT: Final = 3
LEAVE: Final = 4

#: More than so much of an item's data besides tensors comes in pieces.
PIECE_NBYTES: Final = 512 << 10

#: A tensor: code of its dtype, flags, shape, strides (``None``: contiguous).
Meta: TypeAlias = "tuple[int, int, tuple[int, ...], tuple[int, ...] | None]"


class Place(NamedTuple):
    """A buffer of the sender.

    Attributes:
        number: By which items name it.
        segment: Of shared memory that it is in.
        address: Where it is in the sender.
        nbytes: Its size.
        key: Of its export; empty if it has none.
    """

    number: int
    segment: int
    address: int
    nbytes: int
    key: bytes


class Item(NamedTuple):
    """A frame about an item.

    Attributes:
        number: Of the item, counted from 1.
        offset: Where its tensors begin in the buffer, each at the next multiple of 64 bytes.
        metas: They.
        rest: The tree around them, pickled; empty: there is only the one tensor.
        place: The buffer; ``None``: there are no bytes in any.
        payload: The bytes themselves, where they are few and the receiver is far; else ``None``.
    """

    number: int
    offset: int
    metas: tuple[Meta, ...]
    rest: bytes
    place: Place | None
    payload: bytes | None = None


def keys(secret: bytes, channel: bytes, index: int) -> tuple[bytes, bytes]:
    """The keys of one receiver's connection: of what the sender says, and of what it hears."""
    made = [
        hashlib.blake2b(b"%s %d %s" % (channel, index, way), key=secret, digest_size=32).digest()
        for way in (b"items", b"credits")
    ]
    return made[0], made[1]


def stream_id(channel: bytes, index: int) -> bytes:
    """Names the connection of one receiver."""
    return hashlib.blake2b(b"channel %d" % index, key=channel, digest_size=16).digest()


def pack_item(item: Item) -> list[bytes]:
    """The payloads of the frames of an item."""
    rest = item.rest
    pieces = []
    while len(rest) > PIECE_NBYTES:
        pieces.append(bytes((MORE,)) + rest[:PIECE_NBYTES])
        rest = rest[PIECE_NBYTES:]
    body: bytes = msgpack.packb(
        (item.number, item.offset, item.metas, rest, item.place, item.payload)
    )
    return [*pieces, bytes((ITEM,)) + body]


def unpack_item(body: bytes, before: bytes) -> Item:
    """An item, from its last frame and from what came in the pieces before."""
    number, offset, metas, rest, place, payload = _unpacked(body, 6)
    return Item(
        number, offset, metas, before + rest, None if place is None else Place(*place), payload
    )


def pack_end(why: str) -> bytes:
    """The payload of the frame that ends a channel; ``why``: it failed."""
    return bytes((END,)) + why.encode()


def pack_credit(numbers: list[int]) -> bytes:
    """The payload of a frame about items that are done with."""
    data: bytes = msgpack.packb(numbers)
    return bytes((CREDIT,)) + data


def pack_leave(held: list[int]) -> bytes:
    """The payload of a receiver's last words, but for credits of what it still holds."""
    data: bytes = msgpack.packb(held)
    return bytes((LEAVE,)) + data


def unpack_numbers(body: bytes) -> list[int]:
    """The items that a receiver's frame names."""
    numbers = _unpacked(body, None)
    if not all(type(number) is int for number in numbers):
        raise ProtocolViolationError("a list of items was expected")
    return list(numbers)


def _unpacked(body: bytes, length: int | None) -> tuple[Any, ...]:
    try:
        values = msgpack.unpackb(body, use_list=False)
    except (ValueError, TypeError) as exc:
        raise ProtocolViolationError("not a frame of a channel") from exc
    if type(values) is not tuple or (length is not None and len(values) != length):
        raise ProtocolViolationError("not a frame of a channel")
    return values


class Parser:
    """Frames out of a stream of bytes."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self._left = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The frames that are whole now: kind and body.

        Raises:
            ProtocolViolationError: One was altered, or is none (CHF-1).
        """
        if self._left:
            data = self._left + data
        start, end = 0, len(data)
        while end - start >= HEADER.size:
            length = frame_length(data[start : start + HEADER.size])
            start += HEADER.size
            if end - start < length:
                start -= HEADER.size
                break
            payload = self._sealer.open(data[start : start + length])
            start += length
            if not payload:
                raise ProtocolViolationError("an empty frame of a channel")
            yield payload[0], payload[1:]
        self._left = data[start:]
