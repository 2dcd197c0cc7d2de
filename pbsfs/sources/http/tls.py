"""Connections to servers that pbsfs trusts. pbsfs sends nothing to a server before it trusts it.

pbsfs trusts a server if its certificate has the configured fingerprint, or if the system's CAs verify the
certificate and the name. Nothing turns that off; only for an address that begins with http:// is there no
TLS. Used by `client`, by the sessions of the server source and by `pbsfs.access.trust`. Synchronous; from any
thread.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import socket
import ssl
import time
from dataclasses import dataclass

from pbsfs.base.errors import (
    ConnectError,
    ResolveError,
    SourceError,
    TrustError,
    UsageError,
    WrongServerError,
)
from pbsfs.base.text import excerpt
from pbsfs.sources.http.limits import DEFAULT, HttpLimits
from pbsfs.sources.http.peer import Kind, Peer
from pbsfs.sources.http.proxy import Proxy, open_tunnel

CAS_KEPT = 60.0
"""Seconds for which pbsfs keeps the CAs that it has read: the system's take 20 ms, and an object store gets
64 connections at once."""

_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
_HASH_NAME = re.compile(r"sha-?256(?:\s+fingerprint)?\s*[:=]", re.IGNORECASE)


def parse_fingerprint(text: str) -> str:
    """A SHA-256 fingerprint as 64 lower-case hex digits. Raises UsageError.

    Ignores colons, case, and the name of the hash at the beginning: `openssl x509 -fingerprint -sha256`
    prints `sha256 Fingerprint=AA:BB:…`.
    """
    shown = text.strip()
    name = _HASH_NAME.match(shown)
    digits = shown[name.end() if name else 0 :].strip().replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(digits):
        raise UsageError(
            f"'{excerpt(shown)}' is not a fingerprint of SHA-256; "
            "give 32 pairs of hex digits with ':' between, as the server's dashboard shows it"
        )
    return digits


def show_fingerprint(digits: str) -> str:
    """64 hex digits as pairs with colons, as the server's web interface shows them."""
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))


@dataclass(frozen=True, slots=True)
class Trust:
    """By what pbsfs trusts a server: a fingerprint or CAs; without either, the system's CAs decide.

    `pinned`: given for this connection. It has to match, even if a CA verifies the certificate.
    `known`: accepted before (the file of known fingerprints). It or a CA has to match. `ca`: certificates in
    PEM format that count instead of the system's CAs.
    """

    pinned: str | None = None
    known: str | None = None
    ca: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """An established connection. `round_trip`: the seconds of the TCP handshake."""

    socket: ssl.SSLSocket
    round_trip: float


def connect(peer: Peer, trust: Trust, proxy: Proxy | None = None, limits: HttpLimits = DEFAULT) -> Connection:
    """Connects to a server and verifies it, through `proxy` if there is one.

    Raises ResolveError, ConnectError, TrustError, WrongServerError, and what `open_tunnel` raises.
    """
    accepted = trust.pinned or trust.known
    if accepted is None:
        return _connect(peer, _verifying(trust.ca), proxy, limits)
    connection = _connect(peer, _unverified(), proxy, limits)
    found = _fingerprint_of(connection.socket, peer)
    if found == accepted:
        return connection
    connection.socket.close()
    if trust.pinned is None:
        with contextlib.suppress(TrustError):  # the certificate is new; a CA may verify it
            return _connect(peer, _verifying(trust.ca), proxy, limits)
    raise TrustError(
        f"{peer.address} shows a certificate that is not the expected one. Expected fingerprint: "
        f"{show_fingerprint(accepted)}; found: {show_fingerprint(found)}. If the server's certificate was "
        f"renewed, accept it with {peer.kind.accept}; if not, somebody intercepts the connection"
    )


def connect_plain(peer: Peer, proxy: Proxy | None = None, limits: HttpLimits = DEFAULT) -> socket.socket:
    """Connects without TLS to a server that the user named as one without.

    Raises ResolveError, ConnectError, and what `open_tunnel` raises.
    """
    return _connect_tcp(peer, proxy, limits)[0]


def peek_fingerprint(peer: Peer, proxy: Proxy | None = None, limits: HttpLimits = DEFAULT) -> str:
    """The fingerprint of the certificate that the server shows, trusted or not; sends nothing.

    Raises like `connect`.
    """
    connection = _connect(peer, _unverified(), proxy, limits)
    try:
        return _fingerprint_of(connection.socket, peer)
    finally:
        connection.socket.close()


