"""The names in a directory of an ext file system, block by block.

Hash trees hold all names in leaves that look like blocks of a plain directory, and their other blocks look
empty: so no hash is needed. Pure functions of bytes.
"""

from __future__ import annotations

import stat as stat_bits
import struct
from collections.abc import Iterator
from typing import Final

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.inode import INDEXED, Inode
from pbsfs.disks.ext.superblock import FILETYPE, Superblock, kernel_crc

_HEAD: Final = struct.Struct("<IHBB")

_TAIL: Final = b"\0\0\0\0\x0c\0\0\xde"
"""What looks like an unused name, and ends a block with its checksum."""

_TYPES: Final = (
    (0, stat_bits.S_IFREG, stat_bits.S_IFDIR, stat_bits.S_IFCHR, stat_bits.S_IFBLK)
    + (stat_bits.S_IFIFO, stat_bits.S_IFSOCK, stat_bits.S_IFLNK)
    + (0,) * 248
)


def names_in(
    superblock: Superblock, directory: int, block: bytes, *, first: bool
) -> Iterator[tuple[bytes, int, int]]:
    """The names in a block: each with its inode and type, 0 where it is not known. `first`: whether the
    block begins with `.` and `..`, which are left out. Raises DamageError after those before it."""
    unpack = _HEAD.unpack_from
    typed = superblock.incompat & FILETYPE
    inodes = superblock.inodes
    end = len(block)
    offset = 0
    skipped = 0
    while offset + 8 <= end:
        inode, length, name_length, kind = unpack(block, offset)
        if length & 3 or not length:
            length = _long(length, end)
        if not typed:
            name_length |= kind << 8
            kind = 0
        if length < 8 + name_length or length < 12 or length % 4 or offset + length > end or inode > inodes:
            raise DamageError(f"directory {directory}: a block of it is damaged")
        if inode:
            name = block[offset + 8 : offset + 8 + name_length]
            if first and skipped < 2 and name == (b".", b"..")[skipped]:
                skipped += 1
            else:
                yield name, inode, _TYPES[kind]
        offset += length
    if offset != end:
        raise DamageError(f"directory {directory}: a block of it is damaged")


def verify(superblock: Superblock, inode: Inode, block: bytes, *, first: bool) -> None:
    """Checks the checksum of a block of a directory, where it has one; `first`: whether it is the first.
    Raises DamageError."""
    if not superblock.checksums:
        return
    head = int.from_bytes(block[4:6], "little")
    if inode.flags & INDEXED and (first or _long(head, len(block)) == len(block)):
        good = _index_checksum(inode, block)
    else:
        good = block[-12:-4] == _TAIL
        good = good and kernel_crc(inode.seed, block[:-12]) == int.from_bytes(block[-4:], "little")
    if not good:
        raise DamageError(f"directory {inode.number}: a block of it has a wrong checksum")


def _index_checksum(inode: Inode, block: bytes) -> bool:
    """ext4_dx_csum_verify: over what the count of entries covers, and the tail without the checksum."""
    size = len(block)
    head = int.from_bytes(block[4:6], "little")
    if _long(head, size) == size:
        start = 8
    elif head == 12 and block[24:28] == bytes(4) and block[29] == 8:
        start = 32
    else:
        return False
    limit, count = struct.unpack_from("<HH", block, start)
    tail = start + limit * 8
    if count > limit or tail > size - 8:
        return False
    covered = block[: start + count * 8] + block[tail : tail + 4] + bytes(4)
    return kernel_crc(inode.seed, covered) == int.from_bytes(block[tail + 4 : tail + 8], "little")


def _long(length: int, size: int) -> int:
    """The length of an entry in a block of `size` bytes: 64 KiB do not fit its field."""
    if size < 1 << 16:
        return length
    return size if length in {0, 0xFFFF} else length & 0xFFFC | (length & 3) << 16
