"""squashfs as contents: entries, maps of files, attributes.

Used by the process that reads the file systems of a snapshot's disks. An inode's number here is the reference
that its names have. Synchronous; of one thread.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.squashfs.compression import NAMES, check
from pbsfs.disks.squashfs.data import Data
from pbsfs.disks.squashfs.inode import KINDS, NONE, Inode, inode_at
from pbsfs.disks.squashfs.metadata import Metadata
from pbsfs.disks.squashfs.superblock import MAGIC, SIZE, Superblock
from pbsfs.disks.squashfs.xattrs import Xattrs
from pbsfs.disks.volume import Volume, part_of

_RUN, _NAME = struct.Struct("<III"), struct.Struct("<HhHH")
_MOST_RUN, _MOST_NAME = 256, 256
_DOTS = 3
"""Bytes that the size of a directory counts for `.` and `..`, which are not stored."""

_KEPT = 1024


class Squashfs(FileSystem):
    """squashfs of version 4."""

    kind = "squashfs"

    def __init__(self, volume: Volume) -> None:
        """Raises DamageError, UnsupportedError, KeyRequiredError, SourceError."""
        superblock = Superblock.of(volume.read(0, min(SIZE, volume.size)))
        check(superblock.compressor)
        if superblock.size > volume.size:
            raise DamageError("it is longer than the volume")
        super().__init__(part_of(volume, 0, superblock.size))
        self._superblock = superblock
        self._metadata = Metadata(self.volume, superblock.compressor)
        self._ids = self._metadata.places(superblock.id_table, superblock.ids, 4)
        self._data = Data(self.volume, superblock, self._metadata)
        self._xattrs = Xattrs(self.volume, superblock, self._metadata)
        self._inode = functools.lru_cache(_KEPT)(self._load)
        self.root = self.inode(superblock.root)
        if not self.root.is_directory:
            raise DamageError("its root is not a directory")

    @staticmethod
    def recognise(volume: Volume) -> bool:
        """Whether this looks like squashfs. Raises KeyRequiredError, SourceError."""
        return volume.size >= SIZE and volume.read(0, len(MAGIC)) == MAGIC

    def facts(self) -> dict[str, str]:
        return {"journal": "none", "compression": NAMES[self._superblock.compressor]}

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        inode = self._inode(directory.inode)
        cursor = self._metadata.at(self._superblock.directory_table + inode.start, inode.offset)
        left = inode.size - _DOTS
        try:
            while left > 0:
                count, block, _number = _RUN.unpack(cursor.read(_RUN.size))
                left -= _RUN.size
                if count >= _MOST_RUN:
                    raise DamageError("its list of names is wrong")
                for _ in range(count + 1):
                    offset, _delta, kind, length = _NAME.unpack(cursor.read(_NAME.size))
                    length += 1
                    left -= _NAME.size + length
                    if not 0 < kind < len(KINDS) or length > _MOST_NAME or left < 0:
                        raise DamageError("its list of names is wrong")
                    yield cursor.read(length), block << 16 | offset, KINDS[kind]
        except DamageError as error:
            raise _about(directory.inode, error) from None

    def inode(self, number: int) -> Entry:
        inode = self._inode(number)
        try:
            uid, gid = self._id(inode.uid), self._id(inode.gid)
        except DamageError as error:
            raise _about(number, error) from None
        entry = Entry(b"", inode.mode, uid, gid, inode.mtime * 10**9, inode.size, number, inode.rdev)
        if entry.is_directory:
            entry = entry.but(size=0)
        return entry.but(target=inode.target, has_xattrs=inode.xattrs != NONE, links=inode.links)

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        table = self._superblock.inode_table
        self._metadata.prefetch(sorted({table + (number >> 16) for number in numbers}))

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        try:
            return self._data.pieces(self._inode(file.inode))
        except DamageError as error:
            raise _about(file.inode, error) from None

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        try:
            return self._data.read(self._inode(file.inode), offset, size)
        except DamageError as error:
            raise _about(file.inode, error) from None

    def decoded_from(self, file: Entry) -> Sequence[Piece]:
        try:
            return self._data.stored(self._inode(file.inode))
        except DamageError as error:
            raise _about(file.inode, error) from None

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        inode = self._inode(entry.inode)
        if inode.xattrs == NONE:
            return {}
        try:
            return self._xattrs.of(inode.xattrs)
        except DamageError as error:
            raise _about(entry.inode, error) from None

    def _id(self, row: int) -> int:
        if row >= self._superblock.ids:
            raise DamageError(f"there is no owner {row}")
        return int.from_bytes(self._metadata.entry(self._ids, row, 4), "little")

    def _load(self, number: int) -> Inode:
        try:
            return inode_at(self._metadata, self._superblock.inode_table + (number >> 16), number & 0xFFFF)
        except DamageError as error:
            raise _about(number, error) from None


def _about(number: int, error: DamageError) -> DamageError:
    kind = UnsupportedError if isinstance(error, UnsupportedError) else DamageError
    return kind(f"inode {number >> 16}:{number & 0xFFFF}: {error}")
