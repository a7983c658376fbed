"""The registration cache against a model, and against torch's own storages."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

from aiordt._arena import SEGMENT_NBYTES, arena
from aiordt._memory import Pool
from aiordt._registration import Region, Registrations, region_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiordt._registration import Registration

Handle = tuple[int, int, str, int]


class Device:
    """A device library that checks what it is told."""

    def __init__(self) -> None:
        self.registered: set[Handle] = set()
        self.numbers: set[int] = set()

    def register(self, address: int, nbytes: int, device: str, number: int) -> Handle:
        assert number not in self.numbers, "a number is used once"
        self.numbers.add(number)
        handle = (address, nbytes, device, number)
        self.registered.add(handle)
        return handle

    def deregister(self, handle: Handle) -> None:
        self.registered.remove(handle)  # raises if it was not there


class Memory:
    """Something allocated, until it is freed."""

    def __init__(self, address: int, nbytes: int, device: str) -> None:
        self.freed = False
        self.region = Region(address, nbytes, device, lambda: not self.freed)


class Machine(RuleBasedStateMachine):
    """Memory comes and goes at few addresses, so that they are used again and overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.limit = 2
        self.cache = Registrations(self.device.register, self.device.deregister, limit=self.limit)
        self.memories: list[Memory] = []
        self.uses: list[tuple[Memory, Registration[Handle]]] = []
        self.holds: dict[tuple[bytes, int], list[tuple[Memory, Registration[Handle]]]] = {}
        self.next_holder = 0

    @rule(
        address=st.integers(0, 12),
        nbytes=st.integers(1, 6),
        device=st.sampled_from(["cpu", "cuda:0"]),
    )
    def allocate(self, address: int, nbytes: int, device: str) -> None:
        self.memories.append(Memory(address, nbytes, device))

    def _pinned(self, memory: Memory) -> bool:
        held = [each for pairs in self.holds.values() for each in pairs]
        return any(each is memory for each, _ in [*self.uses, *held])

    @precondition(lambda self: self.memories)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        memory = data.draw(st.sampled_from(self.memories))
        if not self._pinned(memory):  # transfers and exports keep what they are about
            memory.freed = True
            self.memories.remove(memory)

    @precondition(lambda self: self.memories)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        memory = data.draw(st.sampled_from(self.memories))
        registration = self.cache.acquire(memory.region)
        assert registration.covers(memory.region)
        assert registration.device == memory.region.device
        assert registration.alive, "RGN-2: what answers is there"
        assert registration.handle in self.device.registered
        again = self.cache.acquire(memory.region)
        assert again is registration, "RGN-1: a range has one answer"
        self.cache.release(again)
        self.uses.append((memory, registration))

    @precondition(lambda self: self.uses)
    @rule(data=st.data(), hold=st.booleans())
    def release(self, data: st.DataObject, *, hold: bool) -> None:
        number = data.draw(st.integers(0, len(self.uses) - 1))
        memory, registration = self.uses.pop(number)
        if hold:
            holder = (b"key", self.next_holder)
            self.next_holder += 1
            self.cache.hold(holder, [registration])
            self.holds[holder] = [(memory, registration)]
        self.cache.release(registration)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.holds)))
        del self.holds[holder]
        self.cache.let_go(holder)

    @rule()
    def sweep(self) -> None:
        self.cache.sweep()
        for each in self.cache._all.values():
            assert each.busy or each.alive, "what died is deregistered"

    @invariant()
    def nothing_in_use_is_deregistered(self) -> None:  # RGN-3
        held = [each for pairs in self.holds.values() for each in pairs]
        pinned = {registration.handle for _, registration in [*self.uses, *held]}
        assert pinned <= self.device.registered
        assert sorted(self.holds) == sorted(self.cache.holders)

    @invariant()
    def it_is_bounded_and_counted(self) -> None:
        assert len(self.device.registered) == self.cache.count
        assert sum(handle[1] for handle in self.device.registered) == self.cache.nbytes
        busy = sum(each.busy for each in self.cache._all.values())
        assert self.cache.count <= max(self.limit, busy) + 1

    @invariant()
    def what_is_found_does_not_overlap(self) -> None:  # RGN-1
        for found in self.cache._found.values():
            for left, right in itertools.pairwise(found):
                assert left.end <= right.address

    @override
    def teardown(self) -> None:
        self.cache.clear()
        assert not self.device.registered


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.fixture
def cache() -> Registrations[Handle]:
    device = Device()
    return Registrations(device.register, device.deregister, limit=100)


