"""The label of a physical volume of LVM2, and the text in its metadata areas (lib/format_text/layout.h).

Called by `lvm.groups`. Synchronous; keeps no state.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume

MOST_TEXT = 4 << 20
"""Bytes of the metadata of a group: those of some 4,000 logical volumes."""

_MOST_AREAS = 16
"""Areas in a label; LVM2 writes at most two of a kind."""

_LABEL = struct.Struct("<8sQII8s")
_AREA = struct.Struct("<QQ")
_HEADER = struct.Struct("<I16sIQQ")
_LOCATION = struct.Struct("<QQII")
_SECTOR = 512
_LABELS = range(0, 4 * _SECTOR, _SECTOR)
_HEADER_SIZE = 512
_IGNORED = 1


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """`uuid`: 32 characters, without dashes. `areas`: of metadata, each an offset and a size in bytes."""

    uuid: str
    volume: Volume
    areas: tuple[tuple[int, int], ...]


def physical_volume(volume: Volume) -> PhysicalVolume | None:
    """The physical volume that `volume` is; None where it is none. Raises DamageError."""
    head = volume.read(0, min(volume.size, _LABELS.stop))
    damage: DamageError | None = None
    for at in _LABELS:
        sector = head[at : at + _SECTOR]
        if len(sector) < _SECTOR or not sector.startswith(b"LABELONE"):
            continue
        _magic, number, checksum, offset, kind = _LABEL.unpack_from(sector)
        if kind != b"LVM2 001":
            continue
        if number != at // _SECTOR or checksum != _crc(sector[20:]):
            damage = DamageError(f"the LVM label in sector {at // _SECTOR} has a wrong checksum or place")
            continue
        return _physical_volume(volume, sector, offset)
    if damage is not None:
        raise damage
    return None


def _physical_volume(volume: Volume, sector: bytes, at: int) -> PhysicalVolume:
    if not _LABEL.size <= at <= _SECTOR - 40:
        raise DamageError("the LVM label has a wrong size")
    uuid = sector[at : at + 32]
    if not uuid.isalnum():
        raise DamageError("the UUID in the LVM label is not valid")
    at += 40
    lists: list[list[tuple[int, int]]] = [[], []]
    for areas in lists:
        while True:
            if at + _AREA.size > _SECTOR or len(areas) > _MOST_AREAS:
                raise DamageError("the areas in the LVM label have no end")
            offset, size = _AREA.unpack_from(sector, at)
            at += _AREA.size
            if not offset:
                break
            areas.append((offset, size))
    return PhysicalVolume(uuid.decode("ascii"), volume, tuple(lists[1]))


def metadata(physical: PhysicalVolume) -> Iterator[bytes | DamageError]:
    """The text in each metadata area that is used, or why it cannot be read. Raises SourceError."""
    for offset, size in physical.areas:
        try:
            text = _text(physical.volume, offset, size)
        except DamageError as error:
            yield error
        else:
            if text is not None:
                yield text


def _text(volume: Volume, start: int, size: int) -> bytes | None:
    raw = volume.read(start, _HEADER_SIZE)
    checksum, magic, version, own_start, own_size = _HEADER.unpack_from(raw)
    if magic != b" LVM2 x[5A%r0N*>":
        raise DamageError(f"there is no LVM metadata area at byte {start}")
    if version != 1 or checksum != _crc(raw[4:]) or own_start != start:
        raise DamageError(f"the LVM metadata area at byte {start} has a wrong checksum, version or place")
    offset, length, text_checksum, flags = _LOCATION.unpack_from(raw, _HEADER.size)
    if not offset or not length or flags & _IGNORED:
        return None
    # The area is a ring: its text continues after the header where it reaches the end.
    if not _HEADER_SIZE <= offset < own_size or length > min(own_size - _HEADER_SIZE, MOST_TEXT):
        raise DamageError(f"the text of the LVM metadata area at byte {start} lies beyond it")
    first = min(length, own_size - offset)
    text = volume.read(start + offset, first) + volume.read(start + _HEADER_SIZE, length - first)
    if _crc(text) != text_checksum:
        raise DamageError(f"the text of the LVM metadata area at byte {start} has a wrong checksum")
    return text


def _crc(data: bytes) -> int:
    """CRC-32 with LVM2's start value, not inverted (lib/misc/crc.c)."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
