"""How many bytes pbsfs fetches at once and ahead: one value for one reader.

`open_reader` passes it to the chunk store and the open files, which use `DEFAULT` unless they get another.
Immutable; from any thread.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Sizes are in bytes."""

    fetch_budget: int = 96 << 20
    """The decoded size of the chunks that are fetched at once: 24 chunks of 4 MiB. Until they are decoded
    they take their stored size. With a smaller cache, its size: threads of nbdkit may each still hold a chunk
    that has left it."""

    prefetch_share: float = 2 / 3
    """The part of `fetch_budget` that prefetching may use; the rest is reserved for reads. These 16 chunks of
    4 MiB, usually 20 MB as stored, fill 1 Gbit/s at 50 ms; 8 chunks filled 60 % of it."""

    spare_decoders: int = 1
    """Threads that decode, besides one for each core: between two chunks a thread may wait for Python's lock,
    and its core would be idle until then."""

    file_budget: int = 64 << 20
    """The usual sizes of the indexes and blobs that are fetched at once. A larger one is fetched alone."""

    reorder_distance: int = 2 << 20
    """How far a request may be before or behind the expected offset and still be part of one sequential read:
    the kernel requests at most two read-ahead windows of 1 MiB at once."""

    evidence: int = 256 << 10
    """How much is read in sequence before pbsfs fetches ahead: two requests of the kernel's default
    read-ahead."""

    growth: int = 4
    """Bytes to fetch ahead for each byte of evidence: the full window is reached after 16 MiB."""

    max_window: int = 64 << 20
    """How much pbsfs fetches ahead at most: 16 chunks of 4 MiB keep many cores, or a long distance, busy."""

    rate_window: int = 4
    """With a limited rate, how much pbsfs fetches ahead at most: what the rate brings in this many seconds.
    If the reader stops, more would be lost for the other ones."""


DEFAULT = FetchLimits()
