"""What may be asked of a group, and how two members see that they asked for the same.

Before anything of a collective moves, every member has the descriptor of every other, so that
all of them raise the same error where two differ (GRP-1).

Invariants:
    GRP-1  Members that call different things, or the same with other shapes, dtypes, reductions
           or roots, all raise an error that names the ranks and the difference, and nothing has
           moved; the next call works.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack
import torch
from typing_extensions import override

from aiordt._errors import InvalidTypeError, InvalidValueError, ProtocolViolationError, UsageError
from aiordt._types import DTYPE_CODES, DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

REDUCTIONS: Final = ("sum", "product", "min", "max", "avg", "band", "bor", "bxor")
#: Calls that reduce.
REDUCING: Final = frozenset({"allreduce", "reduce", "reducescatter"})
#: Calls that cut along dimension 0, a piece for each member.
CUTTING: Final = frozenset({"reducescatter", "scatter", "alltoall"})
#: Calls whose tensors come from one member only.
FROM_ROOT: Final = frozenset({"broadcast", "scatter"})

_BITWISE: Final = frozenset({"band", "bor", "bxor"})
_WIDE: Final = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    }
)
_UNREDUCED: Final = frozenset({"complex32", "float8_e8m0fnu", "float4_e2m1fn_x2"})


def check_reduction(op: str, dtype: torch.dtype) -> None:
    """Refuse what has no meaning.

    Raises:
        InvalidValueError: There is no such reduction.
        InvalidTypeError: It is not defined for this dtype.
    """
    if op not in REDUCTIONS:
        raise InvalidValueError(f"op={op!r}: there are {', '.join(REDUCTIONS)}")
    if dtype_name(dtype) in _UNREDUCED:
        raise InvalidTypeError(f"{dtype_name(dtype)} cannot be reduced")
    if op in _BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise InvalidTypeError(f"op={op!r} is for integers and booleans, not {dtype_name(dtype)}")
    if op in {"min", "max"} and dtype.is_complex:
        raise InvalidTypeError(f"op={op!r}: complex numbers have no order")
    if op == "avg" and not (dtype.is_floating_point or dtype.is_complex):
        raise InvalidTypeError(f"op='avg' of {dtype_name(dtype)}: convert to floating point first")
    if op == "sum" and dtype is torch.bool:
        raise InvalidTypeError("op='sum' of booleans: say 'bor', or convert to integers first")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a reduction is computed in: half precision and below in float32, rounded once."""
    return torch.float32 if dtype in _WIDE else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, say."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a call."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    @override
    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


