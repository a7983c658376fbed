"""The one place for settings: a frozen `Config`, from `configure()` and ``AIORDT_*``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from aiordt._errors import InvalidTypeError, InvalidValueError, UsageError
from aiordt._types import GIB, KIB

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

#: aiordt's own transports, in order of preference for host memory; the last is used on demand.
TRANSPORTS: Final = ("shm", "cma", "nixl", "tcp", "ucx", "mpi")
#: Names that are taken for what is to come; asking for one says that it is not there yet.
PLANNED: Final = ("cuda_ipc",)
#: The entry points under which other packages bring their transports.
GROUP: Final = "aiordt.transports"
_ENV_PREFIX: Final = "AIORDT_"
#: What `aiordt.mpi` tells its own processes; no settings.
_MPI_PREFIX: Final = "AIORDT_MPI_"


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one process.

    The exporter's ``inline_*``, ``item_seconds`` and ``checksums``, and the consumer's other
    settings, apply to a transfer.

    Attributes:
        inline_nbytes: Tensors up to this size travel inside their ref, by value.
        inline_result_nbytes: ... and up to this many bytes in one result.
        max_in_flight_bytes: Pulls beyond this many bytes wait their turn, first come first
            served. At most half of it comes from one owner, and what is larger counts as half.
            Tensors up to 1 MiB have a quarter as much for themselves.
        pool_nbytes: Receive memory kept for reuse; beyond it ordinary memory is used. As much
            unused shared memory is kept, too.
        arena_nbytes: Shared memory that `aiordt.empty` may take; half of the machine's.
        max_exported_bytes: Exports beyond this many bytes of storages wait until earlier ones
            are freed; a result that is larger by itself is refused. 0: no limit.
        relay_nbytes: Shared memory for copies of other hosts' tensors, which the processes of
            this host read instead of pulling the same bytes once more. 0: none.
        item_seconds: An item of a generator that nobody has taken yet is kept for so long.
        checksums: What this process exports is checked by whoever pulls it.
        tcp_streams: Connections that one large tensor is spread over.
        transports: Transports that may be used, in order of preference.
    """

    inline_nbytes: int = 16 * KIB
    inline_result_nbytes: int = 64 * KIB
    max_in_flight_bytes: int = 2 * GIB
    pool_nbytes: int = 1 * GIB
    arena_nbytes: int = field(default_factory=_half_of_memory)
    max_exported_bytes: int = 0
    relay_nbytes: int = 1 * GIB
    item_seconds: int = 300
    checksums: bool = False
    tcp_streams: int = 2
    transports: tuple[str, ...] = TRANSPORTS

    def __post_init__(self) -> None:
        for name in (
            "inline_nbytes",
            "inline_result_nbytes",
            "pool_nbytes",
            "max_exported_bytes",
            "relay_nbytes",
        ):
            _check_int(name, getattr(self, name), minimum=0)
        for name in ("max_in_flight_bytes", "tcp_streams", "arena_nbytes", "item_seconds"):
            _check_int(name, getattr(self, name), minimum=1)
        checksums: object = self.checksums
        if not isinstance(checksums, bool):
            raise InvalidTypeError(f"checksums must be a bool, not {checksums!r}")
        if checksums and (reason := missing_for_checksums()):
            raise InvalidValueError(reason)
        given: object = self.transports
        if not isinstance(given, tuple | list) or not all(isinstance(name, str) for name in given):
            raise InvalidTypeError(f"transports must be a sequence of str, not {self.transports!r}")
        object.__setattr__(self, "transports", tuple(self.transports))
        unknown = [name for name in self.transports if name not in (*TRANSPORTS, *others())]
        if unknown or not self.transports:
            raise InvalidValueError(
                f"transports={self.transports!r}: choose at least one of {(*TRANSPORTS, *others())}"
            )


@functools.cache
def others() -> dict[str, EntryPoint]:
    """The transports that other packages bring, by name."""
    entries = entry_points(group=GROUP)
    return {entry.name: entry for entry in entries if entry.name not in (*TRANSPORTS, *PLANNED)}


def missing_for_checksums() -> str:
    """Why checksums can be neither made nor checked in this process; empty if they can."""
    if importlib.util.find_spec("xxhash") is None:
        return "checksums need xxhash, which is not installed: pip install aiordt[checksums]"
    return ""


def _check_int(name: str, value: object, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidTypeError(f"{name} must be an int, not {value!r}")
    if value < minimum:
        raise InvalidValueError(f"{name} must be at least {minimum}, not {value}")


def from_environment(environment: Mapping[str, str]) -> Config:
    """Read ``AIORDT_<NAME>`` for every field of `Config`.

    Raises:
        UsageError: A name is unknown or a value is not valid.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(_ENV_PREFIX) or variable.startswith(_MPI_PREFIX):
            continue
        name = variable.removeprefix(_ENV_PREFIX).lower()
        if name not in fields:
            raise InvalidValueError(f"{variable}: no such setting; there are {', '.join(fields)}")
        if name == "transports":
            values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
            continue
        if isinstance(fields[name].default, bool):
            if text not in {"0", "1"}:
                raise InvalidValueError(f"{variable}={text!r} is neither 0 nor 1")
            values[name] = text == "1"
            continue
        try:
            values[name] = int(text)
        except ValueError as exc:
            raise InvalidValueError(f"{variable}={text!r} is not an integer") from exc
    return Config(**values)


class _Settings:
    """What `configure` was given, until a runtime takes it."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.taken_by: str | None = None
        self.taken: Config | None = None


_settings = _Settings()


def configure(**options: Any) -> None:  # noqa: ANN401  (checked by Config)
    """Set options of this process; call it before aiordt is used here.

    Each option may also be set as ``AIORDT_<NAME>`` in the environment; a value given
    here wins. The settings are per process: actors read theirs from their own environment
    (``runtime_env={"env_vars": {...}}``) or call `configure` themselves.

    Args:
        **options: Fields of `aiordt.Config`.

    Raises:
        UsageError: An option is unknown or not valid, or the runtime has started.
    """
    if _settings.taken_by is not None:
        raise UsageError(
            f"configure() came too late: {_settings.taken_by}; call it before the first export "
            "or pull in this process"
        )
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InvalidValueError(f"no such setting: {', '.join(unknown)}; there are {sorted(known)}")
    merged = {**_settings.given, **options}
    dataclasses.replace(from_environment(os.environ), **merged)  # refuse now, not at first use
    _settings.given = merged


def peek() -> Config:
    """The settings as they are now, whether a runtime has started or not."""
    if _settings.taken is None:
        return dataclasses.replace(from_environment(os.environ), **_settings.given)
    return _settings.taken


def take() -> Config:
    """The settings for a runtime that starts now; `configure` is refused from here on."""
    config = dataclasses.replace(from_environment(os.environ), **_settings.given)
    _settings.taken_by = "the runtime of this process has started"
    _settings.taken = config
    return config


def release() -> None:
    """The runtime has ended; `configure` may be called again."""
    _settings.taken_by = None
    _settings.taken = None
