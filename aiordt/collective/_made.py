"""Groups that are made for calls on refs: of whoever owns them, kept for the next call.

Invariants:
    MADE-1  Such a group keeps no actor alive. It ends after a minute without use, with a member,
            and with the process that made it.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from aiordt import _runtime
from aiordt._errors import ProtocolViolationError
from aiordt._progress import finish, run_all
from aiordt._runtime import Service
from aiordt.collective._members import find, find_owner
from aiordt.collective.group import Group, form

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Sequence
    from typing import Any

    from aiordt._landing import Header
    from aiordt._runtime import Runtime
    from aiordt._wire import Message, TransportMessage
    from aiordt.collective._members import Member

_FORM_SECONDS: Final = 30.0
_IDLE_SECONDS: Final = 60.0


class _Made:
    """One group, or the making of it."""

    def __init__(self, forming: asyncio.Task[Group]) -> None:
        self.forming = forming
        self.uses = 0
        self.expiry: asyncio.TimerHandle | None = None


class MadeGroups(Service):
    """See above. Made with each runtime; its groups go by the runtimes of their members."""

    name = "made-groups"

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._groups: dict[tuple[bytes, ...], _Made] = {}

    @asynccontextmanager
    async def of_owners(self, headers: Sequence[Header]) -> AsyncGenerator[Group]:
        """The group of the actors that own some refs, in that order.

        Raises:
            UsageError: One of them cannot be found.
            OwnerDiedError: One of them is dead.
            GroupError: It could not form.
        """
        key = tuple(header.address.runtime_id for header in headers)

        async def members() -> list[Member]:
            finds = [find_owner(self._runtime, each.address, each.owner) for each in headers]
            return await run_all(finds)

        async with self._used(key, members) as group:
            yield group

    @asynccontextmanager
    async def with_owner(self, header: Header, actors: Sequence[Any]) -> AsyncGenerator[Group]:
        """The group of some actors, and of the owner of a ref, first, if it is not one of them.

        Raises:
            UsageError: As `of_owners`.
            OwnerDiedError: As `of_owners`.
            GroupError: As `of_owners`.
        """
        found = await run_all([find(self._runtime, actor) for actor in actors])
        owner_id = header.address.runtime_id
        if all(member.address.runtime_id != owner_id for member in found):
            found.insert(0, await find_owner(self._runtime, header.address, header.owner))

        async def members() -> list[Member]:
            return found

        key = tuple(member.address.runtime_id for member in found)
        async with self._used(key, members) as group:
            yield group

    @asynccontextmanager
    async def _used(self, key: tuple[bytes, ...], members: Any) -> AsyncGenerator[Group]:  # noqa: ANN401
        made = await self._runtime.io.run(self._begin(key, members))
        try:
            yield made.forming.result()
        finally:
            self._runtime.io.loop.call_soon_threadsafe(self._end_use, key, made)

    # --- on the io loop ----------------------------------------------------------------------

    async def _begin(self, key: tuple[bytes, ...], members: Any) -> _Made:  # noqa: ANN401
        made = self._groups.get(key)
        if made is None:
            made = self._groups[key] = _Made(asyncio.create_task(self._form(members)))
        made.uses += 1
        try:
            await finish(asyncio.shield(made.forming))
        except BaseException:
            self._end_use(key, made)
            raise
        if made.expiry is not None:
            made.expiry.cancel()
        return made

    @staticmethod
    async def _form(members: Any) -> Group:  # noqa: ANN401
        name = f"refs-{os.urandom(6).hex()}"
        return await form(await members(), (), "auto", name, _FORM_SECONDS, bound=True)

    def _end_use(self, key: tuple[bytes, ...], made: _Made) -> None:
        made.uses -= 1
        if made.uses or self._groups.get(key) is not made:
            return
        failed = made.forming.done() and (made.forming.cancelled() or made.forming.exception())
        if failed:
            del self._groups[key]
            return
        loop = self._runtime.io.loop
        made.expiry = loop.call_later(_IDLE_SECONDS, self._close, key, "nobody used it")

    def _close(self, key: tuple[bytes, ...], why: str) -> None:
        made = self._groups.pop(key, None)
        if made is None:
            return
        if made.expiry is not None:
            made.expiry.cancel()
        if made.forming.done() and not made.forming.cancelled() and not made.forming.exception():
            group = made.forming.result()
            self._runtime.io.spawn(group.end(self._runtime, f"{group!r}: {why}", closed=False))

    async def discard(self, group: Group) -> None:
        """A group has ended on a member: the next call makes another."""

        async def forget() -> None:
            for key, made in list(self._groups.items()):
                if made.forming.done() and made.forming.result() is group:
                    self._close(key, "it has ended on a member")

        await self._runtime.io.run(forget())

    @override
    def lost(self, peer_id: bytes) -> None:
        for key in [key for key in self._groups if peer_id in key]:
            self._close(key, "a member is gone")

    @override
    async def serve(self, request: TransportMessage, peer_id: bytes) -> Message:
        raise ProtocolViolationError("nothing is asked of it")

    @override
    def accept(self, stream: bytes, peer_id: bytes, sock: socket.socket) -> bool:
        return False

    @override
    async def aclose(self) -> None:
        for key in list(self._groups):
            self._close(key, "the process that made it has ended")


def made_by(runtime: Runtime) -> MadeGroups:
    """The groups that a process made for calls on refs."""
    return next(each for each in runtime.services if isinstance(each, MadeGroups))


_runtime.add_service(MadeGroups)
