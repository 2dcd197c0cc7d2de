"""Links, devices and pipes as Linux and Interix store them: system files with data that says what they are.

Layout: ntfs-3g's `layout.h`, INTX_FILE. Pure functions.
"""

from __future__ import annotations

import os
import stat
import struct

from pbsfs.disks.ntfs.reparse import utf8

MOST = 8 + 2 * 32768
"""Bytes of such a file: a target of 32,768 letters."""

_LINK = b"IntxLNK\1"
_DEVICES = {b"IntxCHR\0": stat.S_IFCHR, b"IntxBLK\0": stat.S_IFBLK}
_DEVICE = struct.Struct("<QQ")


def read_special(data: bytes) -> tuple[int, bytes | None, int] | None:
    """The type as in st_mode, the target of a link, and the number of a device; None for an ordinary file.

    `data`: all of a system file, from 0 to MOST bytes.
    """
    if len(data) == 0:
        return stat.S_IFIFO, None, 0
    if len(data) == 1:
        return stat.S_IFSOCK, None, 0
    if data.startswith(_LINK) and len(data) > 8 and len(data) % 2 == 0:
        target = utf8(data[8:])
        return None if b"\0" in target else (stat.S_IFLNK, target, 0)
    kind = _DEVICES.get(data[:8])
    if kind is not None and len(data) == 8 + _DEVICE.size:
        major, minor = _DEVICE.unpack_from(data, 8)
        if major < 1 << 12 and minor < 1 << 20:
            return kind, None, os.makedev(major, minor)
    return None
