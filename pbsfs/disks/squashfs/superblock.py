"""The superblock of squashfs: where its tables are. Pure; used by the other modules here."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError

MAGIC = b"hsqs"
SIZE = 96
NOWHERE = (1 << 64) - 1
"""The place of a table that there is not."""

_FORM = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
_MOST_BLOCK_BITS = 20


@dataclass(frozen=True, slots=True)
class Superblock:
    """Places are bytes of the volume; NOWHERE for a table that is missing.

    `root`: a reference to an inode: the place of its metadata block in the table, shifted left by 16 bits,
    and the place in that block. `made`: seconds since the epoch.
    """

    inodes: int
    made: int
    block_size: int
    fragments: int
    compressor: int
    ids: int
    root: int
    size: int
    id_table: int
    xattr_table: int
    inode_table: int
    directory_table: int
    fragment_table: int

    @classmethod
    def of(cls, data: bytes) -> Superblock:
        """Raises DamageError, UnsupportedError."""
        if len(data) < SIZE or data[:4] != MAGIC:
            raise DamageError("there is no squashfs superblock")
        (_, inodes, made, block_size, fragments, compressor, bits, _flags, ids, major, minor, root, size) = (
            _FORM.unpack_from(data)[:13]
        )
        id_table, xattr_table, inode_table, directory_table, fragment_table, _export = _FORM.unpack_from(
            data
        )[13:]
        if major != 4:
            raise UnsupportedError(f"squashfs of version {major}.{minor} is not supported")
        if not 12 <= bits <= _MOST_BLOCK_BITS or block_size != 1 << bits or not ids or not inodes:
            raise DamageError("the superblock has wrong sizes")
        if not SIZE <= inode_table < directory_table <= size or id_table >= size:
            raise DamageError("the superblock has wrong places of tables")
        return cls(
            inodes,
            made,
            block_size,
            fragments,
            compressor,
            ids,
            root,
            size,
            id_table,
            xattr_table,
            inode_table,
            directory_table,
            fragment_table,
        )
