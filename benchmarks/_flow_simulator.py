"""Graphs on machines that are not there: discrete events, the real policies, no Ray.

A machine is nodes with slots, and a full-duplex link of each node to a fabric that joins them,
which may be slower than all links together. A tensor crosses to a node once, as the relay of
aiordt and the object store of Ray both see to; but those that are too small for the relay cross
for each who uses them. What a task waits for is brought as soon as it is placed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from typing_extensions import override

from aiordt.flow import Cluster, Decision, Policy, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a graph runs on.

    Attributes:
        nodes: How many.
        slots: Tasks that each runs at a time.
        bandwidth: Of a node's link, each way, in bytes a second.
        burst: Bytes that a link carries at once if it had nothing to carry before (a token bucket).
        fabric: Of all links together, in bytes a second; 0: as much as they can bring.
        latency: Of a transfer, in seconds.
        call: What a task or call takes besides its work, in seconds.
        rate: At which a task works on what comes in, in bytes a second.
        relayed: From how many bytes on a tensor crosses only once to a node.
    """

    nodes: int
    slots: int
    bandwidth: float = 1.25e9
    burst: float = 0.0
    fabric: float = 0.0
    latency: float = 100e-6
    call: float = 1.5e-3
    rate: float = 2e9
    relayed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Broadcast, map, map, cut to pieces, reduce: once for each batch.

    Attributes:
        maps: How many of each.
        reducers: How many actors.
        nbytes: What each task but the last ones returns.
        piece: What those return, to all reducers.
        batches: How many.
        period: Seconds from one to the next; 0: when the one before has ended.
    """

    maps: int
    reducers: int
    nbytes: int
    piece: int
    batches: int = 3
    period: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        crossed: Bytes that crossed from node to node.
        latencies: Of each batch, in seconds.
    """

    crossed: int = 0
    latencies: list[float] = field(default_factory=list)


