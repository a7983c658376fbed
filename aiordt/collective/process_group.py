"""Process groups of `torch.distributed`, made directly: Gloo for host memory, NCCL for CUDA.

The user's default group is neither needed nor touched. What the members of a process group must
tell each other to connect travels over the mesh of ours: no port is fixed, no ``MASTER_ADDR``.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from abc import abstractmethod
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from typing_extensions import override

from aiordt._device import layer
from aiordt._errors import InvalidTypeError, TransferError, UnavailableError
from aiordt._progress import Workers
from aiordt.collective._rules import REDUCING, dtype_name, working_dtype
from aiordt.collective._steps import Pending
from aiordt.collective._turns import TurnMover

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractContextManager

    from aiordt.collective._call import Buffers, Call
    from aiordt.collective._engine import Engine
    from aiordt.collective._steps import Steps

#: What Gloo has to end an operation, once its connections were cut.
_GRACE_SECONDS: Final = 0.5
#: Groups, and operations, that did not.
_abandoned: Final[list[object]] = []
#: Operations end when the group does.
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


class _Store(dist.Store):  # type: ignore[misc, name-defined]
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


class _GroupMover(TurnMover):
    """Moves payloads by process groups of `torch.distributed`."""

    @abstractmethod
    def _issue(self, start: Callable[[], Any]) -> Steps:
        """Start a work, wait for its end, and raise its error."""

    @override
    def _move(self, call: Call, each: Buffers, group: Any) -> Steps:
        if call.kind in REDUCING:
            yield from self._reduce(call, each, group)
            return
        source, out = _bytes(each.source), _bytes(each.out)
        if call.kind == "broadcast":
            if call.rank == call.root and out.data_ptr() != source.data_ptr():
                out.copy_(source)
            options: Any = dist.BroadcastOptions()
            options.rootRank = call.root
            options.rootTensor = 0
            yield from self._issue(lambda: group.broadcast([out], options))
        elif call.kind == "allgather":
            yield from self._issue(lambda: group._allgather_base(out, source))  # noqa: SLF001
        else:
            sends, receives = _splits(call, each)
            yield from self._issue(lambda: group.alltoall_base(out, source, receives, sends))

    def _reduce(self, call: Call, each: Buffers, group: Any) -> Steps:  # noqa: ANN401
        unit = each.unit
        wide = self._reduced_as(call.op, unit.dtype)
        whole = call.kind != "reducescatter" and call.receives
        if wide is unit.dtype and whole:
            work = each.out
            if work.data_ptr() != each.source.data_ptr():
                work.copy_(each.source)
        elif wide is unit.dtype:
            work = each.source.clone()
        elif wide.itemsize == unit.dtype.itemsize:
            work = each.source.view(wide).clone()
        else:
            work = each.source.to(wide)
        flat = torch.view_as_real(work).view(-1) if work.is_complex() else work
        options: Any = dist.AllreduceOptions()
        options.reduceOp = getattr(dist.ReduceOp, _OPS[call.op])
        yield from self._issue(lambda: group.allreduce([flat], options))
        if call.op == "avg":
            work /= call.size
        if not call.receives or work.data_ptr() == each.out.data_ptr():
            return
        if call.kind == "reducescatter":
            work = work[unit.bounds[call.rank] : unit.bounds[call.rank + 1]]
        same_size = wide is not unit.dtype and wide.itemsize == unit.dtype.itemsize
        each.out.copy_(work.view(unit.dtype) if same_size else work)

    @override
    def check(self, call: Call) -> None:
        for tensor in call.tensors or () if call.kind in REDUCING else ():
            self._reduced_as(call.op, tensor.dtype)

    @staticmethod
    def _reduced_as(op: str, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG004
        """The dtype that a reduction is computed in.

        Raises:
            InvalidTypeError: The library cannot.
        """
        return working_dtype(dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What is moved, not computed with, is moved as bytes: so every dtype can."""
    return tensor.view(torch.uint8)


