"""Opens what a snapshot holds: indexes become images, blobs become bytes.

The entry of the reader layer. One `Reader` serves a whole mount; what is open is shared, so a thousand
open files of one image hold its index once. Called from tasks of one trio loop.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, MASTER_KEY_BLOB, Archive, ArchiveKind, Snapshot
from pbsfs.base.text import first_of, one_line
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.chunks.store import ChunkStore
from pbsfs.formats import blob
from pbsfs.formats.index import (
    DYNAMIC_ENTRY_SIZE,
    FIXED_ENTRY_SIZE,
    HEADER_SIZE,
    MIN_FIXED_CHUNK_SIZE,
    DynamicIndex,
    FixedIndex,
    Index,
)
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode, Manifest, ManifestFile
from pbsfs.formats.zeros import ZeroDigests
from pbsfs.reader.bridge import Bridge
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.image import Image
from pbsfs.reader.opened import Blob, OpenFiles
from pbsfs.runtime.memory import DEFAULT_CACHE_SIZE, DEFAULT_OPEN_LIMIT, Charge, Memory
from pbsfs.sources.base import FileInfo, SnapshotInfo, Source
from pbsfs.sources.retry import SharedTry

MAX_INDEX_SIZE = HEADER_SIZE + (1 << 30)
"""Most bytes of a stored index: 128 TiB in chunks of 4 MiB."""

USUAL_CHUNK = 4 << 20
"""Bytes of a chunk as the vendor's clients cut them."""

LEAST_AVERAGE_CHUNK = 256
"""Bytes of a stream for each entry of its index, at least; writers cut pieces of some MiB. A stream of less
than that is one chunk."""

MAX_MANIFESTS = 256
"""Manifests that are kept, of snapshots in which something was opened."""

PARSED = 3
"""Bytes of memory that a manifest takes for each byte of its text: some 2, measured."""

UNTOLD_SIZE = 16 << 20
"""Bytes that count for a log while it is fetched, as a server does not tell its size: more than real ones
have, and few enough to fetch those of some snapshots side by side."""

