"""The block groups of an ext file system: where the inodes are.

Of one thread. Descriptors are read when one of their inodes is, so that their number costs nothing.
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.blocks import Blocks
from pbsfs.disks.ext.superblock import GDT_CSUM, META_BG, Superblock, kernel_crc

GROUPS_KEPT: Final = 16_384


class Groups:
    """Where the inodes are that `superblock` counts."""

    def __init__(self, superblock: Superblock, blocks: Blocks) -> None:
        self._superblock = superblock
        self._blocks = blocks
        self._table = functools.lru_cache(GROUPS_KEPT)(self._read)

    def place(self, inode: int) -> tuple[int, int]:
        """Where an inode is: the number of a block, and the offset in it. Raises DamageError."""
        geometry = self._superblock
        if not 1 <= inode <= geometry.inodes:
            raise DamageError(f"inode {inode}: the file system has {geometry.inodes} inodes")
        group, index = divmod(inode - 1, geometry.inodes_per_group)
        block, offset = divmod(index * geometry.inode_size, geometry.block_size)
        return self._table(group) + block, offset

    def _read(self, group: int) -> int:
        """The first block of a group's inodes. Raises DamageError."""
        geometry = self._superblock
        size = geometry.descriptor_size
        number, index = divmod(group, geometry.block_size // size)
        raw = self._blocks.read(self._descriptor_block(number))[index * size : (index + 1) * size]
        self._verify(group, raw)
        table = int.from_bytes(raw[8:12], "little")
        if size >= 64:
            table |= int.from_bytes(raw[40:44], "little") << 32
        length = -(-geometry.inodes_per_group * geometry.inode_size // geometry.block_size)
        if not geometry.first_block < table <= geometry.blocks - length:
            raise DamageError(f"group {group}: its inodes lie beyond the file system")
        return table

    def _descriptor_block(self, number: int) -> int:
        """ext4_super.c, descriptor_loc: with meta_bg, each block of descriptors is in a group that it
        describes."""
        geometry = self._superblock
        if not geometry.incompat & META_BG or number < geometry.first_meta_group:
            return (geometry.block_size == 1024) + number + 1
        group = geometry.block_size // geometry.descriptor_size * number
        after = int(geometry.has_backup(group))
        if geometry.block_size == 1024 and number == 0 and geometry.first_block == 0:
            after += 1
        return geometry.first_block + group * geometry.blocks_per_group + after

    def _verify(self, group: int, raw: bytes) -> None:
        geometry = self._superblock
        numbered = struct.pack("<I", group)
        stored = int.from_bytes(raw[30:32], "little")
        if geometry.checksums:
            wanted = kernel_crc(geometry.seed, numbered + raw[:30] + bytes(2) + raw[32:]) & 0xFFFF
        elif geometry.ro_compat & GDT_CSUM:
            wanted = _crc16(geometry.uuid + numbered + raw[:30] + raw[32:])
        else:
            return
        if stored != wanted:
            raise DamageError(f"group {group}: its descriptor has a wrong checksum")


def _crc16(data: bytes) -> int:
    """lib/crc16.c: x^16 + x^15 + x^2 + 1, reflected, from all ones."""
    state = 0xFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0xA001 if state & 1 else 0)
    return state
