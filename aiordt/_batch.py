"""Many refs pulled at once: what to read, and the tensors that it becomes.

Refs of one export whose tensors share memory are read once, and arrive sharing memory. No
other two tensors share a storage. Small ones lie next to each other on trays of warm memory,
which is used again when the last of a tray's tensors is gone.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from aiordt import _device
from aiordt._landing import (
    Landing,
    copy_into,
    dress,
    dtype_of,
    land,
    num_bytes,
    unpack_inline,
)
from aiordt._layout import Cut, span
from aiordt._leaves import as_tensor
from aiordt._memory import HUGE_PAGE, MIN_BLOCK, aligned, view_memory
from aiordt._sharing import UNTIED, Ties, tie, within
from aiordt._ties import Extent, Group, contiguous_stride, overlapping
from aiordt._types import DTYPES, ITEMSIZES
from aiordt.abc import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiordt._landing import Pullable
    from aiordt._memory import Pool
    from aiordt._wire import TensorMeta

#: Keeping one small tensor keeps so much memory at most.
_TRAY_NBYTES: Final = HUGE_PAGE


class _Shared(NamedTuple):
    """Memory that several of the tensors will share."""

    group: Group
    flat: torch.Tensor


class Plain(NamedTuple):
    """What is known of refs of one result, all to whole tensors in host memory that share none.

    Attributes:
        metas: Of each ref.
        sizes: Bytes of each.
        segments: The owner's shared segments that they are in; 0: in none.
    """

    metas: list[TensorMeta]
    sizes: list[int]
    segments: frozenset[int]


def plain(refs: Sequence[Pullable]) -> Plain | None:
    """Whether these refs are such, as most state dicts are.

    Cost:
        ~0.5 µs a ref; 0.1 µs when the same refs come again.
    """
    header = refs[0].header
    metas = [ref.meta for ref in refs]
    known = header.plain
    if (
        isinstance(known, Plain)
        and len(known.metas) == len(metas)
        and all(map(operator.is_, known.metas, metas))
    ):
        return known
    shared = metas[0].segment > 0
    for ref, meta in zip(refs, metas, strict=True):
        if (
            ref.header is not header
            or ref.inline is not None
            or meta.stride is not None
            or meta.device
            or (meta.segment > 0) is not shared
        ):
            return None
    sizes = [num_bytes(meta) for meta in metas]
    if not all(sizes) or overlapping([meta.address for meta in metas], sizes):
        return None
    segments = frozenset(meta.segment for meta in metas)
    header.plain = found = Plain(metas, sizes, segments)
    return found


def extent_of(meta: TensorMeta) -> Extent:
    """Where a tensor lies at its owner."""
    stride = contiguous_stride(meta.shape) if meta.stride is None else meta.stride
    return Extent(meta.address, meta.shape, stride, ITEMSIZES[meta.dtype])


def tied(refs: Sequence[Pullable], sizes: Sequence[int], *, apart: bool = False) -> Ties:
    """Which refs share memory; those of different exports never do.

    Args:
        refs: Refs to tensors of one owner that have an address there, and elements.
        sizes: Bytes of each.
        apart: Each goes to memory of its own: only what is the same in all may move once.

    Cost:
        ~0.2 µs a ref where none do.
    """
    metas = [ref.meta for ref in refs]
    spans = list(sizes)
    for place, meta in enumerate(metas):
        if meta.stride is not None:
            spans[place] = span(meta.shape, meta.stride, ITEMSIZES[meta.dtype])
    suspects = overlapping([meta.address for meta in metas], spans)
    if not suspects:
        return UNTIED
    return tie(
        (
            (
                place,
                extent_of(metas[place]),
                (refs[place].header.key, metas[place].device),
                metas[place].dtype,
            )
            for place in suspects
            if not metas[place].device  # each goes to its device by itself
        ),
        apart=apart,
    )


def parcels(ties: Ties, places: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut ``places`` into batches of at most ``limit`` bytes; what is tied stays together.

    Args:
        ties: Of all refs.
        places: Some of them, with all that they are tied to.
        sizes: Bytes of all refs.
        limit: In bytes; what is larger by itself makes a batch of its own.
    """
    if len(places) == len(sizes) and sum(sizes) <= limit:
        return [list(places)]
    unit_of = {place: unit for unit in ties.units for place in unit}
    batches: list[list[int]] = [[]]
    room = limit
    done: set[int] = set()
    for place in places:
        if place in done:
            continue
        unit = unit_of.get(place, (place,))
        done.update(unit)
        nbytes = sum(sizes[each] for each in unit)
        if batches[-1] and nbytes > room:
            batches.append([])
            room = limit
        batches[-1] += unit
        room -= nbytes
    return batches


