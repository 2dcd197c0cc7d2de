"""The reference server: a datastore directory served as a Proxmox Backup Server does, over real TLS.

    with ReferenceServer(path) as server:
        server.add_user("reader@pbs", "a password")
        secret = server.add_token("reader@pbs!viewer")
        server.faults.add(Drop(match="/chunk", after_bytes=1000))
        ...  # server.repository("reader@pbs!viewer"), server.fingerprint, server.requests, …

By hand: `python -m tests.support.server --help`.
"""

from __future__ import annotations

from tests.support.server.accounts import NOTHING, OWN_GROUPS, READER
from tests.support.server.faults import (
    Body,
    Corrupt,
    Drop,
    EndlessHeaders,
    Garbage,
    GoAway,
    Hold,
    Huge,
    Reset,
    Stall,
    Status,
    Truncate,
    WrongLength,
    ZipBomb,
)
from tests.support.server.link import SlowLink
from tests.support.server.server import ReferenceServer

__all__ = [
    "NOTHING",
    "OWN_GROUPS",
    "READER",
    "Body",
    "Corrupt",
    "Drop",
    "EndlessHeaders",
    "Garbage",
    "GoAway",
    "Hold",
    "Huge",
    "ReferenceServer",
    "Reset",
    "SlowLink",
    "Stall",
    "Status",
    "Truncate",
    "WrongLength",
    "ZipBomb",
]
