"""Bytes on the wire: tensor metadata, control frames, the handshake. Pure: no I/O, no clock.

Every format starts with a version and ends with an extension map, so that a newer peer can
add facts that an older one ignores. Lengths are bounded before anything is parsed, and
nothing is ever unpickled.

Invariants:
    WIRE-1  A frame that was altered, repeated, left out, reordered or reflected is refused.
    WIRE-2  Any byte string decodes to a message or raises `ProtocolViolationError`.
    WIRE-3  A handshake answer is of use only for the nonces and ids it was made for.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import msgpack

from aiordt._errors import ProtocolViolationError
from aiordt._layout import Cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VERSION: Final = 1
MAX_FRAME: Final = 2 << 20
MAX_HANDSHAKE: Final = 1 << 10
NONCE_NBYTES: Final = 16
KEY_NBYTES: Final = 16
_MAX_DIMS: Final = 64  # PyTorch's limit
#: A frame's length, and its complement: whoever took a garbled one for it would wait for ever.
HEADER: Final = struct.Struct("!II")
_ALL_BITS: Final = 0xFFFFFFFF
_MAC_NBYTES: Final = 16
_SEQUENCE: Final = struct.Struct("!Q")


def new_key() -> bytes:
    """A key that nobody can guess."""
    return os.urandom(KEY_NBYTES)


# --- tensors -------------------------------------------------------------------------------

FLAG_REQUIRES_GRAD: Final = 1
FLAG_PARAMETER: Final = 2
FLAG_NUMPY: Final = 4
#: Its owner never writes to it again.
FLAG_FROZEN: Final = 8
#: Whoever pulls it checks what came.
FLAG_CHECKED: Final = 16


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """What a consumer must know of one exported tensor.

    Attributes:
        dtype: Code of the dtype (`aiordt._types.DTYPES`).
        flags: ``FLAG_*`` bits.
        shape: Sizes, in elements.
        stride: Strides in elements; ``None`` when contiguous.
        address: Address of element 0 in the owner; 0 when inline, unless the bytes are shared with
            another tensor of the export.
        segment: Number of the owner's shared segment that it is in; 0: in none.
        device: Where the owner has it; empty: in host memory.
        offset: Of element 0 from that of the exported tensor, in bytes; ``None``: it is the
            exported tensor, and no slice of it.
    """

    dtype: int
    flags: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    address: int
    segment: int = 0
    device: str = ""
    offset: int | None = None


def pack_meta(meta: TensorMeta) -> bytes:
    """Encode ``meta``: about 20 bytes for a contiguous matrix."""
    fields: tuple[object, ...] = (meta.dtype, meta.flags, meta.shape, meta.stride, meta.address)
    if meta.offset is not None:
        fields += (meta.segment, meta.device, meta.offset)
    elif meta.device:
        fields += (meta.segment, meta.device)
    elif meta.segment:
        fields += (meta.segment,)
    packed: bytes = msgpack.packb(fields)
    return packed


def unpack_meta(data: bytes) -> TensorMeta:
    """Decode what `pack_meta` made; further fields are ignored."""
    return TensorMeta(*msgpack.unpackb(data, use_list=False)[:8])


#: Key of an export, number of a tensor in it, and which part of that; ``None``: all of it.
Item: TypeAlias = tuple[bytes, int, "Cut | None"]


# --- control messages ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all control messages; subclasses name their field types in ``schema``."""

    code: ClassVar[int]
    schema: ClassVar[tuple[type, ...]] = ()


@dataclass(frozen=True, slots=True)
class Pull(Message):
    """Ask an owner for tensors.

    Attributes:
        items: What of which exports.
        nbytes: Bytes of all of them together, as the asker understands it.
        streams: Ids of open payload streams to send on; empty: in the reply.
    """

    code: ClassVar[int] = 1
    schema: ClassVar[tuple[type, ...]] = (list, int, list)
    items: list[Item]
    nbytes: int
    streams: list[bytes]


