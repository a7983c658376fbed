"""`get`: trees of refs in, trees of tensors out."""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from ray import ObjectRef

from aiordt import _device, _ray, _wire
from aiordt._batch import tied
from aiordt._errors import InvalidTypeError, InvalidValueError
from aiordt._export import check_transport, same_kind
from aiordt._into import is_tensor_ref, targets_for
from aiordt._landing import converts
from aiordt._leaves import as_array, as_tensor, is_leaf, is_tensor
from aiordt._progress import run_all
from aiordt._ref import TensorRef
from aiordt._runtime import current, current_for
from aiordt._sharing import convert
from aiordt._tree import Flat, place
from aiordt._types import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

_CONVERT_ON_LOOP_NBYTES: Final = MIB
#: Of these flags, one is to be set and the other not: what is checked is pulled.
_MAPPED_FLAGS: Final = _wire.FLAG_FROZEN | _wire.FLAG_CHECKED


def is_ref(value: object) -> bool:
    """Whether ``value`` is something that `get` resolves."""
    return type(value) is TensorRef or isinstance(value, ObjectRef)


def _itself(ref: Hashable) -> Hashable:
    return ref


async def get(
    x: Any,  # noqa: ANN401
    *,
    into: Any = None,  # noqa: ANN401
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    transport: str | None = None,
) -> Any:  # noqa: ANN401
    """Bring tensors here: pull everything that ``x`` refers to, concurrently.

    The first failure is raised as it is, once the other transfers have been cancelled and
    have ended.

    Args:
        x: A `TensorRef`, a tree of them, or a Ray ``ObjectRef`` whose value holds them.
            ObjectRefs anywhere in the tree are awaited too. The same ref twice arrives as
            one tensor.
        into: Tensors or numpy arrays to receive into, in a tree of the same structure; they are
            what is returned, with their identity. All are checked before anything moves; when a
            pull fails after that, they may hold some of the new data. They are filled as under
            `torch.no_grad`, leaves that require grad included, and autograd notices. Any strides
            will do, and they may share memory in the way in which the refs' tensors do.
        device: Move what arrives to this device. On another than the CPU, arrays become tensors.
        dtype: Convert floating-point tensors to this floating-point dtype, or complex ones to
            this complex one. Where an owner sends the bytes itself (``tcp``), it converts first
            if that makes them fewer. Arrays stay arrays, unless numpy has no such dtype.
        transport: Use this transport only.

    Returns:
        The same tree with tensors (numpy arrays, where such were exported) in the places of the
        refs, with the strides that `torch.clone` gives. Tensors of one result that share memory at
        their owner move once and share memory here, with the strides that they have there; no
        others share any.

    Raises:
        OwnerDiedError: The process that held a tensor is gone.
        TensorFreedError: A ref was released, or its owner gave the tensor up.
        UnavailableError: No transport, or not the one demanded, reaches the owner.
        TransferError: A transfer failed after it had started.
        ChecksumError: ... since something else arrived than was exported, by a process with the
            setting ``checksums``. It is handed to nobody, but may be in ``into``.
        ClosedError: A ref belongs to a Ray session that has ended.
        UsageError: ``into``, ``device``, ``dtype`` or ``transport`` do not fit; nothing moved.
        PeerLostError: The owner cannot be reached.
        AuthenticationError: The owner and this process do not share the cluster's secret.
        Exception: Whatever the task behind an ObjectRef raised.

    Cost:
        About 10 µs for a small tensor of a process on this host; memory speed for large ones.
    """
    check_transport(transport)
    target = _checked_device(device)
    _check_dtype(dtype)
    if into is not None:
        return await _get_into(x, into, transport, device=device, dtype=dtype)
    if isinstance(x, TensorRef):
        tensor = await current_for(x).pull(x, transport, dtype=dtype)
        return await _converted(tensor, target, dtype)
    call = _Call(transport, dtype, {})
    return await _converted(await _get_tree(x, call, "get(...)"), target, dtype)


class _Call(NamedTuple):
    """What the parts of one `get` have in common.

    Attributes:
        transport: Use this one only.
        dtype: What will arrive is to be converted to it.
        arrivals: The tensors that it has or waits for.
    """

    transport: str | None
    dtype: torch.dtype | None
    arrivals: dict[TensorRef, asyncio.Future[torch.Tensor]]


async def _get_tree(x: Any, call: _Call, root: str) -> Any:  # noqa: ANN401
    """`get`, as part of a larger one, where ``x`` is in the place that ``root`` says."""
    flat = Flat(x, is_ref, same=_itself)
    if not flat.leaves:
        return x
    if flat.has_tensordicts and "tensordict" not in sys.modules:
        await current().workers.run(lambda: importlib.import_module("tensordict"))
    return flat.rebuild(await _resolve(flat.leaves, call, lambda ref: place(x, ref, root)))


