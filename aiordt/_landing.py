"""Where a pulled tensor lands: the memory, the part to read, and what makes it whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import torch

from aiordt import _device, _wire
from aiordt._errors import AiordtError, InvalidValueError, OwnerDiedError, UnavailableError
from aiordt._layout import Cut, first_run
from aiordt._leaves import as_array, as_tensor
from aiordt._memory import dense_stride, from_raw_bytes, in_memory_order, memory_order
from aiordt._types import DTYPE_CODES, DTYPES, ITEMSIZES
from aiordt.abc import Part, PeerAddress

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from aiordt._memory import Pool
    from aiordt._types import Owner
    from aiordt._wire import TensorMeta
    from aiordt.abc import Link


#: Pieces under this many bytes are small ...
_SMALL_RUN: Final = 512
#: ... and more than so many of them are many.
_MANY_RUNS: Final = 1024


@dataclass(slots=True, eq=False)
class Header:
    """What the refs of one result share.

    Attributes:
        session: The Ray session in which it came to this process.
        origin: `address` and `owner` as they travel.
        address: Where the owner's runtime is.
        owner: Who that is.
        key: Key of the export.
        transport: The transport that the exporter demanded, if any.
        pending: Whether a device of the owner may still be making the tensors.
        noted: Whether the owner was told that this process pulled.
        plain: What `aiordt._batch.plain` found of the refs that were pulled last.
    """

    session: object
    origin: bytes
    address: PeerAddress
    owner: Owner
    key: bytes
    transport: str | None
    pending: bool = False
    noted: bool = False
    plain: object = None


class Item(Protocol):
    """Where a lease is from: an item of a generator, which only who yielded it may count."""

    async def confirmed(self) -> None:
        """Wait until the tensor is known to be held.

        Raises:
            TensorFreedError: It is not.
        """

    def reduce(self, lease: Any) -> tuple[object, ...]:  # noqa: ANN401
        """As the lease's ``__reduce__``."""
        ...


class Holding(Protocol):
    """A lease, as far as a pull must know."""

    @property
    def item(self) -> Item | None:
        """Where it is from, as long as Ray does not count it."""
        ...


class Pullable(Protocol):
    """What the runtime must know of a ref."""

    header: Header
    index: int
    inline: bytes | None
    cls: type[torch.Tensor] | None

    @property
    def meta(self) -> TensorMeta:
        """The tensor's description."""
        ...

    @property
    def lease(self) -> Holding | None:
        """What keeps the tensor alive at its owner."""
        ...

    @property
    def released(self) -> bool:
        """Whether it was given up."""
        ...


#: Gives the place of a ref in its caller's tree, as the caller would write it; or nothing.
Name: TypeAlias = Callable[[Pullable], str]


@contextmanager
def naming(ref: Pullable, name: Name | None, count: int = 1) -> Generator[None]:
    """Say in errors which of the caller's refs they concern.

    Args:
        ref: It, or the first of several.
        name: Gives its place.
        count: How many it is one of.
    """
    try:
        yield
    except AiordtError as exc:
        where = "" if name is None else name(ref)
        if not where:
            raise
        more = f" and {count - 1} more" if count > 1 else ""
        raise exc.said(f"{where}{more}") from exc


def unsure(ref: Pullable) -> bool:
    """Whether it is not certain that the tensor is still held for the ref."""
    return ref.lease is not None and ref.lease.item is not None


async def confirm(refs: Sequence[Pullable], name: Name | None) -> None:
    """Make certain that the tensors are held.

    Raises:
        TensorFreedError: One is not.
    """
    for ref in {ref.lease: ref for ref in refs}.values():
        if ref.lease is not None and ref.lease.item is not None:
            with naming(ref, name):
                await ref.lease.item.confirmed()


def check_reach(name: str, link: Link, refs: Sequence[Pullable]) -> None:
    """Refuse a transport that cannot read the memory that a tensor is in.

    Raises:
        UnavailableError: It can neither read it nor have its owner stage it.
    """
    for ref in refs:
        reason = ref.meta.device and out_of_reach(link, ref)
        if reason:
            raise UnavailableError(f"{name}: {reason}", reason=reason, transport=name)


