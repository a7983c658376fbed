"""Runtimes come and go with Ray sessions, event loops and processes; each test is a process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray

from tests.support import PROGRAM_SECONDS

ROOT = Path(__file__).parent.parent.parent

_HEAD = """
import asyncio, gc, os, sys, threading, time, warnings
import ray, torch, aiordt

def init():
    ours = dict(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    ray.init(logging_level="ERROR", log_to_driver=False,
             **({} if "RAY_ADDRESS" in os.environ else ours))

@ray.remote(num_cpus=0)
class Node(aiordt.AsyncActor):
    @aiordt.method
    async def make(self):
        return torch.arange(500_000.0)
    async def total(self, refs):
        return float((await aiordt.get(refs))[0].sum())

WANT = float(torch.arange(500_000.0).sum())
"""


@pytest.fixture
def address(cluster: None) -> str:
    """Of the cluster of all tests, where one of its own makes no difference."""
    return str(ray.get_runtime_context().gcs_address)


def script(body: str, **environment: str) -> str:
    """Run a driver to its end; what it printed. Nothing may come on standard error."""
    source = _HEAD + textwrap.dedent(body)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error::ResourceWarning:aiordt", "-c", source],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    noise = [line for line in done.stderr.splitlines() if "aiordt" in line or "Traceback" in line]
    assert not noise, done.stderr[-3000:]
    return done.stdout


def test_repeated_asyncio_run_and_two_sessions() -> None:
    out = script("""
        async def use():
            node = Node.remote()
            ref = await node.make.remote()
            tensor = await ref
            mine = await aiordt.put(tensor)
            assert await node.total.remote([mine]) == WANT
            del mine
            await aiordt.wait_tensor_freed(tensor, 10)
            return node, ref

        init()
        node, old = asyncio.run(use())
        asyncio.run(use())
        held = asyncio.run(aiordt.put(torch.ones(500_000)))
        ray.shutdown()

        async def stale():
            for ref in (old, held):
                for use in (aiordt.get, aiordt.explain):
                    try:
                        await use(ref)
                    except aiordt.ClosedError as exc:
                        print("closed:", exc)
            try:
                await aiordt.put(torch.ones(3))
            except aiordt.UsageError as exc:
                assert "ray.init" in str(exc), exc
        asyncio.run(stale())
        assert aiordt.stats().exports == 0
        deadline = time.monotonic() + 10
        while any(thread.name == "aiordt-io" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "the old session's runtime lives on"
            time.sleep(0.05)
        aiordt.configure(inline_nbytes=1000)

        init()
        asyncio.run(use())

        async def still_stale():
            for ref in (old, held):
                try:
                    await ref
                except aiordt.ClosedError as exc:
                    print("closed:", exc)
        asyncio.run(still_stale())
        ray.shutdown()
        """)
    assert out.count("closed:") == 6


def test_exit_is_quiet_and_quick_with_everything_open() -> None:
    started = time.monotonic()
    out = script("""
        init()
        async def main():
            node = Node.remote()
            refs = [await node.make.remote() for _ in range(3)]
            await refs[0]
            await aiordt.get(refs[1], transport="tcp")
            global kept
            kept = (refs, await aiordt.put(torch.ones(500_000)), node)
            asyncio.ensure_future(aiordt.wait_tensor_freed(await kept[1]))
            await asyncio.sleep(0)
        asyncio.run(main())
        print("end", time.time())
        """)
    ended = float(out.split()[1])
    assert time.time() - ended < 15
    assert time.monotonic() - started < 75


def test_exit_without_shutdown_in_the_middle_of_a_pull(address: str) -> None:
    out = script(
        """
        init()
        async def main():
            node = Node.remote()
            ref = await node.make.remote()
            task = asyncio.ensure_future(aiordt.get(ref, transport="tcp"))
            await asyncio.sleep(0.001)
            print("leaving", flush=True)
            sys.exit(0)
        asyncio.run(main())
        """,
        RAY_ADDRESS=address,
    )
    assert "leaving" in out


def test_shutdown_while_a_wait_is_pending_ends_it(address: str) -> None:
    out = script(
        """
        async def main():
            init()
            tensor = torch.ones(500_000)
            ref = await aiordt.put(tensor)
            task = asyncio.ensure_future(aiordt.wait_tensor_freed(tensor))
            await asyncio.sleep(0)
            await asyncio.to_thread(ray.shutdown)
            try:
                await asyncio.wait_for(task, 20)
            except aiordt.ClosedError as exc:
                print("closed:", exc)
        asyncio.run(main())
        """,
        RAY_ADDRESS=address,
    )
    assert "closed:" in out


@pytest.mark.parametrize("how", ["to_thread", "on_the_loop", "at_exit"])
def test_ray_shuts_down_after_aiordt_has_left_it(address: str, how: str) -> None:  # SES-1
    out = script(
        """
        import os, threading, time
        from ray._private import worker

        put, disconnect, making, begun = ray.put, worker.disconnect, [], threading.Event()

        def slow_put(value):
            making.append(None)
            begun.set()
            time.sleep(0.3)
            try:
                return put(value)
            finally:
                making.pop()

        def watched_disconnect(*args):
            ours = [each.name for each in threading.enumerate() if each.name == "aiordt-io"]
            print("in Ray:", len(making), "threads:", ours)
            disconnect(*args)

        async def main():
            init()
            ray.put, worker.disconnect = slow_put, watched_disconnect
            tensor = torch.ones(500_000)
            ref = await aiordt.put(tensor)
            begun.clear()
            await asyncio.to_thread(begun.wait)  # one that is made ahead
            task = asyncio.ensure_future(aiordt.wait_tensor_freed(tensor))
            await asyncio.sleep(0)
            if os.environ["HOW"] == "to_thread":
                await asyncio.to_thread(ray.shutdown)
            elif os.environ["HOW"] == "on_the_loop":
                ray.shutdown()
            else:
                task.cancel()
            try:
                await asyncio.wait_for(task, 20)
            except aiordt.ClosedError as exc:
                print("closed:", exc)
            except asyncio.CancelledError:
                return
            try:
                await aiordt.put(tensor)
            except aiordt.UsageError as exc:
                print("refused:", exc)
        asyncio.run(main())
        """,
        RAY_ADDRESS=address,
        HOW=how,
    )
    assert "in Ray: 0 threads: []" in out
    if how != "at_exit":
        assert "closed:" in out
        assert "refused: Ray is not initialized" in out


def test_without_ray_and_configure(address: str) -> None:
    out = script(
        """
        async def main():
            try:
                await aiordt.put(torch.ones(3))
            except aiordt.UsageError as exc:
                print("1", exc)
            assert await aiordt.get({"plain": 3}) == {"plain": 3}
            await aiordt.wait_tensor_freed(torch.ones(3))
            for bad in ({"nonsense": 1}, {"inline_nbytes": -1}, {"transports": ("smoke",)},
                        {"inline_nbytes": "many"}, {"transports": "cma"}):
                try:
                    aiordt.configure(**bad)
                except aiordt.UsageError:
                    print("refused")
            aiordt.configure(inline_nbytes=0, transports=["tcp"])
            init()
            node = Node.remote()
            ref = await aiordt.put(torch.ones(3))
            print((await aiordt.explain(await node.make.remote())).chosen, aiordt.stats().exports)
            try:
                aiordt.configure(inline_nbytes=5)
            except aiordt.UsageError as exc:
                print("2", exc)
            assert await node.total.remote([ref]) == 3.0
        asyncio.run(main())
        ray.shutdown()
        """,
        RAY_ADDRESS=address,
    )
    assert "1 Ray is not initialized" in out
    assert out.count("refused") == 5
    assert "tcp 1" in out
    assert "2 configure() came too late" in out


def test_import_and_idle_runtime_cost_nothing(address: str) -> None:
    out = script(
        """
        init()
        async def main():
            ref = await aiordt.put(torch.ones(500_000))
            node = Node.remote()
            assert await node.total.remote([ref]) == 500_000.0
            await asyncio.sleep(0.5)
            def used():
                spent = {}
                for tid in os.listdir("/proc/self/task"):
                    with open(f"/proc/self/task/{tid}/stat") as file:
                        fields = file.read().rsplit(")", 1)[1].split()
                    spent[tid] = int(fields[11]) + int(fields[12])
                return spent
            ids = {thread.native_id for thread in threading.enumerate()
                   if thread.name.startswith("aiordt")}
            first = used()
            await asyncio.sleep(4)
            second = used()
            ours = sum(second[t] - first.get(t, 0) for t in second if int(t) in ids)
            print("threads", len(ids), "ticks", ours)
        asyncio.run(main())
        ray.shutdown()
        """,
        RAY_ADDRESS=address,
    )
    words = out.split()
    assert int(words[1]) >= 2
    assert int(words[3]) <= 4, "aiordt's threads used over 1 % of a core while idle"
