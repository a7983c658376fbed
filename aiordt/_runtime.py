"""One runtime per process: it exports, serves, finds the way to others, and pulls.

It starts with the first use in a Ray session and ends with the process or the session.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from aiordt import _config, _device, _ray, _relay, _wire
from aiordt._errors import (
    AiordtError,
    ClosedError,
    OwnerDiedError,
    PeerLostError,
    TensorFreedError,
    UnavailableError,
)
from aiordt._landing import (
    Header,
    Landing,
    Pullable,
    as_seen,
    check_reach,
    copy_into,
    dense_stride_of,
    describe,
    dress,
    dtype_of,
    hand_over,
    land,
    num_bytes,
    prefers_packing,
    unpack_inline,
)
from aiordt._layout import span
from aiordt._memory import Pool
from aiordt._metrics import Counters, phase
from aiordt._peer import Network, listen, listen_locally
from aiordt._progress import Admission, Inbox, IoThread, Workers, finish, post, run_all
from aiordt._registry import Registry, warn_if_shared
from aiordt._relay import Relay
from aiordt._route import NOT_SHARED, Routes
from aiordt._types import MIB
from aiordt.abc import Context, PeerAddress, SharedLink, TransportMessage
from aiordt.transports import Transports
from aiordt.transports.cma import allow_readers, host_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aiordt._config import Config
    from aiordt._ray import Session
    from aiordt._types import Explanation, Owner
    from aiordt._wire import Message
    from aiordt.abc import Link

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Notes to owners ("I pulled this") are gathered for so long.
_NOTE_SECONDS: Final = 0.05
#: How often a runtime looks whether its Ray session goes on (2 µs).
_SESSION_SECONDS: Final = 1.0
_STALE_REF: Final = "this ref belongs to a Ray session that has ended (ray.shutdown was called)"
#: How long Ray is given to say whether an unreachable owner is dead.
_RAY_SECONDS: Final = 1.0
#: Bytes that awaits may copy on the caller's loop before one of them lets others run.
_COURTESY_NBYTES: Final = 4 * MIB
#: Larger copies are made on a worker thread.
_COPY_ON_LOOP_NBYTES: Final = MIB


class Runtime:
    """aiordt in this process. Made by `current`."""

    def __init__(self, session: Session, config: Config) -> None:
        self.session = session
        self.config = config
        self.pid = os.getpid()
        self.counters = Counters()
        self.pool = Pool(config.pool_nbytes)
        self.workers = Workers("worker", 4)
        self._ray_questions = Workers("ray", 2)  # may block for long when the network is cut
        self.registry = Registry(self.workers, config.max_exported_bytes)
        self.closed = False
        self._admission = Admission(config.max_in_flight_bytes)
        self._owner: Owner | None = None
        self._inline_nbytes = 0
        self._secret: asyncio.Task[bytes] | None = None
        runtime_id = os.urandom(_wire.NONCE_NBYTES)
        self._token = ctypes.create_string_buffer(runtime_id, len(runtime_id))
        host = _ray.node_ip()
        listener = listen(host)
        self.io = IoThread()
        self.address = PeerAddress(
            host,
            listener.getsockname()[1],
            runtime_id,
            self.pid,
            host_id(),
            ctypes.addressof(self._token),
        )
        allow_readers()
        self.transports = Transports(Context(self.io, self.registry, config), self.workers)
        dropped = Inbox(self.io.loop, self.registry.drop)
        self.markers = _ray.Markers(self.workers, dropped.put)
        self._unsent: list[Header] = []
        self._notes = Inbox(self.io.loop, self._send_notes)
        self._network = Network(
            listener,
            listen_locally(runtime_id),
            runtime_id,
            secret=self._read_secret,
            handle=self._handle,
            accept=self.transports.accept,
            lost=self._lost,
        )
        self.routes = Routes(self.io, self._network, self.transports, config.transports)
        self.relay = Relay(
            self.address,
            self.io,
            routes=self.routes,
            counters=self.counters,
            workers=self.workers,
            limit=config.relay_nbytes if "shm" in config.transports else 0,
        )
        post(self.io.loop, self._network.start)
        post(self.io.loop, lambda: self.io.spawn(self._watch_session()))

    @property
    def owner(self) -> Owner:
        """Who this process is, as it stands in its refs."""
        if self._owner is None:
            self._owner = _ray.identity()
        return self._owner

    async def _read_secret(self) -> bytes:
        if self._secret is None or (self._secret.done() and self._secret.exception()):

            async def read() -> bytes:
                try:
                    return await self.workers.run(lambda: _ray.read_secret(self.session))
                except AiordtError:
                    raise
                except Exception as exc:
                    raise PeerLostError(
                        f"the cluster's secret could not be read from Ray's GCS: {exc}",
                        peer="GCS",
                    ) from exc

            self._secret = asyncio.get_running_loop().create_task(read())
        return await asyncio.shield(self._secret)

    async def _watch_session(self) -> None:
        """End with the session, even if nobody asks for anything any more."""
        while not self.session.over:  # noqa: ASYNC110  (Ray tells nobody)
            await asyncio.sleep(_SESSION_SECONDS)
        threading.Thread(target=close, args=(self,), daemon=True).start()

    # --- serving: on the io loop -----------------------------------------------------------

    async def _handle(self, message: Message, peer_id: bytes) -> Message | None:
        if isinstance(message, _wire.Seen):
            for key in message.keys:
                export = self.registry.seen(key, peer_id)
                if export is not None:
                    warn_if_shared(export)
            return None
        if isinstance(message, _wire.Ready):
            await self.registry.wait_ready(message.keys)
            return message
        if isinstance(message, TransportMessage) and message.transport == _relay.NAME:
            watched = _relay.watched_key(message)
            if watched is None:
                return await self.relay.serve(message, peer_id)
            await self.registry.wait_gone(watched)
            return message
        return await self.transports.serve(message, peer_id)

    def _lost(self, peer_id: bytes) -> None:
        self.relay.forget(peer_id)
        self.transports.forget(peer_id)
        self.routes.forget(peer_id)

    def _send_notes(self, headers: list[Header]) -> None:
        self._unsent += headers
        if len(self._unsent) > len(headers):
            return  # a sender is waiting already

        async def send() -> None:
            await asyncio.sleep(_NOTE_SECONDS)
            headers, self._unsent = self._unsent, []
            keys: dict[bytes, tuple[Header, list[bytes]]] = {}
            for header in headers:
                keys.setdefault(header.address.runtime_id, (header, []))[1].append(header.key)
            for header, noted in keys.values():
                await self.routes.peer(header.address).note(_wire.Seen(noted))

        self.io.spawn(send())

    async def explain(self, ref: Pullable) -> Explanation:
        """See `aiordt.explain`."""
        self._check(ref)
        return await self.routes.explain(ref, self.address.runtime_id, self._suited(ref))

    # --- looking ---------------------------------------------------------------------------

    async def view(self, ref: Pullable) -> Any:  # noqa: ANN401
        """See `aiordt.TensorRef.view`."""
        self._check(ref)
        tensor = self._here(ref)
        if tensor is not None:
            self._came_along(ref)
            return tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
        self._check_shared(ref, "shm")
        meta = ref.meta
        dtype = dtype_of(meta.dtype)
        stride = dense_stride_of(meta)
        nbytes = span(meta.shape, stride, dtype.itemsize)
        _, link = await self._reached(ref.header, self._find(ref.header, "shm", None))
        await self._reached(ref.header, self.routes.wait_ready([ref.header]))  # DEV-1
        assert isinstance(link, SharedLink)  # noqa: S101  (what `shm` is)
        flat = await link.view(meta.segment, meta.address, nbytes)
        return as_seen(flat.view(dtype).as_strided(meta.shape, stride), ref)

    # --- pulling ---------------------------------------------------------------------------

    def _check(self, ref: Pullable) -> None:
        if ref.header.session is not self.session or self.closed:
            raise ClosedError(_STALE_REF)
        if ref.released:
            raise TensorFreedError("this ref was released: release() gave its tensor up")

    def _here(self, ref: Pullable) -> Any:  # noqa: ANN401
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
            return export.others.get(ref.index, tensor)
        if num_bytes(meta) == 0:
            return dress(torch.empty(meta.shape, dtype=dtype_of(meta.dtype)), ref)
        return None

    def pull_nowait(self, ref: Pullable, transport: str | None) -> Any:  # noqa: ANN401
        """Pull ``ref`` if that takes only microseconds; ``None`` if it does not."""
        self._check(ref)
        tensor = self._here(ref)
        if tensor is not None:
            self._came_along(ref)
            return tensor
        if ref.meta.stride is not None or ref.meta.device or ref.header.pending:
            return None
        forced = transport or ref.header.transport
        peer_id = ref.header.address.runtime_id
        found = None
        if forced is None and ref.meta.segment and not self.routes.refused(peer_id, "shm"):
            found = self.routes.known(peer_id, "shm")
        else:
            found = self.routes.known(peer_id, forced)
        if found is None:
            return None
        name, link = found
        nbytes = num_bytes(ref.meta)
        if self._inline_nbytes + nbytes > _COURTESY_NBYTES:
            return None  # the slow path gives the loop a turn
        if nbytes > link.nowait_nbytes:
            return None
        landing = land(ref, self.pool)
        if not link.read_nowait([landing.part]):
            return None
        self._inline_nbytes += nbytes
        self.counters.pulled(name, 1, nbytes)
        self._arrived([ref])
        _device.wait_on_stream(landing.tensor, _device.DONE)  # DEV-3
        return landing.finish()

    async def pull(self, ref: Pullable, transport: str | None = None) -> Any:  # noqa: ANN401
        """Pull one ref."""
        tensor = self.pull_nowait(ref, transport)
        if tensor is not None:
            return tensor
        return (await self.pull_all([ref], transport))[0]

    async def pull_all(
        self,
        refs: Sequence[Pullable],
        transport: str | None = None,
        into: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Pull many refs: concurrently from each owner, in one batch from the same.

        Args:
            refs: What to pull; all are checked before anything moves.
            transport: Use this one only.
            into: Tensors to receive into, of the refs' shapes and dtypes.

        Returns:
            The tensors, in order; those of ``into`` if it was given.
        """
        for ref in refs:
            self._check(ref)
        leases = [ref.lease for ref in refs]  # release() meanwhile must not free what is read
        self._inline_nbytes = 0
        await asyncio.sleep(0)
        results: list[torch.Tensor | None] = [None] * len(refs)
        batches: dict[tuple[bytes, str | None, str | None], list[int]] = {}
        for index, ref in enumerate(refs):
            self._check(ref)
            tensor = self._here(ref)
            if tensor is None:
                forced = transport or ref.header.transport
                self._check_shared(ref, forced)
                way = (ref.header.address.runtime_id, forced, self._suited(ref))
                batches.setdefault(way, []).append(index)
                continue
            self._came_along(ref)
            results[index] = tensor
            if into is not None:
                results[index] = await self._copied(ref, into[index], tensor)

        async def pull_batch(forced: str | None, suited: str | None, indices: list[int]) -> None:
            header = refs[indices[0]].header
            finding = self._find(header, forced, suited)
            name, link = await self._reached(header, finding)
            asking = self.routes.wait_ready([refs[index].header for index in indices])
            await self._reached(header, asking)
            for some in self._admissible(refs, indices):
                batch = [refs[index] for index in some]
                targets = None if into is None else [into[index] for index in some]
                tensors = await self._pull_batch(batch, targets, name, link)
                for index, tensor in zip(some, tensors, strict=True):
                    results[index] = tensor

        if batches:
            await run_all(
                [
                    pull_batch(forced, suited, indices)
                    for (_, forced, suited), indices in batches.items()
                ]
            )
        del leases
        return [tensor for tensor in results if tensor is not None]

    def _suited(self, ref: Pullable) -> str | None:
        """The transport that suits a tensor better than the way to its owner in general.

        Shared memory if it lies there; for one of tiny pieces, or on a device, a link whose
        owner packs or stages them.
        """
        allowed = self.config.transports
        peer_id = ref.header.address.runtime_id
        if ref.meta.segment and "shm" in allowed and not self.routes.refused(peer_id, "shm"):
            return "shm"
        wanted = prefers_packing(ref.meta) or bool(ref.meta.device)
        return "tcp" if wanted and "tcp" in allowed else None

    @staticmethod
    def _check_shared(ref: Pullable, forced: str | None) -> None:
        if forced == "shm" and not ref.meta.segment:
            reason = NOT_SHARED
            raise UnavailableError(
                f"{describe(ref)} of {ref.header.owner}: {reason}", reason=reason, transport="shm"
            )

    async def _find(
        self, header: Header, forced: str | None, suited: str | None
    ) -> tuple[str, Link]:
        if forced is None and suited is not None:
            with suppress(UnavailableError):  # remembered: it is not tried again
                return await self.routes.find(header.address, header.owner, suited)
        return await self.routes.find(header.address, header.owner, forced)

    async def _reached(self, header: Header, reaching: Awaitable[_T]) -> _T:
        """The outcome of something that was asked of an owner."""
        try:
            return await reaching
        except OwnerDiedError as exc:
            raise _died(header.owner, exc) from exc
        except PeerLostError as exc:
            if await self._ray_says_gone(header.owner):
                raise _died(header.owner, exc) from exc
            raise

    async def _ray_says_gone(self, owner: Owner) -> bool:
        """Whether an unreachable owner is known to be dead; ``False`` if Ray does not answer."""
        asked = self._ray_questions.run(lambda: _ray.is_gone(owner))
        asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        done, _ = await asyncio.wait({asked}, timeout=_RAY_SECONDS)
        return bool(done) and asked.exception() is None and asked.result()

    def _admissible(self, refs: Sequence[Pullable], indices: list[int]) -> list[list[int]]:
        """Cut a batch into some that `max_in_flight_bytes` lets in."""
        batches: list[list[int]] = [[]]
        room = self.config.max_in_flight_bytes
        for index in indices:
            nbytes = num_bytes(refs[index].meta)
            if batches[-1] and nbytes > room:
                batches.append([])
                room = self.config.max_in_flight_bytes
            batches[-1].append(index)
            room -= nbytes
        return batches

    async def _pull_batch(
        self,
        refs: Sequence[Pullable],
        into: Sequence[torch.Tensor] | None,
        name: str,
        link: Link,
    ) -> list[torch.Tensor]:
        """One read; the leases are held by the caller's frame until it has ended."""
        nbytes = sum(num_bytes(ref.meta) for ref in refs)
        await self._admission.acquire(nbytes)
        self.counters.started(len(refs))
        try:
            phase("pull.admitted")

            def prepare() -> list[Landing]:
                targets = [None] * len(refs) if into is None else into
                return [
                    land(ref, self.pool, target) for ref, target in zip(refs, targets, strict=True)
                ]

            check_reach(name, link, refs)
            landings = prepare()
            parts = [landing.part for landing in landings]
            relayed = self.relay.wants(name, parts)
            try:
                if relayed:
                    await self.relay.read(refs[0].header.address, parts, name, link)
                elif not link.read_nowait(parts):
                    await link.read(parts)
            except OwnerDiedError as exc:
                raise _died(refs[0].header.owner, exc, describe(refs[0])) from exc
            except PeerLostError as exc:
                owner = refs[0].header.owner
                if await self._ray_says_gone(owner):
                    raise _died(owner, exc, describe(refs[0])) from exc
                raise
            phase("pull.arrived")
        finally:
            self.counters.ended(len(refs))
            self._admission.release(nbytes)
        if not relayed:
            self.counters.pulled(name, len(refs), sum(part.nbytes for part in parts))
        self._arrived(refs)
        if sum(landing.copy_nbytes for landing in landings) > _COPY_ON_LOOP_NBYTES:
            work = self.workers.run(lambda: [landing.finish() for landing in landings])
            tensors = await finish(work)  # OWN-1: it may write to the caller's tensors
        else:
            tensors = [landing.finish() for landing in landings]
        return await hand_over(landings, tensors)

    async def _copied(self, ref: Pullable, into: torch.Tensor, tensor: Any) -> torch.Tensor:  # noqa: ANN401
        if ref.inline is None:
            await self.registry.wait_ready([ref.header.key])  # DEV-1
        if into.nbytes > _COPY_ON_LOOP_NBYTES or ref.meta.device:
            return await finish(self.workers.run(lambda: copy_into(into, tensor)))
        return copy_into(into, tensor)

    def _came_along(self, ref: Pullable) -> None:
        if ref.inline is not None and ref.header.address.runtime_id != self.address.runtime_id:
            self.counters.pulled("inline", 1, len(ref.inline))

    def _arrived(self, refs: Sequence[Pullable]) -> None:
        for ref in refs:
            if not ref.header.noted:
                ref.header.noted = True
                self._notes.put(ref.header)

    # --- the end ---------------------------------------------------------------------------

    def close(self, timeout: float = 1.0) -> None:
        """End this runtime; every pending wait ends. Blocks for ``timeout`` s at most."""
        if self.closed:
            return
        self.closed = True
        self.markers.close()
        self.registry.close()

        async def cleanup() -> None:
            await self.relay.aclose()
            await self._network.aclose()
            await self.routes.aclose()
            await self.transports.aclose()

        if self.pid == os.getpid():
            self.io.close(cleanup(), timeout)
        self.workers.close()
        self._ray_questions.close()
        self.pool.close()


