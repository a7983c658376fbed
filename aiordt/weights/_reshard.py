"""States that several processes hold parts of, received in any other partition.

Each owner exports its parts as refs, with what they are of the whole. Who wants other parts
pulls just what is in both, straight into place: slices of the owners' tensors into slices of
its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from aiordt._errors import AiordtError, InvalidTypeError, InvalidValueError
from aiordt._export import put
from aiordt._get import fetch_objects, get
from aiordt._landing import converts
from aiordt._progress import finish
from aiordt._ref import TensorRef, restrided
from aiordt._runtime import current
from aiordt.weights import _shards
from aiordt.weights._shards import AnyPlacement, FlatShard, Placement, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.weights._shards import Move, Piece

#: What is said of all tensors, of each by its name, or by a function of name and whole shape.
Layout: TypeAlias = (
    "AnyPlacement | Mapping[str, AnyPlacement] | Callable[[str, tuple[int, ...]], AnyPlacement]"
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one process has of a tensor. Made by `export_shards`; travels as any value with refs.

    Attributes:
        ref: Its tensor.
        placement: What that is of the whole.
        shape: Of the whole, where it was given.
    """

    ref: TensorRef
    placement: Placement
    shape: tuple[int, ...] | None


def _dtensor() -> Any:  # noqa: ANN401
    """The class, if anybody can have made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def _is_dtensor(value: object) -> bool:
    cls = _dtensor()
    return cls is not None and isinstance(value, cls)


def placement_of(tensor: Any) -> Placement:  # noqa: ANN401
    """What a ``DTensor`` has here of its whole.

    Raises:
        InvalidValueError: It has partial sums, or pieces that are not in order (strided shards).
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise InvalidValueError("a DTensor whose mesh this process is not in has nothing here")
    shards = []
    for dim, each in enumerate(tensor.placements):
        if each.is_partial():
            raise InvalidValueError("a DTensor of partial sums: redistribute it first")
        if type(each).__name__ == "_StridedShard":
            raise InvalidValueError(
                "a DTensor with strided shards (FSDP over TP on one dimension): redistribute it "
                "first"
            )
        if each.is_shard():
            shards.append(Shard(each.dim, coordinate[dim], mesh.size(dim)))
    return tuple(shards)


def _chosen(layout: Layout, name: str, shape: tuple[int, ...]) -> Placement:
    if isinstance(layout, Mapping):
        return _shards.placement(layout.get(name))
    if isinstance(layout, Shard | FlatShard | tuple | list) or layout is None:
        return _shards.placement(layout)
    if not callable(layout):
        raise InvalidTypeError(
            f"a layout is a placement, a mapping of names to such, or a function, not {layout!r}"
        )
    return _shards.placement(layout(name, shape))


async def export_shards(
    state: Mapping[str, torch.Tensor],
    layout: Layout = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    snapshot: bool = False,
    transport: str | None = None,
) -> dict[str, Part]:
    """Export this process's parts of a state that several processes hold.

    Args:
        state: Tensors by name. Of a ``DTensor`` its local part; what that is, it says itself.
        layout: What the other tensors are of their wholes: a `Shard` or `FlatShard`, a tuple of
            Shards (pieces of pieces), by name if need be; nothing: the tensor is whole. A
            function is called with a name and the whole's shape, if ``shapes`` has it.
        shapes: Shapes of wholes, by name. Needed for flat shards and where a dimension was split
            twice; otherwise found out from the parts.
        snapshot: As for `aiordt.put`.
        transport: As for `aiordt.put`.

    Returns:
        The parts by name, to be returned to, or passed to, whoever calls `load_shards`.

    Raises:
        UsageError: A placement is not valid, or a tensor cannot be exported; names it.

    Cost:
        As `aiordt.put`.
    """
    placements: dict[str, Placement] = {}
    wholes: dict[str, tuple[int, ...] | None] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        given = None if shapes is None else shapes.get(name)
        shape = None if given is None else tuple(given)
        try:
            if _is_dtensor(tensor):
                whole: Any = tensor
                placements[name], shape = placement_of(whole), tuple(whole.shape)
                tensors[name] = whole.to_local()
            else:
                placements[name] = _chosen(layout, name, shape or tuple(tensor.shape))
                tensors[name] = tensor
            if shape is None and not placements[name]:
                shape = tuple(tensor.shape)
            local = tuple(tensors[name].shape)
            if shape is not None:
                _shards.common_shape([(local, placements[name], shape)])
            elif isinstance(placements[name][0], FlatShard):
                _shards.common_shape([(local, placements[name], None)])
        except AiordtError as exc:
            raise exc.said(repr(name)) from exc
        wholes[name] = shape
    refs = await put(tensors, snapshot=snapshot, transport=transport)
    return {name: Part(refs[name], placements[name], wholes[name]) for name in tensors}


