"""Made data: deterministic content with holes, and a datastore that holds some of everything."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pbsfs.base.names import ROOT_NAMESPACE, Group, Namespace, Snapshot
from pbsfs.formats.keys import Key

TIME = 1_700_000_000
"""2023-11-14T22:13:20Z"""

DAY = 86_400

KEY = Key(bytes(range(32)))
OTHER_KEY = Key(bytes(range(1, 33)))


COLLECTION = {
    "upid": f"UPID:pbs:000002E3:00000C54:00000001:{TIME:08X}:garbage_collection:store1:root@pam:",
    "index-file-count": 4,
    "index-data-bytes": 9000,
    "disk-bytes": 3000,
    "disk-chunks": 7,
    "removed-bytes": 0,
    "removed-chunks": 0,
    "pending-bytes": 500,
    "pending-chunks": 1,
    "removed-bad": 0,
    "still-bad": 2,
}
"""What a server notes about a garbage collection at `TIME`."""


def snapshot(
    backup_id: str = "100",
    *,
    type: str = "vm",  # noqa: A002 - the field's word
    time: int = TIME,
    namespace: Namespace = ROOT_NAMESPACE,
) -> Snapshot:
    return Snapshot(Group(namespace, type, backup_id), time)


def image(seed: int, chunks: Sequence[str], *, chunk_size: int = 1 << 16, tail: int = 0) -> bytes:
    """An image, a letter a chunk: `r` random, `t` text, `0` a hole; then `tail` random bytes."""
    source = random.Random(seed)
    made = {
        "r": lambda: source.randbytes(chunk_size),
        "t": lambda: (b"%016d\n" % source.randrange(10**9) * chunk_size)[:chunk_size],
        "0": lambda: bytes(chunk_size),
    }
    return b"".join(made[kind]() for kind in chunks) + source.randbytes(tail)
