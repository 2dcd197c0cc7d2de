"""The boot sector of FAT12, FAT16 and FAT32: where the parts of the volume lie.

Source: Microsoft's "FAT File System Specification". Which of the three it is, pbsfs decides as Linux does: by
the field that only FAT32 leaves empty, then by the number of clusters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume

_BOOT = struct.Struct("<3x8xHBHBHHBHHHII")
_FAT32 = struct.Struct("<36xIHHIHH12x")
_EXTENDED = struct.Struct("<BBBI11s")
"""The drive, flags, a signature, the serial number, and the label."""

SIGNATURE = b"\x55\xaa"


@dataclass(frozen=True, slots=True)
class Boot:
    """`bits`: of an item of the table, 28 for FAT32. All places and sizes are in bytes of the volume. `root`:
    the root directory's first cluster; 0 where it lies at `root_start` with `root_size` bytes."""

    bits: int
    cluster_size: int
    clusters: int
    table: int
    start: int
    root: int
    root_start: int
    root_size: int
    serial: int | None
    label: bytes
    dirty: bool


def looks_like_fat(volume: Volume) -> bool:
    """Whether a boot sector's fields make sense, and there is its signature. Raises DamageError where it
    cannot be read."""
    if volume.size < 512:
        return False
    sector = volume.read(0, 512)
    if sector[510:] != SIGNATURE or sector[0] not in (0xEB, 0xE9):
        return False
    try:
        _geometry(sector)
    except DamageError:
        return False
    return True


def read_boot(volume: Volume) -> Boot:
    """Raises DamageError where there is none that makes sense."""
    return _geometry(volume.read(0, 512))


def _geometry(sector: bytes) -> Boot:
    (
        sector_size,
        per_cluster,
        reserved,
        tables,
        root_entries,
        small_total,
        media,
        small_length,
        *_,
        total,
    ) = _BOOT.unpack_from(sector)
    long_length, flags, version, root, *_ = _FAT32.unpack_from(sector)
    if sector_size not in (512, 1024, 2048, 4096) or not per_cluster or per_cluster & per_cluster - 1:
        raise DamageError("the boot sector has a size of sectors or clusters that cannot be")
    if not reserved or not tables or not (media >= 0xF8 or media == 0xF0):
        raise DamageError("the boot sector has fields that cannot be")
    is_fat32 = not small_length
    length = long_length if is_fat32 else small_length
    total = small_total or total
    root_size = 0 if is_fat32 else root_entries * 32
    if root_size % sector_size:
        raise DamageError("the root directory does not fill its sectors")
    root_start = (reserved + tables * length) * sector_size
    start = root_start + root_size
    clusters = (total * sector_size - start) // (per_cluster * sector_size)
    if not length or clusters < 1:
        raise DamageError("the boot sector leaves no room for data")
    active = 0
    if is_fat32:
        bits, most, extended = 28, 0xFFFFFF5, 64
        if version:
            raise DamageError(f"FAT32 of version {version} is not known")
        if flags & 0x80:  # the tables are not the same: one of them counts
            active = flags & 0x0F
        if active >= tables:
            raise DamageError(f"table {active} of {tables} is said to count")
    else:
        bits, most, extended = (12, 0xFF4, 36) if clusters <= 0xFF4 else (16, 0xFFF4, 36)
    if clusters > most:
        raise DamageError(f"{clusters} clusters are more than there can be")
    width = 32 if bits == 28 else bits
    clusters = min(clusters, length * sector_size * 8 // width - 2)
    if clusters < 1:
        raise DamageError("the table has no room for clusters")
    _drive, state, signature, serial, label = _EXTENDED.unpack_from(sector, extended)
    return Boot(
        bits=bits,
        cluster_size=per_cluster * sector_size,
        clusters=clusters,
        table=(reserved + active * length) * sector_size,
        start=start,
        root=root if is_fat32 else 0,
        root_start=root_start,
        root_size=root_size,
        serial=serial if signature in (0x28, 0x29) else None,
        label=label if signature == 0x29 else b"",
        dirty=bool(state & 1) and signature in (0x28, 0x29),
    )
