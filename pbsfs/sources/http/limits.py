"""How long pbsfs waits for a server over HTTP, and what it keeps: the part that all such sources share.

Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.sources.pacing import DEFAULT_PACING, Pacing


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Times are in seconds, sizes in bytes."""

    pacing: Pacing = DEFAULT_PACING
    """The pauses between tries, and the length of the last one."""

    connect_timeout: float = 15.0
    """How long a TCP connection may take, and again for each message of the TLS handshake."""

    tunnel_timeout: float = 30.0
    """How long a proxy's answer may take, which comes after the proxy has reached the server."""

    request_timeout: float = 60.0
    """How long the server may send no byte before pbsfs gives up the request: one that reads the manifests
    of a large group from a sleeping disk is silent for long. Not a limit on the whole answer."""

    slow_time: float = 60.0
    """How long an answer that has begun may grow by less than `least_rate`. pbsfs gives it up after two such
    stretches in a row."""

    least_rate: float = 10.0
    """Bytes a second: what cargo (http.low-speed-limit) and curl's documentation use too, and less than a
    link has that all `requests` of a bucket share and that is of any use."""

    kept_connections: int = 8
    """Idle connections that pbsfs keeps: the tree lists as many groups at once."""

    keep_time: float = 20.0
    """How long pbsfs keeps an idle connection: servers and firewalls drop it if it is idle for longer."""


DEFAULT = HttpLimits()
