"""A symmetric, typed RPC over an authenticated connection; runs on the io loop.

Invariants:
    RPC-1  Every call ends: with its reply, the peer's error, or the connection's end.
    RPC-2  Requests are served concurrently; one that fails or is cancelled ends alone.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiordt import _errors, _wire
from aiordt._errors import AiordtError, ClosedError, ProtocolViolationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiordt._wire import Message, Sealer

_log = logging.getLogger(__name__)

_UNREACHABLE: Final = frozenset(
    {
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        getattr(errno, "EHOSTDOWN", errno.EHOSTUNREACH),
    }
)


class Connection:
    """An authenticated control connection; either end may call the other."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        peer_id: bytes,
        sealers: tuple[Sealer, Sealer],
        handle: Callable[[Message, bytes], Awaitable[Message | None]],
        ended: Callable[[Connection], None],
    ) -> None:
        self.peer_id = peer_id
        self.closed = asyncio.Event()
        self.unreachable = False  # why it closed: the network, not the peer
        self._reader = reader
        self._writer = writer
        self._outgoing, self._incoming = sealers
        self._handle = handle
        self._ended = ended
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def call(self, request: Message) -> Message:
        """Send a request and await its reply (RPC-1).

        Raises:
            ConnectionResetError: The connection ended first.
            AiordtError: What the other end answered.
        """
        if self.closed.is_set():
            raise ConnectionResetError(errno.ECONNRESET, "the connection has ended")
        number = next(self._numbers)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            await self._write(_wire.KIND_REQUEST, number, request)
            reply = await future
        except asyncio.CancelledError:
            if not self.closed.is_set():
                self._write_nowait(_wire.KIND_NOTE, 0, _wire.Cancel(number))
            raise
        finally:
            future.cancel()  # no-one will look at what comes now
            del self._pending[number]
        if isinstance(reply, _wire.Failure):
            raise _rebuilt(reply)
        return reply

    async def note(self, message: Message) -> None:
        """Send a message that has no reply."""
        await self._write(_wire.KIND_NOTE, 0, message)

    def _write_nowait(self, kind: int, number: int, message: Message) -> None:
        self._writer.write(self._outgoing.seal(_wire.encode(kind, number, message)))

    async def _write(self, kind: int, number: int, message: Message) -> None:
        self._write_nowait(kind, number, message)
        await self._writer.drain()

    async def _run(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(_wire.HEADER.size)
                body = await self._reader.readexactly(_wire.frame_length(header))
                self._dispatch(*_wire.decode(self._incoming.open(body)))
        except asyncio.IncompleteReadError:
            _log.debug("connection ended by its peer")  # callers learn it below
        except OSError as exc:
            self.unreachable = exc.errno in _UNREACHABLE
        except ProtocolViolationError as exc:
            _log.warning("connection closed: %s", exc)
        finally:
            self._end()

    def _dispatch(self, kind: int, number: int, message: Message) -> None:
        if kind == _wire.KIND_REPLY:
            future = self._pending.get(number)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, _wire.Cancel):
            task = self._serving.get(message.number)
            if task is not None:
                task.cancel()
        else:
            task = asyncio.get_running_loop().create_task(self._serve(kind, number, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if kind == _wire.KIND_REQUEST:
                self._serving[number] = task
                task.add_done_callback(lambda _: self._serving.pop(number, None))

    async def _serve(self, kind: int, number: int, message: Message) -> None:
        try:
            reply = await self._handle(message, self.peer_id)
        except AiordtError as exc:
            reply = _wire.Failure(type(exc).__name__, str(exc))
        except Exception as exc:  # noqa: BLE001  (logged, and told to the asker)
            _log.exception("serving %s failed", type(message).__name__)
            reply = _wire.Failure("TransferError", f"{type(exc).__name__}: {exc}")
        if kind == _wire.KIND_REQUEST and not self.closed.is_set():
            if reply is None:
                reply = _wire.Failure("ProtocolViolationError", "unknown request")
            with suppress(OSError):  # the peer went away meanwhile: nobody waits
                await self._write(_wire.KIND_REPLY, number, reply)

    def _end(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        self._writer.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ConnectionResetError(errno.ECONNRESET, "connection lost"))
        for task in list(self._tasks):
            task.cancel()
        self._ended(self)

    async def aclose(self) -> None:
        """End it; pending calls on both sides raise. Idempotent."""
        self._task.cancel()
        self._end()
        await asyncio.wait({self._task})


def _rebuilt(failure: _wire.Failure) -> AiordtError:
    """The other end's error, as far as it makes sense here."""
    kinds: dict[str, type[AiordtError]] = {
        "TensorFreedError": _errors.TensorFreedError,
        "ProtocolViolationError": ProtocolViolationError,
        "InvalidValueError": _errors.InvalidValueError,
        "UsageError": _errors.UsageError,
        "ClosedError": ClosedError,
        "GroupError": _errors.GroupError,
    }
    if failure.kind == "UnavailableError":
        return _errors.UnavailableError(failure.text, reason=failure.text, transport="")
    kind = kinds.get(failure.kind)
    if kind is not None:
        return kind(failure.text)
    return ProtocolViolationError(f"the owner failed: {failure.text}")
