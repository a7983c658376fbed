"""UCX itself: all that touches ucxx, and what is called in UCX's own library.

Endpoints are made with error handling: only these can be closed while something is pending,
and end what is pending when the other process dies. UCX would give up cross-memory attach for
that, unless it is told that this supports it (`_SETTINGS`).

UCX keeps registrations of memory until it sees the memory unmapped, by its hooks in libc's
functions. Another copy of UCX in the process (nixl has one) takes these over, whereupon a new
context has no such cache; and without it UCX before 1.22 crashes when an endpoint is closed
or fails while a message waits to be fetched (openucx/ucx #11485). So there always is a cache,
and where the hooks do not work it is told of a message's memory when the message is done.

A TCP connection that is closed while the kernel has no room for all that was sent goes on with
half of it, and when the other end has closed it, too, UCX (up to 1.22, at least) uses memory
that it has freed (`uct_tcp_iface_handle_events`). So what was sent is flushed first.

Invariants:
    UCX-3  The process's environment and signal handlers are what they were before ucxx came.
    UCX-6  UCX has a cache of registrations; if it did not see memory unmapped when it was
           started, none outlives its message.
    UCX-7  An endpoint that has sent over TCP is closed when nothing of that waits to be taken
           by the kernel, or when it has failed.
    UCX-8  No process writes to memory of another that a third one writes to, too.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int8, c_size_t, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def _environment() -> Generator[None]:
    """The process's environment as UCX needs it while it is loaded or started (UCX-3)."""
    before = set(os.environ)
    for name, value in (
        ("UCX_WARN_UNUSED_ENV_VARS", "n"),
        ("UCX_MEMTYPE_CACHE", "n"),  # it misses some of what torch allocates
        ("UCX_DEBUG_SIGNO", "0"),  # else UCX takes SIGHUP, which no longer ends the process
    ):
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("UCX_")]:
            if name not in before:
                del os.environ[name]


with _environment():
    from ucxx._lib import libucxx
    from ucxx._lib.arr import Array

#: UCX's own functions, of the very library that ucxx uses. Of ucxx's requests, none can be
#: cancelled, and those that an endpoint's closing ends keep the endpoint and its worker for ever
#: (0.52: a cycle of shared pointers). Called with the GIL, since each is over in a microsecond;
#: but not a receive: if its message was announced before, that call reads all of it from the
#: other process (32 MiB: 2 ms).
_ucp: Final = ctypes.PyDLL(libucxx.__file__)
_receive: Final = ctypes.CDLL(libucxx.__file__).ucp_tag_recv_nbx
_receive.restype = c_void_p
_receive.argtypes = (c_void_p, c_void_p, c_size_t, c_uint64, c_uint64, c_void_p)
for _name, _result, _arguments in (
    ("ucp_tag_send_nbx", c_void_p, (c_void_p, c_void_p, c_size_t, c_uint64, c_void_p)),
    ("ucp_request_check_status", c_int8, (c_void_p,)),
    ("ucp_request_cancel", None, (c_void_p, c_void_p)),
    ("ucp_request_free", None, (c_void_p,)),
    ("ucp_ep_flush_nbx", c_void_p, (c_void_p, c_void_p)),
    ("ucp_ep_query", c_int8, (c_void_p, c_void_p)),
    ("ucs_status_string", c_char_p, (c_int8,)),
    ("ucm_set_external_event", None, (c_int,)),
    ("ucm_unset_external_event", None, (c_int,)),
    ("ucm_test_external_events", c_int8, (c_int,)),
    ("ucm_vm_munmap", None, (c_void_p, c_size_t)),
):
    _function = getattr(_ucp, _name)
    _function.restype, _function.argtypes = _result, _arguments
#: A ucp_request_param_t (more than large enough) of which no field is set.
_NO_PARAM: Final = ctypes.create_string_buffer(256)
_ALL_BITS: Final = (1 << 64) - 1
# ucs_status_t, a packed enum: one byte
_OK: Final = 0
_IN_PROGRESS: Final = 1
_CANCELED: Final = -16
_LAST_ERROR: Final = -100
_VM_UNMAPPED: Final = 1 << 17  # ucm_event_type_t
#: Held while UCX believes that somebody else tells it what is unmapped, in the whole process.
_external: Final = threading.Lock()

