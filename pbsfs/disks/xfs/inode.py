"""An inode of XFS: its fields, and its forks. Pure; used by the other modules here."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import FILE_TYPES

DEVICE, LOCAL, LIST, TREE = 0, 1, 2, 3
"""Formats of a fork: a device number, bytes, a list of extents, a tree of extents."""

_CORE = struct.Struct(">2xHBBHIII4xQ8xiI8xQ12xIHBB6xH")
_LEGACY_EPOCH = 1 << 31
_REALTIME = 1
_BIGTIME, _LARGE_COUNTS = 8, 16


class Fork(NamedTuple):
    """`data`: the bytes in the inode. `extents`: how many it has."""

    format: int
    data: bytes
    extents: int


class Inode(NamedTuple):
    number: int
    mode: int
    uid: int
    gid: int
    links: int
    mtime_ns: int
    size: int
    data: Fork
    attributes: Fork | None
    is_realtime: bool

    @property
    def rdev(self) -> int:
        device = int.from_bytes(self.data.data[:4], "big")
        return os.makedev(device >> 18, device & 0x3FFFF)


def decoded(number: int, raw: bytes) -> Inode:
    """The inode in `raw`, the bytes of the whole inode. Raises DamageError."""
    (
        mode,
        version,
        form,
        old_links,
        uid,
        gid,
        links,
        large,
        seconds,
        nanoseconds,
        size,
        extents,
        others,
        split,
        other_form,
        flags,
    ) = _CORE.unpack_from(raw)
    if mode & 0xF000 not in FILE_TYPES:
        raise DamageError("it is free" if not mode else f"it has the unknown mode {mode:#o}")
    core, flags2 = 100, 0
    if version == 3:
        core = 176
        flags2 = int.from_bytes(raw[120:128], "big")
    elif version == 1:
        links = old_links
    elif version != 2:
        raise DamageError(f"it has the unknown version {version}")
    if flags2 & _LARGE_COUNTS:
        extents, others = large, extents
    if flags2 & _BIGTIME:
        mtime = ((seconds & 0xFFFFFFFF) << 32 | nanoseconds) - _LEGACY_EPOCH * 10**9
    elif nanoseconds >= 10**9:
        raise DamageError("it has a wrong time")
    else:
        mtime = seconds * 10**9 + nanoseconds
    if size >> 63:
        raise DamageError("it has a wrong size")
    end = core + split * 8 if split else len(raw)
    if end > len(raw):
        raise DamageError("its forks do not fit into it")
    attributes = Fork(other_form, raw[end:], others) if split else None
    data = Fork(form, raw[core:end], extents)
    return Inode(number, mode, uid, gid, links, mtime, size, data, attributes, bool(flags & _REALTIME))
