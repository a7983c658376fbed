"""A device that is not there: host memory whose work is done when the test says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from aiordt import _device
from aiordt._device import Completion, HostLayer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import torch

    from aiordt._device import Event
    from aiordt._progress import Workers


class FakeDevice:
    """Takes the place of host memory's layer in this process: its queue moves by hand.

    Every export made meanwhile has an event of its own that is not done until `finish`. To be
    used in a ``with`` statement, or in an actor, whose methods come and go, with `install` and
    `remove`. Small tensors travel by value, whatever is queued: name a ``transport=``.

    Attributes:
        events: One for each export, in order; ``complete()`` ends one.
        log: What was called, in order: ``"record"``, ``"wait_on_stream"``, ``"stage"``.
        waited_for: What the caller's stream was told to wait for.
    """

    def __init__(self) -> None:
        self.events: list[Completion] = []
        self.log: list[str] = []
        self.waited_for: list[Event] = []
        self._before: _device.DeviceLayer | None = None

    def install(self) -> None:
        """Take the place."""
        self._before = _device.install("cpu", _Layer(self))

    def remove(self) -> None:
        """Give it back, and finish what is queued. Idempotent."""
        if self._before is not None:
            _device.install("cpu", self._before)
            self._before = None
        self.finish()

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def finish(self, error: Exception | None = None) -> None:
        """Let all work that is queued be done, or fail."""
        for event in self.events:
            event.complete(error)


class _Layer(HostLayer):
    def __init__(self, fake: FakeDevice) -> None:
        self._fake = fake

    @override
    def record(self, device: torch.device) -> Event:
        self._fake.log.append("record")
        self._fake.events.append(Completion())
        return self._fake.events[-1]

    @override
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        self._fake.log.append("wait_on_stream")
        self._fake.waited_for.append(event)

    @override
    async def stage(
        self,
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        workers: Workers,
    ) -> list[torch.Tensor]:
        self._fake.log.append("stage")
        return await super().stage(tensors, dtypes, workers)
