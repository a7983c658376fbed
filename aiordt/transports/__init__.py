"""Ways of moving bytes, one file each; and the table of them by name.

A package of others may add its own, under the entry point group ``aiordt.transports``: the
name of the entry is the transport's, its value a `aiordt.abc.Transport`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Final, NamedTuple

from aiordt._config import GROUP, others
from aiordt._errors import UnavailableError
from aiordt.abc import Availability, Transport, TransportMessage
from aiordt.transports._ucx_devices import missing_rdma

if TYPE_CHECKING:
    import socket
    from collections.abc import Generator

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
    "mpi": _Place("aiordt.transports.mpi", "MpiTransport", ("mpi4py",), "mpi"),
}
_SERVING: Final = ("shm", "tcp")


def names() -> tuple[str, ...]:
    """All that there are."""
    return (*_OURS, *others())


def load(name: str) -> type[Transport]:
    """The class of a transport; importing it may take a second, the first time.

    Raises:
        UnavailableError: It cannot be had; says why.
    """
    cls = _loaded(name)
    if isinstance(cls, str):
        raise UnavailableError(f"{name}: {cls}", reason=cls, transport=name)
    return cls


@functools.cache
def _loaded(name: str) -> type[Transport] | str:
    """The class of a transport, or why it cannot be had."""
    place = _OURS.get(name)
    try:
        cls: object = (
            others()[name].load()
            if place is None
            else getattr(importlib.import_module(place.module), place.cls)
        )
    except Exception as exc:  # noqa: BLE001  (others' code may fail as it likes)
        return f"importing it failed: {type(exc).__name__}: {exc}"
    if not isinstance(cls, type) or not issubclass(cls, Transport):
        return f"{cls!r} is no aiordt.abc.Transport"
    if getattr(cls, "name", None) != name:
        return f"{cls.__qualname__}.name is not {name!r}, as its entry point is called"
    return cls


def _load_ahead(name: str) -> None:
    _loaded(name)


def probe(name: str) -> Availability:
    """Whether a transport can be used in this process. Imports no vendor's package."""
    place = _OURS.get(name)
    if place is not None and place.vendors:
        if not any(importlib.util.find_spec(vendor) for vendor in place.vendors):
            what = f"{' or '.join(place.vendors)} is not installed"
            what = f"{what}: pip install aiordt[{place.extra}]"
            return Availability(usable=False, reason=what)
        if place.heavy:
            return Availability(usable=True, reason=missing_rdma())
    try:
        available: object = load(name).probe()
    except UnavailableError as exc:
        return Availability(usable=False, reason=exc.reason)
    except Exception as exc:  # noqa: BLE001  (others' code may fail as it likes)
        reason = f"its probe() failed: {type(exc).__name__}: {exc}"
        return Availability(usable=False, reason=reason)
    if not isinstance(available, Availability):
        reason = f"its probe() gave {available!r}, no aiordt.abc.Availability"
        return Availability(usable=False, reason=reason)
    return available


@contextmanager
def added(name: str, value: str) -> Generator[None]:
    """Use a transport as if a package had brought it.

    Args:
        name: Its name.
        value: ``module:class``, as in an entry point.
    """
    before = dict(others())
    others()[name] = EntryPoint(name, value, GROUP)
    _loaded.cache_clear()
    try:
        yield
    finally:
        others().clear()
        others().update(before)
        _loaded.cache_clear()


def _is_heavy(name: str) -> bool:
    place = _OURS.get(name)
    return place is not None and place.heavy


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
        for name in context.config.transports:
            if name not in _OURS:  # so that nobody's loop waits for the import
                workers.submit(functools.partial(_load_ahead, name))

    async def get(self, name: str) -> Transport:
        """The transport of that name; callable from any loop.

        Raises:
            UnavailableError: It cannot be used in this process.
        """
        made = self.made.get(name)
        return made if made is not None else await self._context.io.run(self._get(name))

    async def probe(self, name: str) -> Availability:
        """As the function; what others bring is imported on a worker thread first (BLK-1)."""
        if name not in _OURS:
            await self._workers.run(lambda: _loaded(name))
        return probe(name)

    async def _get(self, name: str) -> Transport:
        making = self._making.get(name)
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = self._making[name] = asyncio.ensure_future(self._make(name))
        # Shared by all callers: one that is cancelled must not cancel it for the others.
        return await asyncio.shield(making)

    async def _make(self, name: str) -> Transport:
        available = await self.probe(name)
        cls = None
        if available.usable:
            cls = await self._workers.run(lambda: load(name)) if _is_heavy(name) else load(name)
            available = cls.probe()
        if cls is None or not available.usable:
            raise UnavailableError(
                f"{name}: {available.reason}", reason=available.reason, transport=name
            )
        try:
            made = self.made[name] = cls(self._context)
        except UnavailableError:
            raise
        except Exception as exc:
            reason = f"making it failed: {type(exc).__name__}: {exc}"
            raise UnavailableError(f"{name}: {reason}", reason=reason, transport=name) from exc
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
        # Those in _SERVING take any stream, so they are asked last.
        others_first = sorted(self.made.items(), key=lambda item: item[0] in _SERVING)
        return any(made.accept(stream, peer_id, sock) for _, made in others_first)

    def forget(self, peer_id: bytes) -> None:
        """A peer is gone."""
        for transport in self.made.values():
            transport.forget(peer_id)

    @property
    def registered(self) -> tuple[int, int]:
        """Ranges of memory that are registered with devices, and their bytes."""
        pairs = [transport.registered for transport in list(self.made.values())]
        return sum(count for count, _ in pairs), sum(nbytes for _, nbytes in pairs)

    async def aclose(self) -> None:
        """Close all that were made."""
        for making in self._making.values():
            making.cancel()
        for transport in self.made.values():
            await transport.aclose()
