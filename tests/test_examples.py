"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from tests.support import PROGRAM_SECONDS

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*args: str, cwd: Path, address: str = "") -> str:
    """Run an example to its end and return what it printed.

    Args:
        *args: Its name and options.
        cwd: Where.
        address: Of the cluster to use; without it, it makes one of its own.
    """
    name, *options = args
    kept_out = ("RAY_ADDRESS", "COVERAGE_")
    environment = {k: value for k, value in os.environ.items() if not k.startswith(kept_out)}
    if address:
        environment["RAY_ADDRESS"] = address
    # Refs that escape Ray's count are forbidden.
    environment["RAY_allow_out_of_band_object_ref_serialization"] = "0"
    finished = subprocess.run(  # noqa: S603
        [sys.executable, str(EXAMPLES / name), *options],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


def test_quickstart(cluster: None, tmp_path: Path) -> None:
    """Each step's weights arrive whole, and the next step is not seen too early."""
    address = ray.get_runtime_context().gcs_address
    output = run("quickstart.py", cwd=tmp_path, address=address)
    assert [line for line in output.splitlines() if line.startswith("step")] == [
        f"step {step}: got 16 MiB of {step}s from Trainer" for step in range(3)
    ]


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("groups", "[1.0, 1.0, 1.0]"),
        ("collectives_on_refs", "[-1.0, -1.0, -1.0]"),
        ("flow", "[7864320.0, 7864320.0]"),
        ("channels", "['loss 0.0', 'loss 1.0', 'loss 2.0']"),
        ("resharding", "column 1: [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]"),
        ("weights", "all versions were whole: True"),
    ],
)
def test_program_of_a_how_to(tmp_path: Path, page: str, printed: str) -> None:
    text = (EXAMPLES.parent / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    program = re.search(r"<!-- program -->\n```python\n(.*?)```", text, re.DOTALL)
    assert program is not None
    path = tmp_path / "program.py"
    path.write_text(program[1], encoding="utf-8")
    assert printed in run(str(path), cwd=tmp_path)


def test_data_parallel(tmp_path: Path) -> None:
    """The loss curve is that of a single process, to rounding, and the digits are learnt."""
    output = run("data_parallel.py", "--workers", "2", "--steps", "60", cwd=tmp_path)
    difference = re.search(r"largest difference of the losses: (\S+)", output)
    assert difference is not None
    assert float(difference[1]) < 1e-5, output
    accuracy = re.search(r"accuracy (\S+), alone (\S+)", output)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9, output


def test_pipeline_parallel(tmp_path: Path) -> None:
    """The losses are those of a single process, and the text is learnt."""
    output = run("pipeline_parallel.py", "--steps", "16", cwd=tmp_path)
    difference = re.search(r"largest difference of the losses: (\S+)", output)
    assert difference is not None
    assert float(difference[1]) < 1e-5, output
    last = re.search(r"last loss (\S+)", output)
    assert last is not None
    assert float(last[1]) < 3.0, output


def test_mpi_allreduce(tmp_path: Path) -> None:
    output = run("mpi_allreduce.py", cwd=tmp_path)
    assert [line for line in output.splitlines() if line.startswith("rank")] == [
        f"rank {rank}: mpi, the mean is 6.0" for rank in range(3)
    ]


def test_stream_mapreduce(tmp_path: Path) -> None:
    """Every word is counted, and the plot is drawn."""
    options = ("--batches", "8", "--maps", "2", "--reducers", "1", "--workers", "1")
    output = run("stream_mapreduce.py", *options, cwd=tmp_path)
    assert "the counts are those of one loop" in output
    assert (tmp_path / "stream_mapreduce.png").read_bytes().startswith(b"\x89PNG")


def test_async_rl_quick(tmp_path: Path) -> None:
    """Weights and trajectories go round, every sampler takes part, and the plot is drawn."""
    output = run("async_rl.py", "--quick", "--plot", "plot.png", cwd=tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"SOLVED in \d+\.\d s, mean return \d+", output)
    syncs = re.findall(r"(\d+) syncs", output)
    assert int(syncs[-1]) >= 4, output
    pulled = [float(nbytes) for nbytes in re.findall(r"(\d+\.\d) MiB shm", output)]
    assert len(pulled) == 2, output  # both samplers
    assert min(pulled) >= 2.0, output  # two versions of the weights, 1 MiB each


def test_weight_sync(tmp_path: Path) -> None:
    """The trainer learns, every sampler uses its weights, and columns are those of the whole."""
    tiny = ("--turns", "2", "--updates", "8", "--seconds", "0.05", "--width", "32", "--layers", "1")
    output = run("weight_sync.py", *tiny, cwd=tmp_path)
    losses = re.search(r"loss (\S+) -> (\S+)", output)
    assert losses is not None
    assert float(losses[2]) < float(losses[1]), output
    fewest = [int(versions) for versions in re.findall(r"(\d+) of 16", output)]
    assert len(fewest) == 2, output  # without and with aiordt
    assert min(fewest) >= 1, output
    assert output.count("they are those of the whole") == 2, output