def optimum(nodes: int, slots: int, program: Program) -> int:
    """The fewest bytes that cross, where each stage of maps is spread evenly over the nodes.

    The broadcast goes to each node but one, once; the reducers are on as few nodes as have
    slots for them, and the pieces of each other node go to each of those.
    """
    spread = min(nodes, -(-program.maps // slots)) if program.maps < nodes * slots else nodes
    each, more = divmod(program.maps, spread)
    if program.maps < nodes * slots:
        on_node = [min(slots, program.maps - slots * number) for number in range(spread)]
    else:
        on_node = [each + (number < more) for number in range(spread)]
    hosts = -(-program.reducers // slots)
    reduced = sum((program.maps - on_node[number]) * program.piece for number in range(hosts))
    return (spread - 1) * program.nbytes + program.batches * reduced


class RayLike(Policy):
    """Ray as it is, by its sources: tasks to most bytes while a CPU is free there, actors spread.

    Args:
        seed: Of the order in which equally loaded nodes are taken.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311  (a simulation)

    @override
    def place(self, request: Request, cluster: Cluster) -> list[Decision]:
        nodes = list(cluster.nodes)
        self._random.shuffle(nodes)
        more: Counter[str] = Counter()
        count = cluster.actors if request.actors else cluster.tasks
        heap = [(count(node) / cluster.slots(node), n, node) for n, node in enumerate(nodes)]
        heapq.heapify(heap)

        def free(node: str) -> bool:
            return count(node) + more[node] < cluster.slots(node)

        found = []
        for data in request.data:
            wanted = data or request.near
            best = max(wanted, key=wanted.__getitem__, default=None)
            while True:  # the least loaded: entries may be behind what was placed since
                load, n, least = heapq.heappop(heap)
                now = (count(least) + more[least]) / cluster.slots(least)
                heapq.heappush(heap, (now, n, least))
                if now == load:
                    break
            # Where all are full, it waits with its data.
            stays = best is not None and (free(best) or (bool(data) and not free(least)))
            node = best if best is not None and stays and not request.actors else least
            more[node] += 1
            found.append(Decision(node, "data" if node == best else "load"))
        return found


@dataclass(slots=True, eq=False)
class _Result:
    node: str
    nbytes: int
    there: dict[str, float] = field(default_factory=dict)


class Simulation:
    """One run.

    Args:
        machine: What it runs on.
        policy: Places tasks and actors.
        actors_first: Whether actors are placed before there is data, as by plain Ray.
    """

    def __init__(self, machine: Machine, policy: Policy, *, actors_first: bool) -> None:
        names = [f"n{number:05}" for number in range(machine.nodes)]
        self._machine = machine
        self._policy = policy
        self._actors_first = actors_first
        self._cluster = Cluster(dict.fromkeys(names, machine.slots))
        self._free = dict.fromkeys(names, machine.slots)
        self._queues: dict[str, deque[Callable[[], None]]] = {name: deque() for name in names}
        self._out = dict.fromkeys(names, 0.0)
        self._in = dict.fromkeys(names, 0.0)
        self._fabric = {"": 0.0}
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._groups = itertools.count()
        self.outcome = Outcome()

    def run(self, program: Program) -> Outcome:
        """Run a program to its end."""
        self._program = program
        self._reducers: list[str] = []
        if self._actors_first:
            self._place_reducers({})
        self._source: _Result | None = None
        self._left = program.batches
        if program.period:
            for number in range(program.batches):
                self._at(number * program.period, self._batch)
        else:
            self._batch()
        while self._events:
            self._now, _, action = heapq.heappop(self._events)
            action()
        return self.outcome

    # --- the program ---------------------------------------------------------------------------

    def _batch(self) -> None:
        begun = self._now
        program = self._program
        self._left -= 1
        if self._source is not None:  # broadcast once, as the measured program does
            self._mapped(self._source, begun)
            return

        def broadcast(results: list[_Result]) -> None:
            self._source = results[0]
            self._mapped(results[0], begun)

        self._tasks([[]], {}, program.nbytes, broadcast)

    def _mapped(self, source: _Result, begun: float) -> None:
        program = self._program
        near = {source.node: source.nbytes}

        def second(results: list[_Result]) -> None:
            self._tasks([[each] for each in results], {}, program.nbytes, third)

        def third(results: list[_Result]) -> None:
            self._tasks([[each] for each in results], {}, program.piece, reduce)

        def reduce(results: list[_Result]) -> None:
            if not self._reducers:
                lies: Counter[str] = Counter()
                for each in results:
                    lies[each.node] += each.nbytes
                self._place_reducers(lies)
            left = len(self._reducers)

            def reduced() -> None:
                nonlocal left
                left -= 1
                if not left:
                    self.outcome.latencies.append(self._now - begun)
                    if not program.period and self._left > 0:
                        self._batch()

            for node in self._reducers:
                arrived = max((self._bring(each, node) for each in results), default=self._now)
                nbytes = sum(each.nbytes for each in results)
                self._at(arrived + self._work(nbytes), reduced)

        self._tasks([[source]] * program.maps, near, program.nbytes, second)

    def _place_reducers(self, near: Mapping[str, int]) -> None:
        group = next(self._groups)
        request = Request(group, [{}] * self._program.reducers, dict(near), actors=True)
        for each in self._policy.place(request, self._cluster):
            node = each.node or self._cluster.nodes[0]
            self._cluster.begin(group, node, actor=True)
            self._reducers.append(node)

    # --- the machine ---------------------------------------------------------------------------

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), action))

    def _work(self, nbytes: int) -> float:
        return self._machine.call + nbytes / self._machine.rate

    def _tasks(
        self,
        inputs: Sequence[Sequence[_Result]],
        near: Mapping[str, int],
        nbytes: int,
        then: Callable[[list[_Result]], None],
    ) -> None:
        """Run a group of tasks; ``then`` gets their results, in order."""
        group = next(self._groups)
        data = [{} if near else {each.node: each.nbytes for each in needed} for needed in inputs]
        decisions = self._policy.place(Request(group, data, dict(near)), self._cluster)
        results: dict[int, _Result] = {}

        def begin(index: int, node: str, needed: Sequence[_Result]) -> None:
            arrived = max((self._bring(each, node) for each in needed), default=self._now)
            work = self._work(sum(each.nbytes for each in needed))

            def start() -> None:
                # Its slot is taken from when its turn comes; it may still wait for data.
                self._at(max(arrived, self._now) + work, end)

            def end() -> None:
                self._cluster.end(group, node)
                self._release(node)
                results[index] = _Result(node, nbytes)
                if len(results) == len(inputs):
                    then([results[number] for number in range(len(inputs))])

            self._take(node, start)

        for decision in decisions:
            self._cluster.begin(group, decision.node or "")
        for index, (decision, needed) in enumerate(zip(decisions, inputs, strict=True)):
            begin(index, decision.node or "", needed)

    def _take(self, node: str, start: Callable[[], None]) -> None:
        if self._free[node]:
            self._free[node] -= 1
            start()
        else:
            self._queues[node].append(start)

    def _release(self, node: str) -> None:
        if self._queues[node]:
            self._queues[node].popleft()()
        else:
            self._free[node] += 1

    def _bring(self, result: _Result, node: str) -> float:
        """When a result is on a node; the first who asks has it brought."""
        if node == result.node:
            return self._now
        if node not in result.there or result.nbytes < self._machine.relayed:
            takes = result.nbytes / self._machine.bandwidth
            ahead = self._machine.burst / self._machine.bandwidth
            # Transfers share links: one is done when the last of them has carried all before it.
            ends = [
                self._now,
                _carried(self._out, result.node, self._now, takes) - ahead,
                _carried(self._in, node, self._now, takes) - ahead,
            ]
            if self._machine.fabric:
                takes = result.nbytes / self._machine.fabric
                ends.append(_carried(self._fabric, "", self._now, takes))
            result.there[node] = max(ends) + self._machine.latency
            self.outcome.crossed += result.nbytes
        return max(result.there[node], self._now)


def _carried(links: dict[str, float], name: str, now: float, takes: float) -> float:
    """When a link has carried this after what it has to already."""
    links[name] = max(links[name], now) + takes
    return links[name]
