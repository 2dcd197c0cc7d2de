"""A datastore in an S3 bucket as a source: objects are fetched and listed without a backup server.

pbsfs writes and locks nothing there. A server may run beside it: what that removes meanwhile is missing for
pbsfs too, and reported as such. Used by `pbsfs.access`; methods run in tasks of one trio loop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from pbsfs.base.errors import (
    DamageError,
    ForbiddenError,
    NotFoundError,
    SourceError,
    UnavailableError,
    UnknownDatastoreError,
)
from pbsfs.base.names import MANIFEST, Archive, Group, Namespace, Snapshot
from pbsfs.base.text import first_of
from pbsfs.runtime.logs import STARTING
from pbsfs.runtime.together import run_for_each
from pbsfs.sources import layout
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.bucket.credentials import CredentialSource
from pbsfs.sources.bucket.limits import DEFAULT, BucketLimits
from pbsfs.sources.bucket.metadata import Metadata
from pbsfs.sources.bucket.objects import Objects
from pbsfs.sources.bucket.requests import Requests
from pbsfs.sources.collection import Collection, parse_collection
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.pacing import DEFAULT_LIMIT
from pbsfs.sources.retry import retried

log = logging.getLogger(__name__)

_MOST_LOOKED_AT = 32
"""Directories of a bucket without the datastore in which pbsfs looks for one."""


@dataclass(frozen=True, slots=True)
class BucketSettings:
    """The user's settings. `retry_timeout`: seconds for which pbsfs retries a read."""

    retry_timeout: float = DEFAULT_LIMIT