def _died(owner: Owner, cause: Exception, what: str = "its tensors") -> OwnerDiedError:
    return OwnerDiedError(f"{owner} died, and {what} with it ({cause})", owner=str(owner))


class _Current:
    """The one runtime of this process."""

    runtime: Runtime | None = None


_lock = threading.Lock()


def current() -> Runtime:
    """The runtime of this process, started if need be (about 0.3 ms, once).

    Raises:
        UsageError: Ray is not initialized here.
    """
    session = _ray.session()
    runtime = _Current.runtime
    if runtime is not None and runtime.session is session and runtime.pid == os.getpid():
        return runtime
    with _lock:
        runtime = _Current.runtime
        if runtime is not None and runtime.session is session and runtime.pid == os.getpid():
            return runtime
        if runtime is not None:
            _config.release()
            threading.Thread(target=runtime.close, daemon=True).start()
        _Current.runtime = Runtime(session, _config.take())
        return _Current.runtime


def current_for(ref: Pullable) -> Runtime:
    """The runtime that may pull a ref.

    Raises:
        ClosedError: The ref belongs to a session that has ended.
        UsageError: Ray is not initialized here.
    """
    session = ref.header.session
    if isinstance(session, _ray.Session) and not session.alive:
        raise ClosedError(_STALE_REF)
    return current()


def current_or_none() -> Runtime | None:
    """The runtime, if it has been started and its session goes on."""
    runtime = _Current.runtime
    if runtime is None or runtime.pid != os.getpid() or not runtime.session.alive:
        return None
    return runtime


def close(only: Runtime | None = None) -> None:
    """End the runtime of this process, if there is one (and it is ``only``)."""
    with _lock:
        runtime = _Current.runtime
        if runtime is None or (only is not None and runtime is not only):
            return
        _Current.runtime = None
        _config.release()
    runtime.close()


atexit.register(close)
