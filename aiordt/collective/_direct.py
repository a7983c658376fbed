"""Collectives within a host: every member reads the memory of the others.

No message carries payload and nothing is copied twice. In an allreduce every member reduces its
share; then each reads the shares that the others made. The order is that of the ranks and each
share is reduced once, so all members get the same bits. Tensors in shared memory
(`aiordt.empty`) are reduced where they are; the kernel reads the others, in pieces that fit in a
core's cache.

A member leaves a call only when all have said that they read no more of it.
"""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from typing_extensions import override

from aiordt._arena import arena
from aiordt._errors import AiordtError, OwnerDiedError
from aiordt._progress import post, yield_core
from aiordt._types import KIB, MIB
from aiordt.collective._call import Mover
from aiordt.collective._kernels import Reduction
from aiordt.collective._rules import FROM_ROOT, REDUCING, working_dtype
from aiordt.collective._steps import Pending, Step
from aiordt.transports._job import copy_piece, cuts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence

    from aiordt._progress import IoThread
    from aiordt.collective._call import Buffers, Call
    from aiordt.collective._engine import Engine
    from aiordt.collective._steps import Steps
    from aiordt.transports.cma import CmaLink
    from aiordt.transports.shm import ShmLink

_log = logging.getLogger(__name__)

#: Of a reduction: small enough for the cache, large enough for a system call each.
_PIECE_NBYTES: Final = 256 * KIB
#: After so many bytes the thread looks whether the group goes on.
_ATTEND_NBYTES: Final = 64 * MIB
#: Of a tensor: the number of its shared segment (0: it is in none), and its address.
_PLACE: Final = struct.Struct("!QQ")
#: Announced: what is brought lies where the addresses say; or it will be packed first.
_HERE: Final = b"h"
_PACKED: Final = b"p"


class _Remote(NamedTuple):
    """A tensor of another member: where it is there, and itself if it is in shared memory."""

    address: int
    seen: torch.Tensor | None


_NOWHERE: Final = _Remote(0, None)


