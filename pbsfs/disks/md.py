"""Arrays of Linux's md: RAID 1 and linear ones as volumes (md(4), include/uapi/linux/raid/md_p.h).

Called by `probe`. Synchronous; keeps no state.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks.volume import Mapped, Segment, Volume, part_of

_MAGIC = 0xA92B4EFC
_SECTOR = 512
_NOW = struct.Struct("<4I16s32sQiIQII")
_DEVICE = struct.Struct("<QQQQ")
_STATE = struct.Struct("<QQII")
_MOST_MEMBERS = 1920
_RECOVERING, _RESHAPING, _BAD_BLOCKS = 0x02, 0x04, 0x08
_DONE = (1 << 64) - 1
_OLD_SIZE = 4096
_OLD_RESERVED = 64 << 10
_ACTIVE = 0xFFFD


@dataclass(frozen=True, slots=True)
class Member:
    """A volume that is part of an array. `array`, `name`: of the array. `count`: members that it has.
    `role`: which one this is; None for a spare or one that failed. `events`: changes that it knows of.
    `start`, `size`: of its data, bytes. `used`: bytes of it that a mirror has. `is_whole`: whether it has all
    data. `roles`: of all members that are active. `is_synced`: whether all of those have the same data."""

    volume: Volume
    array: bytes
    name: str
    level: int
    count: int
    role: int | None
    events: int
    start: int
    size: int
    used: int
    chunk: int
    is_whole: bool
    is_reshaping: bool
    is_synced: bool
    roles: frozenset[int]


def member(volume: Volume, end: int | None) -> Member | None:
    """The member that a volume is; None where it is none.

    `end`: how many bytes the file system that begins where the volume does takes; None where there is none.
    Superblocks at the end are looked for only behind it. Raises DamageError, SourceError.
    """
    places = [0, 4096]
    # Version 1.0: 8 KiB before the end or a little more, at a multiple of 4 KiB.
    last = (volume.size // _SECTOR - 16) // 8 * 8 * _SECTOR
    if last > 4096 and (end is None or end <= last):
        places.append(last)
    for place in places:
        if place + _OLD_SIZE <= volume.size:
            raw = volume.read(place, _OLD_SIZE)
            if struct.unpack_from("<II", raw) == (_MAGIC, 1) and _place(raw) == place:
                return _member(volume, raw)
    # Version 0.90: in the last whole 64 KiB.
    old = volume.size // _OLD_RESERVED * _OLD_RESERVED - _OLD_RESERVED
    if old > 0 and (end is None or end <= old):
        raw = volume.read(old, _OLD_SIZE)
        if struct.unpack_from("<III", raw) == (_MAGIC, 0, 90):
            return _old_member(volume, raw, old)
    return None


def _place(raw: bytes) -> int:
    """Where a superblock of version 1 says that it is."""
    return int.from_bytes(raw[144:152], "little") * _SECTOR


def _member(volume: Volume, raw: bytes) -> Member:
    _, _, features, _, array, name, _, level, _, used, chunk, count = _NOW.unpack_from(raw)
    start, size, _, _ = _DEVICE.unpack_from(raw, 128)
    number = int.from_bytes(raw[160:164], "little")
    events, synced, checksum, listed = _STATE.unpack_from(raw, 200)
    if listed > _MOST_MEMBERS or count > listed:
        raise DamageError(f"the md superblock lists {listed} members of {count}")
    covered = raw[: 256 + 2 * listed]
    if checksum != _sum(covered[:216] + bytes(4) + covered[220:]):
        raise DamageError("the md superblock has a wrong checksum")
    roles = struct.unpack_from(f"<{listed}H", raw, 256)
    role = roles[number] if number < listed and roles[number] < _ACTIVE else None
    return Member(
        volume,
        array,
        name.split(b"\0")[0].decode("utf-8", "replace").rpartition(":")[2],
        level,
        count,
        role,
        events,
        start * _SECTOR,
        size * _SECTOR,
        used * _SECTOR,
        chunk * _SECTOR,
        is_whole=not features & (_RECOVERING | _BAD_BLOCKS),
        is_reshaping=bool(features & _RESHAPING),
        is_synced=synced == _DONE,
        roles=frozenset(active for active in roles if active < _ACTIVE),
    )


def _old_member(volume: Volume, raw: bytes, place: int) -> Member:
    words = struct.unpack("<1024I", raw)
    if words[38] != _sum(raw[:152] + bytes(4) + raw[156:]):
        raise DamageError("the md superblock has a wrong checksum")
    array = struct.pack("<4I", words[5], *words[13:16])
    level = words[7] - (1 << 32) if words[7] >> 31 else words[7]
    count, minor = words[10], words[11]
    _number, _major, _minor, role, state = words[992:997]
    is_active = state & 0b1111 == 0b0110  # active and in sync; not faulty, not removed
    return Member(
        volume,
        array,
        str(minor),
        level,
        count,
        role if is_active and role < count else None,
        words[40] << 32 | words[39],
        0,
        place,
        words[8] << 10,
        words[65],
        is_whole=is_active,
        is_reshaping=False,
        is_synced=True,
        roles=frozenset(),
    )


def _sum(data: bytes) -> int:
    """The checksum of a superblock, whose own field is 0."""
    whole = len(data) // 4 * 4
    total: int = sum(struct.unpack(f"<{whole // 4}I", data[:whole])) + int.from_bytes(data[whole:], "little")
    return ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF


def array(members: Sequence[Member]) -> Volume:
    """The array that `members` are of. Raises UnsupportedError for levels that are not read, DamageError."""
    first = max(members, key=lambda one: one.events)
    current = {one.role: one for one in members if one.events == first.events and one.role is not None}
    if first.is_reshaping:
        raise UnsupportedError("an md array whose form is being changed is not supported")
    if first.level == 1:
        return _mirror(current)
    if first.level == -1:
        return _linear(first, current)
    raise UnsupportedError(f"an md array of RAID level {first.level} is not supported")


def _mirror(members: dict[int, Member]) -> Volume:
    for role, one in sorted(members.items()):
        if not one.is_whole:
            continue
        if not one.is_synced and any(other < role for other in one.roles):
            raise DamageError(
                "the member that the others of the RAID 1 were being copied from is on no disk of this"
                " snapshot; include its disk in the backup"
            )
        return part_of(one.volume, one.start, one.used)
    raise DamageError("no member of the RAID 1 is here and has all data; include all its disks in the backup")


def _linear(first: Member, members: dict[int, Member]) -> Volume:
    if not 0 < first.count <= _MOST_MEMBERS:
        raise DamageError(f"a linear array has {first.count} members")
    segments: list[Segment] = []
    end = 0
    for role in range(first.count):
        if role not in members:
            raise DamageError(
                f"member {role} of the linear array is on no disk of this snapshot; include its disk in the"
                " backup"
            )
        one = members[role]
        size = one.size // first.chunk * first.chunk if first.chunk else one.size
        if not size:
            raise DamageError(f"member {role} of the linear array has no data")
        segments.append(Segment(end, size, one.volume, one.start))
        end += size
    return Mapped(end, segments)
