"""A TCP connection that does what networks do: it stands still, ends, breaks, garbles."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from typing_extensions import override

from aiordt.abc import AsyncResource

if TYPE_CHECKING:
    from typing import Self

_RECEIVE_NBYTES: Final = 64 << 10
#: Closes with a reset: linger on, for no time.
_RESETTING: Final = struct.pack("ii", 1, 0)

#: Which direction a fault is in: what the client says, what the server says, or both.
Towards: TypeAlias = Literal["server", "client", "both"]


@dataclass(slots=True, eq=False)
class _Fault:
    kind: Literal["stall", "truncate", "reset", "corrupt", "cut"]
    after: int
    towards: Towards


@dataclass(slots=True, eq=False)
class _Way:
    """One direction of a connection.

    Attributes:
        source: Where bytes come from.
        target: Where they go.
        towards: The end that gets them.
        passed: How many have gone there since the fault was set.
        held: Whether a stall keeps what has come.
    """

    source: socket.socket
    target: socket.socket
    towards: Towards
    passed: int = 0
    held: bool = False


class TcpProxy(AsyncResource):
    """Stands between two processes, and does to their connections what it is told to.

    Clients connect to ``proxy.host`` and ``proxy.port`` in place of the server's::

        async with TcpProxy(host, port) as proxy:
            ...
            proxy.stall(after=1000)

    One fault is set at a time. It is in each direction of each connection, those that are open
    and those to come, ``after`` so many bytes from now on, and remains until `heal` or another
    one. Everything runs on the loop that entered it.

    Args:
        host: Of the server.
        port: Of the server.

    Attributes:
        host: Where it listens: the loopback's address.
        port: ... and on which port.
        num_connections: How many it has accepted.
        num_passed: Bytes that it has passed on.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.settimeout(0)
        self.host, self.port = self._listener.getsockname()
        self.num_connections = 0
        self.num_passed = 0
        self._fault: _Fault | None = None
        self._changed = asyncio.Event()
        self._ways: set[_Way] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @override
    async def __aenter__(self) -> Self:
        self._accepting = asyncio.create_task(self._accept())
        return self

    @override
    async def aclose(self) -> None:
        """End all connections, and listen no more. Idempotent."""
        tasks = {*self._connections, *filter(None, [self._accepting])}
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            self._listener.close()

    # --- faults --------------------------------------------------------------------------------

    def stall(self, *, after: int = 0, towards: Towards = "both") -> None:
        """Pass nothing on after so many bytes, until `heal`; connections stay open."""
        self._set(_Fault("stall", after, towards))

    def truncate(self, *, after: int = 0, towards: Towards = "both") -> None:
        """After so many bytes end the connection; who was still talking may find it broken."""
        self._set(_Fault("truncate", after, towards))

    def reset(self, *, after: int = 0, towards: Towards = "both") -> None:
        """After so many bytes break the connection, at both ends; what was on its way is lost."""
        self._set(_Fault("reset", after, towards))

    def corrupt(self, *, after: int = 0, towards: Towards = "both") -> None:
        """Turn one bit of the byte after so many, once in each direction of a connection."""
        self._set(_Fault("corrupt", after, towards))

    def cut(self) -> None:
        """Break all connections, and each new one at once, until `heal`."""
        self._set(_Fault("cut", 0, "both"))
        for task in self._connections:
            task.cancel()

    def heal(self) -> None:
        """Pass on everything from now on, and what was held."""
        self._set(None)

    @property
    def holding(self) -> bool:
        """Whether something has come that a stall keeps."""
        return any(way.held for way in self._ways)

    def _set(self, fault: _Fault | None) -> None:
        self._fault = fault
        for way in self._ways:
            way.passed = 0
        self._changed.set()
        self._changed = asyncio.Event()

    # --- connections ---------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            self.num_connections += 1
            task = asyncio.create_task(self._serve(client))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, client: socket.socket) -> None:
        """One connection, to its end."""
        server = socket.socket()
        broken = True
        try:
            server.settimeout(0)
            if self._fault is not None and self._fault.kind == "cut":
                return
            await asyncio.get_running_loop().sock_connect(server, self._server)
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._carry_both(client, server)
            broken = False
        except EOFError:
            broken = False
        except OSError:
            pass  # one end has broken it, or a fault: so it is for the other
        finally:
            for sock in (client, server):
                if broken:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETTING)
                sock.close()

    async def _carry_both(self, client: socket.socket, server: socket.socket) -> None:
        ways = {_Way(client, server, "server"), _Way(server, client, "client")}
        self._ways |= ways
        tasks = {asyncio.create_task(self._carry(way)) for way in ways}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            self._ways -= ways
            for task in tasks:  # before their sockets are closed
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, way: _Way) -> None:
        """Pass on what one end says, until it has said all."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(way.source, _RECEIVE_NBYTES):
            await self._pass_on(way, data)
        with suppress(OSError):
            way.target.shutdown(socket.SHUT_WR)

    async def _pass_on(self, way: _Way, data: bytes) -> None:
        """Do to some bytes what is to be done."""
        while data:
            fault = self._fault
            if fault is None or fault.towards not in {"both", way.towards}:
                await self._send(way, data)
                return
            room = fault.after - way.passed
            if fault.kind == "corrupt":
                if 0 <= room < len(data):
                    data = data[:room] + bytes([data[room] ^ 1]) + data[room + 1 :]
                await self._send(way, data)
                return
            if room > 0:
                some, data = data[:room], data[room:]
                await self._send(way, some)
                continue
            if fault.kind == "truncate":
                raise EOFError
            if fault.kind != "stall":
                raise ConnectionResetError
            way.held = True
            await self._changed.wait()
            way.held = False

    async def _send(self, way: _Way, data: bytes) -> None:
        way.passed += len(data)
        self.num_passed += len(data)
        await asyncio.get_running_loop().sock_sendall(way.target, data)
