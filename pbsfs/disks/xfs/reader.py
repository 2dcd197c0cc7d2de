"""XFS as contents: entries, maps of files, attributes, after log recovery in memory.

Used by the process that reads the file systems of a snapshot's disks. Synchronous; of one thread.
"""

from __future__ import annotations

import stat as stat_bits
import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.pieces import append
from pbsfs.disks.volume import Volume, part_of
from pbsfs.disks.xfs import attributes, directory, extents
from pbsfs.disks.xfs.blocks import REMOTE, Blocks
from pbsfs.disks.xfs.inode import DEVICE, LOCAL, Inode, decoded
from pbsfs.disks.xfs.log import Log
from pbsfs.disks.xfs.overlay import Overlay
from pbsfs.disks.xfs.recovery import Recovery
from pbsfs.disks.xfs.superblock import MAGIC, MOST_SECTOR, SIZE, Superblock

_FEW = 4
"""Inodes of a directory for which it takes longer to verify all those around them."""

INODES = 2048
"""Inodes that are kept, of 2 KiB at most: those of a directory of files that are listed, and then read."""

_LONGEST_LINK = 1024
_SECTOR = 512


class Xfs(FileSystem):
    """XFS of version 4 or 5."""

    kind = "xfs"

    def __init__(self, volume: Volume) -> None:
        """Raises DamageError, KeyRequiredError, SourceError."""
        super().__init__(volume)
        start = volume.read(0, min(MOST_SECTOR, volume.size))
        superblock = Superblock.of(start)
        self._overlay = Overlay(volume, superblock)
        self._journal, self._superblock = self._recovered(volume, superblock)
        self._blocks = Blocks(self._overlay, self._superblock, volume.size)
        self._inode = lru_cache(INODES)(self._load)
        self.root = self.inode(self._superblock.root)
        if not self.root.is_directory:
            raise DamageError("its root is not a directory")

    @staticmethod
    def recognise(volume: Volume) -> bool:
        return volume.size >= SIZE and volume.read(0, 4) == MAGIC

    def facts(self) -> dict[str, str]:
        superblock = self._superblock
        found = {
            "label": superblock.label.decode("utf-8", "replace"),
            "uuid": str(uuid.UUID(bytes=superblock.uuid)),
            "journal": self._journal,
            "version": str(superblock.version),
        }
        if superblock.needs_repair:
            found["state"] = "its superblock says that it needs xfs_repair"
        return found

    def names(self, directory_: Entry) -> Iterator[tuple[bytes, int, int]]:
        inode = self._inode(directory_.inode)
        if not stat_bits.S_ISDIR(inode.mode):
            raise DamageError(f"inode {inode.number} is not a directory")
        try:
            yield from directory.names(self._blocks, inode)
        except DamageError as error:
            raise _about(inode.number, error) from None

    def inode(self, number: int) -> Entry:
        inode = self._inode(number)
        kind = stat_bits.S_IFMT(inode.mode)
        size, target, rdev = 0, None, 0
        if kind == stat_bits.S_IFREG:
            size = inode.size
        elif kind == stat_bits.S_IFLNK:
            try:
                target = self._target(inode)
            except DamageError as error:
                raise _about(number, error) from None
            size = len(target)
        elif kind in {stat_bits.S_IFCHR, stat_bits.S_IFBLK}:
            if inode.data.format != DEVICE:
                raise DamageError(f"inode {number}: its device number is in an unknown form")
            rdev = inode.rdev
        return Entry(
            b"",
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime_ns,
            size,
            number,
            rdev,
            target,
            inode.attributes is not None and self._has_attributes(inode),
            links=inode.links,
        )

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        windows = set()
        for number in numbers:
            try:
                windows.add(self._blocks.window(self._superblock.inode_offset(number)))
            except DamageError:
                continue  # `inode` says so
        self.volume.prefetch(sorted(windows))
        if len(numbers) > _FEW:
            self._blocks.verify_inodes(start for start, _size in sorted(windows))

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        inode = self._inode(file.inode)
        try:
            return self._pieces(inode)
        except UnsupportedError as error:
            raise UnsupportedError(f"inode {inode.number}: {error}") from None
        except DamageError as error:
            raise _about(inode.number, error) from None

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        inode = self._inode(entry.inode)
        try:
            return attributes.attributes(self._blocks, inode)
        except UnsupportedError as error:
            raise UnsupportedError(f"inode {inode.number}: {error}") from None
        except DamageError as error:
            raise _about(inode.number, error) from None

    def _recovered(self, volume: Volume, superblock: Superblock) -> tuple[str, Superblock]:
        """What is known about the log, and the superblock after it."""
        if not superblock.log_start:
            return "not replayed: the log is on a device of its own", superblock
        if superblock.log_features & ~3:
            return f"not replayed: its features {superblock.log_features:#x} are unknown", superblock
        try:
            start = superblock.offset_of(superblock.log_start, superblock.log_blocks)
            log = Log(
                part_of(volume, start, superblock.log_blocks * superblock.block_size),
                uuid=superblock.uuid,
                is_v2=superblock.log_is_v2,
                has_checksums=superblock.has_checksums,
            )
            if log.is_clean:
                return "clean", superblock
            done = Recovery(self._overlay, superblock, log)
            first = self._overlay.read(0, min(MOST_SECTOR, volume.size))
            if self._overlay.changed(0, _SECTOR):
                superblock = Superblock.of(first, replayed=True)
        except DamageError as error:
            self._overlay.clear()
            return f"not replayed: {error}", superblock
        return done.text(), superblock

    def _load(self, number: int) -> Inode:
        try:
            return decoded(number, self._blocks.raw_inode(number))
        except DamageError as error:
            raise _about(number, error) from None

    def _has_attributes(self, inode: Inode) -> bool:
        try:
            return attributes.has_any(inode.attributes)
        except DamageError:
            return True  # `xattrs` says what is wrong

    def _target(self, inode: Inode) -> bytes:
        if not 0 < inode.size <= _LONGEST_LINK:
            raise DamageError("its target has a wrong length")
        if inode.data.format == LOCAL:
            if inode.size > len(inode.data.data):
                raise DamageError("its target is cut off")
            target = inode.data.data[: inode.size]
        else:
            target = b""
            for extent in extents.Map(self._blocks, inode.data).extents:
                if len(target) < inode.size:
                    target += self._part_of_target(inode, extent, len(target))
            target = target[: inode.size]
        if len(target) != inode.size or b"\0" in target:
            raise DamageError("its target is wrong")
        return target

    def _part_of_target(self, inode: Inode, extent: extents.Extent, at: int) -> bytes:
        size = min(extent.length * self._superblock.block_size, 8 * _LONGEST_LINK)
        if not self._superblock.has_checksums:
            return self._blocks.read(extent.offset, size)
        size = extent.length * self._superblock.block_size
        if size > 4 * (64 << 10):
            raise DamageError("its target is wrong")
        data = self._blocks.block([(extent.offset, size)], REMOTE, inode.number)
        length = int.from_bytes(data[8:12], "big")
        if data[:4] != b"XSLM" or int.from_bytes(data[4:8], "big") != at or length > size - 56:
            raise DamageError("its target is wrong")
        return data[56 : 56 + length]

    def _pieces(self, inode: Inode) -> list[Piece]:
        if inode.is_realtime:
            raise UnsupportedError("data on a realtime device is not supported")
        found: list[Piece] = []
        size, block_size, at = inode.size, self._superblock.block_size, 0
        for extent in extents.extents(self._blocks, inode.data):
            start = extent.first * block_size
            if start >= size:
                continue  # space that was set aside
            if start > at:
                append(found, Piece(None, 0, start - at))
            length = min(extent.length * block_size, size - start)
            at = start + length
            if extent.unwritten:
                append(found, Piece(None, 0, length))
            else:
                for piece in self.volume.pieces(extent.offset, length):
                    append(found, piece)
        if at < size:
            append(found, Piece(None, 0, size - at))
        return found


def _about(number: int, error: DamageError) -> DamageError:
    return DamageError(f"inode {number}: {error}")
