"""The fixtures for users, in a run of pytest as theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import os, threading
import pytest

pytest_plugins = ["aiordt.testing.pytest_plugin"]

@pytest.mark.usefixtures("no_leaks")
def test_tidy():
    read, write = os.pipe()
    os.close(read)
    os.close(write)

@pytest.mark.usefixtures("no_leaks")
def test_untidy():
    os.pipe()
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()

def test_that_does_not_ask():
    os.pipe()
"""


def test_what_a_test_leaves_behind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "3 passed, 1 error" in done.stdout, done.stdout
    assert "ERROR test_it.py::test_untidy - AssertionError: leaked" in done.stdout
    assert "thread forgotten" in done.stdout
    assert len(re.findall(r"^E +fd \d+ -> pipe:", done.stdout, re.MULTILINE)) == 2
