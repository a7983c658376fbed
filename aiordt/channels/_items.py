"""An item as it travels: its tensors, side by side in a buffer, and the tree around them."""

from __future__ import annotations

import ctypes
import io
import pickle
from math import prod
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from typing_extensions import override

from aiordt import _wire
from aiordt._errors import InvalidTypeError, ProtocolViolationError, UsageError
from aiordt._exports import check_exportable
from aiordt._landing import dressed, dtype_of
from aiordt._leaves import as_tensor, is_leaf
from aiordt._memory import aligned, dense_stride
from aiordt._ray import CloudPickler, is_opaque
from aiordt._types import DTYPE_CODES, ITEMSIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt._memory import Lent
    from aiordt.channels._frames import Meta

#: Types that hold no tensors, or whose contents the pickler shows one by one.
_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None), dict, list, tuple, complex})
_Leaf: TypeAlias = "int | tuple[int, type[torch.Tensor]]"


class _Pickler(CloudPickler):  # type: ignore[misc]
    """Pickles a tree with the tensors kept out."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.leaves: list[Any] = []
        self._indices: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> _Leaf | None:  # noqa: ANN401
        cls = type(obj)
        if cls in _PLAIN:
            return None
        if is_leaf(obj):
            index = self._indices.get(id(obj))
            if index is None:
                index = self._indices[id(obj)] = len(self.leaves)
                self.leaves.append(obj)
            if (
                cls is torch.Tensor
                or cls is torch.nn.Parameter
                or not isinstance(obj, torch.Tensor)
            ):
                return index
            return index, cls
        if is_opaque(obj):
            raise InvalidTypeError(
                f"a {cls.__name__} cannot go through a channel: Ray would not count it. Send what "
                "it stands for (await it first), or pass it in a call of Ray"
            )
        return None


class _Unpickler(pickle.Unpickler):
    """Reads a tree back, with what has come in the tensors' places."""

    def __init__(self, data: bytes, values: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._values = values

    @override
    def persistent_load(self, pid: _Leaf) -> Any:
        if isinstance(pid, tuple):
            index, cls = pid
            value = self._values[index]
            grad = value.requires_grad
            return value.detach().as_subclass(cls).requires_grad_(grad)
        return self._values[pid]


class Packed:
    """An item that is about to be sent.

    Attributes:
        rest: The tree around its tensors, pickled; empty: it is a tensor.
        tensors: They.
        metas: What is said of them.
        nbytes: Of all of them, side by side.
        on_host: Whether all are in host memory.
    """

    __slots__ = ("metas", "nbytes", "on_host", "rest", "tensors")

    def __init__(self, tree: object) -> None:
        if type(tree) is torch.Tensor:
            self.rest = b""
            leaves: list[Any] = [tree]
        else:
            buffer = io.BytesIO()
            pickler = _Pickler(buffer)
            try:
                pickler.dump(tree)
            except UsageError:
                raise
            except Exception as exc:
                raise InvalidTypeError(
                    f"a {type(tree).__qualname__} cannot go through a channel: {exc}"
                ) from exc
            self.rest = buffer.getvalue()
            leaves = pickler.leaves
        self.tensors: list[torch.Tensor] = []
        self.metas: list[Meta] = []
        self.on_host = True
        nbytes = 0
        for leaf in leaves:
            tensor = self._add(leaf)
            nbytes = aligned(nbytes) + tensor.nbytes
        self.nbytes = nbytes

    def _add(self, leaf: Any) -> torch.Tensor:  # noqa: ANN401
        tensor = as_tensor(leaf)
        check_exportable(tensor)
        flags = 0
        if leaf is not tensor:
            flags = _wire.FLAG_NUMPY if isinstance(leaf, np.ndarray) else 0
        elif tensor.requires_grad:
            flags = _wire.FLAG_REQUIRES_GRAD
        if type(tensor) is torch.nn.Parameter:
            flags |= _wire.FLAG_PARAMETER
        if not tensor.is_cpu:
            self.on_host = False
        shape = tuple(tensor.shape)
        stride = None
        if not tensor.is_contiguous():
            stride = dense_stride(shape, tensor.stride())
        self.tensors.append(tensor)
        self.metas.append((DTYPE_CODES[tensor.dtype], flags, shape, stride))
        return tensor

    def pieces(self, target: torch.Tensor, start: int) -> list[tuple[int, int, int]]:
        """Copies of bytes that put the tensors into a buffer, once `lay_out` has done the rest."""
        found = []
        base = target.data_ptr() + start
        offset = 0
        for tensor in self.tensors:
            offset = aligned(offset)
            nbytes = tensor.nbytes
            if _is_plain(tensor):
                found.append((tensor.data_ptr(), base + offset, nbytes))
            offset += nbytes
        return found

    def lay_out(self, target: torch.Tensor, start: int) -> None:
        """Put tensors into a buffer whose bytes do not lie there as they do here."""
        offset = start
        for tensor, (_, _, shape, stride) in zip(self.tensors, self.metas, strict=True):
            offset = aligned(offset)
            if not _is_plain(tensor):
                flat = target[offset : offset + tensor.nbytes].view(tensor.dtype)
                dense = flat.view(shape) if stride is None else flat.as_strided(shape, stride)
                dense.copy_(tensor.detach())
            offset += tensor.nbytes


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def copy(pieces: Sequence[tuple[int, int, int]]) -> None:
    """Copy pieces of memory."""
    for source, target, nbytes in pieces:
        ctypes.memmove(target, source, nbytes)


def offsets(metas: Sequence[Meta]) -> list[tuple[int, int]]:
    """Where each tensor of an item begins, and its size, in bytes."""
    found = []
    offset = 0
    for code, _, shape, _ in metas:
        if code >= len(ITEMSIZES):
            raise ProtocolViolationError(f"an item has a tensor of the unknown dtype {code}")
        nbytes = prod(shape) * ITEMSIZES[code]
        offset = aligned(offset)
        found.append((offset, nbytes))
        offset += nbytes
    return found


def num_bytes(metas: Sequence[Meta]) -> int:
    """Bytes of an item, side by side."""
    places = offsets(metas)
    return sum(places[-1]) if places else 0


def on_memory(metas: Sequence[Meta], lent: Lent, room: int) -> list[torch.Tensor]:
    """An item's tensors where its bytes lie, beginning at ``lent``.

    Raises:
        ProtocolViolationError: There are not so many.
    """
    tensors = []
    for (offset, nbytes), (code, _, shape, stride) in zip(offsets(metas), metas, strict=True):
        if offset + nbytes > room:
            raise ProtocolViolationError("an item is not in the buffer that it names")
        dtype = dtype_of(code)
        if not nbytes:
            tensors.append(torch.empty(shape, dtype=dtype))
            continue
        flat = torch.frombuffer(lent, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset)
        tensors.append(flat.view(shape) if stride is None else flat.as_strided(shape, stride))
    return tensors


def in_memory(
    metas: Sequence[Meta], empty: Callable[..., torch.Tensor]
) -> tuple[list[torch.Tensor], list[tuple[int, int, torch.Tensor]]]:
    """New tensors for an item's, and for each what to read of the item: offset and bytes."""
    tensors = []
    reads = []
    for (offset, nbytes), (code, _, shape, stride) in zip(offsets(metas), metas, strict=True):
        made = empty(shape, dtype_of(code), stride)
        tensors.append(made)
        if nbytes:
            reads.append((offset, nbytes, made))
    return tensors, reads


def rebuilt(
    rest: bytes, metas: Sequence[Meta], tensors: Sequence[torch.Tensor], *, seen: bool
) -> Any:  # noqa: ANN401
    """The item; ``seen``: its tensors are another process's memory, and arrays are read-only."""
    values: Sequence[Any] = tensors
    if any(flags for _, flags, _, _ in metas):
        values = [
            dressed(tensor, flags, None)
            for tensor, (_, flags, _, _) in zip(tensors, metas, strict=True)
        ]
        for value in values if seen else ():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
    return _Unpickler(rest, values).load() if rest else values[0]
