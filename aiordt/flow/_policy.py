"""Where work goes: what is known of the cluster, and the rules. Pure: no Ray, torch, clocks.

Whoever runs a graph tells a `Cluster` what begins and ends, and asks a `Policy` where a group
of tasks or actors that are ready at the same moment is to go. The simulator of the benchmarks
asks the same policies.

Invariants:
    PLC-1  The same events and requests give the same decisions, in any process.
    PLC-2  Only nodes that are there are chosen; work that has ended counts no more.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

#: What is brought to a node is counted in bytes.
Bytes = Mapping[str, int]
_NOTHING: Final[Bytes] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Decision:
    """Where one task or actor goes.

    Attributes:
        node: The node's id; ``None``: wherever Ray puts it.
        rule: In a word: ``"data"``, ``"pack"``, ``"own"``, ``"load"``, or a policy's own.
        why: In a sentence.
    """

    node: str | None
    rule: str
    why: str = ""

    @override
    def __str__(self) -> str:
        return f"{(self.node or 'anywhere')[:8]}  {self.rule}: {self.why}"


@dataclass(frozen=True, slots=True)
class Request:
    """Tasks or actors of one group that are to be placed now, together.

    Attributes:
        group: Number of the group; a group may be placed in several requests.
        data: Of each, where what only it needs lies: bytes by node.
        near: Where what all of them need lies: bytes by node.
        actors: Whether they are actors, which stay.
    """

    group: int
    data: Sequence[Bytes]
    near: Bytes = field(default_factory=dict)
    actors: bool = False


class Cluster:
    """Nodes, their slots, and the work that has begun on them and not ended.

    Args:
        slots: How many tasks each node runs at a time. Their order breaks ties.
    """

    def __init__(self, slots: Mapping[str, int] = _NOTHING) -> None:
        self._slots: dict[str, int] = {}
        self._order: dict[str, int] = {}
        self._tasks: dict[str, int] = {}
        self._actors: dict[str, int] = {}
        self._groups: dict[int, dict[str, int]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._joined = 0
        for node, number in slots.items():
            self.join(node, number)

    def join(self, node: str, slots: int) -> None:
        """A node is there, or has another number of slots than before."""
        if slots < 1:
            raise ValueError(f"node {node} has {slots} slots: at least 1")
        if node not in self._order:
            self._order[node] = self._joined
            self._joined += 1
        self._slots[node] = slots
        self._tasks.setdefault(node, 0)
        self._actors.setdefault(node, 0)
        self._push(node)

    def leave(self, node: str) -> None:
        """A node is gone, and what ran on it (PLC-2)."""
        for table in (self._slots, self._order, self._tasks, self._actors):
            table.pop(node, None)
        for group, members in list(self._groups.items()):
            members.pop(node, None)
            if not members:
                del self._groups[group]

    def begin(self, group: int, node: str, *, actor: bool = False) -> None:
        """A task or actor of a group is on a node, or on its way there."""
        if node not in self._slots:
            return
        table = self._actors if actor else self._tasks
        table[node] += 1
        members = self._groups.setdefault(group, {})
        members[node] = members.get(node, 0) + 1
        if not actor:
            self._push(node)

    def end(self, group: int, node: str, *, actor: bool = False) -> None:
        """It has ended, however."""
        members = self._groups.get(group, {})
        if node not in self._slots or not members.get(node):
            return
        table = self._actors if actor else self._tasks
        table[node] -= 1
        members[node] -= 1
        if not members[node]:
            del members[node]
        if not members:
            del self._groups[group]
        if not actor:
            self._push(node)

    @property
    def nodes(self) -> Sequence[str]:
        """Those that are there, in the order in which they came."""
        return tuple(self._slots)

    @property
    def groups(self) -> Sequence[int]:
        """Those that have something running."""
        return tuple(self._groups)

    def slots(self, node: str) -> int:
        """How many tasks a node runs at a time; 0 if it is gone."""
        return self._slots.get(node, 0)

    def order(self, node: str) -> int:
        """By what ties are broken."""
        return self._order[node]

    def tasks(self, node: str) -> int:
        """Tasks that have begun on a node and not ended."""
        return self._tasks.get(node, 0)

    def actors(self, node: str) -> int:
        """Actors that were placed on a node and live."""
        return self._actors.get(node, 0)

    def of_group(self, group: int) -> Bytes:
        """What a group has running, by node."""
        return self._groups.get(group, _NOTHING)

    def load(self, node: str) -> float:
        """Tasks for each slot."""
        return self._tasks[node] / self._slots[node]

    def least_loaded(self) -> str | None:
        """The node with the fewest tasks for each slot; O(log nodes), amortized."""
        while self._heap:
            load, _, node = self._heap[0]
            if node in self._slots and self.load(node) == load:
                return node
            heapq.heappop(self._heap)
        return None

    def _push(self, node: str) -> None:
        if len(self._heap) > 4 * len(self._slots) + 64:  # of entries that say what was
            self._heap = [(self.load(each), self._order[each], each) for each in self._slots]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self.load(node), self._order[node], node))


class Policy(ABC):
    """Says where tasks and actors go; made to be replaced."""

    @abstractmethod
    def place(self, request: Request, cluster: Cluster) -> list[Decision]:
        """Where each of ``request.data`` is to go.

        Called on the event loop: must not wait. It changes nothing: the caller tells the
        cluster what really begins.

        Args:
            request: What is to be placed.
            cluster: What there is, without anything of this request.
        """


class DefaultPolicy(Policy):
    """Blind to data: tasks go to the least loaded node, actors wherever Ray puts them."""

    @override
    def place(self, request: Request, cluster: Cluster) -> list[Decision]:
        if request.actors:
            return [Decision(None, "load", "left to Ray") for _ in request.data]
        draft = _Draft(Request(request.group, [_NOTHING] * len(request.data)), cluster)
        return [draft.to_least("the fewest tasks a slot") for _ in request.data]


class GroupPolicy(Policy):
    """Puts groups next to their data.

    What needs data of its own goes where most of its bytes are (``data``). What needs the same
    as its whole group is packed where that lies (``pack``), then where the group already is
    (``own``), as long as there are slots; over as few nodes as will do, since each further one
    has to be brought everything once. What needs nothing, or finds all full, goes to
    the least loaded node (``load``).

    Args:
        patience: A node is passed over while it has so many more tasks for each slot than
            the least loaded one: waiting there would take longer than moving.
    """

    def __init__(self, patience: float = 2.0) -> None:
        self.patience = patience

    @override
    def place(self, request: Request, cluster: Cluster) -> list[Decision]:
        draft = _Draft(request, cluster)
        found: list[Decision | None] = [
            self._to_data(draft, data) if data else None for data in request.data
        ]
        left = found.count(None)
        if not left:
            return [each for each in found if each is not None]
        near = {node: n for node, n in request.near.items() if cluster.slots(node) and n > 0}
        rest = iter(self._packed(draft, near, left) if near else self._spread(draft, left))
        return [next(rest) if each is None else each for each in found]

    def _to_data(self, draft: _Draft, data: Bytes) -> Decision | None:
        present = [node for node in data if draft.cluster.slots(node) and data[node] > 0]
        if not present:
            return None
        node = min(present, key=lambda node: (-data[node], draft.load(node), draft.order(node)))
        if draft.ahead(node) >= self.patience:
            why = f"{data[node]} of its bytes are on {node[:8]}, which has a queue"
            return draft.to_least(why)
        return draft.put(node, "data", f"{data[node]} of its {sum(data.values())} bytes are there")

    def _packed(self, draft: _Draft, near: Bytes, left: int) -> list[Decision]:
        found: list[Decision] = []

        def fill(node: str, rule: str, why: str) -> None:
            count = min(draft.room(node), left - len(found))
            found.extend(draft.put(node, rule, why) for _ in range(count))

        total = sum(near.values())
        open_to = [node for node in near if draft.room(node) and self._willing(draft, node)]
        chosen = _fewest(open_to, near.__getitem__, draft.room, draft.order, left)
        if draft.request.actors:
            # They stay, so each of their nodes gets everything: one without data may be better
            # than several that have some.
            roomy = [node for node in draft.cluster.nodes if draft.room(node)]
            others = _fewest(roomy, lambda node: near.get(node, 0), draft.room, draft.order, left)

            def brought(nodes: Sequence[str]) -> int:
                return sum(total - near.get(node, 0) for node in nodes)

            enough = sum(map(draft.room, chosen)) >= left
            if not enough or brought(others) < brought(chosen):
                chosen = others
        for node in chosen:
            fill(node, "pack", f"{near.get(node, 0)} of the group's {total} bytes are there")
        own = sorted(draft.own_nodes(), key=draft.order)
        for node in own:
            if draft.room(node) and self._willing(draft, node):
                fill(node, "own", "its group is there already")
        while len(found) < left:
            first = draft.to_least("where its group's data is, all slots are taken")
            found.append(first)
            if first.node is not None and self._willing(draft, first.node):
                fill(first.node, "own", "its group is there already")
        return found

    @staticmethod
    def _spread(draft: _Draft, left: int) -> list[Decision]:
        return [draft.to_least("it needs nothing that lies anywhere") for _ in range(left)]

    def _willing(self, draft: _Draft, node: str) -> bool:
        return draft.request.actors or draft.ahead(node) < self.patience


class _Draft:
    """A cluster with some of a request put on it."""

    def __init__(self, request: Request, cluster: Cluster) -> None:
        self.request = request
        self.cluster = cluster
        self._more: dict[str, int] = {}
        self._heap: list[tuple[float, float, int, int, str]] | None = None

    def order(self, node: str) -> int:
        return self.cluster.order(node)

    def own(self, node: str) -> int:
        """What the group has on a node."""
        return self.cluster.of_group(self.request.group).get(node, 0) + self._more.get(node, 0)

    def own_nodes(self) -> set[str]:
        return {*self.cluster.of_group(self.request.group), *self._more}

    def room(self, node: str) -> int:
        """Slots that the group has not taken."""
        return max(self.cluster.slots(node) - self.own(node), 0)

    def load(self, node: str) -> float:
        if self.request.actors:
            return (self.cluster.actors(node) + self._more.get(node, 0)) / self.cluster.slots(node)
        more = self._more.get(node, 0)
        return (self.cluster.tasks(node) + more) / self.cluster.slots(node)

    def ahead(self, node: str) -> float:
        """How many more tasks for each slot a node has than the least loaded one."""
        if self.request.actors:
            return 0.0
        least = self.cluster.least_loaded()
        return 0.0 if least is None else self.load(node) - self.cluster.load(least)

    def put(self, node: str, rule: str, why: str) -> Decision:
        self._more[node] = self._more.get(node, 0) + 1
        if self._heap is not None:
            heapq.heappush(self._heap, self._key(node))
        return Decision(node, rule, why)

    def to_least(self, why: str) -> Decision:
        """To the node that has the least, of the group first if that is packed."""
        if not self.cluster.nodes:
            return Decision(None, "load", "there is no node yet")
        if len(self.request.data) == 1 and not self.request.near and not self.request.actors:
            node = self.cluster.least_loaded()  # the usual case, without a look at all nodes
            if node is not None:
                return self.put(node, "load", why)
        return self.put(self._least(), "load", why)

    def _key(self, node: str) -> tuple[float, float, int, int, str]:
        near = self.request.near
        own, load = self.own(node) / self.cluster.slots(node), self.load(node)
        first, second = (own, load) if near else (load, own)
        return first, second, -near.get(node, 0), self.order(node), node

    def _least(self) -> str:
        if self._heap is None:
            self._heap = [self._key(node) for node in self.cluster.nodes]
            heapq.heapify(self._heap)
        while self._heap[0] != self._key(self._heap[0][-1]):  # put upon since: there is a newer one
            heapq.heappop(self._heap)
        return self._heap[0][-1]


def _fewest(
    nodes: Sequence[str],
    nbytes: Callable[[str], int],
    room: Callable[[str], int],
    order: Callable[[str], int],
    left: int,
) -> list[str]:
    """Nodes to fill one after the other: as few as have room for ``left``, with the most bytes."""
    by_bytes = sorted(nodes, key=lambda node: (-nbytes(node), order(node)))
    rooms = [room(node) for node in by_bytes]
    if len(set(rooms)) <= 1 or sum(rooms) <= left:
        return by_bytes
    chosen: list[str] = []
    candidates = dict(zip(by_bytes, rooms, strict=True))
    while left > 0 and candidates:
        node = _first_of_few(candidates, left)
        chosen.append(node)
        left -= candidates.pop(node)
    return chosen


def _first_of_few(rooms: Mapping[str, int], left: int) -> str:
    """The first of these nodes that may be one of the fewest with room for ``left``."""
    largest = sorted(rooms.values(), reverse=True)
    needed = _count(largest, left)
    within = sum(largest[: needed - 1])
    for node, room in rooms.items():
        # The largest others, besides this one.
        others = within if room <= largest[needed - 1] else sum(largest[:needed]) - room
        if room + others >= left:
            return node
    return next(iter(rooms))


def _count(largest: Sequence[int], left: int) -> int:
    """How many of these numbers, from the first on, come to ``left``."""
    total = 0
    for number, value in enumerate(largest, start=1):
        total += value
        if total >= left:
            return number
    return len(largest)