#: ucp_ep_attr_t: mask of the fields asked for, what is not asked for, the lanes' array, how many
#: there are, bytes of one (ucp_transport_entry_t: the names of transport and device).
_ATTRIBUTES: Final = struct.Struct("=Q288xQI4xQ8x")
_LANES_FIELD: Final = 1 << 3
_MAX_LANES: Final = 64


class UcxError(Exception):
    """What UCX says went wrong."""


#: Settings of UCX, unless the environment has others.
_SETTINGS: Final = {
    # Not through queues in shared memory: all that write to a process share its one, and who is
    # killed between taking a place in it and marking that as written stops it for good, for all
    # of them. Small messages cost no more by TCP (128 KiB: 0.5 ms).
    "TLS": "^posix,sysv",
    # With error handling UCX reads the other process's memory (17 GB/s in place of 6) only if
    # this says that it supports it. It promises that nobody touches a failed endpoint's memory;
    # here the other end may read it, at most.
    "CMA_MEMORY_INVALIDATE": "y",
    # Twice as fast over TCP as with the defaults of 8 and 64 KiB.
    "TCP_TX_SEG_SIZE": "256K",
    "TCP_RX_SEG_SIZE": "256K",
}


#: Settings of UCX, whatever the environment has (UCX-6): rather no start than a crash later.
_FORCED: Final = {"RCACHE_ENABLE": "y"}


class _Endpoint(Protocol):
    handle: int

    def set_close_callback(self, function: object, arguments: tuple[object, ...]) -> None: ...
    def close_blocking(self) -> None: ...


class _Worker(Protocol):
    handle: int
    address: Any
    epoll_file_descriptor: int

    def init_blocking_progress_mode(self) -> None: ...
    def progress(self) -> None: ...
    def arm(self) -> bool: ...
    def create_endpoint_from_worker_address(
        self, address: object, *, endpoint_error_handling: bool
    ) -> _Endpoint: ...


def address_of(memory: memoryview) -> int:
    """Where ``memory`` begins."""
    address: int = Array(memory).ptr
    return address


class Request:
    """A message that UCX was given, and the memory that it has for that.

    Args:
        pointer: What UCX returned.
        memory: The memory.
        forget: Whether UCX would not see the memory unmapped (UCX-6).
    """

    def __init__(self, pointer: int | None, memory: memoryview, *, forget: bool) -> None:
        self._memory = memory
        self._forget = forget
        self._pointer = pointer or 0
        self._status = _IN_PROGRESS if self._pointer else _OK
        if self._pointer > _ALL_BITS + _LAST_ERROR:
            self._status = self._pointer - _ALL_BITS - 1

    @property
    def done(self) -> bool:
        """Whether UCX has let go of it."""
        if self._status == _IN_PROGRESS:
            self._status = _ucp.ucp_request_check_status(self._pointer)
            if self._status != _IN_PROGRESS:
                _ucp.ucp_request_free(self._pointer)
                if self._forget:
                    _ucp.ucm_vm_munmap(address_of(self._memory), len(self._memory))
        return self._status != _IN_PROGRESS

    @property
    def canceled(self) -> bool:
        """Whether it was taken back, or its endpoint was closed."""
        return self._status == _CANCELED

    @property
    def error(self) -> UcxError | None:
        """How it went, when it is done."""
        if self._status == _OK:
            return None
        return UcxError(_ucp.ucs_status_string(self._status).decode())


