"""Exports as values: what one is, which tensors can be one, and the bytes that a peer gets."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from typing_extensions import override

from aiordt import _device
from aiordt._errors import InvalidValueError
from aiordt._memory import storage_range
from aiordt._types import DTYPE_CODES, DTYPES, MIB
from aiordt._wire import new_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiordt._device import Event
    from aiordt._layout import Cut

#: Storages from this size on have a lease each; the smaller ones of a result share one.
LEASE_NBYTES: Final = 1 * MIB

StorageKey: TypeAlias = tuple[int, int]


class SharedTensorWarning(UserWarning):
    """A tensor is used by its owner and, at the same time, by others; in-place writes show."""


@dataclass(slots=True)
class Export:
    """The tensors of one result that this process holds for others.

    Attributes:
        key: 16 random bytes; whoever knows them may pull.
        tensors: By index; ``None`` once their lease is gone.
        storages: Where each one's storage lay when it was exported.
        groups: Indices that share a lease.
        label: Where it was made, for people.
        created: `time.monotonic` when it was made.
        ready: What must have happened on the device before the bytes may be read.
        others: What this process awaits instead of a tensor: the array that it was made of.
        seen_by: Runtime ids of processes that said they pulled it.
        local: Whether it was awaited in this process.
        warned: Whether the warning about that was given.
        sums: The checksums of each one's blocks; ``None``: it was exported without.
    """

    key: bytes
    tensors: list[torch.Tensor | None]
    storages: list[StorageKey]
    groups: list[list[int]]
    label: str
    created: float
    ready: Event
    others: dict[int, object] = field(default_factory=dict)
    seen_by: set[bytes] = field(default_factory=set)
    local: bool = False
    warned: bool = False
    sums: list[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Outstanding:
    """An export that keeps storages in use, for people.

    Attributes:
        label: Where it was made.
        age: Seconds since then.
        num_tensors: How many of its tensors are still held.
        seen_by: How many other processes are known to have pulled it.
    """

    label: str
    age: float
    num_tensors: int
    seen_by: int

    @override
    def __str__(self) -> str:
        pulled = f", pulled by {self.seen_by} processes" if self.seen_by else ""
        plural = "" if self.num_tensors == 1 else "s"
        return f"{self.label}: {self.num_tensors} tensor{plural}, {self.age:.1f} s old{pulled}"


def prepare(tensors: Sequence[torch.Tensor], label: str, ready: Event | None) -> Export:
    """What would be exported, not yet held; ``groups`` says how many leases it needs.

    Args:
        tensors: Its tensors.
        label: Where it is made, for people.
        ready: The work that makes them; ``None``: what the caller's streams have queued.
    """
    small: list[int] = []
    large: dict[StorageKey, list[int]] = {}
    storages = list(map(storage_range, tensors))
    for index, where in enumerate(storages):
        if where[1] < LEASE_NBYTES:
            small.append(index)
        else:
            large.setdefault(where, []).append(index)
    groups = [*large.values(), *([small] if small else [])]
    return Export(
        key=new_key(),
        tensors=list(tensors),
        storages=storages,
        groups=groups,
        label=label,
        created=time.monotonic(),
        ready=ready or _device.record(tensors),
    )


def overlapping(wanted: Iterable[StorageKey], exported: Iterable[StorageKey]) -> set[StorageKey]:
    """Those of ``exported`` that overlap any of ``wanted``, in part or whole."""
    events: list[tuple[int, int, int, StorageKey]] = []
    for kind, keys in ((0, wanted), (1, exported)):
        for key in keys:
            if not key[1]:
                continue
            events.append((key[0], 1, kind, key))
            events.append((key[0] + key[1], 0, kind, key))
    events.sort()
    open_now: tuple[set[StorageKey], set[StorageKey]] = (set(), set())
    found: set[StorageKey] = set()
    for _, starts, kind, key in events:
        if not starts:
            open_now[kind].discard(key)
            continue
        open_now[kind].add(key)
        if kind == 1 and open_now[0]:
            found.add(key)
        elif kind == 0:
            found |= open_now[1]
    return found


def cut_out(tensor: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    """The part of an exported tensor that a peer asks for.

    Raises:
        InvalidValueError: It is not within the tensor's storage.
    """
    if cut is None:
        if not tensor.is_contiguous():
            raise InvalidValueError("a pull of a strided tensor does not say how it lies")
        return tensor
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr() + cut.offset
    dtype = tensor.dtype if cut.itemsize == tensor.itemsize else torch.uint8
    if cut.itemsize != dtype.itemsize or start % cut.itemsize:
        raise InvalidValueError(f"elements of {cut.itemsize} bytes of a tensor of {tensor.dtype}")
    if start + cut.span > storage.nbytes():
        raise InvalidValueError("a pull goes beyond the tensor: was it resized in place?")
    view = torch.empty(0, dtype=dtype, device=tensor.device)
    return view.set_(storage, start // cut.itemsize, cut.shape, cut.stride)


def sent_dtype(view: torch.Tensor, cut: Cut | None) -> torch.dtype:
    """The dtype in which the part travels.

    Raises:
        InvalidValueError: This PyTorch does not have it.
    """
    if cut is None or cut.dtype is None:
        return view.dtype
    dtype = DTYPES[cut.dtype] if cut.dtype < len(DTYPES) else None
    if dtype is None:
        raise InvalidValueError(f"this PyTorch ({torch.__version__}) lacks a dtype that was asked")
    return dtype


def warn_if_shared(export: Export) -> None:
    """Warn, once, when a tensor is used both here, as itself, and elsewhere, as copies."""
    if export.local and export.seen_by and not export.warned:
        export.warned = True
        warnings.warn(
            f"a tensor exported by {export.label} was awaited both by its owner, which got the "
            "tensor itself, and by other processes, which got copies: in-place changes by the "
            "owner may or may not be seen there. Clone it, or export it with snapshot=True",
            SharedTensorWarning,
            stacklevel=2,
        )


def check_exportable(tensor: torch.Tensor) -> None:
    """Refuse, before anything is exported, what cannot arrive as it is.

    Raises:
        InvalidValueError: Says what the tensor is and what to do.
    """
    if tensor.is_nested:
        raise InvalidValueError("a nested tensor cannot be exported: export its .unbind()")
    if tensor.layout is not torch.strided:
        raise InvalidValueError(
            f"a tensor with layout {tensor.layout} cannot be exported: export its parts "
            "(.indices(), .values()), or .to_dense()"
        )
    if tensor.is_quantized:
        raise InvalidValueError(
            "a quantized tensor cannot be exported: export .int_repr() and its scale"
        )
    if tensor.dtype not in DTYPE_CODES:
        raise InvalidValueError(
            f"a tensor of {tensor.dtype} cannot be exported: export its .view(torch.uint8)"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise InvalidValueError(
            f"{type(tensor).__qualname__} wraps other tensors (it defines __torch_dispatch__); "
            "export what it wraps, for a DTensor .to_local()"
        )
    if not tensor.is_cpu:
        _device.layer(tensor.device)