def out_of_reach(link: Link, ref: Pullable) -> str:
    """Why a link cannot bring a tensor from its owner's device; empty if it can."""
    device = ref.meta.device
    if not device or link.packs or torch.device(device).type in link.devices:
        return ""
    return f"it does not read the memory of devices, and the tensor is on {device}"


def dtype_of(code: int) -> torch.dtype:
    """The dtype behind a code on the wire.

    Raises:
        InvalidValueError: This PyTorch does not have it.
    """
    dtype = DTYPES[code] if code < len(DTYPES) else None
    if dtype is None:
        raise InvalidValueError(f"this PyTorch ({torch.__version__}) lacks the tensor's dtype")
    return dtype


def dense_stride_of(meta: TensorMeta) -> tuple[int, ...]:
    """The strides of a tensor at its owner."""
    if meta.stride is not None:
        return meta.stride
    return torch.empty(meta.shape, device="meta").stride()


def num_bytes(meta: TensorMeta) -> int:
    """Size of a tensor, in bytes."""
    return prod(meta.shape) * ITEMSIZES[meta.dtype]


def describe(ref: Pullable) -> str:
    """A ref's tensor, for messages."""
    meta = ref.meta
    return f"tensor {tuple(meta.shape)} {str(dtype_of(meta.dtype)).removeprefix('torch.')}"


def died(owner: Owner, cause: Exception, what: str = "its tensors") -> OwnerDiedError:
    """The error for whoever wanted something of a process that is gone."""
    return OwnerDiedError(f"{owner} died, and {what} with it ({cause})", owner=str(owner))


def dress(tensor: torch.Tensor, ref: Pullable) -> Any:  # noqa: ANN401
    """Make a received tensor what the original was: an array, a class, ``requires_grad``."""
    return dressed(tensor, ref.meta.flags, ref.cls)


def dressed(tensor: torch.Tensor, flags: int, cls: type[torch.Tensor] | None) -> Any:  # noqa: ANN401
    """As `dress`, of an original of these flags and this class."""
    if flags & _wire.FLAG_NUMPY:
        return as_array(tensor)
    requires_grad = bool(flags & _wire.FLAG_REQUIRES_GRAD)
    if flags & _wire.FLAG_PARAMETER:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    if cls is not None:
        tensor = tensor.as_subclass(cls)
    return tensor.requires_grad_(True) if requires_grad else tensor  # noqa: FBT003


def as_seen(tensor: torch.Tensor, ref: Pullable) -> Any:  # noqa: ANN401
    """A tensor in another process's memory, or a read-only array if that is what it is there."""
    seen = as_array(tensor) if ref.meta.flags & _wire.FLAG_NUMPY else tensor
    if isinstance(seen, np.ndarray):
        seen.flags.writeable = False
    return seen


def unpack_inline(ref: Pullable, data: bytes) -> Any:  # noqa: ANN401
    """What a ref that carries its bytes stands for."""
    return dress(unpack_plain(ref.meta, data), ref)


def unpack_plain(meta: TensorMeta, data: bytes) -> torch.Tensor:
    """A plain tensor of these bytes, which are in the order in which they travel."""
    shape = meta.shape if meta.stride is None else tuple(_order_of(meta).shape)
    return _from_order(from_raw_bytes(data, shape, dtype_of(meta.dtype)), meta)


@dataclass(slots=True)
class Landing:
    """A tensor that is being received, in host memory.

    Attributes:
        ref: The ref that was awaited.
        tensor: What the bytes are written to, in the order in which they travel.
        part: What to read.
        into: The caller's tensor, if it is another than ``tensor``.
        home: The device that it goes to next, if any.
    """

    ref: Pullable
    tensor: torch.Tensor
    part: Part
    into: torch.Tensor | None = None
    home: torch.device | None = None

    @property
    def copy_nbytes(self) -> int:
        """Bytes that `finish` copies; many are copied off the loop."""
        meta = self.ref.meta
        if (self.into is not None and self.into is not self.tensor) or (
            self.tensor.numel() * ITEMSIZES[meta.dtype] < num_bytes(meta)
        ):
            return num_bytes(meta)
        return 0

    def finish(self) -> Any:  # noqa: ANN401
        """What the caller gets, once all bytes have come."""
        tensor = self.tensor
        ref = self.ref
        if ref.meta.stride is not None:
            tensor = _from_order(tensor, ref.meta)
        if self.into is not None:
            return copy_into(self.into, tensor)
        if self.home is not None:
            return tensor  # dressed when it is there
        return dress(tensor, ref) if ref.meta.flags or ref.cls else tensor


