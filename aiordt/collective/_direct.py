"""Collectives within a host: every member reads the memory of the others, by the kernel.

No message carries payload and nothing is copied twice. In an allreduce every member reduces its
share, reading that of the others in pieces that fit in a core's cache; then each reads the
shares that the others made. The order is that of the ranks and each share is reduced once, so
all members get the same bits.

A member leaves a call only when all have said that they read no more of it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import torch
from typing_extensions import override

from aiordt._errors import OwnerDiedError
from aiordt._types import KIB, MIB
from aiordt.collective._bundle import plan, specs_of
from aiordt.collective._call import Mover
from aiordt.collective._kernels import reduce_pieces
from aiordt.collective._rules import CUTTING, FROM_ROOT, REDUCING, working_dtype
from aiordt.collective._steps import Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiordt.collective._call import Buffers, Call
    from aiordt.collective._engine import Engine
    from aiordt.collective._steps import Steps
    from aiordt.transports.cma import CmaLink

#: Of a reduction: small enough for the cache, large enough for a system call each.
_PIECE_NBYTES: Final = 512 * KIB
#: Of a copy.
_CHUNK_NBYTES: Final = 4 * MIB
#: After so many bytes the thread looks whether the group goes on.
_ATTEND_NBYTES: Final = 64 * MIB
_ADDRESS: Final = struct.Struct("!Q")
#: Announced: what is brought lies where the addresses say; or it will be packed first.
_HERE: Final = b"h"
_PACKED: Final = b"p"


class DirectMover(Mover):
    """Reads the memory of the other members.

    Args:
        engine: The group.
        links: To each other rank.
    """

    def __init__(self, engine: Engine, links: Mapping[int, CmaLink]) -> None:
        self._engine = engine
        self._links = links
        self._unattended = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @override
    def announce(self, call: Call) -> bytes:
        """The addresses of tensors that are read where they are: no exchange for those, then."""
        if call.kind in FROM_ROOT and call.rank != call.root:
            return _HERE
        brought = call.tensors or []
        units = plan(specs_of(brought), call.size, cutting=call.kind in CUTTING)
        tensors = [brought[unit.places[0]] for unit in units if len(unit.places) == 1]
        if len(tensors) < len(units) or not all(map(torch.Tensor.is_contiguous, tensors)):
            return _PACKED
        return _HERE + _pack(tensors)

    @override
    def move(self, call: Call, buffers: Sequence[Buffers], announced: Sequence[bytes]) -> Steps:
        if _PACKED in announced:
            heard = yield Step(_pack([each.source for each in buffers]))
            sources = list(map(_unpack, heard))
        else:
            sources = [_unpack(said[1:]) for said in announced]
        reducing = call.kind in {"allreduce", "reduce"}
        shares = [_share(call, each) if reducing else each.out for each in buffers]
        for number, (each, share) in enumerate(zip(buffers, shares, strict=True)):
            there = [found[number] if found else 0 for found in sources]
            if call.kind in REDUCING:
                self._reduce(call, each, there, share)
            else:
                self._collect(call, each, there)
        if reducing:
            heard = yield Step(_pack(shares))
            found_shares = list(map(_unpack, heard))
            for number, (each, share) in enumerate(zip(buffers, shares, strict=True)):
                self._assemble(call, each, [found[number] for found in found_shares], share)
        self._check_alive()
        yield Step(b"")

    def _reduce(self, call: Call, each: Buffers, sources: Sequence[int], out: torch.Tensor) -> None:
        """Reduce this member's share of all sources into ``out``."""
        unit = each.unit
        itemsize = unit.dtype.itemsize
        start, stop = unit.bounds[call.rank], unit.bounds[call.rank + 1]
        step = min(_PIECE_NBYTES // itemsize, stop - start)
        if not step:
            return
        rooms = self._rooms(call.size * step * itemsize)
        scratch = torch.empty(step, dtype=working_dtype(unit.dtype))
        room = step * itemsize
        for low in range(start, stop, step):
            high = min(low + step, stop)
            nbytes = (high - low) * itemsize
            pieces = []
            for rank in range(call.size):
                if rank == call.rank:
                    pieces.append(each.source[low:high])
                    continue
                piece = rooms[rank * room : rank * room + nbytes]
                self._read(rank, sources[rank] + low * itemsize, piece)
                pieces.append(piece.view(unit.dtype))
            target = out[low - start : high - start]
            reduce_pieces(call.op, pieces, target, scratch[: high - low])

    def _rooms(self, nbytes: int) -> torch.Tensor:
        """Memory for the pieces of the others; kept, so that it stays warm."""
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        return self._scratch

    def _assemble(
        self, call: Call, each: Buffers, shares: Sequence[int], own: torch.Tensor
    ) -> None:
        """Read the shares that the others have reduced."""
        if not call.receives:
            return
        bounds = each.unit.bounds
        for rank in _others(call):
            target = each.out[bounds[rank] : bounds[rank + 1]]
            self._read(rank, shares[rank], target)
        mine = each.out[bounds[call.rank] : bounds[call.rank + 1]]
        if mine.data_ptr() != own.data_ptr():
            mine.copy_(own)

    def _collect(self, call: Call, each: Buffers, sources: Sequence[int]) -> None:
        """Read what is for this member, as it is."""
        if not call.receives:
            return
        bounds, itemsize = each.unit.bounds, each.unit.dtype.itemsize
        start, stop = bounds[call.rank], bounds[call.rank + 1]
        if call.kind in {"broadcast", "allgather", "gather"}:
            start, stop = 0, each.unit.numel
        ranks = _others(call)
        own: int | None = call.rank
        if call.root >= 0 and call.kind != "gather":
            ranks = [call.root] if call.root != call.rank else []
            own = call.rank if call.root == call.rank else None
        alone = call.root >= 0 and call.kind != "gather"
        for rank in ranks:
            first = 0 if alone else rank * (stop - start)
            target = each.out[first : first + stop - start]
            self._read(rank, sources[rank] + start * itemsize, target)
        if own is not None:
            first = 0 if alone else own * (stop - start)
            target = each.out[first : first + stop - start]
            if target.numel() and target.data_ptr() != each.source[start:stop].data_ptr():
                target.copy_(each.source[start:stop])

    def _read(self, rank: int, address: int, target: torch.Tensor) -> None:
        link = self._links[rank]
        base, nbytes = target.data_ptr(), target.nbytes
        for start in range(0, nbytes, _CHUNK_NBYTES):
            some = min(_CHUNK_NBYTES, nbytes - start)
            try:
                link.copy(address + start, base + start, some)
            except OwnerDiedError as exc:
                raise self._gone(rank) from exc
            self._unattended += some
            if self._unattended >= _ATTEND_NBYTES:
                self._unattended = 0
                self._engine.attend()

    def _check_alive(self) -> None:
        for rank, link in self._links.items():
            if not link.alive:  # CMA-2
                raise self._gone(rank)

    def _gone(self, rank: int) -> OwnerDiedError:
        label = self._engine.label(rank)
        return OwnerDiedError(f"{label} is gone", owner=label)


def _pack(tensors: Sequence[torch.Tensor]) -> bytes:
    return b"".join(_ADDRESS.pack(tensor.data_ptr()) for tensor in tensors)


def _unpack(said: bytes) -> list[int]:
    return [pair[0] for pair in _ADDRESS.iter_unpack(said)]


def _share(call: Call, each: Buffers) -> torch.Tensor:
    """Where this member's share of a reduction goes, for the others to read."""
    start, stop = each.unit.bounds[call.rank], each.unit.bounds[call.rank + 1]
    if call.receives:
        return each.out[start:stop]
    return torch.empty(stop - start, dtype=each.unit.dtype)


def _others(call: Call) -> list[int]:
    """The other ranks, beginning with the next: not all at the same one."""
    return [(call.rank + step) % call.size for step in range(1, call.size)]
