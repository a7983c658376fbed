"""`TensorRef`: a tensor that lives in another process, to be awaited."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final

import msgpack
import torch
from typing_extensions import override

from aiordt import _ray, _wire
from aiordt._errors import InvalidValueError, RefPicklingError, TensorFreedError
from aiordt._landing import Header, Item, describe, dtype_of, num_bytes
from aiordt._runtime import current, current_for, current_or_none
from aiordt._slices import restrided_inline, restrided_meta, slice_inline, slice_meta
from aiordt._types import Owner
from aiordt.abc import PeerAddress

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractAsyncContextManager

    from ray import ObjectRef

    from aiordt._runtime import Runtime
    from aiordt._wire import TensorMeta

_ORIGIN_VERSION: Final = 1

#: The refs alive in this process, by id: adding and discarding are atomic.
live: Final[set[int]] = set()


class Lease:
    """What keeps exported tensors alive: a marker that Ray counts over the cluster.

    Attributes:
        marker: It.
        item: Of leases in items of generators, which Ray does not count: where it is from.
        known: Whether it was seen that it is here (`aiordt._claims`).
    """

    __slots__ = ("__weakref__", "item", "known", "marker")

    def __init__(self, marker: ObjectRef[None]) -> None:
        self.marker = marker
        self.item: Item | None = None
        self.known = False

    @override
    def __reduce__(self) -> tuple[object, ...]:
        item = self.item
        return (Lease, (self.marker,)) if item is None else item.reduce(self)


class TensorRef:
    """A tensor, or array, of some process of the cluster; ``await`` it to have it here.

    Made by `aiordt.method` and `aiordt.put`, never by hand. It may be passed to any actor or
    task, in arguments, nested in them, returned, and sent on; the tensor stays where it is
    until somebody awaits the ref, and lives for as long as any ref to it does, anywhere.

    Every await gives a private copy, except in the process that owns the tensor, which gets
    the tensor itself. Small tensors travel inside the ref by value, and are copies everywhere.

    ``ref[...]`` is a ref to a part of the tensor, and moves only that part when awaited. Basic
    indexing works as on a tensor: integers, slices, ``...`` and ``None``, in any combination,
    and again on the result. Slices hold the whole tensor at its owner, and are views of the
    tensor itself there; a slice of a `torch.nn.Parameter` arrives as a plain tensor.

    Refs are equal when they stand for the same part of the same tensor of the same export.
    They are not for plain `pickle`, nor for capture in a remote function's closure: Ray cannot
    count such copies.

    Attributes:
        owner: Who holds the tensor: a plain record, which does not keep an actor alive.
        transport: The transport that the exporter demanded, or ``None``.
    """

    __slots__ = (
        "__weakref__",
        "_hash",
        "_meta",
        "_packed",
        "cls",
        "header",
        "index",
        "inline",
        "lease",
    )

    header: Header
    index: int
    inline: bytes | None
    lease: Lease | None
    cls: type[torch.Tensor] | None

    def __init__(  # noqa: PLR0917  (hot: keywords cost)
        self,
        header: Header,
        index: int,
        packed: bytes,
        lease: Lease | None,
        inline: bytes | None = None,
        cls: type[torch.Tensor] | None = None,
    ) -> None:
        self.header = header
        self.index = index
        self.inline = inline
        self.lease = lease
        self.cls = cls
        self._packed = packed
        self._meta: TensorMeta | None = None
        self._hash = 0
        live.add(id(self))

    def __del__(self) -> None:
        live.discard(id(self))

    @property
    def meta(self) -> TensorMeta:
        """The tensor's description as it travels (internal)."""
        meta = self._meta
        if meta is None:
            meta = self._meta = _wire.unpack_meta(self._packed)
        return meta

    @property
    def released(self) -> bool:
        """Whether `release` was called (internal)."""
        return self.inline is None and self.lease is None

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return torch.Size(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return dtype_of(self.meta.dtype)

    @property
    def device(self) -> torch.device:
        """The device that it is on at its owner."""
        return torch.device(self.meta.device or "cpu")

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return num_bytes(self.meta)

    @property
    def owner(self) -> Owner:
        """Who holds it."""
        return self.header.owner

    @property
    def transport(self) -> str | None:
        """The transport that the exporter demanded, or ``None``."""
        return self.header.transport

    def release(self) -> None:
        """Give up this ref before it is garbage: it can no longer be awaited. Idempotent.

        Copies of the ref, here and elsewhere, are not affected. What travelled by value is
        forgotten.
        """
        self.inline = None
        self.lease = None

    def view(self) -> AbstractAsyncContextManager[Any]:
        """See a tensor in shared memory without a copy: ``async with ref.view() as t:``.

        Works for tensors that their owner, a process of this host, made by `aiordt.empty` (or
        ``zeros``, ``empty_like``); for its own tensors; and for those that travel by value.

        The tensor is to be read: it is mapped read-only where it is another process's, and a
        write to it ends this process by a segmentation fault; a write to one's own changes it
        for everybody. It is the owner's memory, so in-place changes by the owner show. The
        owner's `wait_tensor_freed` waits for the end of the block; a tensor kept beyond that
        stays readable, but may be overwritten.

        Returns:
            A context manager that gives the tensor, detached, with the owner's strides.

        Raises:
            UnavailableError: The tensor is not in shared memory, or not on this host.
            OwnerDiedError: The process that held it is gone.
            TensorFreedError: The ref was released.
            ClosedError: The ref belongs to a Ray session that has ended.

        Cost:
            About 10 µs at any size; about 1 ms once for each of the owner's segments.
        """
        return _View(self)

    def __getitem__(self, index: Any) -> TensorRef:  # noqa: ANN401
        """A ref to a part of the tensor; nothing moves.

        Args:
            index: Integers, slices, ``...`` and ``None``, as for `torch.Tensor`.

        Raises:
            UsageError: ``index`` would copy (a mask, a list, a tensor).
            IndexError: It is out of range.
            TensorFreedError: This ref was released.

        Cost:
            About 20 µs.
        """
        lease, inline, meta = self.lease, self.inline, self.meta
        if inline is None and lease is None:
            raise TensorFreedError("this ref was released: release() gave its tensor up")
        sliced = slice_meta(meta, index)
        if sliced is meta:
            return self.__copy__()
        if inline is not None:
            inline = slice_inline(meta, inline, index, sliced)
        return TensorRef(self.header, self.index, _wire.pack_meta(sliced), lease, inline, self.cls)

    # Without it, Python would iterate by indexing, one ref and one pull a row.
    __iter__ = None

    def __await__(self) -> Generator[Any, None, Any]:
        return current_for(self).pull(self).__await__()

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorRef):
            return NotImplemented
        return (
            self.index == other.index
            and self.header.key == other.header.key
            and self._packed == other._packed  # one encoding for one view
        )

    @override
    def __hash__(self) -> int:
        found = self._hash
        if not found:
            found = self._hash = hash((self.header.key, self._packed))
        return found

    def __copy__(self) -> TensorRef:
        return TensorRef(self.header, self.index, self._packed, self.lease, self.inline, self.cls)

    def __deepcopy__(self, memo: dict[int, object]) -> TensorRef:
        return self.__copy__()

    @override
    def __reduce__(self) -> tuple[object, ...]:
        raise _refused(self)

    @override
    def __repr__(self) -> str:
        how = "inline" if self.inline is not None else f"{self.nbytes} bytes"
        state = ", released" if self.released else ""
        return f"<TensorRef {describe(self)}, {how}, owner {self.owner}{state}>"


