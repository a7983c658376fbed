"""Actors by their addresses: what each one tells the others of itself, and how it is found.

Invariants:
    ADR-1  An `AsyncActor` is found while it is busy; what it published is believed only after
           the process that it names has answered, since it may have died or been restarted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aiordt import _ray, _runtime
from aiordt._errors import AiordtError, OwnerDiedError, PeerLostError, UsageError
from aiordt._types import Owner
from aiordt.abc import PeerAddress, TransportMessage

if TYPE_CHECKING:
    from aiordt._runtime import Runtime

_log = logging.getLogger(__name__)

#: Of the service that all groups are formed by, in requests.
NAME: Final = "groups"
#: Asks only for an answer.
HELLO: Final = TransportMessage(NAME, msgpack.packb((b"", "hello", None)))
#: An actor that has not started yet is looked for so often.
_LOOK_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Member:
    """An actor, as its group knows it.

    Attributes:
        address: Where its runtime is.
        owner: Who it is.
        state: A handle of it, for `_ray.weak_handle`.
    """

    address: PeerAddress
    owner: Owner
    state: bytes

    def pack(self) -> list[object]:
        """As what msgpack takes."""
        return [
            list(dataclasses.astuple(self.address)),
            list(dataclasses.astuple(self.owner)),
            self.state,
        ]

    @classmethod
    def unpack(cls, packed: Any) -> Member:  # noqa: ANN401
        """What `pack` made."""
        address, owner, state = packed
        return cls(PeerAddress(*address), Owner(*owner), state)

    @property
    def label(self) -> str:
        """Its name in messages."""
        name = self.owner.actor_name or "actor"
        return f"{name} {(self.owner.actor_id or '')[:12]}, pid {self.owner.pid}"


def _own_record(runtime: Runtime) -> bytes:
    packed: bytes = msgpack.packb(Member(runtime.address, runtime.owner, _ray.own_handle()).pack())
    return packed


def _asked(_actor: object) -> bytes:
    """What an actor answers when it is asked who it is."""
    return _own_record(_runtime.current())


def announce() -> None:
    """Let others find this actor, whose construction has just ended. Never waits, never raises."""
    if not _ray.is_actor():
        return
    try:
        runtime = _runtime.current()
        record = _own_record(runtime)
        actor_id = runtime.owner.actor_id or ""
    except AiordtError as exc:
        _log.debug("this actor is not announced: %s", exc)  # told by its first use of aiordt
        return

    def publish() -> None:
        try:
            _ray.publish_actor(runtime.session, actor_id, record)
        except Exception:  # noqa: BLE001  (it can still be asked)
            _log.debug("announcing this actor failed", exc_info=True)

    with suppress(AiordtError):  # closed at once
        runtime.workers.submit(publish)


async def find(runtime: Runtime, handle: Any) -> Member:  # noqa: ANN401
    """Where an actor is; waits until it has been made (ADR-1).

    Raises:
        OwnerDiedError: It is dead.
        PeerLostError: It cannot be reached.
    """
    actor_id = _ray.actor_id_of(handle) or ""
    member = await _published(runtime, actor_id)
    if member is not None:
        return member
    asking: asyncio.Future[Any] | None = None
    try:
        while True:
            if asking is None:
                asking = asyncio.ensure_future(_ray.ask_actor(handle, _asked))
            await asyncio.wait({asking}, timeout=_LOOK_SECONDS)
            if asking.done():
                error = asking.exception()
                if error is None:
                    return Member.unpack(msgpack.unpackb(asking.result()))
                if await runtime.workers.run(lambda: _ray.is_dead(actor_id)):
                    raise error
                asking = None  # it is being restarted
                await asyncio.sleep(_LOOK_SECONDS)
            member = await _published(runtime, actor_id)
            if member is not None:
                return member
    finally:
        if asking is not None:
            asking.cancel()


async def find_owner(runtime: Runtime, address: PeerAddress, owner: Owner) -> Member:
    """The actor that owns a tensor.

    Raises:
        UsageError: It has not published a handle of itself.
        OwnerDiedError: It has been restarted since.
    """
    member = await _recorded(runtime, owner.actor_id or "")
    if member is None:
        raise UsageError(
            f"{owner} is no aiordt.AsyncActor, so nobody finds it: make a group by create_group, "
            "and pass it as group="
        )
    if member.address.runtime_id != address.runtime_id:
        raise OwnerDiedError(f"{owner} died, and its tensors with it", owner=str(owner))
    return member


async def _recorded(runtime: Runtime, actor_id: str) -> Member | None:
    """What an actor has published, perhaps before it died."""
    record = await runtime.workers.run(lambda: _ray.find_actor(runtime.session, actor_id))
    return None if record is None else Member.unpack(msgpack.unpackb(record))


async def _published(runtime: Runtime, actor_id: str) -> Member | None:
    """What an actor has published, if its process answers."""
    member = await _recorded(runtime, actor_id)
    if member is not None and member.address.runtime_id != runtime.address.runtime_id:
        try:
            # A round trip: a connection that is still there proves nothing.
            await runtime.io.run(runtime.routes.peer(member.address).call(HELLO))
        except (OwnerDiedError, PeerLostError):
            return None
    return member
