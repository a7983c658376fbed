"""The benchmarks: their arithmetic, their verdicts, and that they run."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks._measure import (
    GIB,
    KIB,
    MIB,
    PERIOD,
    Heartbeat,
    Spread,
    cpu_seconds,
    format_nbytes,
    format_seconds,
    lateness,
    machine_facts,
    percentile,
)
from benchmarks._pages import (
    HUGE,
    ORDINARY,
    SHARED,
    Copier,
    RawReader,
    fill,
    huge_share,
    is_filled,
    make_tensor,
    pages_for,
)
from benchmarks._report import plot, show
from benchmarks._results import (
    AIORDT,
    CMA,
    GLOO,
    MAPPED_ONE,
    MAPPED_TWO,
    NIXL,
    NIXL_PULL,
    PEERS,
    RAW_NIXL,
    RAW_ONE,
    RAW_TWO,
    RAW_UCXX,
    SHM,
    STORE,
    UCX,
    Goal,
    Idle,
    Lag,
    Latency,
    Results,
    goals,
    raw_best,
)
from benchmarks.p2p import PARTS, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]


def row(name: str, nbytes: int, seconds: float, pages: str = ORDINARY) -> Latency:
    spread = Spread.of([seconds])
    return Latency(name=name, nbytes=nbytes, pages=pages, spread=spread, round_p50=(seconds,))


def results(actors: Sequence[Latency] = (), pulls: Sequence[Latency] = ()) -> Results:
    return Results({}, {}, actors=list(actors), pulls=list(pulls))


def by_goal(found: Results) -> dict[tuple[str, str], Goal]:
    return {(goal.figure, goal.goal): goal for goal in goals(found)}


# --- arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3.0], 50, 3.0),
        ([1.0, 2.0], 50, 1.5),
        ([4.0, 1.0, 3.0, 2.0], 0, 1.0),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        (list(map(float, range(101))), 99, 99.0),
        (list(map(float, range(11))), 95, 9.5),
    ],
)
def test_percentile_interpolates(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_percentile_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="100"):
        percentile([1.0], 101)


def test_spread_keeps_the_extremes() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert (spread.low, spread.p10, spread.p50, spread.p90, spread.high) == (0, 10, 50, 90, 100)
    assert spread.num_samples == 101


def test_words() -> None:
    assert [format_nbytes(n) for n in (8, KIB, 64 * KIB, 256 * MIB, GIB)] == [
        "8 B",
        "1 KiB",
        "64 KiB",
        "256 MiB",
        "1 GiB",
    ]
    assert [format_seconds(s) for s in (0, 5e-9, 2.5e-6, 68.2e-6, 0.1234, 1.5)] == [
        "0",
        "5 ns",
        "2.50 µs",
        "68.2 µs",
        "123 ms",
        "1.50 s",
    ]


def test_lateness_counts_the_ticks_that_could_not_come() -> None:
    # Due at 1 s, came 5 periods late: ticks that were 4, 3, 2 and 1 late did not come at all.
    ticks = [(1.0, 1.0 + 5.5 * PERIOD), (9.0, 9.0001)]
    late = lateness(ticks, [(0.9, 1.1)])
    assert [value / PERIOD for value in late] == pytest.approx([5.5, 4.5, 3.5, 2.5, 1.5])
    assert len(lateness(ticks, [(0.9, 1.1)], corrected=False)) == 1


def test_lateness_sees_a_tick_that_came_only_after_the_window() -> None:
    assert lateness([(1.0, 2.0)], [(1.1, 1.9)], corrected=False) == [1.0]
    assert lateness([(1.0, 1.05)], [(1.1, 1.9)]) == []


async def test_the_heartbeat_notices_a_blocked_loop() -> None:
    heart = Heartbeat()
    heart.start()
    await asyncio.sleep(5 * PERIOD)
    begun = time.perf_counter()
    time.sleep(0.05)  # noqa: ASYNC251  (what the heartbeat is for)
    over = time.perf_counter()
    await asyncio.sleep(5 * PERIOD)
    assert max(lateness(heart.stop(), [(begun, over)])) > 0.04


def test_cpu_clock_of_a_process() -> None:
    before = cpu_seconds(os.getpid())
    while time.process_time() < before + 0.02:
        pass
    assert cpu_seconds(os.getpid()) >= before + 0.02


def test_raw_reads_get_the_bytes() -> None:
    nbytes = 3 * MIB + 5
    source = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
    reader = RawReader(os.getpid())
    try:
        for read in (reader.read, reader.read_by_two):
            target = torch.zeros(nbytes, dtype=torch.uint8)
            try:
                read(source.data_ptr(), target.data_ptr(), nbytes)
            except PermissionError:
                pytest.skip("this kernel does not let a process read even itself")
            assert torch.equal(source, target)
    finally:
        reader.close()


def test_copies_get_the_bytes() -> None:
    nbytes = 3 * MIB + 5
    source = fill(torch.empty(nbytes, dtype=torch.uint8))
    copier = Copier()
    try:
        for read in (copier.read, copier.read_by_two):
            target = torch.zeros(nbytes, dtype=torch.uint8)
            assert not is_filled(target)
            read(source.data_ptr(), target.data_ptr(), nbytes)
            assert is_filled(target)
    finally:
        copier.close()


def test_pages() -> None:
    assert pages_for(MIB) == (ORDINARY,)
    assert pages_for(16 * MIB) == (ORDINARY, HUGE)
    for pages in (ORDINARY, HUGE):
        tensor = make_tensor(4 * MIB, pages)
        assert tensor.nbytes == 4 * MIB
        assert bool((tensor == 1).all())
        assert 0 <= huge_share(tensor) <= 1


# --- verdicts ------------------------------------------------------------------------------


def test_small_goals_are_held_against_each_peer() -> None:
    found = by_goal(
        results([row(AIORDT, KIB, 1.1), row(STORE, KIB, 1.0), row(GLOO, KIB, 2.0)]),
    )
    assert found["actor to actor, 1 KiB", "≤ 1.2 x object store"].met is True
    assert found["actor to actor, 1 KiB", "≤ 0.5 x RDT Gloo"].met is False
    assert found["actor to actor, 1 KiB", "≤ 0.5 x RDT NIXL"].met is None


def test_large_goals_tell_the_pages_apart() -> None:
    found = by_goal(
        results(
            [
                row(AIORDT, 256 * MIB, 1.0),
                row(NIXL, 256 * MIB, 5.0),
                row(AIORDT, 256 * MIB, 1.0, HUGE),
                row(NIXL, 256 * MIB, 4.9, HUGE),
            ]
        )
    )
    goal = "≥ 5 x faster than RDT NIXL"
    assert found[f"actor to actor, 256 MiB, {ORDINARY}", goal].met is True
    assert found[f"actor to actor, 256 MiB, {HUGE}", goal].met is False


def test_pulls_are_held_against_the_faster_raw_read() -> None:
    rows = [
        row(CMA, 64 * KIB, 51e-6),
        row(CMA, 256 * MIB, 1.0),
        row(RAW_ONE, 256 * MIB, 2.0),
        row(RAW_TWO, 256 * MIB, 0.85),
    ]
    best = raw_best(rows, 256 * MIB, ORDINARY)
    assert best is not None
    assert best.name == RAW_TWO
    found = by_goal(results(pulls=rows))
    assert found["pull of a held ref, 64 KiB", "p50 ≤ 50 µs"].met is False
    figure = f"pull of a held ref, 256 MiB, {ORDINARY}"
    assert found[figure, "≥ 80 % of the raw reads' speed"].met is True
    assert found[figure, "≥ 90 % of the raw reads' speed"].met is False


def test_each_transport_is_held_against_its_own_raw_layer() -> None:
    rows = [
        row(SHM, 256 * MIB, 1.0, SHARED),
        row(MAPPED_ONE, 256 * MIB, 2.0, SHARED),
        row(MAPPED_TWO, 256 * MIB, 0.89, SHARED),
        row(NIXL_PULL, 256 * MIB, 1.0, HUGE),
        row(RAW_NIXL, 256 * MIB, 0.91, HUGE),
        row(UCX, 256 * MIB, 1.0),
    ]
    found = results(pulls=rows)
    found.unavailable[RAW_UCXX] = "ucxx is not installed"
    goals_of = by_goal(found)
    figure = "pull of a held ref by {}, 256 MiB, {}"
    assert goals_of[figure.format("shm", SHARED), "≥ 90 % of memcpy's speed"].met is False
    assert goals_of[figure.format("nixl", HUGE), "≥ 90 % of raw NIXL's speed"].met is True
    lost = goals_of[figure.format("ucx", ORDINARY), "≥ 90 % of raw ucxx's speed"]
    assert (lost.met, lost.measured) == (None, "ucxx is not installed")


def test_lag_and_idle_goals() -> None:
    found = results()
    late, calm = Spread.of([3e-3]), Spread.of([1e-4])
    found.lags = [
        Lag(name=AIORDT, what="4", duration=calm, late=late, ticks=calm, idle=calm),
        Lag(name=NIXL, what="4", duration=calm, late=late, ticks=calm, idle=calm),
    ]
    found.idles = [
        Idle(name=AIORDT, process="driver", awaits="", seconds=0.04, cores=0.009),
        Idle(name=AIORDT, process="consumer", awaits="", seconds=0.06, cores=0.012),
        Idle(name="plain Ray", process="consumer", awaits="", seconds=0.06, cores=0.011),
    ]
    rows = {goal.figure: goal for goal in goals(found)}
    assert rows["loop lag while 1 GiB arrives, 4"].met is False
    assert rows["idle CPU, 1,000 awaits pending, driver"].met is True
    assert rows["idle CPU, 1,000 awaits pending, consumer"].met is False
    assert "plain Ray: 1.10%" in rows["idle CPU, 1,000 awaits pending, consumer"].measured


def test_what_was_not_measured_is_no_verdict_and_says_why() -> None:
    found = results([row(AIORDT, KIB, 1.0)])
    found.unavailable[NIXL] = "nixl is not installed"
    rows = by_goal(found)
    assert all(goal.met is None for goal in rows.values())
    small = rows["actor to actor, 1 KiB", "≤ 0.5 x RDT NIXL"]
    assert small.measured == "nixl is not installed"


# --- output --------------------------------------------------------------------------------


def test_json_shape_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console  # noqa: PLC0415  (after capsys has replaced stdout)

    sizes = (8, KIB, 16 * MIB)
    actors = [
        row(peer, nbytes, 1e-3 * (1 + index), pages)
        for index, peer in enumerate(PEERS)
        for nbytes in sizes
        for pages in pages_for(nbytes)
    ]
    found = results(actors, [row(CMA, nbytes, 1e-5) for nbytes in sizes])
    found.machine = machine_facts()
    shape = json.loads(json.dumps(found.to_json()))
    assert set(shape) == {
        "format",
        "machine",
        "settings",
        "actors",
        "pulls",
        "lags",
        "idles",
        "unavailable",
        "huge_share",
        "goals",
    }
    first = shape["actors"][0]
    assert set(first) == {"name", "nbytes", "pages", "spread", "round_p50"}
    assert {"num_samples", "p10", "p50", "p90", "low", "high"} <= set(first["spread"])
    assert {"cpu", "cores", "kernel", "versions", "thp", "date", "load_average"} <= set(
        shape["machine"]
    )
    show(found, Console(width=140))
    assert "Goals of the design" in capsys.readouterr().out
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_settings() -> None:
    quick, full = Settings.choose(quick=True), Settings.choose(quick=False)
    assert set(quick.sizes) < set(full.sizes)
    assert full.peers == PEERS
    assert full.parts == PARTS
    with pytest.raises(ValueError, match="none of"):
        Settings.choose(quick=True, only=("carrier pigeon",))
    with pytest.raises(ValueError, match="none of"):
        Settings.choose(quick=True, parts=("everything",))
    with pytest.raises(ValueError, match="positive"):
        Settings.choose(quick=True, sizes=(0,))