SMALL = 64 << 10
"""Bytes that are decoded on the spot: it takes less time than going to a thread and back (0.1 ms)."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class _Kept:
    """A snapshot's manifest as it was fetched last.

    `size` (bytes) and `digest` (SHA-256): of its text. `came`: when, by the loop's clock. `asking`: for the
    tasks that need it at once.
    """

    manifest: Manifest | None = None
    size: int = 0
    digest: bytes = b""
    came: float = -math.inf
    asking: SharedTry[_Kept] = field(default_factory=SharedTry)
    charge: Charge | None = None


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
        """`keys`: by fingerprint. `zeroed`: where damage is to read as zeros, what takes note of it."""
        self.source = source
        self.store = store
        self.zeroed = zeroed
        self.bridge = Bridge()
        self._keys = keys
        self._opened = opened
        self._zeros = ZeroDigests()
        self._manifests: dict[Snapshot, _Kept] = {}  # the one that was used last is the last
        store.memory.reclaim_with(self._drop_manifests)

    def lacks_key(self, info: SnapshotInfo, file: FileInfo) -> bool:
        """Whether `open_image` is known to fail for want of a key, by the listing alone."""
        if not self._keys:
            return file.crypt_mode is CryptMode.ENCRYPT
        sealed = file.crypt_mode in (CryptMode.ENCRYPT, CryptMode.SIGN_ONLY)
        return sealed and info.key_fingerprint is not None and info.key_fingerprint not in self._keys

    async def open_image(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> Image:
        """The image or stream of `file`. Raises DamageError, KeyRequiredError, SourceError."""
        return await self._checked(self._open_image, info, file, max_age)

    async def _open_image(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> Image:
        encrypted = file.crypt_mode is CryptMode.ENCRYPT
        key = self._key(info, file, manifest) if encrypted else None

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
        return await self._opened.image(identity, _usual_table_size(file), make)

    async def open_blob(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> Blob:
        """A `.blob` file, decoded. Raises like `open_image`, and MemoryLimitError."""
        return await self._checked(self._open_blob, info, file, max_age)

    async def _open_blob(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> Blob:
        return await self._opened.blob(
            f"{info.snapshot}/{file.archive.name}",
            file,
            2 * file.size or UNTOLD_SIZE,  # stored and decoded
            lambda: self._read_blob(info, file, manifest),
        )

    async def read_blob(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> bytes:
        """The decoded content of a `.blob` file. Raises like `open_blob`."""
        return (await self.open_blob(info, file, max_age)).data

    async def _read_blob(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> bytes:
        if file.archive == MANIFEST and self._keys:
            return (await self._verified(info.snapshot))[0]  # not fetched again: that may be another one
        encrypted: bool | None = None  # not told: a log is not in the manifest
        if file.archive == MASTER_KEY_BLOB:
            encrypted = False
        elif file.crypt_mode is not None:
            encrypted = file.crypt_mode is CryptMode.ENCRYPT
        key = self._key(info, file, manifest) if encrypted else None
        if encrypted is None and manifest is not None:
            key = self._key_of(manifest)

        async def fetch() -> bytes:
            raw = await self._fetch(info.snapshot, file, blob.stored_limit(blob.MAX_BLOB_SIZE))
            return await _work(blob.work_of(raw), _decode_blob, raw, file, encrypted, key)

        where = f"{info.snapshot}/{file.archive.name}"
        try:
            return await self.source.confirmed(fetch)
        except DamageError as error:
            raise DamageError(f"{where}: {error}") from None
        except KeyRequiredError:
            raise self._key_missing(info.snapshot, file, info.key_fingerprint) from None

    async def blob_size(self, info: SnapshotInfo, file: FileInfo, max_age: float = math.inf) -> int:
        """The decoded bytes of a `.blob` file; what is stored where only the key could tell more."""
        if file.archive == MANIFEST:
            return (await self._manifest(info.snapshot, max_age)).size
        try:
            return len(await self.read_blob(info, file, max_age))
        except KeyRequiredError:
            try:
                raw = await self._fetch(info.snapshot, file, blob.stored_limit(blob.MAX_BLOB_SIZE))
                kind = blob.kind_of(raw)
            except DamageError as error:
                raise DamageError(f"{info.snapshot}/{file.archive.name}: {error}") from None
            return len(raw) if kind.compressed else max(0, len(raw) - kind.header_size)

    async def version(self, snapshot: Snapshot, max_age: float) -> bytes:
        """The SHA-256 of the manifest's text: another one says that the snapshot's files may be others.

        Raises DamageError, SourceError.
        """
        return (await self._manifest(snapshot, max_age)).digest

    async def _checked(
        self,
        work: Callable[[SnapshotInfo, FileInfo, Manifest | None], Awaitable[R]],
        info: SnapshotInfo,
        file: FileInfo,
        max_age: float,
    ) -> R:
        """What `work` returns for `file` as the manifest has it.

        Where it finds damage, the manifest is fetched once more: it may be another one by now.
        """
        told = await self._as_in_manifest(info, file, max_age)
        try:
            return await work(info, *told)
        except DamageError:
            now = await self._as_in_manifest(info, file, 0, anew=True)
            if now[0] == told[0] and told[1] in (None, now[1]):
                raise
        return await work(info, *now)

    async def _as_in_manifest(
        self, info: SnapshotInfo, file: FileInfo, max_age: float, *, anew: bool = False
    ) -> tuple[FileInfo, Manifest | None]:
        """`file` as the manifest has it, and the manifest: verified where keys are given.

        Without keys, what a listing took from the manifest itself is as good, unless `anew` says to fetch it.
        """
        if file.archive == MANIFEST:
            return file, None
        if file.archive == CLIENT_LOG:
            return file, (await self._manifest(info.snapshot, max_age)).manifest if self._keys else None
        sealed = file.crypt_mode is CryptMode.ENCRYPT and file.archive != MASTER_KEY_BLOB
        if sealed and not self._keys:
            raise self._key_missing(info.snapshot, file, info.key_fingerprint)  # without asking for more
        if file.csum is not None and not self._keys and not anew:
            return file, None
        manifest = (await self._manifest(info.snapshot, max_age)).manifest
        assert manifest is not None
        entry = _entry(manifest, file)
        if entry is None:
            if not anew:
                return await self._as_in_manifest(info, file, 0, anew=True)
            raise SourceError(
                f"{info.snapshot}/{file.archive}: the manifest differs from the listing; if the snapshot was "
                f"made again, open the file again in some seconds"
            )
        told = FileInfo(entry.archive, entry.size, entry.crypt_mode, entry.csum)
        bound = entry.crypt_mode is not CryptMode.NONE and entry.archive != MASTER_KEY_BLOB
        if self._keys and bound and self._key_of(manifest) is None:
            # Also where it is only signed: who gives keys wants no byte that they don't vouch for.
            raise self._key_missing(info.snapshot, told, manifest.key_fingerprint)
        return told, manifest

    async def _manifest(self, snapshot: Snapshot, max_age: float) -> _Kept:
        """The manifest, fetched less than `max_age` seconds ago; all who ask at once wait for one answer."""
        kept = self._manifests.pop(snapshot, None) or _Kept()
        self._manifests[snapshot] = kept
        while len(self._manifests) > MAX_MANIFESTS:
            del self._manifests[next(iter(self._manifests))]
        came = kept.came

        def young_enough() -> _Kept | None:
            came_meanwhile = kept.came != came
            return kept if came_meanwhile or trio.current_time() - kept.came < max_age else None

        async def fetch() -> _Kept:
            text, kept.manifest = await self._verified(snapshot)
            kept.size, kept.digest = len(text), hashlib.sha256(text).digest()
            kept.came = trio.current_time()
            kept.charge = self.store.memory.charge("manifests", PARSED * len(text), passing=True)
            self.store.memory.reclaim()
            return kept

        return await kept.asking.run(young_enough, fetch)

    def _drop_manifests(self, excess: int) -> None:
        """Drops manifests of at least `excess` bytes if possible, the least recently used first."""
        while self._manifests and excess > 0:
            kept = self._manifests.pop(next(iter(self._manifests)))
            excess -= 0 if kept.charge is None else kept.charge.size

    async def _verified(self, snapshot: Snapshot) -> tuple[bytes, Manifest]:
        """The manifest as it is stored now, as text too; held against the keys at hand."""

        async def fetch() -> tuple[bytes, Manifest]:
            raw = await self._fetch(
                snapshot, FileInfo(MANIFEST, 0, None), blob.stored_limit(MAX_MANIFEST_SIZE)
            )
            return await _work(blob.work_of(raw), _parse_manifest, raw)

        try:
            text, manifest = await self.source.confirmed(fetch)
            if self._keys:
                await _work(len(text), self._verify, manifest, snapshot)
        except DamageError as error:
            raise DamageError(f"{snapshot}/{MANIFEST}: {error}") from None
        return text, manifest

    def _verify(self, manifest: Manifest, snapshot: Snapshot) -> None:
        """Holds a manifest against the keys at hand. Raises DamageError."""
        if manifest.needs_key and manifest.signature is None:
            raise DamageError("it says that a key was used, but has no signature: it was changed")
        key = self._key_of(manifest)
        if key is None:
            return  # of no key, or of one that is not at hand: what needs it is refused when it is opened
        if not manifest.is_signed_by(key):
            raise DamageError(f"its signature does not match under the key {key.fingerprint}: it was changed")
        found = (manifest.backup_type, manifest.backup_id, manifest.backup_time)
        if found != (snapshot.group.type, snapshot.group.id, snapshot.time):
            raise DamageError("it is the manifest of another snapshot: {}/{}, {}".format(*found))

    def _key_of(self, manifest: Manifest) -> Key | None:
        """The key at hand that the manifest names; very old ones name none, and are tried by signature."""
        if manifest.key_fingerprint is not None:
            return self._keys.get(manifest.key_fingerprint)
        return next((key for key in self._keys.values() if manifest.is_signed_by(key)), None)

    def _key(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> Key:
        key = None if manifest is None else self._key_of(manifest)
        if key is None:
            named = info if manifest is None else manifest
            raise self._key_missing(info.snapshot, file, named.key_fingerprint)
        return key

    def _key_missing(self, snapshot: Snapshot, file: FileInfo, fingerprint: str | None) -> KeyRequiredError:
        done = "signed" if file.crypt_mode is CryptMode.SIGN_ONLY else "encrypted"
        named = one_line(fingerprint, 100) if fingerprint else "(the manifest does not name it)"
        given = (
            f"; given: {first_of(self._keys)}"
            if self._keys
            else "; give its key file (--keyfile, or keyfile= of nbdkit)"
        )
        return KeyRequiredError(
            f"{snapshot}/{file.archive.name} is {done} with the key {named}, which was not given{given}",
            fingerprint=one_line(fingerprint, 100) if fingerprint else None,
        )

    async def _index(self, snapshot: Snapshot, file: FileInfo, key: Key | None) -> Index:
        async def fetch() -> Index:
            raw = await self._fetch(snapshot, file, _index_limit(file))
            fixed = file.archive.kind is ArchiveKind.FIXED
            # However small the index is, the digest of a hole may be that of 16 MiB.
            work = len(raw) + (FixedIndex.hashes(raw, self._zeros) if fixed else 0)
            return await _work(work, _parse_index, raw, file, key, self._zeros)

        try:
            return await self.source.confirmed(fetch)
        except DamageError as error:
            raise DamageError(f"{snapshot}/{file.archive}: {error}") from None

    async def _restore(self, snapshot: Snapshot, archive: Archive, index: Index) -> None:
        """Has an open image's index take its digest table again."""

        async def fetch() -> bytes:
            try:
                return await self.source.fetch_file(snapshot, archive, index.stored_size)
            except NotFoundError:  # which is no damage
                raise SourceError(
                    f"{snapshot}/{archive}: the index is missing, the snapshot may have been forgotten; "
                    f"close the file"
                ) from None

        try:
            await self.source.confirmed(lambda: self._opened.restore(index, fetch))
        except DamageError as error:
            raise DamageError(f"{snapshot}/{archive}: {error}") from None

    async def _fetch(self, snapshot: Snapshot, file: FileInfo, limit: int) -> bytes:
        """The stored bytes of a file. Raises DamageError without the file's name."""
        try:
            return await self.source.fetch_file(snapshot, file.archive, limit)
        except NotFoundError:
            raise DamageError("listed in the snapshot, but missing") from None


