"""The wire format: any bytes are decoded or refused, and no frame can be forged."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiordt import _wire
from aiordt._errors import ProtocolViolationError
from aiordt._layout import Cut
from aiordt._wire import Challenge, Hello, Sealer, TensorMeta
from aiordt.transports import tcp

QUICK = settings(max_examples=100, deadline=None)

IDS = st.binary(min_size=16, max_size=16)
COUNTS = st.integers(0, 2**63)
SIZES = st.integers(1, 2**40)
CUTS = st.lists(st.tuples(SIZES, SIZES), max_size=4).flatmap(
    lambda dims: st.builds(
        Cut,
        SIZES,
        st.just(tuple(size for size, _ in dims)),
        st.just(tuple(step for _, step in dims)),
        SIZES,
        st.none() | st.integers(0, 99),
    )
)
ITEMS = st.lists(st.tuples(IDS, st.integers(0, 2**31), st.none() | CUTS), max_size=5)
MESSAGES = st.one_of(
    st.builds(
        _wire.Pull,
        ITEMS,
        COUNTS,
        st.lists(IDS, max_size=3),
    ),
    st.builds(_wire.PullReply, st.binary(max_size=200)),
    st.builds(_wire.Seen, st.lists(IDS, max_size=5)),
    st.builds(_wire.Failure, st.text(), st.text()),
    st.builds(_wire.Cancel, COUNTS),
    st.builds(_wire.TransportMessage, st.text(), st.binary(max_size=200)),
)
KINDS = st.sampled_from([_wire.KIND_REQUEST, _wire.KIND_REPLY, _wire.KIND_NOTE])
HELLOS = st.one_of(
    st.builds(Hello, st.just(_wire.CONTROL), IDS, IDS, IDS, st.just(b"")),
    st.builds(Hello, st.just(_wire.STREAM), IDS, IDS, IDS, IDS),
)
# What msgpack can say at all: also well-formed nonsense is only ever refused.
NONSENSE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63),
        st.floats(),
        st.binary(max_size=20),
        st.text(max_size=8),
        st.sampled_from([1, _wire.CONTROL, _wire.STREAM, bytes(16)]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=8),
        st.dictionaries(st.one_of(st.integers(0, 9), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=20,
)


# --- WIRE-2: any bytes --------------------------------------------------------------------------


@QUICK
@given(st.binary(max_size=300))
@example(b"\xc1")
@example(b"\xdd\xff\xff\xff\xff")  # a list of 2**32 - 1 that is not there
@example(b"\x91" * 2000)  # nested deeper than any stack
@example(b"\xc7\x03\xffabc")  # a malformed timestamp
@example(b"\x81\x90\x01")  # a map with a list as its key
@example(b"\xa2\xff\xff")  # text that is not UTF-8
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:  # WIRE-2
    for decoder in (_wire.decode, _wire.unpack_hello, _wire.unpack_challenge):
        try:
            decoder(data)
        except ProtocolViolationError:
            continue


@QUICK
@given(st.lists(NONSENSE, min_size=4, max_size=8))
@example([1, [], 1, 4, ["kind", "text"], {}])  # a kind that cannot be hashed
@example([1, {}, 1, 4, ["kind", "text"], {}])
@example([1, [], bytes(16), bytes(16), bytes(16), b"", {}])  # ... and such a purpose
@example([1, 0, 1, [], [], {}])
@example([1, 0, 1, 1, [[[[], 1]], 1, []], {}])
def test_any_list_decodes_or_is_refused(values: list[object]) -> None:  # WIRE-2
    data = msgpack.packb(values)
    for decoder in (_wire.decode, _wire.unpack_hello, _wire.unpack_challenge):
        try:
            decoder(data)
        except ProtocolViolationError:
            continue


@QUICK
@given(KINDS, COUNTS, MESSAGES)
def test_messages_round_trip(kind: int, number: int, message: _wire.Message) -> None:
    data = _wire.encode(kind, number, message)
    assert _wire.decode(data) == (kind, number, message)


@QUICK
@given(KINDS, COUNTS, MESSAGES, st.data())
def test_truncated_messages_are_refused(  # WIRE-2
    kind: int, number: int, message: _wire.Message, data: st.DataObject
) -> None:
    encoded = _wire.encode(kind, number, message)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ProtocolViolationError):
        _wire.decode(encoded[:cut])


@given(MESSAGES, NONSENSE)
@QUICK
def test_what_a_newer_peer_adds_is_ignored(message: _wire.Message, more: object) -> None:
    version, kind, number, code, body, _ = msgpack.unpackb(
        _wire.encode(_wire.KIND_NOTE, 3, message), strict_map_key=False
    )
    newer = msgpack.packb([version, kind, number, code, [*body, more], {"fact": more}, more])
    assert _wire.decode(newer) == (_wire.KIND_NOTE, 3, message)


def test_another_version_is_refused_by_name() -> None:
    message = msgpack.packb([2, 0, 1, 4, ["kind", "text"], {}])
    with pytest.raises(ProtocolViolationError, match="version 2, not 1"):
        _wire.decode(message)
    hello = msgpack.packb([9, "control", bytes(16), bytes(16), bytes(16), b"", {}])
    with pytest.raises(ProtocolViolationError, match="version 9, not 1"):
        _wire.unpack_hello(hello)


@pytest.mark.parametrize(
    "body",
    [
        [[[b"k" * 16, 0, None]], -1, []],  # a negative size
        [[[b"k" * 16, -1, None]], 1, []],  # a negative index
        [[[b"k" * 16, True, None]], 1, []],  # a bool is no index
        [[["k" * 16, 0, None]], 1, []],  # a text is no key
        [[[b"k" * 16, 0]], 1, []],
        [[[b"k" * 16, 0, [0, [2], [1], 4]]], 1, []],  # a cut without its dtype
        [[[b"k" * 16, 0, [-4, [2], [1], 4, None]]], 1, []],  # ... before the tensor
        [[[b"k" * 16, 0, [0, [2], [], 4, None]]], 1, []],
        [[[b"k" * 16, 0, [0, [2], [-1], 4, None]]], 1, []],
        [[[b"k" * 16, 0, [0, [2], [0], 4, None]]], 1, []],  # one element as often as you like
        [[[b"k" * 16, 0, [0, [2], [1], 0, None]]], 1, []],
        [[[b"k" * 16, 0, [0, [2], [1], 4, "float32"]]], 1, []],
        [[[b"k" * 16, 0, [0, [1] * 65, [1] * 65, 4, None]]], 1, []],
        [[], 1, [b"short"]],
        [[], True, []],
        [[], 1],
    ],
)
def test_malformed_pulls_are_refused(body: list[object]) -> None:  # WIRE-2
    with pytest.raises(ProtocolViolationError):
        _wire.decode(msgpack.packb([1, 0, 1, _wire.Pull.code, body, {}]))


# --- WIRE-1: sealed frames ----------------------------------------------------------------------

KEY = b"k" * 32


def _body(frame: bytes) -> bytes:
    size = _wire.HEADER.size
    assert _wire.frame_length(frame[:size]) == len(frame) - size
    return frame[size:]


@QUICK
@given(st.lists(st.binary(max_size=64), max_size=6))
def test_sealed_frames_open_in_order(payloads: list[bytes]) -> None:
    sender, receiver = Sealer(KEY), Sealer(KEY)
    frames = [sender.seal(payload) for payload in payloads]
    assert [receiver.open(_body(frame)) for frame in frames] == payloads


@QUICK
@given(st.binary(min_size=0, max_size=64), st.data())
def test_altered_and_truncated_frames_are_refused(payload: bytes, data: st.DataObject) -> None:
    body = bytearray(_body(Sealer(KEY).seal(payload)))  # WIRE-1
    bit = data.draw(st.integers(0, len(body) * 8 - 1))
    altered = bytearray(body)
    altered[bit // 8] ^= 1 << (bit % 8)
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    for wrong in (altered, cut, body + b"\0"):
        with pytest.raises(ProtocolViolationError):
            Sealer(KEY).open(bytes(wrong))


def test_replayed_reordered_and_dropped_frames_are_refused() -> None:  # WIRE-1
    sender = Sealer(KEY)
    first, second, third = (_body(sender.seal(b"same")) for _ in range(3))
    receiver = Sealer(KEY)
    assert receiver.open(first) == b"same"
    with pytest.raises(ProtocolViolationError):
        receiver.open(first)  # replayed
    with pytest.raises(ProtocolViolationError):
        Sealer(KEY).open(second)  # reordered
    receiver = Sealer(KEY)
    receiver.open(first)
    with pytest.raises(ProtocolViolationError):
        receiver.open(third)  # the second was left out


def test_reflected_frames_are_refused() -> None:  # WIRE-1
    hello = Hello(_wire.CONTROL, b"c" * 16, b"s" * 16, b"n" * 16, b"")
    to_server, to_client = _wire.sealers(b"secret", hello, b"m" * 16)
    frame = _body(to_server.seal(b"hello"))
    with pytest.raises(ProtocolViolationError):
        to_client.open(frame)


def test_sealers_of_another_connection_are_different() -> None:  # WIRE-1
    hello = Hello(_wire.CONTROL, b"c" * 16, b"s" * 16, b"n" * 16, b"")
    frame = _body(_wire.sealers(b"secret", hello, b"m" * 16)[0].seal(b"hello"))
    for secret, other, nonce in (
        (b"Secret", hello, b"m" * 16),
        (b"secret", dataclasses.replace(hello, nonce=b"N" * 16), b"m" * 16),
        (b"secret", hello, b"M" * 16),
    ):
        with pytest.raises(ProtocolViolationError):
            _wire.sealers(secret, other, nonce)[0].open(frame)


def test_lengths_are_bounded_before_anything_is_read() -> None:  # WIRE-2
    limit = _wire.MAX_FRAME
    assert _wire.frame_length(_wire.pack_header(limit)) == limit
    for length in (0, limit + 1, 2**32 - 1):
        with pytest.raises(ProtocolViolationError, match="limit"):
            _wire.frame_length(_wire.pack_header(length))
    with pytest.raises(ProtocolViolationError, match="limit"):
        _wire.frame_length(_wire.pack_header(1025), limit=_wire.MAX_HANDSHAKE)
    with pytest.raises(ProtocolViolationError, match="limit"):
        Sealer(KEY).seal(bytes(limit))


@pytest.mark.parametrize("bit", range(64))
def test_a_garbled_length_is_seen_before_anybody_waits_for_so_many_bytes(bit: int) -> None:
    garbled = int.from_bytes(_wire.pack_header(1000)) ^ (1 << bit)
    with pytest.raises(ProtocolViolationError, match="garbled"):
        _wire.frame_length(garbled.to_bytes(8))


def test_a_frame_that_is_too_long_does_not_spoil_the_next() -> None:  # WIRE-1
    sender, receiver = Sealer(KEY), Sealer(KEY)
    with pytest.raises(ProtocolViolationError):
        sender.seal(bytes(_wire.MAX_FRAME))
    assert receiver.open(_body(sender.seal(b"next"))) == b"next"


# --- WIRE-3: the handshake ----------------------------------------------------------------------


@QUICK
@given(HELLOS, IDS)
def test_handshake_messages_round_trip(hello: Hello, nonce: bytes) -> None:
    assert _wire.unpack_hello(_wire.pack_hello(hello)) == hello
    challenge = Challenge(nonce, _wire.proof(b"secret", b"server", hello, nonce))
    assert _wire.unpack_challenge(_wire.pack_challenge(challenge)) == challenge
    assert len(_wire.pack_hello(hello)) <= _wire.MAX_HANDSHAKE


@QUICK
@given(HELLOS, HELLOS, IDS, IDS, st.binary(min_size=1), st.binary(min_size=1))
def test_a_proof_is_bound_to_all_it_was_made_for(  # noqa: PLR0917  (WIRE-3)
    hello: Hello, other: Hello, nonce: bytes, other_nonce: bytes, secret: bytes, wrong: bytes
) -> None:
    proof = _wire.proof(secret, b"client", hello, nonce)
    assert proof != _wire.proof(secret, b"server", hello, nonce), "direction"
    if other != hello:
        assert proof != _wire.proof(secret, b"client", other, nonce), "ids, nonce, purpose, stream"
    if other_nonce != nonce:
        assert proof != _wire.proof(secret, b"client", hello, other_nonce), "time"
    if wrong.rstrip(b"\0") != secret.rstrip(b"\0") and max(len(wrong), len(secret)) <= 64:
        assert proof != _wire.proof(wrong, b"client", hello, nonce), "secret"


@pytest.mark.parametrize("field", ["purpose", "client", "server", "nonce", "stream"])
def test_each_field_of_a_hello_changes_the_proof(field: str) -> None:  # WIRE-3
    hello = Hello(_wire.STREAM, b"c" * 16, b"s" * 16, b"n" * 16, b"t" * 16)
    changed: Any = _wire.CONTROL if field == "purpose" else b"x" * 16
    other = dataclasses.replace(hello, **{field: changed})
    one, two = (_wire.proof(b"secret", b"client", each, b"m" * 16) for each in (hello, other))
    assert one != two


@pytest.mark.parametrize(
    "fields",
    [
        ["control", b"c" * 15, b"s" * 16, b"n" * 16, b""],
        ["control", b"c" * 16, b"s" * 16, b"n" * 17, b""],
        ["control", b"c" * 16, b"s" * 16, b"n" * 16, b"t" * 16],
        ["stream", b"c" * 16, b"s" * 16, b"n" * 16, b""],
        ["other", b"c" * 16, b"s" * 16, b"n" * 16, b""],
        ["control", "c" * 16, b"s" * 16, b"n" * 16, b""],
    ],
)
def test_malformed_hellos_are_refused(fields: list[object]) -> None:  # WIRE-2
    with pytest.raises(ProtocolViolationError):
        _wire.unpack_hello(msgpack.packb([1, *fields, {}]))


def test_a_long_handshake_is_refused_unparsed() -> None:  # WIRE-2
    data = msgpack.packb([1, bytes(16), bytes(32), {"padding": bytes(2000)}])
    with pytest.raises(ProtocolViolationError, match="too long"):
        _wire.unpack_challenge(data)


# --- tensors and stripes ------------------------------------------------------------------------


@QUICK
@given(
    st.integers(0, 30),
    st.integers(0, 3),
    st.lists(st.integers(0, 2**40), max_size=6),
    st.booleans(),
    st.integers(0, 2**48),
    st.sampled_from([(), (3,), (0, "cuda:1"), (3, "cuda:0"), (0, "", 0), (3, "", 64)]),
)
def test_tensor_meta_round_trips(  # noqa: PLR0917  (drawn by hypothesis)
    dtype: int,
    flags: int,
    shape: list[int],
    strided: bool,  # noqa: FBT001  (drawn by hypothesis)
    address: int,
    rest: tuple[object, ...],
) -> None:
    stride = tuple(shape) if strided else None
    meta = TensorMeta(dtype, flags, tuple(shape), stride, address, *rest)  # type: ignore[arg-type]
    assert _wire.unpack_meta(_wire.pack_meta(meta)) == meta


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4096, 4096), None), ((64, 3, 224, 224), None), ((128, 1024), (1, 128)), ((), None)],
)
def test_the_meta_of_an_ordinary_tensor_is_small(
    shape: tuple[int, ...], stride: tuple[int, ...] | None
) -> None:
    meta = TensorMeta(0, _wire.FLAG_REQUIRES_GRAD, shape, stride, 0x7F12_3456_7890)
    assert len(_wire.pack_meta(meta)) <= 40


@QUICK
@given(st.integers(0, 1 << 34), st.integers(1, 64))
def test_stripes_cover_exactly(nbytes: int, count: int) -> None:
    cuts = tcp._stripes(nbytes, count)
    assert len(cuts) == count
    assert cuts[0][0] == 0
    assert cuts[-1][1] == nbytes
    for (start, stop), (following, _) in itertools.pairwise(cuts):
        assert start <= stop == following
    assert all(start % 4096 == 0 or start == nbytes for start, _ in cuts)


def test_keys_are_fresh() -> None:
    keys = {_wire.new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {16}


def test_a_pull_of_many_tensors_names_their_key_once() -> None:
    items: list[_wire.Item] = [(bytes(16), number, None) for number in range(10_000)]
    message = _wire.Pull(items, 1, [])
    data = _wire.encode(_wire.KIND_REQUEST, 1, message)
    assert len(data) < 40_000
    assert _wire.decode(data)[2] == message


@pytest.mark.parametrize(
    "items",
    [
        [bytes(16)], [[bytes(16)]], [[bytes(16), 3]], [["key", [3]]], [[bytes(16), [-1]]],
        [[bytes(16), [[]]]], [[bytes(16), [[0]]]], [[bytes(16), [[0, 1, [2], [1], 0, None]]]],
        [[bytes(16), ["0"]]], [[bytes(16), [[0, -1, [2], [1], 4, None]]]],
    ],
    ids=repr,
)  # fmt: skip
def test_malformed_items_are_refused(items: list[object]) -> None:  # WIRE-2
    with pytest.raises(ProtocolViolationError):
        _wire.decode(msgpack.packb([1, 0, 1, _wire.Pull.code, [items, 1, []], {}]))
