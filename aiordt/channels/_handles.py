"""Channels as their users see them: `channel`, `Sender`, `Receiver`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload

from typing_extensions import override

from aiordt import _ray, _runtime
from aiordt._errors import (
    ClosedError,
    InvalidTypeError,
    InvalidValueError,
    UsageError,
)
from aiordt._progress import run_all
from aiordt._types import MIB
from aiordt.abc import AsyncResource
from aiordt.channels._meeting import SENDER
from aiordt.channels._receiving import Receiving
from aiordt.channels._sending import Sending
from aiordt.channels._service import channels_of
from aiordt.collective._members import Member, find

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType


#: In the place of an actor: whoever uses that end first.
ANYONE: Final = "anyone"

_E = TypeVar("_E", Sending, Receiving)


@overload
async def channel(
    sender: Any,  # noqa: ANN401
    receivers: list[Any] | tuple[Any, ...],
    *,
    capacity: int = ...,
    copies: bool = ...,
    name: str | None = ...,
) -> tuple[Sender, list[Receiver]]: ...
@overload
async def channel(
    sender: Any,  # noqa: ANN401
    receivers: Any,  # noqa: ANN401
    *,
    capacity: int = ...,
    copies: bool = ...,
    name: str | None = ...,
) -> tuple[Sender, Receiver]: ...
async def channel(
    sender: Any,
    receivers: Any,
    *,
    capacity: int = 64 * MIB,
    copies: bool = False,
    name: str | None = None,
) -> tuple[Sender, Receiver | list[Receiver]]:
    """Make a channel: items go from one process to one or several others, without Ray.

    The two ends are small handles, to be passed to their users in ordinary calls of Ray. An item
    is any tree of tensors and other values, each as different from the one before as you like.

    Args:
        sender: Handle of the actor that sends; ``None``: this process does, be it a driver, a
            task or an actor; ``"anyone"``: the first process that uses the sending end, such as
            a task that is given it.
        receivers: The same for who receives; a list of them: each gets every item.
        capacity: Credit: so many bytes of items may be sent that a receiver has not done with,
            until `Sender.send` waits. A larger item goes alone. It is shared memory of the
            sender, taken as it is used.
        copies: Give receivers private copies, to be kept and written to. Otherwise receivers on
            the sender's host look at its memory: see `Receiver.recv`.
        name: For messages.

    Returns:
        The sending end, and the receiving one (a list, if ``receivers`` is one).

    Raises:
        OwnerDiedError: An actor is dead, or died meanwhile.
        PeerLostError: An actor cannot be reached.
        UsageError: An argument is not valid, or Ray is not initialized here.

    Cost:
        Some 10 ms. An item of 64 KiB then takes about 0.1 ms from actor to actor.
    """
    several = isinstance(receivers, list | tuple)
    handles = [sender, *(receivers if several else [receivers])]
    if len(handles) == 1:
        raise InvalidValueError("a channel needs at least one receiver")
    for handle in handles:
        if not (handle is None or handle == ANYONE or _ray.actor_id_of(handle)):
            raise InvalidTypeError(
                f"channel() takes handles of actors, None (this process) or {ANYONE!r}, not "
                f"{handle!r}"
            )
    given: object = capacity
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise InvalidValueError(f"capacity is a positive number of bytes, not {capacity!r}")
    runtime = _runtime.current()
    channels = channels_of(runtime)
    key = os.urandom(16)
    name = name or f"channel-{os.urandom(4).hex()}"

    async def found(handle: Any) -> Member | None:  # noqa: ANN401
        if handle is None:
            return channels.own()
        return None if handle == ANYONE else await find(runtime, handle)

    members = await run_all([found(handle) for handle in handles])
    await runtime.io.run(channels.make(key, name, members, [capacity, copies]))
    maker = channels.own().pack()
    owners = ["" if member is None else str(member.owner) for member in members]
    tx = Sender(key, SENDER, name, maker, owners[SENDER])
    rxs = [Receiver(key, index, name, maker, owners[index]) for index in range(1, len(members))]
    return tx, (rxs if several else rxs[0])


class _Handle(AsyncResource, Generic[_E]):
    """An end of a channel, as it travels."""

    def __init__(self, channel: bytes, index: int, name: str, maker: Any, owner: str) -> None:  # noqa: ANN401
        self._args = (channel, index, name, maker, owner)
        self._end: _E | None = None

    @property
    def name(self) -> str:
        """The channel's name."""
        return self._args[2]

    @override
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._args

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__} of channel {self.name!r}>"

    async def _found(self) -> _E:
        """This end in this process; the first use of it may have to wait for the others.

        Raises:
            UsageError: It is another process's.
            ClosedError: The channel has ended.
            OwnerDiedError: The process that made it died before this end was there.
        """
        runtime = _runtime.current()
        channels = channels_of(runtime)
        channel, index, name, maker, owner = self._args
        end = channels.end(channel, index)
        if end is None:
            if owner and owner != str(runtime.owner):
                raise UsageError(
                    f"channel {name!r}: this end belongs to {owner}, and was used in "
                    f"{runtime.owner}"
                )
            await runtime.io.run(channels.claim(channel, index, Member.unpack(maker)))
            end = channels.end(channel, index)
        if end is None:
            raise ClosedError(f"channel {name!r} has ended")
        self._end = end  # type: ignore[assignment]
        return end  # type: ignore[return-value]


