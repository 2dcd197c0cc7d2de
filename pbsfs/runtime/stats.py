"""What this process did, as numbers: one `COUNTS` for the process, which serves one mount or NBD server.

The places that do the work add to it: an integer addition, without a lock, from any thread. pbsfs reads the
numbers when somebody asks for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError, SourceError

LIMITS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Seconds: the upper limits of the groups that chunk fetches are counted in. Slower ones are a last group."""

_LIMIT_NAMES = ("1ms", "10ms", "100ms", "1s", "10s")


class Counts:
    """Numbers since the process started.

    `reads`, `bytes_served`: answers to reads of programs. `cache_hits`: look-ups that the chunk cache
    answered; `cache_misses`: look-ups that waited for a fetch; `chunks_prefetched`: chunks that pbsfs started
    to fetch ahead. `bytes_fetched`: stored bytes of chunks, indexes and blobs from the source. `fetches`,
    `fetch_seconds`: chunks that the source returned, and the time that all of them took. `disk_cache_hits`,
    `disk_cache_misses`: chunks, indexes and blobs that the cache on disk had, and lacked; `disk_cache_read`,
    `disk_cache_written`: bytes that came from it, and that went there. `requests`: requests to an object
    store, which may cost money. `retries`: requests sent again; `outages`: faults of the server that a second
    try met too. `sessions`: reader sessions that are open or being opened; `sessions_opened`: all so far.
    `errors_…`: operations that failed, by cause.
    `parsers`: processes that read file systems on disks and run now; `parsers_started`, `parsers_failed`: all
    so far, and those that failed.
    """

    __slots__ = (
        "_fetches_by_time",
        "bytes_fetched",
        "bytes_served",
        "cache_hits",
        "cache_misses",
        "chunks_prefetched",
        "disk_cache_hits",
        "disk_cache_misses",
        "disk_cache_read",
        "disk_cache_written",
        "errors_damage",
        "errors_internal",
        "errors_key",
        "errors_source",
        "fetch_seconds",
        "fetches",
        "outages",
        "parsers",
        "parsers_failed",
        "parsers_started",
        "reads",
        "requests",
        "retries",
        "sessions",
        "sessions_opened",
    )

    def __init__(self) -> None:
        self.reads = self.bytes_served = 0
        self.cache_hits = self.cache_misses = self.chunks_prefetched = 0
        self.fetches = self.bytes_fetched = 0
        self.fetch_seconds = 0.0
        self.disk_cache_hits = self.disk_cache_misses = 0
        self.disk_cache_read = self.disk_cache_written = 0
        self._fetches_by_time = [0] * (len(LIMITS) + 1)
        self.requests = self.retries = self.outages = 0
        self.sessions = self.sessions_opened = 0
        self.errors_damage = self.errors_source = self.errors_key = self.errors_internal = 0
        self.parsers = self.parsers_started = self.parsers_failed = 0

    def failed(self, error: PbsfsError) -> None:
        """Counts an operation that failed because of damage, a missing key or the source."""
        if isinstance(error, DamageError):
            self.errors_damage += 1
        elif isinstance(error, KeyRequiredError):
            self.errors_key += 1
        elif isinstance(error, SourceError):
            self.errors_source += 1

    def chunk_fetched(self, size: int, seconds: float) -> None:
        """Counts a chunk that the source returned: its stored bytes, and how long that took."""
        self.fetches += 1
        self.bytes_fetched += size
        self.fetch_seconds += seconds
        self._fetches_by_time[bisect_left(LIMITS, seconds)] += 1

    def __iter__(self) -> Iterator[tuple[str, int | float]]:
        """The name and value of each number, in the order of the list that people read."""
        for name in (
            *("reads", "bytes_served", "cache_hits", "cache_misses", "chunks_prefetched"),
            *("bytes_fetched", "fetches", "fetch_seconds"),
        ):
            yield name, getattr(self, name)
        total = 0
        for name, count in zip(_LIMIT_NAMES, self._fetches_by_time, strict=False):
            total += count
            yield f"fetches_within_{name}", total
        for name in (
            *("disk_cache_hits", "disk_cache_misses", "disk_cache_read", "disk_cache_written"),
            *("requests", "retries", "outages", "sessions", "sessions_opened"),
            *("errors_damage", "errors_source", "errors_key", "errors_internal"),
            *("parsers", "parsers_started", "parsers_failed"),
        ):
            yield name, getattr(self, name)


COUNTS = Counts()
