"""Opens what a snapshot holds: indexes become images, blobs become bytes.

The entry of the reader layer. One `Reader` serves a whole mount; open images and blobs are shared, so a
thousand open files of one image hold its index once. Called from tasks of one trio loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, SourceError
from pbsfs.base.names import MANIFEST, MASTER_KEY_BLOB, Archive, ArchiveKind, Snapshot
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.chunks.store import ChunkStore
from pbsfs.formats import blob
from pbsfs.formats.index import (
    FixedIndex,
    Index,
)
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.formats.zeros import ZeroDigests
from pbsfs.reader.bridge import Bridge
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.decode import (
    decode_blob,
    fetch_raw,
    fetch_stored,
    in_thread_if_large,
    index_limit,
    parse_index,
    usual_table_size,
)
from pbsfs.reader.image import Image
from pbsfs.reader.manifests import Manifests
from pbsfs.reader.opened import Blob, OpenFiles
from pbsfs.runtime.memory import DEFAULT_CACHE_SIZE, DEFAULT_OPEN_LIMIT, Memory
from pbsfs.sources.base import FileInfo, SnapshotInfo, Source

LOG_SIZE = 16 << 20
"""Bytes charged for a log while it is fetched, since a server does not list its size: more than real logs
have, and few enough to fetch those of some snapshots side by side."""

R = TypeVar("R")


class Reader:
    """Reads the snapshots of one source.

    A snapshot may be forgotten and made again under the same time, and a server's listing does not show that
    where the sizes are the same. So images are kept by their checksums, which the manifest has; `max_age` is
    the seconds for which a manifest is kept.
    """

    def __init__(
        self,
        source: Source,
        store: ChunkStore,
        opened: OpenFiles,
        keys: Mapping[str, Key],
        zeroed: ZeroedRanges | None = None,
    ) -> None:
        """`keys`: by fingerprint. `zeroed`: remembers the damage that reads as zeros; None if none may."""
        self.source = source
        self.store = store
        self.zeroed = zeroed
        self.bridge = Bridge()
        self._opened = opened
        self._zeros = ZeroDigests()
        self.manifests = Manifests(source, store.memory, keys)

    async def open_image(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> Image:
        """The image or stream of `file`. Raises DamageError, KeyRequiredError, SourceError."""
        if not self._opened.has(info.snapshot, file.archive) and not self.manifests.lacks_key(info, file):
            self.source.prepare(info.snapshot)
        return await self._checked(self._open_image, info, file, max_age)

    async def _open_image(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> Image:
        encrypted = file.crypt_mode is CryptMode.ENCRYPT
        key = self.manifests.key_for(info, file, manifest) if encrypted else None

        async def make() -> Image:
            return Image(
                self.store,
                info.snapshot,
                file.archive,
                await self._index(info.snapshot, file, key),
                encrypted=encrypted,
                key=key,
                zeroed=self.zeroed,
                restore=functools.partial(self._restore, info.snapshot, file.archive),
            )

        identity = (info.snapshot, file.archive, file.csum)
        return await self._opened.image(identity, usual_table_size(file), make)

    async def open_blob(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> Blob:
        """A `.blob` file, decoded. Raises like `open_image`, and MemoryLimitError."""
        return await self._checked(self._open_blob, info, file, max_age)

    async def _open_blob(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> Blob:
        return await self._opened.blob(
            f"{info.snapshot}/{file.archive.name}",
            file,
            2 * file.size or LOG_SIZE,  # stored and decoded
            lambda: self._read_blob(info, file, manifest),
        )

    async def read_blob(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> bytes:
        """The decoded content of a `.blob` file. Raises like `open_blob`."""
        return (await self.open_blob(info, file, max_age)).data

    async def _read_blob(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> bytes:
        if file.archive == MANIFEST and self.manifests.has_keys:
            # Its text comes from the fetch that verified it: another fetch may return another manifest.
            text, _manifest = await self.manifests.fetch(info.snapshot)
            return text
        encrypted: bool | None = None  # unknown: a log is not in the manifest
        if file.archive == MASTER_KEY_BLOB:
            encrypted = False
        elif file.crypt_mode is not None:
            encrypted = file.crypt_mode is CryptMode.ENCRYPT
        key = self.manifests.key_for(info, file, manifest) if encrypted else None
        if encrypted is None and manifest is not None:
            key = self.manifests.key_of(manifest)

        async def fetch() -> bytes:
            raw = await fetch_stored(self.source, info.snapshot, file, blob.stored_limit(blob.MAX_BLOB_SIZE))
            return await in_thread_if_large(blob.work_of(raw), decode_blob, raw, file, encrypted, key)

        where = f"{info.snapshot}/{file.archive.name}"
        try:
            return await self.source.confirmed(fetch)
        except DamageError as error:
            raise DamageError(f"{where}: {error}") from None
        except KeyRequiredError:
            raise self.manifests.key_missing(info.snapshot, file, info.key_fingerprint) from None

    async def blob_size(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> int:
        """The decoded bytes of a `.blob` file; its stored bytes if decoding needs a missing key."""
        if file.archive == MANIFEST:
            return (await self.manifests.get(info.snapshot, max_age)).size
        try:
            return len(await self.read_blob(info, file, max_age))
        except KeyRequiredError:

            async def stored() -> tuple[bytes, blob.BlobKind]:
                limit = blob.stored_limit(blob.MAX_BLOB_SIZE)
                raw = await fetch_stored(self.source, info.snapshot, file, limit)
                return raw, blob.kind_of(raw)

            try:
                raw, kind = await self.source.confirmed(stored)
            except DamageError as error:
                raise DamageError(f"{info.snapshot}/{file.archive.name}: {error}") from None
            return len(raw) if kind.compressed else max(0, len(raw) - kind.header_size)

    async def version(self, snapshot: Snapshot, max_age: float) -> bytes:
        """The SHA-256 of the manifest's text: a change means that the snapshot's files may have changed.

        Raises DamageError, SourceError.
        """
        return (await self.manifests.get(snapshot, max_age)).digest

    async def _checked(
        self,
        work: Callable[[SnapshotInfo, FileInfo, Manifest | None], Awaitable[R]],
        info: SnapshotInfo,
        file: FileInfo,
        max_age: float,
    ) -> R:
        """What `work` returns for `file` as the manifest has it.

        If `work` finds damage, pbsfs fetches the manifest once more, which may have changed meanwhile.
        """
        described = await self.manifests.describe(info, file, max_age)
        try:
            return await work(info, *described)
        except DamageError:
            now = await self.manifests.describe(info, file, 0, anew=True)
            if now[0] == described[0] and described[1] in (None, now[1]):
                raise
        return await work(info, *now)

    async def _index(self, snapshot: Snapshot, file: FileInfo, key: Key | None) -> Index:
        async def fetch() -> Index:
            raw = await fetch_stored(self.source, snapshot, file, index_limit(file))
            fixed = file.archive.kind is ArchiveKind.FIXED
            # However small the index is, the digest of a hole may be that of 16 MiB.
            work = len(raw) + (FixedIndex.hashes(raw, self._zeros) if fixed else blob.MAX_CHUNK_SIZE)
            return await in_thread_if_large(work, parse_index, raw, file, key, self._zeros)

        try:
            return await self.source.confirmed(fetch)
        except DamageError as error:
            raise DamageError(f"{snapshot}/{file.archive}: {error}") from None

    async def _restore(self, snapshot: Snapshot, archive: Archive, index: Index) -> None:
        """Restores the dropped digest table of an open image's index."""

        async def fetch() -> bytes:
            try:
                return await fetch_raw(self.source, snapshot, archive, index.stored_size, index.csum)
            except NotFoundError:  # a forgotten snapshot is not damage
                raise SourceError(
                    f"{snapshot}/{archive}: the index is missing, the snapshot may have been forgotten; "
                    f"close the file"
                ) from None

        try:
            await self.source.confirmed(lambda: self._opened.restore(index, fetch))
        except DamageError as error:
            raise DamageError(f"{snapshot}/{archive}: {error}") from None


@asynccontextmanager
async def open_reader(
    source: Source,
    *,
    cache_size: int = DEFAULT_CACHE_SIZE,
    open_limit: int = DEFAULT_OPEN_LIMIT,
    limits: FetchLimits = DEFAULT,
    keys: Mapping[str, Key] | None = None,
    zeroed: ZeroedRanges | None = None,
) -> AsyncIterator[Reader]:
    """A reader of `source`; leaving it ends all reading and closes the source.

    `cache_size`: bytes of chunks in the cache. `open_limit`: bytes for all else that is charged to the
    memory. `limits`: how much is fetched at once and ahead.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            await source.open(nursery)
            if source.rate is not None:
                nursery.start_soon(source.rate.run)
            memory = Memory(cache_size, open_limit)
            store = ChunkStore(source, nursery, memory, limits)
            yield Reader(source, store, OpenFiles(nursery, memory, limits), keys or {}, zeroed)
        except Exception as error:
            failure = error  # raised outside, so that the nursery does not wrap it in a group
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await source.aclose()
    if failure is not None:
        raise failure
