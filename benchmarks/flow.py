"""Graphs placed by group beside plain Ray: what crosses nodes, and how long batches take.

The program is that of `_flow_cluster`: a broadcast, two maps, a cut, reducers that get all pieces.
All nodes are raylets of this machine, so bytes are counted and no network is slow: latencies say
what the two ways themselves cost. What slow links make of the bytes is simulated, by the
policies that place the real graphs; the simulated small case is held against the measured one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import ray
from matplotlib.figure import Figure
from typing_extensions import override

import aiordt
from aiordt._relay import MIN_NBYTES
from aiordt.flow import Cluster, Decision, DefaultPolicy, GroupPolicy, Request, release_workers
from aiordt.testing._hosts import SLOW_BURST_NBYTES
from benchmarks import _flow_hosts
from benchmarks._cluster import reason
from benchmarks._figures import Run
from benchmarks._flow_cluster import PASSING, WORKING, FlowWay, RayWay, raylets
from benchmarks._flow_simulator import Machine, Program, RayLike, Simulation, optimum
from benchmarks._measure import MIB, Spread, format_nbytes, format_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from aiordt.flow import Policy
    from benchmarks._figures import Figures

GROUP: Final = "aiordt flow"
BLIND: Final = 'aiordt flow, placement="default"'
RAY: Final = "plain Ray"
#: A batch whose functions do next to nothing: what is left is placement, calls and transfers.
FREE: Final = "functions that return views"
#: Without Ray; on raylets of this machine, twice; on two hosts out of network namespaces.
PARTS: Final = ("simulate", "bytes", "latency", "hosts")

_ERRORS: Final = (ray.exceptions.RayError, aiordt.AiordtError, TimeoutError, RuntimeError, OSError)
_GRAIN: Final = 4
#: Of what Ethernet carries: 1448 bytes of a frame of 1514 are TCP's.
_PAYLOAD: Final = 1448 / 1514
#: Seconds from one simulated batch to the next.
_PERIOD: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        nodes: How many raylets.
        slots: Tasks that each runs at a time, while bytes are counted.
        latency_slots: ... while batches are timed.
        reducers: How many actors.
        nbytes: What a map returns while bytes are counted; a piece is a quarter.
        sizes: What maps return while batches are timed.
        batches: How many are timed of each size.
        simulated: Numbers of nodes.
        host_slots: Tasks that each of two hosts runs at a time.
        megabits: A second, of the link between them.
        parts: What is measured, of `PARTS`.
        ways: Whose bytes are counted.
    """

    nodes: int
    slots: int
    latency_slots: int
    reducers: int
    nbytes: int
    sizes: tuple[int, ...]
    batches: int
    simulated: tuple[int, ...]
    host_slots: int = 2
    megabits: int = 200
    parts: tuple[str, ...]
    ways: tuple[str, ...] = (RAY, GROUP, BLIND)

    @classmethod
    def choose(cls, *, quick: bool, parts: tuple[str, ...] | None = None) -> Settings:
        """The defaults of a quick or full run, but for what is given.

        Raises:
            ValueError: There is no such part.
        """
        if unknown := [part for part in parts or () if part not in PARTS]:
            raise ValueError(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
        if quick:
            return cls(
                nodes=2,
                slots=1,
                latency_slots=1,
                reducers=1,
                nbytes=MIB,
                sizes=(MIB,),
                batches=3,
                simulated=(10, 100),
                parts=parts or PARTS[:3],
                ways=(RAY, GROUP),
            )
        return cls(
            nodes=3,
            slots=4,
            latency_slots=2,
            reducers=4,
            nbytes=4 * MIB,
            sizes=(MIB, 4 * MIB, 15 * MIB),
            batches=20,
            simulated=(10, 100, 1_000, 10_000),
            parts=parts or PARTS,
        )

    def program(self, maps: int, nbytes: int, batches: int = 3) -> Program:
        """What both ways run."""
        return Program(
            maps=maps,
            reducers=self.reducers,
            nbytes=nbytes,
            piece=nbytes // _GRAIN,
            batches=batches,
        )


def run(settings: Settings, *, json_path: Path | None, plot_path: Path | None) -> Figures:
    """Measure, print, and write what was asked for."""
    a_run = Run("Flows: placed by group, and plain Ray", dataclasses.asdict(settings))
    lot = _Lot(a_run, settings)
    if "simulate" in settings.parts:
        lot.time_policies()
        lot.simulate()
    plan: dict[tuple[int, int], list[str]] = {}
    for part, slots in (("bytes", settings.slots), ("latency", settings.latency_slots)):
        if part in settings.parts:
            # Timed in turn, the workers of the flow must leave plain Ray as many slots. On
            # nodes of one CPU they ask for none of it.
            cpus = 2 * slots if part == "latency" and slots > 1 else slots
            plan.setdefault((slots, cpus), []).append(part)
    for (slots, cpus), parts in plan.items():
        a_run.say(f"starting {settings.nodes} raylets")
        try:
            with raylets(settings.nodes, cpus):
                asyncio.run(lot.measure(slots, parts))
        except _ERRORS as exc:
            a_run.figures.unavailable[f"the rest of {', '.join(parts)}"] = reason(exc)
    if "hosts" in settings.parts:
        a_run.say("starting two hosts")
        try:
            lot.measure_hosts()
        except _ERRORS as exc:
            a_run.figures.unavailable["the rest on two hosts"] = reason(exc)
    lot.judge()
    figures = a_run.finish(json_path, None)
    if plot_path is not None:
        plot(lot.latencies, plot_path)
        a_run.say(f"plot: {plot_path}")
    return figures


class _Lot:
    """All that is measured."""

    def __init__(self, a_run: Run, settings: Settings) -> None:
        self._run = a_run
        self._figures = a_run.figures
        self._settings = settings
        self._crossed: dict[tuple[str, int], int] = {}
        self._per_task: dict[int, float] = {}
        self.latencies: dict[tuple[int, str], list[float]] = {}  # of batches
        self._free: dict[tuple[int, str], list[float]] = {}  # ... of `FREE`

    # --- without Ray ---------------------------------------------------------------------------

    def time_policies(self) -> None:
        """What a decision costs, with its bookkeeping."""
        for nodes in (self._settings.nodes, *self._settings.simulated):
            samples = [_seconds_a_task(nodes, number) for number in range(10)]
            self._per_task[nodes] = statistics.median(samples)
            self._figures.add("policy, for each task", f"aiordt flow, {nodes} nodes", samples)

    def simulate(self) -> None:
        """Clusters that are not there."""
        settings = self._settings
        for nodes in settings.simulated:
            self._run.say(f"simulating {nodes} nodes")
            maps = nodes * 4
            program = dataclasses.replace(
                settings.program(maps, 4 * MIB, batches=1 if nodes > 1000 else 3), reducers=4
            )
            machine = _large(nodes)
            best = optimum(nodes, 4, program)
            for name, policy, first in _simulated_ways():
                out = Simulation(machine, policy, actors_first=first).run(program)
                self._figures.add(
                    f"simulated, {nodes} nodes, {maps} maps",
                    name,
                    out.latencies,
                    **{"/ optimum": f"{out.crossed / best:.2f}"},
                )
        for nbytes in (MIB, 4 * MIB, 15 * MIB):
            program = dataclasses.replace(
                settings.program(40, nbytes, batches=20), reducers=4, period=_PERIOD
            )
            for name, policy, first in _simulated_ways():
                out = Simulation(_large(10), policy, actors_first=first).run(program)
                self._figures.add(
                    f"simulated stream, 10 nodes, {format_nbytes(nbytes)} a map",
                    name,
                    out.latencies,
                    p99=format_seconds(Spread.of(out.latencies).p99),
                )

    # --- with Ray ------------------------------------------------------------------------------

    async def measure(self, slots: int, parts: list[str]) -> None:
        """Bytes that cross, and latencies, all ways in turn.

        Args:
            slots: Of each node.
            parts: Which of the two.
        """
        settings = self._settings
        number = settings.nodes * slots
        reducers = min(settings.reducers, slots)

        def way(name: str) -> Any:  # noqa: ANN401
            if name == RAY:
                return RayWay(reducers)
            return FlowWay(reducers, "group" if name == GROUP else "default", number)

        ways: dict[str, Any] = {}
        if "bytes" in parts:
            for name in settings.ways:  # plain Ray comes first, and has the cluster to itself
                one = ways[name] = way(name)
                for maps in (number, 2 * number):
                    self._run.say(f"bytes that cross, {maps} maps, {name}")
                    program = settings.program(maps, settings.nbytes)
                    _, self._crossed[name, maps] = await one.run(program, count=True)
                if "latency" not in parts:
                    await one.aclose()
            for maps in (number, 2 * number):
                self._show_crossed(maps)
        if "latency" in parts:
            ways = {name: ways.get(name) or way(name) for name in (GROUP, RAY)}
            for nbytes in settings.sizes:
                program = settings.program(number, nbytes, batches=2)
                await self._time_batches(ways, dataclasses.replace(program, reducers=reducers))
            for one in ways.values():
                await one.aclose()
        await release_workers()

    async def _time_batches(self, ways: dict[str, Any], program: Program) -> None:
        nbytes = program.nbytes
        self._run.say(f"batches of {format_nbytes(nbytes)} a map")
        for number in range(self._settings.batches):
            for functions, found in ((WORKING, self.latencies), (PASSING, self._free)):
                for name, way in ways.items():
                    seconds, _ = await way.run(program, functions)
                    if number:  # the first one warms up
                        found.setdefault((nbytes, name), []).extend(seconds)
        group = f"a batch of {program.maps} x {format_nbytes(nbytes)}"
        for title, found in ((group, self.latencies), (f"{group}, {FREE}", self._free)):
            for name in ways:
                samples = found[nbytes, name]
                facts = {
                    "mean": format_seconds(statistics.fmean(samples)),
                    "p99": format_seconds(Spread.of(samples).p99),
                }
                self._figures.add(title, name, samples, **facts)

    # --- on two hosts --------------------------------------------------------------------------

    def measure_hosts(self) -> None:
        """Two hosts with a slow link, and what the simulator makes of it.

        What a task takes besides the link is taken from the same program without the limit.
        """
        settings, figures = self._settings, self._figures
        maps = 2 * settings.host_slots
        reducers = min(settings.reducers, settings.host_slots)
        with _flow_hosts.program(reducers, maps) as asked:
            asked(settings.program(maps, settings.sizes[0]), None)  # starts all that is to run
            for nbytes in settings.sizes:
                self._run.say(f"two hosts, batches of {format_nbytes(nbytes)} a map")
                program = dataclasses.replace(settings.program(maps, nbytes, 6), reducers=reducers)
                fast, slow = asked(program, None), asked(program, settings.megabits)
                group = f"two hosts, {maps} x {format_nbytes(nbytes)}"
                for link, found in (("", fast), (f", {settings.megabits} Mbit/s", slow)):
                    for name, (seconds, crossed) in found.items():
                        moved = f"{crossed / MIB:.1f} MiB"
                        figures.add(f"{group}{link}", name, seconds[1:], crossed=moved)
                for name in (GROUP, RAY):
                    # The least: what others do on this machine is in neither.
                    simulated = self._predicted(program, name, min(fast[name][0][1:]))
                    measured = min(slow[name][0][1:])
                    figures.judge(
                        f"{group}, {settings.megabits} Mbit/s: the simulator, {name}",
                        "within 15 % of what was measured",
                        abs(simulated / measured - 1),
                        0.15,
                        f"{format_seconds(simulated)} for {format_seconds(measured)}",
                    )

    def _predicted(self, program: Program, name: str, unlimited: float) -> float:
        """A later batch's seconds over the slow link."""

        def simulated(call: float, bandwidth: float) -> float:
            machine = Machine(
                nodes=2,
                slots=self._settings.host_slots,
                bandwidth=bandwidth,
                burst=SLOW_BURST_NBYTES,
                call=call,
                rate=1e12,
                relayed=0 if name == RAY else MIN_NBYTES,
            )
            policy: Policy = RayLike(1) if name == RAY else GroupPolicy()
            out = Simulation(machine, policy, actors_first=name == RAY).run(program)
            return statistics.median(out.latencies[1:])

        low, high = 0.0, 1.0
        for _ in range(30):  # what a call takes, so that it agrees without the limit
            call = (low + high) / 2
            low, high = (low, call) if simulated(call, 1e12) > unlimited else (call, high)
        return simulated(low, self._settings.megabits * 1e6 / 8 * _PAYLOAD)

    def _small_case(self, maps: int) -> dict[str, int]:
        """What the simulator says of what was measured."""
        settings = self._settings
        program = settings.program(maps, settings.nbytes)
        machine = Machine(nodes=settings.nodes, slots=settings.slots)
        found = {}
        for name, make in (
            (GROUP, GroupPolicy),
            (RAY, functools.partial(RayLike, 1)),
        ):
            simulation = Simulation(machine, make(), actors_first=name == RAY)
            found[name] = simulation.run(program).crossed
        return found

    def _show_crossed(self, maps: int) -> None:
        settings = self._settings
        program = settings.program(maps, settings.nbytes)
        best = optimum(settings.nodes, settings.slots, program)
        simulated = self._small_case(maps)
        for name in settings.ways:
            crossed = self._crossed[name, maps]
            words = f"{crossed / MIB:.1f} MiB crossed, {crossed / max(best, 1):.2f} x the optimum"
            if name in simulated:
                words += f", {simulated[name] / MIB:.1f} MiB simulated"
            self._run.say(
                f"{maps} maps on {settings.nodes * settings.slots} slots, {name}: {words}"
            )

    def judge(self) -> None:
        """Hold what was found against the goals."""
        settings, figures = self._settings, self._figures
        if "bytes" in settings.parts:
            self._judge_bytes()
        if len(settings.sizes) > 1 and "latency" in settings.parts:
            least, most = settings.sizes[0], settings.sizes[-1]
            what = f"a batch at {format_nbytes(most)} a map, over {format_nbytes(least)}, mean"
            for words, found in ((what, self.latencies), (f"{what}, {FREE}", self._free)):
                took = {key: statistics.fmean(samples) for key, samples in found.items()}
                grown = {
                    name: took[most, name] / took[least, name]
                    for name in (GROUP, RAY)
                    if (least, name) in took and (most, name) in took
                }
                figures.judge(
                    words,
                    "flat: ≤ 1.2 x",
                    grown.get(GROUP),
                    1.2,
                    ", ".join(f"{name} {ratio:.2f} x" for name, ratio in grown.items()),
                )
        for nodes, seconds in self._per_task.items():
            figures.judge(
                f"policy, {nodes} nodes", "≤ 50 µs a task", seconds, 50e-6, format_seconds(seconds)
            )

    def _judge_bytes(self) -> None:
        settings, figures = self._settings, self._figures
        slots = settings.nodes * settings.slots
        for maps, limit in ((slots, 1.0), (2 * slots, 1.15)):
            program = settings.program(maps, settings.nbytes)
            best = optimum(settings.nodes, settings.slots, program)
            crossed = self._crossed.get((GROUP, maps))
            theirs = self._crossed.get((RAY, maps), 0)
            what = f"bytes that cross, {maps} maps on {slots} slots"
            figures.judge(
                what,
                f"≤ {limit} x the optimum of {best / MIB:g} MiB",
                None if crossed is None else crossed / best,
                limit,
                f"{(crossed or 0) / MIB:.1f} MiB; {RAY} {theirs / MIB:.1f} MiB",
            )
            for name, simulated in self._small_case(maps).items():
                measured = self._crossed.get((name, maps))
                off = None if not measured else abs(simulated / measured - 1)
                figures.judge(
                    f"{what}: the simulator, {name}",
                    "within 15 % of what was measured",
                    off,
                    0.15,
                    f"{simulated / MIB:.1f} MiB for {(measured or 0) / MIB:.1f} MiB",
                )


def _large(nodes: int) -> Machine:
    """Nodes with links of 10 Gbit/s, and a fabric that carries a quarter of what they bring."""
    bandwidth = 1.25e9
    return Machine(nodes=nodes, slots=4, bandwidth=bandwidth, fabric=nodes * bandwidth / 4)


def _simulated_ways() -> list[tuple[str, Policy, bool]]:
    """Of each: its name, its policy, and whether its actors are there before the data."""
    return [(GROUP, GroupPolicy(), False), (BLIND, DefaultActors(), True), (RAY, RayLike(1), True)]


class DefaultActors(DefaultPolicy):
    """`DefaultPolicy` where nobody else places the actors."""

    @override
    def place(self, request: Request, cluster: Cluster) -> list[Decision]:
        if request.actors:
            request = dataclasses.replace(request, actors=False)
        return super().place(request, cluster)


def _seconds_a_task(nodes: int, seed: int) -> float:
    """Placing a group on its broadcast, then one task after the other on its data."""
    policy = GroupPolicy()
    names = [f"node{number}" for number in range(nodes)]
    cluster = Cluster(dict.fromkeys(names, 4))
    near = {names[seed % nodes]: MIB}
    tasks = 4 * nodes
    begun = time.perf_counter()
    first = policy.place(Request(1, [{}] * tasks, near), cluster)
    for each in first:
        cluster.begin(1, each.node or "")
    for each in first:
        cluster.end(1, each.node or "")
        (then,) = policy.place(Request(2, [{each.node or "": MIB}]), cluster)
        cluster.begin(2, then.node or "")
        cluster.end(2, then.node or "")
    return (time.perf_counter() - begun) / (2 * tasks)


def plot(latencies: dict[tuple[int, str], list[float]], path: Path) -> None:
    """Draw how many batches ended within which time, for each size."""
    sizes = sorted({nbytes for nbytes, _ in latencies})
    colours = {GROUP: "#0072B2", RAY: "#999999"}
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.2 * max(len(sizes), 1), 3), layout="constrained")
        panels = figure.subplots(1, max(len(sizes), 1), squeeze=False, sharey=True)
        for axes, nbytes in zip(panels[0], sizes, strict=False):
            for name, colour in colours.items():
                samples = sorted(latencies.get((nbytes, name), []))
                shares = [(number + 1) / len(samples) for number in range(len(samples))]
                axes.step(samples, shares, where="post", color=colour, label=name)
            axes.set_title(f"{format_nbytes(nbytes)} a map")
            axes.set_xlabel("seconds for a batch")
            axes.set_xlim(left=0)
        panels[0][0].set_ylabel("share of batches")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        figure.savefig(path, dpi=150)
