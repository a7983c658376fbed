"""Transports of other packages: the one of the how-to page, and some that are broken.

They are installed as packages are: a module, and a ``dist-info`` with entry points, in a folder
on the path of a driver and of its actors.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from tests.support import PROGRAM_SECONDS

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "how-to" / "write_a_transport.md"

BROKEN = """
from aiordt.abc import Availability, Transport
from mine import MineTransport

helper = print

class Unusable(MineTransport):
    name = "unusable"

    @classmethod
    def probe(cls):
        return Availability(usable=False, reason="there is no such device")

class Raises(MineTransport):
    name = "raises"

    @classmethod
    def probe(cls):
        raise OSError("no driver")

class Unmakable(MineTransport):
    name = "unmakable"

    def __init__(self, context):
        raise RuntimeError("out of queues")

class Abstract(Transport):
    name = "abstract"

    @classmethod
    def probe(cls):
        return Availability(usable=True)
"""
BROKEN_ENTRIES = """
absent = no_such_module:Transport
nothing = broken:nothing
helper = broken:helper
misnamed = mine:MineTransport
unusable = broken:Unusable
raises = broken:Raises
unmakable = broken:Unmakable
abstract = broken:Abstract
"""
USE_BROKEN = """
import asyncio, json, sys
import ray
import aiordt
from use_mine import Owner, Reader

async def main():
    names = sys.argv[1]
    env = {"env_vars": {"AIORDT_TRANSPORTS": names}}
    owner = Owner.options(runtime_env=env).remote()
    reader = Reader.options(runtime_env=env).remote()
    print(json.dumps(await reader.read.remote(owner.make.remote())))
    print(await reader.explain.remote(owner.make.remote()))

ray.init()
asyncio.run(main())
"""


def files_of(page: Path) -> dict[str, str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL)
    return dict(found)


def install(folder: Path, name: str, entries: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[aiordt.transports]\n{entries.strip()}\n")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package of the how-to page, with the entry point that it shows."""
    for name, text in files_of(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    shown = re.search(r'aiordt\.transports"\]\n(mine) = "(.*?)"', PAGE.read_text(encoding="utf-8"))
    assert shown is not None
    install(tmp_path, "mine", f"{shown[1]} = {shown[2]}")
    return tmp_path


def run(package: Path, *command: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}", **variables}
    done = subprocess.run(  # noqa: S603  (programs of our own)
        [sys.executable, *command],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chosen(output: str) -> dict[str, str]:
    """The rows of an explanation."""
    rows = re.findall(r"^(?:->|  ) (\w+) +(.*)$", output, re.MULTILINE)
    return dict(rows)


def test_the_transport_of_the_page_keeps_all_promises(package: Path) -> None:
    out = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert "1 passed" in out


def test_an_entry_point_is_a_name_like_any_other(package: Path) -> None:
    program = (
        "import asyncio\n"
        "from aiordt import transports\n"
        "from aiordt.testing import process_pairs\n"
        "async def main():\n"
        "    with process_pairs('mine') as make_pair:\n"
        "        async with await make_pair() as pair:\n"
        "            print(type(pair.link).__name__, transports.names()[-1])\n"
        "asyncio.run(main())\n"
    )
    assert run(package, "-c", program).split() == ["MineLink", "mine"]


def test_two_actors_use_the_transport_of_another_package(cluster: None, package: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    out = run(package, "use_mine.py", RAY_ADDRESS=address)
    reasons = chosen(out)
    assert reasons["mine"] == "usable"
    assert "-> mine" in out
    assert reasons["tcp"] == "usable; mine is preferred"
    assert f"({sum(range(1_000_000))}, ['mine'])" in out.splitlines()
    assert f"({sum(range(1_000))}, ['mine'])" in out.splitlines(), "forced, so it is not inlined"


def test_broken_packages_are_reasons_and_harm_nothing(cluster: None, package: Path) -> None:
    (package / "broken.py").write_text(BROKEN)
    (package / "use_broken.py").write_text(USE_BROKEN)
    install(package, "broken", BROKEN_ENTRIES)
    broken = re.findall(r"^(\w+) =", BROKEN_ENTRIES, re.MULTILINE)
    address = ray.get_runtime_context().gcs_address
    out = run(package, "use_broken.py", ",".join([*broken, "mine", "tcp"]), RAY_ADDRESS=address)
    total, by_transport = json.loads(out.splitlines()[0])
    assert total == sum(range(1_000_000))
    assert by_transport == ["mine"]
    reasons = chosen(out)
    assert reasons["mine"] == "usable"
    for name, words in {
        "absent": "importing it failed: ModuleNotFoundError: No module named 'no_such_module'",
        "nothing": "importing it failed: AttributeError",
        "helper": "is no aiordt.abc.Transport",
        "misnamed": "MineTransport.name is not 'misnamed'",
        "unusable": "there is no such device",
        "raises": "its probe() failed: OSError: no driver",
        "unmakable": "making it failed: RuntimeError: out of queues",
        "abstract": "making it failed: TypeError: Can't instantiate abstract class Abstract",
    }.items():
        assert words in reasons[name], (name, reasons[name])
