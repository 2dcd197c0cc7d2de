"""A source in front of which is a cache on disk.

What is read by a digest or checksum comes from the cache if it is there; the reader verifies it, as it
verifies what the source returns. `confirmed` notices what proved wrong: then the entry is dropped, and the
work is done again with the source's bytes. What the reader accepted is kept. Listings, manifests and logs
always come from the source, since they may change; their newest answers are kept for `--offline`.

Used from tasks of one trio loop. All file work runs in worker threads.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import trio

from pbsfs.base.errors import ConnectError, DamageError, OutputError, ResolveError, SourceError
from pbsfs.base.names import (
    CLIENT_LOG,
    MANIFEST,
    Archive,
    ArchiveKind,
    Group,
    Namespace,
    Snapshot,
)
from pbsfs.formats.blob import Stored
from pbsfs.formats.index import DYNAMIC_MAGIC, FIXED_MAGIC, HEADER_SIZE
from pbsfs.runtime.stats import COUNTS
from pbsfs.sources.base import Expected, GroupInfo, SnapshotInfo, Source, Usage
from pbsfs.sources.cached import records
from pbsfs.sources.cached.files import Kind, Name
from pbsfs.sources.cached.keeper import Item, Keeper
from pbsfs.sources.cached.limits import DEFAULT, CacheLimits
from pbsfs.sources.cached.offline import with_hint
from pbsfs.sources.cached.recorder import Recorder
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.collection import Collection
from pbsfs.sources.workers import WorkerLimits, Workers

log = logging.getLogger(__name__)

R = TypeVar("R")

_MOST_WRONG = 10_000
"""Entries that proved wrong and could not be removed, which are remembered."""


@dataclass(slots=True)
class _Trial:
    """One run of work that fetches and checks: what the cache gave, what came from the source, what of that
    no other process fetches meanwhile. `past_cache`: nothing may come from the cache, whatever is put there
    meanwhile."""

    past_cache: bool = False
    given: list[Name] = field(default_factory=list)
    fetched: list[Item] = field(default_factory=list)
    claimed: list[Name] = field(default_factory=list)


_trial: ContextVar[_Trial | None] = ContextVar("trial", default=None)
"""The work that the task does; tasks that it starts have it too."""


class CachedSource(Source):
    """`source` behind `cache`."""

    def __init__(
        self, source: Source, cache: DiskCache, identity: str | None, limits: CacheLimits = DEFAULT
    ) -> None:
        """`identity`: names the source and its user, for the records; None if `source` is offline."""
        self.source = source
        self.cache = cache
        self.cheap_files = source.cheap_files
        self.doubts = source.doubts
        self.rate = source.rate
        self._kept_since: int | None = None  # see `keep_all`
        self._identity = identity
        self._limits = limits
        self._keeper = Keeper(cache, limits)
        self._workers = Workers(str(cache), WorkerLimits(io_timeout=limits.io_timeout))
        self._wrong: dict[Name, None] = {}
        self._recorder = Recorder(identity, self._offer)
        self._claims_used_from = -math.inf if identity is not None else math.inf  # by trio's clock
        self._nursery: trio.Nursery | None = None

    def __str__(self) -> str:
        return str(self.source)

    def expect(self, expected: Expected) -> None:
        # Without a session: what it would read may be in the cache.
        blobs = tuple(file for file in expected.files if file.kind is ArchiveKind.BLOB)
        self.source.expect(replace(expected, files=blobs, sessions=False))

    async def open(self, nursery: trio.Nursery) -> None:
        try:
            await self.source.open(nursery)
        except (ConnectError, ResolveError) as error:
            said: SourceError = error
            if (identity := self._identity) is not None:
                with suppress(SourceError):  # stuck
                    said = await self._workers.run(partial(with_hint, error, self.cache, identity))
            raise said from None
        try:
            await self._workers.run(self.cache.prepare)
        except (OSError, SourceError) as error:
            self._keeper.report(getattr(error, "strerror", None) or str(error))
        self._nursery = nursery
        nursery.start_soon(self._keeper.run)

    async def aclose(self) -> None:
        await self._keeper.aclose()
        with suppress(OSError, SourceError):
            await self._workers.run(self.cache.claims.close)
        await self.source.aclose()

    def keep_all(self) -> None:
        """From now on, reading waits for the cache to write. It raises OutputError once something could not
        be kept: what else is fetched would be paid for in vain."""
        # What was used shortly before may be read without a new time of use.
        self._kept_since = time.time_ns() - self._limits.touch_after * 10**9

    async def settled(self) -> int:
        """Waits until nothing waits to be written; returns the bytes that were. Raises like reading."""
        await self._keeper.wait_until_empty()
        self._check_kept()
        return self._keeper.written

    def _check_kept(self) -> None:
        if self._kept_since is None:
            return
        if self._keeper.lost or self.cache.newest_removed >= self._kept_since:
            raise OutputError(
                f"{self.cache}: not everything could be kept; free its disk, or name more with "
                "--cache-disk-size"
            )

    # --- what is found by a digest or checksum

    async def kept_chunk(self, digest: bytes, limit: int, *, claim: bool = True) -> bytes | None:
        name = Name(digest, Kind.CHUNK)
        found, is_claimed = await self._look(name, limit, claim=claim)
        if found is None and not claim:
            return None  # counted when it is claimed
        if found is None and not is_claimed:
            found = await self._wait_for_other(name, limit)
        return self._counted(name, found)

    async def kept_file(self, csum: bytes, limit: int) -> bytes | None:
        name = Name(csum, Kind.FILE)
        found, _is_claimed = await self._look(name, limit, claim=False)
        return self._counted(name, found)

    def keep_file(self, csum: bytes, data: bytes) -> None:
        self._note(Item(Name(csum, Kind.FILE), data))

    def _counted(self, name: Name, found: bytes | None) -> bytes | None:
        if found is None:
            COUNTS.disk_cache_misses += 1
            return None
        COUNTS.disk_cache_hits += 1
        COUNTS.disk_cache_read += len(found)
        trial = _trial.get()
        if trial is not None:
            trial.given.append(name)
        return found

    async def _look(self, name: Name, limit: int, *, claim: bool) -> tuple[bytes | None, bool]:
        """The entry, or None and whether this process should fetch it."""
        trial = _trial.get()
        claim = claim and trial is not None and trial.claimed.count(name) == 0
        claim = claim and trio.current_time() >= self._claims_used_from and not self._keeper.is_paused
        usable = name not in self._wrong and not (trial is not None and trial.past_cache)

        def get() -> bytes | None:
            found = self.cache.get(name, limit) if usable else None
            if found is not None and name.kind is Kind.FILE and not _is_file_of(found, name.digest):
                self.cache.drop(name)
                return None
            return found

        def look() -> tuple[bytes | None, bool, bool]:
            found = get()
            if found is not None or not claim:
                return found, True, False
            try:
                if not self.cache.claims.take(name):
                    return None, False, False
            except OSError:  # this user may only read the cache
                return None, True, False
            # Between the look and the claim, another process may have written it.
            return get(), True, True

        try:
            found, is_mine, is_taken = await self._workers.run(look)
        except OSError as error:
            log.debug("%s: %s", self.cache, error)
            return None, True
        except SourceError as error:  # stuck
            self._keeper.report(str(error))
            return None, True
        if is_taken and trial is not None:
            trial.claimed.append(name)
        return found, is_mine

    async def _wait_for_other(self, name: Name, limit: int) -> bytes | None:
        """The chunk as another process fetches it; None if that one has given up, or takes too long."""
        pause, longest = self._limits.claim_pauses
        with trio.move_on_after(self._limits.claim_patience):
            while True:
                await trio.sleep(pause)
                found, is_mine = await self._look(name, limit, claim=True)
                if found is not None or is_mine:
                    return found
                pause = min(2 * pause, longest)
        # Another user may hold a claim for ever.
        self._claims_used_from = trio.current_time() + self._limits.pause
        return None

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> Stored:
        data = await self.source.fetch_chunk(snapshot, archive, digest, limit)
        self._note(Item(Name(digest, Kind.CHUNK), data))
        return data

    def _note(self, item: Item) -> None:
        trial = _trial.get()
        if trial is not None:
            trial.fetched.append(item)

    async def confirmed(self, work: Callable[[], Awaitable[R]]) -> R:
        async def tried() -> R:
            try:
                return await self._tried(work)
            except DamageError as error:
                # Also if nothing came from the cache for this task: work may be shared with another task.
                log.debug("%s: %s; fetching it from the source", self.cache, error)
            return await self._tried(work, past_cache=True)

        return await self.source.confirmed(tried)

    async def _tried(self, work: Callable[[], Awaitable[R]], *, past_cache: bool = False) -> R:
        trial = _Trial(past_cache)
        before = _trial.set(trial)
        try:
            result = await work()
        except DamageError:
            _trial.reset(before)
            for name in trial.given:
                await self._drop(name)
            raise
        except BaseException:
            _trial.reset(before)
            raise
        else:
            _trial.reset(before)
            await self._keep(trial)
            return result
        finally:
            if trial.claimed and self._nursery is not None:
                self._nursery.start_soon(self._give_back, trial.claimed)

    async def _keep(self, trial: _Trial) -> None:
        for item in trial.fetched:
            if await self._offer(item):
                self._wrong.pop(item.name, None)
                with suppress(ValueError):
                    trial.claimed.remove(item.name)  # it ends when the item is written
        self._check_kept()

    async def _offer(self, item: Item) -> bool:
        """Has `item` written soon; False if it will not be. After `keep_all`, waits for room."""
        if self._kept_since is not None:
            await self._keeper.wait_for_room(len(item.data))
        return self._keeper.offer(item)

    async def _drop(self, name: Name) -> None:
        if len(self._wrong) >= _MOST_WRONG:
            self._wrong.clear()
        self._wrong[name] = None
        with suppress(OSError, SourceError):
            await self._workers.run(lambda: self.cache.drop(name))
            self._wrong.pop(name, None)  # another task may have dropped it too

    async def _give_back(self, names: Sequence[Name]) -> None:
        def give_back() -> None:
            for name in names:
                self.cache.claims.give_back(name)

        with suppress(OSError, SourceError):
            await self._workers.run(give_back)

    # --- what may change, and is kept for --offline

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        found = await self.source.namespaces(parent)
        await self._recorder.keep("namespaces", str(parent), lambda: records.pack_namespaces(found))
        return found

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        found = await self.source.groups(namespace)
        await self._recorder.keep("groups", str(namespace), lambda: records.pack_groups(found))
        return found

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        found = await self.source.snapshots(group)
        await self._recorder.keep("snapshots", str(group), lambda: records.pack_snapshots(found))
        return found

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        data = await self.source.fetch_file(snapshot, archive, limit)
        if archive in (MANIFEST, CLIENT_LOG):
            await self._recorder.keep("file", f"{snapshot}/{archive.filename}", lambda: data)
        return data

    # --- what the cache has no part in

    async def missing_chunks(self, snapshot: Snapshot, digests: Sequence[bytes]) -> list[int] | None:
        return await self.source.missing_chunks(snapshot, digests)

    async def usage(self) -> Usage | None:
        return await self.source.usage()

    async def collection(self) -> Collection | None:
        return await self.source.collection()


def _is_file_of(data: bytes, csum: bytes) -> bool:
    """Whether an index or blob has this checksum: not all readers check that of a blob whose key is
    missing."""
    if data[:8] in (FIXED_MAGIC, DYNAMIC_MAGIC):
        return hashlib.sha256(memoryview(data)[HEADER_SIZE:]).digest() == csum
    return hashlib.sha256(data).digest() == csum
