"""Trees: finding leaves anywhere in a value, and putting others in their places.

Containers are walked; any other object is searched by pickling it with the leaves kept out
(as Ray's own direct transport does), and rebuilt by unpickling. What holds no leaf is left
untouched: the same object comes back.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

import numpy as np
import torch
from typing_extensions import override

from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._leaves import is_target
from aiordt._ray import CloudPickler, is_opaque

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Values: TypeAlias = Sequence[Any]
_Rebuild: TypeAlias = Callable[[Values], Any]

#: Never searched: they hold no tensors. Arrays of objects are not among them.
_PLAIN: Final = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, bytearray, range, type, np.dtype,
        torch.dtype, torch.device, torch.Size, type(Ellipsis), type(NotImplemented),
        dt.datetime, dt.date, dt.timedelta, Decimal, Fraction, UUID,
    }
)  # fmt: skip


class _CycleError(Exception):
    """A container holds itself."""


@dataclass(frozen=True, slots=True)
class TensorDictRefs:
    """A ``TensorDict`` whose tensors are refs; `aiordt.get` makes it a ``TensorDict`` again.

    Attributes:
        items: The entries.
        batch_size: Its batch size.
        names: Names of its dimensions, or ``None``.
        device: Its device, or ``None``.
        locked: Whether it was locked.
    """

    items: Mapping[str, Any]
    batch_size: torch.Size
    names: tuple[str | None, ...] | None
    device: torch.device | None
    locked: bool

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        return self.items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class Flat:
    """The leaves of a tree, and the tree around them.

    Attributes:
        leaves: Each leaf once, in tree order (with ``every``, each time it occurs). Leaves
            are one if ``same`` gives the same for them: the object's identity, or the leaf.
        has_tensordicts: Whether a `TensorDictRefs` is among the containers.

    In objects that are no containers, ``inside`` says what is a leaf, if it is given. With
    ``strict``, an object that cannot be searched is refused; otherwise it is left alone,
    for whoever must pickle it to complain.
    """

    def __init__(
        self,
        tree: object,
        wanted: Callable[[object], bool],
        *,
        inside: Callable[[object], bool] | None = None,
        same: Callable[[Any], Hashable] = id,
        every: bool = False,
        strict: bool = False,
    ) -> None:
        self.leaves: list[Any] = []
        self._tree = tree
        self._wanted = wanted
        self._inside = inside or wanted
        self._same = same
        self._every = every
        self._strict = strict
        self.has_tensordicts = False
        self._indices: dict[Hashable, int] = {}
        self._open: set[int] = set()
        try:
            self._rebuild = self._visit(tree)
        except _CycleError:
            self.leaves.clear()
            self._indices.clear()
            self._rebuild = self._object(tree)  # pickle knows cycles

    def rebuild(self, values: Values) -> Any:  # noqa: ANN401
        """The tree with ``values`` in the places of `leaves`; itself if it has none."""
        return self._tree if self._rebuild is None else self._rebuild(values)

    def _leaf(self, leaf: object) -> int:
        if not self._every and len(self._indices) < len(self.leaves):
            self._indices = {self._same(leaf): i for i, leaf in enumerate(self.leaves)}
        same = self._same(leaf)
        index = None if self._every else self._indices.get(same)
        if index is None:
            index = self._indices[same] = len(self.leaves)
            self.leaves.append(leaf)
        return index

    def _visit(self, value: Any) -> _Rebuild | None:  # noqa: ANN401
        cls = type(value)
        if cls in _PLAIN:
            return None
        if self._wanted(value):
            index = self._leaf(value)
            return lambda values: values[index]
        if is_opaque(value) or isinstance(value, torch.Tensor | np.generic | Enum):
            return None
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return None
        walk = _walker(value)
        if walk is None:
            return self._object(value)
        if id(value) in self._open:
            raise _CycleError
        self._open.add(id(value))
        rebuild = walk(self, value)
        self._open.discard(id(value))
        return rebuild

    def _dict(self, value: dict[Any, Any]) -> _Rebuild | None:
        if _PLAIN.issuperset(map(type, value.values())):
            return None
        exact = type(value) is dict or type(value) is OrderedDict
        if exact and all(map(self._wanted, value.values())):  # a state dict: 3 times as fast
            keys, make = list(value), type(value)
            leaves = list(value.values())
            if not self.leaves and len(set(map(self._same, leaves))) == len(leaves):
                self.leaves = leaves
                return lambda values: make(zip(keys, values[: len(keys)], strict=True))
            indices = list(map(self._leaf, leaves))
            return lambda values: make(zip(keys, map(values.__getitem__, indices), strict=True))
        parts = {key: rebuild for key, item in value.items() if (rebuild := self._visit(item))}
        if not parts:
            return None
        if type(value) is dict or type(value) is OrderedDict:
            cls = type(value)

            def rebuild_exact(values: Values) -> Any:  # noqa: ANN401
                return cls(
                    (key, parts[key](values) if key in parts else item)
                    for key, item in value.items()
                )

            return rebuild_exact

        def rebuild_copy(values: Values) -> Any:  # noqa: ANN401
            made = copy.copy(value)
            for key, part in parts.items():
                made[key] = part(values)
            return made

        return rebuild_copy

    def _sequence(self, value: Sequence[Any]) -> _Rebuild | None:
        if _PLAIN.issuperset(map(type, value)):
            return None
        parts = [self._visit(item) for item in value]
        if not any(parts):
            return None

        def items(values: Values) -> list[Any]:
            return [
                item if part is None else part(values)
                for item, part in zip(value, parts, strict=True)
            ]

        cls: Any = type(value)
        if cls is list:
            return items
        if hasattr(cls, "_make"):
            return lambda values: cls._make(items(values))
        if hasattr(cls, "n_sequence_fields"):  # a struct sequence, as torch.max returns
            return lambda values: cls(items(values))
        if issubclass(cls, tuple):
            return lambda values: tuple.__new__(cls, items(values))

        def rebuild_copy(values: Values) -> Any:  # noqa: ANN401
            made: Any = copy.copy(value)
            made[:] = items(values)
            return made

        return rebuild_copy

    def _set(self, value: set[Any] | frozenset[Any]) -> _Rebuild | None:
        items = list(value)
        rebuild = self._sequence(items)
        if rebuild is None:
            return None
        cls = type(value)
        return lambda values: cls(rebuild(values))

    def _dataclass(self, value: Any) -> _Rebuild | None:  # noqa: ANN401
        names = dict.fromkeys(field.name for field in dataclasses.fields(value))
        names.update(dict.fromkeys(getattr(value, "__dict__", ())))
        parts = {
            name: rebuild
            for name in names
            if hasattr(value, name) and (rebuild := self._visit(getattr(value, name)))
        }
        if not parts:
            return None

        def rebuild_copy(values: Values) -> Any:  # noqa: ANN401
            made = copy.copy(value)  # does not run __init__
            for name, part in parts.items():
                object.__setattr__(made, name, part(values))
            return made

        return rebuild_copy

    def _tensordict(self, value: Any) -> _Rebuild | None:  # noqa: ANN401
        items = dict(value.items())
        rebuild = self._dict(items)
        if rebuild is None:
            return None
        names = tuple(value.names) if value._has_names() else None  # noqa: SLF001
        return lambda values: TensorDictRefs(
            rebuild(values), value.batch_size, names, value.device, value.is_locked
        )

    def _tensordict_refs(self, value: TensorDictRefs) -> _Rebuild | None:
        self.has_tensordicts = True
        rebuild = self._dict(dict(value.items))
        if rebuild is None:
            return None

        def restore(values: Values) -> Any:  # noqa: ANN401
            from tensordict import TensorDict  # noqa: PLC0415  (optional; its maker had it)

            made = TensorDict(
                rebuild(values),
                batch_size=value.batch_size,
                device=value.device,
                names=None if value.names is None else list(value.names),
            )
            return made.lock_() if value.locked else made

        return restore

    def _object(self, value: Any) -> _Rebuild | None:  # noqa: ANN401
        before = len(self.leaves)
        buffer = io.BytesIO()
        kept: list[Any] = []
        buffers: list[pickle.PickleBuffer] = []
        finder = _Finder(self, buffer, kept, buffers)
        try:
            finder.dump(value)
        except Exception as exc:
            if self._strict:
                raise InvalidTypeError(
                    f"cannot look for tensors in a {type(value).__qualname__} ({exc}): pass the "
                    "tensors themselves"
                ) from exc
            del self.leaves[before:]
            self._indices = {k: v for k, v in self._indices.items() if v < before}
            return None
        if not finder.found:
            return None
        data = buffer.getvalue()
        return lambda values: _Restorer(data, buffers, kept, values).load()


class _Finder(CloudPickler):  # type: ignore[misc]
    """Pickles an object with the leaves, other tensors and Ray's handles kept out."""

    def __init__(
        self,
        flat: Flat,
        buffer: io.BytesIO,
        kept: list[Any],
        buffers: list[pickle.PickleBuffer],
    ) -> None:
        super().__init__(buffer, protocol=5, buffer_callback=buffers.append)
        self.found = False
        self._flat = flat
        self._kept = kept

    def persistent_id(self, obj: Any) -> tuple[bool, int] | None:  # noqa: ANN401
        if type(obj) in _PLAIN:
            return None
        if self._flat._inside(obj):  # noqa: SLF001
            self.found = True
            return True, self._flat._leaf(obj)  # noqa: SLF001
        if is_opaque(obj) or isinstance(obj, torch.Tensor):
            self._kept.append(obj)
            return False, len(self._kept) - 1
        return None


