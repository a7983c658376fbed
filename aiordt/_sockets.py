"""Sockets between processes: where they listen, and how they notice that somebody is gone."""

from __future__ import annotations

import socket
import sys


def tune(sock: socket.socket, *, impatient: bool) -> None:
    """No delay for small frames; a host that vanished is noticed within about 6 s.

    A socket of this host needs neither.

    Only control connections are impatient and give up on data that is not taken: a stream whose
    reader is stopped for a while must live. Its end comes with that of the control connection.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 3),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", 3),
        *((("TCP_USER_TIMEOUT", 6000),) if impatient else ()),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def family(host: str) -> socket.AddressFamily:
    """That of an address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(host: str) -> socket.socket:
    """A listener on a free port of ``host``, and of no other address."""
    return _listen(family(host), (host, 0))


def _listen(kind: socket.AddressFamily, where: bytes | tuple[str, int]) -> socket.socket:
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listener.bind(where)
        listener.listen(1024)
        listener.settimeout(0)
    except BaseException:
        listener.close()
        raise
    return listener


def local_name(runtime_id: bytes) -> bytes:
    """The name of a process's local socket: abstract, so that no file is left behind."""
    return b"\0aiordt-" + runtime_id.hex().encode()


def listen_locally(runtime_id: bytes) -> socket.socket | None:
    """A listener for processes of this host; ``None`` where the system has no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    return _listen(socket.AF_UNIX, local_name(runtime_id))
