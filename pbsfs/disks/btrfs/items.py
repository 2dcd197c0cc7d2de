"""The items in trees of files: inodes, names, extended attributes, extents; and the roots of trees. Pure."""

from __future__ import annotations

import os
import stat as stat_bits
import struct
from dataclasses import dataclass
from typing import NamedTuple

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.btrfs.superblock import HIGHEST_LEVEL, Root

INODE_ITEM, XATTR_ITEM, DIR_ITEM, DIR_INDEX, EXTENT_DATA = 1, 24, 84, 96, 108
EXTENT_CSUM, ROOT_ITEM, ROOT_REF = 128, 132, 156

NO_CHECKSUMS = 1
"""A flag of inodes: their data has none."""

_INODE = struct.Struct("<40xIIIIQQ64xqI")
_SIZE = struct.Struct("<16xQ")
_INODE_SIZE = 160
_NAME = struct.Struct("<QBQQHHB")
_ROOT = struct.Struct("<168xQQ24xQI17xBB")
_REF = struct.Struct("<QQH")
_EXTENT = struct.Struct("<QQBBHB")
_PLACE = struct.Struct("<QQQQ")

_TYPES = {
    1: stat_bits.S_IFREG,
    2: stat_bits.S_IFDIR,
    3: stat_bits.S_IFCHR,
    4: stat_bits.S_IFBLK,
    5: stat_bits.S_IFIFO,
    6: stat_bits.S_IFSOCK,
    7: stat_bits.S_IFLNK,
    8: 0,  # an extended attribute
}
_MODES = frozenset(_TYPES.values()) - {0}
INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2


class Name(NamedTuple):
    """A name in a directory, or of an extended attribute. `key`: of what it names; `kind`: its type, as
    st_mode has it; 0 for an attribute."""

    name: bytes
    key: tuple[int, int, int]
    kind: int
    value: bytes


def names_in(item: bytes) -> list[Name]:
    """The names in an item: more than one where their hashes are equal. Raises DamageError,
    UnsupportedError."""
    names: list[Name] = []
    at = 0
    while at < len(item):
        if at + _NAME.size > len(item):
            raise DamageError("a name ends early")
        object_, kind, offset, _transaction, value_size, name_size, type_ = _NAME.unpack_from(item, at)
        at += _NAME.size
        end = at + name_size + value_size
        if end > len(item):
            raise DamageError("a name ends early")
        type_mode = _TYPES.get(type_)
        if type_mode is None:
            if type_ & 0x80:
                raise UnsupportedError("an encrypted name is not supported")
            raise DamageError(f"a name has the impossible type {type_}")
        name = item[at : at + name_size]
        names.append(Name(name, (object_, kind, offset), type_mode, item[at + name_size : end]))
        at = end
    return names


class Inode(NamedTuple):
    """An inode. `size`: in bytes; `rdev`: as `os.makedev` returns it."""

    size: int
    links: int
    uid: int
    gid: int
    mode: int
    rdev: int
    flags: int
    mtime_ns: int


def inode_in(item: bytes) -> Inode:
    """Raises DamageError."""
    if len(item) != _INODE_SIZE:
        raise DamageError("an inode has an impossible size")
    links, uid, gid, mode, rdev, flags, seconds, nanoseconds = _INODE.unpack_from(item)
    (size,) = _SIZE.unpack_from(item)
    if mode > 0xFFFF or stat_bits.S_IFMT(mode) not in _MODES:
        raise DamageError(f"an inode has the impossible mode {mode:#o}")
    if size >= 1 << 63 or nanoseconds >= 1_000_000_000:
        raise DamageError("an inode has an impossible size or time")
    if stat_bits.S_IFMT(mode) in {stat_bits.S_IFCHR, stat_bits.S_IFBLK}:
        if rdev >= 1 << 32:
            raise DamageError("an inode has an impossible device number")
        rdev = os.makedev(rdev >> 20, rdev & 0xFFFFF)
    else:
        rdev = 0
    return Inode(size, links, uid, gid, mode, rdev, flags, seconds * 1_000_000_000 + nanoseconds)


def root_in(item: bytes) -> Root | None:
    """The root of a tree; None where the tree is being deleted. Raises DamageError."""
    if len(item) < _ROOT.size:
        raise DamageError("the root of a tree is too short")
    _directory, address, _flags, references, _drop_level, level = _ROOT.unpack_from(item)
    (generation,) = struct.unpack_from("<160xQ", item)
    if level > HIGHEST_LEVEL:
        raise DamageError(f"the root of a tree has the impossible level {level}")
    return Root(address, level, generation) if references else None


def reference_in(item: bytes) -> tuple[int, bytes]:
    """Where a subvolume is: the number of the directory, and the name in it. Raises DamageError."""
    if len(item) < _REF.size:
        raise DamageError("the reference to a subvolume is too short")
    directory, _sequence, size = _REF.unpack_from(item)
    if len(item) != _REF.size + size:
        raise DamageError("the reference to a subvolume has an impossible size")
    return directory, item[_REF.size :]


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a file, from `start` on. `length`: in the file. `inline`: its bytes, as they are stored.
    Else `address` and `stored`: the logical address and size of the whole extent, address 0 for zeros;
    `skip`: where in the decoded extent the range begins. `decoded`: how many bytes the whole extent decodes
    to."""

    start: int
    length: int
    compression: int
    decoded: int
    inline: bytes | None = None
    address: int = 0
    stored: int = 0
    skip: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


def extent_in(start: int, item: bytes, sector: int, most_compressed: int) -> Extent:
    """Raises DamageError, UnsupportedError."""
    if len(item) < _EXTENT.size:
        raise DamageError(f"the extent at byte {start} is too short")
    _generation, decoded, compression, encryption, encoding, kind = _EXTENT.unpack_from(item)
    if encryption or encoding:
        raise UnsupportedError(f"the extent at byte {start} is encrypted, which is not supported")
    if kind == INLINE:
        data = item[_EXTENT.size :]
        if start or decoded > most_compressed or (not compression and decoded != len(data)):
            raise DamageError(f"the extent at byte {start} has an impossible size")
        return Extent(0, decoded, compression, decoded, data)
    if kind not in {_REGULAR, _PREALLOCATED} or len(item) != _EXTENT.size + _PLACE.size:
        raise DamageError(f"the extent at byte {start} has an impossible type or size")
    address, stored, skip, length = _PLACE.unpack_from(item, _EXTENT.size)
    if not length or (start | address | stored | skip | length) % sector or start + length >= 1 << 64:
        raise DamageError(f"the extent at byte {start} has an impossible size")
    if not address or kind == _PREALLOCATED:
        return Extent(start, length, 0, length)
    if compression and (not stored or max(decoded, stored) > most_compressed):
        raise DamageError(f"the extent at byte {start} has an impossible size")
    if skip + length > (decoded if compression else stored):
        raise DamageError(f"the extent at byte {start} has an impossible size")
    return Extent(start, length, compression, decoded, None, address, stored, skip)
