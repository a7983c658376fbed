"""What each step of a transfer takes, in microseconds, and what it costs in instructions."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import torch

import aiordt
from aiordt import _wire
from aiordt._runtime import current
from benchmarks._cluster import cluster, end, get, reason, start
from benchmarks._figures import Run
from benchmarks._measure import KIB, MIB
from benchmarks._pages import quiet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._figures import Figures

_INLINE_NBYTES: Final = KIB
_EXPORTED_NBYTES: Final = MIB
_STATE: Final = 1000

AWAIT: Final = "await"
EXPORT: Final = "export"
PARTS: Final = "parts"
CORES: Final = "pure cores"

INLINE: Final = "aiordt: await of an inline ref, 1 KiB"
OWN: Final = "aiordt: await of the owner's own ref, 1 MiB"
PULLED: Final = "aiordt: await of a ref of another process, 1 KiB, cma"
SLEEP: Final = "asyncio.sleep(0)"
HOP: Final = "asyncio.to_thread of nothing"
OBJECT: Final = "await of a Ray object of this process, 1 KiB"
PUT_INLINE: Final = "aiordt: put, 1 KiB, inline"
PUT: Final = "aiordt: put, 1 MiB, and let go"
PUT_SHARED: Final = "aiordt: put of shared memory, 1 MiB, and let go"
PUT_STATE: Final = "aiordt: put of a state dict, a tensor of 1,000"
RAY_PUT: Final = "ray.put, 1 KiB"
LEASE: Final = "aiordt: lease, made ahead"
MARKER: Final = "aiordt: lease, made when it is wanted"
REGISTRY: Final = "aiordt: registry, begin + commit + drop"
ROUTE: Final = "aiordt: route lookup"
ENCODE: Final = "aiordt: wire, encode + seal a pull"
DECODE: Final = "aiordt: wire, open + decode it"
META: Final = "aiordt: wire, pack + unpack a tensor's meta"

#: What runs under callgrind, which is 50 times slower: what imports neither torch nor Ray.
_CORES: Final = {
    ENCODE: "sealer.seal(_wire.encode(1, 1, pull))",
    META: "_wire.unpack_meta(_wire.pack_meta(meta))",
}
_CORES_SETUP: Final = """
import gc, importlib.util, sys, types
gc.disable()
package = types.ModuleType("aiordt")
package.__path__ = importlib.util.find_spec("aiordt").submodule_search_locations
sys.modules["aiordt"] = package  # its own __init__ imports torch and Ray
from aiordt import _wire
pull = _wire.Pull([(bytes(16), 0, None)], 1024, [])
sealer = _wire.Sealer(bytes(32))
meta = _wire.TensorMeta(6, 0, (1024, 1024), None, 0x7F12_3456_7890)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures: rounds, steps of each in a round, and whether callgrind counts."""

    rounds: int
    steps: int
    count: bool

    @classmethod
    def choose(cls, *, quick: bool, rounds: int | None = None) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: There is no round.
        """
        if rounds is not None and rounds < 1:
            raise ValueError("there must be a round")
        return cls(rounds=rounds or (10 if quick else 30), steps=200, count=not quick)


