"""The boot region of exFAT: where the parts of the volume lie.

Source: Microsoft's "exFAT file system specification". The region has a checksum; where the first one is
damaged, its backup is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume

MAGIC = b"EXFAT   "

_BOOT = struct.Struct("<3x8s53s8xQIIIIIIHHBBB")
_SECTORS = 11
"""What the checksum covers; it fills the sector after them."""

_CHANGING = (106, 107, 112)
"""Bytes of the first sector that the checksum leaves out: the volume's flags, and how full it is."""

ACTIVE, DIRTY = 0x01, 0x02
"""Flags of the volume: the second table counts; it was not unmounted."""


@dataclass(frozen=True, slots=True)
class ExBoot:
    """All places and sizes are in bytes of the volume. `root`: the root directory's first cluster. `backup`:
    whether the first boot region is damaged, and this is the second."""

    cluster_size: int
    clusters: int
    table: int
    start: int
    root: int
    serial: int
    flags: int
    backup: bool


def looks_like_exfat(volume: Volume) -> bool:
    """Raises DamageError where the boot sector cannot be read."""
    return volume.size >= 512 and volume.read(0, 512)[3:11] == MAGIC


def read_exboot(volume: Volume) -> ExBoot:
    """Raises DamageError where neither region is whole."""
    try:
        return _region(volume, 0)
    except DamageError:
        for sector_size in (512, 1024, 2048, 4096):
            try:
                return _region(volume, 12 * sector_size)
            except DamageError:
                continue
        raise


def _region(volume: Volume, offset: int) -> ExBoot:
    (
        magic,
        zeros,
        _length,
        table,
        table_length,
        start,
        clusters,
        root,
        serial,
        revision,
        flags,
        sector_shift,
        cluster_shift,
        tables,
    ) = _BOOT.unpack_from(volume.read(offset, 512))
    if magic != MAGIC or any(zeros):
        raise DamageError("there is no boot sector of exFAT")
    if not 9 <= sector_shift <= 12 or cluster_shift > 25 - sector_shift:
        raise DamageError("the boot sector has a size of sectors or clusters that cannot be")
    sector_size = 1 << sector_shift
    if offset not in (0, 12 * sector_size):
        raise DamageError("the backup of the boot sector is of another volume")
    region = volume.read(offset, (_SECTORS + 1) * sector_size)
    expected = checksum(region[: _SECTORS * sector_size]).to_bytes(4, "little")
    if region[_SECTORS * sector_size :] != expected * (sector_size // 4):
        raise DamageError("the checksum of the boot sector is wrong")
    if revision >> 8 != 1:
        raise DamageError(f"exFAT of version {revision >> 8} is not known")
    active = 1 if flags & ACTIVE else 0
    if tables not in (1, 2) or active >= tables:
        raise DamageError(f"table {active} of {tables} is said to count")
    if not 1 <= clusters <= 0xFFFFFFF5 or (clusters + 2) * 4 > table_length * sector_size:
        raise DamageError("the table has no room for the clusters")
    return ExBoot(
        cluster_size=sector_size << cluster_shift,
        clusters=clusters,
        table=(table + active * table_length) * sector_size,
        start=start * sector_size,
        root=root,
        serial=serial,
        flags=flags,
        backup=offset != 0,
    )


def checksum(sectors: bytes) -> int:
    """Of the 11 sectors of a boot region."""
    total = 0
    for at, byte in enumerate(sectors):
        if at not in _CHANGING:
            total = (total >> 1 | (total & 1) << 31) + byte & 0xFFFFFFFF
    return total
