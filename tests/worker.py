"""What every Ray worker of the tests loads as it starts, before anybody waits for it.

Not aiordt: the path of the worker's job, with the entry points that are there, comes later.
"""

from __future__ import annotations

import atexit
import os
import threading

import coverage
import ray  # noqa: F401  (like torch, before coverage begins: it would slow imports down)
import torch  # noqa: F401

_MEASURED = "WORKER_COVERAGE"
_COVERAGE = "COVERAGE_PROCESS_CONFIG"


def environment() -> dict[str, str]:
    """What raylets need, so that workers load this module and Ray's own processes do not."""
    return {
        "RAY_preload_python_modules": __name__,
        _MEASURED: os.environ.get(_COVERAGE, ""),
        _COVERAGE: "",
        "COVERAGE_PROCESS_START": "",
    }


def measure() -> None:
    """Measure coverage from here on; save often, since workers end without saying goodbye."""
    os.environ[_COVERAGE] = os.environ.pop(_MEASURED)
    current = coverage.process_startup()
    assert current is not None

    ending = threading.Event()

    def flush() -> None:
        while not ending.wait(0.3):
            current.save()

    flusher = threading.Thread(target=flush, daemon=True, name="coverage-flusher")
    flusher.start()

    def end() -> None:
        """Save no more: a thread that is in SQLite while the interpreter ends may crash it."""
        ending.set()
        flusher.join()

    atexit.register(end)


if os.environ.get(_MEASURED):
    measure()
