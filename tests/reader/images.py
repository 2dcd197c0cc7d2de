"""Images in a source in memory, in every form in which they are stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pbsfs.base.names import Archive
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.image import Image
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from tests.support import made
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img.fidx"
STREAM = "root.pxar.didx"
SNAPSHOT = made.snapshot()


@dataclass(frozen=True, slots=True)
class Storage:
    """How an image is stored."""

    crypt_mode: CryptMode = CryptMode.NONE
    key: Key | None = None
    compress: bool = True


STORAGES = {
    "plain": Storage(compress=False),
    "compressed": Storage(),
    "encrypted": Storage(CryptMode.ENCRYPT, made.KEY, compress=False),
    "encrypted-compressed": Storage(CryptMode.ENCRYPT, made.KEY),
    "sign-only": Storage(CryptMode.SIGN_ONLY, made.KEY),
}


@asynccontextmanager
async def opened(
    source: MemorySource,
    info: SnapshotInfo,
    name: str = NAME,
    *,
    cache_size: int = 256 << 20,
    limits: FetchLimits = DEFAULT,
) -> AsyncIterator[Image]:
    keys = {made.KEY.fingerprint: made.KEY}
    async with open_reader(source, cache_size=cache_size, limits=limits, keys=keys) as reader:
        yield await reader.open_image(info, file_of(info, name))


def stored(
    content: bytes,
    *,
    name: str = NAME,
    storage: Storage = STORAGES["compressed"],
    chunk_size: int = CHUNK_SIZE,
) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    info = source.add(
        SNAPSHOT,
        {name: content},
        crypt_mode=storage.crypt_mode,
        key=storage.key,
        compress=storage.compress,
        chunk_size=chunk_size,
    )
    return source, info


def with_index(source: MemorySource, name: str, raw: bytes, csum: bytes, size: int) -> SnapshotInfo:
    """A snapshot whose only file has the index `raw`."""
    archive = Archive(name)
    source.files[SNAPSHOT, archive] = raw
    info = SnapshotInfo(SNAPSHOT, (FileInfo(archive, size, CryptMode.NONE, csum),))
    source.set_manifest(SNAPSHOT, info.files, None)
    return info
