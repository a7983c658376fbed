"""How the ends of a channel find each other.

The process that makes a channel brings its ends together: it tells the sender to open, and
then each receiver to join, as soon as both are known; an actor is known by its handle, any
other process once it uses its end. After that the maker has no part in it.

Invariants:
    CHN-1  Whoever waits for the other ends hears of it when one of them, or the maker, is gone.
    CHN-2  An end is used by one process.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiordt._errors import (
    AiordtError,
    ClosedError,
    OwnerDiedError,
    ProtocolViolationError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiordt.channels._service import Channels
    from aiordt.collective._members import Member

#: The number of the sending end; receivers come after it.
SENDER: Final = 0


class _Claim:
    """An end, as the maker knows it."""

    def __init__(self) -> None:
        self.member: Member | None = None
        self.joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.joined.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.task: asyncio.Task[None] | None = None


class Meeting:
    """A channel whose ends are being brought together. On the io loop of its maker."""

    def __init__(
        self, channels: Channels, channel: bytes, name: str, count: int, options: Sequence[object]
    ) -> None:
        self._channels = channels
        self._channel = channel
        self._name = name
        self._options = list(options)
        self._places = [_Claim() for _ in range(1 + count)]
        self._open = False

    async def claim(self, index: int, member: Member) -> None:
        """A process is to have an end; returns when it has.

        Raises:
            UsageError: Another one has it (CHN-2).
            AiordtError: It cannot.
        """
        if not 0 <= index < len(self._places):
            raise ProtocolViolationError("a channel has no such end")
        place = self._places[index]
        if place.member is None:
            place.member = member
            self._go_on()
        elif place.member.address.runtime_id != member.address.runtime_id:
            raise UsageError(
                f"channel {self._name!r}: this end is used by {place.member.owner} already"
            )
        await asyncio.shield(place.joined)

    def reserve(self, members: Mapping[int, Member]) -> None:
        """These processes are to have ends, once the sender is known."""
        for index, member in members.items():
            self._places[index].member = member

    def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        sender, *receivers = self._places
        if sender.member is not None and sender.task is None:
            sender.task = loop.create_task(self._opened(sender.member))
        if not self._open:
            return
        for index, place in enumerate(receivers, start=1):
            if place.member is not None and place.task is None:
                place.task = loop.create_task(self._joined(index, place))
        if all(place.joined.done() for place in self._places):
            self._channels.meetings.pop(self._channel, None)

    async def _opened(self, sender: Member) -> None:
        body = [self._channel, self._name, len(self._places) - 1, *self._options]
        try:
            await self._channels.ask(sender, "open", body)
        except AiordtError as exc:
            self.fail(exc)
            return
        self._open = True
        self._places[SENDER].joined.set_result(None)
        self._go_on()

    async def _joined(self, index: int, place: _Claim) -> None:
        sender = self._places[SENDER].member
        assert sender is not None and place.member is not None  # noqa: S101, PT018  (see _go_on)
        body = [self._channel, self._name, index, sender.pack(), *self._options]
        try:
            await self._channels.ask(place.member, "join", body)
        except AiordtError as exc:
            place.joined.set_exception(exc)
            await self._tell(sender, "miss", [self._channel, index, str(exc)])
        else:
            place.joined.set_result(None)
        self._go_on()

    async def _tell(self, member: Member, verb: str, body: object) -> None:
        with suppress(AiordtError):  # it is gone: nobody is there to be told
            await self._channels.ask(member, verb, body)

    def fail(self, error: AiordtError) -> None:
        """It does not come about."""
        self._channels.meetings.pop(self._channel, None)
        for place in self._places:
            if not place.joined.done():
                place.joined.set_exception(error)

    async def drop(self, why: str) -> None:
        """End it on whoever has an end."""
        self.fail(ClosedError(why))
        members = [place.member for place in self._places if place.member is not None]
        tells = [self._tell(member, "drop", [self._channel, why]) for member in members]
        await asyncio.gather(*tells)

    def lost(self, peer_id: bytes) -> None:
        """A process is gone (CHN-1)."""
        sender, *receivers = self._places
        if sender.member is not None and sender.member.address.runtime_id == peer_id:
            label = str(sender.member.owner)
            text = f"channel {self._name!r}: its sender, {label}, died"
            self.fail(OwnerDiedError(text, owner=label))
            return
        for index, place in enumerate(receivers, start=1):
            member = place.member
            if member is None or member.address.runtime_id != peer_id or place.joined.done():
                continue
            label = str(member.owner)
            text = f"channel {self._name!r}: its receiver, {label}, died"
            if place.task is None:
                place.joined.set_exception(OwnerDiedError(text, owner=label))
            if sender.member is not None:
                tell = self._tell(sender.member, "miss", [self._channel, index, text])
                self._channels.runtime.io.spawn(tell)