def rows(length: int, size: int, rank: int) -> tuple[int, int]:
    """Which rows ``rank`` gets of ``length``: as `torch.tensor_split` cuts."""
    step, rest = divmod(length, size)
    start = rank * step + min(rank, rest)
    return start, start + step + (rank < rest)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a member asks for.

    Attributes:
        kind: The call.
        op: The reduction; empty if it does not reduce.
        root: The member that it is to or from; -1: there is none.
        device: Type of device of the tensors; empty where a member brings none.
        specs: Its tensors; ``None`` where a member brings none.
        extra: The tree around them, where another member must rebuild it.
        error: Why this member did not take part; it wins over all the others.
    """

    kind: str
    op: str = ""
    root: int = -1
    device: str = ""
    specs: tuple[Spec, ...] | None = None
    extra: object = None
    error: str = ""

    def pack(self) -> bytes:
        """As bytes."""
        specs = self.specs
        data: bytes = msgpack.packb(
            (
                self.kind,
                self.op,
                self.root,
                self.device,
                None if specs is None else [(s.shape, DTYPE_CODES[s.dtype]) for s in specs],
                self.extra,
                self.error,
            )
        )
        return data

    @classmethod
    def unpack(cls, data: bytes) -> Descriptor:
        """What `pack` made.

        Raises:
            ProtocolViolationError: It is not that.
        """
        try:
            kind, op, root, device, specs, extra, error = msgpack.unpackb(
                data, strict_map_key=False
            )[:7]
            found = None if specs is None else tuple(_spec(*spec) for spec in specs)
        except (ValueError, TypeError, IndexError, msgpack.UnpackException) as exc:
            raise ProtocolViolationError("not a descriptor of a collective") from exc
        return cls(kind, op, root, device, found, extra, error)

    @override
    def __str__(self) -> str:
        tensors = "" if self.specs is None else _shown(self.specs)
        words = [tensors] if tensors else []
        if self.op:
            words.append(f"op={self.op!r}")
        if self.root >= 0:
            words.append(f"{'src' if self.kind in FROM_ROOT else 'dst'}={self.root}")
        if self.device not in {"", "cpu"}:
            words.append(f"on {self.device}")
        return f"{self.kind}({', '.join(words)})"


def _spec(shape: list[int], code: int) -> Spec:
    dtype = DTYPES[code]
    if dtype is None or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError
    return Spec(tuple(shape), dtype)


def _shown(specs: Sequence[Spec]) -> str:
    shown = ", ".join(map(str, specs[:3]))
    return shown if len(specs) <= 3 else f"{shown}, ... {len(specs)} tensors"


@functools.lru_cache(maxsize=256)
def _unpacked(data: bytes) -> Descriptor:
    return Descriptor.unpack(data)


def agree(descriptors: Sequence[bytes]) -> Descriptor:
    """What all members ask for.

    Args:
        descriptors: Of each rank, packed.

    Raises:
        UsageError: Two of them differ, or a member did not take part (GRP-1).
    """
    first = descriptors[0]
    if all(other == first for other in descriptors):
        found = _unpacked(first)
        if found.error:
            raise UsageError(f"rank 0: {found.error}")
        return found
    unpacked = [Descriptor.unpack(each) for each in descriptors]
    errors = [f"rank {rank}: {each.error}" for rank, each in enumerate(unpacked) if each.error]
    if errors:
        raise UsageError("; ".join(errors))
    common = next((each for each in unpacked if each.specs is not None), unpacked[0])
    for rank, each in enumerate(unpacked):
        difference = _difference(common, each)
        if difference:
            reference = unpacked.index(common)
            raise UsageError(
                f"rank {rank} called {each}, rank {reference} {common}: {difference}; every member "
                "must make the same call"
            )
    if common.root >= 0 and unpacked[common.root].specs is not None:
        return unpacked[common.root]
    return common


def _difference(one: Descriptor, other: Descriptor) -> str:
    if one.kind != other.kind:
        return "other calls"
    if one.op != other.op:
        return "other reductions"
    if one.root != other.root:
        return "other roots"
    if one.specs is None or other.specs is None:
        return ""
    if one.device != other.device:
        return "other devices"
    if len(one.specs) != len(other.specs):
        return f"{len(one.specs)} tensors and {len(other.specs)}"
    for number, (here, there) in enumerate(zip(one.specs, other.specs, strict=True)):
        if here != there:
            which = f"tensor {number} is " if len(one.specs) > 1 else ""
            what = "dtypes" if here.dtype != there.dtype else "shapes"
            return f"{which}{here} and {there}, other {what}"
    return ""


def structure(tree: Any, leaf: Any) -> object:  # noqa: ANN401
    """A tree of plain containers as something that msgpack takes; leaves by ``leaf``.

    Raises:
        InvalidTypeError: There is another container.
    """
    if type(tree) is dict and all(type(key) in {str, int} for key in tree):
        return ["d", [[key, structure(value, leaf)] for key, value in tree.items()]]
    if type(tree) is list or type(tree) is tuple:
        return ["l" if type(tree) is list else "t", [structure(value, leaf) for value in tree]]
    number = leaf(tree)
    if number is None:
        raise InvalidTypeError(
            f"scatter of a {type(tree).__qualname__}: the other members can rebuild dicts, lists "
            "and tuples of tensors only"
        )
    return ["x", number]


def restore(found: Any, values: Sequence[Any]) -> Any:  # noqa: ANN401
    """The tree that `structure` described, with ``values`` in the places of its leaves."""
    kind, content = found
    if kind == "d":
        return {key: restore(value, values) for key, value in content}
    if kind in {"l", "t"}:
        items = [restore(value, values) for value in content]
        return items if kind == "l" else tuple(items)
    return values[content]
