"""Real processes at the other end of transports, without Ray.

`serve` is what runs in such a process: it exports what it is told to over a socket that it
inherits, and lets peers read it. `process_pairs` makes pairs of such a process and a link.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack
import torch
from typing_extensions import override

from aiordt import _wire, transports
from aiordt._arena import arena
from aiordt._config import TRANSPORTS, Config
from aiordt._errors import InvalidValueError
from aiordt._memory import storage_range, view_memory
from aiordt._peer import Network, RemotePeer
from aiordt._progress import IoThread, Workers, finish, post
from aiordt._registry import Registry
from aiordt._sockets import listen, listen_locally
from aiordt._types import DTYPE_CODES, DTYPES
from aiordt.abc import Context, PeerAddress, SharedLink
from aiordt.testing._pair import Exported, Pair, sparse
from aiordt.testing._polling import wait_until
from aiordt.transports import Transports, names
from aiordt.transports.cma import allow_readers, host_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from aiordt.abc import Link, Transport

_SECRET: Final = b"a fixed secret for tests only"
_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 60.0
_PROGRAM: Final = (
    "import sys; from aiordt.testing import _process; "
    "_process.serve(int(sys.argv[1]), *sys.argv[3:], busy=sys.argv[2] == 'busy')"
)


class _Half:
    """All of aiordt that knows no Ray, for one process."""

    def __init__(self, config: Config | None = None) -> None:
        runtime_id = os.urandom(_wire.NONCE_NBYTES)
        self._token = ctypes.create_string_buffer(runtime_id, len(runtime_id))
        self.workers = Workers("testing", 2)
        self.registry = Registry(self.workers)
        self.io = IoThread()
        self._exports: dict[bytes, tuple[list[object], list[torch.Tensor]]] = {}
        config = config or Config(transports=names())
        self.transports = Transports(Context(self.io, self.registry, config), self.workers)
        listener = listen(_HOST)
        self.address = PeerAddress(
            _HOST,
            listener.getsockname()[1],
            runtime_id,
            os.getpid(),
            host_id(),
            ctypes.addressof(self._token),
        )
        allow_readers()
        self._network = Network(
            listener,
            listen_locally(runtime_id),
            runtime_id,
            secret=self._secret,
            handle=self.transports.serve,
            accept=self.transports.accept,
            lost=self.transports.forget,
            tls=lambda: None,
        )
        post(self.io.loop, self._network.start)

    @staticmethod
    async def _secret() -> bytes:
        return _SECRET

    async def connect(self, name: str, address: PeerAddress) -> Link:
        """A link to another half."""
        transport = await self.transports.get(name)
        return await transport.connect(RemotePeer(address, self._network))

    def export(self, packed: list[list[Any]], *, shared: bool) -> list[object]:
        """Export what `_pack` made; the key, and where each tensor is."""
        return self._export([_unpack(each, shared=shared) for each in packed])

    def export_sparse(self, nbytes: int, marks: dict[int, bytes], *, shared: bool) -> list[object]:
        """Export so many bytes that are zero, but for some marks."""
        if not shared:
            return self._export([sparse(nbytes, marks)])
        tensor = arena.empty((nbytes,), torch.uint8)  # new memory of the system: all zero
        for offset, mark in marks.items():
            tensor[offset : offset + len(mark)] = torch.frombuffer(
                bytearray(mark), dtype=torch.uint8
            )
        return self._export([tensor])

    def _export(self, tensors: list[torch.Tensor]) -> list[object]:
        export = self.registry.begin(tensors, "testing")
        leases = [object() for _ in export.groups]
        self.registry.commit(export, leases)
        self._exports[export.key] = (leases, tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        return [export.key, addresses, list(map(arena.locate, addresses))]

    def overwrite(self, key: bytes) -> None:
        """Give an export up; once nothing reads its tensors any more, write over them."""
        leases, tensors = self._exports.pop(key)
        self.registry.drop(leases)
        storages = [storage_range(tensor) for tensor in tensors]
        wait_until(lambda: not self.registry.busy(storages), what="the tensors are free", within=60)
        for tensor in tensors:
            tensor.zero_()

    async def _cleanup(self) -> None:
        await self._network.aclose()
        await self.transports.aclose()

    def close(self) -> None:
        """End everything; blocks for a moment."""
        self.io.close(self._cleanup(), 5)
        self.workers.close()

    async def aclose(self) -> None:
        """End everything. The loop turns meanwhile: reads that are under way may need it."""
        await finish(self.workers.run(self.close))


# --- what the two processes say to each other ---------------------------------------------------

_LENGTH: Final = struct.Struct("!Q")


def _send(sock: socket.socket, message: object) -> None:
    data = msgpack.packb(message)
    sock.sendall(_LENGTH.pack(len(data)))
    sock.sendall(data)


def _receive_exactly(sock: socket.socket, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def _receive(sock: socket.socket) -> Any:  # noqa: ANN401
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    return msgpack.unpackb(_receive_exactly(sock, length), strict_map_key=False)


def _pack(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], bytes]:
    """A tensor and the memory that it spans."""
    nbytes = 0
    if tensor.numel():
        last = sum(
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        nbytes = (last + 1) * tensor.itemsize
    memory = bytes(view_memory(tensor.data_ptr(), nbytes))
    return DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.stride(), memory


def _unpack(packed: list[Any], *, shared: bool) -> torch.Tensor:
    code, shape, stride, memory = packed
    dtype = DTYPES[code]
    flat = torch.frombuffer(bytearray(memory), dtype=dtype) if memory else torch.empty(0)
    flat = flat.to(dtype)
    if shared:
        flat = arena.empty(flat.shape, flat.dtype).copy_(flat)
    return flat.as_strided(shape, stride)


def _compute() -> None:
    number = 0
    while True:
        number += 1


def serve(fd: int, *added: str, busy: bool) -> None:
    """The program of the other process; ends with its parent.

    Args:
        fd: File descriptor of a socket over which it is told what to export.
        *added: As of `ServingProcess`.
        busy: Whether a thread of it computes all the time, in Python.
    """
    if busy:
        threading.Thread(target=_compute, daemon=True).start()
    control = socket.socket(fileno=fd)
    torch.set_num_threads(1)
    with transports.added(*added) if added else nullcontext():
        half = _Half()
        _send(control, dataclasses.astuple(half.address))
        commands: dict[str, Callable[..., object]] = {
            "export": half.export,
            "export_sparse": half.export_sparse,
            "overwrite": half.overwrite,
        }
        with suppress(EOFError, ConnectionError):
            while True:
                name, arguments, options = _receive(control)
                _send(control, commands[name](*arguments, **options))
    os._exit(0)


class ServingProcess:
    """A process of its own that exports tensors, without Ray.

    Args:
        *added: Name, and ``module:class``, of a transport that no package has brought.
        busy: Whether its interpreter is to be busy: every thread there waits for the GIL.

    Attributes:
        address: Where it is.
        process: The process.
    """

    def __init__(self, *added: str, busy: bool = False, within: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            root = str(Path(__file__).parent.parent.parent)
            path = os.pathsep.join([root, *filter(None, sys.path)])  # what is found here, is there
            arguments = [str(theirs.fileno()), "busy" if busy else "", *added]
            self.process = subprocess.Popen(  # noqa: S603  (this very module)
                [*within, sys.executable, "-c", _PROGRAM, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._control = ours
        ours.settimeout(_START_SECONDS)
        self._address: PeerAddress | None = None
        self._stopped = False

    @property
    def address(self) -> PeerAddress:
        """Where it is; the first time, waits until it has started."""
        if self._address is None:
            self._address = PeerAddress(*_receive(self._control))
        return self._address

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return self.process.poll() is None

    def export(self, tensors: Sequence[torch.Tensor], *, shared: bool = False) -> list[Exported]:
        """Make it export copies of ``tensors``; blocks for as long as it takes.

        Args:
            tensors: What to export.
            shared: Whether the copies are to lie in shared memory.
        """
        packed = [_pack(tensor) for tensor in tensors]
        key, addresses, segments = self._call("export", packed, shared=shared)
        return [
            Exported(key, index, address, tensor, segment)
            for index, (address, segment, tensor) in enumerate(
                zip(addresses, segments, tensors, strict=True)
            )
        ]

    def export_sparse(
        self, nbytes: int, marks: Mapping[int, bytes], *, shared: bool = False
    ) -> Exported:
        """Make it export so many bytes that are zero, but for some marks; blocks.

        Args:
            nbytes: How many.
            marks: What is at which offset.
            shared: As of `export`; only there they all take memory.
        """
        key, (address,), (segment,) = self._call(
            "export_sparse", nbytes, dict(marks), shared=shared
        )
        return Exported(key, 0, address, sparse(nbytes, marks), segment)

    def overwrite(self, exported: Exported) -> None:
        """Make it give an export up, and write over its tensors once nothing reads them.

        Blocks until it has.
        """
        self._call("overwrite", exported.key)

    def _call(self, name: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401
        _send(self._control, [name, arguments, options])
        return _receive(self._control)

    def stop(self) -> None:
        """Stop it with SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def cont(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it with SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, if it is still there. Idempotent."""
        self._control.close()
        self.kill()


class _ProcessPair(Pair):
    def __init__(self, half: _Half, link: Link, process: ServingProcess) -> None:
        self.link = link
        self.can_pause = link.packs  # a one-sided link needs nothing of the other process
        self._half = half
        self._process = process
        self._shared = isinstance(link, SharedLink)

    @override
    async def export(self, tensors: Sequence[torch.Tensor]) -> list[Exported]:
        return self._process.export(tensors, shared=self._shared)

    @override
    async def export_sparse(self, nbytes: int, marks: Mapping[int, bytes]) -> Exported:
        return self._process.export_sparse(nbytes, marks, shared=self._shared)

    @override
    async def overwrite(self, exported: Exported) -> None:
        # Not on the loop: what is read meanwhile may need it.
        await self._half.workers.run(lambda: self._process.overwrite(exported))

    @override
    async def kill(self) -> None:
        self._process.kill()

    @override
    def pause(self) -> None:
        self._process.stop()

    @override
    def resume(self) -> None:
        self._process.cont()

    @override
    async def aclose(self) -> None:
        await self.link.aclose()
        await self._half.aclose()


class process_pairs:  # noqa: N801  (used as a function)
    """Makes pairs for a transport: this process, and a real one that serves.

    A serving process is used for one pair after another until it is killed. To be used in a
    ``with`` statement, and called without arguments::

        with process_pairs("cma") as make_pair:
            await check_transport(make_pair)

    Args:
        transport: Its name: aiordt's own, or that of an entry point ``aiordt.transports``. Or a
            class at the top level of a module that can be imported.
        busy: As of `ServingProcess`.

    Raises:
        UsageError: There is no such transport, or its class cannot be imported by its name.
    """

    def __init__(self, transport: str | type[Transport], *, busy: bool = False) -> None:
        self._busy = busy
        self._added = ""
        if not isinstance(transport, str):
            cls, transport = transport, transport.name
            self._added = f"{cls.__module__}:{cls.__qualname__}"
            if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
                raise InvalidValueError(f"another process cannot import {self._added}")
            if transport in TRANSPORTS:
                raise InvalidValueError(f"aiordt has a transport {transport!r} of its own")
        elif transport not in names():
            raise InvalidValueError(f"no transport {transport!r}; there are {', '.join(names())}")
        self._transport = transport
        self._process: ServingProcess | None = None
        self._exits = ExitStack()

    def _start(self) -> ServingProcess:
        added = (self._transport, self._added) if self._added else ()
        self._process = ServingProcess(*added, busy=self._busy)
        return self._process

    def __enter__(self) -> Self:
        if self._added:
            self._exits.enter_context(transports.added(self._transport, self._added))
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        if self._process is not None:
            self._process.close()

    async def __call__(self) -> Pair:
        """Make a pair; blocks until its process has started."""
        process = self._process
        if process is None or not process.alive:
            if process is not None:
                process.close()
            process = self._start()
        half = _Half()
        try:
            link = await half.connect(self._transport, process.address)
        except BaseException:
            await half.aclose()
            raise
        return _ProcessPair(half, link, process)
