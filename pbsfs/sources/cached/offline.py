"""A source that is not asked: what it said before comes from the records in the cache on disk.

It stands behind a `CachedSource` instead of the real source; chunks, indexes and blobs come from the
cache, or not at all. Used from tasks of one trio loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import ROOT_NAMESPACE, Archive, Group, Namespace, Snapshot
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source
from pbsfs.sources.cached import records
from pbsfs.sources.cached.records import MAX_RECORD, Place
from pbsfs.sources.cached.store import DiskCache

T = TypeVar("T")

_ADVICE = "read it once without --offline, or fetch it with pbsfs cache warm"


def with_hint(error: SourceError, cache: DiskCache, identity: str) -> SourceError:
    """The error of a source that is unreachable; says that `cache` has lists of the source, if it has.

    Reads from the disk: for worker threads, or before there is a loop.
    """
    places = [Place(identity, what, str(ROOT_NAMESPACE)) for what in ("groups", "namespaces")]
    names = [name for place in places for name in place.usable]
    with suppress(OSError, SourceError):
        if any(cache.get(name, MAX_RECORD, own=True) is not None for name in names):
            found = copy.copy(error)
            found.args = (f"{error}; with --offline, pbsfs reads what is kept in {cache}",)
            return found
    return error


class OfflineSource(Source):
    """What `cache` knows of the source `name`. `identity`: as for `CachedSource`."""

    cheap_files = False

    def __init__(self, name: str, cache: DiskCache, identity: str) -> None:
        self._name = name
        self._cache = cache
        self._identity = identity

    def __str__(self) -> str:
        return f"{self._name} (offline)"

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        what = f"the list of namespaces below {_named(parent)}"
        return await self._record("namespaces", str(parent), what, records.unpack_namespaces)

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        return await self._record(
            "groups",
            str(namespace),
            f"the list of groups in {_named(namespace)}",
            lambda body: records.unpack_groups(namespace, body),
        )

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        return await self._record(
            "snapshots",
            str(group),
            f"the list of snapshots of {group}",
            lambda body: records.unpack_snapshots(group, body),
        )

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        of = f"{snapshot}/{archive.filename}"
        body = await self._record("file", of, of, bytes)
        if len(body) > limit:
            raise DamageError(f"has {len(body)} bytes where {limit} is the most")
        return body

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        raise self._missing(f"chunk {digest.hex()}")

    async def aclose(self) -> None:
        pass

    async def _record(self, what: str, of: str, shown: str, unpack: Callable[[bytes], T]) -> T:
        place = Place(self._identity, what, of)

        def read() -> T:
            newest: tuple[int, T] | None = None
            for name in place.usable:
                record = self._cache.get(name, MAX_RECORD, own=True)
                if record is None:
                    continue
                with suppress(PbsfsError):  # it is not whole
                    when, body = place.unpack(record)
                    if newest is None or when > newest[0]:
                        newest = when, unpack(body)
            if newest is None:
                raise self._missing(shown)
            return newest[1]

        try:
            return await in_thread(read)
        except OSError as error:
            raise SourceError(f"{self._cache}: {error.strerror}; make it readable") from None

    def _missing(self, what: str) -> SourceError:
        return SourceError(f"{self._name}: offline, and {what} is not in {self._cache}; {_ADVICE}")


def _named(namespace: Namespace) -> str:
    return f"namespace {namespace}" if str(namespace) else "the root namespace"
