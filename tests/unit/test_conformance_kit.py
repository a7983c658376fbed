"""The conformance kit can fail: each broken fake is refused, by the name of what it breaks."""

from __future__ import annotations

import asyncio
import ctypes
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from aiordt._errors import (
    ClosedError,
    InvalidValueError,
    OwnerDiedError,
    TensorFreedError,
    TransferError,
)
from aiordt._types import MIB
from aiordt.abc import Cut
from aiordt.testing import Leaks, Pair, check_transport, process_pairs
from aiordt.transports.tcp import TcpTransport
from tests.fakes import CHUNK, MemoryLink, MemoryPair, Owner, PackingLink

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiordt.abc import Part

SETTLE = 0.03  # how long to wait for what must not happen


async def check(make_link: type[MemoryLink]) -> None:
    async def make_pair() -> Pair:
        return MemoryPair(make_link)

    await check_transport(make_pair, settle=SETTLE, large_nbytes=10 * MIB)


@pytest.mark.parametrize("honest", [MemoryLink, PackingLink])
async def test_a_link_that_keeps_its_promises_passes(honest: type[MemoryLink]) -> None:
    leaks = Leaks()
    await check(honest)
    await leaks.wait_none()


class LateWrite(MemoryLink):
    """As a background task that nobody waits for."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except asyncio.CancelledError:
            late = parts[0]
            asyncio.get_running_loop().call_later(
                SETTLE / 3, ctypes.memset, late.target + late.nbytes - 1, 0, 1
            )
            raise


class SwallowCancel(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except BaseException as exc:
            raise ClosedError("channel closed") from exc


class IgnoresCancel(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except asyncio.CancelledError:
            return


class NoWake(MemoryLink):
    """Looks whether it is closed only where a read begins."""

    @override
    async def turn(self) -> None:
        await asyncio.sleep(0)
        while self.owner.paused:  # noqa: ASYNC110  (a fake may poll)
            await asyncio.sleep(0.001)


class WakesWithTheWrongError(MemoryLink):
    @override
    def check(self) -> None:
        if self.closed:
            raise OwnerDiedError("as if it had died", owner="fake")
        super().check()


class ClosesOnce(MemoryLink):
    @override
    async def aclose(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        await super().aclose()


class WorksWhenClosed(MemoryLink):
    waiting = 0

    @override
    def check(self) -> None:
        if not (self.closed and self.waiting):
            super().check()

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self.waiting = 0 if self.owner.paused else 1
        await super().read(parts)


class BlocksLoop(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        paused = self.owner.paused
        if paused or sum(part.nbytes for part in parts) < 10 * MIB:
            await super().read(parts)
            return
        time.sleep(0.02)  # noqa: ASYNC251  (that is what it breaks)
        for part in parts:
            for source, target, nbytes in self.runs(part):
                ctypes.memmove(target, source, nbytes)


class TornStripes(MemoryLink):
    """The last stripe of a large part never comes."""

    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        found = list(super().runs(part))
        yield from found[:-1] if part.nbytes > 8 * MIB else found


class BreaksOthers(MemoryLink):
    """One cancelled read breaks the connection for all."""

    cause: type[BaseException] = asyncio.CancelledError
    broken = False
    reading = 0

    @override
    async def turn(self) -> None:
        await super().turn()
        if self.broken:
            raise TransferError("broken", transport="fake", peer="fake", nbytes=0)

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        if not self.reading:
            self.broken = False
        self.reading += 1
        try:
            await super().read(parts)
        except self.cause:
            self.broken = True
            raise
        finally:
            self.reading -= 1


class FailureBreaksOthers(BreaksOthers):
    cause: type[BaseException] = TensorFreedError


class FailureBreaksLater(MemoryLink):
    """One refused read, and the connection is gone."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        try:
            await super().read(parts)
        except TensorFreedError:
            self.closed = True
            raise


class IgnoresOffsets(MemoryLink):
    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        yield part.address, part.target, part.nbytes


class WritesBeside(MemoryLink):
    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        yield from super().runs(part)
        if part.nbytes == 4095:
            yield part.address, part.target + part.nbytes, 1


