"""The ends of channels in this process."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgpack
from typing_extensions import override

from aiordt import _runtime
from aiordt._errors import (
    AiordtError,
    ClosedError,
    ProtocolViolationError,
    UnavailableError,
)
from aiordt._runtime import Runtime, Service
from aiordt._wire import TransportMessage
from aiordt.abc import SharedLink
from aiordt.channels import _frames
from aiordt.channels._line import Line
from aiordt.channels._meeting import SENDER, Meeting
from aiordt.channels._receiving import Receiving
from aiordt.channels._sending import Sending
from aiordt.collective._members import Member

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from aiordt._wire import Message
    from aiordt.abc import Link
    from aiordt.channels._frames import Place

NAME: Final = "channels"
#: Channels that are remembered after they have ended here.
_MAX_REMEMBERED: Final = 256


class Channels(Service):
    """The ends of channels that this process has, and the meetings that it calls.

    Attributes:
        runtime: Whose.
        meetings: Of the channels that this process makes.
    """

    name = NAME

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.meetings: dict[bytes, Meeting] = {}
        self._ends: dict[tuple[bytes, int], Sending | Receiving] = {}
        self._streams: dict[bytes, tuple[Sending, int, bytes]] = {}

    def own(self) -> Member:
        """This process."""
        return Member(self.runtime.address, self.runtime.owner, b"")

    def end(self, channel: bytes, index: int) -> Sending | Receiving | None:
        """An end in this process, if it is here. Any thread."""
        return self._ends.get((channel, index))

    # --- on the io loop --------------------------------------------------------------------

    async def make(
        self,
        channel: bytes,
        name: str,
        members: Sequence[Member | None],
        options: Sequence[object],
    ) -> None:
        """Bring the ends of a new channel together, as far as they are known.

        Args:
            channel: Its id.
            name: Its name.
            members: Sender and receivers; ``None``: whoever uses that end first.
            options: Credit in bytes, and whether receivers get copies.
        """
        meeting = Meeting(self, channel, name, len(members) - 1, options)
        self.meetings[channel] = meeting
        known = {index: member for index, member in enumerate(members) if member is not None}
        claims = []
        if SENDER in known:
            claims = [
                asyncio.ensure_future(meeting.claim(index, member))
                for index, member in known.items()
            ]
        else:
            meeting.reserve(known)
        try:
            if claims:
                await asyncio.gather(*claims)
        except BaseException:
            for claim in claims:
                claim.cancel()
            self.runtime.io.spawn(meeting.drop(f"channel {name!r}: it did not come about"))
            raise

    async def claim(self, channel: bytes, index: int, maker: Any) -> None:  # noqa: ANN401
        """Have an end here, that somebody else's process may have to be asked for."""
        if (channel, index) not in self._ends:
            await self.ask(maker, "claim", [channel, index, self.own().pack()])

    async def ask(self, member: Member, verb: str, body: object) -> None:
        """Ask a process, perhaps this one."""
        address = member.address
        if address.runtime_id == self.runtime.address.runtime_id:
            await self._handle(verb, body, address.runtime_id)
            return
        request = TransportMessage(NAME, msgpack.packb((verb, body)))
        await self.runtime.routes.peer(address).call(request)

    @override
    async def serve(self, request: TransportMessage, peer_id: bytes) -> Message:
        try:
            verb, body = msgpack.unpackb(request.body)
        except (ValueError, TypeError) as exc:
            raise ProtocolViolationError("not a request about a channel") from exc
        await self._handle(verb, body, peer_id)
        return TransportMessage(NAME, b"")

    async def _handle(self, verb: str, body: Any, peer_id: bytes) -> None:  # noqa: ANN401
        channel, *rest = body
        if verb == "claim":
            meeting = self.meetings.get(channel)
            if meeting is None:
                raise ClosedError("the channel has ended, or this end of it was another process's")
            await meeting.claim(rest[0], Member.unpack(rest[1]))
        elif verb == "open":
            self._open(channel, rest, peer_id)
        elif verb == "expect":
            await self._expect(channel, rest)
        elif verb == "join":
            await self._join(channel, rest)
        elif verb in {"miss", "drop"}:
            self._give_up(channel, verb, rest)
        else:
            raise ProtocolViolationError(f"unknown request {verb!r} about a channel")

    def _open(self, channel: bytes, body: Any, peer_id: bytes) -> None:  # noqa: ANN401
        name, count, capacity, _ = body
        self._add(
            (channel, SENDER),
            Sending(self.runtime, channel, name, capacity=capacity, count=count, maker=peer_id),
        )

    def _add(self, key: tuple[bytes, int], end: Sending | Receiving) -> None:
        self._ends[key] = end
        over = [key for key, end in self._ends.items() if end.over is not None]
        for each in over[: max(0, len(over) - _MAX_REMEMBERED)]:
            del self._ends[each]

    def _sending(self, channel: bytes) -> Sending:
        end = self._ends.get((channel, SENDER))
        if not isinstance(end, Sending) or end.over is not None:
            raise ClosedError("the channel has ended at its sender")
        return end

    async def _expect(self, channel: bytes, body: Any) -> None:  # noqa: ANN401
        index, way, packed = body
        sending = self._sending(channel)
        member = Member.unpack(packed)
        peer = self.runtime.routes.peer(member.address)
        await peer.reach()  # its end is how this process learns what became of the other one
        sending.expect(index - 1, str(member.owner), peer, way)
        secret = await self.runtime.secret()
        self._streams[_frames.stream_id(channel, index)] = (sending, index, secret)

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        sending, index, secret = self._streams.pop(stream, (None, 0, b""))
        return sending is not None and sending.attach(index - 1, peer_id, sock, secret)

    async def _join(self, channel: bytes, body: Any) -> None:  # noqa: ANN401
        name, index, packed, _, copies = body
        sender = Member.unpack(packed)
        secret = await self.runtime.secret()
        items, credits_ = _frames.keys(secret, channel, index)
        label = str(sender.owner)
        if sender.address.runtime_id == self.runtime.address.runtime_id:
            self._join_here(channel, name, index, (items, credits_), secret)
            return
        way, link = await self._way(sender, copies=copies)
        await self.ask(sender, "expect", [channel, index, way, self.own().pack()])
        peer = self.runtime.routes.peer(sender.address)
        stream = _frames.stream_id(channel, index)
        sock = None
        if sender.address.host_id == self.runtime.address.host_id:
            with suppress(AiordtError, OSError):  # another network namespace
                sock = await peer.open_local(stream)
        if sock is None:
            sock = await peer.open_stream(stream)

        async def opened(place: Place) -> torch.Tensor:
            assert isinstance(link, SharedLink)  # noqa: S101  (what `shm` is)
            return await link.view(place.segment, place.address, place.nbytes)

        self._add(
            (channel, index),
            Receiving(
                self.runtime,
                name,
                Line(sock, credits_, items),
                label=label,
                peer=peer,
                way=way,
                link=link,
                opened=opened if way == "shm" and not copies else None,
            ),
        )

    async def _way(self, sender: Member, *, copies: bool) -> tuple[str, Link]:
        """How the sender's memory is seen or read here."""
        if not copies or "shm" in self.runtime.config.transports:
            with suppress(UnavailableError):
                return await self.runtime.routes.find(sender.address, sender.owner, "shm")
        return await self.runtime.routes.find(sender.address, sender.owner, None)

    def _join_here(
        self, channel: bytes, name: str, index: int, keys: tuple[bytes, bytes], secret: bytes
    ) -> None:
        """Sender and receiver are both in this process."""
        sending = self._sending(channel)
        peer = self.runtime.routes.peer(self.runtime.address)
        ours, theirs = socket.socketpair()
        sending.expect(index - 1, str(self.runtime.owner), peer, "shm")
        sending.attach(index - 1, self.runtime.address.runtime_id, theirs, secret)

        async def opened(place: Place) -> torch.Tensor:
            return sending.buffer(place.number)

        items, credits_ = keys
        line = Line(ours, credits_, items)
        self._add(
            (channel, index),
            Receiving(
                self.runtime,
                name,
                line,
                label=str(self.runtime.owner),
                peer=None,
                way="local",
                link=None,
                opened=opened,
            ),
        )

    def _give_up(self, channel: bytes, verb: str, body: Any) -> None:  # noqa: ANN401
        if verb == "miss":
            index, why = body
            end = self._ends.get((channel, SENDER))
            if isinstance(end, Sending):
                end.miss(index - 1, ClosedError(why))
            return
        for (each, _), end in list(self._ends.items()):
            if each == channel:
                end.give_up(ClosedError(body[0]))

    @override
    def lost(self, peer_id: bytes) -> None:
        for meeting in list(self.meetings.values()):
            meeting.lost(peer_id)
        for end in list(self._ends.values()):
            end.peer_lost(peer_id)

    @override
    async def aclose(self) -> None:
        for meeting in list(self.meetings.values()):
            meeting.fail(ClosedError("aiordt's runtime was closed"))
        for end in self._ends.values():
            end.close()


def channels_of(runtime: Runtime) -> Channels:
    """The channels of a runtime."""
    return next(each for each in runtime.services if isinstance(each, Channels))


_runtime.add_service(Channels)