class Endpoint:
    """The way to another process's worker; made by `Ucp.connect`."""

    def __init__(self, endpoint: _Endpoint, *, forget: bool) -> None:
        self._endpoint: _Endpoint | None = endpoint
        self._forget = forget
        self._handle = endpoint.handle
        self._sent = False
        self._closing = False
        self._flush: Request | None = None
        self._failures: list[bool] = []
        endpoint.set_close_callback(self._failures.append, (True,))

    @property
    def alive(self) -> bool:
        """Whether it is not to be closed, and has not failed."""
        return not self._closing and not self._failures

    def check(self) -> None:
        """Raise `UcxError` unless it is alive."""
        if not self.alive:
            raise UcxError("the endpoint was closed")

    def send(self, memory: memoryview, tag: int) -> Request:
        """Post a message.

        Raises:
            UcxError: The endpoint was closed.
        """
        self.check()
        self._sent = True
        pointer = _ucp.ucp_tag_send_nbx(
            self._handle, address_of(memory), len(memory), tag, _NO_PARAM
        )
        return Request(pointer, memory, forget=self._forget)

    def close(self, *, force: bool = False) -> bool:
        """Close it, now or, if something waits for TCP, later (UCX-7).

        Nothing more can be sent. What was sent ends with the next progress after it is closed.

        Args:
            force: Close it now in any case: this process will not use UCX any more.

        Returns:
            Whether it is closed; else to be called again after the next progress.
        """
        self._closing = True
        if self._endpoint is not None and (force or self._failures or self._idle()):
            endpoint, self._endpoint = self._endpoint, None
            endpoint.close_blocking()  # which does not block, because it handles errors
        return self._endpoint is None and (self._flush is None or self._flush.done)

    def _idle(self) -> bool:
        """Whether nothing that was sent waits for TCP; if something does, it is flushed."""
        if not self._sent or b"tcp" not in self._transports():
            return True
        if self._flush is None or self._flush.done:
            # Done at once only if nothing was sent since the last one.
            pointer = _ucp.ucp_ep_flush_nbx(self._handle, _NO_PARAM)
            self._flush = Request(pointer, memoryview(b""), forget=False)
        return self._flush.done

    def _transports(self) -> set[bytes | None]:
        lanes = (c_char_p * (2 * _MAX_LANES))()
        asked = ctypes.create_string_buffer(
            _ATTRIBUTES.pack(
                _LANES_FIELD, ctypes.addressof(lanes), _MAX_LANES, 2 * ctypes.sizeof(c_char_p)
            )
        )
        _ucp.ucp_ep_query(self._handle, asked)
        _, _, count, _ = _ATTRIBUTES.unpack_from(asked)
        return set(lanes[: 2 * count : 2])


def _start(settings: dict[str, str]) -> tuple[object, bool]:
    """A UCX context; and whether it does not see what is unmapped (UCX-6)."""
    with _external:
        _ucp.ucm_set_external_event(_VM_UNMAPPED)  # else UCX may leave out its cache
        try:
            forget = _ucp.ucm_test_external_events(_VM_UNMAPPED) != _OK
            features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
            return libucxx.UCXContext(settings, feature_flags=features), forget
        finally:
            _ucp.ucm_unset_external_event(_VM_UNMAPPED)


class Ucp:
    """A UCX context and its worker. To be used by one thread.

    Args:
        device: The network interface to use; ``None``: all.

    Attributes:
        address: What others need to make an endpoint to it.
        fd: Readable when there is something to do, after `arm` has returned true.

    Raises:
        UcxError: It does not start.

    Cost:
        0.02 s, the first time 0.1 s.
    """

    def __init__(self, device: str | None) -> None:
        settings = dict(_SETTINGS)
        if device is not None:
            settings["NET_DEVICES"] = device
        given = {name: value for name, value in settings.items() if f"UCX_{name}" not in os.environ}
        try:
            with _environment():
                context, self._forget = _start({**given, **_FORCED})
                self._worker: _Worker = libucxx.UCXWorker(context)
        except libucxx.UCXError as exc:
            raise UcxError(f"it does not start: {exc}") from exc
        self._worker.init_blocking_progress_mode()
        self._handle = self._worker.handle
        self.address: bytes = self._worker.address.tobytes()
        self.fd = self._worker.epoll_file_descriptor

    def connect(self, address: bytes) -> Endpoint:
        """Make an endpoint to another worker.

        Raises:
            UcxError: It cannot be reached.
        """
        try:
            return Endpoint(
                self._worker.create_endpoint_from_worker_address(
                    libucxx.UCXAddress.create_from_buffer(address), endpoint_error_handling=True
                ),
                forget=self._forget,
            )
        except libucxx.UCXError as exc:
            raise UcxError(str(exc)) from exc

    def receive(self, memory: memoryview, tag: int) -> Request:
        """Post a receive into ``memory``, of a message from anywhere."""
        pointer = _receive(self._handle, address_of(memory), len(memory), tag, _ALL_BITS, _NO_PARAM)
        return Request(pointer, memory, forget=self._forget)

    def cancel(self, request: Request) -> None:
        """Take a receive back, if no message has met it; of what was sent, nothing."""
        if not request.done:
            _ucp.ucp_request_cancel(self._handle, request._pointer)  # noqa: SLF001

    def progress(self) -> None:
        """Do all that can be done now, without the GIL; it may take milliseconds."""
        self._worker.progress()

    def arm(self) -> bool:
        """Have `fd` say when there is more to do; false: there is already."""
        return self._worker.arm()