class Only1024Parts(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read(parts[:1024])


class HangsOnDeath(MemoryLink):
    @override
    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    @override
    async def turn(self) -> None:
        await super().turn()
        while self.owner.dead:  # noqa: ASYNC110  (a fake may poll)
            await asyncio.sleep(0.001)


class ReadsTheDead(MemoryLink):
    @override
    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")


class NoDeathFd(MemoryLink):
    @override
    def died(self) -> None:
        self.owner.dead = True


class OneLoop(MemoryLink):
    """Works only where it was used first."""

    loop: asyncio.AbstractEventLoop | None = None

    @override
    async def turn(self) -> None:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")
        await super().turn()


class WritesAndSaysNo(MemoryLink):
    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        if len(parts) == 1 and parts[0].nbytes:
            ctypes.memset(parts[0].target, 0, 1)
        return False


class SaysYesAndDoesNothing(MemoryLink):
    @override
    def read_nowait(self, parts: Sequence[Part]) -> bool:
        return parts[0].nbytes == 4096


class EndsAtAnEmptyPart(MemoryLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        empty = [number for number, part in enumerate(parts) if number and not part.nbytes]
        await super().read(parts[: empty[0]] if empty else parts)


class NeedsAPart(PackingLink):
    """As an owner that refuses a request for nothing."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise TransferError("nothing to read", transport="fake", peer="fake", nbytes=0)
        await super().read(parts)


class MixesReads(MemoryLink):
    """What is read, it keeps where the next read writes it, too."""

    parts: Sequence[Part] = ()

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        await self.turn()
        await super().read(self.parts)


class ForgetsWhereACutBegins(PackingLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read([self.moved(part) for part in parts])

    def moved(self, part: Part) -> Part:
        if part.cut is None or part.cut.dtype is not None:
            return part
        return replace(part, cut=replace(part.cut, offset=0))


class EightByteElements(MemoryLink):
    """Knows no longer elements: of a complex number the second half never comes."""

    @override
    def runs(self, part: Part) -> Iterator[tuple[int, int, int]]:
        halved = part.cut is not None and part.cut.itemsize > 8
        for source, target, nbytes in super().runs(part):
            yield source, target, nbytes // 2 if halved else nbytes


class ReadsACutOnce(MemoryLink):
    """Keeps what it reads by what is read, and not by where it goes."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read(
            list({(part.item, part.cut or part.target): part for part in parts}.values())
        )


class Unconverted(PackingLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read([self.plain(part) for part in parts])

    def plain(self, part: Part) -> Part:
        if part.cut is None or part.cut.dtype is None:
            return part
        numel = math.prod(part.cut.shape)
        nbytes = min(numel * part.cut.itemsize, part.nbytes)
        cut = Cut(part.cut.offset, (nbytes,), (1,), 1)
        return replace(part, cut=cut, nbytes=nbytes)


class ReadsBeyond(PackingLink):
    """Gives what is there, where a cut goes beyond the tensor."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read([self.within(part) for part in parts])

    def within(self, part: Part) -> Part:
        cut = part.cut
        if cut is None or cut.dtype is not None:
            return part
        size = self.owner.registry.local(part.key, part.index)[1].untyped_storage().nbytes()
        if cut.offset + cut.span <= size:
            return part
        left = max(0, size - cut.offset) // cut.itemsize * cut.itemsize
        cut = Cut(min(cut.offset, size), (left,), (1,), 1)
        return replace(part, cut=cut, nbytes=left)


class WrapsTheIndex(PackingLink):
    @override
    async def read(self, parts: Sequence[Part]) -> None:
        await super().read([self.wrapped(part) for part in parts])

    def wrapped(self, part: Part) -> Part:
        export, _ = self.owner.registry.local(part.key, 0)
        return replace(part, index=part.index % len(export.tensors))


class TrustsAddresses(PackingLink):
    """Two-sided, but what is sent is what lies where the consumer says."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        if all(part.cut is None for part in parts):
            await MemoryLink.read(self, parts)
        else:
            await super().read(parts)


class OneAtATime(MemoryLink):
    """First come, first served, each to its end."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.queue: list[object] = []

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        me = object()
        self.queue.append(me)
        try:
            while self.queue[0] is not me:
                self.check()
                await asyncio.sleep(0)
            await super().read(parts)
        finally:
            self.queue.remove(me)


class HoldsNothing(PackingLink):
    """Looks up what it sends, and sends it while it may have been given up."""

    @override
    async def read(self, parts: Sequence[Part]) -> None:
        if any(part.cut is not None for part in parts):
            await super().read(parts)
            return
        await self.turn()
        found = [self.owner.registry.local(part.key, part.index)[1] for part in parts]
        assert all(tensor.nbytes == part.nbytes for tensor, part in zip(found, parts, strict=True))
        await self.move(
            (tensor.data_ptr() + start, part.target + start, min(CHUNK, part.nbytes - start))
            for tensor, part in zip(found, parts, strict=True)
            for start in range(0, part.nbytes, CHUNK)
        )


class ClosesAtHome(MemoryLink):
    """Can be closed only on the loop where it was made."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.loop = asyncio.get_running_loop()

    @override
    async def aclose(self) -> None:
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("attached to a different loop")
        await super().aclose()


class WakesAtHome(ClosesAtHome):
    """Closed on another loop, it wakes nobody."""

    closed_elsewhere = False

    @override
    async def aclose(self) -> None:
        if asyncio.get_running_loop() is self.loop:
            await super().aclose()
        self.closed_elsewhere = True


class OutlivesItsTransport(MemoryLink):
    @override
    def transport_closed(self) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "invariant"),
    [
        (LateWrite, "OWN-1"),
        (SwallowCancel, "CAN-1"),
        (IgnoresCancel, "CAN-1"),
        (NoWake, "CLS-2"),
        (WakesWithTheWrongError, "CLS-2"),
        (ClosesOnce, "CLS-1"),
        (WorksWhenClosed, "CLS-2"),
        (BlocksLoop, "BLK-1"),
        (TornStripes, "DAT-1"),
        (IgnoresOffsets, "DAT-1"),
        (WritesBeside, "DAT-1"),
        (Only1024Parts, "DAT-1"),
        (OneLoop, "DAT-1"),
        (SaysYesAndDoesNothing, "DAT-1"),
        (WritesAndSaysNo, "OWN-1"),
        (BreaksOthers, "ISO-1: one was cancelled"),
        (FailureBreaksOthers, "ISO-1: one failed"),
        (FailureBreaksLater, "ISO-1: reads after refusals must succeed"),
        (HangsOnDeath, "DTH-1"),
        (ReadsTheDead, "DTH-1"),
        (NoDeathFd, "DTH-1"),
        (EndsAtAnEmptyPart, "DAT-1: a part of no bytes in the middle"),
        (NeedsAPart, "DAT-1: a read of no parts must succeed"),
        (MixesReads, "DAT-1: 60 reads at once"),
        (ForgetsWhereACutBegins, r"DAT-2: a cut \(rows"),
        (EightByteElements, r"DAT-2: a cut \(.* of 16 bytes"),
        (ReadsACutOnce, "DAT-2: the same cut many times"),
        (Unconverted, "DAT-2: .* converted to torch.bfloat16"),
        (ReadsBeyond, "DAT-2: .* of 90000, must be refused"),
        (WrapsTheIndex, "KEY-1: a tensor that its export does not have"),
        (TrustsAddresses, "KEY-1: an address of another tensor"),
        (OneAtATime, "FAIR-1"),
        (HoldsNothing, "HLD-1: of .* some had been written over"),
        (ClosesAtHome, r"CLS-1: aclose\(\) must work from any loop"),
        (WakesAtHome, r"CLS-2: aclose\(\) from another loop must wake"),
        (OutlivesItsTransport, "CLS-2: closing the transport"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value[:6].rstrip(":"),
)
async def test_a_broken_link_is_refused(broken: type[MemoryLink], invariant: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{invariant}"):
        await check(broken)


# --- process_pairs ------------------------------------------------------------------------------


def test_process_pairs_says_what_it_cannot_use() -> None:
    class Local(TcpTransport):
        name = "local"

    with pytest.raises(InvalidValueError, match=r"another process cannot import .*Local"):
        process_pairs(Local)
    with pytest.raises(InvalidValueError, match="aiordt has a transport 'tcp' of its own"):
        process_pairs(TcpTransport)
    with pytest.raises(InvalidValueError, match="no transport 'pigeon'; there are shm, cma"):
        process_pairs("pigeon")
