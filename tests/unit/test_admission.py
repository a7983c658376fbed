"""Which transfers may run: ADM-1 to ADM-3, CAN-1."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiordt._admission import SMALL_NBYTES, Admission
from aiordt._types import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Hashable

LIMIT = 20 * MIB


class Crowd:
    """Transfers that wait, and who was let in."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.admission = Admission(limit)
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def arrive(self, name: str, peer: Hashable, nbytes: int) -> None:
        async def transfer() -> None:
            await self.admission.acquire(peer, nbytes)
            self.order.append(name)

        self.tasks[name] = asyncio.create_task(transfer())
        await turns()

    async def leave(self, peer: Hashable, nbytes: int) -> None:
        self.admission.release(peer, nbytes)
        await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_in_the_order_of_arrival() -> None:  # ADM-1
    crowd = Crowd()
    for name, peer, mib in (("a", 1, 8), ("b", 2, 8), ("c", 3, 8), ("d", 4, 2), ("e", 5, 2)):
        await crowd.arrive(name, peer, mib * MIB)
    assert crowd.order == ["a", "b"], "there would be room for d, but c is first"
    await crowd.leave(1, 8 * MIB)
    assert crowd.order == ["a", "b", "c", "d", "e"]


async def test_a_peer_has_a_share_and_no_more() -> None:  # ADM-2
    crowd = Crowd()
    for name in "abc":
        await crowd.arrive(name, "still", 8 * MIB)
    await crowd.arrive("d", "other", 8 * MIB)
    assert crowd.order == ["a", "d"], "b and c wait for their own peer, and d does not"
    await crowd.leave("still", 8 * MIB)
    assert crowd.order == ["a", "d", "b"]


async def test_small_ones_do_not_wait_for_large_ones() -> None:  # ADM-3
    crowd = Crowd()
    for number in range(5):
        await crowd.arrive(f"large {number}", "peer", 10 * MIB)
    await crowd.arrive("small", "peer", SMALL_NBYTES)
    assert crowd.order == ["large 0", "small"]


async def test_one_larger_than_a_share_counts_as_one() -> None:
    crowd = Crowd()
    await crowd.arrive("huge", 1, 100 * LIMIT)
    await crowd.arrive("next", 1, 2 * MIB)
    await crowd.arrive("other", 2, 10 * MIB)
    assert crowd.order == ["huge", "other"]
    await crowd.leave(1, 100 * LIMIT)
    assert crowd.order == ["huge", "other", "next"]


async def test_their_number_is_bounded() -> None:
    crowd = Crowd(4 * MIB)  # 1 MiB for small ones, and half of it for each peer
    for number in range(20):
        await crowd.arrive(str(number), "peer", 8)
    assert len(crowd.order) == 512 * KIB // (64 * KIB)


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_a_limit_of_a_few_bytes_lets_one_in(limit: int) -> None:
    crowd = Crowd(limit)
    await crowd.arrive("small", 1, 100)
    await crowd.arrive("large", 1, 2 * MIB)
    assert crowd.order == ["small", "large"]


async def test_a_cancelled_wait_takes_no_room() -> None:  # CAN-1
    crowd = Crowd()
    await crowd.arrive("a", 1, 10 * MIB)
    await crowd.arrive("b", 1, 10 * MIB)
    await crowd.arrive("c", 1, 2 * MIB)
    crowd.tasks["b"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await crowd.tasks["b"]
    assert crowd.order == ["a"]
    await crowd.leave(1, 10 * MIB)
    assert crowd.order == ["a", "c"]
    await crowd.leave(1, 2 * MIB)
    await crowd.arrive("d", 1, 10 * MIB)
    assert crowd.order == ["a", "c", "d"]


async def test_cancelling_the_first_lets_the_next_in() -> None:
    crowd = Crowd()
    await crowd.arrive("a", 1, 6 * MIB)
    await crowd.arrive("b", 1, 8 * MIB)
    await crowd.arrive("c", 1, 4 * MIB)
    assert crowd.order == ["a"]
    crowd.tasks["b"].cancel()
    await turns()
    assert crowd.order == ["a", "c"]


async def test_cancelled_at_the_moment_of_being_let_in() -> None:  # CAN-1
    crowd = Crowd()
    await crowd.arrive("a", 1, 10 * MIB)
    await crowd.arrive("b", 1, 10 * MIB)
    crowd.admission.release(1, 10 * MIB)  # lets it in; its task has not run yet
    crowd.tasks["b"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await crowd.tasks["b"]
    await crowd.arrive("c", 1, 10 * MIB)
    assert crowd.order == ["a", "c"]


def test_across_loops() -> None:
    admission = Admission(4 * MIB)
    total = 0

    async def transfer() -> None:
        nonlocal total
        for _ in range(30):
            await admission.acquire("peer", 2 * MIB)
            seen = total
            await asyncio.sleep(0)
            total = seen + 1
            admission.release("peer", 2 * MIB)

    async def many() -> None:
        await asyncio.gather(transfer(), transfer())

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert total == 180, "one at a time, and every one in the end"


def test_a_waiter_whose_loop_is_gone_does_not_block_the_rest() -> None:
    admission = Admission(LIMIT)

    async def leave() -> None:
        await admission.acquire(1, 10 * MIB)
        asyncio.ensure_future(admission.acquire(1, 5 * MIB)).add_done_callback(lambda _: None)
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    (pending,) = asyncio.all_tasks(loop)
    pending._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    admission.release(1, 10 * MIB)
    asyncio.run(asyncio.wait_for(admission.acquire(1, 10 * MIB), 5))


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 3), st.integers(1, 30)),
        st.tuples(st.sampled_from(["end", "cancel"]), st.integers(0, 1000), st.just(0)),
    ),
    max_size=60,
)


@given(_STEPS)
def test_bounded_and_nobody_is_forgotten(steps: list[tuple[str, int, int]]) -> None:
    """Under any sequence of arrivals, ends and cancellations."""

    async def play() -> None:
        admission = Admission(LIMIT)
        running: list[tuple[int, int]] = []
        tasks: dict[asyncio.Task[Any], tuple[int, int]] = {}

        async def transfer(peer: int, nbytes: int) -> None:
            await admission.acquire(peer, nbytes)
            running.append((peer, nbytes))

        def check() -> None:
            large = [each for each in running if each[1] > SMALL_NBYTES]
            by_peer: Counter[int] = Counter()
            for peer, nbytes in large:
                by_peer[peer] += min(nbytes, admission.share)
            assert sum(by_peer.values()) <= LIMIT
            assert all(used <= admission.share for used in by_peer.values())

        for what, number, mib in steps:
            if what == "arrive":
                task = asyncio.create_task(transfer(number, mib * MIB))
                tasks[task] = (number, mib * MIB)
            elif what == "end" and running:
                admission.release(*running.pop(number % len(running)))
            elif what == "cancel" and tasks:
                list(tasks)[number % len(tasks)].cancel()
            await turns()
            check()
        while running:
            admission.release(*running.pop())
            await turns()
            check()
        assert all(task.done() for task in tasks), "all were let in in the end"

    asyncio.run(play())