def _connect(peer: Peer, context: ssl.SSLContext, proxy: Proxy | None, limits: HttpLimits) -> Connection:
    plain, round_trip = _connect_tcp(peer, proxy, limits)
    wrapped: ssl.SSLSocket | None = None
    try:
        # Not in one step: for a connection that is already lost, that would return a socket that was never
        # verified. The time limit is for each message of the server.
        wrapped = context.wrap_socket(plain, server_hostname=peer.host, do_handshake_on_connect=False)
        wrapped.do_handshake()
    except ssl.SSLCertVerificationError as error:
        _close(plain, wrapped)
        raise TrustError(
            f"{peer.address}: the certificate is not trusted ({error.verify_message}); "
            f"{_how_to_accept(peer, proxy, limits)}"
        ) from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # it restarts, or the network lost the connection
        _close(plain, wrapped)
        raise ConnectError(
            f"{peer.address} closed the connection during the TLS handshake{peer.port_hint}"
        ) from None
    except ssl.SSLError as error:
        _close(plain, wrapped)
        raise WrongServerError(
            f"{peer.address} does not speak TLS ({error.reason or error}); "
            f"{peer.kind.check_address}{peer.port_hint}"
        ) from None
    except OSError as error:
        _close(plain, wrapped)
        raise ConnectError(
            f"{peer.address}: no TLS connection: {_words(error, limits)}{peer.port_hint}"
        ) from None
    except ValueError as error:  # a name that can't be sent
        _close(plain, wrapped)
        raise ResolveError(f"'{peer.host}' is not the name of a host: {_words(error, limits)}") from None
    return Connection(wrapped, round_trip)


def _close(plain: socket.socket, wrapped: ssl.SSLSocket | None) -> None:
    plain.close()
    if wrapped is not None:
        wrapped.close()


def _connect_tcp(peer: Peer, proxy: Proxy | None, limits: HttpLimits) -> tuple[socket.socket, float]:
    """A TCP connection or a tunnel to the server, and the seconds of the TCP handshake."""
    if proxy is None:
        return _dial(peer.host, peer.port, "the name", peer.address, peer.port_hint, peer.kind, limits)
    check = f"; check {proxy.variable}"
    plain, round_trip = _dial(
        proxy.host, proxy.port, "the proxy's name", f"the proxy {proxy.address}", check, peer.kind, limits
    )
    try:
        open_tunnel(plain, proxy, peer, limits)
        plain.settimeout(limits.connect_timeout)
    except BaseException:
        plain.close()
        raise
    return plain, round_trip


def _dial(
    host: str, port: int, name: str, address: str, advice: str, kind: Kind, limits: HttpLimits
) -> tuple[socket.socket, float]:
    """A TCP connection. `name`, `address`, `advice`, `kind`: words for errors."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        advice = advice or f"; check the host in {kind.named_in}, and this computer's network"
        raise ResolveError(f"{name} '{host}' does not resolve: {_words(error, limits)}{advice}") from None
    failure: OSError | None = None
    for family, type_, protocol, _name, place in addresses:
        try:
            plain = socket.socket(family, type_, protocol)
        except OSError as error:  # an address family that this system does not have
            failure = error
            continue
        plain.settimeout(limits.connect_timeout)
        started = time.monotonic()
        try:
            plain.connect(place)
            round_trip = time.monotonic() - started
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            plain.close()
            failure = error
            continue
        return plain, round_trip
    assert failure is not None  # getaddrinfo gives at least one address
    advice = advice or _advice(failure, kind)
    raise ConnectError(f"cannot connect to {address}: {_words(failure, limits)}{advice}") from None


def _advice(error: OSError, kind: Kind) -> str:
    """What to check when a connection to a server fails, for its error."""
    if isinstance(error, ConnectionRefusedError):
        return f"; nothing listens there: check the host and port, and that {kind.program} runs on it"
    return "; check the host and port, the network, and the firewalls between"


def _verifying(ca: str | None) -> ssl.SSLContext:
    """For connections that CAs verify: those in `ca`, or the system's."""
    return _read_cas(ca, ssl.get_default_verify_paths(), int(time.monotonic() / CAS_KEPT))


@functools.lru_cache(maxsize=4)
def _read_cas(ca: str | None, _paths: ssl.DefaultVerifyPaths, _period: int) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _unverified() -> ssl.SSLContext:
    """For connections whose certificate pbsfs compares by fingerprint before it sends anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _fingerprint_of(connection: ssl.SSLSocket, peer: Peer) -> str:
    certificate = connection.getpeercert(binary_form=True)
    if not certificate:
        raise TrustError(f"{peer.address} shows no certificate; {peer.kind.check_address}")
    return hashlib.sha256(certificate).hexdigest()


def _how_to_accept(peer: Peer, proxy: Proxy | None, limits: HttpLimits) -> str:
    try:
        found = show_fingerprint(peek_fingerprint(peer, proxy, limits))
    except SourceError:
        return f"give its fingerprint with {peer.kind.accept}"
    return (
        f"its fingerprint is {found}: if that is what {peer.kind.shown_by} shows, "
        f"accept it with {peer.kind.accept}"
    )


def _words(error: Exception, limits: HttpLimits) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {limits.connect_timeout:.0f} s"
    return str(getattr(error, "strerror", None) or error)
