"""The superblock of XFS: the sizes and features of a file system. Pure; used by the other modules here."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.crc32c import crc32c

MAGIC = b"XFSB"
SIZE = 512
"""Bytes that `Superblock.of` needs at least; its checksum covers a sector, up to 32 KiB."""

MOST_SECTOR = 32 << 10

_HEAD = struct.Struct(">4sIQ16x16sQQ16x4xII4xIHHHH12sBBBBB")
_FTYPE, _BIGTIME, _NREXT64, _META_UUID, _NEEDSREPAIR, _PARENT = 1, 8, 32, 4, 16, 128
_KNOWN = 0x7FF
"""All incompatible features up to zones: those that change where data is also mark the inodes."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """Sizes in bytes, or in file system blocks where the name says blocks; numbers of bits in `*_bits`.

    `meta_uuid`: what stands in metadata. `log_start`: a block number; 0 where the log is on another device.
    """

    block_size: int
    blocks: int
    uuid: bytes
    meta_uuid: bytes
    log_start: int
    log_blocks: int
    root: int
    group_blocks: int
    groups: int
    version: int
    sector_size: int
    inode_size: int
    label: bytes
    inode_bits: int
    group_bits: int
    directory_block_size: int
    has_types: bool
    log_is_v2: bool
    needs_repair: bool
    log_features: int

    @property
    def has_checksums(self) -> bool:
        return self.version == 5

    @classmethod
    def of(cls, data: bytes, *, replayed: bool = False) -> Superblock:
        """The superblock at the start of `data`, of at least SIZE bytes and the whole sector.

        `replayed`: whether the log changed it, so that its checksum is not yet right. Raises DamageError.
        """
        if len(data) < SIZE or data[:4] != MAGIC:
            raise DamageError("there is no XFS superblock")
        (_, block_size, blocks, uuid, log_start, root, group_blocks, groups, log_blocks, versions, sector) = (
            _HEAD.unpack_from(data)[:11]
        )
        inode_size, _, label, block_bits, _, inode_log, inode_bits, group_bits = _HEAD.unpack_from(data)[11:]
        version = versions & 15
        if version not in {4, 5}:
            raise UnsupportedError(f"XFS of version {version} is not supported")
        features2, _, _, _, incompatible, log_features = struct.unpack_from(">6I", data, 200)
        if version == 5:
            if sector not in {512, 1024, 2048, 4096, 8192, 16384, MOST_SECTOR} or len(data) < sector:
                raise DamageError("the superblock has a wrong sector size")
            checked = data[:224] + bytes(4) + data[228:sector]
            if not replayed and crc32c(checked) != int.from_bytes(data[224:228], "little"):
                raise DamageError("the superblock has a wrong checksum")
            if incompatible & ~_KNOWN:
                raise UnsupportedError(f"XFS with the features {incompatible & ~_KNOWN:#x} is not supported")
        else:
            incompatible = log_features = 0
            if not versions & 0x2000:
                raise UnsupportedError("XFS with directories of version 1 is not supported")
        found = cls(
            block_size,
            blocks,
            uuid,
            data[248:264] if incompatible & _META_UUID else uuid,
            log_start,
            log_blocks,
            root,
            group_blocks,
            groups,
            version,
            sector,
            inode_size,
            label.rstrip(b"\0"),
            inode_bits,
            group_bits,
            block_size << min(data[192], 16),
            bool(incompatible & _FTYPE if version == 5 else versions & 0x8000 and features2 & 0x200),
            version == 5 or bool(versions & 0x400),
            bool(incompatible & _NEEDSREPAIR),
            log_features,
        )
        found._check(block_bits, inode_log)
        return found

    def _check(self, block_bits: int, inode_log: int) -> None:
        if (
            not 9 <= block_bits <= 16
            or self.block_size != 1 << block_bits
            or not 8 <= inode_log <= 11
            or self.inode_size != 1 << inode_log
            or self.inode_bits != block_bits - inode_log
            or (self.has_checksums and self.inode_size < 512)
            or self.directory_block_size > 1 << 16
        ):
            raise DamageError("the superblock has wrong sizes")
        if (
            not 64 <= self.group_blocks <= 1 << 31
            or self.group_bits != (self.group_blocks - 1).bit_length()
            or not self.groups
            or self.blocks >= 1 << 54
            or not (self.groups - 1) * self.group_blocks < self.blocks <= self.groups * self.group_blocks
        ):
            raise DamageError("the superblock has wrong sizes of allocation groups")

    def offset_of(self, block: int, count: int = 1) -> int:
        """The byte offset of `count` blocks from the numbered one on. Raises DamageError."""
        group = block >> self.group_bits
        inside = block & ((1 << self.group_bits) - 1)
        length = self.group_blocks
        if group == self.groups - 1:
            length = self.blocks - group * self.group_blocks
        if group >= self.groups or count < 1 or inside + count > length:
            raise DamageError(f"block {block:#x} lies beyond the file system")
        return (group * self.group_blocks + inside) * self.block_size

    def inode_offset(self, number: int) -> int:
        """The byte offset of an inode. Raises DamageError."""
        if number <= 0:
            raise DamageError(f"there can be no inode {number}")
        inside = number & ((1 << self.inode_bits) - 1)
        return self.offset_of(number >> self.inode_bits) + inside * self.inode_size
