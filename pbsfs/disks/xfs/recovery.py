"""Log recovery of XFS, into memory. Used by `reader`; of one thread.

As the kernel does it: a first pass finds the buffers that were cancelled; a second one applies what was not,
transaction by transaction, where the disk is not newer. Left out is what files do not need: which space is
free, quotas, and the hash tables of directories.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence

from pbsfs.base.errors import DamageError
from pbsfs.disks.xfs.inode_item import InodeItem, converted
from pbsfs.disks.xfs.log import Log
from pbsfs.disks.xfs.overlay import Overlay
from pbsfs.disks.xfs.superblock import Superblock
from pbsfs.disks.xfs.transactions import Item, Transaction, committed

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
_LSN_AND_UUID = {
    b"BMA3": (32, 40),
    b"XDB3": (16, 24),
    b"XDD3": (16, 24),
    b"XDF3": (16, 24),
    b"XSLM": (48, 16),
    b"XFSB": (240, 32),
}
_LSN_IN_TREE = {b"\x3d\xf1", b"\x3d\xff", b"\x3e\xbe", b"\x3b\xee"}
_BUFFER_HEAD = struct.Struct("<4xHHQI")
_CREATE_HEAD = struct.Struct(">4x6I")
_CHUNK = 128
_SPAN = 64 << 10
_MOST_LENGTH = 2048
"""Sectors of a buffer."""


class Recovery:
    """What the log of a file system holds, applied to an overlay."""

    def __init__(self, overlay: Overlay, superblock: Superblock, log: Log) -> None:
        """Raises DamageError where it could not be applied; the overlay is then half done."""
        self._overlay = overlay
        self._superblock = superblock
        self._cancelled: Counter[tuple[int, int]] = Counter()
        self._log = log
        self.transactions = 0
        self.unknown: set[int] = set()
        self._intents: dict[tuple[int, bytes], int] = {}
        for transaction in committed(log):
            self._first_pass(transaction.items)
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

    # --- the first pass

    def _first_pass(self, items: Iterable[Item]) -> None:
        for kind, regions in items:
            if kind == _BUFFER:
                flags, length, block, _ = _buffer(regions[0])
                if flags & _CANCEL:
                    self._cancelled[block, length] += 1
            elif kind in _INTENTS:
                self._intents[kind, _identity(regions[0])] = 1
            elif kind - 1 in _INTENTS:
                self._intents.pop((kind - 1, _identity(regions[0])), None)
            elif kind not in {_INODE, _CREATE, _DQUOT, _QUOTAOFF}:
                self.unknown.add(kind)

    # --- the second pass

    def _apply(self, transaction: Transaction) -> None:
        buffers: list[Item] = []
        others: list[Item] = []
        cancels: list[Item] = []
        for item in transaction.items:
            if item.kind == _CREATE:
                buffers.append(item)
            elif item.kind == _BUFFER:
                (cancels if _buffer(item.regions[0])[0] & _CANCEL else buffers).append(item)
            elif item.kind == _INODE:
                others.append(item)
        self._request(buffers, others)
        for kind, regions in buffers:
            if kind == _CREATE:
                self._create(regions[0])
            else:
                self._buffer(regions, transaction.lsn)
        for _, regions in others:
            self._inode(regions, transaction.lsn)
        for _, regions in cancels:
            _, length, block, _ = _buffer(regions[0])
            self._cancelled[block, length] -= 1

    def _request(self, buffers: Iterable[Item], inodes: Iterable[Item]) -> None:
        """Requests what a transaction changes, side by side."""
        places = {_buffer(regions[0])[2] for kind, regions in buffers if kind == _BUFFER}
        places |= {InodeItem.of(regions).block for _, regions in inodes}
        self._overlay.prefetch(sorted({place * 512 & ~(_SPAN - 1) for place in places}), _SPAN)

    def _is_cancelled(self, block: int, length: int) -> bool:
        return self._cancelled.get((block, length), 0) > 0

    def _buffer(self, regions: Sequence[bytes], lsn: int) -> None:
        flags, length, block, words = _buffer(regions[0])
        if (
            self._is_cancelled(block, length)
            or flags & (_INODES | _UNUSED_FLAGS)
            or flags >> 11 in _UNUSED_TYPES
        ):
            return  # of inodes only the list of those that were deleted is in it
        offset = block * 512
        bitmap = int.from_bytes(regions[0][20 : 20 + words * 4], "little")
        # The first chunk says what it is, or else what is on the disk.
        magic = regions[1][:4] if bitmap & 1 and len(regions) > 1 else None
        if magic is None or self._superblock.has_checksums:
            stored = self._overlay.read(offset, min(length * 512, 512))
            if self._is_newer(stored, lsn):
                return
            magic = stored[:4] if magic is None else magic
        if magic in _SPACE_TREES:
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
            run = min(run, len(data) // _CHUNK)
            if not run or (at + run) * _CHUNK > length * 512:
                raise DamageError("a buffer's regions are wrong")
            self._overlay.write(offset + at * _CHUNK, data[: run * _CHUNK])
            at += run
        if number != len(regions):
            raise DamageError("a buffer has too many regions")

    def _is_newer(self, stored: bytes, lsn: int) -> bool:
        """Whether what is on the disk is of this transaction or a later one."""
        if not self._superblock.has_checksums:
            return False
        uuid = self._superblock.meta_uuid
        if stored[:4] in _LSN_AND_UUID:
            at, uuid_at = _LSN_AND_UUID[stored[:4]]
            if stored[:4] == b"XFSB":
                uuid = self._superblock.uuid
        elif stored[8:10] in _LSN_IN_TREE:
            at, uuid_at = 24, 32
        else:
            return False
        found = int.from_bytes(stored[at : at + 8], "big")
        return stored[uuid_at : uuid_at + 16] == uuid and found not in {0, (1 << 64) - 1} and found >= lsn

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
        offset = superblock.offset_of(group << superblock.group_bits | block, blocks)
        cluster = max(superblock.block_size, 8192 * (size // 256 if superblock.has_checksums else 1))
        for start in range(offset, offset + count * size, cluster):
            if self._is_cancelled(start // 512, cluster // 512):
                return
        version = 3 if superblock.has_checksums else 2
        empty = bytearray(size)
        empty[0:2], empty[4] = b"IN", version
        if size < 512:
            self._overlay.write(offset, bytes(empty) * count)
            return
        for inode in range(count):
            self._overlay.fill(offset + inode * size, bytes(empty[:512]).rstrip(b"\0"), 1)
            if size > 512:
                self._overlay.fill(offset + inode * size + 512, b"", size // 512 - 1)

    def _inode(self, regions: Sequence[bytes], lsn: int) -> None:
        item = InodeItem.of(regions)
        if self._is_cancelled(item.block, item.length):
            return
        size = self._superblock.inode_size
        offset = self._superblock.inode_offset(item.number)
        if offset != item.block * 512 + item.offset:
            raise DamageError(f"inode {item.number} lies elsewhere than the log says")
        stored = self._overlay.read(offset, size)
        if stored[:2] != b"IN":
            raise DamageError(f"inode {item.number} is not where the log changes it")
        changed = converted(item, stored, lsn, has_checksums=self._superblock.has_checksums)
        if changed is not None:
            self._overlay.write(offset, changed)


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