def _splits(call: Call, each: Buffers) -> tuple[list[int], list[int]]:
    """How many bytes go to each rank, and come from it."""
    unit, size, itemsize = each.unit, call.size, each.unit.dtype.itemsize
    pieces = [(high - low) * itemsize for low, high in pairwise(unit.bounds)]
    mine = pieces[call.rank]
    if call.kind == "alltoall":
        return pieces, [mine] * size
    at_root = call.rank == call.root
    if call.kind == "scatter":
        sends = pieces if at_root else [0] * size
        return sends, [mine if rank == call.root else 0 for rank in range(size)]
    sends = [unit.nbytes if rank == call.root else 0 for rank in range(size)]  # gather
    return sends, [unit.nbytes if at_root else 0] * size


class GlooMover(_GroupMover):
    """Gloo, over TCP.

    Args:
        engine: The group.
        host: The address to listen at.
        timeout: How long connecting may take, in seconds.
    """

    def __init__(self, engine: Engine, host: str, timeout: float) -> None:
        """Connect to all members; blocks until they do, too.

        Raises:
            GroupError: The group ended meanwhile.
            UnavailableError: This PyTorch has no Gloo.
        """
        super().__init__(engine)
        self._host = host
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pending: dict[Pending, Any] = {}
        self._groups = {False: self._connect("gloo/")}

    def _connect(self, prefix: str) -> Any:  # noqa: ANN401
        made: Any = getattr(dist, "ProcessGroupGloo", None)
        if made is None:
            reason = "this PyTorch was built without Gloo"
            raise UnavailableError(f"gloo: {reason}", reason=reason, transport="gloo")
        engine = self._engine
        options = made._Options()  # noqa: SLF001
        options._devices = [  # noqa: SLF001
            made.create_device(hostname=self._host, lazy_init=False)
        ]
        options._threads = 1  # noqa: SLF001  (operations have their turns)
        options._timeout = timedelta(seconds=self._timeout)  # noqa: SLF001
        store = _Store(engine, prefix, self._timeout)
        group = made(store, engine.rank, engine.size, options)
        group._set_default_timeout(_FOREVER)  # noqa: SLF001
        # What they told each other has a ``sockaddr`` in it: where each one listens.
        keys = [f"{prefix}0/{rank}" for rank in range(engine.size)]
        listening = engine.stored(keys, self._timeout)
        engine.on_end(lambda: self._end(listening))
        return group

    def _end(self, listening: Sequence[bytes]) -> None:
        """End what is pending; later operations are refused."""
        with self._lock:
            _cut(listening)
            groups, self._groups = self._groups, {}
            pending, self._pending = self._pending, {}
        threading.Thread(
            target=_let_go, args=(groups, pending), name="aiordt-gloo-end", daemon=True
        ).start()

    @override
    def _group(self, *, tagged: bool) -> Steps:
        if tagged not in self._groups:
            pending = Pending()
            failed: list[Exception] = []

            def connect() -> None:
                try:
                    self._groups[tagged] = self._connect("gloo-tagged/")
                except Exception as exc:  # noqa: BLE001  (raised below)
                    failed.append(exc)
                pending.finish()

            threading.Thread(target=connect, name="aiordt-gloo", daemon=True).start()
            yield pending
            if failed:
                raise failed[0]
        return self._groups[tagged]

    @override
    def _issue(self, start: Callable[[], Any]) -> Steps:
        pending = Pending()
        with self._lock:
            self._engine.check()  # no operation begins after the connections were cut
            future = start().get_future()
            self._pending[pending] = future
        future.add_done_callback(lambda _: pending.finish())
        yield pending
        self._pending.pop(pending, None)
        if not future.done():
            self._engine.check()
        try:
            future.value()
        except RuntimeError as exc:
            raise TransferError(
                f"gloo: {str(exc).splitlines()[0]}", transport="gloo", peer="", nbytes=0
            ) from exc

    @staticmethod
    @override
    def _reduced_as(op: str, dtype: torch.dtype) -> torch.dtype:
        wide = working_dtype(dtype)
        if wide in _GLOO_DTYPES or (wide.is_complex and op in {"sum", "avg"}):
            return wide
        if wide is torch.uint64 and op not in {"min", "max"}:
            return torch.int64
        if wide in _WIDENED:
            return _WIDENED[wide]
        raise InvalidTypeError(f"Gloo has no op={op!r} of {dtype_name(dtype)}")


