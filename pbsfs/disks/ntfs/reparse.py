"""Reparse points: links of Windows and WSL, and files whose bytes are elsewhere or in another form.

Layout: [MS-FSCC] 2.1.2; the tags of WSL as Linux and ntfs-3g read them. Pure functions.
"""

from __future__ import annotations

import stat
import struct
from types import MappingProxyType

from pbsfs.base.errors import DamageError, UnsupportedError

MOUNT_POINT = 0xA0000003
SYMLINK = 0xA000000C
LX_SYMLINK = 0xA000001D
AF_UNIX = 0x80000023
LX_FIFO = 0x80000024
LX_CHR = 0x80000025
LX_BLK = 0x80000026
WOF = 0x80000017
CLOUD = 0x9000001A
CLOUD_MASK = 0xFFFF0FFF
ONEDRIVE = 0x80000021

MOST = 64 << 10
"""Bytes of a reparse point; Windows makes up to 16 KiB."""

TYPES = MappingProxyType({AF_UNIX: stat.S_IFSOCK, LX_FIFO: stat.S_IFIFO})
"""By tag: the type of a file, as in st_mode."""

LINKS = frozenset({MOUNT_POINT, SYMLINK, LX_SYMLINK})

UNSUPPORTED = MappingProxyType(
    {
        0x80000007: "single-instance storage",
        0x80000008: "a WIM image",
        0x80000013: "data deduplication",
        0x80000014: "NFS",
        0x80000018: "Windows containers",
        0x8000001B: "an alias of an app",
        0x8000001E: "Azure File Sync",
        0x80000006: "hierarchical storage",
        0x9000001C: "a projected file system",
        0x90001018: "Windows containers",
        0xC0000004: "hierarchical storage",
        LX_CHR: "a device of WSL",
        LX_BLK: "a device of WSL",
        WOF: "compression by Windows (WOF)",
    }
)
"""By tag: what has the bytes of the file, instead of its own data."""

_HEADER = struct.Struct("<IHH")
_NAMES = struct.Struct("<HHHH")
_WSL = struct.Struct("<I")


def is_cloud(tag: int) -> bool:
    """Whether a file may be at a provider, such as OneDrive."""
    return tag & CLOUD_MASK == CLOUD or tag == ONEDRIVE


def read_tag(value: bytes) -> int:
    if len(value) < _HEADER.size:
        raise DamageError("its reparse point is damaged")
    tag: int = _HEADER.unpack_from(value)[0]
    return tag


def read_target(value: bytes) -> bytes:
    """The target of a link. Of Windows: with slashes, without `\\??\\`, as UTF-8."""
    tag, size, _reserved = _HEADER.unpack_from(value)
    data = value[_HEADER.size : _HEADER.size + size]
    if len(data) < size or size < 8:
        raise DamageError("its reparse point is damaged")
    if tag == LX_SYMLINK:
        if _WSL.unpack_from(data)[0] != 2:
            raise UnsupportedError("a link of WSL of another version than 2 is not supported")
        target = data[4:]
    else:
        offset, length, _print_offset, _print_length = _NAMES.unpack_from(data)
        offset += 12 if tag == SYMLINK else 8
        if length & 1 or offset + length > len(data):
            raise DamageError("its reparse point is damaged")
        target = utf8(data[offset : offset + length]).replace(b"\\", b"/")
        if target.startswith((b"/??/UNC/", b"/??/unc/")):
            target = b"//" + target[8:]
        target = target.removeprefix(b"/??/")
    if not target or b"\0" in target:
        raise DamageError("its reparse point is damaged")
    return target


def utf8(name: bytes) -> bytes:
    """UTF-16 as UTF-8; a surrogate without its other half as its three bytes (WTF-8)."""
    return name.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
