"""The parts of groups that need no actors: agreeing, packing, adding up, matching.

GRP-1: what differs is told to all. GRP-2: calls are matched by order, or by order within a tag.
GRP-3: every call ends. GRP-5: all are told the same reason.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

import aiordt
from aiordt._errors import ProtocolViolationError
from aiordt._progress import Workers
from aiordt.collective import _bundle, _call, _message
from aiordt.collective._direct import DirectMover
from aiordt.collective._engine import TO_RECEIVER, TO_SENDER, Engine
from aiordt.collective._kernels import Reduction
from aiordt.collective._mesh import Frame, Listener, Mesh
from aiordt.collective._rules import (
    Descriptor,
    Spec,
    agree,
    check_reduction,
    restore,
    rows,
    structure,
    working_dtype,
)
from aiordt.collective._steps import Ended, Step
from aiordt.testing import eventually
from aiordt.transports.cma import CmaLink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiordt.collective._steps import Steps

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.int64, torch.bfloat16])
specs = st.lists(st.builds(Spec, shapes, dtypes), min_size=1, max_size=6)


@given(st.integers(0, 50), st.integers(1, 9))
def test_rows_are_cut_as_torch_does(length: int, size: int) -> None:
    pieces = torch.arange(length).tensor_split(size)
    cuts = [rows(length, size, rank) for rank in range(size)]
    assert [high - low for low, high in cuts] == [len(piece) for piece in pieces]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == length


@given(specs, st.integers(1, 5), st.booleans())
def test_what_is_packed_comes_out_again(chosen: list[Spec], size: int, cutting: bool) -> None:  # noqa: FBT001
    tensors = [torch.randint(9, spec.shape).to(spec.dtype) for spec in chosen]
    units = _bundle.plan(tuple(chosen), size, cutting=cutting)
    assert sorted(place for unit in units for place in unit.places) == list(range(len(chosen)))
    for unit in units:
        flat = _bundle.packed(unit, tensors, cutting=cutting)
        assert flat.numel() == unit.numel == unit.bounds[-1]
        assert list(unit.bounds) == sorted(unit.bounds)
        if not cutting:
            for place, view in zip(unit.places, _bundle.unpacked(flat, unit.specs), strict=True):
                assert torch.equal(view, tensors[place])
            continue
        for rank in range(size):
            pieces = [_bundle.piece_spec(spec, size, rank) for spec in unit.specs]
            piece = flat[unit.bounds[rank] : unit.bounds[rank + 1]]
            for place, view in zip(unit.places, _bundle.unpacked(piece, pieces), strict=True):
                assert torch.equal(view, tensors[place].tensor_split(size)[rank])


def test_a_large_tensor_is_not_copied() -> None:
    tensors = [torch.ones(1 << 18), torch.ones(3), torch.ones(4)]
    units = _bundle.plan(_bundle.specs_of(tensors), 3, cutting=False)
    flats = [_bundle.packed(unit, tensors, cutting=False) for unit in units]
    assert sorted(flat.numel() for flat in flats) == [7, 1 << 18]
    assert tensors[0].data_ptr() in [flat.data_ptr() for flat in flats]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_a_result_may_replace_any_source(dtype: torch.dtype, place: int) -> None:
    sources = [torch.arange(70_000).remainder(50).to(dtype) + rank for rank in range(3)]
    want = sum((source.double() for source in sources), torch.zeros(70_000).double())
    scratch = torch.empty(70_000, dtype=working_dtype(dtype))
    reduce = Reduction("sum", dtype)
    flats = [reduce.flat(source) for source in sources]
    reduce(flats, flats[place], reduce.flat(scratch))
    assert torch.equal(sources[place].double(), want.to(dtype).double())


def test_half_precision_is_rounded_once() -> None:
    sources = [torch.tensor([256.0]).bfloat16(), *[torch.tensor([1.0]).bfloat16()] * 8]
    out = torch.empty(1, dtype=torch.bfloat16)
    Reduction("sum", torch.bfloat16)(sources, out, torch.empty(1))
    assert out.item() == 264.0, "added up in bfloat16, it would stay 256"


def test_reductions_that_have_no_meaning() -> None:
    with pytest.raises(ValueError, match="there are sum, product"):
        check_reduction("mean", torch.float32)
    for op, dtype in [
        ("band", torch.float32),
        ("min", torch.complex64),
        ("avg", torch.int32),
        ("sum", torch.bool),
        ("max", torch.float8_e8m0fnu),
    ]:
        with pytest.raises(TypeError):
            check_reduction(op, dtype)


def described(**changes: Any) -> bytes:
    given: dict[str, Any] = {"op": "sum", "device": "cpu", "specs": (Spec((4,), torch.float32),)}
    return Descriptor("allreduce", **{**given, **changes}).pack()


def test_equal_calls_agree() -> None:
    agreed = agree([described()] * 3)
    assert agreed.specs == (Spec((4,), torch.float32),)
    assert str(agreed) == "allreduce(float32[4], op='sum')"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (described(op="max"), "other reductions"),
        (described(specs=(Spec((3,), torch.float32),)), "float32[4] and float32[3], other shapes"),
        (described(specs=(Spec((4,), torch.int8),)), "other dtypes"),
        (described(specs=(Spec((4,), torch.float32),) * 2), "1 tensors and 2"),
        (described(device="cuda"), "other devices"),
        (Descriptor("barrier").pack(), "rank 2 called barrier()"),
        (Descriptor("allreduce", error="no tensor").pack(), "rank 2: no tensor"),
    ],
)
def test_differences_are_named(odd: bytes, words: str) -> None:  # GRP-1
    with pytest.raises(aiordt.UsageError) as caught:
        agree([described(), described(), odd])
    assert words in str(caught.value)
    assert "rank 2" in str(caught.value)


def test_only_the_root_brings_tensors() -> None:
    spec = (Spec((4,), torch.float32),)
    silent = Descriptor("scatter", root=1).pack()
    root = Descriptor("scatter", root=1, device="cpu", specs=spec, extra=["x", 0]).pack()
    agreed = agree([silent, root, silent])
    assert agreed.specs == spec
    assert agreed.extra == ["x", 0]


@given(st.binary(max_size=60))
def test_any_bytes_are_a_descriptor_or_refused(data: bytes) -> None:
    try:
        found = Descriptor.unpack(data)
    except ProtocolViolationError:
        return
    assert isinstance(found, Descriptor)


def test_trees_travel_by_their_structure() -> None:
    tree = {"a": [1.5, (2.5, {7: 3.5})], "b": 4.5}
    leaves: list[float] = []

    def leaf(value: object) -> int | None:
        if not isinstance(value, float):
            return None
        leaves.append(value)
        return len(leaves) - 1

    found = structure(tree, leaf)
    assert restore(found, leaves) == tree
    with pytest.raises(TypeError, match="set"):
        structure({"a": {1, 2}}, leaf)


# --- engines over real sockets, in one process ---------------------------------------------


class Inline(_call.Mover):
    """Refuses what does not travel with its descriptor."""

    @override
    def move(self, call: Any, buffers: Any, announced: Any) -> Steps:
        raise NotImplementedError
        yield


@asynccontextmanager
async def engines(size: int) -> AsyncIterator[list[Engine]]:
    socks: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for low in range(size):
        for high in range(low + 1, size):
            socks[low][high], socks[high][low] = socket.socketpair()
    labels = [f"member {rank}" for rank in range(size)]
    made = [
        Engine("g", labels, rank, Mesh(socks[rank], f"mesh-{rank}"), lambda: None)
        for rank in range(size)
    ]
    try:
        yield made
    finally:
        for engine in made:
            engine.end(Ended(closed=True, why="closed"))
            engine.mesh.join(5)


async def allreduced(
    engine: Engine, t: torch.Tensor, lane: int = -1, *, light: bool = True
) -> torch.Tensor:
    call = _call.Call("allreduce", engine.rank, engine.size, "sum", tensors=[t])
    await engine.call(call, _call.collective(call, Inline()), lane=lane, light=light)
    return t


async def test_engines_match_by_lane_and_order() -> None:  # GRP-2
    async with engines(3) as made:

        async def member(engine: Engine) -> list[float]:
            lanes = [5, -1, 9, -1] if engine.rank else [-1, 9, -1, 5]
            nth: dict[int, int] = {}
            calls = []
            for lane in lanes:
                number = nth[lane] = nth.get(lane, -1) + 1
                calls.append(allreduced(engine, torch.tensor([100.0 * lane + number]), lane))
            done = dict(zip(range(4), await asyncio.gather(*calls), strict=True))
            return sorted(float(t) for t in done.values())

        results = await asyncio.gather(*map(member, made))
        assert results == [[-300.0, -297.0, 1500.0, 2700.0]] * 3


async def test_the_end_has_one_reason() -> None:  # GRP-3, GRP-5
    async with engines(3) as made:
        pending = [asyncio.ensure_future(allreduced(engine, torch.ones(1))) for engine in made[:2]]
        await asyncio.sleep(0)
        made[0].end(Ended(closed=False, why="out of cheese"))
        ended = await asyncio.gather(*pending, return_exceptions=True)
        assert [str(error) for error in ended] == ["out of cheese"] * 2
        await eventually(lambda: made[2].over is not None, what="the end is known")
        with pytest.raises(aiordt.GroupError, match="out of cheese"):
            await allreduced(made[2], torch.ones(1))


async def test_a_connection_that_ends_names_its_member() -> None:  # GRP-3
    async with engines(2) as made:
        pending = asyncio.ensure_future(allreduced(made[0], torch.ones(1)))
        await asyncio.sleep(0)
        made[1].mesh.close()  # without a word
        with pytest.raises(aiordt.GroupError, match=r"rank 1 \(member 1\) is gone"):
            await pending


class Eager:
    """A socket on which a byte more arrives just before it is read."""

    def __init__(self, sock: socket.socket, before: Callable[[], None]) -> None:
        self.sock = sock
        self.before = before

    def recv(self, nbytes: int) -> bytes:
        self.before()
        return self.sock.recv(nbytes)

    def close(self) -> None:
        self.sock.close()


async def test_no_wake_up_is_lost() -> None:  # GRP-3
    """Waking the thread at the moment at which it reads an earlier wake-up."""
    async with engines(2) as made:
        mesh = made[0].mesh
        mesh._wake_reader = Eager(mesh._wake_reader, mesh.wake)  # type: ignore[assignment]
        for _ in range(3):
            done = threading.Event()
            mesh.run(done.set)
            assert await asyncio.to_thread(done.wait, 5)


@pytest.mark.parametrize("garbage", [struct.pack("!I", 3), struct.pack("!I", 1 << 31) + bytes(60)])
async def test_garbage_on_a_connection_ends_the_group(garbage: bytes) -> None:  # GRP-3
    ours, theirs = socket.socketpair()
    with theirs:
        engine = Engine("g", ["a", "b"], 0, Mesh({1: ours}, "mesh"), lambda: None)
        pending = asyncio.ensure_future(allreduced(engine, torch.ones(1)))
        await asyncio.sleep(0)
        theirs.sendall(garbage + bytes(30))
        with pytest.raises(aiordt.GroupError, match="sent a frame of"):
            await pending
        engine.mesh.join(5)


async def test_a_peer_that_does_not_read_stops_nobody() -> None:
    """What does not fit into a socket waits, and arrives in order."""
    async with engines(2) as made:
        gate = asyncio.Event()

        async def first() -> None:
            calls = [allreduced(made[0], torch.full((4000,), float(n))) for n in range(200)]
            task = asyncio.gather(*calls)
            await asyncio.sleep(0.05)
            gate.set()
            await task

        async def second() -> None:
            await gate.wait()
            for n in range(200):
                assert float((await allreduced(made[1], torch.full((4000,), 1.0)))[0]) == n + 1

        await asyncio.wait_for(asyncio.gather(first(), second()), 20)


async def test_a_loop_that_has_become_busy_keeps_nobody_waiting() -> None:  # MSH-2
    async with engines(2) as made:
        for _ in range(3):  # from the second time on, the loop reads by itself
            await asyncio.gather(*[allreduced(each, torch.ones(2)) for each in made])
        pending = asyncio.ensure_future(allreduced(made[0], torch.ones(2)))
        await asyncio.sleep(0)
        assert made[0].mesh._borrowed_at is not None, "the loop reads"
        made[1].store("key", b"value")
        # This blocks the loop until the thread has read what the other one says.
        assert made[0].stored(["key"], 10) == [b"value"]
        await allreduced(made[1], torch.ones(2))
        await pending


async def test_a_loop_keeps_the_sockets_between_its_calls_only() -> None:  # MSH-2
    async with engines(2) as made:
        mesh = made[0].mesh
        for _ in range(3):  # from the second time on, the loop reads by itself
            await asyncio.gather(*[allreduced(each, torch.ones(2)) for each in made])
        assert mesh._borrowed_at is not None, "its next call may come soon"
        pending = asyncio.ensure_future(allreduced(made[0], torch.ones(2), light=False))
        await asyncio.sleep(0)
        assert mesh._borrowed_at is None, "a call that takes its time is the thread's"
        await asyncio.gather(pending, allreduced(made[1], torch.ones(2)))
        await asyncio.gather(*[allreduced(each, torch.ones(2)) for each in made])
        assert mesh._borrowed_at is not None
        await eventually(lambda: mesh._borrowed_at is None, what="it did not come")


async def test_a_loop_looks_without_sleeping_only_for_a_moment() -> None:  # MSH-3
    async with engines(2) as made:
        mesh = made[0].mesh
        for _ in range(3):  # from the second time on, the loop reads by itself
            await asyncio.gather(*[allreduced(each, torch.ones(2)) for each in made])
        looks = 0

        def counted() -> bool:
            nonlocal looks
            looks += 1
            return read()

        read = mesh._read_here
        mesh._read_here = counted  # type: ignore[method-assign]
        mesh._soon = True  # the last wait was short
        pending = asyncio.ensure_future(allreduced(made[0], torch.ones(2)))
        await eventually(lambda: looks and not mesh._spinning, what="it has looked, and sleeps")
        before = looks
        await asyncio.sleep(0.05)
        assert looks <= before + 1, "it sleeps until something comes"
        await allreduced(made[1], torch.ones(2))
        await pending
        assert not mesh._soon, "that wait was long"


class Ordered(Listener):
    """Notes the numbers of frames, and whether two threads ever were here at once."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.threads: set[int] = set()
        self.overlapped = False
        self._inside = False

    @override
    def received(self, rank: int, frame: Frame) -> None:
        self.overlapped |= self._inside
        self._inside = True
        time.sleep(0)  # another thread may run
        self.numbers.append(frame.number)
        self.threads.add(threading.get_ident())
        self._inside = False

    @override
    def lost(self, rank: int, why: str) -> None:
        pass

    @override
    def deadline(self) -> float | None:
        return None

    @override
    def due(self) -> None:
        pass

    @override
    def due_here(self) -> None:
        pass


