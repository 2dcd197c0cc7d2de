"""What a server notes about its last garbage collection, which removes chunks that no backup uses.

The server answers it, and keeps it as a file in the datastore; both have the same JSON. Used by the sources.
Pure functions, for any thread.

Source of the fields: proxmox-backup 3.2.4, pbs-api-types/src/datastore.rs, `GarbageCollectionStatus` and
`GarbageCollectionJobStatus`; of the ID of a task: proxmox, pbs-api-types, `UPID`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.formats.index import MAX_ARCHIVE_SIZE

_MOST_STATE = 200
"""Characters of a state that are kept."""


class Collection(NamedTuple):
    """The last garbage collection.

    `time`: when it began, in seconds since the epoch; None if there was none. `indexed_size`: bytes that all
    indexes refer to. `stored_size`: bytes that the chunks take. `pending_size`: of these, those of unused
    chunks that a later collection removes. `bad_chunks`: damaged ones that a verification found and that are
    kept. `state`: how it ended, in the server's words; None if that is not known.
    """

    time: int | None
    indexed_size: int
    stored_size: int
    pending_size: int
    bad_chunks: int
    state: str | None = None


def parse_collection(data: object) -> Collection:
    """From the server's object. Raises DamageError if it is not one."""
    if not isinstance(data, dict):
        raise DamageError("the status of the garbage collection is not an object")
    state = data.get("last-run-state")
    return Collection(
        time=_begin(data.get("upid")),
        indexed_size=_number(data, "index-data-bytes"),
        stored_size=_number(data, "disk-bytes"),
        pending_size=_number(data, "pending-bytes"),
        bad_chunks=_number(data, "still-bad"),
        state=state[:_MOST_STATE] if isinstance(state, str) else None,
    )


def _begin(upid: object) -> int | None:
    """The time in the ID of a task: `UPID:NODE:PID:PSTART:TASK:STARTTIME:…`, in hexadecimal."""
    if not isinstance(upid, str):
        return None
    parts = upid.split(":", 6)
    if len(parts) < 7 or not 0 < len(parts[5]) <= 8:
        raise DamageError("the ID of the last garbage collection is not valid")
    try:
        return int(parts[5], 16)
    except ValueError:
        raise DamageError("the ID of the last garbage collection is not valid") from None


def _number(data: dict[str, Any], name: str) -> int:
    """A member that older servers may lack: then 0."""
    value = data.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ARCHIVE_SIZE:
        raise DamageError(f"the status of the garbage collection has no valid '{name}'")
    return value