class BucketSource(Source):
    """The datastore at `address`."""

    cheap_files = False

    doubts = (0.25, 1.0)
    # A bit may flip on the way from the disks of an object store, in a proxy, or in a server's memory.

    def __init__(
        self,
        address: BucketAddress,
        credentials: CredentialSource,
        trust: Trust,
        settings: BucketSettings | None = None,
        proxy: Proxy | None = None,
        limits: BucketLimits = DEFAULT,
    ) -> None:
        self.address = address
        self.settings = settings or BucketSettings()
        self._limits = limits
        self._requests = Requests(address, credentials, trust, proxy, limits)
        self._objects = Objects(self._requests, self.settings.retry_timeout, limits)
        self._metadata = Metadata(self._objects, limits)
        self._chunks = f"{self._objects.root}{layout.CHUNKS}/"

    def __str__(self) -> str:
        return str(self.address)

    async def open(self, nursery: trio.Nursery) -> None:
        if not self.address.secure:
            log.warning(
                "%s: %s has no TLS: others on the network can read and change what pbsfs transfers; "
                "use https:// where the object store has it",
                self,
                self.address.endpoint,
            )
        # An unreachable server is an error at once, for the user who starts a mount to see.
        await retried(
            self._check,
            self.settings.retry_timeout,
            f"opening {self}",
            of=UnavailableError,
            log=STARTING,
            pacing=self._limits.pacing,
        )
        nursery.start_soon(self._requests.tidy)

    async def aclose(self) -> None:
        self._metadata.forget()
        self._requests.close()

    async def _check(self) -> None:
        """Raises UnknownDatastoreError if the datastore is not in the bucket, and other SourceErrors."""
        root = self._objects.root
        page = await self._requests.page(root, delimited=True)
        parts = {f"{root}{name}/" for name in (layout.CHUNKS, layout.METADATA)}
        if parts & set(page.prefixes) or any(found.key == f"{root}{layout.IN_USE}" for found in page.objects):
            return
        raise UnknownDatastoreError(f"there is no datastore at {self}{await self._nearby()}")

    async def _nearby(self) -> str:
        """The datastores beside or in the place that has none, for an error."""
        root = self._objects.root
        above = f"{root[:-1].rpartition('/')[0]}/".lstrip("/")
        try:
            found = await self._stores_in(root) or (await self._stores_in(above) if root else [])
        except ForbiddenError:  # a key for one datastore
            found = []
        if not found:
            return "; check the names of the bucket and the datastore"
        return f"; there is: {first_of(f's3://{self.address.bucket}/{name}' for name in found)}"

    async def _stores_in(self, prefix: str) -> list[str]:
        """The datastores directly below `prefix`."""
        page = await self._requests.page(prefix, delimited=True)
        found: list[str] = []

        async def look(below: str) -> None:
            inside = await self._requests.page(f"{below}{layout.METADATA}/", delimited=False, most=1)
            if inside.objects:
                found.append(below.rstrip("/"))

        await run_for_each(page.prefixes[:_MOST_LOOKED_AT], look, at_once=self._limits.requests)
        return sorted(found)

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        return await self._metadata.namespaces(parent)

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        return await self._metadata.groups(namespace)

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        return await self._metadata.snapshots(group)

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        key = self._metadata.key(layout.file_steps(snapshot, archive))
        return await self._objects.get(key, limit, f"{snapshot}/{archive}")

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        key, what = self._key_of(digest), f"chunk {digest.hex()}"

        async def fetch() -> bytes:
            try:
                return await self._requests.get(key, limit, what)
            except NotFoundError:
                pass
            raise await self._absent(snapshot, digest)

        return await self._objects.retried(what, fetch)

    async def missing_chunks(self, snapshot: Snapshot, digests: Sequence[bytes]) -> list[int]:
        missing: list[int] = []

        async def look(number: int) -> None:
            digest = digests[number]
            if not await self._objects.exists(self._key_of(digest), f"chunk {digest.hex()}"):
                missing.append(number)

        async def confirm(number: int) -> None:
            digest = digests[number]

            async def again() -> bool:
                if await self._requests.exists(self._key_of(digest), f"chunk {digest.hex()}"):
                    return True
                error = await self._absent(snapshot, digest)
                if isinstance(error, SourceError):
                    raise error
                return False

            if not await self._objects.retried(f"chunk {digest.hex()}", again):
                confirmed.append(number)

        await run_for_each(range(len(digests)), look, at_once=self._limits.requests)
        confirmed: list[int] = []
        await run_for_each(missing, confirm, at_once=self._limits.requests)
        return sorted(confirmed)

    async def collection(self) -> Collection | None:
        key = self._metadata.key((layout.GC_STATUS,))
        try:
            content = await self._objects.get(key, self._limits.listing.owner_and_notes, layout.GC_STATUS)
            return parse_collection(json.loads(content))
        except NotFoundError:
            return None
        except (ValueError, RecursionError):
            raise DamageError(f"{self}: {layout.GC_STATUS} is not valid JSON") from None

    def _key_of(self, digest: bytes) -> str:
        return self._chunks + "/".join(layout.chunk_steps(digest))

    async def _absent(self, snapshot: Snapshot, digest: bytes) -> DamageError | SourceError:
        """The error for a chunk of `snapshot` that an answer called missing: damage only if a list confirms
        that, and the snapshot is still there."""
        manifest = self._metadata.key(layout.file_steps(snapshot, MANIFEST))
        objects, _prefixes = await self._objects.list(self._key_of(digest), delimited=False)
        if not await self._objects.any(manifest):
            # A server prunes a snapshot, and then removes its chunks: nothing is damaged.
            return SourceError(f"{snapshot} was removed while it was read; chunk {digest.hex()} is gone")
        names = [found.key.rpartition("/")[2] for found in objects]
        what = f"chunk {digest.hex()} in {self}"
        if digest.hex() in names:
            # Some object stores are behind in one or the other for a while.
            return SourceError(
                f"{what}: listed, but not found when it was read; check the object store", retryable=True
            )
        bad = min((name for name in names if layout.is_bad_copy(name, digest)), default=None)
        if bad is not None:
            return DamageError(f"{what}: a verification found it damaged ({bad})")
        if not await self._objects.any(self._chunks):
            return SourceError(f"{self} has no chunks any more; check the bucket")
        return DamageError(f"{what}: missing")
