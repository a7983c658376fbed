"""Where the ranks of a world meet: in the launcher, which tells them when MPI begins and ends.

Invariants:
    MPI-5  MPI is initialised only when every rank has said that it can do so at once, with the
           same library, and refused as soon as one cannot: none is waited for that has ended.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, cast

from typing_extensions import override

from aiordt.mpi._rank import proof

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

#: Within which whoever connects must have shown that it is a rank.
MEETING_SECONDS: Final = 10.0


class State(Enum):
    """What a rank is at present."""

    STARTING = auto()  # the script, which has not asked for its world; a worker that starts
    WAITING = auto()
    READY = auto()  # the script or a worker, which listens
    PREPARED = auto()  # the MPI library is loaded
    INITIALISED = auto()
    ENDED = auto()


@dataclass
class Member:
    """A rank, as the launcher knows it."""

    rank: int
    host: str
    pid: int
    addresses: list[str]
    shim: list[str]
    local: bool
    writer: asyncio.StreamWriter
    state: State = State.STARTING
    adopted: bool = False
    asked: bool = False
    library: str = ""

    @override
    def __str__(self) -> str:
        kind = "the script" if self.rank == 0 else "an actor" if self.adopted else "unused"
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, {kind})"


@dataclass
class Hub:
    """The ranks of one world.

    Args:
        size: How many there are.
        token: By which they are told from those of other worlds; no secret.
        key: What a rank must know.
    """

    size: int
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    members: dict[int, Member] = field(default_factory=dict)
    #: What the first rank came to that ended, or failed, before the world did.
    trouble: str = ""
    #: Set as soon as an actor's rank is lost.
    broken: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when rank 0 has asked for the end, or is gone.
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when rank 0 is gone.
    script_gone: asyncio.Event = field(default_factory=asyncio.Event)
    _wanted: bool = False
    _begun: bool = False
    _refusal: str | None = None
    _serving: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._serving[task] = writer
        try:
            async with asyncio.timeout(MEETING_SECONDS):
                member = await self._meet(reader, writer)
            if member is not None:
                try:
                    await self._listen(member, reader)
                finally:
                    self._left(member)
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as exc:
            _log.debug("a connection of the world broke: %s", exc)
        finally:
            writer.close()
            del self._serving[task]

    async def aclose(self) -> None:
        """Break the connections, so that the processes at their other ends end."""
        for writer in self._serving.values():
            writer.transport.abort()
        if self._serving:
            await asyncio.wait(list(self._serving))

    async def _meet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Member | None:
        ours = secrets.token_hex(16)
        _write(writer, {"nonce": ours})
        hello = json.loads(await reader.readline())
        theirs = str(hello["nonce"])
        if not hmac.compare_digest(str(hello["proof"]), proof(self.key, "rank", ours, theirs)):
            return None  # MPI-2
        rank = int(hello["rank"])
        if rank in self.members or not 0 <= rank < self.size:
            return None
        member = Member(
            rank=rank,
            host=hello["host"],
            pid=hello["pid"],
            addresses=hello["addresses"],
            shim=hello["shim"],
            local=writer.get_extra_info("peername")[0] == writer.get_extra_info("sockname")[0],
            writer=writer,
        )
        self.members[rank] = member
        answer = proof(self.key, "hub", ours, theirs)
        _write(writer, {"proof": answer, "token": self.token, "size": self.size})
        if len(self.members) == self.size and 0 in self.members:
            _write(self.members[0].writer, self._world())
        return member

    def _world(self) -> dict[str, Any]:
        ranks = [
            {"rank": each.rank, "host": each.host, "pid": each.pid}
            | {"addresses": each.addresses, "shim": each.shim}
            for _, each in sorted(self.members.items())
        ]
        return {"token": self.token, "ranks": ranks}

    async def _listen(self, member: Member, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            match message.get("ask"), message.get("say"):
                case "init", _:
                    self._ask_init(member)
                case "end", _:
                    self.end()
                case _, "adopted":
                    member.state, member.adopted, member.asked = State.STARTING, True, False
                case _, "waiting":
                    member.state = State.WAITING
                case _, "ready":
                    member.state = State.READY
                case _, "prepared":
                    member.state, member.library = State.PREPARED, message["library"]
                case _, "initialised":
                    member.state = State.INITIALISED
                case _, "failed":
                    self._refuse(f"{member} cannot initialise MPI: {message['error']}")
                    if self._begun:  # others wait for it, in MPI
                        self._break(f"{member} failed to initialise MPI: {message['error']}")
                case _:
                    pass  # "ended": the connection will, too
            self._go_on()

    def _others(self) -> Iterator[Member]:
        return (each for each in self.members.values() if each.state is not State.ENDED)

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._others():
            _write(member.writer, message)

    def _ask_init(self, asking: Member) -> None:
        self._wanted = True
        if self._refusal is not None:
            _write(asking.writer, {"do": "refused", "reason": self._refusal})
        elif self._begun and self._up():
            _write(asking.writer, {"do": "up"})

    def _up(self) -> bool:
        states = [member.state for member in self.members.values()]
        return states.count(State.INITIALISED) == self.size

    def _refuse(self, reason: str) -> None:
        if self._refusal is None:
            self._refusal = reason
            if self._wanted:
                self._tell({"do": "refused", "reason": reason})

    def _go_on(self) -> None:
        """Do what can be done by now."""
        if self._wanted and not self._begun and self._refusal is None:
            self._begin()
        elif self._begun and self._refusal is None and not self.ending.is_set() and self._up():
            self._tell({"do": "up"})
        if self.ending.is_set() and 0 in self.members:
            others = [each for each in self._others() if each.rank != 0]
            if not others and self.members[0].state is not State.ENDED:
                _write(self.members[0].writer, {"do": "ended"})

    def _begin(self) -> None:
        """Let all ranks load MPI, and when they have, initialise it."""
        members = self.members.values()
        states = {member.state for member in members}
        if len(members) < self.size or State.STARTING in states:
            return
        for member in members:
            if member.state is not State.PREPARED and not member.asked:
                member.asked = True
                _write(member.writer, {"do": "prepare"})
        if states != {State.PREPARED}:
            return
        libraries = {member.library: member for member in members}
        if len(libraries) > 1:
            said = "; ".join(f"{member}: {name}" for name, member in libraries.items())
            self._refuse(f"the ranks have different MPI libraries: {said}")
            return
        self._begun = True
        self._tell({"do": "init"})

    def _break(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble
        self.broken.set()

    def end(self) -> None:
        """Let all ranks finalise MPI and end."""
        if not self.ending.is_set():
            self.ending.set()
            self._tell({"do": "end"})

    def _left(self, member: Member) -> None:
        """A rank's process has ended, or is about to."""
        member.state = State.ENDED
        if not self.ending.is_set():
            self._refuse(f"{member} has ended")
            if member.rank != 0:
                self._break(f"{member} died, and with it the job, as MPI has it")
        if member.rank == 0:
            self.script_gone.set()
            self.end()
        self._go_on()


def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")