class _Restorer(pickle.Unpickler):
    """Reads back what `_Finder` wrote, in this same process, with other leaves."""

    def __init__(
        self,
        data: bytes,
        buffers: list[pickle.PickleBuffer],
        kept: list[Any],
        values: Values,
    ) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._kept = kept
        self._values = values

    @override
    def persistent_load(self, pid: Any) -> Any:
        wanted, index = pid
        return self._values[index] if wanted else self._kept[index]


_Walker: TypeAlias = Callable[[Flat, Any], "_Rebuild | None"]


def _walker(value: object) -> _Walker | None:
    """How a container is walked; ``None`` for what is none."""
    if isinstance(value, dict):
        return Flat._dict  # noqa: SLF001
    if isinstance(value, list | tuple):
        return Flat._sequence  # noqa: SLF001
    if isinstance(value, set | frozenset):
        return Flat._set  # noqa: SLF001
    if isinstance(value, TensorDictRefs):
        return Flat._tensordict_refs  # noqa: SLF001
    if dataclasses.is_dataclass(value) and not _is_tensorclass(value):
        return Flat._dataclass  # noqa: SLF001
    tensordict = sys.modules.get("tensordict")
    if tensordict is not None and type(value) is getattr(tensordict, "TensorDict", None):
        return Flat._tensordict  # noqa: SLF001
    return None


