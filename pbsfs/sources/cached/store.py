"""A cache on disk: entries by name, bounded in bytes, the least recently used ones removed first.

All processes that use a directory share its bound: each removes entries where a new one would not fit. The
names are digests, so a shard is a random sample of all entries; the oldest entries of some shards are about
the oldest of all. Nothing here is verified: the callers check what they read, and drop what is wrong.

Synchronous; from any thread of any number of processes. Each method may raise OSError.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pbsfs.base.errors import DamageError
from pbsfs.formats.blob import Stored
from pbsfs.runtime.stats import COUNTS
from pbsfs.sources.cached.claims import Claims
from pbsfs.sources.cached.files import SHARDS, CacheFiles, Found, Kind, Name, size_on_disk
from pbsfs.sources.cached.limits import DEFAULT, CacheLimits
from pbsfs.sources.cached.usage import Usage

_KEPT_FREE = 64
_LEAST_FREE = 32 << 20
"""One part in so many of the bound is made free at once, and of a small cache so many bytes, so that looking
for old entries is rare."""

_SHARE = 8
"""At most one part in so many of a sample is removed: more would not be old."""

_COUNTED_AFTER = 256
_LEAST_COUNTED = 16 << 20
"""When this process has written one part in so many of the bound, and so many bytes, the next shards are
counted."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a cache: `counts` and `sizes` (bytes on disk) by kind, and the time of use of the oldest
    and newest entry, in seconds; None if there is none."""

    counts: dict[Kind, int]
    sizes: dict[Kind, int]
    oldest: float | None
    newest: float | None

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


class DiskCache:
    """The cache in `directory`, of at most `size` bytes."""

    def __init__(self, directory: Path, size: int, limits: CacheLimits = DEFAULT) -> None:
        self.directory = directory
        self.size = size
        self._limits = limits
        self._files = CacheFiles(directory, limits)
        self._usage = Usage(self._files)
        self.claims = Claims(self._files)
        self._shard = random.randrange(SHARDS)  # noqa: S311 - processes look at different ones first
        self._written = 0
        self._lock = threading.Lock()  # one thread makes room
        self.newest_removed = 0
        """The latest time of use of what this process has removed for something else, in nanoseconds."""

    def __str__(self) -> str:
        return f"cache {self.directory}"

    def prepare(self) -> None:
        """Makes the directories that are missing."""
        self._files.prepare()

    def exists(self) -> bool:
        """Whether the directory has a cache."""
        return self._files.exists()

    def used(self) -> int:
        """Bytes in use, without looking at the entries."""
        return self._usage.total()

    def is_writable(self) -> bool:
        """Whether this user may add entries."""
        return self._files.is_writable()

    def get(self, name: Name, limit: int, *, own: bool = False) -> bytes | None:
        """The bytes of an entry, of at most `limit`; None if there is none that can be used.

        `own`: only one that nobody but this user and root can have written.
        """
        try:
            return self._files.read(name, limit, own=own)
        except DamageError:
            with suppress(OSError):
                self.drop(name)
            return None

    def put(self, name: Name, data: Stored, *, replace: bool = False) -> bool:
        """Adds an entry; False if it does not fit. `replace`: also if there is one of that name."""
        try:
            return self._put(name, data, replace=replace)
        except FileNotFoundError:  # somebody has removed the directory meanwhile
            self.prepare()
            return self._put(name, data, replace=replace)

    def _put(self, name: Name, data: Stored, *, replace: bool) -> bool:
        old = self._files.size_of(name)
        if old is not None and not replace:
            return True
        size = size_on_disk(len(data))
        if size > self.size // 2:
            return False
        if self._files.lacking(size) > 0 or not self._write(name, data, size):
            self._make_room(size)
            if self._files.lacking(size) > 0:
                raise OSError(errno.ENOSPC, "the disk is almost full")
            if not self._write(name, data, size):
                return False
        if old is not None:
            self._usage.add(name.shard, -old)
        COUNTS.disk_cache_written += len(data)
        self._written += size
        if self._written >= max(self.size // _COUNTED_AFTER, _LEAST_COUNTED):
            self._make_room(0)
        return True

    def _write(self, name: Name, data: Stored, size: int) -> bool:
        """Writes an entry that takes `size` bytes; False if there is no room."""
        is_counted = False

        def reserve() -> bool:
            nonlocal is_counted
            is_counted = self._usage.add(name.shard, size, most=self.size)
            return is_counted

        try:
            return self._files.write(name, data, reserve)
        except BaseException:
            if is_counted:
                with suppress(OSError):
                    self._usage.add(name.shard, -size)
            raise

    def drop(self, name: Name) -> None:
        """Removes an entry that proved wrong."""
        size = self._files.size_of(name)
        if size is not None and self._files.remove(name.shard, str(name)):
            self._usage.add(name.shard, -size)

    def contents(self) -> Contents:
        """What is in the cache: looks at every entry."""
        counts, sizes = dict.fromkeys(Kind, 0), dict.fromkeys(Kind, 0)
        used: list[int] = []
        for _shard, entries in self._counted(range(SHARDS)):
            for entry in entries:
                kind = next((kind for kind in Kind if kind.value and kind.value in entry.name), Kind.CHUNK)
                counts[kind] += 1
                sizes[kind] += entry.size
            used += [min(entries).used, max(entries).used] if entries else []
        return Contents(counts, sizes, min(used) / 1e9 if used else None, max(used) / 1e9 if used else None)

    def prune(self, size: int) -> int:
        """Removes the least recently used entries until at most `size` bytes are left; returns the bytes
        that it removed."""
        removed = 0
        while True:
            over = self._recounted() - size
            freed = self._remove_oldest(over, range(SHARDS)) if over > 0 else 0
            removed += freed
            if not freed:
                return removed

    def _recounted(self) -> int:
        return sum(entry.size for _shard, entries in self._counted(range(SHARDS)) for entry in entries)

    def _make_room(self, size: int) -> None:
        """Counts some shards anew, and removes old entries there if less than `size` bytes are free, of its
        bound or of the disk."""
        with self._lock:
            self._written = 0
            shards: list[int] = []
            seen = 0
            while len(shards) < SHARDS and seen < self._limits.sample:
                shards.append((self._shard + len(shards)) % SHARDS)
                seen += sum(len(entries) for _shard, entries in self._counted(shards[-1:]))
            self._shard = (shards[-1] + 1) % SHARDS
            total = self._usage.total()
            bound = max(0, min(self.size, total - self._files.lacking(0)))
            over = total + size - bound
            if over > 0 or not size:
                over += max(bound // _KEPT_FREE, min(bound // _SHARE, _LEAST_FREE))
            if over > 0:
                self._remove_oldest(over, shards)

    def _remove_oldest(self, over: int, shards: range | list[int]) -> int:
        """Removes the oldest entries of `shards`, of `over` bytes if they have as many; returns the bytes."""
        found: list[tuple[Found, int]] = []
        whole = 0
        for shard, entries in self._counted(shards):
            whole += sum(entry.size for entry in entries)
            found += [(entry, shard) for entry in entries if not entry.is_unfinished]
            if len(found) > 4 * self._limits.sample:
                found = sorted(found)[: 2 * self._limits.sample]
        if len(shards) < SHARDS:
            over = min(over, whole // _SHARE)
        removed = 0
        for entry, shard in sorted(found):
            if removed >= over:
                break
            with suppress(PermissionError, IsADirectoryError):
                if self._files.remove(shard, entry.name):
                    self._usage.add(shard, -entry.size)
                    removed += entry.size
                    self.newest_removed = max(self.newest_removed, entry.used)
        return removed

    def _counted(self, shards: range | list[int]) -> Iterator[tuple[int, list[Found]]]:
        """Each shard and its entries; corrects the number of the shard."""
        for shard in shards:
            before = self._usage.numbers()[shard]
            entries = self._files.scan(shard)
            size = sum(entry.size for entry in entries)
            if size != before:
                with suppress(OSError):  # a reader without write permission
                    self._usage.correct(shard, before, size)
            yield shard, entries
