"""What lies in a volume, by magic numbers: the file systems that pbsfs reads, and all else that has a name.

The places are those of libblkid (util-linux). Called by `probe`. Synchronous; keeps no state.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from pbsfs.disks.volume import Volume

HEAD = 260 << 10
"""Bytes at the start of a volume that say what is in it."""

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_PAGES = tuple(4096 << shift for shift in range(5))


@dataclass(frozen=True, slots=True)
class Content:
    """`kind`: as in `probe.Found`. `end`: bytes of the volume that it uses; None where it does not say."""

    kind: str
    end: int | None = None


def recognised(volume: Volume) -> Content | None:
    """What the volume contains; None where that is unknown. Raises DamageError, SourceError."""
    head = volume.read(0, min(HEAD, volume.size))
    for look in _LOOKS:
        found = look(head)
        if found is not None:
            return found
    return next((Content(kind) for kind, at, magic in _MAGICS if head.startswith(magic, at)), None)


def is_blank(volume: Volume) -> bool:
    """Whether the start of the volume is all zeros."""
    return not any(volume.read(0, min(HEAD, volume.size)))


def btrfs_on_several(volume: Volume) -> bytes | None:
    """The identity of a btrfs that lies on several devices, of which `volume` is one; None of others."""
    if volume.size < 69632:
        return None
    head = volume.read(65536, 4096)
    return head[32:48] if _U64.unpack_from(head, 136)[0] > 1 else None


_MAGICS: tuple[tuple[str, int, bytes], ...] = (
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bitlocker", 3, b"-FVE-FS-"),
    ("refs", 0, b"\0\0\0ReFS\0"),
    ("vdo", 0, b"dmvdo001"),
    ("stratis", 516, b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("bcache", 4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    ("bcachefs", 4120, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    ("ceph", 0, b"bluestore block device"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("hfsplus", 1024, b"H+\x00\x04"),
    ("hfsplus", 1024, b"HX\x00\x05"),
    ("apfs", 32, b"NXSB"),
    ("jfs", 32768, b"JFS1"),
    ("reiserfs", 65588, b"ReIsErFs"),
    ("reiserfs", 65588, b"ReIsEr2Fs"),
    ("reiserfs", 65588, b"ReIsEr3Fs"),
    ("reiser4", 65536, b"ReIsEr4"),
    ("nilfs2", 1030, b"\x34\x34"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("squashfs", 0, b"hsqs"),
    ("gfs2", 65536, b"\x01\x16\x19\x70"),
    ("ocfs2", 4096, b"OCFSV2"),
    ("ocfs2", 2048, b"OCFSV2"),
    ("ocfs2", 1024, b"OCFSV2"),
    ("ocfs2", 8192, b"OCFSV2"),
    ("ufs", 8192 + 1372, b"\x54\x19\x01\x00"),
    ("ufs", 65536 + 1372, b"\x19\x01\x54\x19"),
    ("iso9660", 32769, b"CD001"),
    ("udf", 32769, b"BEA01"),
    ("bsd", 512, b"\x57\x45\x56\x82"),
    *(("swap", page - 10, magic) for page in _PAGES for magic in (b"SWAPSPACE2", b"SWAP-SPACE")),
    *(("swap", page - 10, magic) for page in _PAGES for magic in (b"S1SUSPEND\0", b"S2SUSPEND\0")),
)


def _lvm(head: bytes) -> Content | None:
    for sector in range(0, 2048, 512):
        if head.startswith(b"LABELONE", sector) and head.startswith(b"LVM2 001", sector + 24):
            return Content("lvm", _label_size(head[sector : sector + 512]))
    return None


def _label_size(sector: bytes) -> int | None:
    """The size of a physical volume, as its label says."""
    at = _U32.unpack_from(sector, 20)[0] + 32 if len(sector) == 512 else 512
    return _U64.unpack_from(sector, at)[0] if at <= 504 else None


def _boot_sector(head: bytes) -> Content | None:
    """FAT, exFAT, NTFS, and BitLocker To Go, which has the boot sector of a FAT."""
    if head[510:512] != b"\x55\xaa":
        return None
    bytes_a_sector = _U16.unpack_from(head, 11)[0]
    if head.startswith(b"NTFS    ", 3):
        return Content("ntfs", (_U64.unpack_from(head, 40)[0] + 1) * bytes_a_sector)
    if head.startswith(b"EXFAT   ", 3):
        return Content("exfat", _U64.unpack_from(head, 72)[0] << min(head[108], 12))
    if head.startswith(bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"), 424):
        return Content("bitlocker")
    cluster, reserved, fats, small = struct.unpack_from("<BHB2xH", head, 13)
    media, fat_size, large, fat32_size = struct.unpack_from("<BH8xII", head, 21)
    if (
        head[0] in (0xEB, 0xE9)
        and bytes_a_sector in (512, 1024, 2048, 4096)
        and cluster
        and not cluster & (cluster - 1)
        and reserved
        and fats in (1, 2)
        and (media == 0xF0 or media >= 0xF8)
        and (small or large)
        and (fat_size or fat32_size)
    ):
        return Content("vfat", (small or large) * bytes_a_sector)
    return None


def _xfs(head: bytes) -> Content | None:
    if not head.startswith(b"XFSB") or len(head) < 512:
        return None
    block, blocks = struct.unpack_from(">IQ", head, 4)
    return Content("xfs", block * blocks)


def _ext(head: bytes) -> Content | None:
    if not head.startswith(b"\x53\xef", 1024 + 56) or len(head) < 2048:
        return None
    low, shift = _U32.unpack_from(head, 1028)[0], _U32.unpack_from(head, 1048)[0]
    compat, incompat, ro_compat = struct.unpack_from("<III", head, 1024 + 92)
    high = _U32.unpack_from(head, 1024 + 0x150)[0] if incompat & 0x80 else 0
    if incompat & 0x08:
        return Content("ext-journal")
    # As libblkid: ext3 has nothing but what ext3 knows, and a journal.
    kind = "ext4" if incompat & ~0x16 or ro_compat & ~0x7 else "ext3" if compat & 0x4 else "ext2"
    return Content(kind, (high << 32 | low) * (1024 << min(shift, 6)))


def _btrfs(head: bytes) -> Content | None:
    if not head.startswith(b"_BHRfS_M", 65536 + 64):
        return None
    # Of this device: `total_bytes` of its item.
    return Content("btrfs", _U64.unpack_from(head, 65536 + 201 + 8)[0])


def _zfs(head: bytes) -> Content | None:
    magics = (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c")
    found = sum(head.startswith(magics, at) for at in range(128 << 10, 256 << 10, 1024))
    return Content("zfs") if found >= 2 else None


_LOOKS: tuple[Callable[[bytes], Content | None], ...] = (_lvm, _boot_sector, _xfs, _ext, _btrfs, _zfs)
