"""What both ends of a channel have in common: whose loop uses them, and how they wait.

Invariants:
    END-1  An end is used on one loop at a time; another one may follow.
    END-2  Who waits is woken by what arrives, by the loss of the other process and by closing.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from aiordt._errors import (
    AiordtError,
    ClosedError,
    OwnerDiedError,
    PeerLostError,
    UsageError,
)
from aiordt._progress import post

if TYPE_CHECKING:
    from aiordt._runtime import Runtime
    from aiordt.abc import Peer

#: An end that never has to wait lets others have the loop after so long.
_TURN_SECONDS: Final = 0.001


class End(ABC):
    """One end of a channel in this process.

    Attributes:
        name: Of the channel.
        over: Why it cannot be used any more.
    """

    def __init__(self, runtime: Runtime, name: str) -> None:
        self.name = name
        self.over: AiordtError | None = None
        self._runtime = runtime
        self._loop: asyncio.AbstractEventLoop | None = None
        self._users = 0
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False
        self._turn_began = 0.0

    @abstractmethod
    def _leave_loop(self) -> None:
        """Let go of the loop that used it so far."""

    @abstractmethod
    def peer_lost(self, peer_id: bytes) -> None:
        """A process is gone. On the io loop."""

    def enter(self) -> None:
        """The running loop uses it, until `leave`.

        Raises:
            UsageError: Another one does (END-1).
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._users and self._loop is not None and not self._loop.is_closed():
                raise UsageError(f"{self.name}: this end is in use on another event loop")
            self._leave_loop()
            self._loop = loop
            self._users = 0
        self._users += 1

    def leave(self) -> None:
        """End an `enter`."""
        self._users -= 1

    async def wait(self) -> None:
        """Wait for `wake`, unless it was called since the last time. One at a time."""
        if not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._woken = False

    def wake(self) -> None:
        """Something has changed (END-2). On the loop that uses it."""
        self._woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wake_from_afar(self) -> None:
        """As `wake`, on any other thread, after what has changed."""
        loop = self._loop
        if loop is not None:
            post(loop, self.wake)

    async def fair(self) -> None:
        """Let the loop do something else, if this end has kept it busy for long."""
        now = time.monotonic()
        if not self._turn_began:
            self._turn_began = now
            asyncio.get_running_loop().call_soon(self._turn_over)
        elif now - self._turn_began > _TURN_SECONDS:
            await asyncio.sleep(0)

    def _turn_over(self) -> None:
        self._turn_began = 0.0

    def check(self) -> None:
        """Refuse to go on after the end.

        Raises:
            AiordtError: What ended it.
        """
        if self.over is not None:
            raise self.over.with_traceback(None)

    async def verdict(self, peer: Peer | None, label: str, role: str, why: str) -> AiordtError:
        """What has become of the other process."""
        where = f"channel {self.name!r}: its {role}, {label},"
        if self._runtime.closed:
            return ClosedError(f"channel {self.name!r}: aiordt's runtime was closed")
        found: Exception | None = None
        if peer is not None:
            cause = ConnectionResetError(why)
            found = await self._runtime.io.run(peer.verdict(cause, transport="channel", nbytes=0))
        if isinstance(found, PeerLostError):
            return PeerLostError(f"{where} cannot be reached any more: {why}", peer=label)
        if found is not None and not isinstance(found, OwnerDiedError):
            return PeerLostError(f"{where} was lost: {why}", peer=label)
        if role == "sender":
            return OwnerDiedError(f"{where} died", owner=label)
        return PeerLostError(f"{where} died", peer=label)
