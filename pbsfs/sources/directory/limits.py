"""How long pbsfs waits for a disk, and how much it looks at or keeps: one value for one directory.

Passed to `DirectorySource`, which uses `DEFAULT` unless it gets another. Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.sources.listing.limits import ListingLimits


@dataclass(frozen=True, slots=True)
class DirectoryLimits(ListingLimits):
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


DEFAULT = DirectoryLimits()