def number(cache: Registrations[Handle], tensor: torch.Tensor) -> int:
    """The registration that a tensor is in."""
    found = cache.acquire(region_of(tensor))
    cache.release(found)
    return found.number


def test_views_share_the_registration_of_their_storage(cache: Registrations[Handle]) -> None:
    whole = torch.arange(1000)
    assert number(cache, whole) == number(cache, whole[7:9]) == number(cache, whole.view(10, 100).T)
    assert (cache.count, cache.nbytes) == (1, whole.nbytes)


def test_an_address_that_is_used_again_is_registered_again(
    cache: Registrations[Handle],
) -> None:  # RGN-2
    """By torch's storages, on memory whose address stays."""
    buffer = bytearray(1000)
    first = torch.frombuffer(buffer, dtype=torch.uint8)
    earlier = number(cache, first)
    assert number(cache, first) == earlier
    address = first.data_ptr()
    del first
    second = torch.frombuffer(buffer, dtype=torch.uint8)
    assert second.data_ptr() == address
    assert number(cache, second) != earlier
    assert cache.count == 1


def test_a_storage_that_was_resized_is_registered_again(
    cache: Registrations[Handle],
) -> None:  # RGN-2
    tensor = torch.zeros(1000)
    region = region_of(tensor)
    earlier = number(cache, tensor)
    tensor.untyped_storage().resize_(100_000_000)
    assert number(cache, tensor) != earlier
    # Something else may be where it was.
    other = cache.acquire(Region(region.address, region.nbytes, "cpu", lambda: True))
    assert other.number != earlier
    cache.release(other)
    cache.clear()
    assert number(cache, tensor) != earlier
    tensor.untyped_storage().resize_(0)
    cache.sweep()
    assert cache.count == 0


def test_what_died_goes_with_the_next_sweep(cache: Registrations[Handle]) -> None:
    tensor = torch.zeros(1000)
    used = cache.acquire(region_of(tensor))
    del tensor
    gc.collect()
    cache.sweep()
    assert cache.count == 1, "RGN-3: in use"
    cache.release(used)
    assert cache.count == 0


def test_a_block_of_the_pool_is_registered_once(cache: Registrations[Handle]) -> None:
    pool = Pool(100 << 20)
    numbers = set()
    for size in (3 << 20, (3 << 20) - 5, 3 << 20):
        tensor = pool.empty((size,), torch.uint8)
        numbers.add(number(cache, tensor[100:]))
        del tensor
    assert len(numbers) == 1
    pool.close()
    gc.collect()
    cache.sweep()
    assert cache.count == 0


def test_a_shared_segment_is_registered_once(cache: Registrations[Handle]) -> None:
    tensors = [arena.empty((5000,), torch.uint8) for _ in range(5)]
    assert len({number(cache, tensor) for tensor in tensors}) == 1
    assert cache.nbytes >= SEGMENT_NBYTES


def test_a_registration_that_fails_leaves_nothing_behind() -> None:
    def refuse(*_: object) -> Handle:
        raise RuntimeError("no")

    cache: Registrations[Handle] = Registrations(refuse, Device().deregister, limit=5)
    with pytest.raises(RuntimeError, match="no"):
        cache.acquire(region_of(torch.zeros(9)))
    assert cache.count == 0


def test_threads_may_share_it(cache: Registrations[Handle]) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as exc:  # noqa: BLE001  (raised below)
                errors.append(exc)

        return run

    def churn() -> None:
        for count in range(300):
            tensors = [torch.zeros(1 + count % 17) for _ in range(5)]
            used = [cache.acquire(region_of(tensor)) for tensor in tensors]
            assert all(each.alive for each in used)
            for each in used:
                cache.release(each)
            cache.sweep()

    threads = [threading.Thread(target=guarded(churn)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    cache.sweep()
    assert cache.count == 0