class Batch:
    """Tensors that are being received from one owner.

    Args:
        refs: What is pulled: with elements, and not by value.
        sizes: Bytes of each.
        ties: Which of them share memory.
        into: Where to receive each.
        dtype: What the owner is to convert them to where that makes them smaller.

    Attributes:
        refs: As given.
        sizes: As given.
        nbytes: Bytes that move, of what has been prepared.
        segments: The owner's shared segments that they are in, if that is known.
    """

    def __init__(
        self,
        refs: Sequence[Pullable],
        sizes: Sequence[int],
        ties: Ties,
        into: Sequence[torch.Tensor] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.refs = refs
        self.sizes = sizes
        self.segments: frozenset[int] = frozenset()
        self._into = into
        self._dtype = dtype
        self._results: list[Any] = [None] * len(refs)
        self._landings: list[tuple[int, Landing]] = []
        self._shared: list[_Shared] = []
        self._twins: dict[int, int] = {}
        for first, *others in ties.twins:
            self._twins.update(dict.fromkeys(others, first))
        self._groups = ties.groups
        self._apart = {place for group in ties.groups for place in group.members}
        self._apart.update(self._twins)
        self.nbytes = 0

    def land(self, pool: Pool) -> Iterator[Part]:
        """Prepare memory for one after the other; what to read into it.

        Cost:
            ~2 µs a tensor.
        """
        for group in self._groups:
            yield from self._land_shared(group, pool)
        plain = self._into is None and self._dtype is None
        tray: list[int] = []
        room = _TRAY_NBYTES
        sizes, apart = self.sizes, self._apart
        for place, ref in enumerate(self.refs):
            if place in apart:
                continue
            meta, size = ref.meta, sizes[place]
            if (
                plain
                and size < MIN_BLOCK
                and meta.stride is None
                and meta.offset is None
                and not meta.flags
                and not meta.device
                and ref.cls is None
            ):
                taken = aligned(size)
                if taken > room:
                    yield from self._land_on_tray(tray, pool)
                    tray = []
                    room = _TRAY_NBYTES
                tray.append(place)
                room -= taken
                continue
            into = None if self._into is None else self._into[place]
            yield self._land_alone(place, pool, into)
        yield from self._land_on_tray(tray, pool)

    def _land_alone(self, place: int, pool: Pool, into: torch.Tensor | None = None) -> Part:
        landing = land(self.refs[place], pool, into, self._dtype)
        self._landings.append((place, landing))
        self.nbytes += landing.part.nbytes
        return landing.part

    def _land_on_tray(self, places: Sequence[int], pool: Pool) -> list[Part]:
        refs, sizes, results = self.refs, self.sizes, self._results
        offsets = []
        end = 0
        for place in places:
            offsets.append(end)
            end += aligned(sizes[place])
        buffer = pool.tray(end)
        if buffer is None:
            return [self._land_alone(place, pool) for place in places]
        frombuffer, make = torch.frombuffer, Part  # hot: a state dict may have 10,000 tensors
        flat = frombuffer(buffer, dtype=torch.uint8, count=end)
        base = flat.data_ptr()
        parts = []
        for place, offset in zip(places, offsets, strict=True):
            ref, size = refs[place], sizes[place]
            meta = ref.meta
            code, shape = meta.dtype, meta.shape
            dtype = DTYPES[code] or dtype_of(code)
            count = size // ITEMSIZES[code]
            tensor = frombuffer(buffer, dtype=dtype, count=count, offset=offset)
            results[place] = tensor if len(shape) == 1 else tensor.resize_(shape)
            key, target = ref.header.key, base + offset
            parts.append(
                make(key, ref.index, meta.address, target, size, None, meta.segment, "cpu", flat)
            )
            self.nbytes += size
        return parts

    def _land_shared(self, group: Group, pool: Pool) -> Iterator[Part]:
        flat = pool.empty((group.nbytes,), torch.uint8)
        self._shared.append(_Shared(group, flat))
        self.nbytes += sum(piece.nbytes for piece in group.pieces)
        for piece in group.pieces:
            ref = self.refs[piece.member]
            meta = ref.meta
            cut = Cut((meta.offset or 0) + piece.address - meta.address, (piece.nbytes,), (1,), 1)
            yield Part(
                ref.header.key,
                ref.index,
                piece.address,
                flat.data_ptr() + piece.address - group.address,
                piece.nbytes,
                cut,
                meta.segment,
                meta.device or "cpu",
                flat,
            )

    def ref_of(self, part: Part) -> Pullable:
        """The ref that something is read for, or the first of them; for errors."""
        for place, landing in self._landings:
            if landing.part is part:
                return self.refs[place]
        which = (part.key, part.index)
        return next(ref for ref in self.refs if (ref.header.key, ref.index) == which)

    @property
    def copy_nbytes(self) -> int:
        """Bytes that `finish` copies; many are copied off the loop."""
        nbytes = sum(landing.copy_nbytes for _, landing in self._landings)
        if self._into is not None:
            nbytes += sum(self.sizes[place] for place in self._twins)
        return nbytes

    def finish(self) -> list[Any]:
        """What the caller gets, in order, once all bytes have come."""
        results = self._results
        for place, landing in self._landings:
            results[place] = landing.finish()
        for group, flat in self._shared:
            for place in group.members:
                ref = self.refs[place]
                results[place] = dress(_placed(flat, group.address, ref.meta), ref)
        for place, first in self._twins.items():
            one = results[first]
            if self._into is None:
                results[place] = dress(as_tensor(one).detach(), self.refs[place])
            else:
                results[place] = copy_into(self._into[place], one)
        return results

    async def hand_over(self, finished: list[Any]) -> list[Any]:
        """What `finish` gave, on its devices, ordered for the caller's stream (DEV-3)."""
        for place, landing in self._landings:
            if landing.home is not None:  # pragma: no cover  (needs a GPU)
                layer = _device.layer(landing.home)
                moved = await layer.unstage(finished[place], landing.home)
                finished[place] = dress(moved, landing.ref)
        _device.wait_on_stream(as_tensor(finished[0]), _device.DONE)
        return finished


def _placed(flat: torch.Tensor, address: int, meta: TensorMeta) -> torch.Tensor:
    return within(flat, address, extent_of(meta), dtype_of(meta.dtype))


def unpack_tied(refs: Sequence[Pullable]) -> dict[int, Any]:
    """Of refs that carry their bytes, those that share memory, sharing it again; by place."""
    places = [
        place
        for place, ref in enumerate(refs)
        if ref.inline is not None and ref.meta.address and num_bytes(ref.meta)
    ]
    some = [refs[place] for place in places]
    found: dict[int, Any] = {}
    ties = tied(some, [num_bytes(ref.meta) for ref in some])
    for group in ties.groups:
        flat = torch.empty(group.nbytes, dtype=torch.uint8)
        filled = view_memory(flat.data_ptr(), group.nbytes, writable=True)
        for piece in group.pieces:
            ref = some[piece.member]
            data = memoryview(ref.inline or b"")[piece.address - ref.meta.address :]
            at = piece.address - group.address
            filled[at : at + piece.nbytes] = data[: piece.nbytes]  # dense: they lie as in memory
        for place in group.members:
            ref = some[place]
            found[places[place]] = dress(_placed(flat, group.address, ref.meta), ref)
    for first, *others in ties.twins:
        ref = some[first]
        one = found[places[first]] = unpack_inline(ref, ref.inline or b"")
        found.update(
            (places[other], dress(as_tensor(one).detach(), some[other])) for other in others
        )
    return found
