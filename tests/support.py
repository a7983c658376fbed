"""What the tests of a live cluster share: one general actor, polling."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

import aiordt
from aiordt import testing
from aiordt._metrics import phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MIB = 1 << 20
#: Set by tests/hosts/__main__.py: the tests run on host 1 of two, by this transport.
ACROSS = os.environ.get("TESTS_ACROSS", "")
#: After which a program that a test runs is taken to hang.
PROGRAM_SECONDS = 240


class NodeActor(aiordt.AsyncActor):
    """An async actor that does what a test tells it to.

    Args:
        settings: As of `aiordt.configure`.
    """

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        if settings:
            aiordt.configure(**settings)
        gc.freeze()  # see tests/conftest.py
        self.kept: dict[str, Any] = {}

    @aiordt.method
    async def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(self, ...)``, its tensors as refs."""
        return await _called(function, self, *args)

    @aiordt.method(snapshot=True)
    async def make_snapshot(self, function: Callable[..., Any], *args: Any) -> Any:
        return await _called(function, self, *args)

    @aiordt.method(transport="tcp")
    async def make_tcp(self, function: Callable[..., Any], *args: Any) -> Any:
        return await _called(function, self, *args)

    @aiordt.method(transport="cma")
    async def make_cma(self, function: Callable[..., Any], *args: Any) -> Any:
        return await _called(function, self, *args)

    @aiordt.method(transport="mpi")
    async def make_mpi(self, function: Callable[..., Any], *args: Any) -> Any:
        return await _called(function, self, *args)

    @aiordt.method
    async def stream(self, function: Callable[..., Any], *args: Any) -> AsyncIterator[Any]:
        async for item in function(self, *args):
            yield item

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(self, ...)`` as it is."""
        return await _called(function, self, *args)

    async def pull(self, tree: Any) -> Any:
        """Pull and send back by value, so that the test can compare."""
        return await aiordt.get(tree)

    async def pid(self) -> int:
        return os.getpid()

    def stats(self) -> aiordt.Stats:
        return aiordt.stats()


Node: Any = ray.remote(NodeActor)


async def _called(function: Callable[..., Any], *args: Any) -> Any:
    result = function(*args)
    return await result if inspect.isawaitable(result) else result


def forget(node: Any) -> None:
    """What a test kept in an actor."""
    node.kept.clear()
    gc.collect()


def on_phase(action: Callable[[str], None] | None) -> None:
    """Call ``action`` at each phase of a transfer in this process."""
    phase.hook = action


async def eventually(
    check: Callable[[], Awaitable[Any] | Any], *, seconds: float = 60.0, what: str = "condition"
) -> Any:
    """Poll until ``check`` is true; its value. A busy machine needs up to 40 s for two actors."""
    return await testing.eventually(check, what=what, within=seconds)


def process_state(pid: int) -> str:
    """As ``ps`` has it: T is stopped, Z and X are dead.

    Raises:
        OSError: It is gone.
    """
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


async def kill(pid: int) -> None:
    """Kill a process and wait for its end: until then others can still read its memory."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: bool(select.select([pidfd], [], [], 0)[0]), what=f"{pid} is gone")
    finally:
        os.close(pidfd)


async def drained(*nodes: Any) -> None:
    """Wait until these actors export nothing and hold no refs."""
    for node in nodes:

        async def empty(node: Any = node) -> bool:
            stats = await node.stats.remote()
            return stats.exports == 0 and stats.held_refs == 0 and stats.in_flight == 0

        await eventually(empty, what="registry empty")


async def clean(*nodes: Any) -> None:
    """Let these actors forget what a test kept in them; see that nothing else is left."""
    gc.collect()
    await asyncio.gather(*(node.run.remote(forget) for node in nodes))
    await drained(*nodes)


def arange(nbytes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose content shows where it came from."""
    numel = nbytes // dtype.itemsize
    return torch.arange(numel, dtype=torch.float64).remainder(251).to(dtype)


class Wrapped:
    """An array of another library: it has ``__dlpack__``, and nothing else that we know."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()
