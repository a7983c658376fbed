"""Fuzz by atheris, coverage-guided: ``python -m tests.fuzz --seconds 60 [target ...]``.

Each target runs in a process of its own, since libFuzzer ends it. What it finds on its way is
kept in ``.fuzz/<target>``, and where the next run begins; an input that it fails on is written to
``.fuzz/<target>-crash-...``, to be run again by ``python -m tests.fuzz --input FILE target``.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".fuzz")
#: One that blocks for so long has failed, too.
HANG_SECONDS = 20


def fuzz(name: str, seconds: int) -> None:
    """Never returns."""
    import atheris  # noqa: PLC0415  (in the process that it ends)

    with atheris.instrument_imports(include=["aiordt"]):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415
    logging.getLogger("aiordt").setLevel(logging.CRITICAL)  # refusals come by the thousand
    target = TARGETS[name]
    corpus = FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / f"seed-{hashlib.sha1(seed, usedforsecurity=False).hexdigest()}").write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "timeout": HANG_SECONDS,
        "max_len": 4096,
        "print_final_stats": 1,
        "artifact_prefix": f"{FOLDER}/{name}-",
    }
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], target.run)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="which; all, if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="of each")
    parser.add_argument("--input", type=Path, help="run the targets on this file only")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        fuzz(options.targets[0], options.seconds)
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415  (not before it is instrumented)

    failed = []
    for name in options.targets or TARGETS:
        if options.input is not None:
            TARGETS[name].run(options.input.read_bytes())
            continue
        command = [sys.executable, "-m", "tests.fuzz", "--one", "--seconds", str(options.seconds)]
        if subprocess.run([*command, name], check=False).returncode:  # noqa: S603
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
