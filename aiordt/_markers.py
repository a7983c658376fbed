"""Markers for leases, made ahead.

Invariants:
    SES-1  No thread of ours makes one when Ray takes its core worker apart: that would end the
           process.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aiordt import _ray
from aiordt._errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiordt._progress import Workers

_log = logging.getLogger(__name__)

#: How many are made ahead; a result needs one or more.
_POOL_SIZE: Final = 32


class Markers:
    """Plain Ray objects whose reference counts are our leases; made ahead where it helps."""

    def __init__(self, workers: Workers, on_dropped: Callable[[bytes], None]) -> None:
        self._workers = workers
        self._on_dropped = on_dropped
        self._pool: deque[Any] = deque()
        self._filling = False
        self._pooling = not _ray.is_task_worker()
        self._closed = False
        self._making = threading.Lock()

    async def take(self, count: int) -> Sequence[Any]:
        """``count`` markers, each to be held by exactly one lease.

        Cost:
            ~1 µs each from the pool, else ~0.4 ms each on a worker thread.
        """
        markers = self._from_pool(count)
        if len(markers) < count:
            missing = count - len(markers)
            markers += await self._workers.run(lambda: [self._make() for _ in range(missing)])
        return markers

    def take_blocking(self, count: int) -> Sequence[Any]:
        """As `take`, for threads that have no event loop."""
        markers = self._from_pool(count)
        return markers + [self._make() for _ in range(count - len(markers))]

    def _from_pool(self, count: int) -> list[Any]:
        if self._closed:
            raise ClosedError("aiordt's runtime was closed")
        markers: list[Any] = []
        with suppress(IndexError):  # another thread may take the last one
            while len(markers) < count:
                markers.append(self._pool.popleft())
        if self._pooling and not self._filling and len(self._pool) < _POOL_SIZE // 2:
            self._filling = True
            self._workers.submit(self._fill)
        return markers

    def _fill(self) -> None:
        try:
            while len(self._pool) < _POOL_SIZE and not self._closed:
                self._pool.append(self._make())
        except Exception:  # noqa: BLE001
            # The next export makes its own, and raises where its caller sees it.
            _log.debug("making markers ahead failed", exc_info=True)
        finally:
            self._filling = False

    def _make(self) -> Any:  # noqa: ANN401
        with self._making:
            if self._closed:
                raise ClosedError("aiordt's runtime was closed")
            return _ray.new_marker(self._on_dropped)

    def close(self) -> None:
        """Let the markers that were made ahead go; none is being made when this returns (SES-1)."""
        with self._making:
            self._closed = True
        self._pool.clear()
