"""What a published tree looks like: the tree as bytes, and buffers that its tensors fit into."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack
import numpy as np
import torch

from aiordt import _wire
from aiordt._arena import arena
from aiordt._errors import InvalidTypeError, InvalidValueError, ProtocolViolationError, UsageError
from aiordt._exports import check_exportable
from aiordt._leaves import as_tensor, is_leaf
from aiordt._memory import dense_stride
from aiordt._sharing import extent, ties_of, within
from aiordt._types import DTYPE_CODES, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from aiordt._sharing import Ties

_LEAF: Final = 0
_VALUE: Final = 1
_DICT: Final = 2
_ORDERED: Final = 3
_LIST: Final = 4
_TUPLE: Final = 5
_KINDS: Final[dict[type, int]] = {dict: _DICT, OrderedDict: _ORDERED, list: _LIST, tuple: _TUPLE}
_VALUES: Final = frozenset({type(None), bool, int, float, str, bytes})
#: A call of so many bytes is short enough for whoever waits for the thread's core.
_STEP_NBYTES: Final = 16 * MIB


class Laid:
    """A tree that is about to be published, checked as a whole.

    Args:
        tree: Dicts, lists and tuples of tensors, arrays and plain values.
        checked: Whether readers are to check what they get.

    Attributes:
        tensors: Each once, in tree order.
        skeleton: The tree around them, as bytes.
        signature: The same for trees whose tensors fit into the same buffers.

    Raises:
        InvalidTypeError: Something in it cannot be published. Names the place.
        InvalidValueError: A tensor cannot be published. Names the place.
    """

    def __init__(self, tree: object, *, checked: bool = False) -> None:
        self._checked = _wire.FLAG_CHECKED if checked else 0
        self.tensors: list[torch.Tensor] = []
        self._flags: list[int] = []
        self._numbers: dict[int, int] = {}
        node = self._visit(tree, "the tree")
        try:
            self.skeleton: bytes = msgpack.packb(node)
        except (OverflowError, ValueError) as exc:
            raise InvalidValueError(f"a value in the tree is out of bounds: {exc}") from exc
        self._ties = ties_of(self.tensors)
        self.signature: Hashable = (
            tuple(
                (tensor.shape, tensor.dtype, dense_stride(tensor.shape, tensor.stride()), flags)
                for tensor, flags in zip(self.tensors, self._flags, strict=True)
            ),
            _shape_of(self._ties, self.tensors),
        )

    def _visit(self, value: Any, place: str) -> list[object]:  # noqa: ANN401
        kind = _KINDS.get(type(value))
        if kind in {_DICT, _ORDERED}:
            rows = []
            for key, child in value.items():
                if type(key) is not str and type(key) is not int:
                    raise InvalidTypeError(f"{place}: keys must be str or int, not {key!r}")
                rows.append((key, self._visit(child, f"{place}[{key!r}]")))
            return [kind, rows]
        if kind is not None:
            items = enumerate(value)
            return [kind, [self._visit(child, f"{place}[{at}]") for at, child in items]]
        if type(value) in _VALUES:
            return [_VALUE, value]
        if not is_leaf(value):
            raise InvalidTypeError(
                f"{place} is a {type(value).__qualname__}; published trees are dicts, lists and "
                "tuples of tensors, arrays, numbers, strings, bytes and None"
            )
        return [_LEAF, self._leaf(value, place)]

    def _leaf(self, leaf: Any, place: str) -> int:  # noqa: ANN401
        known = self._numbers.get(id(leaf))
        if known is not None:
            return known
        tensor = as_tensor(leaf)
        flags = self._checked | (_wire.FLAG_NUMPY if isinstance(leaf, np.ndarray) else 0)
        if type(tensor) is torch.nn.Parameter:
            flags |= _wire.FLAG_PARAMETER
        elif type(tensor) is not torch.Tensor:
            raise InvalidTypeError(
                f"{place} is a {type(tensor).__qualname__}: publish it as a plain tensor, by "
                ".as_subclass(torch.Tensor)"
            )
        try:
            check_exportable(tensor)
        except UsageError as exc:
            raise exc.said(place) from None
        if tensor.requires_grad:
            flags |= _wire.FLAG_REQUIRES_GRAD
        number = self._numbers[id(leaf)] = len(self.tensors)
        self.tensors.append(tensor.detach().resolve_conj().resolve_neg())
        self._flags.append(flags)
        return number

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def buffers(self) -> list[torch.Tensor]:
        """Tensors in shared memory that these fit into; what shares memory shares it there, too.

        Raises:
            OutOfMemoryError: There is not enough shared memory.
        """
        made: list[torch.Tensor | None] = [None] * len(self.tensors)
        for group in self._ties.groups:
            flat = arena.empty((group.nbytes,), torch.uint8)
            for place in group.members:
                tensor = self.tensors[place]
                made[place] = within(flat, group.address, extent(tensor), tensor.dtype)
        for first, *others in self._ties.twins:
            made[first] = one = _buffer(self.tensors[first])
            for place in others:
                made[place] = one.detach()
        return [
            _buffer(tensor) if buffer is None else buffer
            for tensor, buffer in zip(self.tensors, made, strict=True)
        ]

    def copier(self, buffers: Sequence[torch.Tensor]) -> Callable[[], None]:
        """What copies these tensors to ``buffers``, on any thread; mostly without the GIL."""
        again = {place for _, *others in self._ties.twins for place in others}
        steps: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        nbytes = _STEP_NBYTES
        for place, (buffer, tensor) in enumerate(zip(buffers, self.tensors, strict=True)):
            if place in again or not tensor.numel():
                continue
            if nbytes >= _STEP_NBYTES:
                steps.append(([], []))
                nbytes = 0
            steps[-1][0].append(buffer)
            steps[-1][1].append(tensor)
            nbytes += tensor.nbytes

        def copy() -> None:
            for targets, sources in steps:
                torch._foreach_copy_(targets, sources)  # 1,000 tensors by one call

        return copy

    def describe(self, buffers: Sequence[torch.Tensor]) -> bytes:
        """The tree, and where its tensors are, for `Known`."""
        metas = []
        for buffer, flags in zip(buffers, self._flags, strict=True):
            address = buffer.data_ptr()
            meta = _wire.TensorMeta(
                DTYPE_CODES[buffer.dtype],
                flags,
                tuple(buffer.shape),
                None if buffer.is_contiguous() else buffer.stride(),
                address,
                arena.locate(address),
            )
            metas.append(_wire.pack_meta(meta))
        packed: bytes = msgpack.packb((self.skeleton, metas))
        return packed


def _buffer(tensor: torch.Tensor) -> torch.Tensor:
    return arena.empty(tensor.shape, tensor.dtype, dense_stride(tensor.shape, tensor.stride()))


def _shape_of(ties: Ties, tensors: Sequence[torch.Tensor]) -> Hashable:
    """The same for tensors that share memory in the same way."""
    groups = tuple(
        (
            group.nbytes,
            tuple((each, tensors[each].data_ptr() - group.address) for each in group.members),
        )
        for group in ties.groups
    )
    return groups, tuple(map(tuple, ties.twins))


class Known(NamedTuple):
    """What a reader knows of a buffer.

    Attributes:
        node: The tree, as it travels.
        packed: Of each tensor, its description as it travels.
        metas: The same, unpacked.
    """

    node: Any
    packed: list[bytes]
    metas: list[_wire.TensorMeta]

    @classmethod
    def unpack(cls, data: bytes) -> Known:
        """What `Laid.describe` made.

        Raises:
            ProtocolViolationError: It is not that.
        """
        try:
            skeleton, packed = msgpack.unpackb(data)
            node = msgpack.unpackb(skeleton, strict_map_key=False)
            return cls(node, packed, [_wire.unpack_meta(each) for each in packed])
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise ProtocolViolationError("not a description of a published tree") from exc

    def rebuild(self, values: Sequence[Any]) -> Any:  # noqa: ANN401
        """The tree with ``values`` in the places of its tensors.

        Raises:
            ProtocolViolationError: It is malformed.
        """
        try:
            return _rebuilt(self.node, values)
        except (ValueError, TypeError, LookupError) as exc:
            raise ProtocolViolationError("not a description of a published tree") from exc


def _rebuilt(node: Any, values: Sequence[Any]) -> Any:  # noqa: ANN401
    kind, body = node
    if kind == _LEAF:
        return values[body]
    if kind == _VALUE:
        return body
    if kind in {_DICT, _ORDERED}:
        rows = [(key, _rebuilt(child, values)) for key, child in body]
        return OrderedDict(rows) if kind == _ORDERED else dict(rows)
    items = [_rebuilt(child, values) for child in body]
    return tuple(items) if kind == _TUPLE else items
