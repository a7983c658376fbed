"""One collective on host or device memory: agree, move, give out.

Small payloads travel with the descriptors, so that such a call is one exchange, and is reduced
by every member in rank order: the same bits everywhere. Larger ones are moved by a backend.
"""

from __future__ import annotations

import functools
import struct
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version
from typing_extensions import override

from aiordt._device import layer
from aiordt._errors import InvalidTypeError, InvalidValueError, ProtocolViolationError
from aiordt._memory import from_raw_bytes, view_memory
from aiordt._types import KIB, MIB
from aiordt.collective import _bundle
from aiordt.collective._engine import UNTAGGED
from aiordt.collective._kernels import Reduction, array_of, reduce_arrays
from aiordt.collective._rules import (
    CUTTING,
    FROM_ROOT,
    REDUCING,
    Descriptor,
    Spec,
    agree,
    check_reduction,
    working_dtype,
)
from aiordt.collective._steps import Step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from aiordt._device import Event
    from aiordt._memory import Pool
    from aiordt.collective._bundle import Unit
    from aiordt.collective._steps import Steps

#: Up to here, over all other members, the payload travels with the descriptor. For two members
#: 128 KiB take 165 µs so, of which the loop is busy for less than 100, and 450 by a `Mover`.
_INLINE_TOTAL_NBYTES: Final = 128 * KIB
#: ... but always up to here.
_INLINE_LEAST_NBYTES: Final = 4 * KIB
_LENGTH: Final = struct.Struct("!I")