async def load_shards(
    parts: Any,  # noqa: ANN401
    layout: Layout = None,
    *,
    into: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    transport: str | None = None,
) -> dict[str, torch.Tensor]:
    """Receive a state in another partition than that of its owners; only overlaps move.

    Args:
        parts: What `export_shards` returned to each owner, in any order: a sequence of such
            dicts, or of ObjectRefs of them. The same part from several owners is read
            from one of them, the nearest.
        layout: What this process is to have of each tensor, as for `export_shards`; nothing:
            all of it.
        into: Tensors to receive into, by name; only these are received. A ``DTensor`` is filled
            as far as it is here, and says what that is.
        dtype: Convert floating-point tensors to this dtype; ``into`` says it otherwise.
        transport: Use this transport only.

    Returns:
        The tensors by name, which are this process's parts; flat shards have one dimension.

    Raises:
        UsageError: Parts are missing, overlap, or do not fit each other or ``into``; names the
            tensor. Nothing was moved.
        AiordtError: As `aiordt.get`.

    Cost:
        That of pulling the bytes in common. A plan is made once for each combination of shape,
        parts and layout: about 20 µs for each part, and looked up afterwards.
    """
    found = await fetch_objects(list(parts))
    gathered = _gathered(found)
    if into is not None:
        absent = [name for name in into if name not in gathered]
        if absent:
            raise InvalidValueError(f"no owner has {', '.join(map(repr, absent))}")
    result: dict[str, Any] = {}
    refs: list[TensorRef] = []
    targets: list[torch.Tensor] = []
    for name in gathered if into is None else into:
        held = gathered[name]
        try:
            target, moves = _planned(name, held, layout, None if into is None else into[name])
            tensor = target if target is not None else _made(held, moves, dtype)
        except AiordtError as exc:
            raise exc.said(repr(name)) from exc
        result[name] = tensor if into is None else into[name]
        for move in moves.moves:
            refs.append(_source(held, move))
            targets.append(_cut(tensor, move.target))
    await _pull(refs, targets, transport)
    return result


@dataclass(frozen=True, slots=True)
class _Moves:
    """What is to be done for one tensor."""

    shape: tuple[int, ...]
    moves: tuple[Move, ...]


def _gathered(found: Sequence[object]) -> dict[str, list[Part]]:
    gathered: dict[str, list[Part]] = {}
    for each in found:
        if not isinstance(each, Mapping):
            raise InvalidTypeError(
                f"load_shards takes what export_shards returned to each owner, not {each!r}"
            )
        for name, part in each.items():
            if not isinstance(part, Part):
                raise InvalidTypeError(f"{name!r} is no part that export_shards made")
            gathered.setdefault(name, []).append(part)
    return gathered


def _planned(
    name: str, held: Sequence[Part], layout: Layout, target: torch.Tensor | None
) -> tuple[torch.Tensor | None, _Moves]:
    dtypes = {part.ref.dtype for part in held}
    if len(dtypes) > 1:
        raise InvalidValueError(f"its parts have different dtypes: {sorted(map(str, dtypes))}")
    shape = _shards.common_shape(
        [(tuple(part.ref.shape), part.placement, part.shape) for part in held]
    )
    if target is not None and _is_dtensor(target):
        whole: Any = target
        if tuple(whole.shape) != shape:
            raise InvalidValueError(f"into has {tuple(whole.shape)} where {shape} arrives")
        where, target = placement_of(whole), whole.to_local()
    else:
        where = _chosen(layout, name, shape)
    local = _shards.local_shape(shape, where)
    if target is not None:
        _check_target(target, local, held[0].ref.dtype)
        if where and isinstance(where[0], FlatShard) and not target.is_contiguous():
            raise InvalidValueError("into must be contiguous to receive a flat shard")
    moves = _shards.plan(shape, tuple(part.placement for part in held), where)
    return target, _Moves(local, moves)


def _check_target(target: object, local: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(target, torch.Tensor):
        raise InvalidTypeError(f"into must be a tensor, not {type(target).__name__}")
    if tuple(target.shape) != local:
        raise InvalidValueError(f"into has the shape {tuple(target.shape)} where {local} arrives")
    if target.dtype != dtype and not converts(dtype, target.dtype):
        raise InvalidValueError(f"into has {target.dtype} where {dtype} arrives")


def _made(held: Sequence[Part], moves: _Moves, dtype: torch.dtype | None) -> torch.Tensor:
    source = held[0].ref.dtype
    wanted = dtype if dtype is not None and converts(source, dtype) else source
    return current().pool.empty(moves.shape, wanted)


def _source(held: Sequence[Part], move: Move) -> TensorRef:
    """The ref to what one move reads: that of the nearest owner which has it."""
    here = current().address

    def distance(number: int) -> tuple[bool, bool, int]:
        address = held[number].ref.header.address
        other = address.runtime_id != here.runtime_id
        spread = int.from_bytes(here.runtime_id[:4]) + number * 2654435761
        return other, address.host_id != here.host_id, spread % 2**32

    part = held[min(move.sources, key=distance)]
    piece = move.source
    if piece.flat is None:
        return part.ref[_index(piece)]
    stride = _dense(piece.shape)
    start = piece.flat + sum(
        low * step for (low, _), step in zip(piece.ranges, stride, strict=True)
    )
    return restrided(part.ref, start, move.shape, stride)


def _index(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in piece.ranges)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.insert(0, step)
        step *= size
    return tuple(stride)


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What one move writes."""
    plain = tensor.detach()
    if piece.flat is not None:
        plain = plain[piece.flat : piece.flat + prod(piece.shape)].view(piece.shape)
    return plain[_index(piece)]


async def _pull(
    refs: Sequence[TensorRef], targets: Sequence[torch.Tensor], transport: str | None
) -> None:
    """Bring it all here, together; what changes its dtype on the way is copied once more."""
    same = [number for number, ref in enumerate(refs) if ref.dtype == targets[number].dtype]
    if same:
        await get(
            [refs[number] for number in same],
            into=[targets[number] for number in same],
            transport=transport,
        )
    others: dict[torch.dtype, list[int]] = {}
    for number, ref in enumerate(refs):
        if ref.dtype != targets[number].dtype:
            others.setdefault(targets[number].dtype, []).append(number)
    for dtype, numbers in others.items():
        arrived = await get([refs[number] for number in numbers], dtype=dtype, transport=transport)

        def fill(arrived: list[torch.Tensor] = arrived, numbers: list[int] = numbers) -> None:
            for number, tensor in zip(numbers, arrived, strict=True):
                targets[number].copy_(tensor.detach())

        await finish(current().workers.run(fill))
