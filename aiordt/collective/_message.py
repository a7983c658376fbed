"""Messages from one member to another.

Small ones are sent with their description, and their sender does not wait. For a larger one the
receiver reads the sender's memory where it can; where it cannot, it asks for piece by piece. A
backend that has messages of its own carries them instead.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.autograd.graph import increment_version

from aiordt._errors import OwnerDiedError, UsageError
from aiordt._memory import view_memory
from aiordt._types import KIB, MIB
from aiordt.collective import _bundle
from aiordt.collective._rules import Descriptor, agree
from aiordt.collective._steps import Step
from aiordt.transports.cma import CmaLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.collective._bundle import Unit
    from aiordt.collective._engine import Engine
    from aiordt.collective._steps import Steps

_LENGTH: Final = struct.Struct("!I")
_ADDRESS: Final = struct.Struct("!Q")
#: Up to here the payload is sent with its description.
INLINE_NBYTES: Final = 16 * KIB
_PIECE_NBYTES: Final = 512 * KIB
_CHUNK_NBYTES: Final = 4 * MIB
_DONE: Final = b"d"
_REFUSED: Final = b"r"
_ASK: Final = b"a"
_GO: Final = b"g"


class Carrier(Protocol):
    """A backend that has messages of its own."""

    def next_number(self) -> int:
        """By which a message that is about to come is known to both ends."""

    def give(self, flats: Sequence[torch.Tensor], other: int, number: int) -> Steps:
        """Send the payload of a message."""

    def take(self, flats: Sequence[torch.Tensor], other: int, number: int) -> Steps:
        """Receive the payload of a message."""


def _described(tensors: Sequence[torch.Tensor]) -> Descriptor:
    return Descriptor("message", specs=_bundle.specs_of(tensors))


def send(tensors: Sequence[torch.Tensor], other: int, carrier: Carrier | None) -> Steps:
    """The sender's steps."""
    described = _described(tensors)
    head = described.pack()
    units = _bundle.plan(described.specs or (), 1, cutting=False)
    flats = [_bundle.packed(unit, tensors, cutting=False) for unit in units]
    offer = [_LENGTH.pack(len(head)), head]
    views = [view_memory(flat.data_ptr(), flat.nbytes) for flat in flats]
    if sum(flat.nbytes for flat in flats) <= INLINE_NBYTES:
        offer += map(bytes, views)
        yield Step(b"".join(offer), wait=False)
        return
    offer += [_ADDRESS.pack(flat.data_ptr()) for flat in flats]
    heard = (yield Step(b"".join(offer)))[other]
    if carrier is not None and heard[:1] == _GO:
        yield from carrier.give(flats, other, int.from_bytes(heard[1:]))
        return
    while heard[:1] == _ASK:
        number, start = struct.unpack("!QQ", heard[1:])
        heard = (yield Step(bytes(views[number][start : start + _PIECE_NBYTES])))[other]
    if heard[:1] == _REFUSED:
        raise UsageError(heard[1:].decode())


def receive(
    tensors: Sequence[torch.Tensor],
    other: int,
    engine: Engine,
    way: CmaLink | Carrier | None,
) -> Steps:
    """The receiver's steps; it receives into the tensors."""
    described = _described(tensors)
    offer = (yield Step(None))[other]
    (length,) = _LENGTH.unpack_from(offer)
    head, tail = offer[4 : 4 + length], offer[4 + length :]
    theirs = Descriptor.unpack(head)
    inline = sum(spec.nbytes for spec in theirs.specs or ()) <= INLINE_NBYTES
    try:
        agree([described.pack(), head])
    except UsageError:
        text = (
            f"{engine.label(other)} sent {theirs}, but {engine.label(engine.rank)} receives "
            f"{described}"
        ).replace("message(", "(")
        if not inline:
            yield Step(_REFUSED + text.encode(), wait=False)
        raise UsageError(text) from None
    units = _bundle.plan(described.specs or (), 1, cutting=False)
    flats = [_room(unit, tensors) for unit in units]
    if inline:
        start = 0
        for flat in flats:
            view = view_memory(flat.data_ptr(), flat.nbytes, writable=True)
            view[:] = tail[start : start + len(view)]
            start += len(view)
    else:
        yield from _fetch(flats, tail, other, engine, way)
    for unit, flat in zip(units, flats, strict=True):
        parts = _bundle.unpacked(flat, unit.specs)
        for place, part in zip(unit.places, parts, strict=True):
            if part.data_ptr() != tensors[place].data_ptr():
                tensors[place].copy_(part)
            increment_version(tensors[place])  # written to behind autograd's back


def _fetch(
    flats: Sequence[torch.Tensor],
    tail: bytes,
    other: int,
    engine: Engine,
    way: CmaLink | Carrier | None,
) -> Steps:
    """Get a payload of which the sender said ``tail``."""
    if isinstance(way, CmaLink):
        addresses = [pair[0] for pair in _ADDRESS.iter_unpack(tail)]
        for flat, address in zip(flats, addresses, strict=True):
            _read(way, address, flat, engine, other)
    elif way is not None:
        number = way.next_number()
        yield Step(_GO + number.to_bytes(4), wait=False)
        yield from way.take(flats, other, number)
        return
    else:
        for number, flat in enumerate(flats):
            view = view_memory(flat.data_ptr(), flat.nbytes, writable=True)
            for start in range(0, len(view), _PIECE_NBYTES):
                piece = (yield Step(_ASK + struct.pack("!QQ", number, start)))[other]
                view[start : start + len(piece)] = piece
    yield Step(_DONE, wait=False)


def _room(unit: Unit, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where a unit is received: in its tensor itself, if it can."""
    flat = _bundle.flat_view(tensors[unit.places[0]]) if len(unit.places) == 1 else None
    return torch.empty(unit.numel, dtype=unit.dtype) if flat is None else flat


def _read(link: CmaLink, address: int, flat: torch.Tensor, engine: Engine, other: int) -> None:
    try:
        for start in range(0, flat.nbytes, _CHUNK_NBYTES):
            some = min(_CHUNK_NBYTES, flat.nbytes - start)
            link.copy(address + start, flat.data_ptr() + start, some)
            if start % (64 * MIB) == 0:
                engine.attend()
        alive = link.alive  # CMA-2
    except OwnerDiedError:
        alive = False
    if not alive:
        label = engine.label(other)
        raise OwnerDiedError(f"{label} is gone", owner=label)
