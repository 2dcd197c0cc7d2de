"""Sets of directory entries in exFAT: the first says what a file is, the second where it lies, the others its
name.

Source: Microsoft's "exFAT file system specification".
"""

from __future__ import annotations

import functools
import struct

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry
from pbsfs.disks.fat.common import DIRECTORY, ITEM, mode_of
from pbsfs.disks.fat.names import dos_time, utf16_name

FILE, STREAM, NAME, LABEL = 0x85, 0xC0, 0xC1, 0x83
"""Kinds of directory entries."""

IN_USE, SECONDARY, BENIGN = 0x80, 0x40, 0x20
"""Bits of a kind. A benign one need not be known to read the directory."""

MOST_DIRECTORY = 256 << 20
"""Bytes of a directory, as the specification says."""

_UNITS = 15
"""UTF-16 units of a name in an entry."""

_FIRST = struct.Struct("<BBHH6xI5xBxB")
_STREAM = struct.Struct("<BBxB4xQ4xIQ")

_SIZED, _NO_CHAIN = 0x01, 0x02


@functools.lru_cache(maxsize=32768)
def checksum(data: bytes) -> int:
    """Of a set, as its first entry says it. Cached: `names` and then `inode` ask for that of each set."""
    total = 0
    for byte in data[:2] + data[4:]:
        total = (total >> 1 | (total & 1) << 15) + byte & 0xFFFF
    return total


def check(data: bytes) -> None:
    """Raises DamageError where a set is not whole."""
    entries = len(data) // ITEM
    if data[0] != FILE or not 3 <= entries <= 19 or data[1] != entries - 1:
        raise DamageError("the directory entries of a file are not whole")
    if data[2] | data[3] << 8 != checksum(data):
        raise DamageError("the checksum of a directory entry is wrong")
    names = -(-data[ITEM + 3] // _UNITS)
    if data[ITEM] != STREAM or not 1 <= names <= entries - 2:
        raise DamageError("the directory entries of a file are not whole")
    if data[2 * ITEM : (2 + names) * ITEM : ITEM] != bytes([NAME]) * names:
        raise DamageError("the directory entries of a file are not whole")


def name_of(data: bytes) -> bytes:
    """The name that a set says, in UTF-8. `data`: checked."""
    length = data[ITEM + 3]
    units = b"".join([data[at + 2 : at + ITEM] for at in range(2 * ITEM, len(data), ITEM)])
    return utf16_name(units[: length * 2])


def is_directory(data: bytes) -> bool:
    return bool(data[4] & DIRECTORY)


def entry_of(data: bytes, number: int, cluster_size: int) -> Entry:
    """The entry that a set says, with an empty name. `data`: checked. Its `hint` is twice its first cluster,
    and 1 more where its clusters have no chain; its `end`: of a directory, how many bytes it has; of a file,
    how many of them were written. Raises DamageError where the fields cannot be."""
    _kind, _count, _checksum, attributes, modified, hundredths, zone = _FIRST.unpack_from(data)
    _kind, flags, _length, valid, first, size = _STREAM.unpack_from(data, ITEM)
    mtime = dos_time(modified >> 16, modified & 0xFFFF) + hundredths * 10_000_000
    if zone & 0x80:  # quarters of an hour ahead of UTC, in 7 bits with a sign
        mtime -= ((zone & 0x7F ^ 0x40) - 0x40) * 900 * 1_000_000_000
    if valid > size or size >= 1 << 63 or bool(first) != bool(size) or (first and not flags & _SIZED):
        raise DamageError("its sizes and its first cluster do not belong together")
    hint = first << 1 | (1 if flags & _NO_CHAIN else 0)
    if attributes & DIRECTORY:
        if size != valid or size % cluster_size or size > MOST_DIRECTORY:
            raise DamageError(f"a directory cannot have {size} bytes")
        return Entry(b"", mode_of(attributes), mtime_ns=mtime, inode=number, hint=hint, end=size)
    return Entry(b"", mode_of(attributes), mtime_ns=mtime, size=size, inode=number, hint=hint, end=valid)
