"""Logical volumes: linear, striped, mirrored and thin ones as volumes; for others, why they cannot be read.

Called by `probe`. Synchronous; of one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.base.text import quoted
from pbsfs.disks.lvm.groups import SECTOR, Group, is_name, typed
from pbsfs.disks.lvm.label import PhysicalVolume
from pbsfs.disks.lvm.stripes import Striped
from pbsfs.disks.lvm.text import Section
from pbsfs.disks.lvm.thin import Pool, Thin
from pbsfs.disks.volume import Mapped, Segment, Volume, part_of

MOST_SIZE = 1 << 63
"""Bytes of a logical volume."""

_INTERNAL = {"thin-pool", "cache-pool", "vdo-pool", "snapshot"}
"""Types of volumes that are parts of others."""

_MOST_NESTED = 16
"""Logical volumes on logical volumes."""

_RAID = struct.Struct("<4sIIIQQQQ")
_IN_SYNC = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Logical:
    """`name`: as device mapper has it, `vg0-root`. `size`: bytes. `volume`: None where it cannot be read:
    `problem` says why, and `kind` which type it has (`lvm-cache`; `lvm` for all that pbsfs reads). `uuid`: as
    device mapper has it, `LVM-` and the UUIDs of the group and the volume; empty where it is not known."""

    name: str
    size: int
    kind: str
    volume: Volume | None
    problem: str | None
    uuid: str = ""


def logical_volumes(group: Group, physical: Mapping[str, PhysicalVolume], alias: str) -> Iterator[Logical]:
    """The volumes of a group that are not parts of others. `physical`: those that are here, by UUID.
    `alias`: the name to show for the group. Raises SourceError."""
    volumes = _Volumes(group, physical)
    for name, section in group.logical.items():
        shown = f"{alias.replace('-', '--')}-{name.replace('-', '--')}"
        try:
            segments = _segments(section)
            if "VISIBLE" not in typed(section, "status", list, []) or _INTERNAL & {
                typed(segment, "type", str) for segment in segments
            }:
                continue
            size = volumes.size(name)
        except DamageError as error:
            yield Logical(shown, 0, "lvm", None, str(error))
            continue
        try:
            volume = volumes.volume(name)
        except UnsupportedError as error:
            kind = typed(segments[0], "type", str) if segments else ""
            yield Logical(shown, size, f"lvm-{kind}" if is_name(kind) else "lvm", None, str(error))
        except DamageError as error:
            yield Logical(shown, size, "lvm", None, str(error))
        else:
            own = section.get("id")
            uuid = "LVM-" + f"{group.uuid}{own}".replace("-", "") if isinstance(own, str) else ""
            yield Logical(shown, size, "lvm", volume, None, uuid)


def _segments(section: Section) -> list[Section]:
    """The segments of a logical volume, in order."""
    count = typed(section, "segment_count", int)
    if count > len(section):
        raise DamageError(f"a logical volume has {count} segments")
    return [typed(section, f"segment{number}", dict) for number in range(1, count + 1)]


class _Volumes:
    """The logical volumes of a group, as they are asked for."""

    def __init__(self, group: Group, physical: Mapping[str, PhysicalVolume]) -> None:
        self._group = group
        self._physical = physical
        self._made: dict[str, Volume] = {}
        self._pools: dict[str, Pool] = {}
        self._making: list[str] = []
        self._stores: dict[str, str] = {}
        self._merging: set[str] = set()
        for section in group.logical.values():
            snapshot = section.get("segment1")
            if isinstance(snapshot, dict) and snapshot.get("type") == "snapshot":
                self._stores[str(snapshot.get("cow_store"))] = str(snapshot.get("origin"))
                if "merging_store" in snapshot:
                    self._merging.add(str(snapshot.get("origin")))

    def size(self, name: str) -> int:
        """Bytes. Raises DamageError where its segments are not in order."""
        end = 0
        for segment in _segments(self._section(name)):
            if typed(segment, "start_extent", int) != end:
                raise DamageError(f"the segments of logical volume {name} are not in order")
            end += typed(segment, "extent_count", int)
        if end * self._group.extent > MOST_SIZE:
            raise DamageError(f"logical volume {name} has {end} extents")
        return end * self._group.extent

    def volume(self, name: str) -> Volume:
        """Raises UnsupportedError for types that are not read, DamageError, SourceError."""
        if name in self._made:
            return self._made[name]
        if name in self._stores:
            raise UnsupportedError(
                f"a snapshot of {quoted(self._stores[name])} that LVM keeps is not supported"
            )
        if name in self._merging:
            raise UnsupportedError("a volume that a snapshot is being merged into is not supported")
        if name in self._making or len(self._making) >= _MOST_NESTED:
            raise DamageError(f"logical volume {quoted(name)} is a part of itself")
        self._making.append(name)
        try:
            size = self.size(name)
            ranges: list[Segment] = []
            for segment in _segments(self._section(name)):
                start = typed(segment, "start_extent", int) * self._group.extent
                length = typed(segment, "extent_count", int) * self._group.extent
                ranges.extend(self._ranges(segment, start, length))
            self._made[name] = Mapped(size, ranges)
        finally:
            self._making.pop()
        return self._made[name]

    def _section(self, name: str) -> Section:
        if name not in self._group.logical:
            raise DamageError(f"group {self._group.name} does not have the logical volume {quoted(name)}")
        return self._group.logical[name]

    def _ranges(self, segment: Section, start: int, length: int) -> Iterator[Segment]:
        kind = typed(segment, "type", str)
        if not length or kind == "error":
            return
        if kind == "zero":
            yield Segment(start, length, None, 0)
        elif kind in ("striped", "linear"):
            yield self._striped(segment, start, length)
        elif kind == "thin":
            yield Segment(start, length, self._thin(segment, start + length), start)
        elif kind == "raid1":
            yield Segment(start, length, self._raid1(segment), start)
        elif kind == "mirror":
            yield Segment(start, length, *self._mirror(segment))
        else:
            shown = kind if is_name(kind) else quoted(kind)
            raise UnsupportedError(f"a logical volume of the type {shown} is not supported")

    def _striped(self, segment: Section, start: int, length: int) -> Segment:
        stripes = typed(segment, "stripes", list)
        count = typed(segment, "stripe_count", int, len(stripes) // 2)
        if not count or len(stripes) != 2 * count or length % count:
            raise DamageError(f"a segment has {count} stripes in {len(stripes)} values")
        areas = [self._area(stripes[at], stripes[at + 1]) for at in range(0, len(stripes), 2)]
        if count == 1:
            return Segment(start, length, *areas[0])
        parts = [part_of(volume, offset, length // count) for volume, offset in areas]
        return Segment(start, length, Striped(parts, typed(segment, "stripe_size", int) * SECTOR), 0)

    def _area(self, name: object, extent: object) -> tuple[Volume, int]:
        """The volume and the offset that a stripe or a leg names."""
        if not isinstance(name, str) or not isinstance(extent, int):
            raise DamageError("the stripes of a segment are not names and numbers")
        offset = extent * self._group.extent
        member = self._group.members.get(name)
        if member is None:
            return self.volume(name), offset
        physical = self._physical.get(member.uuid)
        if physical is None:
            raise DamageError(
                f"the physical volume {member.uuid} (last seen as {quoted(member.device)}) is on no disk of"
                " this snapshot; include its disk in the backup"
            )
        if member.is_missing:
            raise DamageError(
                f"LVM marked the physical volume {member.uuid} as missing, so its data may be old; restore"
                " the disks and run 'vgextend --restoremissing' in the machine"
            )
        return physical.volume, member.start + offset

    def _thin(self, segment: Section, size: int) -> Volume:
        name = typed(segment, "thin_pool", str)
        if name not in self._pools:
            pool = _segments(self._section(name))
            if len(pool) != 1 or pool[0].get("type") != "thin-pool":
                raise DamageError(f"logical volume {quoted(name)} is not a thin pool")
            metadata = self.volume(typed(pool[0], "metadata", str))
            data = self.volume(typed(pool[0], "pool", str))
            self._pools[name] = Pool(metadata, data, typed(pool[0], "chunk_size", int) * SECTOR)
        origin = None
        if "external_origin" in segment:
            origin = self.volume(typed(segment, "external_origin", str))
        return Thin(self._pools[name], typed(segment, "device_id", int), size, origin)

    def _mirror(self, segment: Section) -> tuple[Volume, int]:
        """The volume and the offset of the first leg: the others may not have all that was written.

        Of a volume that pvmove is moving, each segment is a mirror of its own. One that is moved in full is
        on the second leg alone, while others are still being moved (LVM2, `_mirrored_add_target_line`).
        """
        legs = typed(segment, "mirrors", list)
        leg = 2 if segment.get("extents_moved") == segment["extent_count"] else 0
        if len(legs) < leg + 2:
            raise DamageError("a mirror has no legs")
        return self._area(legs[leg], legs[leg + 1])

    def _raid1(self, segment: Section) -> Volume:
        """A leg that has all that was written, as the superblocks of dm-raid say."""
        names = typed(segment, "raids", list)
        if not names or len(names) % 2 or len(names) > 2 * 64:
            raise DamageError(f"a RAID has {len(names)} parts")
        legs: list[tuple[int, Volume, int, bool]] = []
        failed = newest = 0
        damage: DamageError | None = None
        for number in range(len(names) // 2):
            try:
                meta, _ = self._area(names[2 * number], 0)
                leg, _ = self._area(names[2 * number + 1], 0)
                magic, _, _, _, events, out, recovered, synced = _RAID.unpack(meta.read(0, _RAID.size))
            except DamageError as error:
                damage = damage or error
                continue
            if magic != b"DmRd":
                legs.append((number, leg, 0, True))  # never activated: all legs are the same
                continue
            legs.append((number, leg, events, recovered == _IN_SYNC and (not number or synced == _IN_SYNC)))
            if events >= newest:
                failed = out if events > newest else failed | out
                newest = events
        for number, leg, events, whole in legs:
            if events == newest and whole and not failed >> number & 1:
                return leg
        raise damage or DamageError("no leg of the RAID has all that was written")


def aliases(found: Sequence[Group]) -> list[str]:
    """The names to show for groups: a second group of the same name has a part of its UUID too."""
    seen: set[str] = set()
    names = []
    for group in found:
        name = group.name if group.name not in seen else f"{group.name}-{group.uuid[:6]}"
        seen.add(group.name)
        names.append(name)
    return names
