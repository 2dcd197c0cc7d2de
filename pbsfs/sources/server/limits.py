"""How long pbsfs waits for a server, and how much it keeps or accepts: one value for one source.

Passed to the constructors of this folder, which use `DEFAULT` unless they get another. Immutable; from any
thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.sources.retry import DEFAULT_PACING, Pacing


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times are in seconds, sizes in bytes."""

    pacing: Pacing = DEFAULT_PACING
    """The pauses between tries, and the length of the last one."""

    connect_timeout: float = 15.0
    """How long a TCP connection may take, and again for each message of the TLS handshake."""

    tunnel_timeout: float = 30.0
    """How long a proxy's answer may take, which comes after the proxy has reached the server."""

    request_timeout: float = 60.0
    """How long the API may send no byte before pbsfs gives up the request: a server that reads the manifests
    of a large group from a sleeping disk is silent for long. Not a limit on the whole answer."""

    ticket_renewal: float = 3600.0
    """The age at which pbsfs renews a ticket: half of the two hours for which it is valid, so that the login
    survives a server that is unreachable for a while."""

    kept_connections: int = 8
    """Idle connections to the API that pbsfs keeps: the tree lists as many groups at once."""

    keep_time: float = 20.0
    """How long pbsfs keeps an idle connection: servers and firewalls drop it if it is idle for longer."""

    max_list: int = 256 << 20
    """The size of a list at most: some 500,000 snapshots."""

    max_values: int = 16 << 20
    """How many values a list has at most: 500,000 snapshots have some 10 million, and each takes up to
    100 bytes when parsed."""

    parse_at_once: int = 64 << 10
    """The size up to which pbsfs parses an answer in the trio loop: that takes less time than handing it to
    a thread."""


DEFAULT = ServerLimits()
