"""An inode of an ext file system: its fields, from its bytes. Pure functions."""

from __future__ import annotations

import os
import stat as stat_bits
import struct
from typing import Final, NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import FILE_TYPES
from pbsfs.disks.ext.superblock import IS_64BIT, LARGE_DIR, Superblock, kernel_crc

ROOT: Final = 2

ENCRYPTED: Final = 0x800
INDEXED: Final = 0x1000
EXTENTS: Final = 0x80000
XATTR_VALUE: Final = 0x200000
INLINE: Final = 0x10000000

_FIELDS: Final = struct.Struct("<HHIIIiIHHII4x60sIII4xHHHH")
"""linux2 in struct ext4_inode: mode, uid, size, atime, ctime, mtime, dtime, gid, links, blocks, flags, the
map, generation, low file_acl, high size, then high blocks, high file_acl, high uid, high gid."""

_SEED: Final = struct.Struct("<II")

GENERATION: Final = 100
"""Where the generation is, of four bytes."""

CHECKSUM: Final = (124, 125, 130, 131)
"""Where the bytes of the checksum are, the lowest first."""


class Inode(NamedTuple):
    """`map`: 60 bytes that hold extents, a block map, a link's target, or data. `xattrs`: the bytes after the
    fields, for extended attributes. `xattr_block`: 0 where there is none. `base`: the seed of all
    checksums of the file system."""

    number: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    links: int
    flags: int
    generation: int
    atime: int
    map: bytes
    xattrs: bytes
    xattr_block: int
    base: int

    @property
    def seed(self) -> int:
        """The seed of the checksums of what belongs to this inode."""
        return kernel_crc(self.base, _SEED.pack(self.number, self.generation))

    @property
    def rdev(self) -> int:
        """As the kernel decodes it: an old form of 16 bits, or a new one of 32 (linux/kdev_t.h)."""
        old, new = struct.unpack_from("<II", self.map, 0)
        if old:
            return os.makedev(old >> 8 & 0xFF, old & 0xFF)
        return os.makedev(new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00)


def parse_inode(superblock: Superblock, number: int, raw: bytes, *, verified: bool = False) -> Inode:
    """The inode `number` in its `raw` bytes. `verified`: whether its checksum of 32 bits was found to be
    right. Raises DamageError."""
    fields = _FIELDS.unpack_from(raw, 0)
    mode, uid, size, atime, _, seconds, _, gid, links, _, flags, block_map, generation = fields[:13]
    xattr_block, size_high, _, xattr_block_high, uid_high, gid_high = fields[13:]
    extra = 0
    if len(raw) > 128:
        extra = raw[128] | raw[129] << 8
        if extra % 4 or 128 + extra > len(raw):
            raise DamageError(f"inode {number}: its fields are longer than it is")
    if superblock.checksums and not (verified and extra >= 4):
        seed = kernel_crc(superblock.seed, _SEED.pack(number, generation))
        _verify(number, raw, extra, seed)
    if extra >= 12:
        more = int.from_bytes(raw[136:140], "little")
        mtime_ns = (seconds + ((more & 3) << 32)) * 1_000_000_000 + (more >> 2)
    else:
        mtime_ns = seconds * 1_000_000_000
    kind = stat_bits.S_IFMT(mode)
    if kind == stat_bits.S_IFREG or superblock.incompat & LARGE_DIR:
        size |= size_high << 32
    if superblock.incompat & IS_64BIT:
        xattr_block |= xattr_block_high << 32
    return Inode._make(
        (
            number,
            mode,
            uid | uid_high << 16,
            gid | gid_high << 16,
            mtime_ns,
            size,
            links,
            flags,
            generation,
            atime,
            block_map,
            raw[128 + extra :] if extra else b"",
            xattr_block,
            superblock.seed,
        )
    )


def check_named(superblock: Superblock, inode: Inode) -> None:
    """Raises DamageError where `inode` cannot be what a name stands for."""
    if inode.number < superblock.first_inode and inode.number != ROOT:
        raise DamageError(f"inode {inode.number}: it is reserved, but has a name")
    if not inode.links or stat_bits.S_IFMT(inode.mode) not in FILE_TYPES:
        raise DamageError(f"inode {inode.number}: it is not in use, but has a name")
    if inode.size >= 1 << 63:
        raise DamageError(f"inode {inode.number}: its size is not valid")


def _verify(number: int, raw: bytes, extra: int, seed: int) -> None:
    """ext4_inode_csum: over the inode with zeros in the place of the checksum's halves."""
    stored = raw[124] | raw[125] << 8
    if extra >= 4:
        stored |= (raw[130] | raw[131] << 8) << 16
        wrong = kernel_crc(seed, raw[:124] + b"\0\0" + raw[126:130] + b"\0\0" + raw[132:]) ^ stored
    else:
        wrong = (kernel_crc(seed, raw[:124] + b"\0\0" + raw[126:]) ^ stored) & 0xFFFF
    if wrong:
        raise DamageError(f"inode {number}: it has a wrong checksum")
