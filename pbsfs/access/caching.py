"""The cache on disk in front of a source: its options, and the source behind it.

Used by `pbsfs.access.options` and `pbsfs.access.description`. Synchronous; it opens no file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pbsfs.access.sizes import parse_size
from pbsfs.base.errors import SourceError, UsageError
from pbsfs.base.text import size_text
from pbsfs.sources.cached.limits import DEFAULT_SIZE, LEAST_SIZE

if TYPE_CHECKING:
    from pbsfs.sources.base import Source

CACHE_VARIABLE = "PBSFS_CACHE_DIR"
SIZE_VARIABLE = "PBSFS_CACHE_DISK_SIZE"


def parse_disk_size(text: str) -> int:
    """The bytes that a cache on disk may use. Raises UsageError."""
    size = parse_size(text)
    if size < LEAST_SIZE:
        raise UsageError(f"a cache on disk of {text} is too small; the least is {LEAST_SIZE >> 20}M")
    return size


class CacheAccess(NamedTuple):
    """The cache in `directory`, of at most `size` bytes. `offline`: the source is not asked."""

    directory: Path
    size: int = DEFAULT_SIZE
    offline: bool = False

    def open(self, open_source: Callable[[], Source], name: str, identity: str) -> Source:
        """The source behind the cache. `name`: of the source, for messages; `identity`: names it and its
        user. Raises SourceError."""
        # They come with trio, which a `mount` that starts a process for the background does without.
        from pbsfs.sources.cached.offline import OfflineSource  # noqa: PLC0415
        from pbsfs.sources.cached.source import CachedSource  # noqa: PLC0415
        from pbsfs.sources.cached.store import DiskCache  # noqa: PLC0415

        cache = DiskCache(self.directory, self.size)
        if self.offline:
            return CachedSource(OfflineSource(name, cache, identity), cache, None)
        return CachedSource(open_source(), cache, identity)

    def with_hint(self, error: SourceError, identity: str) -> SourceError:
        """The error of a source that is unreachable; says that the cache has lists of it, if it has."""
        from pbsfs.sources.cached.offline import with_hint  # noqa: PLC0415
        from pbsfs.sources.cached.store import DiskCache  # noqa: PLC0415

        return with_hint(error, DiskCache(self.directory, self.size), identity)

    def dump(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {"directory": str(self.directory), "size": self.size, "offline": self.offline}

    @classmethod
    def load(cls, facts: Mapping[str, Any]) -> CacheAccess:
        """The inverse of `dump`."""
        return cls(Path(facts["directory"]), facts["size"], facts["offline"])


def look_at(cache: CacheAccess) -> tuple[str, bool]:
    """What there is to say of a cache, and whether that is a warning. Makes the cache if it is missing."""
    from pbsfs.sources.cached.store import DiskCache  # noqa: PLC0415

    disk_cache = DiskCache(cache.directory, cache.size)
    try:
        disk_cache.prepare()
        used = disk_cache.used()
        room = os.statvfs(cache.directory)
    except OSError as error:
        return f"{cache.directory}: {error.strerror}; pbsfs reads without it until that is repaired", True
    except SourceError as error:
        return f"{error}; pbsfs reads without the cache until then", True
    if not disk_cache.is_writable():
        return f"{cache.directory}: this user may only read it; nothing more is kept there", True
    text = f"{cache.directory}: {size_text(used)} of {size_text(cache.size)} used"
    free = room.f_bavail * room.f_frsize
    if free + used < cache.size:
        return f"{text}; its disk has only {size_text(free)} more: name less with cache-disk-size", True
    return text, False


def find_cache(
    directory: Path | None,
    size: int | None,
    offline: bool,
    environment: Mapping[str, str],
    option: Callable[[str], str],
) -> CacheAccess | None:
    """The cache that options and environment name; None if neither does. Raises UsageError."""
    if directory is None and environment.get(CACHE_VARIABLE):
        directory = Path(environment[CACHE_VARIABLE])
    if directory is None:
        if offline:
            raise UsageError(
                f"{option('offline')}: no cache on disk is named; name it with {option('cache_dir')} or "
                f"{CACHE_VARIABLE}"
            )
        return None
    if size is None and environment.get(SIZE_VARIABLE):
        try:
            size = parse_disk_size(environment[SIZE_VARIABLE])
        except UsageError as error:
            raise UsageError(f"{SIZE_VARIABLE}: {error}") from None
    return CacheAccess(Path(os.path.abspath(directory)), DEFAULT_SIZE if size is None else size, offline)