def prefers_packing(meta: TensorMeta) -> bool:
    """Whether a tensor consists of so many small pieces that its owner should pack them.

    A read of a piece in another process costs about 0.1 µs whatever its size; packing runs at
    memory speed.
    """
    if meta.stride is None:
        return False
    source = _order_of(meta)
    run_nbytes = first_run(source.shape, source.stride(), ITEMSIZES[meta.dtype])
    return run_nbytes < _SMALL_RUN and num_bytes(meta) > _MANY_RUNS * run_nbytes


def land(
    ref: Pullable,
    pool: Pool,
    into: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Landing:
    """Prepare memory for ``ref``: the caller's, where it is laid out as the bytes travel.

    Args:
        ref: What is pulled.
        pool: Where other memory comes from.
        into: The caller's tensor.
        dtype: What the owner is to convert the elements to, if that makes them smaller.

    Cost:
        A few µs.
    """
    meta = ref.meta
    here = dtype_of(meta.dtype)
    itemsize = here.itemsize
    code = None
    if dtype is not None and dtype.itemsize < itemsize and converts(here, dtype):
        here = dtype
        code = DTYPE_CODES[dtype]
    if meta.stride is None:
        fits = into is not None and into.is_contiguous()
        tensor = into if fits and into is not None else pool.empty(meta.shape, here)
        numel = tensor.numel()
        whole = meta.offset is None and code is None
        cut = None if whole else Cut(meta.offset or 0, (numel,), (1,), itemsize, code)
    else:
        source = _order_of(meta)
        tensor = pool.empty(tuple(source.shape), here)
        numel = tensor.numel()
        cut = Cut(meta.offset or 0, tuple(source.shape), source.stride(), itemsize, code)
    if into is not None and tensor is into and not into.is_inference():
        torch.autograd.graph.increment_version(into)  # its memory is written behind autograd
    part = Part(
        ref.header.key,
        ref.index,
        meta.address,
        tensor.data_ptr(),
        numel * here.itemsize,
        cut,
        meta.segment,
        meta.device or "cpu",
        tensor,
    )
    home = _device.home(meta.device) if into is None else None
    return Landing(ref, tensor, part, into, home)


def converts(source: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether ``dtype=`` changes a tensor: floating-point ones and complex ones, each in kind."""
    if source.is_complex:
        return wanted.is_complex
    return source.is_floating_point and wanted.is_floating_point


def copy_into(into: torch.Tensor, arrived: Any) -> torch.Tensor:  # noqa: ANN401
    """Fill the caller's tensor, unless the bytes were received there."""
    if into is not arrived:
        with torch.inference_mode(mode=into.is_inference()):  # else it may not be written
            into.detach().copy_(as_tensor(arrived).detach())
    return into


def _order_of(meta: TensorMeta) -> torch.Tensor:
    """A tensor without memory, with the strides in which the source's bytes are read."""
    stride = meta.stride if meta.stride is not None else ()
    return in_memory_order(torch.empty_strided(meta.shape, stride, device="meta"))


def _from_order(flat: torch.Tensor, meta: TensorMeta) -> torch.Tensor:
    """From the bytes as they travelled to the tensor that `torch.clone` would have made."""
    if meta.stride is None:
        return flat
    shape = tuple(
        1 if stride == 0 else size for size, stride in zip(meta.shape, meta.stride, strict=True)
    )
    dense = dense_stride(shape, meta.stride)
    if shape == meta.shape:
        return flat.as_strided(shape, dense)
    order = memory_order(dense)
    inverse = [order.index(dim) for dim in range(len(order))]
    made = torch.empty_strided(meta.shape, dense_stride(meta.shape, meta.stride), dtype=flat.dtype)
    return made.copy_(flat.permute(inverse).expand(meta.shape))
