"""Stored files of a snapshot as values: fetched, checked against the manifest, and parsed.

Used by `Reader` and `Manifests`, from tasks of the trio loop; what takes long runs in worker threads. The
errors raised do not name the file: the callers add its name.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pbsfs.base.errors import DamageError, NotFoundError
from pbsfs.base.names import Archive, ArchiveKind, Snapshot
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
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, Manifest
from pbsfs.formats.zeros import ZeroDigests
from pbsfs.runtime.stats import COUNTS
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.base import FileInfo, Source

MAX_INDEX_SIZE = HEADER_SIZE + (1 << 30)
"""Most bytes of a stored index: 128 TiB in chunks of 4 MiB."""

USUAL_CHUNK = 4 << 20
"""Bytes of a chunk as the vendor's clients cut them."""

LEAST_AVERAGE_CHUNK = 256
"""Bytes of a stream for each entry of its index, at least; writers cut pieces of some MiB. A shorter stream
is one chunk."""

SMALL = 64 << 10
"""Bytes up to which pbsfs decodes in the loop: that takes less time than a thread does to start (0.1 ms)."""

P = ParamSpec("P")
R = TypeVar("R")


async def fetch_stored(source: Source, snapshot: Snapshot, file: FileInfo, limit: int) -> bytes:
    """The stored bytes of a file, at most `limit`. Raises DamageError (not naming it), SourceError."""
    try:
        return await fetch_raw(source, snapshot, file.archive, limit, file.csum)
    except NotFoundError:
        raise DamageError("listed in the snapshot, but missing") from None


async def fetch_raw(
    source: Source, snapshot: Snapshot, archive: Archive, limit: int, csum: bytes | None = None
) -> bytes:
    """The same, but raises NotFoundError if there is no such file.

    `csum`: that of the manifest; a cache may have the file, or keep it, by that.
    """
    kept = None if csum is None else await source.kept_file(csum, limit)
    if kept is not None:
        return kept
    if source.rate is None:
        raw = await source.fetch_file(snapshot, archive, limit)
    else:
        # How many bytes a file has, only its transfer shows.
        async with source.rate.turn(0) as turn:
            raw = await source.fetch_file(snapshot, archive, limit)
            turn.size = len(raw)
    if csum is not None:
        source.keep_file(csum, raw)
    COUNTS.bytes_fetched += len(raw)
    return raw


async def in_thread_if_large(size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls `work`, which processes `size` bytes: in a worker thread if these would delay the loop."""
    if size <= SMALL:
        return work(*args, **kwargs)
    return await in_thread(functools.partial(work, *args, **kwargs))


def index_limit(file: FileInfo) -> int:
    """Most bytes that the stored index of an archive of this size can have; a MiB is nothing to refuse."""
    if file.archive.kind is ArchiveKind.FIXED:
        entries = -(-file.size // MIN_FIXED_CHUNK_SIZE) * FIXED_ENTRY_SIZE
    else:
        entries = -(-file.size // LEAST_AVERAGE_CHUNK) * DYNAMIC_ENTRY_SIZE
    return min(max(HEADER_SIZE + entries, 1 << 20), MAX_INDEX_SIZE)


def usual_table_size(file: FileInfo) -> int:
    """Bytes of the digest table of an archive of this size with chunks as they usually are."""
    entry = FIXED_ENTRY_SIZE if file.archive.kind is ArchiveKind.FIXED else DYNAMIC_ENTRY_SIZE
    return min(-(-file.size // USUAL_CHUNK) * entry, MAX_INDEX_SIZE)


def parse_index(raw: bytes, file: FileInfo, key: Key | None, zeros: ZeroDigests) -> Index:
    """The index of `file`, checked against its checksum and size. Raises DamageError."""
    fixed = file.archive.kind is ArchiveKind.FIXED
    index: Index = FixedIndex(raw, key, zeros) if fixed else DynamicIndex(raw, key, zeros)
    if file.csum is not None and index.csum != file.csum:
        raise DamageError("checksum differs from the manifest")
    if index.size != file.size:
        raise DamageError(f"holds {index.size} bytes, the manifest says {file.size}")
    return index


def parse_manifest(raw: bytes) -> tuple[bytes, Manifest]:
    """A manifest's text, and what it says."""
    text = blob.decode(raw, max_size=MAX_MANIFEST_SIZE, encrypted=False)
    return text, Manifest.parse(text)


def decode_blob(raw: bytes, file: FileInfo, encrypted: bool | None, key: Key | None) -> bytes:
    """The content of a blob, checked against its size and checksum. Raises DamageError, KeyRequiredError.

    `encrypted`: None if the manifest does not say it.
    """
    if file.csum is not None:
        if len(raw) != file.size:
            raise DamageError(f"has {len(raw)} bytes, the manifest says {file.size}")
        if hashlib.sha256(raw).digest() != file.csum:
            raise DamageError("checksum differs from the manifest")
    return blob.decode(raw, max_size=blob.MAX_BLOB_SIZE, key=key, encrypted=encrypted)
