"""Process groups of `torch.distributed`, made directly: Gloo for host memory, NCCL for CUDA.

The user's default group is neither needed nor touched. What the members of a process group must
tell each other to connect travels over the mesh of ours: no port is fixed, no ``MASTER_ADDR``.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from typing_extensions import override

from aiordt._errors import TransferError, UnavailableError
from aiordt.collective._call import Mover
from aiordt.collective._engine import Pending
from aiordt.collective._rules import REDUCING, working_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiordt.collective._call import Buffers, Call
    from aiordt.collective._engine import Engine, Steps

#: What is left to do for an operation of Gloo; ours end sooner, when the group does.
_FOREVER: Final = timedelta(days=365)
_OPS: Final = {
    "sum": "SUM",
    "avg": "SUM",
    "product": "PRODUCT",
    "min": "MIN",
    "max": "MAX",
    "band": "BAND",
    "bor": "BOR",
    "bxor": "BXOR",
}
_GLOO_DTYPES: Final = frozenset(
    {torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64}
)
#: Computed in these where Gloo has no such dtype. Sums of unsigned integers are those of signed
#: ones of the same size; their order is not, so they are widened.
_WIDENED: Final = {
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}


class _Store(dist.Store):
    """Keys and values, told to all members over the mesh."""

    def __init__(self, engine: Engine, prefix: str, timeout: float) -> None:
        super().__init__()
        self._engine = engine
        self._prefix = prefix
        self._timeout = timeout

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._engine.store(self._prefix + key, data)

    def get(self, key: str) -> bytes:
        return self._engine.stored([self._prefix + key], self._timeout)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        seconds = self._timeout if timeout is None else timeout.total_seconds()
        self._engine.stored([self._prefix + key for key in keys], min(seconds, self._timeout))

    def check(self, keys: list[str]) -> bool:
        return self._engine.has_stored([self._prefix + key for key in keys])

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._engine.stored([self._prefix + key for key in keys], self._timeout)

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()

    def has_extended_api(self) -> bool:
        return True


class _GroupMover(Mover):
    """Moves payloads by a process group.

    Args:
        engine: The group.
        group: The process group.
    """

    def __init__(self, engine: Engine, group: Any) -> None:  # noqa: ANN401
        self._engine = engine
        self._group = group

    def _await(self, work: Any) -> Steps:  # noqa: ANN401
        """Wait for a work's end, and raise its error."""
        raise NotImplementedError

    @override
    def move(self, call: Call, buffers: Sequence[Buffers], announced: Sequence[bytes]) -> Steps:
        for each in buffers:
            if each.unit.numel:
                yield from self._move(call, each)

    def _move(self, call: Call, each: Buffers) -> Steps:
        if call.kind in REDUCING:
            yield from self._reduce(call, each)
        elif call.kind == "broadcast":
            yield from self._broadcast(call, each)
        elif call.kind == "scatter":
            yield from self._exchange(call, each, one_sender=True)
        elif call.kind == "alltoall":
            yield from self._exchange(call, each, one_sender=False)
        elif call.kind == "allgather":
            yield from self._await(
                self._group._allgather_base(_bytes(each.out), _bytes(each.source))  # noqa: SLF001
            )
        else:
            yield from self._gather(call, each)

    def _reduce(self, call: Call, each: Buffers) -> Steps:
        unit = each.unit
        wide = _reduced_as(call.op, unit.dtype)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = getattr(dist.ReduceOp, _OPS[call.op])
        whole = call.kind != "reducescatter" and call.receives
        reuse = whole and wide is unit.dtype
        if reuse:
            work = (
                each.out
                if each.out.data_ptr() == each.source.data_ptr()
                else (each.out.copy_(each.source))
            )
        elif wide is unit.dtype:
            work = each.source.clone()
        elif wide.itemsize == unit.dtype.itemsize:
            work = each.source.view(wide).clone()
        else:
            work = each.source.to(wide)
        viewed = torch.view_as_real(work).view(-1) if work.is_complex() else work
        yield from self._await(self._group.allreduce([viewed], options))
        if call.op == "avg":
            work /= call.size
        if not call.receives:
            return
        if call.kind == "reducescatter":
            work = work[unit.bounds[call.rank] : unit.bounds[call.rank + 1]]
        if not reuse:
            same = wide is unit.dtype or wide.itemsize != unit.dtype.itemsize
            each.out.copy_(work if same else work.view(unit.dtype))

    def _broadcast(self, call: Call, each: Buffers) -> Steps:
        options: Any = dist.BroadcastOptions()
        options.rootRank = call.root
        options.rootTensor = 0
        if call.rank == call.root and each.out.data_ptr() != each.source.data_ptr():
            each.out.copy_(each.source)
        yield from self._await(self._group.broadcast([_bytes(each.out)], options))

    def _exchange(self, call: Call, each: Buffers, *, one_sender: bool) -> Steps:
        bounds, itemsize = each.unit.bounds, each.unit.dtype.itemsize
        sizes = [(high - low) * itemsize for low, high in zip(bounds, bounds[1:], strict=False)]
        mine = sizes[call.rank]
        sends, receives = sizes, [mine] * call.size
        if one_sender:
            sends = sizes if call.rank == call.root else [0] * call.size
            receives = [mine if rank == call.root else 0 for rank in range(call.size)]
        yield from self._await(
            self._group.alltoall_base(_bytes(each.out), _bytes(each.source), receives, sends)
        )

    def _gather(self, call: Call, each: Buffers) -> Steps:
        nbytes = each.unit.nbytes
        sends = [nbytes if rank == call.root else 0 for rank in range(call.size)]
        receives = [nbytes if call.receives else 0] * call.size
        yield from self._await(
            self._group.alltoall_base(_bytes(each.out), _bytes(each.source), receives, sends)
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What is moved, not computed with, is moved as bytes: so every dtype can."""
    return tensor.view(torch.uint8)


def _reduced_as(op: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that Gloo reduces in.

    Raises:
        UnavailableError: There is none.
    """
    wide = working_dtype(op, dtype)
    if wide in _GLOO_DTYPES or (wide.is_complex and op in {"sum", "avg"}):
        return wide
    if wide is torch.uint64 and op not in {"min", "max"}:
        return torch.int64
    if wide in _WIDENED:
        return _WIDENED[wide]
    reason = f"Gloo has no {op!r} of {dtype}"
    raise UnavailableError(f"gloo: {reason}", reason=reason, transport="gloo")


class GlooMover(_GroupMover):
    """Gloo, over TCP."""

    def __init__(self, engine: Engine, host: str, timeout: float, prefix: str = "gloo/") -> None:
        """Connect to all members; blocks until they do, too.

        Raises:
            GroupError: The group ended meanwhile.
            UnavailableError: This PyTorch has no Gloo.
        """
        made: Any = getattr(dist, "ProcessGroupGloo", None)
        if made is None:
            reason = "this PyTorch was built without Gloo"
            raise UnavailableError(f"gloo: {reason}", reason=reason, transport="gloo")
        options = made._Options()  # noqa: SLF001
        options._devices = [made.create_device(hostname=host, lazy_init=False)]  # noqa: SLF001
        options._threads = 2  # noqa: SLF001
        options._timeout = timedelta(seconds=timeout)  # noqa: SLF001
        self._store = _Store(engine, prefix, timeout)  # read by threads of the group
        group = made(self._store, engine.rank, engine.size, options)
        group._set_default_timeout(_FOREVER)  # noqa: SLF001
        super().__init__(engine, group)
        # What they told each other has a ``sockaddr`` in it: where each one listens.
        listening = engine.stored(_keys(prefix, engine.size), timeout)
        engine.on_end(lambda: _cut(listening))

    @override
    def _await(self, work: Any) -> Steps:
        pending = Pending()
        future = work.get_future()
        future.add_done_callback(lambda _: pending.finish())
        yield pending
        try:
            future.value()
        except RuntimeError as exc:
            raise TransferError(
                f"gloo: {str(exc).splitlines()[0]}", transport="gloo", peer="", nbytes=0
            ) from exc


def _keys(prefix: str, size: int) -> list[str]:
    return [f"{prefix}0/{rank}" for rank in range(size)]


def _cut(listening: Sequence[bytes]) -> None:
    """End the connections of a Gloo group: it has no way to end what is pending by itself.

    They are found among all of this process by the addresses that its members listen at.
    """
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError, ValueError):
            number = int(entry.name)
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(number)) as sock:
                if sock.family not in {socket.AF_INET, socket.AF_INET6}:
                    continue
                for name in (sock.getsockname(), sock.getpeername()):
                    where = _packed(sock.family, name)
                    if any(where in value for value in listening):
                        sock.shutdown(socket.SHUT_RDWR)


def _packed(family: int, name: Any) -> bytes:  # noqa: ANN401
    """An address as it stands in a ``sockaddr``: its port and its number."""
    port = struct.pack("!H", name[1])
    number = socket.inet_pton(family, name[0].partition("%")[0])
    return port + (number if family == socket.AF_INET else bytes(4) + number)
