"""Ways of moving bytes, one file each; and the table of them by name.

A package of others may add its own, under the entry point group ``aiordt.transports``: the
name of the entry is the transport's, its value a `aiordt.abc.Transport`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Final, NamedTuple

from aiordt._config import others
from aiordt._errors import InvalidTypeError, UnavailableError
from aiordt.abc import Availability, Transport, TransportMessage

if TYPE_CHECKING:
    import socket

    from aiordt._progress import Workers
    from aiordt._wire import Message
    from aiordt.abc import Context


class _Place(NamedTuple):
    """Where a transport of ours is, and what it needs.

    Attributes:
        module: Its module.
        cls: The class in it.
        vendors: The packages one of which must be there, as they are imported; empty: none.
        extra: What of aiordt's extras brings it.
        heavy: Whether importing its module takes long.
    """

    module: str
    cls: str
    vendors: tuple[str, ...] = ()
    extra: str = ""
    heavy: bool = False


_OURS: Final = {
    "shm": _Place("aiordt.transports.shm", "ShmTransport"),
    "cma": _Place("aiordt.transports.cma", "CmaTransport"),
    "nixl": _Place("aiordt.transports.nixl", "NixlTransport", ("nixl_cu13", "nixl_cu12"), "nixl"),
    "tcp": _Place("aiordt.transports.tcp", "TcpTransport"),
    "ucx": _Place("aiordt.transports.ucx", "UcxTransport", ("ucxx",), "ucx", heavy=True),
}
#: Those whose import costs nothing; the others are imported on a worker thread.
_LIGHT: Final = frozenset(name for name, place in _OURS.items() if not place.heavy)
_SERVING: Final = ("shm", "tcp")


def names() -> tuple[str, ...]:
    """All that there are."""
    return (*_OURS, *others())


@functools.cache
def load(name: str) -> type[Transport]:
    """The class of a transport; importing it may take a second.

    Raises:
        UnavailableError: Its module cannot be imported; says why.
    """
    try:
        place = _OURS.get(name)
        cls: object = (
            others()[name].load()
            if place is None
            else getattr(importlib.import_module(place.module), place.cls)
        )
    except Exception as exc:
        reason = f"importing it failed: {type(exc).__name__}: {exc}"
        raise UnavailableError(f"{name}: {reason}", reason=reason, transport=name) from exc
    if not isinstance(cls, type) or not issubclass(cls, Transport):
        raise InvalidTypeError(f"transport {name!r}: {cls!r} is no aiordt.abc.Transport")
    return cls


def probe(name: str) -> Availability:
    """Whether a transport can be used in this process. Imports no vendor's package."""
    place = _OURS.get(name)
    if place is not None and place.vendors:
        if not any(importlib.util.find_spec(vendor) for vendor in place.vendors):
            what = f"{' or '.join(place.vendors)} is not installed"
            what = f"{what}: pip install aiordt[{place.extra}]"
            return Availability(usable=False, reason=what)
        if place.heavy:
            return Availability(usable=True)
    try:
        return load(name).probe()
    except UnavailableError as exc:
        return Availability(usable=False, reason=exc.reason)


class Transports:
    """Those of one runtime, each made when first used. Lives on the io loop."""

    def __init__(self, context: Context, workers: Workers) -> None:
        self._context = context
        self._workers = workers
        self._making: dict[str, asyncio.Future[Transport]] = {}
        # What serves peers that need not ask for it by name is there from the start.
        self.made: dict[str, Transport] = {
            name: load(name)(context) for name in _SERVING if name in context.config.transports
        }

    async def get(self, name: str) -> Transport:
        """The transport of that name; callable from any loop.

        Raises:
            UnavailableError: It cannot be used in this process.
        """
        made = self.made.get(name)
        return made if made is not None else await self._context.io.run(self._get(name))

    async def _get(self, name: str) -> Transport:
        making = self._making.get(name)
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = self._making[name] = asyncio.ensure_future(self._make(name))
        # Shared by all callers: one that is cancelled must not cancel it for the others.
        return await asyncio.shield(making)

    async def _make(self, name: str) -> Transport:
        available = probe(name)
        cls = None
        if available.usable:
            cls = load(name) if name in _LIGHT else await self._workers.run(lambda: load(name))
            available = cls.probe()
        if cls is None or not available.usable:
            raise UnavailableError(
                f"{name}: {available.reason}", reason=available.reason, transport=name
            )
        made = self.made[name] = cls(self._context)
        return made

    async def serve(self, message: Message, peer_id: bytes) -> Message | None:
        """Let the transport that a request is for answer it."""
        if isinstance(message, TransportMessage):
            if message.transport not in self._context.config.transports:
                reason = "its owner's process may not use it (see its `transports` setting)"
                raise UnavailableError(
                    f"{message.transport}: {reason}", reason=reason, transport=message.transport
                )
            return await (await self.get(message.transport)).serve(message, peer_id)
        for transport in self.made.values():
            reply = await transport.serve(message, peer_id)
            if reply is not None:
                return reply
        return None

    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        """Hand a payload stream that a peer opened to the transport it is for."""
        return any(made.accept(stream, peer_id, sock) for made in self.made.values())

    def forget(self, peer_id: bytes) -> None:
        """A peer is gone."""
        for transport in self.made.values():
            transport.forget(peer_id)

    async def aclose(self) -> None:
        """Close all that were made."""
        for making in self._making.values():
            making.cancel()
        for transport in self.made.values():
            await transport.aclose()
