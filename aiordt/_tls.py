"""TLS for control connections, by Ray's own settings: where Ray uses it, aiordt does.

It begins when the two ends have shown each other that they know the secret, and what the secret
protects it goes on to protect: each frame inside has its authentication code. TLS adds that nobody
else can read them. Both ends show a certificate of Ray's authority; that the one that a client
sees is the one that its server shows, the server says under the connection's own key.

Invariants:
    TLS-1  A process that is to use TLS says nothing on a control connection that has none.
    TLS-2  Nobody who has no certificate of the authority is let in, and nobody in the middle who
           has one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiordt._errors import AuthenticationError, ProtocolViolationError, UsageError
from aiordt._wire import HEADER, frame_length

if TYPE_CHECKING:
    import socket

    from aiordt._wire import Sealer

_USE: Final = "RAY_USE_TLS"
_FILES: Final = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")
#: For a farewell that the other end does not answer.
_SHUTDOWN_SECONDS: Final = 1.0


def in_use() -> bool:
    """Whether Ray uses TLS: by the variable and the values that Ray looks for."""
    return os.environ.get(_USE, "0").lower() in {"1", "true"}


@dataclass(frozen=True, slots=True)
class Tls:
    """What a process shows and demands.

    Attributes:
        server: For connections that it takes.
        client: For those that it makes.
        shown: Digest of its certificate.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext
    shown: bytes


def load() -> Tls | None:
    """Read Ray's settings and files; ``None``: Ray does not use TLS. Takes 3 ms.

    Raises:
        UsageError: They cannot be used; says why.
    """
    if not in_use():
        return None
    missing = [name for name in _FILES if not os.environ.get(name)]
    if missing:
        raise UsageError(f"{_USE} is set, but {', '.join(missing)} is not")
    authority, certificate, key = (os.environ[name] for name in _FILES)
    server, client = (
        ssl.SSLContext(side) for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
    )
    # TLS-2 is stronger; and Ray's own helper puts addresses where Python looks for names only.
    client.check_hostname = False
    try:
        for context in (server, client):
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority)
            context.load_cert_chain(certificate, key)
        text = Path(certificate).read_text(encoding="ascii")
    except (OSError, ValueError) as exc:
        raise UsageError(f"Ray's certificates ({', '.join(_FILES)}) cannot be used: {exc}") from exc
    head, line = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = head + text.partition(head)[2].partition(line)[0] + line  # the others are its issuers
    return Tls(server, client, _digest(ssl.PEM_cert_to_DER_cert(first)))


def _digest(certificate: bytes) -> bytes:
    return hashlib.sha256(certificate).digest()


async def serve(
    tls: Tls, sock: socket.socket, outgoing: Sealer
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin TLS with a client (TLS-1).

    Raises:
        AuthenticationError: It cannot be had with that client.
        OSError: The connection ended.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    try:
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader),
            sock,
            ssl=tls.server,
            ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
        )
    except ssl.SSLError as exc:
        raise AuthenticationError(f"no TLS with it: {exc}", peer="") from exc
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    writer.write(outgoing.seal(tls.shown))
    return reader, writer


async def join(
    tls: Tls, sock: socket.socket, incoming: Sealer
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin TLS with a server, and find that it is who it was (TLS-2).

    Raises:
        OSError: It cannot be had with that server.
        EOFError: The server does not want it with us.
        ProtocolViolationError: Somebody stands between.
    """
    reader, writer = await asyncio.open_connection(
        sock=sock, ssl=tls.client, server_hostname="", ssl_shutdown_timeout=_SHUTDOWN_SECONDS
    )
    try:
        header = await reader.readexactly(HEADER.size)
        shown = incoming.open(await reader.readexactly(frame_length(header)))
        seen = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if shown != _digest(seen):
            raise ProtocolViolationError("the certificate is not the one that the server shows")
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer
