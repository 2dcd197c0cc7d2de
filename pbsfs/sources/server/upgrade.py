"""The start of a reader session: the request that turns an HTTP/1 connection into one of the reader protocol.

Used by `session`, in the session's thread. Source: RFC 9110, 7.8 (Upgrade), and `GET /api2/json/reader` of
the server's API.
"""

from __future__ import annotations

import socket
import ssl
import urllib.parse
from collections.abc import Callable, Mapping

import h11

from pbsfs.base.errors import ConnectError, WrongServerError
from pbsfs.sources.server.repository import PBS

PROTOCOL = "proxmox-backup-reader-protocol-v1"

_MAX_ERROR_BODY = 16 << 10
_MAX_HEAD = 64 << 10

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""How soon the kernel reports a dead connection on which pbsfs asks nothing: within a minute."""


class RefusedError(Exception):
    """The server answered the upgrade with an error: `status` and its `words`."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.words = words


def upgrade(
    sock: ssl.SSLSocket,
    address: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    receive: Callable[[ssl.SSLSocket], bytes],
) -> bytes:
    """Asks for the reader protocol on a connection to `address`; returns the bytes that follow the answer.

    `query`: names the snapshot. `headers`: authenticate the user. `receive`: returns the next bytes of the
    socket, which doesn't block then, and b"" at the end of the connection.

    Raises RefusedError, ConnectError if the connection ends, WrongServerError if it is not a server, what
    `receive` raises, and OSError.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    http1 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
    request = h11.Request(
        method="GET",
        target=f"/api2/json/reader?{urllib.parse.urlencode(query)}",
        headers=[("Host", address), ("Connection", "upgrade"), ("Upgrade", PROTOCOL), *headers.items()],
    )
    try:
        sock.sendall((http1.send(request) or b"") + (http1.send(h11.EndOfMessage()) or b""))
        sock.setblocking(False)
        status, body = 0, b""
        while True:
            event = http1.next_event()
            if event is h11.NEED_DATA:
                received = receive(sock)
                if not received and not status:  # the server restarts, or a proxy closed the connection
                    raise _closed(address)
                http1.receive_data(received)
            elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                return bytes(http1.trailing_data[0])
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data) and len(body) < _MAX_ERROR_BODY:
                body += bytes(event.data)
            else:
                break  # the end of the answer, or of the part that an error can show
    except h11.RemoteProtocolError as error:
        if "closed" in str(error):  # in the middle of the answer
            raise _closed(address) from None
        raise WrongServerError(
            f"{address} does not answer as {PBS.name} does ({error}); {PBS.check_address}"
        ) from None
    if not status:
        raise _closed(address)
    raise RefusedError(status, body.decode(errors="replace"))


def _closed(address: str) -> ConnectError:
    return ConnectError(f"{address}: closed the connection")