class Sender(_Handle[Sending]):
    """The sending end of a channel. Made by `aiordt.channel`; used by one process."""

    async def send(self, tree: Any) -> None:  # noqa: ANN401
        """Send an item to all receivers; returns once it is on its way.

        Its tensors have been copied by then, and may be overwritten. They arrive detached, with
        the strides that `torch.clone` gives, in host memory; numpy arrays arrive as such.

        Args:
            tree: A tensor, or any value that can be pickled with tensors anywhere in it. The
                same tensor twice arrives as one. No `TensorRef`, ``ObjectRef`` or actor handle.

        Raises:
            ClosedError: The channel was closed here, or by all receivers.
            PeerLostError: A receiver died or cannot be reached: the channel has ended.
            UsageError: The item cannot be sent; nothing was.
            OutOfMemoryError: There is no shared memory for it.

        Waits:
            For credit (see `aiordt.channel`); before the first item, for receivers that may be
            anyone.

        Cancellation:
            The item is then sent to no receiver.

        Cost:
            About 30 µs and the copy, which runs on worker threads from 1 MiB on.
        """
        end = self._end
        if end is None:
            end = await self._found()
        await end.send(tree)

    @override
    async def aclose(self, error: BaseException | None = None) -> None:
        """End the channel; receivers get what was sent, and then the end. Idempotent.

        Args:
            error: Tell receivers that this failed: iterating over the channel raises instead of
                just ending.
        """
        end = self._end
        if end is None:
            end = await self._found()
        await end.aclose(error)

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; if the block failed, receivers are told."""
        await self.aclose(exc)


class Receiver(_Handle[Receiving]):
    """A receiving end of a channel. Made by `aiordt.channel`; used by one process.

    ``async for item in rx:`` receives until the sender closes the channel.
    """

    async def recv(self) -> Any:  # noqa: ANN401
        """The next item.

        On the sender's host its tensors are the sender's memory: to be read (a write to them ends
        this process by a segmentation fault), and **good until the next item is asked for**,
        unless `hold` is called. ``copies=True`` of `aiordt.channel`, and being on another host,
        make them private.

        Raises:
            ClosedError: The sender closed the channel, and all it sent was received; or it was
                closed here.
            OwnerDiedError: The sender died. What had arrived from it was received before.
            PeerLostError: The sender cannot be reached any more.

        Cancellation:
            No item is lost: the next call gives it.

        Cost:
            About 40 µs at any size on the sender's host.
        """
        end = self._end
        if end is None:
            end = await self._found()
        return await end.recv()

    def hold(self) -> None:
        """Keep the item that was received last for as long as any tensor of it exists.

        It takes up the sender's credit for so long. Does nothing for private copies.

        Raises:
            UsageError: This handle has received nothing.
        """
        if self._end is None:
            raise UsageError(f"channel {self.name!r}: hold() is for what recv() gave before")
        self._end.hold()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        end = self._end
        if end is None:
            end = await self._found()
        try:
            return await end.recv()
        except ClosedError:
            if end.ended_well:
                raise StopAsyncIteration from None
            raise

    @override
    async def aclose(self) -> None:
        """Receive no more: the sender goes on with the others, if there are any. Idempotent."""
        end = self._end
        if end is None:
            end = await self._found()
        await end.aclose()
