"""Exporting: `put`, and what `@method` does with a result."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from aiordt import _config, _device, _wire
from aiordt._arena import arena
from aiordt._errors import (
    InvalidTypeError,
    InvalidValueError,
    OutOfMemoryError,
    UnavailableError,
    UsageError,
)
from aiordt._exports import check_exportable
from aiordt._leaves import as_array, as_tensor, is_leaf, is_tensor
from aiordt._memory import raw_bytes
from aiordt._progress import finish
from aiordt._ref import Lease, TensorRef, make_header
from aiordt._route import NOT_SHARED
from aiordt._runtime import current
from aiordt._sharing import clone, ties_of
from aiordt._tree import Flat, place
from aiordt._types import DTYPE_CODES, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from ray import ObjectRef

    from aiordt._device import Event
    from aiordt._exports import Export

_CLONE_ON_LOOP_NBYTES: Final = MIB


def check_transport(name: str | None) -> None:
    """Refuse a transport that does not exist.

    Raises:
        InvalidValueError: It is not one of aiordt's.
        InvalidTypeError: It is not a string.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise InvalidTypeError(f"transport must be a str, not {type(name).__name__}")
    known = (*_config.TRANSPORTS, *_config.others())
    if name not in (*known, *_config.PLANNED):
        raise InvalidValueError(f"there is no transport {name!r}; there are {', '.join(known)}")


