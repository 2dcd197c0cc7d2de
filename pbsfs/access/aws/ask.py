"""Requests for keys: to the metadata service of a machine or container, and to AWS's token service (STS).

They are few and small: each has a connection of its own and one time limit for all of it, and its answer is
bounded. No redirect is followed. Synchronous, for worker threads; the key sources call it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from pbsfs.base.errors import ConnectError, UsageError, WrongServerError
from pbsfs.base.text import excerpt
from pbsfs.sources.http.limits import HttpLimits
from pbsfs.sources.http.peer import Kind, address_of, authority_of
from pbsfs.sources.http.proxy import find_proxy
from pbsfs.sources.http.tls import Trust, connect

MAX_ANSWER = 64 << 10
"""Bytes of an answer at most; a key with its token has some 2000."""

_READ_SIZE = 16 << 10

_SERVICE = Kind(
    name="a service that gives out keys",
    named_in="the environment",
    program="the service",
    shown_by="its administrator",
    accept="a CA of this system",
)


@dataclass(frozen=True, slots=True)
class Service:
    """Where a service is: a peer for connections with TLS, and without."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str, setting: str) -> Service:
        """`setting`: what has the URL, for errors. Raises UsageError, which does not show the URL's path."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        safe = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or not safe:
            raise UsageError(
                f"{setting}: '{excerpt(parts.netloc.rpartition('@')[2])}' is not the address of a service; "
                "write https://HOST"
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), target)

    @property
    def secure(self) -> bool:
        return self.scheme == "https"

    @property
    def address(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        return address_of(self.host, self.port)

    @property
    def authority(self) -> str:
        """The `Host` header."""
        return authority_of(self.host, self.port, secure=self.secure)

    @property
    def port_hint(self) -> str:
        return ""

    @property
    def kind(self) -> Kind:
        return _SERVICE


@dataclass(frozen=True, slots=True, repr=False)
class Route:
    """How a service outside of this machine is reached.

    `proxies`: the environment that may name a proxy, with its password. `ca`: as for `Trust`.
    """

    proxies: Mapping[str, str]
    ca: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that was received in full."""

    status: int
    body: bytes


def ask(
    service: Service,
    timeout: float,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    route: Route | None = None,
) -> Reply:
    """The answer of a service, whatever its status.

    `timeout`: seconds for all of it. `route`: None to connect directly, as metadata services are only there
    for this machine. Raises ConnectError, TrustError, ResolveError, and WrongServerError for what is not an
    answer of such a service.
    """
    deadline = time.monotonic() + timeout
    request = h11.Request(
        method=method,
        target=service.target,
        headers=[
            ("Host", service.authority),
            ("Accept", "*/*"),
            ("Connection", "close"),
            *(headers or {}).items(),
            *([("Content-Length", str(len(body)))] if body or method != "GET" else []),
        ],
    )
    try:
        with contextlib.closing(_connected(service, timeout, route)) as connection:
            return _exchanged(connection, request, body, deadline)
    except h11.RemoteProtocolError:
        raise WrongServerError(f"{service.address}: not an answer of {_SERVICE.name}") from None
    except TimeoutError:
        raise ConnectError(f"{service.address}: no answer within {timeout:.0f} s") from None
    except OSError as error:
        raise ConnectError(f"{service.address}: {error.strerror or error}") from None


def _connected(service: Service, timeout: float, route: Route | None) -> socket.socket:
    if service.secure:
        limits = HttpLimits(connect_timeout=timeout, tunnel_timeout=timeout)
        proxy, ca = (None, None) if route is None else (find_proxy(service, route.proxies), route.ca)
        return connect(service, Trust(ca=ca), proxy, limits).socket
    return socket.create_connection((service.host, service.port), timeout)


def _exchanged(connection: socket.socket, request: h11.Request, body: bytes, deadline: float) -> Reply:
    """Raises OSError, and h11.RemoteProtocolError for an answer that is not one, or too large."""
    machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER)
    sent = machine.send(request) or b""
    if body:
        sent += machine.send(h11.Data(data=body)) or b""
    sent += machine.send(h11.EndOfMessage()) or b""
    connection.settimeout(_left(deadline))
    connection.sendall(sent)
    status, received = 0, bytearray()
    has_begun = is_closed = False
    while True:
        try:
            event = machine.next_event()
        except h11.RemoteProtocolError:
            if is_closed and (status or not has_begun):
                raise ConnectionResetError(
                    errno.ECONNRESET, "the connection was closed before the answer was complete"
                ) from None
            raise
        if event is h11.NEED_DATA:
            connection.settimeout(_left(deadline))
            data = connection.recv(_READ_SIZE)
            has_begun, is_closed = has_begun or bool(data), not data
            machine.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            received += event.data
            if len(received) > MAX_ANSWER:
                raise h11.RemoteProtocolError("too large")
        elif isinstance(event, h11.EndOfMessage):
            return Reply(status, bytes(received))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
