"""The source that is a datastore's directory.

pbsfs writes and locks nothing there, so it can read a read-only medium and the disk of a dead server. All
file I/O runs in worker threads. Used from tasks of one trio loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import trio

from pbsfs.base.errors import NotFoundError, SourceError
from pbsfs.base.names import Archive, Group, Namespace, Snapshot
from pbsfs.runtime.report import DAY, Reporter
from pbsfs.sources import layout
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source, Usage, no_namespace
from pbsfs.sources.collection import Collection
from pbsfs.sources.directory.chunks import ChunkFiles
from pbsfs.sources.directory.datastore import Datastore
from pbsfs.sources.directory.limits import DEFAULT, DirectoryLimits
from pbsfs.sources.listing.groups import GroupListing
from pbsfs.sources.listing.names import Names
from pbsfs.sources.listing.snapshots import KeptManifests, SnapshotListing
from pbsfs.sources.listing.store import NoNamespaceError
from pbsfs.sources.workers import Workers

log = logging.getLogger(__name__)

T = TypeVar("T")


class DirectorySource(Source):
    """The datastore in the directory `path`. `workers`: the threads that read it."""

    cheap_files = True

    def __init__(self, path: Path, limits: DirectoryLimits = DEFAULT) -> None:
        """Raises SourceError if `path` is not a datastore."""
        self.path = path
        self._datastore = Datastore(path, limits)
        self.workers = Workers(str(self), limits.workers)
        self._reporter = Reporter(log, repeat_after=DAY)
        self._names = Names(self._datastore.metadata, self._reporter)
        self._groups = GroupListing(self._datastore, self._names, self._reporter, limits)
        self._kept = KeptManifests(limits.parsed_manifests)
        self._snapshots = SnapshotListing(self._datastore, self._names, self._reporter, self._kept)
        self._chunks = ChunkFiles(self._datastore)

    def __str__(self) -> str:
        return str(self._datastore)

    async def open(self, nursery: trio.Nursery) -> None:
        try:
            is_cache = await self._in_thread(self._chunks.is_obviously_a_cache)
        except SourceError as error:  # reading reports it, if it fails too
            log.debug("%s: %s", self, error)
            return
        if is_cache:
            self._reporter.report(
                f"{self} is the cache of a datastore in an object store: only some of its chunks are here; "
                "read it through the server, or from a copy of the bucket"
            )

    async def aclose(self) -> None:
        self._kept.forget()

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        try:
            return await self._in_thread(
                lambda: self._names.namespaces(parent, self._datastore.enter_namespace(parent))
            )
        except NoNamespaceError:
            raise await no_namespace(str(self), self.namespaces, parent) from None

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        try:
            return await self._in_thread(lambda: self._groups.groups(namespace))
        except NoNamespaceError:
            raise await no_namespace(str(self), self.namespaces, namespace) from None

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        return await self._in_thread(lambda: self._snapshots.snapshots(group))

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        steps = layout.file_steps(snapshot, archive)
        return await self._in_thread(lambda: self._datastore.metadata.read_file(steps, limit))

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        return await self._in_thread(lambda: self._chunks.read(digest, limit))

    async def missing_chunks(self, snapshot: Snapshot, digests: Sequence[bytes]) -> list[int]:
        return await self._in_thread(lambda: self._chunks.missing(digests))

    async def usage(self) -> Usage:
        return await self._in_thread(self._datastore.usage)

    async def collection(self) -> Collection | None:
        return await self._in_thread(self._datastore.collection)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Runs blocking `work` in a worker thread; every OSError becomes a NotFoundError or a SourceError."""
        return await self.workers.run(lambda: self._attempt(work))

    def _attempt(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (FileNotFoundError, NotADirectoryError) as error:
            self._datastore.check()  # the file is missing only if the datastore is not
            raise NotFoundError(f"{error.filename} does not exist") from None
        except OSError as error:
            raise SourceError(
                self._datastore.metadata.problem(error), retryable=not isinstance(error, PermissionError)
            ) from None