@dataclass(frozen=True, slots=True)
class PullReply(Message):
    """The payload follows on the streams, or is here."""

    code: ClassVar[int] = 2
    schema: ClassVar[tuple[type, ...]] = (bytes,)
    payload: bytes


@dataclass(frozen=True, slots=True)
class Seen(Message):
    """Note to an owner: these exports were pulled by the sender. No reply."""

    code: ClassVar[int] = 3
    schema: ClassVar[tuple[type, ...]] = (list,)
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """The reply to a request that failed.

    Attributes:
        kind: Name of the error class in `aiordt._errors`.
        text: Its message.
    """

    code: ClassVar[int] = 4
    schema: ClassVar[tuple[type, ...]] = (str, str)
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """The asker of request ``number`` no longer wants its answer."""

    code: ClassVar[int] = 5
    schema: ClassVar[tuple[type, ...]] = (int,)
    number: int


@dataclass(frozen=True, slots=True)
class TransportMessage(Message):
    """A request of one transport, or the reply to it, in its own words.

    Attributes:
        transport: Its name.
        body: Anything; not to be unpickled.
    """

    code: ClassVar[int] = 6
    schema: ClassVar[tuple[type, ...]] = (str, bytes)
    transport: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """Ask an owner to answer, with the same, once its devices have made these exports."""

    code: ClassVar[int] = 7
    schema: ClassVar[tuple[type, ...]] = (list,)
    keys: list[bytes]


_MESSAGES: Final[dict[int, type[Message]]] = {
    cls.code: cls for cls in (Pull, PullReply, Seen, Failure, Cancel, TransportMessage, Ready)
}

KIND_REQUEST: Final = 0
KIND_REPLY: Final = 1
KIND_NOTE: Final = 2


def encode(kind: int, number: int, message: Message) -> bytes:
    """Encode one control message.

    Args:
        kind: ``KIND_*``.
        number: Of the request, or of the request that is answered.
        message: The body.
    """
    body: list[object]
    if isinstance(message, Pull):
        body = [_grouped(message.items), message.nbytes, message.streams]
    else:
        body = [getattr(message, field.name) for field in fields(message)]
    data: bytes = msgpack.packb((VERSION, kind, number, message.code, body, {}))
    return data


def decode(data: bytes) -> tuple[int, int, Message]:
    """Decode what `encode` made, checking every type.

    Raises:
        ProtocolViolationError: ``data`` is not such a message (WIRE-2).
    """
    version, kind, number, code, body, _ = _unpack_list(data, 6, "a control message")
    if version != VERSION:
        raise ProtocolViolationError(f"control message of version {version!r}, not {VERSION}")
    cls = _MESSAGES.get(code) if type(code) is int else None
    if cls is None or type(body) is not list or len(body) < len(cls.schema):
        raise ProtocolViolationError(f"unknown control message {code!r}")
    if type(kind) is not int or not 0 <= kind <= KIND_NOTE or type(number) is not int:
        raise ProtocolViolationError(f"control message of unknown kind {kind!r}")
    values = body[: len(cls.schema)]
    for value, expected in zip(values, cls.schema, strict=True):
        if type(value) is not expected or (isinstance(value, int) and value < 0):
            raise ProtocolViolationError(f"{cls.__name__}: {expected.__name__} expected")
    if cls is Pull:
        values = [_checked_items(values[0]), values[1], _checked_ids(values[2])]
    elif cls is Seen or cls is Ready:
        values = [_checked_ids(values[0])]
    return kind, number, cls(*values)


def _checked_ids(values: list[Any]) -> list[bytes]:
    if not all(type(value) is bytes and len(value) == KEY_NBYTES for value in values):
        raise ProtocolViolationError("a list of 16-byte ids was expected")
    return values


def _grouped(items: Iterable[Item]) -> list[tuple[bytes, list[object]]]:
    """Items as they travel: each key once, with the rows that it is the key of."""
    groups: list[tuple[bytes, list[object]]] = []
    rows: list[object] = []
    last: bytes | None = None
    for key, index, cut in items:
        if key != last:
            rows = []
            groups.append((key, rows))
            last = key
        rows.append(
            index
            if cut is None
            else (index, cut.offset, cut.shape, cut.stride, cut.itemsize, cut.dtype)
        )
    return groups


