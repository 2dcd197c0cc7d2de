"""The extended attributes of an inode of an ext file system, from its own bytes and from a block.

Pure functions of bytes; values that have an inode of their own come from the caller.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.inode import Inode
from pbsfs.disks.ext.superblock import Superblock, kernel_crc

MOST_VALUE: Final = 64 << 10
"""Bytes of a value that the kernel returns."""

MOST_VALUES: Final = 8 << 20
"""Bytes of all values of an inode."""

_MAGIC: Final = b"\0\0\x02\xea"

_ENTRY: Final = struct.Struct("<BBHIII")

_SYSTEM: Final = 7
"""Of the data of a file that lies in its inode; no other name has this prefix."""

_PREFIXES: Final = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
"""The kernel shows the names with these prefixes and hides all others (ext4_xattr_handler_map)."""

_WITH_ID: Final = frozenset((2, 8))
_WITHOUT_ID: Final = frozenset((1, 4, 16, 32))

ValueOf = Callable[[int, int], bytes]
"""The value of a number of bytes in an inode of its own, by inode and size."""


def in_inode(inode: Inode, value_of: ValueOf) -> dict[bytes, bytes]:
    """The attributes that lie in the inode. Raises DamageError."""
    data = inode.xattrs
    if data[:4] != _MAGIC:
        return {}
    return _shown(inode, data[4:], 0, value_of)


def in_block(superblock: Superblock, inode: Inode, block: bytes, value_of: ValueOf) -> dict[bytes, bytes]:
    """The attributes that lie in a block of their own. Raises DamageError."""
    if block[:4] != _MAGIC or block[8:12] != b"\1\0\0\0":
        raise DamageError(f"inode {inode.number}: the block of its extended attributes is damaged")
    if superblock.checksums:
        seed = kernel_crc(superblock.seed, struct.pack("<Q", inode.xattr_block))
        if kernel_crc(seed, block[:16] + bytes(4) + block[20:]) != int.from_bytes(block[16:20], "little"):
            raise DamageError(f"inode {inode.number}: its extended attributes have a wrong checksum")
    return _shown(inode, block, 32, value_of)


def inline_data(inode: Inode) -> bytes:
    """What the inode holds of a file's data: that in the map, and an attribute in which it continues."""
    data = inode.xattrs
    if data[:4] == _MAGIC:
        for prefix, name, offset, size, value_inode in _entries(inode, data[4:], 0):
            if prefix == _SYSTEM and name == b"data":
                if value_inode:
                    break
                return inode.map + data[4 + offset : 4 + offset + size]
    return inode.map


def has_shown(inode: Inode) -> bool:
    """Whether there may be attributes, without reading a block."""
    if inode.xattr_block:
        return True
    data = inode.xattrs
    if data[:4] != _MAGIC or data[4:8] == bytes(4):
        return False
    try:
        return any(prefix in _PREFIXES for prefix, *_ in _entries(inode, data[4:], 0))
    except DamageError:  # `in_inode` raises it
        return True


def _shown(inode: Inode, data: bytes, start: int, value_of: ValueOf) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    total = 0
    for prefix, name, offset, size, value_inode in _entries(inode, data, start):
        if prefix not in _PREFIXES:
            continue
        total += size
        if total > MOST_VALUES:
            raise DamageError(
                f"inode {inode.number}: its extended attributes have more than {MOST_VALUES} bytes"
            )
        value = value_of(value_inode, size) if value_inode else data[offset : offset + size]
        if prefix in {2, 3}:
            value = _acl(inode, value)
            name = b""  # noqa: PLW2901
        found[_PREFIXES[prefix] + name] = value
    return found


def _entries(inode: Inode, data: bytes, start: int) -> Iterator[tuple[int, bytes, int, int, int]]:
    """Prefix, name, place and size of the value, and its inode or 0, of each attribute; checked. Raises
    DamageError."""
    at = start
    while data[at : at + 4] != bytes(4):
        if at + 16 > len(data):
            raise _damaged(inode)
        name_length, prefix, offset, value_inode, size, _ = _ENTRY.unpack_from(data, at)
        after = at + 16 + (name_length + 3 & ~3)
        if after + 4 > len(data) or size > MOST_VALUE:
            raise _damaged(inode)
        if not value_inode and size and offset + size > len(data):
            raise _damaged(inode)
        yield prefix, data[at + 16 : at + 16 + name_length], offset, size, value_inode
        at = after


def _acl(inode: Inode, stored: bytes) -> bytes:
    """The kernel's form for programs (linux/posix_acl_xattr.h) of that on the disk (fs/ext4/acl.h)."""
    if stored[:4] != b"\1\0\0\0":
        raise _damaged(inode)
    parts = [b"\2\0\0\0"]
    at = 4
    while at < len(stored):
        if at + 4 > len(stored):
            raise _damaged(inode)
        tag, permissions = struct.unpack_from("<HH", stored, at)
        at += 4
        who = 0xFFFFFFFF
        if tag in _WITH_ID:
            if at + 4 > len(stored):
                raise _damaged(inode)
            who = int.from_bytes(stored[at : at + 4], "little")
            at += 4
        elif tag not in _WITHOUT_ID:
            raise _damaged(inode)
        parts.append(struct.pack("<HHI", tag, permissions, who))
    return b"".join(parts)


def _damaged(inode: Inode) -> DamageError:
    return DamageError(f"inode {inode.number}: its extended attributes are damaged")