def restrided(
    ref: TensorRef, start: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> TensorRef:
    """A ref to ``tensor.as_strided(shape, stride, start)`` of a contiguous tensor; nothing moves.

    Raises:
        TensorFreedError: ``ref`` was released.
        InvalidValueError: The tensor is not contiguous.
    """
    lease, inline, meta = ref.lease, ref.inline, ref.meta
    if inline is None and lease is None:
        raise TensorFreedError("this ref was released: release() gave its tensor up")
    if meta.stride is not None:
        raise InvalidValueError(f"{describe(ref)} is not contiguous, as a flat shard must be")
    made = restrided_meta(meta, start, shape, stride)
    if inline is not None:
        inline = restrided_inline(meta, inline, start, shape, stride)
    return TensorRef(ref.header, ref.index, _wire.pack_meta(made), lease, inline, ref.cls)


class _View:
    """The context manager behind `TensorRef.view`."""

    def __init__(self, ref: TensorRef) -> None:
        self._ref = ref
        self._lease: Lease | None = None

    async def __aenter__(self) -> Any:  # noqa: ANN401
        self._lease = self._ref.lease  # release() meanwhile must not free what is looked at
        return await current_for(self._ref).view(self._ref)

    async def __aexit__(self, *exc_info: object) -> None:
        self._lease = None


def _refused(ref: TensorRef) -> RefPicklingError:
    return RefPicklingError(
        f"a ref to {describe(ref)} of {ref.owner} was pickled outside Ray's own serialization (by "
        "pickle, or captured in the closure of a remote function or class): Ray cannot count such "
        "a copy. Pass the ref as an argument, or await it first"
    )


def _rebuild(  # noqa: PLR0917  (called by pickle)
    header: Header,
    index: int,
    packed: bytes,
    lease: Lease | None,
    inline: bytes | None = None,
    cls: type[torch.Tensor] | None = None,
) -> TensorRef:
    if lease is not None and not lease.known:
        lease.known = True
        runtime = current_or_none()
        if runtime is not None and lease.item is None:
            runtime.claims.arrived(lease, header.address)
    return TensorRef(header, index, packed, lease, inline, cls)


def _reduce_ref(ref: TensorRef) -> tuple[object, ...]:
    if not _ray.is_in_band():
        raise _refused(ref)
    args: tuple[object, ...] = (ref.header, ref.index, ref._packed, ref.lease)  # noqa: SLF001
    if ref.cls is not None:
        args += (ref.inline, ref.cls)
    elif ref.inline is not None:
        args += (ref.inline,)
    return _rebuild, args


@functools.lru_cache(maxsize=4)  # one for each runtime that this process has had
def _pack_origin(address: PeerAddress, owner: Owner) -> bytes:
    fields: tuple[object, ...] = (
        _ORIGIN_VERSION,
        *dataclasses.astuple(address),
        owner.node_id,
        owner.actor_id,
        owner.actor_name,
        {},
    )
    packed: bytes = msgpack.packb(fields)
    return packed


@functools.lru_cache(maxsize=1024)
def unpack_origin(origin: bytes) -> tuple[PeerAddress, Owner]:
    """Where and who a process is, from how it stands in refs."""
    fields = msgpack.unpackb(origin, use_list=False)
    _, host, port, runtime_id, pid, host_id, token_address, node_id, actor_id, name = fields[:10]
    address = PeerAddress(host, port, runtime_id, pid, host_id, token_address)
    return address, Owner(node_id, pid, actor_id, name)


def _rebuild_header(
    origin: bytes,
    key: bytes,
    transport: str | None,
    pending: bool = False,  # noqa: FBT001, FBT002  (called by pickle)
) -> Header:
    """May run on Ray's callback thread or on an actor's loop: no call into Ray, no wait."""
    address, owner = unpack_origin(origin)
    return Header(_ray.session_or_none(), origin, address, owner, key, transport, pending)


def _reduce_header(header: Header) -> tuple[object, ...]:
    args: tuple[object, ...] = (header.origin, header.key, header.transport)
    return _rebuild_header, (*args, True) if header.pending else args


def header_of(address: PeerAddress, owner: Owner, key: bytes) -> Header:
    """The header of a result that another process exported."""
    origin = _pack_origin(address, owner)
    return Header(_ray.session_or_none(), origin, address, owner, key, None)


class _Held:
    """In the place of a lease: who uses the ref knows otherwise that its tensor is held."""

    item: Item | None = None


_HELD: Final = _Held()


def held_ref(header: Header, index: int, packed: bytes, meta: TensorMeta) -> TensorRef:
    """A ref that is not to leave this process: whoever uses it holds its tensor by other means."""
    ref = TensorRef(header, index, packed, _HELD)  # type: ignore[arg-type]
    ref._meta = meta  # noqa: SLF001
    return ref


def make_header(key: bytes, transport: str | None, *, pending: bool = False) -> Header:
    """The header of a result that this process exports."""
    runtime = current()
    origin = origin_of(runtime)
    address, owner = runtime.address, runtime.owner
    return Header(runtime.session, origin, address, owner, key, transport, pending)


def origin_of(runtime: Runtime) -> bytes:
    """A runtime, as it stands in its refs."""
    return _pack_origin(runtime.address, runtime.owner)


_ray.register_reducer(TensorRef, _reduce_ref)
_ray.register_reducer(Header, _reduce_header)
