"""Partition tables: GPT (UEFI 2.10, chapter 5) and MBR with extended partitions, as Linux numbers them.

Called by `probe` for disks, md arrays and logical volumes. Synchronous; keeps no state.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume

SECTORS = (512, 4096)
"""Bytes of a sector of the disks that machines have."""

MOST_TABLE = 1 << 20
"""Bytes of the entries of a GPT: those of 8192 partitions."""

MOST_LOGICAL = 256
"""Partitions in extended ones, as in the kernel."""

_MOST_HEADERS = 4
"""Of a GPT: the first, the one that it names, the one at the end, and one more."""

_HEADER = struct.Struct("<8sIIII4Q16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQ")
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_EXTENDED = {0x05, 0x0F, 0x85}
_PROTECTIVE = 0xEE
_NOTHING = bytes(16)


@dataclass(frozen=True, slots=True)
class Partition:
    """`number`: as in `sda2`. `start`, `size`: bytes; they lie on the disk. `kind`: what the table says: a
    GUID in lower case (GPT), or two hexadecimal digits (MBR). `uuid`: its PARTUUID. `problem`: why there is
    nothing to read (then `start` and `size` mean nothing). `label`: its PARTLABEL; None where it has none."""

    number: int
    start: int
    size: int
    kind: str
    uuid: str
    problem: str | None = None
    label: str | None = None


def is_protective(disk: Volume) -> bool:
    """Whether the MBR says that the disk has a GPT."""
    return any(kind == _PROTECTIVE for _slot, kind, _start, _count in _mbr_entries(disk, 0))


def gpt(disk: Volume, *, backup: bool) -> list[Partition] | None:
    """The partitions of a GPT; None where there is none.

    `backup`: whether to look for the second table, at the end, where there is not even a header of the
    first. Raises DamageError where there is a header and neither table is whole.
    """
    damage: DamageError | None = None
    for sector in SECTORS:
        last = disk.size // sector - 1
        places = {1: None, last: None} if backup else {1: None}
        tried: set[int] = set()
        while places and len(tried) < _MOST_HEADERS:
            place = next(iter(places))
            del places[place]
            tried.add(place)
            if not 0 < place <= last:
                continue
            try:
                header = _Header.read(disk, place, sector)
                if header is None:
                    continue
                places |= {other: None for other in (header.other, last) if other not in tried}
                return list(header.partitions(disk))
            except DamageError as error:
                damage = damage or error
                places |= {} if last in tried else {last: None}
    if damage is not None:
        raise damage
    return None


@dataclass(frozen=True, slots=True)
class _Header:
    """A header of a GPT. `other`: the sector of the other header. `table`: the sector of the entries."""

    sector: int
    other: int
    table: int
    count: int
    entry_size: int
    checksum: int

    @classmethod
    def read(cls, disk: Volume, place: int, sector: int) -> _Header | None:
        """The header in sector number `place`; None where there is none."""
        raw = disk.read(place * sector, sector)
        if not raw.startswith(b"EFI PART"):
            return None
        (
            _magic,
            _revision,
            size,
            checksum,
            _zero,
            own,
            other,
            _first,
            _last,
            _disk,
            table,
            count,
            each,
            crc,
        ) = _HEADER.unpack_from(raw)
        if not _HEADER.size <= size <= sector:
            raise DamageError(f"the GPT header in sector {place} has a wrong size")
        if zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != checksum or own != place:
            raise DamageError(f"the GPT header in sector {place} has a wrong checksum or place")
        if each < _GPT_ENTRY.size or each > sector or each % 8 or count * each > MOST_TABLE:
            raise DamageError(f"the GPT header in sector {place} has {count} entries of {each} bytes")
        return cls(sector, other, table, count, each, crc)

    def partitions(self, disk: Volume) -> Iterator[Partition]:
        raw = disk.read(self.table * self.sector, self.count * self.entry_size)
        if zlib.crc32(raw) != self.checksum:
            raise DamageError(f"the GPT entries in sector {self.table} have a wrong checksum")
        for number in range(self.count):
            kind, own, first, last = _GPT_ENTRY.unpack_from(raw, number * self.entry_size)
            if kind != _NOTHING:
                size = (last - first + 1) * self.sector
                kind, own = str(uuid.UUID(bytes_le=kind)), str(uuid.UUID(bytes_le=own))
                found = _placed(disk, number + 1, first * self.sector, size, kind, own)
                yield replace(found, label=_label(raw, number * self.entry_size) or None)


def _label(raw: bytes, entry: int) -> str:
    """The name in an entry of a GPT: up to 36 units of UTF-16."""
    return raw[entry + 56 : entry + 128].decode("utf-16-le", "replace").split("\0")[0]


def mbr(disk: Volume, sector: int) -> list[Partition] | None:
    """The partitions of an MBR, for sectors of `sector` bytes; None where there is none."""
    if disk.size < SECTORS[0]:
        return None
    raw = disk.read(0, SECTORS[0])
    primary = list(_mbr_entries(disk, 0))
    if not primary or any(raw[446 + 16 * slot] & 0x7F for slot in range(4)):
        return None
    identity = int.from_bytes(raw[440:444], "little")
    found: list[Partition] = []
    logical: list[Partition] = []
    for slot, kind, start, count in primary:
        uid = f"{identity:08x}-{slot + 1:02x}"
        if kind not in _EXTENDED:
            found.append(_placed(disk, slot + 1, start * sector, count * sector, f"{kind:02x}", uid))
            continue
        try:
            for logical_kind, at, size in _logical(disk, start, sector):
                number = 5 + len(logical)
                uid = f"{identity:08x}-{number:02x}"
                logical.append(_placed(disk, number, at * sector, size * sector, f"{logical_kind:02x}", uid))
                if len(logical) >= MOST_LOGICAL:
                    raise DamageError(f"there are more than {MOST_LOGICAL} logical partitions")
        except DamageError as error:
            found.append(
                Partition(slot + 1, 0, 0, f"{kind:02x}", uid, f"logical partitions are missing: {error}")
            )
    return found + logical


def _mbr_entries(disk: Volume, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """The used ones of the four entries in the sector at `offset`: slot, type, first sector, how many."""
    if offset + SECTORS[0] > disk.size:
        return
    raw = disk.read(offset, SECTORS[0])
    if raw[510:] != b"\x55\xaa":
        return
    for slot in range(4):
        _flag, kind, start, count = _MBR_ENTRY.unpack_from(raw, 446 + 16 * slot)
        if count:
            yield slot, kind, start, count


def _logical(disk: Volume, first: int, sector: int) -> Iterator[tuple[int, int, int]]:
    """The partitions in an extended one, which begins with sector `first`: types, first sectors, sizes."""
    seen: set[int] = set()
    place: int | None = first
    while place is not None:
        if place in seen or len(seen) > MOST_LOGICAL:
            raise DamageError(f"the chain of logical partitions returns to sector {place}")
        seen.add(place)
        head = disk.read(place * sector, SECTORS[0])
        if head[510:] != b"\x55\xaa":
            if not any(head):
                return
            raise DamageError(f"sector {place} is not a table of logical partitions")
        link: int | None = None
        for slot, kind, start, count in _mbr_entries(disk, place * sector):
            if kind in _EXTENDED:
                link = first + start if link is None else link
            elif slot < 2 or (place + start + count) * sector <= disk.size:
                yield kind, place + start, count
        place = link


def _placed(disk: Volume, number: int, start: int, size: int, kind: str, uid: str) -> Partition:
    """A partition, cut at the end of the disk as the kernel does."""
    if size <= 0 or start <= 0:
        return Partition(number, 0, 0, kind, uid, "the partition table has no valid place for it")
    if start >= disk.size:
        return Partition(number, 0, 0, kind, uid, f"it lies beyond the end of the disk of {disk.size} bytes")
    return Partition(number, start, min(size, disk.size - start), kind, uid)
