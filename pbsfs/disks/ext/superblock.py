"""The superblock of an ext file system: its geometry and features, checked before anything is sized by them.

Pure functions of bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.crc32c import crc32c

OFFSET: Final = 1024
SIZE: Final = 1024

HAS_JOURNAL: Final = 0x4
SPARSE_SUPER2: Final = 0x200

FILETYPE: Final = 0x2
RECOVER: Final = 0x4
META_BG: Final = 0x10
IS_64BIT: Final = 0x80
EA_INODE: Final = 0x400
CSUM_SEED: Final = 0x2000
LARGE_DIR: Final = 0x4000
INLINE_DATA: Final = 0x8000

SPARSE_SUPER: Final = 0x1
GDT_CSUM: Final = 0x10
METADATA_CSUM: Final = 0x400

_UNREADABLE: Final = {0x1: "compression", 0x8: "a journal device", 0x1000: "data in directories"}
"""Incompatible features that change what pbsfs reads, and that the kernel does not read either."""

_KNOWN: Final = (
    (FILETYPE | RECOVER | META_BG | IS_64BIT | EA_INODE | CSUM_SEED | LARGE_DIR | INLINE_DATA)
    | (0x40 | 0x100 | 0x200)  # extents, multiple mount protection, flexible block groups
    | (0x10000 | 0x20000)  # encryption, case folding
)

_EXT3_INCOMPAT: Final = FILETYPE | RECOVER | META_BG
_EXT3_RO_COMPAT: Final = SPARSE_SUPER | 0x2 | 0x4  # large files, B-tree directories


@dataclass(frozen=True, slots=True)
class Superblock:
    """`blocks`, `inodes`, `groups`: how many. `seed`: of the checksums of metadata, as the kernel has it."""

    block_size: int
    blocks: int
    first_block: int
    blocks_per_group: int
    inodes: int
    inodes_per_group: int
    inode_size: int
    first_inode: int
    groups: int
    descriptor_size: int
    first_meta_group: int
    backup_groups: tuple[int, int]
    compat: int
    incompat: int
    ro_compat: int
    uuid: bytes
    label: bytes
    journal_inode: int
    seed: int

    @property
    def checksums(self) -> bool:
        """Whether all metadata has CRC-32C."""
        return bool(self.ro_compat & METADATA_CSUM)

    @property
    def kind(self) -> str:
        """ext2, ext3 or ext4, by the features that only a later one has."""
        if self.incompat & ~_EXT3_INCOMPAT or self.ro_compat & ~_EXT3_RO_COMPAT:
            return "ext4"
        return "ext3" if self.compat & HAS_JOURNAL else "ext2"

    def has_backup(self, group: int) -> bool:
        """Whether a copy of the superblock is in `group`."""
        if group == 0:
            return True
        if self.compat & SPARSE_SUPER2:
            return group in self.backup_groups
        if group == 1 or not self.ro_compat & SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))


def kernel_crc(seed: int, data: bytes) -> int:
    """The kernel's crc32c(seed, data), which inverts neither before nor after."""
    return crc32c(data, seed ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def is_superblock(data: bytes) -> bool:
    """Whether `data`, SIZE bytes from OFFSET on, has the magic number and a known revision."""
    return data[56:58] == b"\x53\xef" and data[76:80] in {bytes(4), b"\1\0\0\0"}


def parse_superblock(data: bytes) -> Superblock:
    """The superblock in SIZE bytes. Raises DamageError; UnsupportedError where it needs what pbsfs does not
    read."""
    if not is_superblock(data):
        raise DamageError("the superblock has a wrong magic number or revision")
    dynamic = data[76] == 1
    incompat, ro_compat = struct.unpack_from("<II", data, 96) if dynamic else (0, 0)
    compat = int.from_bytes(data[92:96], "little") if dynamic else 0
    _check_features(data, incompat, ro_compat)
    inodes, blocks, _, _, _, first_block, log_size = struct.unpack_from("<7I", data, 0)
    blocks_per_group, clusters_per_group, inodes_per_group = struct.unpack_from("<3I", data, 32)
    if incompat & IS_64BIT:
        blocks |= int.from_bytes(data[336:340], "little") << 32
    first_inode, inode_size = struct.unpack_from("<IH", data, 84) if dynamic else (11, 128)
    descriptor_size = int.from_bytes(data[254:256], "little") if incompat & IS_64BIT else 32
    if log_size > 6:
        raise DamageError("the superblock has a wrong block size")
    block_size = 1024 << log_size
    if not 128 <= inode_size <= block_size or inode_size & inode_size - 1:
        raise DamageError("the superblock has a wrong inode size")
    if not 32 <= descriptor_size <= block_size or descriptor_size & descriptor_size - 1:
        raise DamageError("the superblock has a wrong size of group descriptors")
    if incompat & IS_64BIT and descriptor_size < 64:
        raise DamageError("the superblock has a wrong size of group descriptors")
    if not 0 < clusters_per_group <= block_size * 8 or not clusters_per_group <= blocks_per_group:
        raise DamageError("the superblock has a wrong number of blocks per group")
    if not 0 < inodes_per_group <= block_size * 8 or first_block >= blocks or first_block > 1:
        raise DamageError("the superblock has a wrong number of blocks or inodes")
    groups = -(-(blocks - first_block) // blocks_per_group)
    if not 0 < inodes <= groups * inodes_per_group:
        raise DamageError("the superblock has a wrong number of inodes")
    uuid = data[104:120]
    seed = int.from_bytes(data[624:628], "little") if incompat & CSUM_SEED else kernel_crc(0xFFFFFFFF, uuid)
    return Superblock(
        block_size=block_size,
        blocks=blocks,
        first_block=first_block,
        blocks_per_group=blocks_per_group,
        inodes=inodes,
        inodes_per_group=inodes_per_group,
        inode_size=inode_size,
        first_inode=first_inode,
        groups=groups,
        descriptor_size=descriptor_size,
        first_meta_group=int.from_bytes(data[260:264], "little"),
        backup_groups=struct.unpack_from("<II", data, 588),
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        uuid=uuid,
        label=data[120:136].split(b"\0")[0],
        journal_inode=int.from_bytes(data[224:228], "little"),
        seed=seed,
    )


def _check_features(data: bytes, incompat: int, ro_compat: int) -> None:
    """Checks the checksum, if there is one, and that all features are known. Raises as `parse_superblock`."""
    if ro_compat & METADATA_CSUM:
        if data[373] != 1:
            raise UnsupportedError(f"the checksum type {data[373]} of the file system is not supported")
        if kernel_crc(0xFFFFFFFF, data[:1020]) != int.from_bytes(data[1020:], "little"):
            raise DamageError("the superblock has a wrong checksum")
    for feature, what in _UNREADABLE.items():
        if incompat & feature:
            raise UnsupportedError(f"an ext4 file system with {what} is not supported")
    if incompat & ~_KNOWN:
        raise UnsupportedError(f"the ext4 feature 0x{incompat & ~_KNOWN:x} is not supported")


def _is_power(number: int, base: int) -> bool:
    power = base
    while power < number:
        power *= base
    return power == number
