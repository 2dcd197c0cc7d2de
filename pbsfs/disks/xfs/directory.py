"""The names in a directory of XFS: in the inode, or in blocks. Used by `reader`; of one thread.

Only the blocks that hold names are read, in the order of the directory; its hash tables are not.
"""

from __future__ import annotations

import stat as stat_bits
from collections.abc import Iterator

from pbsfs.base.errors import DamageError
from pbsfs.contents.faults import Faults
from pbsfs.disks.xfs.blocks import DIRECTORY, Blocks
from pbsfs.disks.xfs.extents import Map
from pbsfs.disks.xfs.inode import LOCAL, Inode

_TYPES = (
    0,
    stat_bits.S_IFREG,
    stat_bits.S_IFDIR,
    stat_bits.S_IFCHR,
    stat_bits.S_IFBLK,
    stat_bits.S_IFIFO,
    stat_bits.S_IFSOCK,
    stat_bits.S_IFLNK,
    stat_bits.S_IFCHR,
)
"""By the type in a name (xfs_dir3_ft); the last is a whiteout."""

_DATA_END = 1 << 35
"""Bytes of a directory that may hold names; its hash table is after them."""

_MOST_BLOCKS = 1 << 19


def names(blocks: Blocks, inode: Inode) -> Iterator[tuple[bytes, int, int]]:
    """The names, without `.` and `..`, each with its inode and type, as in st_mode; 0 where it is not stored.

    Raises DamageError, after those that can be read.
    """
    if inode.data.format == LOCAL:
        yield from _short(inode.data.data[: inode.size], blocks.superblock.has_types)
        return
    superblock = blocks.superblock
    extents = Map(blocks, inode.data)
    step = superblock.directory_block_size // superblock.block_size
    end = _DATA_END // superblock.block_size
    faults = Faults()
    after = number = 0
    for extent in extents.extents:
        if extent.first >= end:
            break
        for first in range(
            max(after, extent.first - extent.first % step), extent.first + extent.length, step
        ):
            after = first + step
            number += 1
            if number > _MOST_BLOCKS:
                raise DamageError(f"it has more than {_MOST_BLOCKS} blocks")
            try:
                data = blocks.block(extents.parts(first, step), DIRECTORY, inode.number)
                yield from _block(data, superblock.has_types, superblock.has_checksums)
            except DamageError as error:
                faults.add(error)
    if not number:
        raise DamageError("it has no blocks")
    problem = faults.summary()
    if problem is not None:
        raise problem


def _short(data: bytes, has_types: bool) -> Iterator[tuple[bytes, int, int]]:
    if len(data) < 6:
        raise DamageError("its list of names is cut off")
    width = 8 if data[1] else 4
    at = 2 + width
    for _ in range(data[0]):
        length = data[at] if at < len(data) else 0
        name = data[at + 3 : at + 3 + length]
        at += 3 + length + has_types
        if not length or at + width > len(data):
            raise DamageError("its list of names is wrong")
        kind = data[at - 1] if has_types else 0
        yield name, int.from_bytes(data[at : at + width], "big"), _type(kind)
        at += width
    if at != len(data):
        raise DamageError("its list of names has a wrong length")


def _block(data: bytes, has_types: bool, has_checksums: bool) -> Iterator[tuple[bytes, int, int]]:
    end = len(data)
    magic = data[:4]
    if magic == (b"XDB3" if has_checksums else b"XD2B"):
        end -= 8 + 8 * int.from_bytes(data[end - 8 : end - 4], "big")
    elif magic != (b"XDD3" if has_checksums else b"XD2D"):
        raise DamageError("a block of its names is of another kind")
    at = 64 if has_checksums else 16
    if end < at:
        raise DamageError("a block of its names is wrong")
    extra = 18 + has_types  # inode 8, length 1, tag 2, and 7 to round up; the type 1
    while at < end:
        if data[at] == 0xFF and data[at + 1] == 0xFF:
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            entry = None
        else:
            length = data[at + 8] if at + 8 < end else 0
            size = length + extra & ~7
            if not length or at + size > end:
                raise DamageError("a block of its names is wrong")
            name = data[at + 9 : at + 9 + length]
            kind = _type(data[at + 9 + length]) if has_types else 0
            entry = name, int.from_bytes(data[at : at + 8], "big"), kind
        if size < 8 or size % 8 or at + size > end:
            raise DamageError("a block of its names is wrong")
        if data[at + size - 2 : at + size] != at.to_bytes(2, "big"):
            raise DamageError("a block of its names is wrong")
        if entry is not None and entry[0] not in {b".", b".."}:
            yield entry
        at += size


def _type(kind: int) -> int:
    if kind >= len(_TYPES):
        raise DamageError(f"a name has the unknown type {kind}")
    return _TYPES[kind]
