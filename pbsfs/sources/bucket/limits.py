"""How long pbsfs waits for an object store, and how much it asks for and accepts: one value for one bucket.

Passed to `BucketSource`, which uses `DEFAULT` unless it gets another. Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pbsfs.sources.http.limits import HttpLimits
from pbsfs.sources.listing.limits import ListingLimits


@dataclass(frozen=True, slots=True)
class BucketLimits(HttpLimits):
    """Times are in seconds, sizes in bytes."""

    kept_connections: int = 64
    """As many as there are requests at once: each new one costs two to three round trips."""

    requests: int = 64
    """Requests at once: an object store answers one at a time on each connection, after 20 to 100 ms."""

    page: int = 1000
    """Keys that pbsfs asks for in one answer: the most that object stores give."""

    max_page: int = 4 << 20
    """Bytes of such an answer at most: 1000 keys of 1024 escaped bytes, and what is said of each."""

    parsed_at_once: int = 2
    """Larger answers that are parsed at once: more take memory, and are not faster."""

    max_keys: int = 1 << 20
    """Keys of one listing at most: some 170,000 snapshots of one group, or the names of that many in all."""

    idle_pages: int = 16
    """Answers in a row without a key that is new, after which a listing counts as endless."""

    parse_at_once: int = 16 << 10
    """The size up to which pbsfs parses an answer in the trio loop: that takes less time than handing it to
    a thread."""

    small_files: int = 16 << 20
    """Bytes of owners and notes that pbsfs keeps, so that it fetches each once."""

    renewal_margin: float = 120.0
    """How long before temporary keys expire pbsfs asks for new ones."""

    listing: ListingLimits = field(default_factory=lambda: ListingLimits(looks=0))
    """A listing of groups has no more than the newest snapshot of each."""


DEFAULT = BucketLimits()