async def _work(size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls `work`, in a worker thread where it has so many bytes to do that the loop would notice."""
    if size <= SMALL:
        return work(*args, **kwargs)
    return await trio.to_thread.run_sync(functools.partial(work, *args, **kwargs))


def _entry(manifest: Manifest, file: FileInfo) -> ManifestFile | None:
    """What the manifest has of a file that was listed; None where it has another one or none."""
    entry = next((entry for entry in manifest.files if entry.archive == file.archive), None)
    if entry is None or entry.size != file.size or file.csum not in (None, entry.csum):
        return None
    return entry


def _index_limit(file: FileInfo) -> int:
    """Most bytes that the stored index of an archive of this size can have; a MiB is nothing to refuse."""
    if file.archive.kind is ArchiveKind.FIXED:
        entries = -(-file.size // MIN_FIXED_CHUNK_SIZE) * FIXED_ENTRY_SIZE
    else:
        entries = -(-file.size // LEAST_AVERAGE_CHUNK) * DYNAMIC_ENTRY_SIZE
    return min(max(HEADER_SIZE + entries, 1 << 20), MAX_INDEX_SIZE)


def _usual_table_size(file: FileInfo) -> int:
    """Bytes of the digest table of an archive of this size with chunks as they usually are."""
    entry = FIXED_ENTRY_SIZE if file.archive.kind is ArchiveKind.FIXED else DYNAMIC_ENTRY_SIZE
    return min(-(-file.size // USUAL_CHUNK) * entry, MAX_INDEX_SIZE)


def _parse_index(raw: bytes, file: FileInfo, key: Key | None, zeros: ZeroDigests) -> Index:
    fixed = file.archive.kind is ArchiveKind.FIXED
    index: Index = FixedIndex(raw, key, zeros) if fixed else DynamicIndex(raw)
    if file.csum is not None and index.csum != file.csum:
        raise DamageError("checksum differs from the manifest")
    if index.size != file.size:
        raise DamageError(f"holds {index.size} bytes, the manifest says {file.size}")
    return index


def _parse_manifest(raw: bytes) -> tuple[bytes, Manifest]:
    """A manifest's text, and what it says."""
    text = blob.decode(raw, max_size=MAX_MANIFEST_SIZE, encrypted=False)
    return text, Manifest.parse(text)


def _decode_blob(raw: bytes, file: FileInfo, encrypted: bool | None, key: Key | None) -> bytes:
    if file.csum is not None:
        if len(raw) != file.size:
            raise DamageError(f"has {len(raw)} bytes, the manifest says {file.size}")
        if hashlib.sha256(raw).digest() != file.csum:
            raise DamageError("checksum differs from the manifest")
    return blob.decode(raw, max_size=blob.MAX_BLOB_SIZE, key=key, encrypted=encrypted)


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
