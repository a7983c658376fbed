"""The side that wants the weights."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from typing_extensions import override

from aiordt._errors import (
    ClosedError,
    OwnerDiedError,
    TensorFreedError,
)
from aiordt._get import get
from aiordt._into import targets_for
from aiordt._landing import copy_into, dress
from aiordt._progress import finish
from aiordt._ref import TensorRef, header_of, held_ref
from aiordt._runtime import current
from aiordt._sharing import clone
from aiordt.abc import AsyncResource
from aiordt.weights._publisher import check_int, check_name
from aiordt.weights._service import weights_of

if TYPE_CHECKING:
    from typing import Self

    import torch

    from aiordt.weights._layout import Known
    from aiordt.weights._names import Record
    from aiordt.weights._service import Weights
    from aiordt.weights._stream import Offer

#: Descriptions of buffers that a subscriber remembers.
_MAX_KNOWN: Final = 16


class Update(NamedTuple):
    """What a reader gets.

    Attributes:
        version: Its number.
        weights: The tree, as it was published.
    """

    version: int
    weights: Any


class Subscriber(AsyncResource):
    """Reads what a publisher publishes. Made by `subscriber`; used on one event loop.

    ``async for version, weights in sub`` gives each time the newest version, once there is one that
    it has not given before; it ends when the publisher or the subscriber is closed.

    Attributes:
        name: Of the publisher.
    """

    def __init__(self, service: Weights, name: str, record: Record, *, follow: bool) -> None:
        self.name = name
        self._service = service
        self._record = record
        self._follow = follow
        self._known: dict[int, tuple[int, Known, object]] = {}
        self._last = (record.epoch, 0)  # epoch and version of what it has had
        self._calls: set[asyncio.Task[Update]] = set()
        self._closed = False
        self._moving: asyncio.Lock = asyncio.Lock()

    @property
    def epoch(self) -> int:
        """Which publisher of this name it reads from; it grows when that is replaced."""
        return self._record.epoch

    async def latest(
        self,
        min_version: int | None = None,
        into: Any = None,  # noqa: ANN401
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Update:
        """Bring the newest version here; waits for one, if there is none yet.

        What arrives is one version, as it was published, and private; reading it keeps no publisher
        waiting. A newer version may be there by the time that it has come.

        Args:
            min_version: Wait until the newest is not older than this. When the publisher is
                replaced, any version of the next one is newer than all before.
            into: As of `aiordt.get`: tensors to receive into, in a tree of the same structure. They
                are written from the beginning of the transfer until its end.
            dtype: As of `aiordt.get`.
            device: As of `aiordt.get`.

        Returns:
            Its number, and the tree.

        Raises:
            OwnerDiedError: The publisher has died; not with ``follow=True``, which waits for the
                next publisher of the name.
            ClosedError: The publisher was closed (not with ``follow=True``), or this subscriber.
            PeerLostError: The publisher cannot be reached.
            UsageError: ``into``, ``dtype`` or ``device`` do not fit; nothing was written.

        Cost:
            A round trip to the publisher before and after the transfer; woken by it, not by asking.
        """
        if min_version is not None:
            check_int("min_version", min_version)
        self._check_open()
        call = asyncio.ensure_future(self._latest(min_version, into, dtype, device))
        self._calls.add(call)
        try:
            return await finish(call, call.cancel)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # not the caller, but `aclose`
                self._check_open()
            raise
        finally:
            self._calls.discard(call)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this subscriber of {self.name!r} was closed")

    async def _latest(self, min_version: int | None, into: Any, *how: Any) -> Update:  # noqa: ANN401
        while True:
            record = self._record
            newer = record.epoch > self._last[0]
            after = 0 if min_version is None or newer else min_version - 1
            try:
                found = await self._read(record, max(after, 0), into, *how)
            except OwnerDiedError as exc:
                if not self._follow:
                    raise OwnerDiedError(
                        f"the publisher of {self.name!r} ({record.owner}) died: {exc}",
                        owner=str(record.owner),
                    ) from exc
            else:
                if found is not None:
                    self._last = max(self._last, (record.epoch, found.version))
                    return found
                if not self._follow:
                    raise ClosedError(f"the publisher of {self.name!r} ({record.owner}) was closed")
            await self._move_on(record)

    async def _move_on(self, record: Record) -> None:
        """Wait for the next publisher."""
        async with self._moving:
            if self._record is record:
                self._record = await self._service.find(self.name, record.epoch)
                self._known.clear()

    async def _read(self, record: Record, after: int, into: Any, *how: Any) -> Update | None:  # noqa: ANN401
        """One version; ``None``: the publisher was closed."""
        service = self._service
        io = service.runtime.io
        while True:
            number = next(service.numbers)
            try:
                offer = await io.run(service.take(record, number, after))
                if offer is None:
                    return None
                with suppress(TensorFreedError):  # as if not held
                    weights = await self._bring(record, offer, into, *how)
                    if await io.run(service.done(record, number)):  # WGT-4
                        return Update(offer.version, weights)
            except BaseException:
                service.let_go(record, number)
                raise

    async def _bring(
        self,
        record: Record,
        offer: Offer,
        into: Any,  # noqa: ANN401
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> Any:  # noqa: ANN401
        known, plain = await self._describe(record, offer)
        header = header_of(record.address, record.owner, offer.key)
        header.noted = True  # the publisher knows
        header.plain = plain
        rows = enumerate(zip(known.packed, known.metas, strict=True))
        refs = [held_ref(header, number, packed, meta) for number, (packed, meta) in rows]
        tree = known.rebuild(refs)
        stream = self._service.local(record)
        if stream is None:
            weights = await get(tree, into=into, dtype=dtype, device=device)
            self._known[offer.slot] = offer.generation, known, header.plain
            while len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]
            return weights
        copies = await self._copied(stream.tensors(offer.slot), refs, known, into)
        if into is not None:
            return copies
        return await get(copies, dtype=dtype, device=device)

    async def _copied(
        self,
        tensors: list[torch.Tensor],
        refs: list[TensorRef],
        known: Known,
        into: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """As `get`, of what this process publishes itself."""
        runtime = self._service.runtime
        if into is None:
            copies = await finish(runtime.workers.run(lambda: clone(tensors, runtime.pool)))
            return known.rebuild([dress(*row) for row in zip(copies, refs, strict=True)])
        flat, targets, targeted = await targets_for(known.rebuild(refs), into)
        sources = [tensors[ref.index] for ref in flat.leaves]

        def copy() -> None:
            for target, source in zip(targeted, sources, strict=True):
                copy_into(target, source)

        await finish(runtime.workers.run(copy))
        return flat.rebuild(targets)

    async def _describe(self, record: Record, offer: Offer) -> tuple[Known, object]:
        found = self._known.get(offer.slot)
        if found is not None and found[0] == offer.generation:
            return found[1:]
        return await self._service.runtime.io.run(self._service.describe(record, offer)), None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        """The newest version, once there is one that this subscriber has not had."""
        after = self._last[1]
        try:
            return await self.latest(after + 1 if after else None)
        except ClosedError:
            if not self._service.runtime.closed:
                raise StopAsyncIteration from None
            raise

    @override
    async def aclose(self) -> None:
        """End it; what waits in it raises `ClosedError`. Idempotent."""
        self._closed = True
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)
        self._known.clear()


async def subscriber(name: str, *, follow: bool = False) -> Subscriber:
    """Find the publisher of a name; waits until there is one.

    Works in any process: actor, task or driver, that of the publisher included.

    Args:
        name: What `publisher` was given, in the same Ray namespace.
        follow: When the publisher dies or is closed, wait for the next one of that name, instead
            of raising.

    Returns:
        The subscriber; close it, or use it by ``async with``.

    Raises:
        PeerLostError: The publisher cannot be reached.
        UsageError: The name is none.

    Cost:
        Some round trips to Ray's GCS, and one to the publisher.
    """
    check_name(name)
    service = weights_of(current())
    return Subscriber(service, name, await service.find(name, 0), follow=follow)
