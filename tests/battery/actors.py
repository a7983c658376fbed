"""The two ends of a trial: an actor that has a tensor, and one that pulls it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import aiordt
from aiordt._runtime import current
from aiordt.testing import TcpProxy, at_phase, cancel_from_anywhere

if TYPE_CHECKING:
    from collections.abc import Callable


async def exported(tensor: torch.Tensor, transport: str) -> tuple[torch.Tensor, Any]:
    """The tensor, where that transport finds it, and a ref to be moved by it only."""
    if transport == "shm":
        tensor = aiordt.empty_like(tensor).copy_(tensor)
    return tensor, await aiordt.put(tensor, transport=transport)


def pattern(seed: int, nbytes: int) -> torch.Tensor:
    """What a trial moves: other bytes for other seeds, made in no time."""
    words = torch.arange(nbytes // 8, dtype=torch.int64)
    return (words * 0x9E3779B9 + seed).view(torch.uint8)


class Strike(NamedTuple):
    """What happens when a phase is reached.

    Attributes:
        point: The phase.
        occurrence: At which of its announcements.
        action: ``"kill"``, ``"stop"``, ``"raise"``, ``"cancel"``.
        pid: Of the process that a signal goes to.
    """

    point: str
    occurrence: int
    action: str
    pid: int = 0


class Result(NamedTuple):
    """How a pull ended.

    Attributes:
        outcome: ``"data"``, or the class of the error.
        text: Its message.
        seconds: From the call to the end.
        struck: Whether the strike's phase was reached.
    """

    outcome: str
    text: str
    seconds: float
    struck: bool


class InjectedError(Exception):
    """Raised inside aiordt by a trial."""


class Holder(aiordt.AsyncActor):
    """Has a tensor, and may stand behind a proxy."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None
        self._held: list[Any] = []
        self._proxy: TcpProxy | None = None
        self._strikes = ExitStack()

    async def pid(self) -> int:
        """Its process."""
        return os.getpid()

    async def export(self, seed: int, nbytes: int, transport: str) -> list[Any]:
        """Make a tensor and export it, to be moved by ``transport`` only."""
        self._kept, ref = await exported(pattern(seed, nbytes), transport)
        return [ref]

    async def hold(self, refs: list[Any]) -> None:
        """Hold these, and no others any more."""
        self._held = refs

    async def freed(self, seconds: float) -> None:
        """Wait until nobody holds the tensor any more."""
        if self._kept is not None:
            await aiordt.wait_tensor_freed(self._kept, timeout=seconds)
            self._kept = None

    async def counts(self) -> dict[str, int]:
        """What must be as before when a trial is over."""
        stats = aiordt.stats()
        return {"exports": stats.exports, "held": stats.held_refs, "in flight": stats.in_flight}

    # --- the network ---------------------------------------------------------------------------

    async def hide(self) -> None:
        """Let others find this process behind a proxy."""
        runtime = current()
        address = runtime.address
        self._proxy = await TcpProxy(address.host, address.port).__aenter__()
        runtime.address = dataclasses.replace(address, host=self._proxy.host, port=self._proxy.port)

    async def disturb(self, kind: str, after: int, towards: str) -> None:
        """Set a fault of the network."""
        assert self._proxy is not None
        if kind == "cut":
            self._proxy.cut()
        else:
            getattr(self._proxy, kind)(after=after, towards=towards)

    async def heal(self) -> None:
        """Undo it."""
        if self._proxy is not None:
            self._proxy.heal()

    # --- at points -------------------------------------------------------------------------------

    async def prepare(self, strike: Strike) -> None:
        """Let this process strike when it reaches a phase, once."""
        self._arm(strike, lambda: None)

    def _arm(self, strike: Strike, cancel: Callable[[], None]) -> Any:
        def act() -> None:
            if strike.action == "cancel":
                cancel()
            elif strike.action == "raise":
                raise InjectedError("injected by a trial")
            else:
                number = signal.SIGKILL if strike.action == "kill" else signal.SIGSTOP
                os.kill(strike.pid, number)

        self._strikes.close()
        return self._strikes.enter_context(
            at_phase(strike.point, act, occurrence=strike.occurrence)
        )


class Reader(Holder):
    """Pulls."""

    async def pull(
        self, refs: list[Any], seed: int, strike: Strike | None, cancel_after: float | None
    ) -> Result:
        """Pull a tensor and compare it.

        Args:
            refs: The ref.
            seed: Of what it must be.
            strike: What happens on the way.
            cancel_after: Seconds until the pull is cancelled.
        """
        begun = time.perf_counter()
        task = asyncio.ensure_future(_compared(refs[0], seed))
        phases = None
        if strike is not None:
            phases = self._arm(strike, functools.partial(cancel_from_anywhere, task))
        elif cancel_after is not None:
            asyncio.get_running_loop().call_later(cancel_after, task.cancel)
        outcome, text = "data", ""
        try:
            right = await task
            if not right:
                outcome = "WRONG DATA"
        except asyncio.CancelledError:
            outcome = "CancelledError"
        except Exception as exc:  # noqa: BLE001  (it is what is asked for)
            outcome, text = type(exc).__name__, str(exc)
            if isinstance(exc, InjectedError):  # no error of ours: it keeps its frames
                exc.__traceback__ = None
        seconds = time.perf_counter() - begun
        del task  # its error has this frame, which has the ref
        struck = phases is not None and phases.reached.is_set()
        self._strikes.close()
        return Result(outcome, text, seconds, struck)

    async def pull_held(self, place: int, seed: int, strike: Strike | None) -> Result:
        """As `pull`, one of those that it holds."""
        return await self.pull([self._held[place]], seed, strike, None)

    async def pull_many(self, refs: list[Any], seed: int, count: int) -> Result:
        """Pull the same tensor many times at once."""
        begun = time.perf_counter()
        right = await asyncio.gather(*(_compared(refs[0], seed) for _ in range(count)))
        outcome = "data" if all(right) else "WRONG DATA"
        return Result(outcome, "", time.perf_counter() - begun, struck=True)


async def _compared(ref: Any, seed: int) -> bool:
    tensor = await ref
    return torch.equal(tensor, pattern(seed, tensor.nbytes))
