"""The transport ``mpi`` between two processes that no Ray knows: they form a group by themselves.

It is run as a program, in a process of its own: there is MPI in it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, ClassVar, Final

from typing_extensions import override

from aiordt._progress import Workers
from aiordt.abc import TransportMessage
from aiordt.collective._engine import Engine
from aiordt.collective._mesh import Mesh
from aiordt.collective._steps import Ended
from aiordt.collective.mpi import MpiMover
from aiordt.testing import Leaks, check_huge_part, check_transport, process_pairs
from aiordt.transports.mpi import MpiLink, MpiTransport, Way, ways

if TYPE_CHECKING:
    import socket

    from aiordt._wire import Message
    from aiordt.abc import Context, Peer

STREAM: Final = b"mpi_joined"


class JoinedTransport(MpiTransport):
    """Both ends; each link has a group of its own."""

    name: ClassVar[str] = "mpi_joined"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._workers = Workers("joining", 8)
        self._engines: list[Engine] = []
        self._joined: dict[bytes, asyncio.Future[None]] = {}

    @override
    async def connect(self, peer: Peer) -> MpiLink:
        await self.io.run(self._connect(peer))
        return await super().connect(peer)

    async def _connect(self, peer: Peer) -> None:
        stream = STREAM + os.urandom(16 - len(STREAM))
        await peer.call(TransportMessage(self.name, b""))  # so that it is made
        sock = await peer.open_local(stream)
        joining = self._workers.run(lambda: self._join(stream, peer.address.runtime_id, 0, sock))
        await peer.call(TransportMessage(self.name, stream))
        await joining

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        if not stream.startswith(STREAM):
            return False
        joining = self._workers.run(lambda: self._join(stream, peer_id, 1, sock))
        joining.add_done_callback(lambda _: self._has_joined(stream).set_result(None))
        return True

    def _has_joined(self, stream: bytes) -> asyncio.Future[None]:
        return self._joined.setdefault(stream, self.io.loop.create_future())

    @override
    async def serve(self, request: Message, peer_id: bytes) -> Message | None:
        if isinstance(request, TransportMessage) and not request.body:
            return TransportMessage(self.name, b"")
        if isinstance(request, TransportMessage) and request.body.startswith(STREAM):
            await self._has_joined(request.body)
            return TransportMessage(self.name, b"")
        return await super().serve(request, peer_id)

    def _join(self, stream: bytes, other: bytes, rank: int, sock: socket.socket) -> None:
        mesh = Mesh({1 - rank: sock}, "aiordt-group-joined")
        engine = Engine("joined", ["first", "second"], rank, mesh, lambda: None)
        ways.add(Way(stream, {other: 1 - rank}, MpiMover(engine, 30)))
        engine.on_end(lambda: ways.remove(stream))
        self._engines.append(engine)

    @override
    async def aclose(self) -> None:
        await super().aclose()
        for engine in self._engines:
            engine.end(Ended(True, "closed"))  # noqa: FBT003
        self._workers.close()


async def main(suite: str) -> None:
    from tests.conformance.mpi_joined import JoinedTransport as Importable  # noqa: PLC0415

    with process_pairs(Importable) as make_pair:
        await (await make_pair()).aclose()  # MPI has threads and descriptors that stay
        leaks = Leaks(ignore=lambda name: "-> socket:" in name)  # see docs/how-to/mpi.md
        if suite == "huge":
            await check_huge_part(make_pair)
        else:
            await check_transport(make_pair)
            await leaks.wait_none()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    print("done", flush=True)  # noqa: T201
    os._exit(0)
