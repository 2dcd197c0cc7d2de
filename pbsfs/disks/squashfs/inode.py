"""An inode of squashfs, decoded. Pure but for reading metadata; used by `reader`."""

from __future__ import annotations

import os
import stat as stat_bits
import struct
from typing import NamedTuple

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.squashfs.metadata import Cursor, Metadata

NONE = 0xFFFFFFFF
"""Of `fragment` and `xattrs`: there is none."""

MOST_BLOCKS = 1 << 20
"""Blocks of a file."""

_HEAD = struct.Struct("<HHHHII")
_DIRECTORY, _LONG_DIRECTORY = struct.Struct("<IIHHI"), struct.Struct("<IIIIHHI")
_FILE, _LONG_FILE = struct.Struct("<IIII"), struct.Struct("<QQQIIII")
_LINK, _DEVICE = struct.Struct("<II"), struct.Struct("<II")
_MOST_TARGET = 4096
_LONG = 7
"""Between the number of a type and that of its long form, which has xattrs."""

KINDS = (
    0,
    stat_bits.S_IFDIR,
    stat_bits.S_IFREG,
    stat_bits.S_IFLNK,
    stat_bits.S_IFBLK,
    stat_bits.S_IFCHR,
    stat_bits.S_IFIFO,
    stat_bits.S_IFSOCK,
)
"""By the type of an inode or a name: as in st_mode."""


class Inode(NamedTuple):
    """`uid`, `gid`: rows of the table of these. `start`: of a file, the byte of its first block; of a
    directory, the metadata block of its names, in their table. `offset`: of its end in its fragment, or of
    the names in that block. `sizes`: where the sizes of its blocks are. `xattrs`: a row of their table."""

    mode: int
    uid: int
    gid: int
    mtime: int
    links: int = 1
    size: int = 0
    start: int = 0
    offset: int = 0
    fragment: int = NONE
    xattrs: int = NONE
    rdev: int = 0
    target: bytes | None = None
    sizes: tuple[int, int] = (0, 0)


def inode_at(metadata: Metadata, place: int, offset: int) -> Inode:
    """The inode at `offset` of the metadata block at `place`. Raises DamageError, UnsupportedError."""
    cursor = metadata.at(place, offset)
    kind, mode, uid, gid, mtime, _ = _HEAD.unpack(cursor.read(_HEAD.size))
    is_long = kind > _LONG
    if not 0 < kind <= 2 * _LONG:
        raise DamageError(f"the unknown type {kind}")
    type_ = KINDS[kind - _LONG if is_long else kind]
    inode = Inode(type_ | mode & 0o7777, uid, gid, mtime)
    if type_ == stat_bits.S_IFDIR:
        return _directory(cursor, inode, is_long)
    if type_ == stat_bits.S_IFREG:
        return _file(cursor, inode, is_long)
    if type_ == stat_bits.S_IFLNK:
        links, length = _LINK.unpack(cursor.read(_LINK.size))
        if not 0 < length <= _MOST_TARGET:
            raise DamageError("its target has a wrong length")
        target = cursor.read(length)
        if b"\0" in target:
            raise DamageError("its target contains NUL")
        inode = inode._replace(links=links, size=length, target=target)
    elif type_ in {stat_bits.S_IFBLK, stat_bits.S_IFCHR}:
        links, device = _DEVICE.unpack(cursor.read(_DEVICE.size))
        rdev = os.makedev((device & 0xFFF00) >> 8, device & 0xFF | device >> 12 & 0xFFF00)
        inode = inode._replace(links=links, rdev=rdev)
    else:
        inode = inode._replace(links=_number(cursor))
    return inode._replace(xattrs=_number(cursor)) if is_long else inode


def _number(cursor: Cursor) -> int:
    return int.from_bytes(cursor.read(4), "little")


def _directory(cursor: Cursor, inode: Inode, is_long: bool) -> Inode:
    if is_long:
        raw = _LONG_DIRECTORY.unpack(cursor.read(_LONG_DIRECTORY.size))
        links, size, start, _parent, _indexes, offset, xattrs = raw
    else:
        start, links, size, offset, _parent = _DIRECTORY.unpack(cursor.read(_DIRECTORY.size))
        xattrs = NONE
    return inode._replace(links=links, size=size, start=start, offset=offset, xattrs=xattrs)


def _file(cursor: Cursor, inode: Inode, is_long: bool) -> Inode:
    if is_long:
        raw = _LONG_FILE.unpack(cursor.read(_LONG_FILE.size))
        start, size, _sparse, links, fragment, offset, xattrs = raw
    else:
        start, fragment, offset, size = _FILE.unpack(cursor.read(_FILE.size))
        links, xattrs = 1, NONE
    if size >= 1 << 63:
        raise DamageError("its size is impossible")
    return inode._replace(
        links=links,
        size=size,
        start=start,
        fragment=fragment,
        offset=offset,
        xattrs=xattrs,
        sizes=(cursor.place, cursor.offset),
    )


def block_sizes(metadata: Metadata, inode: Inode, block_size: int) -> list[int]:
    """The sizes of a file's blocks, as they are stored. Raises DamageError, UnsupportedError."""
    count = inode.size // block_size
    if inode.fragment == NONE and inode.size % block_size:
        count += 1
    if count > MOST_BLOCKS:
        raise UnsupportedError(f"a file of more than {MOST_BLOCKS} blocks is not supported")
    return list(struct.unpack(f"<{count}I", metadata.at(*inode.sizes).read(4 * count)))
