"""Pulling: from refs to tensors, over whatever way leads to their owners."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np
import torch

from aiordt import _device, _ray, _wire
from aiordt._batch import Batch, Plain, parcels, plain, tied, unpack_tied
from aiordt._errors import (
    AiordtError,
    ClosedError,
    OwnerDiedError,
    PeerLostError,
    TensorFreedError,
    UnavailableError,
    without_frames,
)
from aiordt._exports import warn_if_shared
from aiordt._landing import (
    Header,
    Name,
    Pullable,
    check_reach,
    confirm,
    copy_into,
    describe,
    died,
    dress,
    dtype_of,
    land,
    naming,
    num_bytes,
    prefers_packing,
    unpack_inline,
    unsure,
)
from aiordt._leaves import as_array
from aiordt._metrics import phase
from aiordt._progress import finish, run_all
from aiordt._route import check_shared
from aiordt._sharing import UNTIED
from aiordt._slices import view_of
from aiordt._types import MIB
from aiordt.abc import DrawingLink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiordt._admission import Admission
    from aiordt._config import Config
    from aiordt._integrity import Checks
    from aiordt._memory import Pool
    from aiordt._metrics import Counters
    from aiordt._progress import Inbox, Workers
    from aiordt._ray import Session
    from aiordt._registry import Registry
    from aiordt._relay import Relay
    from aiordt._route import Routes
    from aiordt._sharing import Ties
    from aiordt._types import Owner
    from aiordt.abc import Link, Part, PeerAddress

_T = TypeVar("_T")

STALE_REF: Final = "this ref belongs to a Ray session that has ended (ray.shutdown was called)"
#: How long Ray is given to say whether an unreachable owner is dead.
_RAY_SECONDS: Final = 1.0
#: Bytes that awaits may copy on the caller's loop before one of them lets others run.
_COURTESY_NBYTES: Final = 4 * MIB
#: Transports whose readers are on their owner's host.
_SAME_HOST: Final = frozenset({"shm", "cma", "cuda_ipc"})
#: Larger copies are made on a worker thread.
_COPY_ON_LOOP_NBYTES: Final = MIB
#: Memory for more tensors is prepared on a worker thread: 1 ms of the loop's time.
_LAND_ON_LOOP_COUNT: Final = 512


class _Wanted(NamedTuple):
    """What one `get` wants of one owner.

    Attributes:
        places: Where each is in the call.
        refs: The refs.
        sizes: Bytes of each.
        ties: Which of them share memory.
        headers: Of the results that they are of.
        known: What is known of them all.
    """

    places: Sequence[int]
    refs: Sequence[Pullable]
    sizes: Sequence[int]
    ties: Ties
    headers: Sequence[Header]
    known: Plain | None = None


class _Call(NamedTuple):
    """What the parts of one `Puller.pull_all` have in common: its arguments, and the results."""

    transport: str | None
    into: Sequence[torch.Tensor] | None
    dtype: torch.dtype | None
    name: Name | None
    results: list[Any]


class _Job(NamedTuple):
    """What to pull together.

    Attributes:
        forced: The transport that somebody demanded.
        suited: One that suits these better than the way to their owner in general.
        wanted: Of whom.
        numbers: Which of those.
    """

    forced: str | None
    suited: str | None
    wanted: _Wanted
    numbers: Sequence[int]


class Puller:
    """The part of a `Runtime` that pulls; the attributes are the runtime's."""

    session: Session
    config: Config
    address: PeerAddress
    closed: bool
    counters: Counters
    pool: Pool
    workers: Workers
    registry: Registry
    routes: Routes
    relay: Relay
    checks: Checks
    _admission: Admission
    _notes: Inbox
    _ray_questions: Workers
    _inline_nbytes: int

    def check(self, ref: Pullable, name: Name | None = None) -> None:
        """Refuse a ref that cannot be pulled any more, or not by this runtime."""
        if ref.header.session is self.session and not self.closed and not ref.released:
            return
        with naming(ref, name):
            if not ref.released:
                raise ClosedError(STALE_REF)
            raise TensorFreedError("this ref was released: release() gave its tensor up")

    def here(self, ref: Pullable) -> Any:  # noqa: ANN401
        """The tensor, or what it was made of, if its bytes need not be moved."""
        meta = ref.meta
        if ref.inline is not None:
            return unpack_inline(ref, ref.inline)
        if ref.header.address.runtime_id == self.address.runtime_id:
            export, tensor = self.registry.local(ref.header.key, ref.index)
            export.local = True
            warn_if_shared(export)
            if not export.ready.done():
                _device.wait_on_stream(tensor, export.ready)  # DEV-3
            whole = export.others.get(ref.index, tensor)
            if meta.offset is None:
                return whole
            part = view_of(tensor, meta)
            return as_array(part) if isinstance(whole, np.ndarray) else part
        if num_bytes(meta) == 0:
            return dress(torch.empty(meta.shape, dtype=dtype_of(meta.dtype)), ref)
        return None

    def pull_nowait(self, ref: Pullable, transport: str | None) -> Any:  # noqa: ANN401
        """Pull ``ref`` if that takes only microseconds; ``None`` if it does not."""
        self.check(ref)
        tensor = self.here(ref)
        if tensor is not None:
            self.came_along(ref)
            return tensor
        meta = ref.meta
        if meta.stride is not None or meta.device or meta.flags & _wire.FLAG_CHECKED:
            return None
        if ref.header.pending or unsure(ref):
            return None
        forced = transport or ref.header.transport
        found = self.routes.known(ref.header.address.runtime_id, forced or self.suited(ref))
        if found is None:
            return None
        name, link = found
        nbytes = num_bytes(meta)
        if self._inline_nbytes + nbytes > _COURTESY_NBYTES or nbytes > link.nowait_nbytes:
            return None  # the slow path gives the loop a turn
        landing = land(ref, self.pool)
        if not link.read_nowait([landing.part]):
            return None
        self._inline_nbytes += nbytes
        self.counters.pulled(name, 1, nbytes)
        self.arrived([ref])
        _device.wait_on_stream(landing.tensor, _device.DONE)  # DEV-3
        return landing.finish()

    async def pull(
        self, ref: Pullable, transport: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Any:  # noqa: ANN401
        """Pull one ref."""
        tensor = self.pull_nowait(ref, transport)
        if tensor is not None:
            return tensor
        return (await self.pull_all([ref], transport, dtype=dtype))[0]

    async def pull_all(
        self,
        refs: Sequence[Pullable],
        transport: str | None = None,
        *,
        into: Sequence[torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        name: Name | None = None,
    ) -> list[Any]:
        """Pull many refs: concurrently from each owner, in one batch from the same.

        Args:
            refs: What to pull; all are checked before anything moves.
            transport: Use this one only.
            into: Tensors to receive into, of the refs' shapes and dtypes.
            dtype: What the tensors will be converted to: an owner may do it before sending.
            name: Gives a ref's place in the caller's tree, for errors.

        Returns:
            The tensors, in order; those of ``into`` if it was given.
        """
        session = self.session
        for ref in refs:
            if ref.lease is None or ref.header.session is not session or self.closed:
                self.check(ref, name)
        leases = [ref.lease for ref in refs]  # release() meanwhile must not free what is read
        self._inline_nbytes = 0
        await asyncio.sleep(0)
        await confirm(refs, name)
        call = _Call(transport, into, dtype, name, [None] * len(refs))
        jobs = self._plan_known(refs, call)
        if jobs is None:
            sizes = [num_bytes(ref.meta) for ref in refs]
            owners = self._sort(refs, sizes, transport, name, call.results)
            for index, result in enumerate(call.results if into is not None else ()):
                if result is not None and into is not None:
                    call.results[index] = await self._copied(refs[index], into[index], result)
            jobs = self._plan(refs, sizes, owners, call)
        if jobs:
            try:
                await run_all([self._pull_by(call, *job) for job in jobs])
            except AiordtError as exc:
                raise without_frames(exc)  # noqa: B904  (it is the same one)
        del leases
        return [tensor for tensor in call.results if tensor is not None]

    def _plan_known(self, refs: Sequence[Pullable], call: _Call) -> list[_Job] | None:
        """What to pull by which way, if these are `plain` refs of another process."""
        header = refs[0].header
        known = plain(refs) if len(refs) > 1 else None
        if known is None or header.address.runtime_id == self.address.runtime_id:
            return None
        forced = call.transport or header.transport
        with naming(refs[0], call.name):
            check_shared(refs[0], forced)
        suited = self.suited(refs[0]) if forced is None and 0 not in known.segments else None
        everything = range(len(refs))
        wanted = _Wanted(everything, refs, known.sizes, UNTIED, [header], known)
        return [_Job(forced, suited, wanted, everything)]

    def _plan(
        self,
        refs: Sequence[Pullable],
        sizes: Sequence[int],
        owners: dict[tuple[bytes, str | None], list[int]],
        call: _Call,
    ) -> list[_Job]:
        """What to pull from each owner, by which way."""
        jobs = []
        for (_, forced), places in owners.items():
            some = [refs[place] for place in places]
            some_sizes = [sizes[place] for place in places]
            ties = tied(some, some_sizes, apart=call.into is not None)
            wanted = _Wanted(places, some, some_sizes, ties, [ref.header for ref in some])
            ways = self._ways(wanted, forced)
            jobs += [_Job(forced, suited, wanted, numbers) for suited, numbers in ways.items()]
        return jobs

    async def _pull_by(
        self,
        call: _Call,
        forced: str | None,
        suited: str | None,
        wanted: _Wanted,
        numbers: Sequence[int],
    ) -> None:
        """Pull some of what is wanted of one owner."""
        first = wanted.refs[numbers[0]]
        with naming(first, call.name, len(numbers)):
            finding = self.find(first.header, forced, suited)
            transport, link = await self.reached(first.header, finding)
            asking = self.routes.wait_ready(wanted.headers)
            await self.reached(first.header, asking)  # DEV-1
            if wanted.known is None:
                check_reach(transport, link, [wanted.refs[number] for number in numbers])
        into = call.into
        share = self._admission.share
        for some in parcels(wanted.ties, numbers, wanted.sizes, share):
            batch = Batch(
                [wanted.refs[number] for number in some],
                [wanted.sizes[number] for number in some],
                wanted.ties.among(some),
                None if into is None else [into[wanted.places[number]] for number in some],
                call.dtype if link.packs else None,
            )
            if wanted.known is not None:
                batch.segments = wanted.known.segments
            with naming(batch.refs[0], call.name, len(some)):
                relayed = forced is None
                tensors = await self._pull_batch(batch, transport, link, call.name, shared=relayed)
            for number, tensor in zip(some, tensors, strict=True):
                call.results[wanted.places[number]] = tensor

    def _sort(
        self,
        refs: Sequence[Pullable],
        sizes: Sequence[int],
        transport: str | None,
        name: Name | None,
        results: list[Any],
    ) -> dict[tuple[bytes, str | None], list[int]]:
        """Fill in what is here already; the places of the others by owner and forced transport."""
        by_value: list[int] = []
        owners: dict[tuple[bytes, str | None], list[int]] = {}
        remote: Header | None = None
        forced: str | None = None
        places: list[int] = []
        for index, ref in enumerate(refs):
            if ref.lease is None or self.closed:
                self.check(ref, name)
            if ref.inline is not None:
                by_value.append(index)
                continue
            if ref.header is remote and sizes[index] and (forced != "shm" or ref.meta.segment):
                places.append(index)  # as the one before
                continue
            with naming(ref, name):
                tensor = self.here(ref)
            if tensor is None:
                remote = ref.header
                forced = transport or remote.transport
                with naming(ref, name):
                    check_shared(ref, forced)
                key = (remote.address.runtime_id, forced)
                places = owners.setdefault(key, [])
                places.append(index)
            else:
                results[index] = tensor
        self._unpack(refs, by_value, results)
        return owners

    def _unpack(self, refs: Sequence[Pullable], places: list[int], results: list[Any]) -> None:
        """The tensors that travelled inside their refs."""
        tied = unpack_tied([refs[place] for place in places])
        for number, place in enumerate(places):
            ref = refs[place]
            tensor = tied.get(number)
            results[place] = unpack_inline(ref, ref.inline or b"") if tensor is None else tensor
            self.came_along(ref)

    def suited(self, ref: Pullable, *, tied: bool = False) -> str | None:
        """The transport that suits a tensor better than the way to its owner in general.

        Shared memory if it lies there; for one of tiny pieces, or on a device, a link whose
        owner packs or stages them, unless it is ``tied`` to others and moves as a part of them.
        """
        allowed = self.config.transports
        peer_id = ref.header.address.runtime_id
        if ref.meta.segment and "shm" in allowed and not self.routes.refused(peer_id, "shm"):
            return "shm"
        wanted = bool(ref.meta.device) or (not tied and prefers_packing(ref.meta))
        return "tcp" if wanted and "tcp" in allowed else None

    def _ways(self, wanted: _Wanted, forced: str | None) -> dict[str | None, list[int]]:
        """Numbers of refs by the transport that suits them better than the general way."""
        metas = [ref.meta for ref in wanted.refs]
        if forced is not None or not any(
            meta.stride is not None or meta.segment or meta.device for meta in metas
        ):
            return {None: list(range(len(metas)))}
        grouped = {number for group in wanted.ties.groups for number in group.members}
        ways: dict[str | None, list[int]] = {}
        for number, ref in enumerate(wanted.refs):
            ways.setdefault(self.suited(ref, tied=number in grouped), []).append(number)
        return ways

    async def find(
        self, header: Header, forced: str | None, suited: str | None
    ) -> tuple[str, Link]:
        """The transport to use, and the link to the owner by it."""
        if forced is None and suited is not None:
            with suppress(UnavailableError):  # remembered: it is not tried again
                return await self.routes.find(header.address, header.owner, suited)
        return await self.routes.find(header.address, header.owner, forced)

    async def reached(
        self, header: Header, reaching: Awaitable[_T], ref: Pullable | None = None
    ) -> _T:
        """The outcome of something that was asked of an owner, for ``ref`` or in general."""
        try:
            return await reaching
        except (OwnerDiedError, PeerLostError) as exc:
            if isinstance(exc, PeerLostError) and not await self._ray_says_gone(header.owner):
                raise
            what = "its tensors" if ref is None else describe(ref)
            raise died(header.owner, exc, what) from exc

    async def _ray_says_gone(self, owner: Owner) -> bool:
        """Whether an unreachable owner is known to be dead."""
        return await self._ray_says(lambda: _ray.is_gone(owner))

    async def _ray_says(self, question: Callable[[], bool]) -> bool:
        """Ray's answer; ``False`` if there is none."""
        asked = self._ray_questions.run(question)
        asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        done, _ = await asyncio.wait({asked}, timeout=_RAY_SECONDS)
        return bool(done) and asked.exception() is None and asked.result()

    async def _pull_batch(
        self, batch: Batch, transport: str, link: Link, name: Name | None, *, shared: bool
    ) -> list[Any]:
        """One batch; the leases are held by the caller's frame until it has ended."""
        refs, nbytes = batch.refs, sum(batch.sizes)
        peer_id = refs[0].header.address.runtime_id
        await self._admission.acquire(peer_id, nbytes)
        self.counters.started(len(refs))
        try:
            phase("pull.admitted")
            reading = self._read(batch, transport, link, shared=shared)
            parts = await self.reached(refs[0].header, reading, refs[0])
            if refs[0].meta.flags & _wire.FLAG_CHECKED:  # then they all are: one owner
                checking = self.checks.check(batch, parts, transport, name)
                await self.reached(refs[0].header, checking, refs[0])
            phase("pull.arrived")
        finally:
            self.counters.ended(len(refs))
            self._admission.release(peer_id, nbytes)
        self.arrived(refs)
        if batch.copy_nbytes > _COPY_ON_LOOP_NBYTES:
            tensors = await finish(self.workers.run(batch.finish))  # OWN-1: the caller's tensors
        else:
            tensors = batch.finish()
        return await batch.hand_over(tensors)

    async def _read(self, batch: Batch, name: str, link: Link, *, shared: bool) -> list[Part]:
        """Read a batch, by way of neighbours if ``shared``; what was read, if it is checked."""
        coming = batch.land(self.pool)
        checked = batch.refs[0].meta.flags & _wire.FLAG_CHECKED
        if isinstance(link, DrawingLink) and not checked and sum(batch.sizes) > link.nowait_nbytes:
            segments = batch.segments or {ref.meta.segment for ref in batch.refs}
            await link.read_drawn(coming, segments)
            self.counters.pulled(name, len(batch.refs), batch.nbytes)
            return []
        many = len(batch.refs) > _LAND_ON_LOOP_COUNT
        parts = await finish(self.workers.run(lambda: [*coming])) if many else [*coming]
        # A neighbour may read by a link that does not convert.
        converted = any(part.cut is not None and part.cut.dtype is not None for part in parts)
        if shared and not converted and self.relay.wants(parts):
            header = batch.refs[0].header
            way, _ = await self.routes.find(header.address, header.owner, None)
            if way not in _SAME_HOST:
                await self.relay.read(header.address, parts, name, link)  # counts by itself
                return parts
        if not link.read_nowait(parts):
            await link.read(parts)
        self.counters.pulled(name, len(batch.refs), batch.nbytes)
        return parts

    async def _copied(self, ref: Pullable, into: torch.Tensor, tensor: Any) -> torch.Tensor:  # noqa: ANN401
        if ref.inline is None and ref.header.address.runtime_id == self.address.runtime_id:
            await self.registry.wait_ready([ref.header.key])  # DEV-1
        if into.nbytes > _COPY_ON_LOOP_NBYTES or ref.meta.device:
            return await finish(self.workers.run(lambda: copy_into(into, tensor)))
        return copy_into(into, tensor)

    def came_along(self, ref: Pullable) -> None:
        if ref.inline is not None and ref.header.address.runtime_id != self.address.runtime_id:
            self.counters.pulled("inline", 1, len(ref.inline))

    def arrived(self, refs: Sequence[Pullable]) -> None:
        """Let their owners know that others have them, once."""
        for ref in refs:
            if not ref.header.noted:
                ref.header.noted = True
                self._notes.put(ref.header)