def _checked_items(groups: list[Any]) -> list[Item]:
    items: list[Item] = []
    for group in groups:
        if type(group) is not list or len(group) != 2:
            raise ProtocolViolationError("a list of keys and rows was expected")
        key, rows = group
        if type(key) is not bytes or type(rows) is not list:
            raise ProtocolViolationError("a list of keys and rows was expected")
        for row in rows:
            if type(row) is int and row >= 0:
                items.append((key, row, None))
            elif type(row) is list and row and _is_size(row[0]):
                items.append((key, row[0], _checked_cut(row[1:])))
            else:
                raise ProtocolViolationError("an index, or an index and a cut, was expected")
    return items


def _checked_cut(value: list[Any]) -> Cut:
    if len(value) >= 5:
        offset, shape, stride, itemsize, dtype = value[:5]
        if (
            _is_size(offset)
            and type(shape) is list
            and type(stride) is list
            and len(shape) == len(stride) <= _MAX_DIMS
            and all(map(_is_size, [*shape, *stride, itemsize]))
            and itemsize
            and all(step or size <= 1 for size, step in zip(shape, stride, strict=True))
            and (dtype is None or _is_size(dtype))
        ):
            return Cut(offset, tuple(shape), tuple(stride), itemsize, dtype)
    raise ProtocolViolationError("a malformed cut of a tensor")


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def pack_items(items: Sequence[Item]) -> bytes:
    """Encode items for a `TransportMessage`."""
    data: bytes = msgpack.packb(_grouped(items))
    return data


def unpack_items(data: bytes) -> list[Item]:
    """Decode and check what `pack_items` made.

    Raises:
        AiordtError: It is not that.
    """
    return _checked_items(list(_unpack_list(data, 0, "a list of items")))


class Sealer:
    """One direction of an authenticated connection: frames with a MAC and a sequence number."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sequence = 0

    def _mac(self, payload: bytes) -> bytes:
        digest = blake2b(_SEQUENCE.pack(self._sequence), key=self._key, digest_size=_MAC_NBYTES)
        digest.update(payload)
        self._sequence += 1
        return digest.digest()

    def seal(self, payload: bytes) -> bytes:
        """A whole frame: length, MAC, payload.

        Raises:
            ProtocolViolationError: The payload is longer than a frame may be.
        """
        length = _MAC_NBYTES + len(payload)
        if length > MAX_FRAME:
            raise ProtocolViolationError(f"a frame of {length} bytes; {MAX_FRAME} is the limit")
        return pack_header(length) + self._mac(payload) + payload

    def open(self, body: bytes) -> bytes:
        """The payload of a frame whose header has been read.

        Raises:
            ProtocolViolationError: The MAC is wrong (WIRE-1).
        """
        payload = body[_MAC_NBYTES:]
        if not hmac.compare_digest(self._mac(payload), body[:_MAC_NBYTES]):
            raise ProtocolViolationError("a frame's authentication code is wrong")
        return payload


def pack_header(length: int) -> bytes:
    """The header of a frame of that many bytes."""
    return HEADER.pack(length, length ^ _ALL_BITS)


def frame_length(header: bytes, *, limit: int = MAX_FRAME) -> int:
    """The length that a frame's header announces.

    Raises:
        ProtocolViolationError: It is over ``limit``, or nothing would follow.
    """
    length, complement = HEADER.unpack(header)
    if length ^ complement != _ALL_BITS:
        raise ProtocolViolationError("the length of a frame was garbled on its way")
    if not 0 < length <= limit:
        raise ProtocolViolationError(f"a frame of {length} bytes; {limit} is the limit")
    return int(length)


# --- handshake -----------------------------------------------------------------------------

CONTROL: Final = "control"
STREAM: Final = "stream"


@dataclass(frozen=True, slots=True)
class Hello:
    """What a connecting process says first.

    Attributes:
        purpose: ``CONTROL`` or ``STREAM``.
        client: Runtime id of the connecting process.
        server: Runtime id of the process it wants.
        nonce: Fresh random bytes.
        stream: Id of the stream, for ``STREAM``.
    """

    purpose: str
    client: bytes
    server: bytes
    nonce: bytes
    stream: bytes


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's answer, which proves that it knows the secret."""

    nonce: bytes
    proof: bytes


