"""Tensors of this process that share memory: copied and converted, they share it still."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from aiordt._landing import converts
from aiordt._layout import span
from aiordt._ties import Extent, Group, groups, overlapping, twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiordt._arena import Arena
    from aiordt._memory import Pool


class Ties(NamedTuple):
    """Which of several tensors share memory, by place.

    Attributes:
        groups: Those that share a run of memory.
        twins: Further ones that are the same elements.
    """

    groups: list[Group]
    twins: list[list[int]]

    @property
    def units(self) -> list[list[int]]:
        """What belongs together."""
        return [*(group.members for group in self.groups), *self.twins]

    def among(self, places: Sequence[int]) -> Ties:
        """Those of ``places``, by their place in it."""
        if not self.groups and not self.twins:
            return self
        here = {place: number for number, place in enumerate(places)}
        return Ties(
            [group.renumbered(here) for group in self.groups if group.members[0] in here],
            [[here[place] for place in same] for same in self.twins if same[0] in here],
        )


UNTIED: Final = Ties([], [])


def tie(
    rows: Iterable[tuple[int, Extent, object, torch.dtype | int]], *, apart: bool = False
) -> Ties:
    """Which tensors share memory.

    Args:
        rows: Place, extent, what may be tied to each other at all, and dtype.
        apart: Each has, or will have, memory of its own: only which are the same in all.
    """
    sets: dict[object, list[tuple[int, Extent]]] = {}
    kinds = {}
    for place, extent, key, dtype in rows:
        sets.setdefault(key, []).append((place, extent))
        kinds[place] = dtype
    found = [] if apart else [group for some in sets.values() for group in groups(some)]
    grouped = {place for group in found for place in group.members}
    alike: dict[object, list[tuple[int, Extent]]] = {}
    for key, some in sets.items():
        for place, extent in some:
            if place not in grouped:
                alike.setdefault((key, kinds[place]), []).append((place, extent))
    return Ties(found, [same for some in alike.values() for same in twins(some)])


def ties_of(tensors: Sequence[torch.Tensor]) -> Ties:
    """Which of these share memory; tensors without elements never do.

    Cost:
        ~0.5 µs a tensor where none do.
    """
    places = [place for place, tensor in enumerate(tensors) if tensor.numel()]
    if len(places) < 2:
        return UNTIED
    suspects = overlapping(
        [tensors[place].data_ptr() for place in places],
        [_span(tensors[place]) for place in places],
    )
    some = [(places[number], tensors[places[number]]) for number in suspects]
    return tie((place, extent(tensor), tensor.device, tensor.dtype) for place, tensor in some)


def _span(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.nbytes
    return span(tensor.shape, tensor.stride(), tensor.itemsize)


def extent(tensor: torch.Tensor) -> Extent:
    """Where a tensor lies."""
    return Extent(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.itemsize)


def within(flat: torch.Tensor, address: int, where: Extent, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies in ``flat`` as ``where`` says, if ``flat`` began at ``address``.

    A tensor of its own on the same storage, no view in autograd's sense.
    """
    start = (where.address - address) // where.itemsize
    made = torch.empty(0, dtype=dtype, device=flat.device)
    return made.set_(flat.untyped_storage(), start, where.shape, where.stride)


def clone(tensors: Sequence[torch.Tensor], pool: Pool | Arena) -> list[torch.Tensor]:
    """Plain copies; tensors that share memory are copied once and share it."""
    ties = ties_of(tensors)
    copies: list[torch.Tensor | None] = [None] * len(tensors)
    for group in ties.groups:
        device = tensors[group.members[0]].device
        flat = (
            pool.empty((group.nbytes,), torch.uint8)
            if device.type == "cpu"
            else torch.empty(group.nbytes, dtype=torch.uint8, device=device)
        )
        for piece in group.pieces:
            at = piece.address - group.address
            flat[at : at + piece.nbytes].copy_(_bytes(tensors[piece.member], *piece[1:]))
        for place in group.members:
            tensor = tensors[place]
            copies[place] = within(flat, group.address, extent(tensor), tensor.dtype)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.detach()
        if tensor.is_contiguous() and tensor.device.type == "cpu":
            return pool.empty(tensor.shape, tensor.dtype).copy_(plain)
        return torch.empty_like(plain).copy_(plain)

    return _rest(tensors, copies, ties, copy)


def _bytes(tensor: torch.Tensor, address: int, nbytes: int) -> torch.Tensor:
    storage = tensor.untyped_storage()
    made = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return made.set_(storage, address - storage.data_ptr(), (nbytes,), (1,))


def convert(
    tensors: Sequence[torch.Tensor], device: torch.device | None, dtype: torch.dtype | None
) -> list[torch.Tensor]:
    """Plain tensors on ``device``, the floating-point ones of ``dtype``.

    Tensors that share memory share it afterwards, if they are of one dtype and one storage.
    """

    def one(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and converts(tensor.dtype, dtype) else None
        return tensor.detach().to(device=device, dtype=wanted)

    ties = ties_of(tensors)
    made: list[torch.Tensor | None] = [None] * len(tensors)
    for group in ties.groups:
        members = [tensors[place] for place in group.members]
        first = min(members, key=lambda tensor: tensor.data_ptr())
        if any(
            tensor.dtype is not first.dtype
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            for tensor in members
        ):
            continue
        address = first.data_ptr()
        numel = (group.address + group.nbytes - address) // first.itemsize
        flat = torch.empty(0, dtype=first.dtype, device=first.device)
        flat = flat.set_(first.untyped_storage(), first.storage_offset(), (numel,), (1,))
        converted = one(flat)
        for place, tensor in zip(group.members, members, strict=True):
            start = (tensor.data_ptr() - address) // tensor.itemsize
            made[place] = converted.as_strided(
                tensor.shape, tensor.stride(), converted.storage_offset() + start
            )
    return _rest(tensors, made, ties, one)


def _rest(
    tensors: Sequence[torch.Tensor],
    made: list[torch.Tensor | None],
    ties: Ties,
    make: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """``made``, and what is missing in it: twins once, the others each."""
    for first, *others in ties.twins:
        one = made[first] = make(tensors[first])
        for place in others:
            made[place] = one.detach()
    return [
        make(tensor) if done is None else done for tensor, done in zip(tensors, made, strict=True)
    ]