async def _resolve(leaves: Sequence[Any], call: _Call, name: Callable[[Any], str]) -> list[Any]:
    arrivals = call.arrivals
    await _mapped(leaves, call)
    if not arrivals and all(map(is_tensor_ref, leaves)):  # nothing else to wait for
        tensors = await current_for(leaves[0]).pull_all(
            leaves, call.transport, dtype=call.dtype, name=name
        )
        return list(tensors)
    loop = asyncio.get_running_loop()
    mine = [leaf for leaf in leaves if isinstance(leaf, TensorRef) and leaf not in arrivals]
    arrivals.update((ref, loop.create_future()) for ref in mine)
    values: list[Any] = [None] * len(leaves)

    async def pull() -> None:
        try:
            tensors = await current_for(mine[0]).pull_all(
                mine, call.transport, dtype=call.dtype, name=name
            )
        except BaseException:
            for ref in mine:
                arrivals[ref].cancel()  # others in this call that wait for it end with it
            raise
        for ref, tensor in zip(mine, tensors, strict=True):
            arrivals[ref].set_result(tensor)

    async def follow(index: int) -> None:
        leaf = leaves[index]
        if isinstance(leaf, TensorRef):
            values[index] = await asyncio.shield(arrivals[leaf])
        else:
            values[index] = await _get_tree(await _ray.fetch(leaf), call, name(leaf))

    jobs = [pull()] if mine else []
    pulled = set(mine)
    others = [index for index, leaf in enumerate(leaves) if leaf not in pulled]
    await run_all([*jobs, *(follow(index) for index in others)])
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, TensorRef) and values[index] is None:
            values[index] = arrivals[leaf].result()
    return values


async def _mapped(leaves: Sequence[Any], call: _Call) -> None:
    """Have the large ones that will not change, and that others do not share, without a copy."""
    frozen = [
        leaf
        for leaf in leaves
        if isinstance(leaf, TensorRef)
        and leaf.meta.flags & _MAPPED_FLAGS == _wire.FLAG_FROZEN
        and leaf.inline is None
        and leaf.nbytes >= MIB
    ]
    if not frozen or call.transport is not None or call.dtype is not None:
        return
    refs = [ref for ref in leaves if isinstance(ref, TensorRef) and ref.inline is None]
    refs = [ref for ref in refs if ref.nbytes]
    units = tied(refs, [ref.nbytes for ref in refs]).units
    shared = {refs[place] for unit in units for place in unit}
    for ref in frozen:
        if ref in shared or ref in call.arrivals:
            continue
        tensor = await current_for(ref).copy_on_write(ref)
        if tensor is not None:
            call.arrivals[ref] = asyncio.get_running_loop().create_future()
            call.arrivals[ref].set_result(tensor)


async def fetch_objects(x: Any) -> Any:  # noqa: ANN401
    """``x`` with values in the places of its ObjectRefs, and TensorRefs left as they are."""
    flat = Flat(x, lambda value: isinstance(value, ObjectRef))
    if not flat.leaves:
        return x

    async def follow(ref: ObjectRef[Any]) -> Any:  # noqa: ANN401
        return await fetch_objects(await _ray.fetch(ref))

    return flat.rebuild(await run_all([follow(ref) for ref in flat.leaves]))


async def _get_into(
    x: Any,  # noqa: ANN401
    into: Any,  # noqa: ANN401
    transport: str | None,
    *,
    device: object,
    dtype: object,
) -> Any:  # noqa: ANN401
    if device is not None or dtype is not None:
        raise InvalidValueError("into= says device and dtype already: leave out device= and dtype=")
    tree = await fetch_objects(x)
    flat, targets, tensors = await targets_for(tree, into)
    if flat.leaves:
        await current_for(flat.leaves[0]).pull_all(
            flat.leaves, transport, into=tensors, name=lambda ref: place(tree, ref, "get(...)")
        )
    return flat.rebuild(targets)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise InvalidTypeError(f"dtype must be a torch.dtype, not {type(dtype).__name__}")
    if not (dtype.is_floating_point or dtype.is_complex):
        raise InvalidValueError(
            f"dtype={dtype}: only floating-point and complex tensors are converted, to such a dtype"
        )


def _checked_device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        checked = torch.device(device)
        return torch.empty(0, device=checked).device  # with its number
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as exc:
        reason = str(exc).splitlines()[0]
        raise InvalidValueError(f"device {device!r} cannot be used here: {reason}") from exc


async def _converted(
    value: Any,  # noqa: ANN401
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Any:  # noqa: ANN401
    """Convert the tensors of what arrived; in host memory, large ones on a worker thread."""
    if device is None and dtype is None:
        return value
    flat = Flat(value, is_leaf, inside=is_tensor)  # LEAF-1

    def made(leaf: Any, tensor: torch.Tensor, plain: torch.Tensor) -> Any:  # noqa: ANN401
        if isinstance(leaf, np.ndarray):
            changed = plain.dtype is not tensor.dtype or plain.device != tensor.device
            return as_array(plain) if changed else leaf
        if tensor.requires_grad or type(tensor) is not torch.Tensor:
            return same_kind(plain, tensor)
        return plain

    def converted() -> list[Any]:
        plain = convert(tensors, device, dtype)
        return [made(*row) for row in zip(flat.leaves, tensors, plain, strict=True)]

    async def moved(leaf: Any, tensor: torch.Tensor) -> Any:  # noqa: ANN401
        wanted = dtype if dtype is not None and converts(tensor.dtype, dtype) else None
        plain = tensor.detach()
        where = device or plain.device
        if where != plain.device:
            plain = await _device.move(plain, where, wanted, current().workers)
        elif wanted is not None:
            plain = plain.to(wanted)
        return made(leaf, tensor, plain)

    tensors = [as_tensor(leaf) for leaf in flat.leaves]
    if "cuda" in {tensor.device.type for tensor in tensors} | {device and device.type}:
        return flat.rebuild([await moved(*row) for row in zip(flat.leaves, tensors, strict=True)])
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if nbytes <= _CONVERT_ON_LOOP_NBYTES:
        return flat.rebuild(converted())
    return flat.rebuild(await current().workers.run(converted))


def get_blocking(tree: Any) -> Any:  # noqa: ANN401
    """As `get`, for threads that have no event loop."""
    return current().io.run_sync(get(tree))
