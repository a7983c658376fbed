"""The way to each peer: which transport, proved once for each pair of processes, then kept."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aiordt import _wire
from aiordt._config import PLANNED
from aiordt._errors import (
    AuthenticationError,
    OwnerDiedError,
    PeerLostError,
    UnavailableError,
)
from aiordt._landing import describe, out_of_reach
from aiordt._metrics import phase
from aiordt._peer import RemotePeer
from aiordt._progress import post
from aiordt._types import Explanation
from aiordt.abc import SharedLink
from aiordt.transports import names, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt._landing import Header, Pullable
    from aiordt._peer import Network
    from aiordt._progress import IoThread
    from aiordt._types import Owner
    from aiordt.abc import Link, PeerAddress
    from aiordt.transports import Transports

_log = logging.getLogger(__name__)

#: Transports that move only some of a process's tensors, so they are no way to it in general.
_PARTIAL: Final = frozenset({"shm"})
NOT_SHARED: Final = "the tensor is not in shared memory: its owner can make it with aiordt.empty()"


def check_shared(ref: Pullable, forced: str | None) -> None:
    """Refuse a transport through shared memory for a tensor that is not there.

    Raises:
        UnavailableError: ``forced`` is such a transport.
    """
    if forced == "shm" and not ref.meta.segment:
        reason = NOT_SHARED
        raise UnavailableError(
            f"{describe(ref)} of {ref.header.owner}: {reason}", reason=reason, transport="shm"
        )


@dataclass(slots=True)
class _Way:
    """The links to one peer, each made once and kept."""

    peer: RemotePeer
    links: dict[str, Link | UnavailableError] = field(default_factory=dict)
    chosen: tuple[str, Link] | None = None


def _links(way: _Way) -> list[Link]:
    return [link for link in way.links.values() if not isinstance(link, UnavailableError)]


class Routes:
    """The ways from this process to others. Any thread and any loop may ask."""

    def __init__(
        self,
        io: IoThread,
        network: Network,
        transports: Transports,
        preferred: Sequence[str],
    ) -> None:
        self._io = io
        self._network = network
        self._transports = transports
        self._preferred = preferred
        self._lock = threading.Lock()
        self._ways: dict[bytes, _Way] = {}
        self._seen: Callable[[str, Link], None] | None = None

    def availability(self, name: str) -> str:
        """Why a transport cannot be used in this process; empty if it can."""
        if name in PLANNED:
            return "this version of aiordt does not have it yet"
        if name not in self._preferred:
            return f"not among this process's transports: {', '.join(self._preferred)}"
        available = probe(name)
        return "" if available.usable else available.reason

    def known(self, peer_id: bytes, forced: str | None) -> tuple[str, Link] | None:
        """The way to a peer, if it has been found already."""
        way = self._ways.get(peer_id)
        if way is None or forced is None:
            return None if way is None else way.chosen
        link = way.links.get(forced)
        return None if link is None or isinstance(link, UnavailableError) else (forced, link)

    def refused(self, peer_id: bytes, name: str) -> bool:
        """Whether a transport was tried for a peer, and cannot work."""
        way = self._ways.get(peer_id)
        return way is not None and isinstance(way.links.get(name), UnavailableError)

    @property
    def mapped_nbytes(self) -> int:
        """Bytes of other processes' memory that are mapped here."""
        links = [link for way in list(self._ways.values()) for link in _links(way)]
        return sum(link.mapped_nbytes for link in links if isinstance(link, SharedLink))

    def peer(self, address: PeerAddress) -> RemotePeer:
        """The peer at an address."""
        return self._way(address).peer

    def _way(self, address: PeerAddress) -> _Way:
        way = self._ways.get(address.runtime_id)
        if way is None:
            with self._lock:
                made = _Way(RemotePeer(address, self._network))
                way = self._ways.setdefault(address.runtime_id, made)
        return way

    def forget(self, peer_id: bytes) -> None:
        """A peer is gone. On the io loop.

        Reads that are under way find that out themselves; links end with their last user.
        """
        with self._lock:
            way = self._ways.pop(peer_id, None)
        for link in [] if way is None else _links(way):
            if link.death_fd is not None:
                self._io.loop.remove_reader(link.death_fd)

    async def aclose(self) -> None:
        """Close all links. On the io loop."""
        for way in list(self._ways.values()):
            for link in _links(way):
                await link.aclose()

    def watch_links(self, seen: Callable[[str, Link], None] | None) -> None:
        """Let ``seen`` have each link, those that there are and those to come; ``None``: no more.

        It is called before a link is used, with its transport, on any thread.
        """
        with self._lock:
            self._seen = seen
            if seen is None:
                return
            for way in self._ways.values():
                for name, link in list(way.links.items()):
                    if not isinstance(link, UnavailableError):
                        seen(name, link)

    async def _link(self, way: _Way, name: str) -> Link:
        """The link by one transport.

        Raises:
            UnavailableError: It cannot work; remembered for this peer.
            OwnerDiedError: The peer is gone, and is forgotten.
        """
        known = way.links.get(name)
        if known is None:
            if name in self._preferred:
                await self._transports.probe(name)
            reason = self.availability(name)
            try:
                if reason:
                    raise UnavailableError(f"{name}: {reason}", reason=reason, transport=name)
                transport = await self._transports.get(name)
                made = await transport.connect(way.peer)
            except UnavailableError as exc:
                known = way.links.setdefault(name, exc.with_traceback(None))
            except OwnerDiedError:
                post(self._io.loop, self.forget, way.peer.address.runtime_id)
                raise
            else:
                with self._lock:
                    if self._seen is not None:
                        self._seen(name, made)
                    known = way.links.setdefault(name, made)
                if known is made and made.death_fd is not None:
                    post(self._io.loop, self._watch, made.death_fd, way)
        if isinstance(known, UnavailableError):
            raise UnavailableError(str(known), reason=known.reason, transport=known.transport)
        return known

    async def _check_alive(self, way: _Way) -> None:
        try:
            await self._io.run(way.peer.reach())
        except OwnerDiedError:
            post(self._io.loop, self.forget, way.peer.address.runtime_id)
            raise

    def _watch(self, death_fd: int, way: _Way) -> None:
        peer_id = way.peer.address.runtime_id
        if self._ways.get(peer_id) is way:
            self._io.loop.add_reader(death_fd, self.forget, peer_id)

    async def find(
        self, address: PeerAddress, owner: Owner, forced: str | None
    ) -> tuple[str, Link]:
        """The transport to use for a peer, and the link.

        Args:
            address: Where the peer is.
            owner: Who it is, for messages.
            forced: Use this transport or none.

        Raises:
            UnavailableError: None, or not the one demanded, reaches it; says why each.
            OwnerDiedError: The peer is gone.
            PeerLostError: It cannot be reached.
        """
        way = self._way(address)
        if forced is not None:
            try:
                return forced, await self._link(way, forced)
            except UnavailableError:
                await self._check_alive(way)  # a dead process has no pid to read from either
                raise
        if way.chosen is not None:
            return way.chosen
        phase("route.negotiating")
        reasons = []
        lost: PeerLostError | None = None
        for name in self._preferred:
            if name in _PARTIAL or (await self._transports.probe(name)).on_demand:
                continue
            try:
                link = await self._link(way, name)
            except (UnavailableError, PeerLostError) as exc:
                reasons.append(str(exc))
                lost = exc if isinstance(exc, PeerLostError) else lost
                continue
            way.chosen = (name, link)
            _log.info(
                "transport chosen peer=%s transport=%s because=%s",
                owner,
                name,
                "; ".join(reasons) or "first choice",
            )
            return way.chosen
        if lost is not None:
            raise lost
        await self._check_alive(way)
        reason = "; ".join(reasons)
        raise UnavailableError(
            f"no transport reaches {owner}: {reason}", reason=reason, transport="any"
        )

    async def wait_ready(self, headers: Sequence[Header]) -> None:
        """Wait until their owner's devices have made the tensors; it is asked once (DEV-1)."""
        pending = {header.key: header for header in headers if header.pending}
        if not pending:
            return
        phase("pull.pending")
        (first, *_) = pending.values()
        await self._io.run(self.peer(first.address).call(_wire.Ready(list(pending))))
        for header in pending.values():
            header.pending = False

    async def explain(self, ref: Pullable, here: bytes, suited: str | None) -> Explanation:
        """See `aiordt.explain`.

        Args:
            ref: What would be pulled.
            here: This process's runtime id.
            suited: The transport that suits it better than others, if there is one.
        """
        forced = ref.header.transport
        reasons: dict[str, str] = {}
        chosen: str | None = None
        if ref.inline is not None:
            chosen, reasons["inline"] = "inline", "the bytes travel inside the ref"
        elif forced is not None:
            reasons["inline"] = "the exporter demanded a transport"
        else:
            reasons["inline"] = (
                "over the exporter's inline_nbytes or the rest of inline_result_nbytes"
            )
        if ref.header.address.runtime_id != here:
            reasons["local"] = f"the owner is another process, {ref.header.owner}"
        elif chosen is None:
            chosen, reasons["local"] = "local", "this process owns the tensor: no copy"
        first = () if suited is None else (suited,)
        for name in dict.fromkeys((*first, *self._preferred, *names())):
            if chosen in {"local", "inline"}:
                reasons[name] = "not needed"
                continue
            obstacle = await self._obstacle(ref, name, forced)
            available = await self._transports.probe(name)
            if obstacle:
                reasons[name] = obstacle
            elif available.on_demand and forced is None:
                reasons[name] = f"usable; {available.reason}"
            else:
                words = ["usable" if chosen is None else f"usable; {chosen} is preferred"]
                if name == suited == "tcp":
                    device = ref.meta.device
                    words.append(
                        f"the owner stages it from {device} in host memory"
                        if device
                        else "the owner packs this tensor of many small pieces"
                    )
                if available.reason:
                    words.append(available.reason)
                reasons[name] = "; ".join(words)
                chosen = chosen or name
        return Explanation(chosen, reasons)

    async def _obstacle(self, ref: Pullable, name: str, forced: str | None) -> str:
        """Why a transport cannot move a tensor here; empty if it can."""
        if forced is not None and name != forced:
            return f"the exporter demanded {forced}"
        if name in _PARTIAL and not ref.meta.segment:
            return NOT_SHARED
        try:
            link = await self._link(self._way(ref.header.address), name)
        except UnavailableError as exc:
            return exc.reason
        except (PeerLostError, AuthenticationError) as exc:
            return str(exc)
        return link.obstacle or out_of_reach(link, ref)
