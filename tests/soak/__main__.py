"""A long soak, and its report: ``python -m tests.soak --peers 1000 --pulls 100``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import ray
import rich

from aiordt.transports import probe
from tests.soak.peers import Soak, soak

_TRANSPORTS = "cma,tcp,shm,ucx,nixl"


def report(found: Soak) -> str:
    """What came of it, as a table."""
    rows = "\n".join(
        f"| {gone} | {counts.exports} | {counts.refs} | {counts.fds} | {counts.threads} | "
        f"{counts.tasks} | {counts.nbytes / (1 << 20):.1f} |"
        for gone, counts in sorted(found.counts.items())
    )
    return (
        f"{found.transfers} transfers with the right bytes, {found.wrong} with others, "
        f"{max(found.counts)} peers, in {found.seconds:.0f} s. The owner's memory grew by "
        f"{found.drift:.2%} since a tenth of them had gone. Freed notices: "
        f"p50 {found.notice(50) * 1e3:.1f} ms, p99 {found.notice(99) * 1e3:.1f} ms.\n\n"
        "| peers gone | exports | refs | fds | threads | tasks | MiB |\n"
        f"| --- | --- | --- | --- | --- | --- | --- |\n{rows}\n"
    )


def main() -> int:
    """Run it; 1 if bytes were wrong, or the owner kept anything."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--pulls", type=int, default=100)
    parser.add_argument("--transports", default=_TRANSPORTS)
    parser.add_argument("--report", type=Path, help="write the table there")
    options = parser.parse_args()
    usable = [name for name in options.transports.split(",") if probe(name).usable]
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    found = asyncio.run(soak(options.peers, options.pulls, usable, say=rich.print))
    ray.shutdown()
    text = report(found)
    rich.print(text)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    last = found.counts[max(found.counts)]
    return 1 if found.wrong or last.exports or last.refs else 0


if __name__ == "__main__":
    sys.exit(main())
