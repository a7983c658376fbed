"""The drivers of `test_two_hosts.py`, run inside host 1.

``drivers.py <scenario> [<address>]`` runs one scenario, ``drivers.py`` those whose names it
reads, with their arguments. Of each there is one line ``RESULT <json>``; what is asserted stands
in the tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

import aiordt
import tests.worker  # noqa: F401  (coverage of this process, too)
from aiordt import _copies, _relay, _runtime
from aiordt.weights import publisher, subscriber
from tests.hosts.flow_scenario import flow_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiordt.weights import Publisher, Subscriber

KIB, MIB = 1 << 10, 1 << 20

#: Maps pages of 0x5A where the owner has its token and its tensor, then waits to be killed.
DECOY = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
for address, nbytes in zip(*[map(int, sys.argv[1:])] * 2):
    first = address & -4096
    size = (address + nbytes - first + 4095) & -4096
    if libc.mmap(first, size, 3, 0x100022, -1, 0) == first:  # private, anonymous, noreplace
        ctypes.memset(first, 0x5A, size)
print(flush=True)
sys.stdin.read()
"""
#: Starts threads until one of them has the owner's process id, then waits to be killed.
THREAD_DECOY = """
import sys, threading
wanted, done = int(sys.argv[1]), threading.Event()
for _ in range(50):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(wanted - 1))
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    if thread.native_id == wanted:
        break
print(thread.native_id, flush=True)
sys.stdin.read()
"""


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    """``nbytes`` bytes, hardly any of them zero, different for each seed."""
    return torch.arange(nbytes // 4, dtype=torch.int32).mul_(40503).add_(seed + (1 << 24))


def strided(kind: str, seed: int) -> torch.Tensor:
    square = pattern(MIB, seed).reshape(512, 512)
    views = {
        "transposed": square.t(),
        "columns": square[:, 1::3],
        "rows": square[5:, 7:],
        "expanded": square[:, :1].expand(512, 64),
    }
    return views[kind]


async def until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        await asyncio.sleep(0.005)


class Node(aiordt.AsyncActor):
    """Owner and consumer in one."""

    def __init__(self, *, relay: bool = False) -> None:
        if not relay:  # then targets fill up as bytes arrive, so that a test can strike midway
            aiordt.configure(relay_nbytes=0)
        self._kept: dict[int, torch.Tensor] = {}
        self._held: Any = None
        self._targets: list[torch.Tensor] = []
        self._pulls: list[asyncio.Task[None]] = []
        self._outcomes: dict[int, tuple[str, str, float]] = {}
        self._decoy: subprocess.Popen[bytes] | None = None
        self._pub: Publisher | None = None
        self._sub: Subscriber | None = None

    async def pid(self) -> int:
        return os.getpid()

    async def strike(self, signum: int) -> None:
        """Let a child send this process a signal once this call has returned."""
        line = f"import os, time; time.sleep(0.05); os.kill({os.getpid()}, {signum})"
        self._decoy = await self._spawn([sys.executable, "-S", "-c", line])

    # --- as an owner

    @aiordt.method
    async def make(self, nbytes: int, seed: int) -> dict[str, torch.Tensor]:
        self._kept[seed] = pattern(nbytes, seed)
        return {"t": self._kept[seed]}

    @aiordt.method
    async def make_strided(self, kind: str, seed: int) -> dict[str, torch.Tensor]:
        self._kept[seed] = strided(kind, seed)
        return {"t": self._kept[seed]}

    async def freed(self, seed: int) -> float:
        """Wait until the tensor is free; says when that was."""
        await aiordt.wait_tensor_freed(self._kept.pop(seed), timeout=40)
        return time.monotonic()

    async def listener(self) -> tuple[str, int]:
        address = _runtime.current().address
        return address.host, address.port

    # --- as a consumer

    async def check(
        self, tree: dict[str, Any], seed: int, kind: str = "", transport: str | None = None
    ) -> dict[str, Any]:
        """Pull ``tree``; say whether it is what `make` made, how, and how fast."""
        before = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
        started = time.perf_counter()
        tensor = (await aiordt.get(tree, transport=transport))["t"]
        seconds = time.perf_counter() - started
        after = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
        moved = {name: n - before.get(name, 0) for name, n in after.items()}
        expected = strided(kind, seed) if kind else pattern(tensor.nbytes, seed)
        return {
            "equal": torch.equal(tensor, expected),
            "moved": {name: nbytes for name, nbytes in moved.items() if nbytes},
            "seconds": seconds,
        }

    async def keeps(self) -> int:
        """Bytes of copies for neighbours."""
        return _runtime.current().relay.nbytes

    async def wait_shared_freed(self) -> None:
        await until(lambda: not aiordt.stats().arena_used_bytes, seconds=20, what="copies' end")

    async def explain(self, tree: dict[str, Any]) -> dict[str, Any]:
        found = await aiordt.explain(tree["t"])
        return {"chosen": found.chosen, "reasons": dict(found.reasons)}

    async def hold(self, tree: Any) -> None:
        self._held = tree

    async def drop(self) -> float:
        self._held = None
        return time.monotonic()

    async def begin(self, trees: list[dict[str, Any]], transport: str | None = None) -> None:
        """Begin to pull each into a target of its own."""
        self._outcomes = {}
        self._targets = [torch.zeros(tree["t"].shape, dtype=torch.int32) for tree in trees]
        self._pulls = [
            asyncio.create_task(self._pull(index, tree, transport))
            for index, tree in enumerate(trees)
        ]

    async def _pull(self, index: int, tree: dict[str, Any], transport: str | None) -> None:
        kind, text = "done", ""
        try:
            await aiordt.get(tree, into={"t": self._targets[index]}, transport=transport)
        except asyncio.CancelledError:
            kind = "CancelledError"
            raise
        except Exception as exc:  # noqa: BLE001  (reported)
            kind, text = type(exc).__name__, str(exc)
        finally:
            self._outcomes[index] = (kind, text, time.monotonic())
            Path("/dev/shm/outcomes").write_text(json.dumps(self._outcomes))  # noqa: ASYNC240, S108

    async def begun(self, count: int | None = None) -> None:
        """Wait until bytes of the first pulls have come; fails if one has ended before."""
        for index, target in enumerate(self._targets[:count]):
            await until(lambda t=target: bool(t[:256].any()), seconds=20, what=f"pull {index}")  # type: ignore[misc]
        if self._outcomes:
            raise RuntimeError(f"pulls ended too early: {self._outcomes}")

    async def outcomes(self) -> list[tuple[str, str, float]]:
        await asyncio.wait(self._pulls)
        return [self._outcomes[index] for index in range(len(self._pulls))]

    async def cancel(self, index: int, settle: float) -> dict[str, Any]:
        """Cancel a pull, and forget it."""
        pull = self._pulls.pop(index)
        pull.cancel()
        await asyncio.wait({pull})
        at_end = self._targets[index].clone()
        await asyncio.sleep(settle)  # no write may come any more
        unchanged = torch.equal(at_end, self._targets.pop(index))
        return {"cancelled": pull.cancelled(), "unchanged": unchanged}

    async def counts(self) -> tuple[int, int, int]:
        stats = aiordt.stats()
        return stats.exports, stats.held_refs, stats.in_flight

    async def cancel_first(self, seeds: list[int], settle: float) -> dict[str, Any]:
        """Cancel the first pull; say what became of it and of the others."""
        started = time.monotonic()
        self._pulls[0].cancel()
        await asyncio.wait({self._pulls[0]})
        seconds = time.monotonic() - started
        at_end = self._targets[0].clone()
        if len(self._outcomes) > 1:
            raise RuntimeError(f"the others ended too early: {self._outcomes}")
        await asyncio.wait(self._pulls)
        await asyncio.sleep(settle)  # no write may come any more
        whole = [
            torch.equal(target, pattern(target.nbytes, seed))
            for target, seed in zip(self._targets, seeds, strict=True)
        ]
        return {
            "seconds": seconds,
            "cancelled": self._pulls[0].cancelled(),
            "unchanged": torch.equal(at_end, self._targets[0]),
            "whole": whole,
            "in_flight": aiordt.stats().in_flight,
        }

    # --- ends of channels

    async def send(self, tx: aiordt.Sender, sizes: list[int], *, stay: bool = False) -> None:
        for seed, nbytes in enumerate(sizes):
            await tx.send({"t": pattern(nbytes, seed), "seed": seed})
        if stay:
            await asyncio.sleep(1000)
        await tx.aclose()

    async def receive(self, rx: aiordt.Receiver) -> dict[str, Any]:
        """Receive to the end; say whether all was what `send` sent, how it came, how it ended."""
        before = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
        equal, error = [], ""
        try:
            async for item in rx:
                tensor = item["t"]
                equal.append(torch.equal(tensor, pattern(tensor.nbytes, item["seed"])))
        except aiordt.AiordtError as exc:
            error = type(exc).__name__
        ended = time.monotonic()
        await rx.aclose()
        after = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
        moved = {name: n - before.get(name, 0) for name, n in after.items()}
        return {
            "equal": equal,
            "moved": {name: nbytes for name, nbytes in moved.items() if nbytes},
            "error": error,
            "ended": ended,
        }

    # --- weights, and several hosts

    async def move(self, name: str) -> None:
        """Have neighbours that moved to the same host only; ``""``: this host's again."""
        here = _copies.meeting_name
        vars(_relay)["meeting_name"] = lambda key: here(key) + name.encode()

    async def publish(self, version: int) -> None:
        """Publish weights, every element of which is ``version``."""
        if self._pub is None:
            self._pub = await publisher("hosts")
        tree = {f"layer{n}": torch.full((MIB // 4,), version, dtype=torch.int32) for n in range(48)}
        await self._pub.publish(tree, version=version)

    async def read(self, version: int) -> dict[str, Any]:
        """Read weights of this version or a later one; by what they came."""
        if self._sub is None:
            self._sub = await subscriber("hosts")
        before = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
        found, tree = await self._sub.latest(version)
        after = {name: entry.nbytes for name, entry in aiordt.stats().by_transport.items()}
        moved = {name: n - before.get(name, 0) for name, n in after.items()}
        equal = all(bool((tensor == found).all()) for tensor in tree.values())
        return {"version": found, "equal": equal, "moved": {n: b for n, b in moved.items() if b}}

    async def close_weights(self) -> None:
        for each in (self._pub, self._sub):
            if each is not None:
                await each.aclose()
        self._pub = self._sub = None

    # --- decoys: what has the owner's process id here, and is not the owner

    async def decoy(self, tree: dict[str, Any], kind: str) -> int:
        """Put something in the owner's place; it ends with this process.

        Returns:
            Its process or thread id.
        """
        ref = tree["t"]
        owner = ref.header.address
        python = [sys.executable, "-S", "-c"]
        if kind == "thread":
            self._decoy = await self._spawn([*python, THREAD_DECOY, str(owner.pid)])
            assert self._decoy.stdout is not None
            return int(self._decoy.stdout.readline())
        places = [owner.token_address, 16, ref.meta.address, ref.nbytes]
        for _ in range(50):
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(owner.pid - 1))  # noqa: ASYNC240
            self._decoy = await self._spawn([*python, DECOY, *map(str, places)])
            if self._decoy.pid == owner.pid:
                break
            self._decoy.kill()
            self._decoy.wait()
        assert self._decoy is not None
        assert self._decoy.stdout is not None
        self._decoy.stdout.readline()
        return self._decoy.pid

    async def end_decoy(self) -> None:
        assert self._decoy is not None
        self._decoy.kill()
        self._decoy.wait()

    async def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe)  # noqa: ASYNC220, S603


Actor: Any = ray.remote(num_cpus=0, max_concurrency=32)(Node)


def shared(host: str) -> Any:
    """The one actor of this host that all scenarios use."""
    return Actor.options(
        name=f"shared-{host}",
        namespace="hosts",
        lifetime="detached",
        get_if_exists=True,
        resources={host: 1},
    ).remote()


def fresh(host: str) -> Any:
    """An actor of this scenario's own, to be killed."""
    return Actor.options(resources={host: 1}).remote()


#: Actors on host 2 that share what they pull; the scenarios of one driver use them in turn.
_neighbours: list[Any] = []


async def neighbours(count: int) -> list[Any]:
    """So many of them, with no copy."""
    while len(_neighbours) < count:
        _neighbours.append(Actor.options(resources={"h2": 1}).remote(relay=True))
    for each in _neighbours:
        await each.wait_shared_freed.remote()
    return _neighbours[:count]


async def begin() -> object:
    """Start the actors that the scenarios share: on slow cores, ten seconds of CPU for each."""
    started = [shared("h1"), shared("h2"), *await neighbours(9)]
    return {"pids": await asyncio.gather(*(each.pid.remote() for each in started))}


async def crossing() -> object:
    owner, (late, *consumers) = shared("h1"), await neighbours(9)
    tree = await owner.make.remote(64 * MIB, 1)
    strided = await owner.make_strided.remote("columns", 2)
    rounds = []
    for _ in range(2):
        found = await asyncio.gather(*(each.check.remote(tree, 1) for each in consumers))
        rounds.append(found)
    rounds.append([await late.check.remote(tree, 1)])
    keeping = await asyncio.gather(*(each.keeps.remote() for each in [*consumers, late]))
    small = await asyncio.gather(*(each.check.remote(strided, 2, "columns") for each in consumers))
    del tree, strided
    await neighbours(9)  # keep nothing any more
    del consumers, late, _neighbours[4:]  # the others need no more, and each costs CPU
    return {"rounds": rounds, "keeping": keeping, "small": small}


def sent() -> int:
    """Bytes that this host has sent over its network device."""
    (row,) = [row for row in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in row]
    return int(row.split(":")[1].split()[8])


async def weights_to_many() -> object:
    """Weights from host 1 to four readers that are as on hosts of their own."""
    owner, readers = shared("h1"), await neighbours(4)
    for number, each in enumerate(readers):
        await each.move.remote(f"host {number}")
    rounds = []
    for version in (1, 2):
        reading = [each.read.remote(version) for each in readers]
        before = sent()
        await owner.publish.remote(version)
        found = await asyncio.gather(*reading)
        rounds.append({"found": found, "sent": sent() - before})
    for each in readers:
        await each.move.remote("")
        await each.close_weights.remote()
    await owner.close_weights.remote()
    return {"rounds": rounds}


async def broadcast() -> object:
    """From host 1 to four actors of host 2; then as if these were on hosts of their own."""
    owner, others = shared("h1"), await neighbours(4)
    rounds = []
    for seed, apart in enumerate((False, True)):
        for number, each in enumerate(others):
            await each.move.remote(f"host {number}" if apart else "")
        tree = await owner.make.remote(48 * MIB, seed)
        before = sent()
        _, *trees = await aiordt.broadcast_refs(tree, [owner, *others])
        found = sent() - before
        checks = [each.check.remote(one, seed) for each, one in zip(others, trees, strict=True)]
        rounds.append({"sent": found, "found": await asyncio.gather(*checks)})
        del tree, trees
    for each in others:
        await each.move.remote("")
    return {"rounds": rounds}


async def neighbour_ends(signum: signal.Signals) -> object:
    """The first ends, or stands still, in the middle of its transfer."""
    owner, consumers = shared("h1"), await neighbours(3)
    pids = await asyncio.gather(*(each.pid.remote() for each in consumers))
    await asyncio.gather(*(each.check.remote(owner.make.remote(MIB, 5), 5) for each in consumers))
    tree = await owner.make.remote(48 * MIB, 1)
    pulls = [asyncio.ensure_future(each.check.remote(tree, 1)) for each in consumers]
    kept = [0]
    while max(kept) <= MIB:  # what they kept of the trees before may not be gone yet
        kept = await asyncio.gather(*(each.keeps.remote() for each in consumers))
    (first,) = [index for index, nbytes in enumerate(kept) if nbytes > MIB]
    await consumers[first].strike.remote(int(signum))
    _neighbours.remove(consumers[first])
    others = [await pull for index, pull in enumerate(pulls) if index != first]
    return {"pids": pids, "first": first, "others": others}


async def neighbour_killed() -> object:
    return await neighbour_ends(signal.SIGKILL)


async def neighbour_stopped() -> object:
    return await neighbour_ends(signal.SIGSTOP)


async def shared_owner_killed() -> object:
    owner, consumers = fresh("h1"), await neighbours(3)
    tree = await owner.make.remote(48 * MIB, 1)
    pid = await owner.pid.remote()
    for each in consumers:
        await each.begin.remote([tree])
    kept = [0]
    while not any(kept):
        kept = await asyncio.gather(*(each.keeps.remote() for each in consumers))
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = [await each.outcomes.remote() for each in consumers]
    return {"ended": [(kind, text, when - killed) for ((kind, text, when),) in ended]}


async def sizes() -> object:
    owner, consumer = shared("h1"), shared("h2")
    result: dict[str, Any] = {}
    for seed, nbytes in enumerate((KIB, 100 * KIB, MIB, 64 * MIB)):
        result[str(nbytes)] = await consumer.check.remote(owner.make.remote(nbytes, seed), seed)
    for seed, kind in enumerate(("transposed", "columns", "rows", "expanded"), 10):
        made = owner.make_strided.remote(kind, seed)
        result[kind] = await consumer.check.remote(made, seed, kind)
    tree = owner.make.remote(64 * MIB, 20)
    times = [(await consumer.check.remote(tree, 20))["seconds"] for _ in range(5)]
    ucx = await consumer.check.remote(tree, 20, transport="ucx")
    back = await owner.check.remote(consumer.make.remote(MIB, 21), 21)
    return {
        "results": result,
        "back": back,
        "ucx": ucx,
        "seconds": times,
        "explained": await consumer.explain.remote(tree),
    }


async def proof() -> object:
    consumers = {"process": fresh("h2"), "thread": fresh("h2")}  # the way is proved once
    kept = aiordt.empty((MIB // 4,), dtype=torch.int32).copy_(pattern(MIB, 1))
    tree = {"t": await aiordt.put(kept)}  # this process's id was chosen by the test
    absent = await shared("h2").explain.remote(tree)
    result: dict[str, Any] = {"pid": os.getpid(), "absent": absent}
    for kind, consumer in consumers.items():
        decoy = await consumer.decoy.remote(tree, kind)
        explained = await consumer.explain.remote(tree)
        result[kind] = {**explained, "pid": decoy, **await consumer.check.remote(tree, 1)}
        result[kind]["forced"] = await forced(consumer, tree)
        await consumer.end_decoy.remote()
    return result


async def forced(consumer: Any, tree: Any) -> dict[str, str]:
    """What comes of pulling the first pattern by each transport."""
    found = {}
    for name in ("cma", "shm", "nixl", "ucx"):
        try:
            checked = await consumer.check.remote(tree, 1, transport=name)
            found[name] = f"equal: {checked['equal']}, moved: {checked['moved']}"
        except aiordt.UnavailableError as exc:
            found[name] = exc.reason
    return found


async def container() -> object:
    node = shared("h1")
    mine = {"t": await aiordt.put(pattern(MIB, 1))}
    theirs = await node.make.remote(MIB, 2)
    found = await aiordt.explain(theirs["t"])
    tensor = (await aiordt.get(theirs))["t"]
    return {
        "pid": os.getpid(),
        "node": {**await node.explain.remote(mine), **await node.check.remote(mine, 1)},
        "driver": {
            "chosen": found.chosen,
            "reasons": dict(found.reasons),
            "equal": torch.equal(tensor, pattern(MIB, 2)),
        },
    }


async def lifetime() -> object:
    owner, consumer = shared("h1"), fresh("h2")
    result = {}
    for seed, end in enumerate(("drop", "kill")):
        made = owner.make.remote(2 * MIB, seed)
        await consumer.hold.remote(made)
        del made
        freed = asyncio.ensure_future(owner.freed.remote(seed))
        early, _ = await asyncio.wait({freed}, timeout=0.5)
        if end == "drop":
            ended = await consumer.drop.remote()
        else:
            ended = time.monotonic()
            ray.kill(consumer)  # SIGKILL, by its raylet
        result[end] = {"early": bool(early), "seconds": await freed - ended}
    return result


async def owner_killed() -> object:
    owner, other, consumer = fresh("h1"), shared("h1"), shared("h2")
    trees = [await owner.make.remote(64 * MIB, seed) for seed in range(3)]
    pid = await owner.pid.remote()
    await consumer.begin.remote(trees)
    await consumer.begun.remote()
    os.kill(pid, signal.SIGKILL)  # the same pid namespace
    killed = time.monotonic()
    ended = [(kind, text, when - killed) for kind, text, when in await consumer.outcomes.remote()]
    again = await consumer.check.remote(other.make.remote(4 * MIB, 9), 9)
    return {"ended": ended, "again": again}


async def channel() -> object:
    sender, near, far = shared("h1"), fresh("h1"), shared("h2")
    sizes = [KIB, 64 * KIB, MIB, 24 * MIB, 4] * 3
    tx, rxs = await aiordt.channel(sender, [far, near], capacity=8 * MIB)
    sent = sender.send.remote(tx, sizes)
    result = {"far": far.receive.remote(rxs[0]), "near": near.receive.remote(rxs[1])}
    found: dict[str, Any] = {name: await ref for name, ref in result.items()}
    await sent
    tx, rx = await aiordt.channel(near, far)
    gone = near.send.remote(tx, [KIB, MIB], stay=True)
    received = far.receive.remote(rx)
    await asyncio.sleep(0.5)
    killed = time.monotonic()
    ray.kill(near)
    found["killed"] = await received
    found["killed"]["seconds"] = found["killed"]["ended"] - killed
    await asyncio.wait({asyncio.ensure_future(gone)})
    return {**found, "nbytes": sum(sizes)}


async def cancel() -> object:
    owner, consumer = shared("h1"), shared("h2")
    trees = [await owner.make.remote(48 * MIB, seed) for seed in range(2)]
    await consumer.begin.remote(trees)
    await consumer.begun.remote()
    result = await consumer.cancel_first.remote([0, 1], 0.2)
    again = await consumer.check.remote(trees[0], 0)
    return {**result, "again": again}


async def link() -> object:
    owner, consumer = shared("h1"), shared("h2")
    tree = await owner.make.remote(256 * MIB, 1)
    await consumer.begin.remote([tree])
    await consumer.begun.remote()
    print("BEGUN", flush=True)  # noqa: T201  (the test cuts the link)
    restored = Path("/dev/shm/restored")  # noqa: S108
    await until(restored.exists, seconds=60, what="the link's return")
    started = time.monotonic()
    outcomes = await consumer.outcomes.remote()
    reached = time.monotonic() - started
    again = await consumer.check.remote(tree, 1)
    made = owner.make.remote(4 * MIB, 2)
    new = await consumer.check.remote(made, 2)
    return {"outcomes": outcomes, "reached": reached, "again": again, "new": new}


async def partition(transport: str) -> object:
    """Both hosts live, and for a while do not see each other."""
    owner, reader = shared("h2"), shared("h1")
    trees = [await owner.make.remote(48 * MIB, seed) for seed in range(2)]
    freed = [asyncio.ensure_future(owner.freed.remote(seed)) for seed in range(2)]
    await reader.begin.remote(trees, transport)
    await reader.begun.remote(1)  # UCX brings one after the other
    print("BEGUN", flush=True)  # noqa: T201  (the test cuts the link)
    await until(Path("/dev/shm/cut").exists, seconds=60, what="the cut")  # noqa: S108
    result: dict[str, Any] = {}
    async with asyncio.timeout(10):
        result["cancelled"] = await reader.cancel.remote(1, 0.1)
        (result["under way"],) = await reader.outcomes.remote()
    async with asyncio.timeout(10):
        await reader.begin.remote(trees[:1], transport)
        (result["begun meanwhile"],) = await reader.outcomes.remote()
    print("ENDED", flush=True)  # noqa: T201  (the test mends it)
    await until(Path("/dev/shm/restored").exists, seconds=60, what="the link's return")  # noqa: S108
    result["again"] = [
        await reader.check.remote(tree, seed, transport=transport)
        for seed, tree in enumerate(trees)
    ]
    result["early"] = [each.done() for each in freed]
    del trees
    async with asyncio.timeout(40):  # who was being told of a claim as the link broke waits for TCP
        await asyncio.gather(*freed)
    result["counts"] = [await each.counts.remote() for each in (owner, reader)]
    return result


async def host_lost() -> object:
    here, there = shared("h1"), fresh("h2")
    made = here.make.remote(2 * MIB, 1)
    await there.hold.remote(made)
    del made
    freed = asyncio.ensure_future(here.freed.remote(1))
    trees = [await there.make.remote(256 * MIB, 2)]
    await here.begin.remote(trees)
    await here.begun.remote()
    print("BEGUN", flush=True)  # noqa: T201  (the test ends the host)
    early, _ = await asyncio.wait({freed}, timeout=0.1)
    return {
        "early": bool(early),
        "outcomes": await here.outcomes.remote(),
        "freed": await freed,
        "again": await here.check.remote(shared("h1").make.remote(MIB, 3), 3),
    }


async def listeners() -> object:
    owner, consumer = shared("h1"), shared("h2")
    result = [await actor.listener.remote() for actor in (owner, consumer)]
    host, port = result[0]
    bound = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:  # noqa: ASYNC240
            fields = line.split()
            address, _, hexport = fields[1].partition(":")
            if fields[3] == "0A" and int(hexport, 16) == port:
                bound.append(socket.inet_ntoa(bytes.fromhex(address)[::-1]))
    with socket.socket() as sock:
        loopback = sock.connect_ex(("127.0.0.1", port))
    with socket.socket() as sock:
        own = sock.connect_ex((host, port))
    return {"listeners": result, "bound": bound, "loopback": loopback, "own": own}


SCENARIOS = {
    function.__name__: function
    for function in (
        begin,
        crossing,
        weights_to_many,
        broadcast,
        neighbour_killed,
        neighbour_stopped,
        shared_owner_killed,
        sizes,
        proof,
        container,
        lifetime,
        owner_killed,
        channel,
        cancel,
        link,
        partition,
        listeners,
        flow_graph,
        host_lost,
    )
}


def use_node_by_address(address: str) -> None:
    """Let this driver attach to the node there: Ray looks for its process, which is hidden."""
    gcs = ray._raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
    node_ids = [
        node_id.hex()
        for node_id, info in gcs.get_all_node_info().items()
        if info.node_manager_address == address
    ]
    ray._private.services.find_node_ids = lambda: node_ids


def main() -> None:
    names, address = sys.argv[1:2], sys.argv[2:]
    if address:
        use_node_by_address(*address)
    ray.init(namespace="hosts", log_to_driver=False)
    for line in names or sys.stdin:
        name, *arguments = line.split()
        result = asyncio.run(SCENARIOS[name](*arguments))
        print("\nRESULT", json.dumps(result), flush=True)  # noqa: T201
    ray.shutdown()


if __name__ == "__main__":
    main()
