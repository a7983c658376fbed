"""The command line: ``python -m aiordt.mpi run -n N -- script.py``."""

from __future__ import annotations

import sys

from aiordt.mpi._launch import USAGE, run, say


def main(arguments: list[str]) -> int:
    """Run the command; the exit status."""
    match arguments:
        case ["run", *rest] if not {"-h", "--help"} & set(rest[: [*rest, "--"].index("--")]):
            return run(rest)
        case [] | ["-h" | "--help", *_] | ["run", *_]:
            print(USAGE, end="")  # noqa: T201
            return 0
        case _:
            say(f"there is no command {arguments[0]!r}\n\n{USAGE}")
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
