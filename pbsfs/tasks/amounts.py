"""How much data an image holds, shares with another one, and a restore of it fetches: from indexes alone.

Used by `pbsfs info`, from tasks of one trio loop; the counting runs in a worker thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError
from pbsfs.reader.bridge import digest_of
from pbsfs.reader.image import Image
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.base import SnapshotInfo
from pbsfs.tree import Directory, ImageFile, SnapshotDirectory

MOST_CHUNKS = 1 << 20
"""Chunks of an image that are counted: those of 4 TiB. Their digests take some 110 MB of memory."""

IN_ONE_GO = 10_000
"""Chunks between two looks at whether the count was cancelled: some 20 ms."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """Bytes. `data_size`: outside of holes. `restore_size`: what a restore fetches, before compression: each
    different chunk once. `shared_size`: of the data, what the image before has too; None if there is none."""

    data_size: int = 0
    restore_size: int = 0
    shared_size: int | None = None

    def __add__(self, other: Amounts) -> Amounts:
        shared = [size for size in (self.shared_size, other.shared_size) if size is not None]
        return Amounts(
            self.data_size + other.data_size,
            self.restore_size + other.restore_size,
            sum(shared) if shared else None,
        )


async def amounts_of(image: Image, before: Image | None) -> Amounts | None:
    """The amounts of `image`, compared with the image `before`; None if it has too many chunks to count.

    Raises DamageError and SourceError.
    """
    if max(image.index.count, 0 if before is None else before.index.count) > MOST_CHUNKS:
        return None
    return await in_thread(_count, image, before)


async def snapshot_before(snapshot: SnapshotDirectory) -> SnapshotDirectory | None:
    """The readable snapshot of the same group before `snapshot`; None if there is none."""
    earlier = None
    for name, info in (await snapshot.group.children()).values_by_name.items():
        if name == snapshot.name:
            break
        if isinstance(info, SnapshotInfo) and info.error is None:
            earlier = name
    node = None if earlier is None else await snapshot.group.child(earlier)
    return node if isinstance(node, SnapshotDirectory) else None


async def image_before(file: ImageFile, before: Directory | None) -> Image | None:
    """The image of the same name in the snapshot `before`; None if there is none that can be read."""
    if before is None:
        return None
    try:
        node = await before.child(file.name)
        return await node.open() if isinstance(node, ImageFile) else None
    except (DamageError, KeyRequiredError, NotFoundError):
        return None


def _count(image: Image, before: Image | None) -> Amounts:
    known = set() if before is None else {digest for digest, _length in _chunks(before)}
    seen: set[bytes] = set()
    data = restored = shared = 0
    for digest, length in _chunks(image):
        data += length
        if digest not in seen:
            seen.add(digest)
            restored += length
        if digest in known:
            shared += length
    return Amounts(data, restored, None if before is None else shared)


def _chunks(image: Image) -> Iterator[tuple[bytes, int]]:
    """The digest and length of each chunk that is not a hole."""
    for count, number in enumerate(image.data_chunks(0, image.size)):
        if count % IN_ONE_GO == 0:
            trio.from_thread.check_cancelled()
        start, end = image.index.span(number)
        yield digest_of(image, number), end - start
