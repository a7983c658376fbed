"""The side that has the weights."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

from typing_extensions import override

from aiordt._errors import ClosedError, InvalidTypeError, InvalidValueError
from aiordt._runtime import current
from aiordt.abc import AsyncResource
from aiordt.weights._layout import Laid
from aiordt.weights._service import weights_of

if TYPE_CHECKING:
    from aiordt.weights._service import Weights
    from aiordt.weights._stream import Stream

_POLICIES: Final = ("drop", "wait")


class Publisher(AsyncResource):
    """Publishes versions of a tree of tensors. Made by `publisher`; used on one event loop.

    Attributes:
        name: By which readers find it.
    """

    def __init__(self, service: Weights, name: str, stream: Stream, *, wait: bool) -> None:
        self.name = name
        self._service = service
        self._stream = stream
        self._wait = wait
        self._version = 0
        self._turn = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        """How many publishers of this name there have been, with this one."""
        return self._stream.record.epoch

    @property
    def version(self) -> int:
        """The number of the version that was published last, or 0."""
        return self._version

    async def publish(self, tree: Any, *, version: int | None = None) -> int | None:  # noqa: ANN401
        """Publish a copy of a tree as the newest version; readers that wait for one wake up.

        The tree may be changed as soon as this returns. It takes the time of one copy, however many
        readers there are and whatever they do. Several calls take their turns.

        Args:
            tree: Dicts, lists and tuples, in any nesting, of tensors, numpy arrays and plain
                values: a state dict, for one. Tensors that share memory arrive sharing it.
            version: Its number, greater than the last; by default one more than that.

        Returns:
            Its number; ``None`` if it was not published, since readers have all of ``max_versions``
            (never with ``when_full="wait"``, which waits until one of them lets go).

        Raises:
            UsageError: The tree cannot be published, names the place; or ``version`` is not greater
                than the last. Nothing has changed.
            OutOfMemoryError: There is no shared memory for another version.
            ClosedError: This publisher was closed.

        Cost:
            A copy at memory speed, on a worker thread, and ~5 µs a tensor. New memory is made for
            the first ``max_versions`` at most, and when the tree's shapes change. A plain value
            that is not what it was costs each reader another round trip; as a tensor it does not.

        Cancellation:
            Nothing is published, and the tree is not read any more.
        """
        async with self._turn:
            number = self._number(version)
            if self._stream.closed:
                raise ClosedError(f"the publisher of {self.name!r} was closed")
            laid = Laid(tree, checked=self._service.runtime.config.checksums)
            if not await self._stream.write(laid, number, wait=self._wait):
                return None
            self._version = number
            return number

    def _number(self, version: int | None) -> int:
        if version is None:
            return self._version + 1
        check_int("version", version)
        if version <= self._version:
            raise InvalidValueError(
                f"version {version} of {self.name!r}: the last one was {self._version}, and they "
                "only grow"
            )
        return version

    @override
    async def aclose(self) -> None:
        """End it: readers see the end, and the name is free. Idempotent.

        Versions that are being read stay until they have been.
        """
        if self._closing is None:
            closing = self._service.shut(self.name, self._stream)
            self._closing = asyncio.ensure_future(closing)
        await asyncio.shield(self._closing)


async def publisher(
    name: str, *, max_versions: int = 3, when_full: Literal["drop", "wait"] = "drop"
) -> Publisher:
    """Become the publisher of a name, in any process: actor, task or driver.

    Args:
        name: By which `subscriber` finds it, in the same Ray namespace.
        max_versions: How many copies of the tree there may be: one to write, one to read, and one
            for each version that slow readers are still at. At least 2.
        when_full: What happens when the readers have them all: the new version is dropped
            (``"drop"``), or waits until one of them lets go (``"wait"``). A version that nobody
            reads makes room for a newer one in either case.

    Returns:
        The publisher; close it, or use it by ``async with``.

    Raises:
        UsageError: The name has a publisher that is alive, or an argument does not fit.
        PeerLostError: It has one that cannot be reached, and that may be alive.

    Cost:
        Some round trips to Ray's GCS.
    """
    check_name(name)
    check_int("max_versions", max_versions)
    if max_versions < 2:
        raise InvalidValueError(f"max_versions must be at least 2, not {max_versions}")
    if when_full not in _POLICIES:
        raise InvalidValueError(f"when_full must be one of {_POLICIES}, not {when_full!r}")
    service = weights_of(current())
    stream = await service.open(name, max_versions)
    return Publisher(service, name, stream, wait=when_full == "wait")


def check_int(what: str, value: object) -> None:
    """Refuse what is no integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidTypeError(f"{what} must be an int, not {value!r}")


def check_name(name: object) -> None:
    """Refuse what is no name."""
    if not isinstance(name, str):
        raise InvalidTypeError(f"a name is a str, not {name!r}")
    if not name:
        raise InvalidValueError("a name is not empty")
