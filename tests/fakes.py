"""A link that keeps every promise without any process, to be broken in one way at a time."""

from __future__ import annotations

import asyncio
import ctypes
import os
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from aiordt._errors import ClosedError, OwnerDiedError
from aiordt._memory import storage_range
from aiordt._progress import Workers
from aiordt._registry import Registry
from aiordt._types import KIB
from aiordt.abc import Link
from aiordt.testing import Exported, Pair
from aiordt.testing._pair import sparse
from aiordt.testing._process import _pack, _unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from aiordt.abc import Part

CHUNK = 256 * KIB


class Owner:
    """A process that is none: its memory is ours."""

    def __init__(self) -> None:
        self.workers = Workers("fake", 1)
        self.registry = Registry(self.workers)
        self.leases: dict[bytes, tuple[list[object], list[torch.Tensor]]] = {}
        self.paused = False
        self.dead = False


class MemoryLink(Link):
    """Keeps every promise, by ``memmove`` in chunks on the caller's loop."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.closed = False
        self.death_fd, self._alive = os.pipe()

    def died(self) -> None:
        self.owner.dead = True
        os.close(self._alive)
        self._alive = -1

    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")
        if self.owner.dead:
            raise OwnerDiedError("dead", owner="fake")

    async def turn(self) -> None:
        """Let others run, and wait while the owner is paused."""
        self.check()
        await asyncio.sleep(0)
        while self.owner.paused:
            self.check()
            await asyncio.sleep(0.001)
        self.check()

    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """Source, target and size of every run, cut into chunks."""
        run_nbytes, offsets = part.runs()
        for number, offset in enumerate(offsets.tolist()):
            for start in range(0, run_nbytes, CHUNK):
                nbytes = min(CHUNK, run_nbytes - start)
                target = part.target + number * run_nbytes + start
                yield part.address + offset + start, target, nbytes

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await self.turn()
        for part in parts:
            self.owner.registry.local(part.key, part.index)
        await self.move(run for part in parts for run in self.runs(part))

    async def move(self, runs: Iterator[tuple[int, int, int]]) -> None:
        moved = 0
        for source, target, nbytes in runs:
            ctypes.memmove(target, source, nbytes)
            moved += nbytes
            if moved >= CHUNK:
                moved = 0
                await self.turn()

    @override
    async def aclose(self) -> None:
        self.closed = True

    def transport_closed(self) -> None:
        self.closed = True


class PackingLink(MemoryLink):
    """The same, two-sided: what is read is what the owner's registry gives out."""

    packs: ClassVar[bool] = True

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await self.turn()
        if not parts:
            return
        nbytes = sum(part.nbytes for part in parts)
        async with self.owner.registry.open([part.item for part in parts], nbytes) as served:
            await self.move(
                run
                for view, part in zip(served.views, parts, strict=True)
                for run in _chunks(view, part.target)
            )


def _chunks(view: memoryview, target: int) -> Iterator[tuple[int, int, int]]:
    for start in range(0, len(view), CHUNK):
        piece = view[start : start + CHUNK]
        source = np.frombuffer(piece, dtype=np.uint8).ctypes.data
        yield source, target + start, len(piece)


class MemoryPair(Pair):
    can_pause = True

    def __init__(self, make_link: type[MemoryLink]) -> None:
        self.owner = Owner()
        self.fake = make_link(self.owner)
        self.link = self.fake

    @override
    async def export(self, tensors: Sequence[torch.Tensor]) -> list[Exported]:
        return self._export(
            [_unpack([*_pack(tensor)], shared=False) for tensor in tensors], tensors
        )

    @override
    async def export_sparse(self, nbytes: int, marks: Mapping[int, bytes]) -> Exported:
        tensor = sparse(nbytes, marks)
        return self._export([tensor], [tensor])[0]

    def _export(self, ours: list[torch.Tensor], like: Sequence[torch.Tensor]) -> list[Exported]:
        export = self.owner.registry.begin(ours, "fake")
        leases = [object() for _ in export.groups]
        self.owner.registry.commit(export, leases)
        self.owner.leases[export.key] = (leases, ours)
        return [
            Exported(export.key, index, mine.data_ptr(), theirs)
            for index, (mine, theirs) in enumerate(zip(ours, like, strict=True))
        ]

    @override
    async def overwrite(self, exported: Exported) -> None:
        leases, tensors = self.owner.leases.pop(exported.key)
        self.owner.registry.drop(leases)
        while self.owner.registry.busy(map(storage_range, tensors)):  # noqa: ASYNC110
            await asyncio.sleep(0)
        for tensor in tensors:
            tensor.zero_()

    @override
    async def kill(self) -> None:
        self.fake.died()

    @override
    def pause(self) -> None:
        self.owner.paused = True

    @override
    def resume(self) -> None:
        self.owner.paused = False

    @override
    async def aclose(self) -> None:
        self.fake.transport_closed()
        if not self.owner.dead:
            self.fake.died()
        assert self.link.death_fd is not None
        os.close(self.link.death_fd)
        self.owner.workers.close()