def _is_tensorclass(value: object) -> bool:
    return hasattr(type(value), "_is_tensorclass") or isinstance(value, type)


def place(tree: object, leaf: object, root: str) -> str:
    """Where a leaf is in a tree, as one would write it: ``root['layer'][0]``.

    Only for messages: walks all of it. Of a leaf inside an object, or in a set, it gives an
    empty string.
    """
    if tree is leaf:
        return root
    if isinstance(tree, torch.Tensor):
        return ""
    for key, child in _children(tree).items():
        found = place(child, leaf, f"{root}[{key!r}]")
        if found:
            return found
    return ""


def match(
    tree: object,
    like: object,
    wanted: Callable[[object], bool],
    fits: Callable[[object], bool] = is_target,
    path: str = "into",
) -> list[Any]:
    """What ``like`` has in the places of the wanted leaves of ``tree``, in tree order.

    Args:
        tree: The tree.
        like: One of the same structure.
        wanted: What is a leaf.
        fits: What may be in the place of one.
        path: How errors call ``like``.

    Raises:
        InvalidTypeError: What is in a place does not fit.
        InvalidValueError: The structures differ. Both name the place.
    """
    found: list[Any] = []
    _match(tree, like, wanted, fits, path, found)
    return found


def _match(  # noqa: PLR0917  (recursive)
    tree: Any,  # noqa: ANN401
    like: Any,  # noqa: ANN401
    wanted: Callable[[object], bool],
    fits: Callable[[object], bool],
    path: str,
    found: list[Any],
) -> None:
    if wanted(tree):
        if not fits(like):
            must = "a tensor or a plain array" if fits is is_target else "a TensorRef"
            raise InvalidTypeError(f"{path} must be {must}, not {type(like).__name__}")
        found.append(like)
        return
    children = _children(tree)
    if not children:
        return
    others = _children(like)
    if others.keys() != children.keys():
        raise InvalidValueError(
            f"{path} has {sorted(map(str, others))} where the refs have "
            f"{sorted(map(str, children))}"
        )
    for key, child in children.items():
        _match(child, others[key], wanted, fits, f"{path}[{key!r}]", found)


def _children(tree: Any) -> dict[Any, Any]:  # noqa: ANN401
    if isinstance(tree, dict):
        return tree
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    if isinstance(tree, TensorDictRefs):
        return dict(tree.items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    tensordict = sys.modules.get("tensordict")
    if tensordict is not None and isinstance(tree, tensordict.TensorDict):
        return dict(tree.items())
    return {}
