"""The HTTP proxy that the environment names, and the tunnel through it to the server.

The rules are curl's for an `https` URL. The proxy resolves the server's name and passes bytes on; TLS runs
through the tunnel, so pbsfs verifies the certificate of the server itself. Used by `pbsfs.access` when it
resolves a source, and by `tls`. Synchronous; from any thread.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    ForbiddenError,
    SourceError,
    UsageError,
    WrongServerError,
)
from pbsfs.base.secret import Secret
from pbsfs.base.text import one_line
from pbsfs.sources.http.limits import DEFAULT, HttpLimits
from pbsfs.sources.http.peer import Peer, address_of

VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
EXCEPTIONS = ("no_proxy", "NO_PROXY")
"""The variables, in curl's order of precedence. An empty variable counts as not set."""

DEFAULT_PORT = 1080

MAX_ANSWER = 64 << 10
"""Bytes of the proxy's answer; real ones have some hundreds."""

_FORM = "it looks like http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"
_OTHER_SCHEMES = ("https", "socks", "socks4", "socks4a", "socks5", "socks5h")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+", re.ASCII)
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: ([^\r\n]*))?\r?\n")
_END = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True, slots=True)
class Proxy:
    """`host` has no brackets. `variable`: which one names the proxy. `password`: None without `user`."""

    host: str
    port: int
    variable: str
    user: str | None = None
    password: Secret | None = None

    @property
    def address(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        return address_of(self.host, self.port)


def find_proxy(peer: Peer, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy that the environment names for this server; None to connect directly.

    Raises UsageError if pbsfs can't use the proxy. The error does not show the variable's value, which may
    hold a password.
    """
    variable = next((name for name in VARIABLES if environment.get(name)), None)
    if variable is None:
        return None
    exceptions = next((environment[name] for name in EXCEPTIONS if environment.get(name)), "")
    if is_excepted(peer.host, exceptions):
        return None
    return _parse(variable, environment[variable])


def is_excepted(host: str, exceptions: str) -> bool:
    """Whether a NO_PROXY list names `host`.

    In the list, a name, with or without a leading dot, means itself and all names below it; an address means
    itself, or a network (`192.0.2.0/24`); `*` alone means everything. Source: curl's CURLOPT_NOPROXY(3).
    """
    if exceptions.strip() == "*":
        return True
    entries = [entry for entry in re.split(r"[,\s]+", exceptions) if entry]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        name = host.rstrip(".").lower()
        ends = [entry.strip(".").lower() for entry in entries]
        return any(end and (name == end or name.endswith(f".{end}")) for end in ends)
    return any(_contains(entry, address) for entry in entries)


def _contains(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:  # a name
        return False


def _parse(variable: str, text: str) -> Proxy:
    scheme, colon, rest = text.strip().partition("://")
    if not colon:
        scheme, rest = "http", text.strip()
    if scheme.lower() in _OTHER_SCHEMES:
        raise UsageError(
            f"{variable}: {scheme.lower()}:// proxies are not supported, only http:// ones; "
            "name an http:// proxy, or except the server with NO_PROXY"
        )
    wrong = UsageError(f"{variable}: not the address of a proxy; {_FORM}")
    try:
        parts = urllib.parse.urlsplit(f"//{rest}")
        host, port = parts.hostname or "", DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        raise wrong from None
    if scheme.lower() != "http" or not _HOST.fullmatch(host) or port == 0:
        raise wrong
    if parts.username is None:
        return Proxy(host, port, variable)
    password = Secret(urllib.parse.unquote(parts.password or ""))
    return Proxy(host, port, variable, urllib.parse.unquote(parts.username), password)


def open_tunnel(connection: socket.socket, proxy: Proxy, peer: Peer, limits: HttpLimits = DEFAULT) -> None:
    """Makes `connection`, a TCP connection to the proxy, a tunnel to the server.

    Raises ConnectError; AuthError and ForbiddenError if the proxy refuses; WrongServerError if it
    is not a proxy.
    Source: RFC 9110, 9.3.6 (CONNECT) and 11.7 (Proxy-Authorization); RFC 7617 (Basic).
    """
    lines = [f"CONNECT {peer.address} HTTP/1.1", f"Host: {peer.address}"]
    if proxy.user is not None and proxy.password is not None:
        pair = f"{proxy.user}:{proxy.password.reveal()}".encode("utf-8", "surrogateescape")
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}")
    request = "".join(f"{line}\r\n" for line in [*lines, ""]).encode()
    try:
        connection.settimeout(limits.tunnel_timeout)
        connection.sendall(request)
        answer = _answer(connection, proxy, limits.tunnel_timeout)
    except TimeoutError:
        raise ConnectError(
            f"the proxy {proxy.address}: no answer within {limits.tunnel_timeout:.0f} s"
        ) from None
    except OSError as error:
        raise ConnectError(
            f"the proxy {proxy.address}: the connection was lost: {error.strerror or error}"
        ) from None
    status_line = _STATUS_LINE.match(answer)
    if status_line is None:
        raise _no_proxy(proxy)
    status, reason = int(status_line[1]), one_line((status_line[2] or b"").decode(errors="replace"), 200)
    if not 200 <= status < 300:
        raise _refusal(proxy, peer, status, reason)


def _answer(connection: socket.socket, proxy: Proxy, timeout: float) -> bytes:
    """The proxy's answer up to the empty line. Nothing follows it: the server waits for TLS."""
    deadline = time.monotonic() + timeout
    received = b""
    while not (end := _END.search(received)):
        if len(received) > MAX_ANSWER or not received.startswith(b"HTTP/1."[: len(received)]):
            raise _no_proxy(proxy)
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(4096)
        if not more:
            raise ConnectError(f"the proxy {proxy.address} closed the connection")
        received += more
    status_line = _STATUS_LINE.match(received)
    if len(received) > end.end() and status_line is not None and status_line[1].startswith(b"2"):
        raise _no_proxy(proxy)
    return received


def _no_proxy(proxy: Proxy) -> WrongServerError:
    return WrongServerError(
        f"{proxy.address} does not answer as an HTTP proxy does; check {proxy.variable}, "
        "or except the server with NO_PROXY"
    )


def _refusal(proxy: Proxy, peer: Peer, status: int, reason: str) -> SourceError:
    said = f"status {status} {reason}".rstrip()
    if status == 407:
        what = (
            "asks for a user and password" if proxy.user is None else "does not accept the user and password"
        )
        return AuthError(
            f"the proxy {proxy.address} {what} ({said}); give them in {proxy.variable}, "
            "as in http://USER:PASSWORD@HOST:PORT, with special characters as %XX"
        )
    if status in (401, 403):
        return ForbiddenError(
            f"the proxy {proxy.address} refuses connections to {peer.address} ({said}); "
            "ask its administrator to allow them, or except the server with NO_PROXY"
        )
    if status in (408, 429) or (status >= 500 and status not in (501, 505)):
        return ConnectError(f"the proxy {proxy.address} can't reach {peer.address} ({said}){peer.port_hint}")
    return WrongServerError(
        f"{proxy.address} opens no tunnel to {peer.address} ({said}); check {proxy.variable}, "
        "or except the server with NO_PROXY"
    )