async def test_loop_and_thread_never_read_at_once() -> None:  # MSH-1
    one, other = socket.socketpair()
    reader, writer = Mesh({1: one}, "reader"), Mesh({0: other}, "writer")
    heard = Ordered()
    reader.start(heard)
    writer.start(Ordered())
    total = 4000

    def write() -> None:
        for number in range(total):
            writer.send([0], Frame(0, 0, number, b""))

    try:
        writing = asyncio.ensure_future(asyncio.to_thread(write))
        while len(heard.numbers) < total:
            if reader.borrow():
                await asyncio.sleep(0)
                reader.give_back(keep=False)
            await asyncio.sleep(0)
        await writing
        assert heard.numbers == list(range(total))
        assert not heard.overlapped
        assert len(heard.threads) == 2, "each has read"
    finally:
        for mesh in (reader, writer):
            mesh.close()
            mesh.join(5)


class Held(CmaLink):
    """Reads this very process, but not before it may."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(os.getpid(), os.pidfd_open(os.getpid()), name="us", workers=Workers("", 1))
        self.gate = gate

    @override
    def copy(self, address: int, target: int, nbytes: int) -> None:
        self.gate.wait(10)
        super().copy(address, target, nbytes)


@pytest.mark.parametrize("kind", ["broadcast", "allreduce", "allgather"])
async def test_nobody_leaves_before_all_have_read(kind: str) -> None:  # OWN-1
    numel = 50_000
    async with engines(2) as made:
        gate = threading.Event()
        movers = [
            mover(made[0], Held(set_already())),
            mover(made[1], Held(gate)),
        ]
        tensors = [torch.full((numel,), float(rank)) for rank in range(2)]

        def start(rank: int) -> asyncio.Task[Any]:
            op, root = ("sum", -1) if kind == "allreduce" else ("", -1)
            root = 0 if kind == "broadcast" else root
            call = _call.Call(kind, rank, 2, op, root, tensors=[tensors[rank]])
            steps = _call.collective(call, movers[rank])
            return asyncio.ensure_future(made[rank].call(call, steps))

        first, second = start(0), start(1)
        done, _ = await asyncio.wait({first, second}, timeout=0.1)
        assert not done, "rank 1 has not read yet"
        gate.set()
        await asyncio.wait_for(asyncio.gather(first, second), 10)
        if kind != "allgather":
            assert float(tensors[1][-1]) == {"broadcast": 0.0, "allreduce": 1.0}[kind]


def mover(engine: Engine, link: CmaLink) -> DirectMover:
    """One that is never asked for shared memory: the tensors are in none."""

    async def share(rank: int) -> Any:
        raise AssertionError(rank)

    io: Any = None
    return DirectMover(engine, {1 - engine.rank: link}, share, io)


def set_already() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


async def test_messages_by_pieces() -> None:
    """Where no memory can be read, the receiver asks for piece after piece."""
    async with engines(2) as made:
        sent = {"a": torch.arange(400_000), "b": torch.ones(5, 7)[:, 3]}
        into = [torch.zeros(400_000, dtype=torch.int64), torch.zeros(10)[::2]]
        sending = made[0].call(
            "send", _message.send(list(sent.values()), 1, None), lane=3, kind=TO_RECEIVER, other=1
        )
        receiving = made[1].call(
            "recv", _message.receive(into, 0, made[1], None), lane=3, kind=TO_SENDER, other=0
        )
        await asyncio.wait_for(asyncio.gather(sending, receiving), 20)
        assert torch.equal(into[0], sent["a"])
        assert torch.equal(into[1], sent["b"])


async def test_an_operation_that_fails_ends_the_group_for_all() -> None:  # GRP-3, GRP-5
    async with engines(2) as made:

        def steps(*, fail: bool) -> Steps:
            yield Step(b"")
            if fail:
                raise MemoryError("none left")
            yield Step(b"")

        calls = [engine.call("work", steps(fail=engine.rank == 1)) for engine in made]
        ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert {str(error) for error in ended} == {
            "group 'g': work failed on rank 1 (member 1): none left"
        }


async def test_a_timeout_names_who_is_late() -> None:  # GRP-3
    async with engines(3) as made:
        calls = [
            engine.call("work", iter_steps(), timeout=0.05 if engine.rank == 0 else None)
            for engine in made[:2]
        ]
        ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert {str(error) for error in ended} == {
            "group 'g': work timed out on rank 0, waiting for rank 2 (member 2)"
        }


def iter_steps() -> Steps:
    yield Step(b"")