class Exporting:
    """A tree whose tensors become refs, in three steps: plan, lease, refs.

    The step in the middle may wait; the others do not, and are shared by coroutines and by
    threads that have no loop.
    """

    def __init__(
        self,
        tree: object,
        label: str,
        *,
        transport: str | None,
        snapshot: bool,
        frozen: bool = False,
    ) -> None:
        self._flat = Flat(tree, is_leaf, inside=is_tensor)  # LEAF-1
        self._label = label
        self._transport = transport
        self._snapshot = snapshot
        self._flags = _wire.FLAG_FROZEN if frozen else 0
        leaves = self._flat.leaves
        self._others: dict[int, object] = {
            index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)
        }
        self._arrays = {i for i, leaf in self._others.items() if isinstance(leaf, np.ndarray)}
        tensors: list[torch.Tensor] = [*map(as_tensor, leaves)] if self._others else leaves
        for leaf, tensor in zip(leaves, tensors, strict=True):
            try:
                check_exportable(tensor)
            except UsageError as exc:
                where = place(tree, leaf, "the value")
                raise exc.said(where) if where else exc from None
        self._tensors = [
            tensor.detach().resolve_conj().resolve_neg()
            if tensor.is_conj() or tensor.is_neg()
            else tensor
            for tensor in tensors
        ]
        self._tied: set[int] = set()  # those by value that share memory
        if tensors:
            self.runtime = current()
            self._inline = self._choose_inline()
        self._exported = (
            [index for index in range(len(tensors)) if index not in self._inline] if tensors else []
        )
        self._export: Export | None = None
        self._ready: Event | None = None

    def _choose_inline(self) -> dict[int, bytes]:
        if self._transport is not None:
            available = self.runtime.routes.availability(self._transport)
            if available:
                raise UnavailableError(
                    f"{self._transport}: {available}",
                    reason=available,
                    transport=self._transport,
                )
            if self._transport == "shm":
                for tensor in self._tensors:
                    if tensor.nbytes and not arena.locate(tensor.data_ptr()):
                        raise UnavailableError(
                            f"shm: {NOT_SHARED}", reason=NOT_SHARED, transport="shm"
                        )
            return {}
        config = self.runtime.config
        room = config.inline_result_nbytes
        chosen: dict[int, bytes] = {}
        units = {place: unit for unit in ties_of(self._tensors).units for place in unit}
        left: set[int] = set()
        for index in range(len(self._tensors)):
            if index in chosen or index in left:
                continue
            unit = units.get(index, [index])
            sizes = [self._tensors[place].nbytes for place in unit]
            if not all(self._tensors[place].is_cpu for place in unit):
                left.update(unit)  # by value would mean to wait for its device
                continue
            if max(sizes) > config.inline_nbytes or sum(sizes) > room:
                left.update(unit)  # what is tied travels the same way
                continue
            room -= sum(sizes)
            chosen.update((place, raw_bytes(self._tensors[place])) for place in unit)
            self._tied.update(unit if len(unit) > 1 else ())
        return chosen

    @property
    def clones(self) -> int:
        """Bytes that are to be copied first, for a snapshot."""
        if not self._snapshot:
            return 0
        return sum(self._tensors[i].nbytes for i in self._exported if self._tensors[i].is_cpu)

    @property
    def originals(self) -> list[torch.Tensor]:
        """What is copied for a snapshot."""
        return [self._tensors[index] for index in self._exported]

    def clone_on_devices(self) -> None:
        """Queue the copies of what is on devices, on the caller's streams."""
        for index in self._exported if self._snapshot else ():
            tensor = self._tensors[index]
            if not tensor.is_cpu:
                self._tensors[index] = same_kind(tensor.detach().clone(), tensor)
                self._others.pop(index, None)

    def clone(self) -> None:
        """Make the copies of what is in host memory; for many bytes, call it off the loop."""
        places = [index for index in self._exported if self._tensors[index].is_cpu]
        originals = [self._tensors[index] for index in places]
        for index, copy in zip(places, clone(originals, self.runtime.pool), strict=True):
            self._tensors[index] = same_kind(copy, self._tensors[index])
            self._others.pop(index, None)
            if index in self._arrays:
                self._others[index] = as_array(copy)

    def record(self) -> None:
        """Note what the caller's streams have queued; on the caller's thread."""
        if self._exported:
            self._ready = _device.record(self._tensors[index] for index in self._exported)

    @property
    def may_wait(self) -> bool:
        """Whether there may be no room yet, so that `begin_when_room` is to be used."""
        return bool(self._exported) and self.runtime.registry.limited

    def begin(self) -> int:
        """Hold what is to be exported.

        Returns:
            How many leases it needs.
        """
        if not self._exported:
            return 0
        tensors = [self._tensors[index] for index in self._exported]
        return self._begun(self.runtime.registry.begin(tensors, self._label, self._ready))

    async def begin_when_room(self) -> int:
        """As `begin`, once there is room for it."""
        tensors = [self._tensors[index] for index in self._exported]
        registry = self.runtime.registry
        return self._begun(await registry.begin_when_room(tensors, self._label, self._ready))

    def _begun(self, export: Export) -> int:
        self._export = export
        if self._others:
            export.others = {
                number: self._others[position]
                for number, position in enumerate(self._exported)
                if position in self._others
            }
        return len(export.groups)

    @property
    def checked(self) -> bool:
        """Whether `seal` is to be called before `finish`."""
        return self._export is not None and self.runtime.config.checksums

    async def seal(self) -> None:
        """Note the checksums of what is held; waits for the work that makes it."""
        export = self._export
        assert export is not None  # noqa: S101  (it is `checked`)
        if not export.ready.done():
            await export.ready.wait()  # DEV-1
        held = [tensor for tensor in export.tensors if tensor is not None]  # all, by now
        export.sums = await self.runtime.checks.sums_of(held)

    def abandon(self) -> None:
        """Undo `begin`."""
        if self._export is not None:
            self.runtime.registry.abandon(self._export)

    def finish(self, markers: Sequence[ObjectRef[Any]]) -> Any:  # noqa: ANN401
        """The tree with refs in the places of its tensors."""
        leases: dict[int, Lease] = {}
        if self._export is not None:
            key = self._export.key
            self.runtime.registry.commit(self._export, [marker.binary() for marker in markers])
            for marker, group in zip(markers, self._export.groups, strict=True):
                lease = Lease(marker)
                leases.update(dict.fromkeys(group, lease))
        else:
            key = _wire.new_key()
        pending = self._export is not None and not self._export.ready.done()
        header = make_header(key, self._transport, pending=pending)
        checked = _wire.FLAG_CHECKED if self.checked else 0
        numbers = {position: number for number, position in enumerate(self._exported)}
        refs = []
        for position, tensor in enumerate(self._tensors):
            number = numbers.get(position)
            index = len(self._exported) + position if number is None else number
            lease_or_none = None if number is None else leases[number]
            flags = self._flags | (_wire.FLAG_NUMPY if position in self._arrays else 0)
            flags |= 0 if number is None else checked
            tied = position in self._tied
            packed, cls = _describe(tensor, flags, inline=number is None, tied=tied)
            inline = self._inline.get(position)
            refs.append(TensorRef(header, index, packed, lease_or_none, inline, cls))
        return self._flat.rebuild(refs)

    @property
    def empty(self) -> bool:
        """Whether there is no tensor in the tree."""
        return not self._tensors


