"""How long pbsfs waits for a server, and how much it keeps or accepts: one value for one source.

Passed to the constructors of this folder, which use `DEFAULT` unless they get another. Immutable; from any
thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.sources.http.limits import HttpLimits


@dataclass(frozen=True, slots=True)
class ServerLimits(HttpLimits):
    """Times are in seconds, sizes in bytes."""

    ticket_renewal: float = 3600.0
    """The age at which pbsfs renews a ticket: half of the two hours for which it is valid, so that the login
    survives a server that is unreachable for a while."""

    renewal_pause: float = 60.0
    """The pause before pbsfs tries again to renew a ticket that it can't replace by a new login."""

    max_list: int = 256 << 20
    """The size of a list at most: some 500,000 snapshots."""

    max_values: int = 16 << 20
    """How many values a list has at most: 500,000 snapshots have some 10 million, and each takes up to
    100 bytes when parsed."""

    parse_at_once: int = 64 << 10
    """The size up to which pbsfs parses an answer in the trio loop: that takes less time than handing it to
    a thread."""

    namespaces_kept: float = 2.0
    """How long pbsfs keeps the list of namespaces: it asks once to list a tree of them, not once for each."""

    ahead_kept: float = 10.0
    """How long pbsfs uses an answer that it asked for ahead."""

    max_ahead: int = 4 << 20
    """The size of a file that pbsfs asks for ahead, at most: the index of an image of 512 GiB."""

    max_sessions: int = 16
    """Reader sessions at once, of the whole mount. Each is a worker task in the server's list."""

    idle_time: float = 30.0
    """How long pbsfs keeps an idle session: long enough that a user who browses needs no new one,
    short enough that a prune of the snapshot does not wait long."""

    turn: float = 5.0
    """How long a session in constant use keeps its place while others wait for one."""

    closing_time: float = 2.0
    """How long closing waits for sessions to end, which they do at once unless they are connecting."""

    short_round_trip: float = 0.005
    """Up to this round trip, that of a local network, one connection fills the link."""

    round_trip_per_connection: float = 0.015
    """The round trip for each further connection: at 50 ms there are five, each of which carries a fifth of
    what the link holds, less than Linux's default socket buffers."""

    max_connections: int = 6
    """Connections to one snapshot at most."""

    further_pause: float = 5.0
    """The pause before pbsfs tries again to open further connections after it could not open one."""

    window: int = (1 << 31) - 2
    """What the server may send before pbsfs acknowledges any, per stream and in all: as in the vendor's
    client. The requests bound what is outstanding."""

    acknowledge_after: int = 64 << 20
    """How much pbsfs receives before it acknowledges it to the server: rarely, as every frame costs time."""


DEFAULT = ServerLimits()