@ray.remote
class _Owner(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()
        self._kept = torch.arange(_INLINE_NBYTES // 4, dtype=torch.int32)

    async def pid(self) -> int:
        return os.getpid()

    async def export(self) -> aiordt.TensorRef:
        return await aiordt.put(self._kept, transport="cma")


@ray.remote
class _Steps(aiordt.AsyncActor):
    def __init__(self) -> None:
        quiet()

    async def pid(self) -> int:
        return os.getpid()

    async def run(self, refs: list[Any], rounds: int, steps: int) -> dict[str, list[float]]:
        """Seconds of each step, by its name: one sample a round, all steps in turns."""
        small = torch.arange(_INLINE_NBYTES // 4, dtype=torch.int32)
        large = torch.zeros(_EXPORTED_NBYTES, dtype=torch.uint8)
        shared = aiordt.empty(_EXPORTED_NBYTES, dtype=torch.uint8)
        state = {str(number): torch.zeros(20 * KIB) for number in range(_STATE)}
        inline, own, theirs = await aiordt.put(small), await aiordt.put(large), refs[0]
        for ref in (inline, theirs):
            if not torch.equal(await ref, small):
                raise RuntimeError("wrong bytes came")
        stored: Any = ray.put(small.numpy())
        runtime = current()
        peer_id = theirs.header.address.runtime_id
        pull = _wire.Pull([(bytes(16), 0, None)], 1024, [])
        meta = theirs.meta
        ours, there = _wire.Sealer(bytes(32)), _wire.Sealer(bytes(32))

        async def awaited(ref: Any) -> None:  # noqa: ANN401
            await ref

        async def put(value: object) -> None:
            await aiordt.put(value)

        def registered() -> None:
            export = runtime.registry.begin([large], "benchmark")
            lease = export.key + b"lease"
            runtime.registry.commit(export, [lease])
            runtime.registry.drop([lease])

        frames: list[bytes] = []

        def encode() -> None:
            frames.append(ours.seal(_wire.encode(1, 1, pull)))

        def decode() -> None:
            _wire.decode(there.open(frames.pop(0)[_wire.HEADER.size :]))

        asked: dict[str, tuple[Callable[[], Awaitable[Any]], int]] = {
            INLINE: (lambda: awaited(inline), steps),
            OWN: (lambda: awaited(own), steps),
            PULLED: (lambda: awaited(theirs), steps),
            SLEEP: (lambda: asyncio.sleep(0), steps),
            HOP: (lambda: asyncio.to_thread(int), steps),
            OBJECT: (lambda: awaited(stored), steps),
            PUT_INLINE: (lambda: put(small), steps),
            PUT: (lambda: put(large), 12),  # as many leases are ready
            PUT_SHARED: (lambda: put(shared), 12),
            PUT_STATE: (lambda: put(state), 1),
            LEASE: (lambda: runtime.markers.take(1), 12),
        }
        done: dict[str, tuple[Callable[[], Any], int]] = {
            RAY_PUT: (lambda: ray.put(small.numpy()), 20),
            MARKER: (lambda: runtime.markers._make(), 20),  # noqa: PLW0108
            REGISTRY: (registered, steps),
            ROUTE: (lambda: runtime.routes.known(peer_id, None), steps),
            ENCODE: (encode, steps),
            DECODE: (decode, steps),
            META: (lambda: _wire.unpack_meta(_wire.pack_meta(meta)), steps),
        }
        samples: dict[str, list[float]] = defaultdict(list)
        for number in range(rounds + 2):
            for name, (ask, count) in asked.items():
                await asyncio.sleep(0.02)  # leases are made ahead, and what was let go is gone
                begun = time.perf_counter()
                for _ in range(count):
                    await ask()
                took = time.perf_counter() - begun
                if number >= 2:  # the first two make all of it warm
                    samples[name].append(took / count / (_STATE if name == PUT_STATE else 1))
            for name, (do, count) in done.items():
                begun = time.perf_counter()
                for _ in range(count):
                    do()
                took = time.perf_counter() - begun
                if number >= 2:
                    samples[name].append(took / count)
            gc.collect()
        return dict(samples)


_GROUPS: Final = {
    AWAIT: (INLINE, OWN, PULLED, SLEEP, HOP, OBJECT),
    EXPORT: (PUT_INLINE, PUT, PUT_SHARED, PUT_STATE, RAY_PUT),
    PARTS: (LEASE, MARKER, REGISTRY, ROUTE),
    CORES: (ENCODE, DECODE, META),
}


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run("What each step takes", dataclasses.asdict(settings))
    a_run.say("starting Ray")
    samples: dict[str, list[float]] = {}
    with cluster():
        a_run.say("steps by turns")
        try:
            samples = measure(settings)
        except (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError) as exc:
            a_run.figures.unavailable["steps"] = reason(exc)
    counted: dict[str, float] = {}
    if settings.count:
        a_run.say("instructions of the pure cores, by callgrind")
        for name, statement in _CORES.items():
            try:
                counted[name] = instructions(statement)
            except (OSError, RuntimeError, subprocess.SubprocessError) as exc:
                a_run.figures.unavailable[f"instructions of {name}"] = reason(exc)
    for group, names in _GROUPS.items():
        for name in names:
            facts = {"instructions": counted[name]} if name in counted else {}
            a_run.figures.add(group, name, samples.get(name, []), **facts)
    return a_run.finish(json_path, plot_path)


def measure(settings: Settings) -> dict[str, list[float]]:
    """Seconds of each step, by its name; Ray has been initialised."""
    owner, steps = start(_Owner), start(_Steps)
    try:
        ref = get(owner.export.remote())
        samples: dict[str, list[float]] = get(
            steps.run.remote([ref], settings.rounds, settings.steps)
        )
        del ref
    finally:
        end([owner, steps])
    return samples


def instructions(statement: str, count: int = 20_000) -> float:
    """Instructions of a statement, by callgrind: of many of it, less those of none.

    Raises:
        RuntimeError: There is no valgrind, or it failed.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed")
    few, many = _instructions(statement, 1), _instructions(statement, 1 + count)
    return (many - few) / count


def _instructions(statement: str, count: int) -> int:
    program = f"{_CORES_SETUP}\nfor _ in range({count}):\n    {statement}\n"
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        done = subprocess.run(  # noqa: S603
            [*command, sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(Path.cwd())},
        )
        found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"callgrind failed: {done.stderr[-200:]}")
    return int(found[1])
