"""The extended attributes of squashfs: a table of lists, of names and values. Of one thread."""

from __future__ import annotations

import struct

from pbsfs.base.errors import DamageError
from pbsfs.disks.squashfs.metadata import Cursor, Metadata
from pbsfs.disks.squashfs.superblock import NOWHERE, Superblock
from pbsfs.disks.volume import Volume

_HEAD, _ROW = struct.Struct("<QI4x"), struct.Struct("<QII")
_NAME, _VALUE = struct.Struct("<HH"), struct.Struct("<I")
_PREFIXES = (b"user.", b"trusted.", b"security.")
_ELSEWHERE = 0x100
_MOST = 4096
_MOST_NAME, _MOST_VALUE = 255, 64 << 10
"""What a program can read of an attribute at most (linux/limits.h)."""


class Xattrs:
    """The attributes of all inodes of a file system."""

    def __init__(self, volume: Volume, superblock: Superblock, metadata: Metadata) -> None:
        """Raises DamageError."""
        self._metadata = metadata
        self._start = self._count = 0
        self._places: list[int] = []
        if superblock.xattr_table != NOWHERE:
            head = volume.read(superblock.xattr_table, _HEAD.size)
            self._start, self._count = _HEAD.unpack(head)
            self._places = metadata.places(superblock.xattr_table + _HEAD.size, self._count, _ROW.size)

    def of(self, number: int) -> dict[bytes, bytes]:
        """Those in the row `number`. Raises DamageError."""
        if number >= self._count:
            raise DamageError(f"there are no extended attributes {number}")
        reference, count, _size = _ROW.unpack(self._metadata.entry(self._places, number, _ROW.size))
        if count > _MOST:
            raise DamageError("it has too many extended attributes")
        found: dict[bytes, bytes] = {}
        cursor = self._at(reference)
        for _ in range(count):
            kind, length = _NAME.unpack(cursor.read(_NAME.size))
            prefix = kind & 0xFF
            if prefix >= len(_PREFIXES) or length > _MOST_NAME:
                raise DamageError("an extended attribute has an unknown form")
            name = _PREFIXES[prefix] + cursor.read(length)
            value = self._value(cursor)
            if kind & _ELSEWHERE:
                value = self._value(self._at(int.from_bytes(value[:8], "little")))
            if b"\0" in name or name in found:
                raise DamageError("the name of an extended attribute is there twice, or contains NUL")
            found[name] = value
        return found

    def _at(self, reference: int) -> Cursor:
        return self._metadata.at(self._start + (reference >> 16), reference & 0xFFFF)

    @staticmethod
    def _value(cursor: Cursor) -> bytes:
        (size,) = _VALUE.unpack(cursor.read(_VALUE.size))
        if size > _MOST_VALUE:
            raise DamageError("an extended attribute is too long")
        return cursor.read(size)
