"""How long pbsfs waits for a disk, and how much it looks at or keeps: one value for one directory.

Passed to `DirectorySource`, which uses `DEFAULT` unless it gets another. Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DirectoryLimits:
    """Times are in seconds."""

    io_timeout: float = 60.0
    """How long one file operation may take. A sick disk answers within its own retries (tens of seconds); a
    network file system whose server is unreachable never does."""

    stuck_timeout: float = 2.0
    """How long a file operation may take while another one is stuck for longer than `io_timeout`."""

    stuck_pause: float = 10.0
    """How long all operations fail at once after one took longer than `stuck_timeout`: a listing of many
    files must not wait for each."""

    threads: int = 32
    """Threads in file operations at once. Most of them wait for the disk. They are apart from trio's own
    threads, on which decoding depends: stuck operations would use those up."""

    parsed_manifests: int = 20_000
    """Snapshots whose parsed manifest pbsfs keeps (some 1.5 KiB each), so that listing them again is fast."""

    looks: int = 500
    """Snapshots in which a listing of groups looks for a manifest, beyond the newest of each group: a disk
    takes up to 10 ms for each."""

    owner_and_notes: int = 64 << 10
    """Bytes of the file with a group's owner or notes at most; pbsfs ignores a larger one."""


DEFAULT = DirectoryLimits()