@dataclass(slots=True)
class Call:
    """A collective as one member sees it.

    Attributes:
        kind: Which one.
        rank: Of this member.
        size: Of the group.
        op: The reduction.
        root: The member that it is to or from; -1: none.
        tensors: This member's, detached; ``None``: it brings none.
        extra: The tree around them, where others must rebuild it.
        inplace: Whether results go into the tensors.
        lane: The sequence of calls that it belongs to.
        number: Which one of it; known once it runs.
        ready: When the device has made the tensors.
        done: When it has made the results.
        pool: Where memory for results comes from.
    """

    kind: str
    rank: int
    size: int
    op: str = ""
    root: int = -1
    tensors: list[torch.Tensor] | None = None
    extra: object = None
    inplace: bool = True
    lane: int = UNTAGGED
    number: int = -1
    ready: Event | None = None
    done: Event | None = None
    pool: Pool | None = None
    _asked: _Asked | None = None

    def check(self) -> None:
        """Refuse what cannot work, before anything is said.

        Raises:
            UsageError: It cannot.
        """
        if self.root >= self.size or (self.root < 0 and self.root != -1):
            raise InvalidValueError(f"{self.kind}: no rank {self.root} in a group of {self.size}")
        for tensor in self.tensors or ():
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise InvalidTypeError(f"{self.kind}: only dense tensors; this is {tensor.layout}")
            if self.kind in REDUCING:
                check_reduction(self.op, tensor.dtype)
            if self.kind in CUTTING and tensor.dim() == 0:
                raise InvalidValueError(f"{self.kind}: a scalar cannot be cut along dimension 0")
        devices = {tensor.device for tensor in self.tensors or ()}
        if len(devices) > 1:
            raise InvalidValueError(f"{self.kind}: tensors on {sorted(map(str, devices))}")

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    @property
    def receives(self) -> bool:
        """Whether this member gets a result."""
        return self.root in {-1, self.rank} or self.kind in FROM_ROOT

    @property
    def light(self) -> bool:
        """Whether it is one exchange and some arithmetic."""
        if self.tensors is None:
            return self.kind == "barrier"  # in a scatter, who brings nothing does not know
        return self.asked().inline

    @property
    def others(self) -> list[int]:
        """The other ranks, beginning with the next: not all at the same one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """New memory for a result; warm if it is host memory."""
        if self.pool is not None and self.device.type == "cpu":
            return self.pool.empty((numel,), dtype)
        return torch.empty(numel, dtype=dtype, device=self.device)

    @override
    def __str__(self) -> str:
        return str(self.asked().descriptor)

    def asked(self) -> _Asked:
        """What it asks for, once that has been checked."""
        if self._asked is None:
            kinds, device = None, ""
            if self.tensors is not None:
                kinds = tuple([(tensor.shape, tensor.dtype) for tensor in self.tensors])
                device = self.device.type
            self._asked = _asked(self.kind, self.op, self.root, device, kinds=kinds, size=self.size)
            if self.extra is not None:
                made = replace(self._asked.descriptor, extra=self.extra)
                self._asked = _Asked.of(made, self.size)
        return self._asked


class _Asked(NamedTuple):
    """What is asked for, and what follows from that alone.

    Attributes:
        descriptor: That.
        packed: As bytes.
        inline: Whether payloads travel with it.
        units: The buffers.
    """

    descriptor: Descriptor
    packed: bytes
    inline: bool
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, descriptor: Descriptor, size: int) -> _Asked:
        """In a group of ``size``."""
        kind, specs, packed = descriptor.kind, descriptor.specs, descriptor.pack()
        if specs is None:
            return cls(descriptor, packed, inline=False, units=())
        nbytes = sum([spec.nbytes for spec in specs])
        inline = descriptor.device in {"", "cpu"} and nbytes <= inline_nbytes(size)
        return cls(descriptor, packed, inline, _bundle.plan(specs, size, cutting=kind in CUTTING))


@functools.lru_cache(maxsize=256)  # the same calls come again and again: 10 µs of a small one
def _asked(
    kind: str,
    op: str,
    root: int,
    device: str,
    *,
    kinds: tuple[tuple[torch.Size, torch.dtype], ...] | None,
    size: int,
) -> _Asked:
    specs = None if kinds is None else tuple(Spec(tuple(shape), dtype) for shape, dtype in kinds)
    return _Asked.of(Descriptor(kind, op, root, device, specs), size)


@dataclass(slots=True)
class Buffers:
    """One unit of a call.

    Attributes:
        unit: Which tensors.
        source: What this member brings; empty if it brings nothing.
        out: Where its result goes; empty if it gets none.
        owned: Whether ``source`` is memory of ours, not the caller's.
    """

    unit: Unit
    source: torch.Tensor
    out: torch.Tensor
    owned: bool


class Mover(ABC):
    """Moves payloads that do not travel with descriptors."""

    def check(self, call: Call) -> None:  # noqa: B027  (most can do all)
        """Refuse what this backend cannot do, before anything is said.

        Raises:
            UsageError: It cannot.
        """

    def announce(self, call: Call) -> bytes:  # noqa: ARG002
        """What to say along with the descriptor."""
        return b""

    def within(self, call: Call) -> AbstractContextManager[object]:  # noqa: ARG002
        """Where its buffers are filled and emptied: a stream of a device, say."""
        return nullcontext()

    @abstractmethod
    def move(
        self, call: Call, buffers: Sequence[Buffers], announced: Sequence[memoryview]
    ) -> Steps:
        """Fill the ``out`` of all buffers.

        Args:
            call: The call.
            buffers: Its units.
            announced: What each rank said along with its descriptor.
        """


def collective(call: Call, mover: Mover) -> Steps:
    """The steps of a collective; its outcome is what `_outcome` gives."""
    asked = call.asked()
    head = asked.packed
    says: list[bytes | memoryview] = [_LENGTH.pack(len(head)), head]
    if asked.inline and (call.kind not in FROM_ROOT or call.rank == call.root):
        flats = _inlined(call, asked.units)
        says += [view_memory(flat.data_ptr(), flat.nbytes) for flat in flats]
    elif not asked.inline and call.tensors is not None:
        says.append(mover.announce(call))
    heard = yield Step(b"".join(says))
    heads, tails = zip(*map(_split, heard), strict=True)
    if any(other != head for other in heads):
        asked = _Asked.of(agree(heads), call.size)
    agreed, _, inline, units = asked
    specs = agreed.specs
    if specs is None:
        if call.kind == "barrier":
            return None
        raise ProtocolViolationError(f"{call.kind}: nobody brought a tensor")
    if inline:
        buffers = [_buffers(call, unit) for unit in units]
        _move_inlined(call, buffers, tails)
        return _outcome(call, specs, agreed.extra, buffers)
    with mover.within(call):
        buffers = [_buffers(call, unit) for unit in units]
    yield from mover.move(call, buffers, tails)
    with mover.within(call):
        outcome = _outcome(call, specs, agreed.extra, buffers)
        if agreed.device not in {"", "cpu"}:
            call.done = layer(call.device).record(call.device)
    return outcome


def refusal(call: Call, error: str) -> Steps:
    """The steps of a call that failed here before it began: all members raise ``error``."""
    head = Descriptor(call.kind, error=error).pack()
    heard = yield Step(b"".join((_LENGTH.pack(len(head)), head)))
    agree([_split(each)[0] for each in heard])


def inline_nbytes(size: int) -> int:
    """How many bytes travel with the descriptor in a group of this size."""
    return max(_INLINE_LEAST_NBYTES, _INLINE_TOTAL_NBYTES // max(1, size - 1))


def _split(said: bytes) -> tuple[bytes, memoryview]:
    (length,) = _LENGTH.unpack_from(said)
    return said[4 : 4 + length], memoryview(said)[4 + length :]


def _inlined(call: Call, units: Sequence[Unit]) -> list[torch.Tensor]:
    """What a small call brings, flat."""
    cutting = call.kind in CUTTING
    return [_bundle.packed(unit, call.tensors or [], cutting=cutting) for unit in units]


def _buffers(call: Call, unit: Unit) -> Buffers:
    """The memory of a unit; what is packed is packed here."""
    cutting = call.kind in CUTTING
    device = call.device
    brings = call.tensors is not None and (call.kind not in FROM_ROOT or call.rank == call.root)
    source = None
    owned = True
    if call.tensors is not None and (brings or call.kind == "broadcast"):
        flat = None
        if len(unit.places) == 1:
            flat = _bundle.flat_view(call.tensors[unit.places[0]])
        owned = flat is None
        if flat is not None:
            source = flat
        elif brings:
            source = _bundle.packed(unit, call.tensors, cutting=cutting)
        else:
            source = call.empty(unit.numel, unit.dtype)
    if source is None:
        source = torch.empty(0, dtype=unit.dtype, device=device)
    if not call.receives:
        return Buffers(unit, source, torch.empty(0, dtype=unit.dtype, device=device), owned)
    if call.kind in {"allreduce", "reduce", "broadcast"}:
        reuse = owned or call.inplace
        out = source if reuse else call.empty(source.numel(), unit.dtype)
        return Buffers(unit, source, out, owned)
    piece = unit.bounds[call.rank + 1] - unit.bounds[call.rank]
    numel = {
        "allgather": call.size * unit.numel,
        "gather": call.size * unit.numel,
        "alltoall": call.size * piece,
    }.get(call.kind, piece)
    return Buffers(unit, source, call.empty(numel, unit.dtype), owned)


def _move_inlined(call: Call, buffers: Sequence[Buffers], tails: Sequence[memoryview]) -> None:
    """Fill every ``out`` from what came with the descriptors."""
    start = 0
    for each in buffers:
        if each.out.numel():
            _give(call, each, tails, start)
        start += each.unit.nbytes


def _give(call: Call, each: Buffers, tails: Sequence[memoryview], offset: int) -> None:
    """Compute the ``out`` of a unit from the bytes that every rank brought.

    Args:
        call: The call.
        each: The unit.
        tails: The bytes of all units, by rank.
        offset: Where those of this unit begin.
    """
    unit, out, itemsize = each.unit, each.out, each.unit.dtype.itemsize
    first, last = 0, unit.numel
    if call.kind in CUTTING:
        first, last = unit.bounds[call.rank], unit.bounds[call.rank + 1]
    low, high = offset + first * itemsize, offset + last * itemsize
    if call.kind not in REDUCING:
        chosen = [tails[call.root]] if call.kind in FROM_ROOT else tails
        target = view_memory(out.data_ptr(), out.nbytes, writable=True)
        target[:] = b"".join([tail[low:high] for tail in chosen])
    elif working_dtype(unit.dtype) is unit.dtype:
        array = array_of(out)
        sources = [np.frombuffer(tail, array.dtype, last - first, low) for tail in tails]
        reduce_arrays(call.op, sources, array, None)
    else:
        pieces = [from_raw_bytes(tail[low:high], out.shape, out.dtype) for tail in tails]
        Reduction(call.op, unit.dtype)(pieces, out, torch.empty(out.numel()))


def _outcome(
    call: Call, specs: Sequence[Spec], extra: object, buffers: Sequence[Buffers]
) -> tuple[object, Any]:
    """The results by tensor, and the tree around them where another member said it.

    A list of tensors; for `allgather` and `gather` a list of such lists, by rank; ``None``
    where this member gets nothing.
    """
    if not call.receives:
        return extra, None
    if call.kind in {"allgather", "gather"}:
        by_rank: list[list[Any]] = [[None] * len(specs) for _ in range(call.size)]
        for each in buffers:
            numel = each.unit.numel
            for rank, found in enumerate(by_rank):
                flat = each.out[rank * numel : (rank + 1) * numel]
                _place(found, each.unit, flat, each.unit.specs)
        return extra, by_rank
    found = [None] * len(specs)
    for each in buffers:
        pieces = each.unit.specs
        if call.kind in CUTTING:
            pieces = tuple(_bundle.piece_spec(spec, call.size, call.rank) for spec in pieces)
        if call.kind == "alltoall":
            _place_exchanged(found, call, each, pieces)
        elif call.inplace and call.kind not in CUTTING:
            _write_back(found, call, each)
        else:
            _place(found, each.unit, each.out, pieces)
    return extra, found


def _write_back(found: list[Any], call: Call, each: Buffers) -> None:
    """Results in the tensors that the call was made with."""
    assert call.tensors is not None  # noqa: S101  (in place, so there are some)
    if each.owned:
        views = _bundle.unpacked(each.out, each.unit.specs)
        for place, view in zip(each.unit.places, views, strict=True):
            call.tensors[place].copy_(view)
    for place in each.unit.places:
        found[place] = call.tensors[place]
        increment_version(found[place])  # written to behind autograd's back


def _place(found: list[Any], unit: Unit, flat: torch.Tensor, specs: Sequence[Spec]) -> None:
    views = _bundle.unpacked(flat, specs)
    for place, view in zip(unit.places, views, strict=True):
        # A view of a small one would keep the whole buffer alive.
        alone = view.nbytes == flat.untyped_storage().nbytes() or view.nbytes >= MIB
        found[place] = view if alone else view.clone()


def _place_exchanged(found: list[Any], call: Call, each: Buffers, pieces: Sequence[Spec]) -> None:
    """Lay what every rank sent end to end, tensor by tensor."""
    numel = sum(piece.numel for piece in pieces)
    by_rank = [
        _bundle.unpacked(each.out[rank * numel : (rank + 1) * numel], pieces)
        for rank in range(call.size)
    ]
    for number, place in enumerate(each.unit.places):
        if len(pieces) == 1:
            shape = (call.size * pieces[0].shape[0], *pieces[0].shape[1:])
            found[place] = each.out.view(shape)
        else:
            found[place] = torch.cat([views[number] for views in by_rank])
