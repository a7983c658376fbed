"""Owners in namespaces of their own, as in containers of this host: who claims to be near, and is.

All are on one booted kernel, so that their host ids are the same, and the process ids of one
namespace are others' in the next. Two hosts with a network each: tests/hosts.
"""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Final

import pytest
import torch

from aiordt._errors import UnavailableError
from aiordt.abc import Part, SharedLink
from aiordt.testing import ServingProcess
from aiordt.testing._process import _Half
from aiordt.transports import probe

#: With a /dev/shm of its own; runs its arguments.
PRIVATE: Final = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
PIDS: Final = ["--pid", "--fork", "--kill-child", "--mount-proc"]
WAYS: Final = ("cma", "shm", "nixl", "ucx", "tcp")
#: By namespaces, those of unshare(1) and what it is to run, and the ways that are left.
CASES: Final = {
    "pid": (PIDS, {"shm", "ucx", "tcp"}),
    "ipc": (["--ipc"], {"cma", "shm", "ucx", "tcp"}),
    "mount": (["--mount", *PRIVATE], {"cma", "shm", "nixl", "ucx", "tcp"}),
    "container": ([*PIDS, "--ipc", *PRIVATE], {"shm", "ucx", "tcp"}),
}


@cache
def unavailable() -> str:
    """Why no namespaces can be made here; empty if they can."""
    try:
        command = ["unshare", *CASES["container"][0], "true"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as exc:
        return f"no namespaces can be made here, it takes root: {exc}"
    return ""


pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.mark.parametrize("namespaces", CASES)
async def test_what_claims_to_be_near_is_read_or_refused(namespaces: str) -> None:  # CMA-1, NIX-1
    options, usable = CASES[namespaces]
    source = torch.arange(1 << 18, dtype=torch.int32)
    refused = {}
    owner = ServingProcess(within=["unshare", *options])
    half = _Half()
    try:
        assert owner.address.host_id == half.address.host_id
        if "--pid" in options:
            assert owner.address.pid != owner.process.pid, "its id there is another one here"
        for name in filter(lambda name: probe(name).usable, WAYS):
            try:
                link = await half.connect(name, owner.address)
            except UnavailableError as exc:
                refused[name] = exc.reason
                continue
            for nbytes in (64, source.nbytes):
                some = source[: nbytes // 4]
                (there,) = owner.export([some], shared=isinstance(link, SharedLink))
                target = torch.zeros_like(some)
                part = Part(
                    *(there.key, there.index, there.address, target.data_ptr(), nbytes),
                    segment=there.segment,
                    tensor=target,
                )
                if not link.read_nowait([part]):
                    await link.read([part])
                assert torch.equal(target, some), name
            await link.aclose()
    finally:
        await half.aclose()
        owner.close()
    assert set(refused) == {name for name in WAYS if probe(name).usable} - usable
    if {"cma", "nixl"} <= set(refused):
        assert refused["cma"] in refused["nixl"], "it is not tried for seconds"
