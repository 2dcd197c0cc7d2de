"""The boot sector of an NTFS volume: sizes, and where the master file table is.

Layout: BIOS parameter block of NTFS, as in "NTFS Documentation" of the Linux-NTFS project, "$Boot". Pure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.volume import Volume

SECTOR = 512
"""Bytes of the smallest sector."""

MOST_CLUSTER = 2 << 20
"""Bytes of the largest cluster that Windows makes."""

MOST_RECORD = 64 << 10
"""Bytes of an MFT record or index block; Windows makes up to 4 KiB."""

_BOOT = struct.Struct("<3x8sHB26xQQQb3xb3xQ")
_MAGIC = b"NTFS    "
_BITLOCKER = b"-FVE-FS-"


@dataclass(frozen=True, slots=True)
class Geometry:
    """`sector`, `cluster`, `record`: bytes. `clusters`: how many. `mft`, `mirror`: clusters where the master
    file table and the copy of its first records begin. `serial`: of the volume."""

    sector: int
    cluster: int
    clusters: int
    mft: int
    mirror: int
    record: int
    serial: int


def recognise(volume: Volume) -> bool:
    """Whether there is the magic number of NTFS. Raises KeyRequiredError, SourceError."""
    if volume.size < SECTOR:
        return False
    try:
        return volume.read(3, len(_MAGIC)) == _MAGIC
    except DamageError:
        return False


def read_geometry(volume: Volume) -> Geometry:
    """From the boot sector, or its copy in the last sector where the first one is damaged.

    Raises DamageError, UnsupportedError for BitLocker, KeyRequiredError, SourceError.
    """
    if volume.size < SECTOR:
        raise DamageError(f"a volume of {volume.size} bytes is too small for NTFS")
    try:
        return _geometry(volume.read(0, SECTOR), volume.size)
    except UnsupportedError:
        raise
    except DamageError:
        for sector in (512, 4096, 2048, 1024):
            if volume.size >= 2 * sector:
                try:
                    return _geometry(volume.read(volume.size - sector, SECTOR), volume.size)
                except DamageError:
                    continue
        raise


def _geometry(boot: bytes, size: int) -> Geometry:
    magic, sector, per_cluster, sectors, mft, mirror, per_record, _per_index, serial = _BOOT.unpack_from(boot)
    if magic == _BITLOCKER:
        raise UnsupportedError("BitLocker is not supported")
    if magic != _MAGIC:
        raise DamageError("the boot sector is not one of NTFS")
    if per_cluster > 128:
        per_cluster = 1 << min(256 - per_cluster, 62)  # 0xF4 to 0xFF: the negative of a power of two
    cluster = sector * per_cluster
    if sector not in {512, 1024, 2048, 4096} or not _is_power(per_cluster) or cluster > MOST_CLUSTER:
        raise DamageError(f"the boot sector has sectors of {sector} and clusters of {cluster} bytes")
    record = 1 << min(-per_record, 62) if per_record < 0 else per_record * cluster
    if not SECTOR <= record <= MOST_RECORD or not _is_power(record):
        raise DamageError(f"the boot sector has MFT records of {record} bytes")
    clusters = sectors // per_cluster
    if not clusters or sectors > size // sector:
        raise DamageError(f"the boot sector has {sectors} sectors of {sector}, the volume has {size} bytes")
    if mft >= clusters:
        raise DamageError(f"the boot sector places the MFT at cluster {mft} of {clusters}")
    return Geometry(sector, cluster, clusters, mft, mirror, record, serial)


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