def _let_go(groups: dict[bool, Any], pending: dict[Pending, Any]) -> None:
    """Destroy process groups, on a thread of its own: that waits for their threads.

    Gloo may sleep for ever in an operation that was about to begin when its connections ended.
    Nothing comes any more, so nothing is written: its caller need not wait, but such a group must
    not be destroyed.
    """
    if pending:
        time.sleep(_GRACE_SECONDS)
        for each in pending:
            each.finish()
    if all(future.done() for future in pending.values()):
        groups.clear()
    else:
        _abandoned.append((groups, pending))


def _cut(listening: Sequence[bytes]) -> None:
    """End the connections of a Gloo group: it has no way to end what is pending by itself.

    They are found among all of this process by the addresses that its members listen at.
    """
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError, ValueError):
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as sock:
                if sock.family not in {socket.AF_INET, socket.AF_INET6}:
                    continue
                for name in (sock.getsockname(), sock.getpeername()):
                    where = _packed(sock.family, name)
                    if any(where in value for value in listening):
                        sock.shutdown(socket.SHUT_RDWR)
                        break


def _packed(family: int, name: Any) -> bytes:  # noqa: ANN401
    """An address as it stands in a ``sockaddr``."""
    head = struct.pack("=H", family) + struct.pack("!H", name[1])
    number = socket.inet_pton(family, name[0].partition("%")[0])
    return head + (number if family == socket.AF_INET else bytes(4) + number)


class NcclMover(_GroupMover):  # pragma: no cover  (needs GPUs)
    """NCCL. Operations are queued and waited for on a thread of their own.

    NCCL says that an operation has ended when it is queued; events say when it has.
    """

    def __init__(self, engine: Engine, timeout: float) -> None:
        """Make the process groups; they connect at their first operation.

        Raises:
            UnavailableError: This PyTorch has no NCCL.
        """
        super().__init__(engine)
        made: Any = getattr(dist, "ProcessGroupNCCL", None)
        if made is None:
            reason = "this PyTorch was built without NCCL"
            raise UnavailableError(f"nccl: {reason}", reason=reason, transport="nccl")
        device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._workers = Workers("nccl", 1)
        self._groups = {}
        for tagged, prefix in ((False, "nccl/"), (True, "nccl-tagged/")):
            options = made.Options()
            options._timeout = _FOREVER  # noqa: SLF001
            store = _Store(engine, prefix, timeout)
            with _unwatched():
                group = made(store, engine.rank, engine.size, options)
            self._groups[tagged] = group
            engine.on_end(group.abort)
        engine.on_end(self._workers.close)

    @override
    def within(self, call: Call) -> AbstractContextManager[object]:
        """On our stream, which waits for what the caller's had queued."""
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self._device))
        stack.enter_context(torch.cuda.stream(self._stream))
        if call.ready is not None:
            layer(self._device).wait_on_stream(self._device, call.ready)
        return stack

    @override
    def _group(self, *, tagged: bool) -> Steps:
        return self._groups[tagged]
        yield

    @override
    def _issue(self, start: Callable[[], Any]) -> Steps:
        pending = Pending()
        failed: list[Exception] = []

        def run() -> None:
            try:
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    start().wait()  # our stream waits, not this thread
                    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    event.record(self._stream)
                event.synchronize()
            except Exception as exc:  # noqa: BLE001  (raised below)
                failed.append(exc)
            pending.finish()

        self._workers.submit(run)
        yield pending
        if failed:
            text = f"nccl: {str(failed[0]).splitlines()[0]}"
            raise TransferError(text, transport="nccl", peer="", nbytes=0) from failed[0]


@contextmanager
def _unwatched() -> Generator[None]:  # pragma: no cover  (needs GPUs)
    """While a process group is made: its watchdog must never end the process.

    It reads these variables once, then.
    """
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "0"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
