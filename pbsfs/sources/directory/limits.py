"""How long pbsfs waits for a disk, and how much it looks at or keeps: one value for one directory.

Passed to `DirectorySource`, which uses `DEFAULT` unless it gets another. Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pbsfs.sources.listing.limits import ListingLimits
from pbsfs.sources.workers import WorkerLimits


@dataclass(frozen=True, slots=True)
class DirectoryLimits(ListingLimits):
    """`workers`: of the threads that read the directory."""

    workers: WorkerLimits = field(default_factory=WorkerLimits)


DEFAULT = DirectoryLimits()
