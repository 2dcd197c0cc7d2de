"""A change of an inode in the log, which has the order of bytes of the machine: as on the disk. Pure.

Used by `recovery`. Of machines whose lowest byte comes first, as all that Proxmox VE runs are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from pbsfs.base.errors import DamageError

_LONG = struct.Struct("<4xIHH4xQ16sQII")
_PACKED = struct.Struct("<4xIHHQ16sQII")
"""The form of 32-bit machines."""

_DATA, _DATA_ROOT, _DEVICE = 0x0E, 0x08, 0x10
_ATTRIBUTES, _ATTRIBUTES_ROOT = 0x1C0, 0x100
FORKS = (_DATA, _DEVICE, _ATTRIBUTES)
"""Masks of `InodeItem.fields`: the parts of an inode, beside its core, that a change may replace."""

_WRAPPED = 0xFFFF
_BIGTIME, _LARGE_COUNTS = 8, 16
_HEAD = "2H2B2s3I2H"
_REST = "QQIIHBBIHHI"
"""Bytes 56 to 96."""


class InodeItem(NamedTuple):
    """`block`, `length`: of the buffer that holds the inode, in sectors; `offset`: in it, in bytes."""

    fields: int
    number: int
    device: bytes
    block: int
    length: int
    offset: int
    regions: Sequence[bytes]

    @classmethod
    def of(cls, regions: Sequence[bytes]) -> InodeItem:
        """Raises DamageError."""
        form = _LONG if len(regions[0]) == _LONG.size else _PACKED
        if len(regions[0]) != form.size or not 2 <= len(regions) <= 4:
            raise DamageError("an item of an inode is wrong")
        fields, _, _, number, union, block, length, offset = form.unpack(regions[0])
        return cls(fields, number, union[:4], block, length, offset, regions)


def converted(item: InodeItem, stored: bytes, lsn: int, *, has_checksums: bool) -> bytes | None:
    """The inode after the change; None where `stored`, on the disk, is newer. Raises DamageError."""
    core = item.regions[1]
    if (
        len(core) < 96
        or core[:2] != b"NI"
        or (core[4] == 3) != has_checksums
        or (core[4] == 3 and len(core) < 176)
    ):
        raise DamageError(f"the log changes inode {item.number} in a form that is unknown")
    if has_checksums:
        newer = int.from_bytes(stored[112:120], "big")
        if stored[4] == 3 and newer != (1 << 64) - 1 and newer > lsn:
            return None
    elif _is_older(int.from_bytes(core[30:32], "little"), int.from_bytes(stored[30:32], "big")):
        return None
    changed = bytearray(stored)
    _core(changed, core, item, lsn)
    _forks(changed, item, has_checksums=has_checksums)
    return bytes(changed)


def _is_older(logged: int, stored: int) -> bool:
    """By the counts of how often the inode was written."""
    return logged < stored and not (stored == _WRAPPED and logged < _WRAPPED >> 1)


def _swapped(form: str, source: bytes, target: bytearray, at: int) -> None:
    struct.pack_into(">" + form, target, at, *struct.unpack_from("<" + form, source, at))


def _core(changed: bytearray, core: bytes, item: InodeItem, lsn: int) -> None:
    is_new = core[4] == 3
    flags2 = int.from_bytes(core[120:128], "little") if is_new else 0
    _swapped(_HEAD, core, changed, 0)
    changed[6:8] = bytes(2)
    time = "Q" if flags2 & _BIGTIME else "II"
    for at in (32, 40, 48, 144) if is_new else (32, 40, 48):
        _swapped(time, core, changed, at)
    _swapped(_REST, core, changed, 56)
    if flags2 & _LARGE_COUNTS:
        _swapped("Q", core, changed, 24)
        _swapped("IH", core, changed, 76)
    elif is_new:
        changed[24:32] = bytes(8)
    else:
        changed[24:32] = bytes(8)  # with the count of writes, as the kernel does
    if is_new:
        _swapped("Q", core, changed, 104)
        changed[112:120] = lsn.to_bytes(8, "big")
        _swapped("QI", core, changed, 120)
        changed[132:144] = bytes(12)
        changed[152:160] = item.number.to_bytes(8, "big")
        changed[160:176] = core[160:176]


def _forks(changed: bytearray, item: InodeItem, *, has_checksums: bool) -> None:
    start = 176 if has_checksums else 100
    size = len(changed)
    end = start + changed[82] * 8 if changed[82] else size
    if end > size:
        raise DamageError(f"the forks of inode {item.number} do not fit into it")
    if item.fields & _DEVICE:
        changed[start : start + 4] = item.device[3::-1]
    regions = list(item.regions[2:])
    for mask, root, first, last in (
        (_DATA, _DATA_ROOT, start, end),
        (_ATTRIBUTES, _ATTRIBUTES_ROOT, end, size),
    ):
        if not item.fields & mask or not regions:
            continue
        data = regions.pop(0)
        if item.fields & mask == root:
            data = _root(data, last - first, has_checksums=has_checksums)
        if len(data) > last - first:
            raise DamageError(f"a fork of inode {item.number} does not fit into it")
        changed[first : first + len(data)] = data


def _root(block: bytes, size: int, *, has_checksums: bool) -> bytes:
    """The root of a tree of extents, a block in the log, as it is in an inode."""
    head = 72 if has_checksums else 24
    level, count = struct.unpack_from(">HH", block, 4) if len(block) >= head else (0, 0)
    many, fit = (len(block) - head) // 16, (size - 4) // 16
    if not level or not 0 < count <= min(many, fit):
        raise DamageError("the root of a tree of extents in the log is wrong")
    made = bytearray(4 + 16 * fit)
    made[:4] = block[4:8]
    made[4 : 4 + 8 * count] = block[head : head + 8 * count]
    pointers = head + 8 * many
    made[4 + 8 * fit : 4 + 8 * fit + 8 * count] = block[pointers : pointers + 8 * count]
    return bytes(made)
