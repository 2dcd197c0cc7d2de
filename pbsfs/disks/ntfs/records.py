"""Records of the master file table and their attributes, as they lie in it.

A record is protected by an update sequence: the last two bytes of each 512 are replaced by one number, and
stand in an array. Layout: "NTFS Documentation" of the Linux-NTFS project, "FILE Record", "Attributes",
"Fixup". Pure functions.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pbsfs.base.errors import DamageError

STRIDE = 512
"""Bytes that one number of an update sequence protects, whatever the size of sectors."""

STANDARD_INFORMATION = 0x10
ATTRIBUTE_LIST = 0x20
FILE_NAME = 0x30
VOLUME_NAME = 0x60
VOLUME_INFORMATION = 0x70
DATA = 0x80
INDEX_ROOT = 0x90
INDEX_ALLOCATION = 0xA0
BITMAP = 0xB0
REPARSE_POINT = 0xC0

NUMBER = (1 << 48) - 1
"""Of a reference: the bits of the record's number; those above are its sequence number."""

COMPRESSED = 0x00FF
ENCRYPTED = 0x4000

_RECORD = struct.Struct("<16xHHHHIIQ")
_NUMBER = struct.Struct("<I")
_ATTRIBUTE = struct.Struct("<IIBBHHH")
_RESIDENT = struct.Struct("<IH")
_NON_RESIDENT = struct.Struct("<QQHB5xQQQ")
_END = 0xFFFFFFFF
_IN_USE = 1
_DIRECTORY = 2


class Attribute(NamedTuple):
    """One attribute, or one part of it. `name`: as UTF-16. `value`: of a resident one, its bytes; else its
    mapping pairs. `lowest`, `highest`: the first and last cluster of the attribute that they map.
    `size`, `initialized`, `allocated`: bytes; of the whole, in the part that begins at cluster 0.
    `unit`: of compression, as a power of two of clusters."""

    kind: int
    name: bytes
    flags: int
    resident: bool
    value: bytes
    size: int
    lowest: int = 0
    highest: int = 0
    initialized: int = 0
    allocated: int = 0
    unit: int = 0


class Record(NamedTuple):
    """A record in use. `base`: 0, or the reference of the record that this one continues. `links`: names,
    DOS names too."""

    number: int
    sequence: int
    links: int
    is_directory: bool
    base: int
    attributes: list[Attribute]

    @property
    def reference(self) -> int:
        return self.sequence << 48 | self.number


def without_fixups(raw: bytes, magic: bytes) -> bytes:
    """A record as it was before the update sequence was put in. `raw`: a multiple of 512 bytes.

    Raises DamageError where its magic number or one of its parts is another than it should be.
    """
    if raw[:4] != magic:
        raise DamageError(f"its magic number is not {magic.decode()}")
    offset = raw[4] | raw[5] << 8
    count = raw[6] | raw[7] << 8
    size = len(raw)
    if count - 1 != size // STRIDE or offset < 8 or offset & 1 or offset + 2 * count > size:
        raise DamageError("its update sequence is damaged")
    number = raw[offset : offset + 2]
    fixed = bytearray(raw)
    for end in range(STRIDE, size + 1, STRIDE):
        offset += 2
        if raw[end - 2 : end] != number:
            raise DamageError(f"the {STRIDE} bytes that end at byte {end} of it are damaged or older")
        fixed[end - 2 : end] = raw[offset : offset + 2]
    return bytes(fixed)


def parse_record(raw: bytes, number: int) -> Record | None:
    """The record with `number`; None where it is not in use. Raises DamageError, without the number."""
    data = without_fixups(raw, b"FILE")
    sequence, links, first, flags, used, allocated, base = _RECORD.unpack_from(data)
    if not flags & _IN_USE:
        return None
    if allocated > len(data) or used > allocated or first < 42 or first >= used:
        raise DamageError("its sizes contradict each other")
    if data[4] | data[5] << 8 >= 48 and _NUMBER.unpack_from(data, 44)[0] != number & 0xFFFFFFFF:
        raise DamageError("it is the record of another number")
    attributes = _attributes(data[:used], first)
    return Record(number, sequence, links, flags & _DIRECTORY != 0, base, attributes)


def _attributes(data: bytes, offset: int) -> list[Attribute]:
    found: list[Attribute] = []
    end = len(data)
    while offset + 4 <= end:
        if offset + 16 > end:
            if _NUMBER.unpack_from(data, offset)[0] == _END:
                return found
            break
        kind, length, non_resident, letters, name, flags, _instance = _ATTRIBUTE.unpack_from(data, offset)
        if kind == _END:
            return found
        stop = offset + length
        if length < 24 or length & 7 or stop > end or (letters and name + 2 * letters > length):
            raise DamageError(f"its attribute at byte {offset} is damaged")
        named = data[offset + name : offset + name + 2 * letters] if letters else b""
        if not non_resident:
            size, start = _RESIDENT.unpack_from(data, offset + 16)
            if size and start + size > length:
                raise DamageError(f"its attribute at byte {offset} is damaged")
            value = data[offset + start : offset + start + size]
            found.append(Attribute(kind, named, flags, True, value, size))
        else:
            found.append(_mapped(data[offset:stop], kind, named, flags))
        offset = stop
    raise DamageError("its attributes have no end")


def _mapped(data: bytes, kind: int, name: bytes, flags: int) -> Attribute:
    if len(data) < 64:
        raise DamageError("one of its attributes is too short")
    lowest, highest, pairs, unit, allocated, size, initialized = _NON_RESIDENT.unpack_from(data, 16)
    if pairs < 64 or pairs > len(data) or lowest >= 1 << 63:
        raise DamageError("one of its attributes is damaged")
    if highest == (1 << 64) - 1:  # -1: an attribute without clusters
        highest = -1
    if not lowest <= highest + 1 <= 1 << 63:
        raise DamageError("one of its attributes maps a negative range")
    if not lowest and (initialized > size or size > allocated or allocated >= 1 << 63):
        raise DamageError("the sizes of one of its attributes contradict each other")
    return Attribute(
        kind, name, flags, False, data[pairs:], size, lowest, highest, initialized, allocated, unit
    )
