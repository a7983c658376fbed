"""Graphs on workers: what they give, once, and how they end."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch
from typing_extensions import override

import aiordt
from aiordt import flow
from tests.support import MIB, NodeActor, arange, eventually, forget, kill

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NBYTES = MIB


@pytest.fixture
async def context(cluster: None) -> AsyncIterator[flow.Context]:
    """Two workers, which all tests share; afterwards they have nothing to do and hold nothing."""
    async with flow.Context(workers=2) as made:
        yield made
    gc.collect()
    await eventually(lambda: not made.cluster.groups, what="nothing counts any more")  # FLW-2
    assert all(not remote.active for remote in made.pool.workers)
    for remote in made.pool.workers:
        await eventually(partial(holds_nothing, remote), what="a worker holds nothing")


@pytest.fixture(scope="module", autouse=True)
def _release(cluster: None) -> Any:
    yield
    asyncio.run(flow.release_workers())


async def holds_nothing(remote: Any) -> bool:
    try:
        return bool(await remote.handle.__ray_call__.remote(exports) == 0)
    except ray.exceptions.RayActorError:
        return True


def exports(_actor: Any = None) -> int:
    gc.collect()
    return aiordt.stats().exports


def note(path: str, text: str = "") -> None:
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def lines(path: Any) -> list[str]:
    path = Path(path)
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def base() -> torch.Tensor:
    return arange(NBYTES)


def add(amount: int, x: torch.Tensor) -> torch.Tensor:
    return x + amount


async def add_async(amount: int, x: torch.Tensor) -> torch.Tensor:
    await asyncio.sleep(0)
    return x + amount


add_remote = ray.remote(add)


async def total(_node: Any, *refs: Any) -> float:
    return float(sum(tensor.sum() for tensor in await aiordt.get(list(refs))))


# --- what comes out ------------------------------------------------------------------------


async def test_a_graph(context: flow.Context, nodes: Any) -> None:
    many = flow.Broadcast(base, 4)
    first = flow.Map(add, many, args=[[i] for i in range(4)])
    second = flow.Map(add_async, first, args=[[10]] * 4)
    third = flow.Map(add_remote, second, args=[[100]] * 4)
    out = flow.ReduceActors(NodeActor.run, nodes, third, args=[[total]] * 3)
    expected = sum(float((base() + i + 110).sum()) for i in range(4))
    assert await out == [expected] * 3
    refs = await third
    assert all(isinstance(ref, aiordt.TensorRef) for ref in refs)
    assert torch.equal(await refs[2], base() + 112)
    workers = {remote.actor_id for remote in context.pool.workers}
    assert {ref.owner.actor_id for ref in refs} <= workers
    assert all(where is not None and where.rule == "data" for where in second.placements)
    assert "[3]" in third.explain()
    assert len(workers) <= 2
    gathered = await flow.Gather(third)
    assert torch.equal(gathered[3], base() + 113)


def spread() -> tuple[int, torch.Tensor]:
    return os.getpid(), arange(4 * NBYTES)


def write(amount: int, given: tuple[int, torch.Tensor]) -> tuple[int, torch.Tensor]:
    maker, x = given
    time.sleep(0.1)  # so that each worker gets some
    if maker != os.getpid():  # there it is the broadcast itself
        x += amount
    return os.getpid(), x[NBYTES:]


async def pulled(context: flow.Context) -> int:
    workers = [remote.handle for remote in context.pool.workers]
    ask = [worker.__ray_call__.remote(lambda _: aiordt.stats().bytes_pulled) for worker in workers]
    return sum(await asyncio.gather(*ask))


async def test_a_broadcast_is_not_copied_within_a_host(context: flow.Context) -> None:
    many = flow.Broadcast(spread, 6)
    maker, _ = (await many)[0]
    before = await pulled(context)
    found = await flow.Map(write, many, args=[[amount] for amount in range(6)])
    assert await pulled(context) == before
    elsewhere = [amount for amount, (where, _) in enumerate(found) if where != maker]
    assert elsewhere, "not all ran beside it"
    for amount in elsewhere:
        assert torch.equal(await found[amount][1], arange(4 * NBYTES)[NBYTES:] + amount)
    assert torch.equal(await (await many)[5][1], arange(4 * NBYTES)), "what others write is theirs"


async def keep_all(node: Any, *refs: aiordt.TensorRef) -> tuple[int, float]:
    before = aiordt.stats().bytes_pulled
    node.kept["all"] = await aiordt.get(list(refs))
    for tensor in node.kept["all"]:
        tensor[0] += 1  # it is as good as a copy
    return aiordt.stats().bytes_pulled - before, total_of(node)


def total_of(node: Any) -> float:
    return float(sum(tensor.sum() for tensor in node.kept["all"]))


async def test_what_all_actors_get_is_not_copied_within_a_host(
    context: flow.Context, nodes: Any
) -> None:
    made = flow.Map(add, [base(), base()], args=[[1], [2]])
    copies = [base() + 1, base() + 2]
    for copy in copies:
        copy[0] += 1
    wanted = float(sum(copy.sum() for copy in copies))
    found = await flow.ReduceActors(NodeActor.run, nodes, made, args=[[keep_all]] * 3)
    assert found == [(0, wanted)] * 3
    assert torch.equal(await (await made)[1], base() + 2), "what others write is theirs"
    del made
    gc.collect()
    held = [await worker.handle.__ray_call__.remote(exports) for worker in context.pool.workers]
    assert sum(held) == 2, "the actors use them"
    assert await nodes[0].run.remote(total_of) == wanted
    for node in nodes:
        await node.run.remote(forget)


def kinds() -> dict[str, Any]:
    t = arange(2 * NBYTES)
    weight = torch.nn.Parameter(torch.ones(NBYTES))
    return {"all": t, "part": t[10:NBYTES], "weight": weight, "array": t.numpy() + 1, "one": 1}


def check_kinds(given: dict[str, Any]) -> str:
    assert given["part"].data_ptr() == given["all"][10:].data_ptr(), "they share memory"
    assert torch.equal(given["all"], arange(2 * NBYTES))
    assert isinstance(given["weight"], torch.nn.Parameter)
    assert given["weight"].sum() == NBYTES
    given["array"][5] = 3
    return type(given["array"]).__name__


async def test_a_broadcast_of_many_kinds(context: flow.Context) -> None:
    assert await flow.Map(check_kinds, flow.Broadcast(kinds, 4)) == ["ndarray"] * 4


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE


def fill(_: object) -> int:
    tensors = [torch.ones(2 * NBYTES) for _ in range(20)]
    return len(tensors)


async def test_an_idle_worker_gives_memory_back(context: flow.Context) -> None:
    await flow.Map(fill, [0, 0])
    pids = [await r.handle.__ray_call__.remote(lambda _: os.getpid()) for r in context.pool.workers]
    full = [resident(pid) for pid in pids]
    for _ in range(2):
        await flow.Map(fill, [0] * 4)
    assert all(resident(pid) < size + 64 * MIB for pid, size in zip(pids, full, strict=True))

    def small() -> bool:
        return any(resident(pid) < size - 100 * MIB for pid, size in zip(pids, full, strict=True))

    await eventually(small, what="what is not used goes back")


async def test_each_part_is_run_once(context: flow.Context, tmp_path: Path) -> None:  # SHR-1, ELM-1
    path = str(tmp_path / "calls")

    def noting(x: int) -> int:
        note(path, str(x))
        return x * 2

    doubled = flow.Map(noting, [1, 2, 3])
    fours = flow.Map(noting, doubled)
    eights = flow.Map(noting, doubled)
    assert lines(path) == [], "building runs nothing"
    found = await asyncio.gather(fours, eights, fours.eval(), *(doubled.eval() for _ in range(3)))
    assert found[0] == found[1] == found[2] == [4, 8, 12]
    assert sorted(map(int, lines(path))) == [1, 2, 2, 2, 3, 4, 4, 6, 6]
    assert await doubled == [2, 4, 6]
    assert len(lines(path)) == 9


def give(kind: str) -> Any:
    return {
        "none": None,
        "plain": [1, "two"],
        "tree": {"a": arange(NBYTES), "b": [torch.ones(3), 4]},
        "array": arange(NBYTES).numpy(),
    }[kind]


async def test_what_functions_return(context: flow.Context) -> None:
    none, plain, tree, array = await flow.Map(give, ["none", "plain", "tree", "array"])
    assert none is None
    assert plain == [1, "two"]
    assert isinstance(tree["a"], aiordt.TensorRef)
    got = await aiordt.get(tree)
    assert torch.equal(got["a"], arange(NBYTES))
    assert torch.equal(got["b"][0], torch.ones(3))
    assert got["b"][1] == 4
    assert (await array == arange(NBYTES).numpy()).all()


async def numbers() -> Any:
    for number in range(3):
        yield number


def mean(x: Any, *more: Any) -> float:
    return float(torch.as_tensor(x, dtype=torch.float64).mean()) + sum(more)


def keep(node: Any) -> torch.Tensor:
    node.kept["t"] = arange(NBYTES)
    tensor: torch.Tensor = node.kept["t"]
    return tensor


async def test_what_inputs_may_be(context: flow.Context, nodes: Any) -> None:
    expected = mean(arange(NBYTES))
    running = nodes[0].make.remote(keep)
    held = await nodes[1].make.remote(keep)
    plain = ray.put(arange(4 * MIB).numpy())
    inputs = [running, held, arange(NBYTES), plain, 7]
    assert await flow.Map(mean, inputs) == [expected] * 3 + [mean(arange(4 * MIB)), 7]
    assert await flow.Map(mean, ray.put([1, 2])) == [1, 2]
    assert await flow.Map(mean, numbers()) == [0, 1, 2]
    assert await flow.Map(mean, range(2)) == [0, 1]
    several = flow.Map(mean, (flow.Source([1, 2]), [10, 20], flow.Broadcast(int, 2)))
    assert await several == [11, 22]
    assert await flow.Map(mean, []) == []
    assert await flow.Broadcast(base, 0) == []
    assert await flow.ReduceActors("run", [], [1]) == []
    assert len(await flow.Broadcast(mean, 1, args=[held])) == 1
    with pytest.raises(aiordt.UsageError, match="not of a list"):
        await flow.Map(mean, ray.put(5))


def cut(n: int, x: torch.Tensor) -> Any:
    return x.tensor_split(n)


def joined(pieces: list[torch.Tensor]) -> float:
    return float(torch.cat(pieces).sum())


async def test_shuffle(context: flow.Context, nodes: Any) -> None:
    sources = flow.Map(add, [arange(NBYTES)] * 4, args=[[i] for i in range(4)])
    parts = flow.Shuffle(cut, sources, 3, args=[[3]] * 4)
    expected = [
        sum(float((base() + i).tensor_split(3)[j].sum(dtype=torch.float32)) for i in range(4))
        for j in range(3)
    ]
    assert await flow.Map(joined, parts) == pytest.approx(expected)
    out = await flow.ReduceActors("run", nodes, parts, args=[[total]] * 3)
    assert out == pytest.approx(expected), "each actor gets its partition"
    everything = await flow.ReduceActors("run", nodes[:1], parts, args=[[nested]])
    assert everything == pytest.approx([sum(expected)])
    with pytest.raises(aiordt.UsageError, match="returned 3 pieces, not 2"):
        await flow.Shuffle(cut, sources, 2, args=[[3]] * 4)


async def nested(node: Any, *parts: Any) -> float:
    return float(sum([await total(node, *part) for part in parts]))


class Counter:
    """A plain class: its actors are made beside their data."""

    def __init__(self, start: int = 0) -> None:
        self.total = start
        self.restored = False

    @aiordt.method(resolve=True)
    async def add(self, *tensors: torch.Tensor) -> int:
        self.total += len(tensors)
        return self.total

    async def restore(self) -> None:
        self.total, self.restored = 1000, True

    async def die(self, *_refs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


async def test_actors(context: flow.Context) -> None:  # ACT-1, FLW-1
    inputs = flow.Map(add, flow.Broadcast(base, 2), args=[[1], [2]])
    kept = flow.InitActors(Counter, 2, args=[[0], [10]], restore=Counter.restore)
    assert await flow.ReduceActors("add", kept, inputs) == [2, 12]
    assert [where.rule for where in kept.placements if where] == ["pack", "pack"]
    assert await flow.ReduceActors(Counter.add, kept, inputs) == [4, 14]
    handles = await kept
    ray.kill(handles[0])
    assert await flow.ReduceActors("add", kept, inputs) == [1002, 16], "restored, and called again"
    now = await kept
    assert now[0] != handles[0]
    assert now[1] == handles[1]
    mortal = flow.InitActors(Counter, 1)
    with pytest.raises(aiordt.OwnerDiedError, match=r"ReduceActors\(die\)\[0\]: its actor died"):
        await flow.ReduceActors("die", mortal, inputs)


# --- failure ---------------------------------------------------------------------------------


def fail(x: int) -> int:
    if x == 2:
        raise KeyError("two is refused")
    return x


async def test_what_a_function_raises(context: flow.Context, nodes: Any) -> None:
    failing = flow.Map(fail, [1, 2, 3])
    for node in (failing, flow.Map(fail, failing), flow.ReduceActors("run", nodes, failing)):
        with pytest.raises(KeyError, match="two is refused") as caught:
            await node
        assert r"Map(fail)[1]" in str(caught.value)
        assert any("of node" in each for each in caught.value.__notes__)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await flow.Broadcast(next, 1, args=[iter(())])
    with pytest.raises(RuntimeError, match="not from here"):
        await flow.ReduceActors("run", nodes[:1], [1], args=[[refuse]])
    assert await flow.Map(fail, [5]) == [5], "the workers go on"


async def refuse(_node: Any, _x: Any) -> None:
    raise RuntimeError("not from here")


def die_once(path: str, x: torch.Tensor) -> torch.Tensor:
    if not lines(path):
        note(path, "died")
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 1


async def test_a_worker_that_dies_with_a_task(context: flow.Context, tmp_path: Path) -> None:
    """FLW-1: the task is run again; one that kills each worker is an error."""
    path = str(tmp_path / "deaths")
    once = flow.Map(die_once, flow.Broadcast(base, 2), args=[[path]] * 2)
    assert torch.equal((await flow.Gather(once))[1], base() + 1)


async def test_a_task_that_kills_every_worker(cluster: None, context: flow.Context) -> None:
    async with flow.Context(workers=1, retries=0):
        with pytest.raises(aiordt.OwnerDiedError, match=r"Broadcast\(_exit\)\[0\]: its worker"):
            await flow.Broadcast(os._exit, 1, args=[1])


async def test_lost_results_are_made_again(context: flow.Context, tmp_path: Path) -> None:
    """FLW-1, of what was forgotten, too: from the inputs of the inputs."""
    path = str(tmp_path / "calls")

    def noting(x: torch.Tensor) -> torch.Tensor:
        note(path, "called")
        return x + 1

    first = flow.Map(noting, flow.Broadcast(base, 2))
    second = flow.Map(noting, first)
    refs = await second
    del first
    assert len(lines(path)) == 4
    for pid in {ref.owner.pid for ref in refs}:
        await kill(pid)
    gathered = await flow.Gather(second)
    assert all(torch.equal(each, base() + 2) for each in gathered)
    assert len(lines(path)) == 8
    assert torch.equal(await (await second)[0], base() + 2), "the node has new refs"


# --- cancellation, lifetime, streams -----------------------------------------------------------


async def wait_for_ever(path: str, x: int) -> None:
    note(path, f"begun{x}")
    try:
        await asyncio.Event().wait()
    finally:
        note(path, f"ended{x}")


async def test_cancellation_stops_what_nobody_waits_for(
    context: flow.Context, tmp_path: Path
) -> None:  # SHR-1
    path = str(tmp_path / "calls")
    waiting = flow.Map(wait_for_ever, [1, 2], args=[[path]] * 2)
    after = flow.Map(fail, waiting)
    one, other = asyncio.ensure_future(after.eval()), asyncio.ensure_future(waiting.eval())
    await eventually(lambda: len(lines(path)) == 2, what="both have begun")
    one.cancel()
    await asyncio.wait({one})
    assert one.cancelled()
    await asyncio.sleep(0)
    assert lines(path) == ["begun1", "begun2"] or lines(path) == ["begun2", "begun1"]
    other.cancel()
    await asyncio.wait({other})
    assert other.cancelled()
    await eventually(lambda: len(lines(path)) == 4, what="both have ended")
    assert not context.cluster.groups
    assert await flow.Map(fail, [1]) == [1]


def block(path: str) -> str:
    note(f"{path}-begun")
    while not lines(path):
        pass
    return "free"


async def test_a_function_does_not_hold_its_workers_loop(
    context: flow.Context, tmp_path: Path
) -> None:
    path = str(tmp_path / "go")
    running = asyncio.ensure_future(flow.Broadcast(block, 1, args=[path]).eval())
    await eventually(lambda: Path(f"{path}-begun").exists(), what="it runs")
    busy = next(remote for remote in context.pool.workers if remote.active)
    assert await busy.handle.where.remote() == busy.node
    note(path, "go")
    assert await running == ["free"]


async def test_chains_hold_only_what_is_needed(context: flow.Context) -> None:  # ELM-2
    state: flow.Node = flow.Map(add, [arange(NBYTES)] * 2, args=[[0]] * 2)
    for _ in range(4):
        await state
        state = flow.Map(add, state, args=[[1]] * 2)
    await state

    async def held() -> int:
        counts = [
            await remote.handle.__ray_call__.remote(exports) for remote in context.pool.workers
        ]
        return sum(counts)

    async def only_the_last() -> bool:
        return await held() == 2

    await eventually(only_the_last, what="what came before is let go")
    assert torch.equal((await flow.Gather(state))[0], arange(NBYTES) + 4)


def mark(path: str, item: int) -> int:
    note(path, str(item))
    return item


async def wait_until(_node: Any, path: str, count: int, item: int) -> int:
    await eventually(lambda: len(lines(path)) >= count, what="so many were mapped")
    return item


async def test_a_stream(context: flow.Context, nodes: Any, tmp_path: Path) -> None:
    """Later items enter while earlier ones are in reduce, as many as may; results in order."""
    path = str(tmp_path / "maps")

    def build(item: int) -> flow.Node:
        mapped = flow.Map(mark, [item], args=[[path]])
        # The first is reduced only when three have been mapped.
        count = 3 if item == 0 else 0
        return flow.ReduceActors("run", nodes[:1], mapped, args=[[wait_until, path, count]])

    taken: list[int] = []

    async def items() -> Any:
        for item in range(6):
            taken.append(item)
            yield item

    found: list[int] = []
    async for values in flow.stream(items(), build, max_in_flight=3):
        if not found:
            assert len(taken) <= 4
        found += values
    assert found == list(range(6))
    values = [value async for value in flow.Map(fail, [1, 3, 5])]
    assert values == [1, 3, 5]


async def test_a_stream_that_is_left_early(context: flow.Context, tmp_path: Path) -> None:
    path = str(tmp_path / "calls")

    def build(item: int) -> flow.Node:
        return flow.Map(wait_for_ever if item else fail, [item], args=[[path]] if item else None)

    results = flow.stream(range(100), build, max_in_flight=2)
    assert await anext(results) == [0]
    await eventually(lambda: len(lines(path)) >= 1, what="the next has begun")
    await results.aclose()
    await eventually(lambda: len(lines(path)) % 2 == 0, what="what had begun has ended")


class Backwards(flow.Policy):
    @override
    def place(self, request: flow.Request, cluster: flow.Cluster) -> list[flow.Decision]:
        return [flow.Decision(cluster.nodes[-1], "mine", "last") for _ in request.data]


class Wrong(flow.Policy):
    @override
    def place(self, request: flow.Request, cluster: flow.Cluster) -> list[flow.Decision]:
        return [flow.Decision("nowhere", "mine")]


async def test_policies_are_replaceable(context: flow.Context) -> None:
    async with flow.Context(Backwards(), workers=2):
        mapped = flow.Map(fail, [1])
        assert await mapped == [1]
        assert mapped.explain().endswith("mine: last")
    async with flow.Context(Wrong(), workers=2):
        with pytest.raises(aiordt.UsageError, match="nowhere"):
            await flow.Map(fail, [1])
    async with flow.Context("default", workers=2):
        assert await flow.Map(fail, [1, 3]) == [1, 3]


async def test_a_closed_context(context: flow.Context) -> None:
    async with flow.Context() as other:
        pass
    with pytest.raises(aiordt.ClosedError):
        async with other:
            pass
