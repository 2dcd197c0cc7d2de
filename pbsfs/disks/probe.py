"""The volumes on the disks of one machine: partitions, and what volume managers make of them.

The process that parses disks calls `probe` once, with all disks of a snapshot, and opens what it returns.
Only the starts of volumes are read here, and what the tables need. Synchronous; keeps no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.disks import signatures, tables
from pbsfs.disks.btrfs.btrfs import Btrfs
from pbsfs.disks.ext.reader import Ext
from pbsfs.disks.fat.exfat import ExFat
from pbsfs.disks.fat.fat import Fat
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.iso.reader import Iso
from pbsfs.disks.lvm.groups import groups, is_name
from pbsfs.disks.lvm.label import PhysicalVolume, physical_volume
from pbsfs.disks.lvm.volumes import aliases, logical_volumes
from pbsfs.disks.md import Member, array, member
from pbsfs.disks.ntfs.ntfs import Ntfs
from pbsfs.disks.signatures import Content
from pbsfs.disks.squashfs.reader import Squashfs
from pbsfs.disks.volume import Volume, part_of
from pbsfs.disks.xfs.reader import Xfs

Opener = Callable[[Volume, Sequence[Volume]], FileSystem]
"""Opens a file system on a volume, and on the others that it has parts on."""

OPENERS: Mapping[str, Opener] = MappingProxyType(
    {
        **{kind: lambda volume, _others: Ext(volume) for kind in ("ext2", "ext3", "ext4")},
        "btrfs": Btrfs,
        "exfat": lambda volume, _others: ExFat(volume),
        "iso9660": lambda volume, _others: Iso(volume),
        "ntfs": lambda volume, _others: Ntfs(volume),
        "squashfs": lambda volume, _others: Squashfs(volume),
        "vfat": lambda volume, _others: Fat(volume),
        "xfs": lambda volume, _others: Xfs(volume),
    }
)
"""By kind: the file systems that pbsfs reads."""

ISO_START = 32 << 10
"""Where an ISO 9660 begins: with boot code and tables of partitions before it."""

ELSEWHERE = "'pbsfs nbd' serves the disk to programs that can read it"
UNLOCK = "'pbsfs nbd' serves the disk, and cryptsetup-open of guestfish unlocks it (see docs/guides/luks.md)"
"""What to do about a volume that pbsfs does not read."""

KINDS = MappingProxyType(
    {
        "apfs": "an APFS container",
        "bcache": "a bcache device",
        "bcachefs": "a bcachefs file system",
        "bitlocker": "encrypted with BitLocker",
        "bsd": "a BSD disk label",
        "ceph": "a Ceph device",
        "erofs": "an EROFS file system",
        "ext-journal": "the external journal of an ext4 file system",
        "f2fs": "an F2FS file system",
        "gfs2": "a GFS2 file system",
        "hfsplus": "an HFS+ file system",
        "jfs": "a JFS file system",
        "ldm": "part of a dynamic disk of Windows",
        "luks": "encrypted with LUKS",
        "nilfs2": "a NILFS2 file system",
        "ocfs2": "an OCFS2 file system",
        "refs": "a ReFS file system",
        "reiser4": "a Reiser4 file system",
        "reiserfs": "a ReiserFS file system",
        "storage-spaces": "part of a storage pool of Windows",
        "stratis": "part of a Stratis pool",
        "udf": "a UDF file system",
        "ufs": "a UFS file system",
        "vdo": "a VDO device",
        "zfs": "part of a ZFS pool",
    }
)
"""What people call the kinds that pbsfs does not read."""

_TYPES = MappingProxyType(
    {
        "42": "ldm",
        "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "ldm",
        "af9b60a0-1431-4f62-bc68-3311714a69ad": "ldm",
        "e75caf8f-f680-4cee-afa3-b001e56efc2d": "storage-spaces",
    }
)
"""The types of partitions that say what is in them."""

_LEFT_OUT = {
    "41",  # PReP boot
    "82",  # Linux swap
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b",  # PReP boot
    "e3c9e316-0b5c-4db8-817d-f92df00215ae",  # Microsoft reserved
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",  # Linux swap
    "83bd6b9d-7f41-11dc-be0b-001560b84f0f",  # FreeBSD boot
    "516e7cb5-6ecf-11d6-8ff8-00022d09712b",  # FreeBSD swap
}
"""The types of partitions that are left out where nothing is recognised in them."""


@dataclass(frozen=True, slots=True)
class Found:
    """One volume.

    `name`: `scsi0-p2`, `scsi0` for a disk without partitions, `vg0-root` as device mapper names it (dashes
    doubled). `size`: bytes. `kind`: `ext4`, `xfs`, `vfat`, `luks`, … or `unknown`. `volume`: its bytes; None
    where they cannot be read. `problem`: why there is no file system to open, and what to do; None where
    there is one. `part_uuid`, `part_label`: the PARTUUID and PARTLABEL of a partition. `others`: the other
    volumes that the file system lies on. `mapper_uuid`: of a logical volume, as device mapper has it.
    """

    name: str
    size: int
    kind: str
    volume: Volume | None
    problem: str | None = None
    part_uuid: str | None = None
    others: tuple[Volume, ...] = ()
    part_label: str | None = None
    mapper_uuid: str | None = None

    def open(self) -> FileSystem:
        """Raises DamageError, KeyRequiredError, SourceError."""
        if self.problem is not None or self.volume is None:
            raise UnsupportedError(f"{self.name}: {self.problem}")
        return OPENERS[self.kind](self.volume, self.others)


def probe(disks: Sequence[tuple[str, Volume]]) -> list[Found]:
    """The volumes on `disks`, each with its short name, in the order in which they are shown.

    Swap, empty and boot partitions are left out, and what is part of another volume. Raises KeyRequiredError
    and SourceError; damage is the problem of the volume that it hits.
    """
    for _name, disk in disks:
        disk.prefetch([(0, min(signatures.HEAD, disk.size))])
    found = [volume for name, disk in disks for volume in _volumes(name, disk)]
    members, found = _parted(found, "md")
    physical, found = _parted([*found, *_arrays(members)], "lvm")
    members, found = _parted([*found, *_logical(physical)], "md")
    nested = [replace(one, problem=f"md on another volume is not supported; {ELSEWHERE}") for one in members]
    return _unique([_told(volume) for volume in _joined(found + nested)])


def _joined(found: list[Found]) -> list[Found]:
    """With each btrfs that lies on several volumes once, where the first of them is."""
    together: dict[bytes, list[Found]] = {}
    for volume in found:
        if volume.kind == "btrfs" and volume.volume is not None:
            identity = signatures.btrfs_on_several(volume.volume)
            if identity is not None:
                together.setdefault(identity, []).append(volume)
    firsts: dict[str, tuple[Volume, ...]] = {}
    rest: set[str] = set()
    for first, *others in together.values():
        firsts[first.name] = tuple(one.volume for one in others if one.volume is not None)
        rest.update(one.name for one in others)
    return [replace(one, others=firsts.get(one.name, ())) for one in found if one.name not in rest]


def _parted(found: list[Found], kind: str) -> tuple[list[Found], list[Found]]:
    """Those of a kind that have no problem, and the others."""
    chosen = [volume for volume in found if volume.kind == kind and volume.problem is None]
    return chosen, [volume for volume in found if volume.kind != kind or volume.problem is not None]


def _arrays(members: Sequence[Found]) -> Iterator[Found]:
    """What is on the md arrays of `members`."""
    known: dict[bytes, list[Member]] = {}
    for one in members:
        assert one.volume is not None
        part = member(one.volume, None)
        assert part is not None
        known.setdefault(part.array, []).append(part)
    for parts in known.values():
        label = parts[0].name
        name = (
            f"md{label}" if label.isascii() and label.isdigit() else f"md-{label}" if is_name(label) else "md"
        )
        size = max(part.used for part in parts)
        try:
            volume = array(parts)
        except UnsupportedError as error:
            yield Found(name, size, "md", None, f"{error}; {ELSEWHERE}")
        except DamageError as error:
            yield Found(name, size, "md", None, str(error))
        else:
            yield from _volumes(name, volume)


def _logical(physical: Sequence[Found]) -> Iterator[Found]:
    """What is in the logical volumes on physical ones; and why a physical one cannot be read."""
    known: dict[str, tuple[Found, PhysicalVolume]] = {}
    for one in physical:
        assert one.volume is not None
        try:
            label = physical_volume(one.volume)
        except DamageError as error:
            yield replace(one, problem=f"{error}; {ELSEWHERE}")
            continue
        if label is None:
            yield replace(one, problem=f"the LVM label is not valid; {ELSEWHERE}")
        elif label.uuid in known:
            first = known[label.uuid][0].name
            yield replace(
                one, problem=f"a second copy of the physical volume {first}, which is used; {ELSEWHERE}"
            )
        else:
            known[label.uuid] = (one, label)
    every, damaged = groups([label for _found, label in known.values()])
    for label, damage in damaged:
        yield replace(known[label.uuid][0], problem=f"{damage}; {ELSEWHERE}")
    here = {uuid: label for uuid, (_found, label) in known.items()}
    for group, alias in zip(every, aliases(every), strict=True):
        for logical in logical_volumes(group, here, alias):
            if logical.volume is None:
                problem = logical.problem if logical.kind == "lvm" else f"{logical.problem}; {ELSEWHERE}"
                yield Found(logical.name, logical.size, logical.kind, None, problem)
                continue
            for found in _volumes(logical.name, logical.volume):
                nested = f"LVM on a logical volume is not supported; {ELSEWHERE}"
                if found.kind == "lvm":
                    found = replace(found, problem=nested)  # noqa: PLW2901
                is_whole = found.name == logical.name
                yield replace(found, mapper_uuid=logical.uuid) if is_whole and logical.uuid else found


def _unique(found: list[Found]) -> list[Found]:
    """With a number behind the names that occurred before."""
    seen: set[str] = set()
    done = []
    for volume in found:
        name, number = volume.name, 2
        while name in seen:
            name = f"{volume.name}-{number}"
            number += 1
        seen.add(name)
        done.append(replace(volume, name=name))
    return done


def _volumes(name: str, disk: Volume) -> Iterator[Found]:
    """A disk, or its partitions, without those that are left out; `kind` is that of its content."""
    try:
        whole = signatures.recognised(disk)
        table = _table(disk, whole)
    except DamageError as error:
        yield Found(name, disk.size, "unknown", disk, f"{error}; {ELSEWHERE}")
        return
    if table is None:
        found = _whole(Found(name, disk.size, "unknown", disk), whole)
        if found is not None:
            yield found
        return
    hybrid = whole is not None and whole.kind == "iso9660"
    for partition in table:
        found = _partition(name, disk, partition)
        if found is not None and found.kind == "unknown" and hybrid and partition.start <= ISO_START:
            # The image of an installer: the table says about itself that it is a partition.
            found = Found(found.name, disk.size, "iso9660", disk, None, partition.uuid)
            hybrid = False
        if found is not None:
            yield found


def _table(disk: Volume, whole: Content | None) -> list[tables.Partition] | None:
    """The partitions of a disk; None where the disk itself is the volume.

    A table may be older than the file system on the disk, or the magic number of a file system older than
    the table: what is recognised in the partitions decides. A GPT to which the MBR does not point is older
    than the MBR, as for the kernel.
    """
    protective = tables.is_protective(disk)
    by_size: list[list[tables.Partition]] = []
    if not protective:
        found = (tables.mbr(disk, sector) for sector in tables.SECTORS)
        by_size = [table for table in found if table is not None]
        for table in by_size:
            if any(_is_formatted(disk, partition) for partition in table):
                return table
    if protective or whole is None:
        partitions = tables.gpt(disk, backup=True)
        if partitions is not None:
            return partitions
        if protective:
            raise DamageError("the MBR says that there is a GPT, but both of its tables are missing")
    return by_size[0] if by_size and whole is None else None


def _is_formatted(disk: Volume, partition: tables.Partition) -> bool:
    if partition.problem is not None:
        return False
    try:
        return signatures.recognised(part_of(disk, partition.start, partition.size)) is not None
    except DamageError:
        return False


def _whole(found: Found, content: Content | None) -> Found | None:
    try:
        return _content(found, content, "")
    except DamageError as error:
        return replace(found, problem=f"{error}; {ELSEWHERE}")


def _partition(name: str, disk: Volume, partition: tables.Partition) -> Found | None:
    found = Found(
        f"{name}-p{partition.number}",
        partition.size,
        "unknown",
        None,
        None,
        partition.uuid,
        part_label=partition.label,
    )
    if partition.problem is not None:
        return replace(found, problem=f"{partition.problem}; {ELSEWHERE}")
    found = replace(found, volume=part_of(disk, partition.start, partition.size))
    assert found.volume is not None
    try:
        return _content(found, signatures.recognised(found.volume), partition.kind)
    except DamageError as error:
        return replace(found, problem=f"{error}; {ELSEWHERE}")


def _content(found: Found, content: Content | None, partition_type: str) -> Found | None:
    """`found` with the kind of its content; None where it is left out. Raises DamageError."""
    assert found.volume is not None
    if content is not None and content.kind == "swap":
        return None
    if member(found.volume, content.end if content is not None else None) is not None:
        return replace(found, kind="md")
    if content is not None:
        return replace(found, kind=content.kind)
    kind = _TYPES.get(partition_type)
    if kind is None and (partition_type in _LEFT_OUT or signatures.is_blank(found.volume)):
        return None
    return replace(found, kind=kind or "unknown")


def _told(found: Found) -> Found:
    """`found` with the problem that its kind means."""
    if found.problem is not None or found.kind in OPENERS:
        return found
    if found.kind == "luks":
        problem = f"encrypted with LUKS; {UNLOCK}"
    elif found.kind == "bitlocker":
        problem = f"encrypted with BitLocker; {UNLOCK}"
    elif found.kind == "unknown":
        problem = f"no known file system; {ELSEWHERE}"
    else:
        problem = f"{KINDS.get(found.kind, found.kind)} is not supported; {ELSEWHERE}"
    return replace(found, problem=problem)