def same_kind(copy: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    if isinstance(original, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=original.requires_grad)
    if type(original) is not torch.Tensor:
        copy = copy.as_subclass(type(original))
    return copy.requires_grad_(original.requires_grad)


def _describe(
    tensor: torch.Tensor, flags: int, *, inline: bool, tied: bool
) -> tuple[bytes, type[torch.Tensor] | None]:
    if tensor.requires_grad:
        flags |= _wire.FLAG_REQUIRES_GRAD
    cls: type[torch.Tensor] | None = type(tensor)
    if cls is torch.nn.Parameter:
        flags |= _wire.FLAG_PARAMETER
    if cls is torch.Tensor or cls is torch.nn.Parameter:
        cls = None
    contiguous = tensor.is_contiguous()
    meta = _wire.TensorMeta(
        DTYPE_CODES[tensor.dtype],
        flags,
        tuple(tensor.shape),
        None if contiguous else tensor.stride(),
        tensor.data_ptr() if not inline or tied else 0,
        0 if inline else arena.locate(tensor.data_ptr()),
        "" if tensor.is_cpu else str(tensor.device),
    )
    return _wire.pack_meta(meta), cls


def in_shared_memory(tree: Any) -> Any:  # noqa: ANN401
    """``tree`` with copies of its large host tensors in shared memory, as long as there is room."""
    flat = Flat(tree, is_leaf, inside=is_tensor)  # LEAF-1
    tensors = [*map(as_tensor, flat.leaves)]
    chosen = [
        number
        for number, tensor in enumerate(tensors)
        if tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_quantized
    ]
    if sum(tensors[number].nbytes for number in chosen) < MIB:
        return tree
    chosen = [number for number in chosen if not arena.locate(tensors[number].data_ptr())]
    try:
        copies = clone([tensors[number] for number in chosen], arena)
    except OutOfMemoryError:
        return tree
    leaves = [*flat.leaves]
    for number, copy in zip(chosen, copies, strict=True):
        is_array = isinstance(leaves[number], np.ndarray)
        leaves[number] = as_array(copy) if is_array else same_kind(copy, tensors[number])
    return flat.rebuild(leaves)


async def export(
    tree: Any,  # noqa: ANN401
    label: str,
    *,
    transport: str | None,
    snapshot: bool,
    frozen: bool = False,
) -> Any:  # noqa: ANN401
    """Turn the tensors of ``tree`` into refs; without tensors, ``tree`` itself.

    ``frozen``: they are never written to again, so that `get` need not copy what lies in shared
    memory, but keeps its lease.
    """
    exporting = Exporting(tree, label, transport=transport, snapshot=snapshot, frozen=frozen)
    if exporting.empty:
        return tree
    exporting.clone_on_devices()
    if nbytes := exporting.clones:
        if nbytes <= _CLONE_ON_LOOP_NBYTES:
            exporting.clone()
        else:
            with exporting.runtime.registry.holding(exporting.originals):  # REG-3
                await finish(exporting.runtime.workers.run(exporting.clone))
    exporting.record()
    count = await exporting.begin_when_room() if exporting.may_wait else exporting.begin()
    try:
        if exporting.checked:
            await exporting.seal()
        markers = await exporting.runtime.markers.take(count) if count else []
    except BaseException:
        exporting.abandon()
        raise
    return exporting.finish(markers)


def export_blocking(tree: Any, label: str, *, transport: str | None, snapshot: bool) -> Any:  # noqa: ANN401
    """As `export`, for threads that have no event loop."""
    exporting = Exporting(tree, label, transport=transport, snapshot=snapshot)
    if exporting.empty:
        return tree
    exporting.clone_on_devices()
    if exporting.clones:
        exporting.clone()
    exporting.record()
    if exporting.may_wait:
        count = exporting.runtime.io.run_sync(exporting.begin_when_room())
    else:
        count = exporting.begin()
    try:
        if exporting.checked:
            exporting.runtime.io.run_sync(exporting.seal())
        markers = exporting.runtime.markers.take_blocking(count) if count else []
    except BaseException:
        exporting.abandon()
        raise
    return exporting.finish(markers)


async def put(tree: Any, *, transport: str | None = None, snapshot: bool = False) -> Any:  # noqa: ANN401
    """Turn every tensor and array in ``tree`` into a `TensorRef`, held by this process.

    A numpy array arrives as an array; what else has ``__dlpack__`` arrives as a tensor.

    Works in drivers, tasks and actors of any kind. A task worker that exported stays alive
    for as long as somebody holds a ref.

    Args:
        tree: A tensor or array, or any value with such in it: containers are walked, other
            objects are searched for tensors as they would be pickled. Arrays that PyTorch
            cannot take, and those in objects that are no containers, are left as they are.
        transport: Only this transport may move the tensors; it also turns inlining off.
        snapshot: Export copies, so that later in-place changes are not seen.

    Returns:
        The same tree with refs in the tensors' places; ``tree`` itself if it has no tensor.

    Raises:
        UsageError: A tensor cannot be exported (sparse, quantized, on a strange device, ...), or
            there is no such transport. Nothing was exported.
        UnavailableError: The transport cannot be used in this process.

    Cost:
        About 10 µs for each tensor, and a lease of 0.4 ms, made ahead, for each storage of
        1 MiB or more and for all smaller ones together.
    """
    check_transport(transport)
    label = _caller(sys._getframe(1))  # noqa: SLF001
    return await export(tree, label, transport=transport, snapshot=snapshot)


def _caller(frame: FrameType) -> str:
    return f"put() in {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