def pack_hello(hello: Hello) -> bytes:
    """Encode a `Hello`."""
    data: bytes = msgpack.packb(
        (VERSION, hello.purpose, hello.client, hello.server, hello.nonce, hello.stream, {})
    )
    return data


def unpack_hello(data: bytes) -> Hello:
    """Decode and check a `Hello`.

    Raises:
        ProtocolViolationError: It is not one, or of another version.
    """
    version, purpose, client, server, nonce, stream, _ = _unpack_handshake(data, 7)
    if version != VERSION:
        raise ProtocolViolationError(f"handshake of version {version!r}, not {VERSION}")
    if type(purpose) is not str or purpose not in {CONTROL, STREAM}:
        raise ProtocolViolationError(f"handshake for unknown purpose {purpose!r}")
    for value in (client, server, nonce):
        if type(value) is not bytes or len(value) != NONCE_NBYTES:
            raise ProtocolViolationError("handshake with a malformed id or nonce")
    if type(stream) is not bytes or len(stream) != (NONCE_NBYTES if purpose == STREAM else 0):
        raise ProtocolViolationError("handshake with a malformed stream id")
    return Hello(purpose, client, server, nonce, stream)


def pack_challenge(challenge: Challenge) -> bytes:
    """Encode a `Challenge`."""
    data: bytes = msgpack.packb((VERSION, challenge.nonce, challenge.proof, {}))
    return data


def unpack_challenge(data: bytes) -> Challenge:
    """Decode and check a `Challenge`.

    Raises:
        ProtocolViolationError: It is not one, or of another version.
    """
    version, nonce, proof, _ = _unpack_handshake(data, 4)
    if version != VERSION or type(nonce) is not bytes or type(proof) is not bytes:
        raise ProtocolViolationError("malformed answer in the handshake")
    if len(nonce) != NONCE_NBYTES:
        raise ProtocolViolationError("handshake with a malformed nonce")
    return Challenge(nonce, proof)


def _unpack_handshake(data: bytes, num_fields: int) -> Sequence[Any]:
    if len(data) > MAX_HANDSHAKE:
        raise ProtocolViolationError("not a handshake: too long")
    return _unpack_list(data, num_fields, "a handshake")


def _unpack_list(data: bytes, num_fields: int, what: str) -> Sequence[Any]:
    """The first fields of a msgpack list; what a newer peer appended is ignored."""
    try:
        values = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as exc:
        raise ProtocolViolationError(f"not {what}: {type(exc).__name__}") from exc
    if type(values) is not list or len(values) < num_fields:
        raise ProtocolViolationError(f"not {what}")
    return values[:num_fields] if num_fields else values


def proof(secret: bytes, role: bytes, hello: Hello, server_nonce: bytes) -> bytes:
    """What the end in ``role`` answers to show that it knows ``secret`` (WIRE-3).

    The transcript is part of it, so an answer cannot be used for other ids, another
    purpose, another direction or another time.
    """
    transcript = b"".join((b"aiordt/1 ", role, b" ", pack_hello(hello), server_nonce))
    return hmac.digest(secret, transcript, "sha256")


def sealers(secret: bytes, hello: Hello, server_nonce: bytes) -> tuple[Sealer, Sealer]:
    """The sealers of a connection: client to server, server to client."""
    return (
        Sealer(proof(secret, b"key client to server", hello, server_nonce)),
        Sealer(proof(secret, b"key server to client", hello, server_nonce)),
    )
