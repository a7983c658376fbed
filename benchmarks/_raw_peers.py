"""Raw NIXL and raw ucxx between two processes of their own, without Ray and without aiordt.

Each end is ``python -m benchmarks._raw_peers nixl|ucxx``: it gets one JSON line for each thing
to do, and answers each with one. A pull is timed by the end that pulls; waiting for such a line
is never in the figure. Both are used as their documentation says is fastest on one host: NIXL
without a progress thread, over shared memory and cross-memory attach; ucxx by worker address,
without endpoint error handling, and with both ends spinning while pulls are under way.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from benchmarks._pages import fill, is_filled, make_tensor, quiet, receive_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

RAW_LIBRARIES: Final = ("nixl", "ucxx")
#: Seconds in which the owner's agent answers whoever wires up.
_WIRING: Final = 0.3
#: Seconds until a pull is given up, and how often that is looked at.
_TIMEOUT: Final = 20.0
_SPINS: Final = 10_000
_ROOT: Final = Path(__file__).parents[1]
_Reply: TypeAlias = dict[str, Any]


class _NixlEnd:
    """Either end: an agent, and what it has registered."""

    def __init__(self) -> None:
        api = importlib.import_module(_nixl_package() + "._api")
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        self._agent = api.nixl_agent(f"raw-{os.getpid()}", config)
        self._agent.create_backend(
            "UCX", {"ucx_error_handling_mode": "none", "engine_config": "TLS=^tcp"}
        )
        self._tensor = torch.empty(0)
        self._registered: Any = None
        self._handle: Any = None
        self._known: str | None = None

    def _keep(self, tensor: torch.Tensor) -> None:
        if self._handle is not None:
            self._agent.release_xfer_handle(self._handle)
            self._handle = None
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
        self._tensor = tensor
        self._registered = self._agent.register_memory([tensor], backends=["UCX"])

    def address(self) -> _Reply:
        return {}

    def connect(self, address: str) -> _Reply:
        return {"address": address}

    def make(self, nbytes: int, pages: str) -> _Reply:
        """What the other end needs to read from here."""
        self._keep(fill(make_tensor(nbytes, pages)))
        blob = self._agent.get_agent_metadata()
        return {
            "metadata": base64.b64encode(blob).decode(),
            "address": self._tensor.data_ptr(),
        }

    def target(self, nbytes: int, metadata: str, address: int) -> _Reply:
        if self._known is not None:
            self._agent.remove_remote_agent(self._known)
        self._keep(receive_tensor(nbytes))
        name = self._agent.add_remote_agent(base64.b64decode(metadata))
        self._known = name.decode() if isinstance(name, bytes) else name
        local = self._agent.get_xfer_descs([self._tensor])
        remote = self._agent.get_xfer_descs([(address, nbytes, 0)], mem_type="DRAM")
        self._handle = self._agent.initialize_xfer("READ", local, remote, self._known)
        return {}

    def serve(self, count: int) -> None:
        """Answer a peer that wires up; later reads need nothing from here."""
        deadline = time.monotonic() + (_WIRING if count == 0 else 0)
        while time.monotonic() < deadline:
            self._agent.get_new_notifs()
            time.sleep(0.001)

    def pull(self) -> float:
        begun = time.perf_counter()
        state = self._agent.transfer(self._handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(self._handle)
        took = time.perf_counter() - begun
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return took

    def check(self) -> bool:
        self._tensor.zero_()
        self.pull()
        return is_filled(self._tensor)


class _UcxxEnd:
    """Either end: a worker and an endpoint to the other."""

    def __init__(self) -> None:
        self._ucx = importlib.import_module("ucxx._lib.libucxx")
        self._array = importlib.import_module("ucxx._lib.arr").Array
        context = self._ucx.UCXContext({}, feature_flags=(self._ucx.Feature.TAG,))
        self._worker = self._ucx.UCXWorker(context)
        self._request = bytearray(8)
        self._endpoint: Any = None
        self._tensor = torch.empty(0)
        self._whole: Any = None
        self._ask: Any = self._array(self._request)
        self._asking, self._answering = self._ucx.UCXXTag(1), self._ucx.UCXXTag(2)

    def address(self) -> _Reply:
        return {"address": base64.b64encode(self._worker.address.tobytes()).decode()}

    def connect(self, address: str) -> _Reply:
        there = self._ucx.UCXAddress.create_from_buffer(base64.b64decode(address))
        self._endpoint = self._worker.create_endpoint_from_worker_address(
            there, endpoint_error_handling=False
        )
        return {}

    def make(self, nbytes: int, pages: str) -> _Reply:
        self._tensor = fill(make_tensor(nbytes, pages))
        self._whole = self._array(_buffer(self._tensor))
        return {"metadata": "", "address": 0}

    def target(self, nbytes: int, metadata: str, address: int) -> _Reply:
        self._tensor = receive_tensor(nbytes)
        self._whole = self._array(_buffer(self._tensor))
        return {"address": address, "metadata": metadata}

    def _finish(self, *requests: Any) -> None:  # noqa: ANN401  (ucxx's)
        progress, deadline = self._worker.progress, time.monotonic() + _TIMEOUT
        for request in requests:
            spins = 0
            while not request.completed:
                progress()
                spins += 1
                if not spins % 64:
                    os.sched_yield()
                if not spins % _SPINS and time.monotonic() > deadline:  # the other end died
                    raise TimeoutError(f"nothing came for {_TIMEOUT} s")
            request.check_error()

    def serve(self, count: int) -> None:
        """Send the tensor whenever it is asked for, ``count`` times (0 stands for once)."""
        for _ in range(max(count, 1)):
            self._finish(self._worker.tag_recv(self._ask, self._asking))
            self._finish(self._endpoint.tag_send(self._whole, self._answering))

    def pull(self) -> float:
        begun = time.perf_counter()
        answer = self._worker.tag_recv(self._whole, self._answering)
        question = self._endpoint.tag_send(self._ask, self._asking)
        self._finish(answer, question)
        return time.perf_counter() - begun

    def check(self) -> bool:
        self._tensor.zero_()
        self.pull()
        return is_filled(self._tensor)


def _buffer(tensor: torch.Tensor) -> memoryview:
    raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")


def _nixl_package() -> str:
    found = [name for name in ("nixl_cu13", "nixl_cu12") if importlib.util.find_spec(name)]
    if not found:
        raise ImportError("neither nixl_cu13 nor nixl_cu12 is installed")
    return found[0]


def missing(library: str) -> str | None:
    """Why a library cannot be measured, as far as can be told without trying."""
    if library == "ucxx":
        found = importlib.util.find_spec("ucxx") is not None
        return None if found else "ucxx is not installed (pip install ucxx-cu13)"
    try:
        _nixl_package()
    except ImportError as exc:
        return f"{exc} (pip install nixl-cu13)"
    return None


# --- the process that drives the two -------------------------------------------------------


class _Process:
    """One end, driven by lines."""

    def __init__(self, library: str) -> None:
        quiet_variables = {"NIXL_LOG_LEVEL": "FATAL", "UCX_WARN_UNUSED_ENV_VARS": "n"}
        self._process = subprocess.Popen(  # noqa: S603  (our own command)
            [sys.executable, "-m", "benchmarks._raw_peers", library],
            cwd=_ROOT,
            env={**os.environ, **quiet_variables, "UCX_LOG_LEVEL": "fatal"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, **arguments: object) -> None:
        assert self._process.stdin is not None  # noqa: S101  (for the type checker)
        self._process.stdin.write(json.dumps([what, arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> _Reply:
        assert self._process.stdout is not None  # noqa: S101
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a raw end died with status {self._process.wait()}")
        reply: _Reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def call(self, what: str, **arguments: object) -> _Reply:
        self.ask(what, **arguments)
        return self.answer()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
            return
        self._process.kill()
        self._process.wait()


class RawPair:
    """An owner and a puller of a raw library, each a process of its own.

    Raises:
        RuntimeError: The library cannot be used here, or a process died.
    """

    def __init__(self, library: str) -> None:
        self._owner, self._puller = _Process(library), _Process(library)
        try:
            addresses = [end.call("address") for end in (self._owner, self._puller)]
            for end, address in zip((self._puller, self._owner), addresses, strict=True):
                end.call("connect", address=address.get("address", ""))
        except BaseException:
            self.close()
            raise

    def make(self, nbytes: int, pages: str) -> None:
        """Have a tensor of this size and kind of pages at the owner, and room for it."""
        there = self._owner.call("make", nbytes=nbytes, pages=pages)
        self._puller.call("target", nbytes=nbytes, **there)
        if not self._turn(0, "check")["right"]:
            raise RuntimeError("the bytes that arrived are wrong")

    def pull(self, count: int) -> list[float]:
        """Pull ``count`` times; the seconds of each."""
        seconds: list[float] = self._turn(count, "pull", count=count)["seconds"]
        return seconds

    def _turn(self, serving: int, what: str, /, **arguments: object) -> _Reply:
        self._owner.ask("serve", count=serving)
        self._owner.answer()  # it is about to
        reply = self._puller.call(what, **arguments)
        self._owner.answer()  # it is done
        return reply

    def close(self) -> None:
        """End both."""
        self._puller.close()
        self._owner.close()


# --- the program of each end ---------------------------------------------------------------


def _main(library: str) -> None:
    quiet()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print

    def say(reply: _Reply) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    end: Any = None
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            if end is None:
                end = {"nixl": _NixlEnd, "ucxx": _UcxxEnd}[library]()
            if what == "serve":
                say({})
                end.serve(**arguments)
                say({})
            elif what == "pull":
                say({"seconds": [end.pull() for _ in range(arguments["count"])]})
            elif what == "check":
                say({"right": end.check()})
            else:
                method: Callable[..., _Reply] = getattr(end, what)
                say(method(**arguments))
        except Exception as exc:  # noqa: BLE001  (the driver says it)
            say({"error": f"{type(exc).__name__}: {exc}"})


if __name__ == "__main__":
    _main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # neither library's teardown is measured
