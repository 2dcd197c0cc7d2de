"""Log recovery of XFS, into memory. Used by `reader`; of one thread.

As the kernel does it: transaction by transaction, where the disk is not newer. A buffer that was cancelled
cancels what the log changed in it before, so that one pass is enough. Left out is what files do not need:
which space is free, quotas, and the hash tables of directories.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence

from pbsfs.base.errors import DamageError
from pbsfs.disks.xfs.changes import CHUNK
from pbsfs.disks.xfs.inode_item import InodeItem
from pbsfs.disks.xfs.log import Log
from pbsfs.disks.xfs.overlay import Overlay
from pbsfs.disks.xfs.superblock import Superblock
from pbsfs.disks.xfs.transactions import Transaction, committed

_INODE, _BUFFER, _DQUOT, _QUOTAOFF, _CREATE = 0x123B, 0x123C, 0x123D, 0x123E, 0x123F
_INTENTS = {
    0x1236: ("space to free", True),
    0x1240: ("owners of space", True),
    0x1242: ("counts of shared space", True),
    0x1244: ("maps of files", False),
    0x1246: ("extended attributes", False),
    0x1248: ("exchanges of contents", False),
    0x124A: ("space to free", True),
    0x124C: ("owners of space", True),
    0x124E: ("counts of shared space", True),
}
"""Each with what it is about, and whether files are the same without it. The item that says that one is done
has the next number."""

_CANCEL, _INODES = 2, 1
_UNUSED_FLAGS = 4 | 8 | 16
"""Of buffers of quotas."""

_UNUSED_TYPES = {1, 2, 3, 5, 6, 7, 12, 13, 14, 19, 20}
"""Buffers that are not read, by their types (xfs_blft): quotas, headers of allocation groups, hash tables of
directories, realtime maps."""

_SPACE_TREES = {
    b"ABTB", b"ABTC", b"AB3B", b"AB3C", b"IABT", b"IAB3", b"FIBT", b"FIB3", b"RMB3", b"R3FC",
}  # fmt: skip
_BUFFER_HEAD = struct.Struct("<4xHHQI")
_CREATE_HEAD = struct.Struct(">4x6I")
_MOST_LENGTH = 2048
"""Sectors of a buffer."""


class Recovery:
    """What the log of a file system holds, put into an overlay."""

    def __init__(self, overlay: Overlay, superblock: Superblock, log: Log) -> None:
        """Raises DamageError where it could not be replayed; the overlay is then half done."""
        self._overlay = overlay
        self._superblock = superblock
        self.transactions = 0
        self.unknown: set[int] = set()
        self._intents: dict[tuple[int, bytes], int] = {}
        for transaction in committed(log):
            self.transactions += 1
            self._apply(transaction)

    def text(self) -> str:
        """What was done, for `facts`."""
        unfinished = Counter(_INTENTS[kind] for kind, _ in self._intents)
        missing = [f"{count} changes of {what}" for (what, same), count in unfinished.items() if not same]
        if self.unknown:
            missing.append("items of type " + ", ".join(f"{kind:#x}" for kind in sorted(self.unknown)))
        done = f"{self.transactions} transactions"
        without = sum(count for (_, same), count in unfinished.items() if same)
        if without:
            done += f"; {without} unfinished changes of free space, which files do not need"
        if missing:
            return f"not replayed: {', '.join(missing)}; all else is replayed: {done}"
        return f"replayed: {done}"

    def _apply(self, transaction: Transaction) -> None:
        cancels: list[tuple[int, int]] = []
        for kind, regions in transaction.items():
            if kind == _CREATE:
                self._create(regions[0])
        for kind, regions in transaction.items(forget=True):
            if kind == _BUFFER:
                flags, length, block, _ = _buffer(regions[0])
                if flags & _CANCEL:
                    cancels.append((block, length))
                else:
                    self._buffer(regions, transaction.lsn)
            elif kind == _INODE:
                self._inode(regions, transaction.lsn)
            elif kind in _INTENTS:
                self._intents[kind, _identity(regions[0])] = 1
            elif kind - 1 in _INTENTS:
                self._intents.pop((kind - 1, _identity(regions[0])), None)
            elif kind not in {_CREATE, _DQUOT, _QUOTAOFF}:
                self.unknown.add(kind)
        for block, length in cancels:
            self._overlay.cancel(block, length)

    def _buffer(self, regions: Sequence[bytes], lsn: int) -> None:
        flags, length, block, words = _buffer(regions[0])
        if flags & (_INODES | _UNUSED_FLAGS) or flags >> 11 in _UNUSED_TYPES:
            return  # of inodes only the list of those that were deleted is in it
        bitmap = int.from_bytes(regions[0][20 : 20 + words * 4], "little")
        if bitmap & 1 and len(regions) > 1 and regions[1][:4] in _SPACE_TREES:
            return
        number = 1
        at = 0
        while bitmap >> at:
            skipped = (bitmap >> at & -(bitmap >> at)).bit_length() - 1
            at += skipped
            run = (~(bitmap >> at) & ((bitmap >> at) + 1)).bit_length() - 1
            if number >= len(regions):
                raise DamageError("a buffer has too few regions")
            data = regions[number]
            number += 1
            run = min(run, len(data) // CHUNK)
            if not run or (at + run) * CHUNK > length * 512:
                raise DamageError("a buffer's regions are wrong")
            self._overlay.change(block, length, lsn, at, data[: run * CHUNK])
            at += run
        if number != len(regions):
            raise DamageError("a buffer has too many regions")

    def _create(self, region: bytes) -> None:
        """New inodes, all free."""
        superblock = self._superblock
        if len(region) < 28:
            raise DamageError("an item is cut off")
        group, block, count, size, blocks, _ = _CREATE_HEAD.unpack_from(region)
        if (
            size != superblock.inode_size
            or not 0 < count <= 4096
            or count * size != blocks * superblock.block_size
        ):
            raise DamageError("new inodes have wrong sizes")
        self._overlay.create(superblock.offset_of(group << superblock.group_bits | block, blocks), count)

    def _inode(self, regions: Sequence[bytes], lsn: int) -> None:
        item = InodeItem.of(regions)
        if self._superblock.inode_offset(item.number) != item.block * 512 + item.offset:
            raise DamageError(f"inode {item.number} lies elsewhere than the log says")
        self._overlay.change_inode(item, lsn)


def _buffer(region: bytes) -> tuple[int, int, int, int]:
    """Of a buffer: flags, sectors, the first sector, words of its bitmap."""
    if len(region) < _BUFFER_HEAD.size:
        raise DamageError("an item is cut off")
    flags, length, block, words = _BUFFER_HEAD.unpack_from(region)
    if not 0 < length <= _MOST_LENGTH or 20 + words * 4 > len(region):
        raise DamageError("a buffer is cut off")
    return flags, length, block, words


def _identity(region: bytes) -> bytes:
    if len(region) < 16:
        raise DamageError("an item is cut off")
    return region[8:16]
