"""What UCX is to find on this host: RDMA adapters, and the interface of the node's address.

Needs no ucxx, so that it can be asked without loading it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

_INFINIBAND: Final = Path("/sys/class/infiniband")
_SIOCGIFADDR: Final = 0x8915


def interface_of(host: str) -> str | None:
    """The network interface that has the IPv4 address ``host``; ``None`` if none has."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl  # noqa: PLC0415  (not on every system)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has none
                found = fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == host:
                    return name
    return None


def local_host(peer: str) -> str | None:
    """This host's address towards ``peer``; asks the routing table, sends nothing."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((peer, 9))
        return str(sock.getsockname()[0])
    return None


def missing_rdma() -> str:
    """Why UCX does not use the RDMA adapters of this host; empty if it does, or has none."""
    with suppress(OSError):
        adapters = sorted(os.listdir(_INFINIBAND))
        spec = importlib.util.find_spec("libucx")
        if adapters and spec is not None and spec.origin is not None:
            plugins = Path(spec.origin).parent / "lib" / "ucx"
            if not any(plugins.glob("libuct_ib*")):
                return (
                    f"UCX does not use {', '.join(adapters)}: the libucx of PyPI has no InfiniBand "
                    "plug-in; use transport nixl, or install ucxx and UCX from conda-forge"
                )
    return ""


def network_device(host: str | None) -> str | None:
    """Which interface UCX may use: that of the node's address, unless there is RDMA."""
    if host is None or (_INFINIBAND.is_dir() and os.listdir(_INFINIBAND) and not missing_rdma()):
        return None
    return interface_of(host)
