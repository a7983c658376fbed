"""The face of the library: names, docstrings, what importing it does, and the size of files."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiordt
import aiordt.abc
import aiordt.flow
import aiordt.testing
import aiordt.weights

ROOT = Path(aiordt.__file__).parent
TESTS = Path(__file__).parent.parent
INVARIANT = re.compile(r"\b[A-Z]{3,4}-\d\b")
NAMES = [
    (module.__name__, name)
    for module in (aiordt, aiordt.abc, aiordt.flow, aiordt.testing, aiordt.weights)
    for name in module.__all__
]
FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_public_names_are_documented(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    doc = inspect.getdoc(value)
    assert doc, f"{module}.{name} has no docstring"
    assert doc.splitlines()[0].rstrip().endswith((".", ":", "?")), doc.splitlines()[0]
    if inspect.isclass(value):
        for member, what in vars(value).items():
            if member.startswith("_") or not (inspect.isfunction(what) or inspect.isroutine(what)):
                continue
            assert inspect.getdoc(getattr(value, member)), f"{module}.{name}.{member}"


def test_all_lists_are_sorted_and_true() -> None:
    for module in (aiordt, aiordt.abc, aiordt.flow, aiordt.testing, aiordt.weights):
        assert list(module.__all__) == sorted(module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)


def test_every_module_is_documented() -> None:
    for info in pkgutil.walk_packages([str(ROOT)], "aiordt."):
        assert importlib.import_module(info.name).__doc__, info.name


def test_no_public_function_but_the_allowed_takes_a_timeout() -> None:
    allowed = {"wait", "wait_tensor_freed", "create_group"}
    for name in aiordt.__all__:
        value = getattr(aiordt, name)
        if inspect.isfunction(value) and "timeout" in inspect.signature(value).parameters:
            assert name in allowed or name.endswith("_refs"), (
                f"{name}(timeout=): callers use asyncio.timeout"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_every_invariant_is_cited_by_a_test() -> None:
    """What the code promises by name, a test holds by name."""
    named = {
        name
        for path in FILES
        if path.parent.name != "testing"
        for name in INVARIANT.findall(path.read_text(encoding="utf-8"))
    }
    assert named >= {"CNT-1", "REG-2", "WIRE-3", "OWN-1", "LSE-3", "CMA-2"}
    sources = [*TESTS.rglob("test_*.py"), *(ROOT / "testing").glob("_checks_*.py")]
    cited = {
        name
        for path in sources
        if path != Path(__file__)
        for name in INVARIANT.findall(path.read_text(encoding="utf-8"))
    }
    assert sorted(named - cited) == []


IMPORT = """
import json, logging, os, sys, threading, warnings
import torch, numpy, anyio, msgpack, ray  # what they do at import is theirs

def state():
    return {
        "environment": dict(os.environ),
        "filters": [repr(entry) for entry in warnings.filters],
        "handlers": {
            name: [repr(handler) for handler in logging.getLogger(name).handlers]
            for name in ["", "aiordt", *sorted(logging.root.manager.loggerDict)]
            if not name.startswith("aiordt") or name == "aiordt"
        },
        "levels": [logging.root.level, logging.getLogger("aiordt").level],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "hooks": [repr(sys.excepthook), repr(sys.unraisablehook), repr(threading.excepthook)],
        "torch": [torch.get_num_threads(), torch.get_default_dtype() is torch.float32],
    }

before = state()
import aiordt, aiordt.abc
after = state()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
vendors = [name for name in ("ucxx", "nixl", "mpi4py", "tensordict") if name in sys.modules]
print(json.dumps([changed, vendors, ray.is_initialized(), aiordt.stats().exports]))
"""


def test_importing_changes_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        environment.pop(name, None)
    done = subprocess.run(  # noqa: S603  (a program of our own)
        [sys.executable, "-W", "ignore", "-c", IMPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    changed, vendors, initialized, exports = json.loads(done.stdout)
    assert changed == {}
    assert vendors == [], "vendor libraries are imported when their transport is chosen"
    assert not initialized
    assert exports == 0
    assert not done.stderr
