"""Streams and events of devices behind one small interface; for host memory, no-ops.

Exports record an event on the stream that made the tensor, and whoever reads the memory
waits for it first; pulls make the caller's stream wait for the arrival.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from aiordt._errors import InvalidValueError

if TYPE_CHECKING:
    import torch

    from aiordt.abc import Event


class DeviceLayer(ABC):
    """Stream ordering for one type of device."""

    @abstractmethod
    def record(self, device: torch.device) -> Event:
        """An event for all work queued so far on the caller's current stream."""

    @abstractmethod
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        """Make the caller's current stream wait for ``event``, without blocking the host."""


class _Done:
    """The event of a device that queues nothing."""

    def done(self) -> bool:
        return True

    async def wait(self) -> None:
        return


DONE: Final = _Done()


class _Host(DeviceLayer):
    """Host memory: everything has happened when the call that did it returned."""

    @override
    def record(self, device: torch.device) -> Event:
        return DONE

    @override
    def wait_on_stream(self, device: torch.device, event: Event) -> None:
        return


_layers: dict[str, DeviceLayer] = {"cpu": _Host()}


def layer(device: torch.device) -> DeviceLayer:
    """The layer for a device.

    Raises:
        InvalidValueError: aiordt cannot move tensors of such a device.
    """
    found = _layers.get(device.type)
    if found is None:
        raise InvalidValueError(
            f"aiordt moves tensors in host memory; this one is on {device}. Call .cpu() first"
        )
    return found
