"""A link under test, and the process at its other end."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from aiordt._memory import in_memory_order
from aiordt.abc import AsyncResource, Cut, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.abc import Link


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A tensor that the other process has exported.

    Attributes:
        key: Key of the export.
        index: Which tensor of the export.
        address: Address of its element 0 over there.
        like: A tensor here with its shape, strides, dtype and content.
        segment: Number of the shared segment that it is in over there; 0: in none.
    """

    key: bytes
    index: int
    address: int
    like: torch.Tensor
    segment: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that a read of it moves."""
        return in_memory_order(self.like).nbytes

    @property
    def content(self) -> torch.Tensor:
        """Those bytes, in the order in which they are read."""
        return in_memory_order(self.like).contiguous().view(-1).view(torch.uint8)

    def part(self, target: int) -> Part:
        """What to read, as aiordt's runtime would say it.

        Args:
            target: Address of `nbytes` writable bytes.
        """
        cut = None
        if not self.like.is_contiguous():
            source = in_memory_order(self.like)
            cut = Cut(0, tuple(source.shape), source.stride(), self.like.itemsize)
        return Part(self.key, self.index, self.address, target, self.nbytes, cut, self.segment)

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

    @abstractmethod
    async def kill(self) -> None:
        """End the other process abruptly, as SIGKILL does."""

    def pause(self) -> None:
        """Stop the other process, as SIGSTOP does. Only where ``can_pause``."""
        raise NotImplementedError

    def resume(self) -> None:
        """Let it go on."""
        raise NotImplementedError


class MakePair(Protocol):
    """Makes a new pair; the process at its other end may be one that served another pair."""

    async def __call__(self) -> Pair:
        """Make a pair."""
        ...
