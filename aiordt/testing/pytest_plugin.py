"""Fixtures for pytest, of programs that use aiordt too.

``pytest_plugins = ["aiordt.testing.pytest_plugin"]`` in a ``conftest.py`` loads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiordt.testing._leaks import check_leaks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiordt.testing._leaks import Leaks


@pytest.fixture
def no_leaks() -> Iterator[Leaks]:
    """The test leaves nothing behind in this process: see `aiordt.testing.check_leaks`.

    A test that does is an error, which lists what. Request it before the fixtures that
    are to be looked at, too: what was there before it does not count.
    """
    with check_leaks() as leaks:
        yield leaks
