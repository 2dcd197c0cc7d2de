"""How much a listing looks at, keeps or accepts. Immutable; from any thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListingLimits:
    """What all sources share that list by names and files."""

    parsed_manifests: int = 20_000
    """Snapshots whose parsed manifest pbsfs keeps (some 1.5 KiB each), so that listing them again is fast."""

    looks: int = 500
    """Snapshots in which a listing of groups looks for a manifest, beyond the newest of each group: a disk
    takes up to 10 ms for each."""

    owner_and_notes: int = 64 << 10
    """Bytes of the file with a group's owner or notes at most; pbsfs ignores a larger one."""
