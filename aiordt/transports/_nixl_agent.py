"""NIXL's agent, typed, and the thread that drives it. The only file that knows NIXL's package."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from aiordt._errors import ProtocolViolationError
from aiordt._progress import Workers, finish
from aiordt._registration import Registration, Registrations, region_of
from aiordt._types import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_T = TypeVar("_T")

SLAB_NBYTES: Final = 1 * MIB
#: Idle ones that are kept: state dicts of 10,000 tensors fit, and their targets.
_MAX_REGISTRATIONS: Final = 1 << 16
_TOKEN_NBYTES: Final = 16
_RDMA: Final = Path("/sys/class/infiniband")
_QUIET: Final = {
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # NIXL brings its own UCX. Where ucxx has another one loaded, both would hook malloc and mmap,
    # and the process crashes. Memory is registered explicitly here, so nothing is lost.
    "UCX_MEM_EVENTS": "n",
}


def has_rdma() -> bool:
    """Whether this host has an RDMA device."""
    try:
        return any(_RDMA.iterdir())
    except OSError:
        return False


def _bindings() -> Any:  # noqa: ANN401  (untyped)
    """NIXL's compiled module.

    Its package around it would set up the `logging` of the whole process when imported.
    """
    cuda = torch.version.cuda or "13"
    packages = ["nixl_cu13", "nixl_cu12"]
    for package in packages[::-1] if cuda.startswith("12") else packages:
        name = f"{package}._bindings"
        if name in sys.modules:
            return sys.modules[name]
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or []:
            for path in Path(folder).glob("_bindings*.so"):
                spec = importlib.util.spec_from_file_location(name, path)
                assert spec is not None  # noqa: S101  (for the type checker)
                assert spec.loader is not None  # noqa: S101
                module = sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    raise ImportError("neither nixl_cu13 nor nixl_cu12 is installed")


@contextmanager
def _quiet() -> Iterator[None]:
    """NIXL and UCX read these when they are loaded; the user's own choice stays."""
    added = [name for name in _QUIET if name not in os.environ]
    os.environ.update((name, _QUIET[name]) for name in added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class Agent:
    """NIXL's agent, typed. Every call under its engine's lock (NIX-2)."""

    def __init__(self, *, rdma: bool) -> None:
        with _quiet():
            self._nixl = nixl = _bindings()
            self.name = f"aiordt-{os.urandom(16).hex()}"
            config = nixl.nixlAgentConfig()
            config.useProgThread = False
            config.useListenThread = False
            config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
            self._agent = nixl.nixlAgent(self.name, config)
            # Peer error handling rules shared memory out, so that wiring up takes TCP, its
            # listeners and the owner's progress. On one host death shows by other means.
            options = (
                {} if rdma else {"ucx_error_handling_mode": "none", "engine_config": "TLS=^tcp"}
            )
            self._backend = self._agent.createBackend("UCX", options)

    def _kind(self, device: str) -> Any:  # noqa: ANN401
        return self._nixl.DRAM_SEG if device == "cpu" else self._nixl.VRAM_SEG

    def register(self, address: int, nbytes: int, device: str, number: int) -> Any:  # noqa: ANN401
        rows = [(address, nbytes, device_id(device, number), "")]
        descriptors = self._nixl.nixlRegDList(self._kind(device), rows)
        self._agent.registerMem(descriptors, [self._backend])
        return descriptors

    def deregister(self, descriptors: Any) -> None:  # noqa: ANN401
        self._agent.deregisterMem(descriptors, [self._backend])

    def connection(self) -> bytes:
        """What a peer needs to reach this agent."""
        nothing = self._nixl.nixlRegDList(self._nixl.DRAM_SEG)
        return bytes(self._agent.getLocalPartialMD(nothing, True, [self._backend]))  # noqa: FBT003

    def metadata(self, registrations: Sequence[Registration[Any]]) -> list[bytes]:
        """What a peer needs to read from registered memory."""
        blobs = []
        for host in (True, False):
            rows = [
                (each.address, each.nbytes, device_id(each.device, each.number), "")
                for each in registrations
                if (each.device == "cpu") is host
            ]
            if rows:
                kind = self._kind("cpu" if host else "cuda")
                descriptors = self._nixl.nixlRegDList(kind, rows)
                blob = self._agent.getLocalPartialMD(descriptors, False, [self._backend])  # noqa: FBT003
                blobs.append(bytes(blob))
        return blobs

    def load(self, blobs: Sequence[bytes], name: str) -> None:
        """Learn what a peer's `connection` or `metadata` says."""
        if any(self._agent.loadRemoteMD(blob) != name.encode() for blob in blobs):
            raise ProtocolViolationError("a peer's NIXL metadata is that of another agent")

    def forget(self, name: str) -> None:
        self._agent.invalidateRemoteMD(name)

    def post(self, chunk: Chunk, name: str) -> bool:
        """Start a transfer; whether it is done already."""
        nixl = self._nixl
        local = nixl.nixlXferDList(self._kind(chunk.here), chunk.local)
        remote = nixl.nixlXferDList(self._kind(chunk.there), chunk.remote)
        transfer = self._agent.createXferReq(
            nixl.NIXL_READ, local, remote, name, "", [self._backend]
        )
        try:
            status = self._agent.postXferReq(transfer, "")
        except BaseException:
            self._agent.releaseXferReq(transfer)
            raise
        return self._ended(chunk, transfer, status)

    def poll(self, chunk: Chunk) -> bool:
        """Whether a transfer is done; after an error it is gone, too."""
        transfer, chunk.transfer = chunk.transfer, None
        try:
            status = self._agent.getXferStatus(transfer)
        except BaseException:
            self._agent.releaseXferReq(transfer)
            raise
        return self._ended(chunk, transfer, status)

    def _ended(self, chunk: Chunk, transfer: int, status: Any) -> bool:  # noqa: ANN401
        if status == self._nixl.NIXL_IN_PROG:
            chunk.transfer = transfer
            return False
        self._agent.releaseXferReq(transfer)
        if status != self._nixl.NIXL_SUCCESS:
            raise RuntimeError(str(status))
        return True

    def progress(self) -> None:
        """Answer peers that wire up."""
        self._agent.getNotifs({}, [self._backend])


def device_id(device: str, number: int) -> int:
    """What NIXL is told as the device of memory.

    For host memory anything will do, as long as all say the same: the number of the
    registration, which makes two of one address differ (NIX-3).
    """
    return number if device == "cpu" else int(device.partition(":")[2] or 0)


@dataclass(frozen=True, slots=True)
class Range:
    """Registered memory of an owner."""

    address: int
    nbytes: int
    device: str
    device_id: int


@dataclass(slots=True, eq=False)
class Chunk:
    """One transfer: rows of (address, bytes, device id) here and there."""

    here: str = "cpu"
    there: str = "cpu"
    local: Any = field(default_factory=list)
    remote: Any = field(default_factory=list)
    nbytes: int = 0
    slab: Registration[Any] | None = None
    filled: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    transfer: Any = None


class Engine:
    """The agent of this process, what it has registered, and the thread that drives it."""

    def __init__(self, *, rdma: bool) -> None:
        self.rdma = rdma
        self.lock = threading.RLock()
        self.workers = Workers("nixl", 1)
        self.memory: Registrations[Any] = Registrations(
            self._register,
            self._deregister,
            limit=_MAX_REGISTRATIONS,
            lock=self.lock,
        )
        self.agent: Agent
        self.known: Registration[Any]
        self._slabs: list[Registration[Any]] = []
        self._buffers: list[torch.Tensor] = []
        self._stuck: list[Chunk] = []
        self.token = torch.frombuffer(bytearray(os.urandom(_TOKEN_NBYTES)), dtype=torch.uint8)

    def start(self) -> None:
        """Make the agent; takes 0.4 s, most of it without the GIL."""
        agent = Agent(rdma=self.rdma)
        with self.lock:
            self.agent = agent
            self.known = self._keep(self.token)

    async def run(self, function: Callable[[], _T]) -> _T:
        """Run ``function`` on the agent's thread, under the lock."""

        def locked() -> _T:
            with self.lock:
                return function()

        return await finish(self.workers.run(locked))

    def _register(self, address: int, nbytes: int, device: str, number: int) -> Any:  # noqa: ANN401
        return self.agent.register(address, nbytes, device, number)

    def _deregister(self, descriptors: Any) -> None:  # noqa: ANN401
        self.agent.deregister(descriptors)

    def _keep(self, tensor: torch.Tensor) -> Registration[Any]:
        """Register memory of our own for good."""
        self._buffers.append(tensor)
        return self.memory.acquire(region_of(tensor))

    def bounce(self, chunk: Chunk, target: int, nbytes: int) -> tuple[int, int]:
        """Room for ``nbytes`` bytes in the chunk's slab: their address, and its device id."""
        slab = chunk.slab
        if slab is None:
            slab = self._slabs.pop() if self._slabs else None
            if slab is None:
                slab = self._keep(torch.empty(SLAB_NBYTES, dtype=torch.uint8))
            chunk.slab = slab
        start = slab.address + chunk.filled
        chunk.filled += nbytes
        chunk.copies.append((target, start, nbytes))
        return start, device_id("cpu", slab.number)

    def land(self, chunk: Chunk) -> None:
        """A transfer is done: its bytes go where they belong."""
        for target, source, nbytes in chunk.copies:
            ctypes.memmove(target, source, nbytes)
        self.drop(chunk)

    def drop(self, chunk: Chunk) -> None:
        """A transfer is over."""
        if chunk.slab is not None:
            self._slabs.append(chunk.slab)
            chunk.slab = None

    def abandon(self, chunk: Chunk) -> None:
        """Nobody waits for a transfer into a slab any more: the slab is kept until it ends."""
        if chunk.transfer is None:
            self.drop(chunk)
        else:
            self._stuck.append(chunk)

    def sweep(self) -> None:
        """Deregister memory that died."""
        self.memory.sweep()
        for chunk in list(self._stuck):
            try:
                done = self.agent.poll(chunk)
            except Exception:  # noqa: BLE001  (it failed, which ends it as well)
                done = True
            if done:
                self._stuck.remove(chunk)
                self.drop(chunk)

    def stop(self) -> None:
        """Let everything go, unless a transfer cannot be ended: then all stays as it is."""
        self.sweep()
        if self._stuck:
            _leaked.append(self)
            return
        self.memory.clear()
        self.__dict__.pop("agent", None)  # it was never there if making it failed


_leaked: list[Engine] = []
