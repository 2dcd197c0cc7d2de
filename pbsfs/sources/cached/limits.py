"""How much the cache on disk keeps in memory, waits and looks at: one value for one cache.

Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_SIZE = 50 << 30
"""Bytes of a cache for which the user named no size."""

LEAST_SIZE = 64 << 20
"""Bytes; some chunks of the largest size that exists."""


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Times are in seconds."""

    touch_after: int = 60
    """An entry that is read gets a new time of use if its last one is older: a write to an inode costs more
    than a read, and entries that were used in the same minute are equal."""

    left_after: int = 3600
    """Unfinished files are removed at this age: those of processes that were killed."""

    sample: int = 16_384
    """Entries among which pbsfs looks for the least recently used ones: some 3 MiB of memory, and 0.1 s."""

    most_names: int = 262_144
    """Names of one directory that are looked at: another user may have put more there."""

    queue: int = 32 << 20
    """Bytes that wait to be written. What does not fit is not kept: reading never waits for the cache."""

    writers: int = 2
    """Threads that write at once: more would take the disk from those that read."""

    io_timeout: float = 10.0
    """How long an operation may take: after that, the source is faster."""

    pause: float = 60.0
    """How long nothing is written after a write failed: a full disk stays full for a while."""

    claim_patience: float = 5.0
    """How long to wait for a chunk that another process fetches."""

    claim_pauses: tuple[float, float] = (0.005, 0.1)
    """The first and the longest pause between two looks at such a chunk."""

    closing: float = 3.0
    """How long to write what waits when the source is closed."""


DEFAULT = CacheLimits()