class DirectMover(Mover):
    """Reads the memory of the other members.

    Args:
        engine: The group.
        links: To each other rank.
        share: Gives the link to the shared memory of a rank, on the io loop.
        io: That loop.
    """

    def __init__(
        self,
        engine: Engine,
        links: Mapping[int, CmaLink],
        share: Callable[[int], Awaitable[ShmLink]],
        io: IoThread,
    ) -> None:
        self._engine = engine
        self._links = links
        self._share = share
        self._io = io
        self._shared: dict[int, ShmLink] = {}
        self._mapping: set[Pending] = set()
        engine.on_end(self._stop)
        self._unattended = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @override
    def announce(self, call: Call) -> bytes:
        """The addresses of tensors that are read where they are: no exchange for those, then."""
        if call.kind in FROM_ROOT and call.rank != call.root:
            return _HERE
        brought = call.tensors or []
        units = call.asked().units
        tensors = [brought[unit.places[0]] for unit in units if len(unit.places) == 1]
        if len(tensors) < len(units) or not all(map(torch.Tensor.is_contiguous, tensors)):
            return _PACKED
        return _HERE + _pack(tensors)

    @override
    def move(
        self, call: Call, buffers: Sequence[Buffers], announced: Sequence[memoryview]
    ) -> Steps:
        if _PACKED in announced:
            heard = yield Step(_pack([each.source for each in buffers]))
        else:
            heard = [bytes(said[1:]) for said in announced]
        sizes = [[each.unit.nbytes for each in buffers]] * call.size
        reducing = call.kind in {"allreduce", "reduce"}
        sources = yield from self._find(call, heard, sizes if reducing or call.receives else [])
        shares = [_share(call, each) if reducing else each.out for each in buffers]
        for number, (each, share) in enumerate(zip(buffers, shares, strict=True)):
            there = [found[number] if found else _NOWHERE for found in sources]
            if call.kind in REDUCING:
                self._reduce(call, each, there, share)
            else:
                self._collect(call, each, there)
        if reducing:
            heard = yield Step(_pack(shares))
            sizes = [[_share_nbytes(each, rank) for each in buffers] for rank in range(call.size)]
            reduced = yield from self._find(call, heard, sizes if call.receives else [])
            for number, (each, share) in enumerate(zip(buffers, shares, strict=True)):
                self._assemble(call, each, [found[number] for found in reduced], share)
        self._check_alive()
        yield Step(b"")

    # --- where the others' tensors are ---------------------------------------------------------

    def _find(
        self, call: Call, heard: Sequence[bytes], sizes: Sequence[Sequence[int]]
    ) -> Generator[Step | Pending, list[bytes], list[list[_Remote]]]:
        """What each rank has said of its tensors, those in shared memory mapped.

        Args:
            call: The call.
            heard: By rank, what `_pack` gave there.
            sizes: By rank, how many bytes of each tensor are read; empty: nothing is.
        """
        found = [[_Remote(place[1], None) for place in _PLACE.iter_unpack(said)] for said in heard]
        missing = []
        for rank in call.others if sizes else ():
            for number, (segment, address) in enumerate(_PLACE.iter_unpack(heard[rank])):
                nbytes = sizes[rank][number]
                if not segment or not nbytes:
                    continue
                link = self._shared.get(rank)
                seen = link.view_nowait(segment, address, nbytes) if link else None
                if seen is None:
                    missing.append((rank, number, segment, nbytes))
                found[rank][number] = _Remote(address, seen)
        if missing:
            pending = Pending()
            self._mapping.add(pending)
            post(self._io.loop, self._io.spawn, self._map(missing, found, pending))
            yield pending
        return found

    async def _map(
        self,
        missing: Sequence[tuple[int, int, int, int]],
        found: Sequence[list[_Remote]],
        pending: Pending,
    ) -> None:
        """Map what is not mapped yet; what cannot be is read as any other memory."""
        try:
            for rank, number, segment, nbytes in missing:
                link = self._shared[rank] = await self._share(rank)
                address = found[rank][number].address
                found[rank][number] = _Remote(address, await link.view(segment, address, nbytes))
        except AiordtError as exc:
            _log.debug("a member's shared memory: %s", exc)
        finally:
            self._mapping.discard(pending)
            pending.finish()

    def _stop(self) -> None:
        for pending in list(self._mapping):
            pending.finish()

    # --- reading -------------------------------------------------------------------------------

    def _reduce(
        self, call: Call, each: Buffers, remotes: Sequence[_Remote], out: torch.Tensor
    ) -> None:
        """Reduce this member's share of all sources into ``out``."""
        unit = each.unit
        itemsize = unit.dtype.itemsize
        start, stop = unit.bounds[call.rank], unit.bounds[call.rank + 1]
        step = min(_PIECE_NBYTES // itemsize, stop - start)
        if not step:
            return
        room = step * itemsize
        rooms = self._rooms(call.size * room)
        scratch = torch.empty(step, dtype=working_dtype(unit.dtype))
        # Made ready once, not for each piece: that would cost more than to add it up.
        reduce = Reduction(call.op, unit.dtype)
        result, total = reduce.flat(out), reduce.flat(scratch)
        here: dict[int, Any] = {call.rank: reduce.flat(each.source[start:stop])}
        brought: dict[int, Any] = {}
        for rank in call.others:
            seen = remotes[rank].seen
            if seen is not None:
                share = seen[start * itemsize : stop * itemsize].view(unit.dtype)
                here[rank] = reduce.flat(share)
            else:
                brought[rank] = reduce.flat(rooms[rank * room :][:room].view(unit.dtype))
        for low in range(0, stop - start, step):
            high = min(low + step, stop - start)
            for rank in brought:
                target = rooms.data_ptr() + rank * room
                offset, nbytes = (start + low) * itemsize, (high - low) * itemsize
                self._read(rank, remotes[rank], offset, target, nbytes)
            pieces = [
                here[rank][low:high] if rank in here else brought[rank][: high - low]
                for rank in range(call.size)
            ]
            reduce(pieces, result[low:high], total[: high - low])
            self._attend(room)

    def _rooms(self, nbytes: int) -> torch.Tensor:
        """Memory for the pieces of the others; kept, so that it stays warm."""
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        return self._scratch

    def _assemble(
        self, call: Call, each: Buffers, shares: Sequence[_Remote], own: torch.Tensor
    ) -> None:
        """Read the shares that the others have reduced."""
        if not call.receives:
            return
        bounds = each.unit.bounds
        for rank in call.others:
            target = each.out[bounds[rank] : bounds[rank + 1]]
            self._read(rank, shares[rank], 0, target.data_ptr(), target.nbytes)
        mine = each.out[bounds[call.rank] : bounds[call.rank + 1]]
        if mine.data_ptr() != own.data_ptr():
            mine.copy_(own)

    def _collect(self, call: Call, each: Buffers, remotes: Sequence[_Remote]) -> None:
        """Read what is for this member, as it is."""
        if not call.receives:
            return
        bounds, itemsize = each.unit.bounds, each.unit.dtype.itemsize
        start, stop = bounds[call.rank], bounds[call.rank + 1]
        if call.kind in {"broadcast", "allgather", "gather"}:
            start, stop = 0, each.unit.numel
        ranks = call.others
        own: int | None = call.rank
        if call.root >= 0 and call.kind != "gather":
            ranks = [call.root] if call.root != call.rank else []
            own = call.rank if call.root == call.rank else None
        alone = call.root >= 0 and call.kind != "gather"
        for rank in ranks:
            first = 0 if alone else rank * (stop - start)
            target = each.out[first : first + stop - start]
            offset = start * itemsize
            self._read(rank, remotes[rank], offset, target.data_ptr(), target.nbytes)
        if own is not None:
            first = 0 if alone else own * (stop - start)
            target = each.out[first : first + stop - start]
            if target.numel() and target.data_ptr() != each.source[start:stop].data_ptr():
                target.copy_(each.source[start:stop])

    def _read(self, rank: int, remote: _Remote, offset: int, target: int, nbytes: int) -> None:
        """Copy some of a tensor of another member to ``target`` here."""
        for start, some in cuts(nbytes):
            begin = offset + start
            if remote.seen is not None:
                copy_piece((remote.seen.data_ptr() + begin, target + start, some))
            else:
                try:
                    self._links[rank].copy(remote.address + begin, target + start, some)
                except OwnerDiedError as exc:
                    raise self._gone(rank) from exc
            self._attend(some)

    def _attend(self, nbytes: int) -> None:
        """Let a loop have this core; hear now and then whether the group goes on."""
        yield_core()
        self._unattended += nbytes
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
    addresses = map(torch.Tensor.data_ptr, tensors)
    return b"".join([_PLACE.pack(arena.locate(address), address) for address in addresses])


def _share_nbytes(each: Buffers, rank: int) -> int:
    bounds = each.unit.bounds
    return (bounds[rank + 1] - bounds[rank]) * each.unit.dtype.itemsize


def _share(call: Call, each: Buffers) -> torch.Tensor:
    """Where this member's share of a reduction goes, for the others to read."""
    start, stop = each.unit.bounds[call.rank], each.unit.bounds[call.rank + 1]
    if call.receives:
        return each.out[start:stop]
    return torch.empty(stop - start, dtype=each.unit.dtype)
