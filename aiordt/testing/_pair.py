"""A link under test, and the process at its other end."""

from __future__ import annotations

import mmap
import os
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from aiordt._memory import in_memory_order
from aiordt._types import DTYPE_CODES
from aiordt.abc import AsyncResource, Cut, Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiordt.abc import Link


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A tensor that the other process has exported.

    Attributes:
        key: Key of the export.
        index: Which tensor of the export.
        address: Address of element 0 of ``like`` over there.
        like: A tensor here with its shape, strides, dtype and content, or a view of that.
        segment: Number of the shared segment that it is in over there; 0: in none.
        offset: Of element 0 of ``like`` from that of the exported tensor, in bytes; ``None``:
            ``like`` is the whole tensor.
        dtype: To which the owner is to convert it first; ``None``: it is not to.
    """

    key: bytes
    index: int
    address: int
    like: torch.Tensor
    segment: int = 0
    offset: int | None = None
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a read of it moves."""
        source = in_memory_order(self.like)
        return source.numel() * (self.dtype or source.dtype).itemsize

    @property
    def content(self) -> torch.Tensor:
        """Those bytes, in the order in which they are read."""
        source = in_memory_order(self.like)
        return source.to(self.dtype or source.dtype).contiguous().view(-1).view(torch.uint8)

    def part(self, target: int) -> Part:
        """What to read, as aiordt's runtime would say it.

        Args:
            target: Address of `nbytes` writable bytes.
        """
        cut = None
        if not (self.like.is_contiguous() and self.offset is None and self.dtype is None):
            source = in_memory_order(self.like)
            code = None if self.dtype is None else DTYPE_CODES[self.dtype]
            shape, stride = tuple(source.shape), source.stride()
            cut = Cut(self.offset or 0, shape, stride, self.like.itemsize, code)
        return Part(self.key, self.index, self.address, target, self.nbytes, cut, self.segment)

    def cut(self, view: torch.Tensor) -> Exported:
        """A part of it.

        Args:
            view: A view of ``like``.
        """
        offset = view.data_ptr() - self.like.data_ptr() if view.numel() else 0
        return replace(
            self, like=view, address=self.address + offset, offset=offset + (self.offset or 0)
        )

    def bogus(self) -> Exported:
        """The same, but not exported: a key that nobody has, at an address that is not mapped."""
        segment = 1 << 40 if self.segment else 0
        return replace(self, key=os.urandom(16), address=4096, segment=segment)


class Pair(AsyncResource):
    """A link, and the process whose memory it reads.

    ``aclose`` closes the link and lets the process go.

    Attributes:
        link: The link under test.
        can_pause: Whether ``pause`` keeps reads pending; one-sided transports need nothing of the
            other process, so there it does not.
    """

    link: Link
    can_pause: bool = False

    @abstractmethod
    async def export(self, tensors: Sequence[torch.Tensor]) -> list[Exported]:
        """Make the other process export copies of ``tensors``, strides included."""

    async def export_sparse(self, nbytes: int, marks: Mapping[int, bytes]) -> Exported:
        """Make the other process export more bytes than should be sent there.

        Args:
            nbytes: How many; all are zero, but for
            marks: what is to be at which offset.
        """
        (exported,) = await self.export([sparse(nbytes, marks)])
        return exported

    @abstractmethod
    async def overwrite(self, exported: Exported) -> None:
        """Make the other process give up an export, and write over its tensors.

        It gives up the export and waits until nothing reads the tensors any more, as
        `aiordt.wait_tensor_freed` does; then it fills them with something else.
        """

    @abstractmethod
    async def kill(self) -> None:
        """End the other process abruptly, as SIGKILL does."""

    def pause(self) -> None:
        """Stop the other process, as SIGSTOP does. Only where ``can_pause``."""
        raise NotImplementedError

    def resume(self) -> None:
        """Let it go on."""
        raise NotImplementedError


def sparse(nbytes: int, marks: Mapping[int, bytes]) -> torch.Tensor:
    """So many bytes that are zero, but for some marks; only those take memory.

    Args:
        nbytes: How many.
        marks: What is at which offset.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset, mark in marks.items():
        memory[offset : offset + len(mark)] = mark
    return torch.frombuffer(memory, dtype=torch.uint8)


class MakePair(Protocol):
    """Makes a new pair; the process at its other end may be one that served another pair."""

    async def __call__(self) -> Pair:
        """Make a pair."""
        ...
