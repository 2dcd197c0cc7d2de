"""What the readers of FAT and of exFAT have in common.

Neither keeps owners, modes or links: all belong to root, directories have mode 0755 and files 0644, without w
where they are read-only. An inode's number says where its directory entry lies: its byte in the volume,
divided by 32; the root's is 1, for which no entry can lie. Synchronous; of one thread.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry
from pbsfs.disks.fat.clusters import BLOCK, Clusters
from pbsfs.disks.filesystem import MOST_DIRECTORIES, FileSystem
from pbsfs.disks.volume import Volume

ROOT = 1
ITEM = 32
"""Bytes of a directory entry."""

READ_ONLY, DIRECTORY = 0x01, 0x10
"""Attributes."""


class FatLike(FileSystem):
    """`hint` of an entry: its first cluster, 0 where it has none; twice that in exFAT, where bit 0 says that
    its clusters have no chain."""

    def __init__(self, volume: Volume, clusters: Clusters, root: int, hint: int) -> None:
        """`root`: the root's first cluster; `hint`: of its entry."""
        super().__init__(volume)
        self.clusters = clusters
        self.root = Entry(b"", stat.S_IFDIR | 0o755, inode=ROOT, hint=hint)
        self._starts = {root: ROOT}

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        self.clusters.prefetch(number * ITEM for number in numbers)

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        return {}

    def claim(self, number: int, first: int) -> None:
        """Notes that a directory starts at a cluster. Raises DamageError where another one does: without
        that, a directory in itself would have no end."""
        self.clusters.position(first)
        if len(self._starts) >= MOST_DIRECTORIES and first not in self._starts:
            raise DamageError(f"there are more than {MOST_DIRECTORIES} directories")
        if self._starts.setdefault(first, number) != number:
            raise DamageError("it has the clusters of another directory")

    def blocks(self, ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """Ranges of the volume in blocks of at most BLOCK bytes, each with its place. Raises DamageError
        after those that can be read."""
        for start, size in ranges:
            for at in range(start, start + size, BLOCK):
                yield at, self.clusters.read(at, min(BLOCK, start + size - at))


def mode_of(attributes: int) -> int:
    """The mode of a directory or file."""
    mode = stat.S_IFDIR | 0o755 if attributes & DIRECTORY else stat.S_IFREG | 0o644
    return mode & ~0o222 if attributes & READ_ONLY else mode
