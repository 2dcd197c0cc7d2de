"""A machine's own tree: its file systems, mounted in each other as its `etc/fstab` says.

Of a machine with Windows, a directory for each drive: `C` has the directory `Windows`, and `D`, `E` … are the
other volumes in the order of the disks (the letters that Windows gave them are in its registry, which is not
read). Synchronous; of one thread.
"""

from __future__ import annotations

import re
import stat as stat_bits
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Contents, Entry, Found, Piece
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.volume import Disk

MOST = 1 << 13
"""Views of a machine's file systems: what distinguishes their inodes."""

MOST_FSTAB = 256 << 10
"""Bytes of an fstab that are read."""

MOST_MOUNTS = 1000

_FSTAB = (b"etc", b"fstab")
_ROOTS = (b"", b"@", b"root", b"@rootfs")
"""Where the root of a Linux system usually is in a btrfs that has it in no default subvolume."""

_BY = {
    "/dev/disk/by-uuid/": "UUID",
    "/dev/disk/by-label/": "LABEL",
    "/dev/disk/by-partuuid/": "PARTUUID",
    "/dev/disk/by-partlabel/": "PARTLABEL",
}

_WINDOWS = ((b"windows", b"winnt"), (b"system32",))
"""The names, in small letters, of a directory that only the volume with Windows has: up to Windows 2003 they
are written in other ways."""

_EFI = ((b"efi",),)
_LETTERS = "DEFGHIJKLMNOPQRSTUVWXYZ"
UNIX = {"ext2", "ext3", "ext4", "xfs", "btrfs"}
DOS = {"ntfs", "vfat", "exfat"}
UNREADABLE = "unreadable"
"""The kind of a volume of which damage hides what it is: it may be any."""
_TOP = MOST - 1  # the number of the directory with drives
_MOUNTS = _TOP - MOST_MOUNTS  # that of the view that the first line of an fstab makes


@dataclass(frozen=True, slots=True)
class Part:
    """A volume of the machine. `open`: raises DamageError. `part_label`: the name of its partition.
    `mapper_uuid`: of a logical volume, as device mapper has it."""

    name: str
    kind: str
    part_uuid: str | None
    open: Callable[[], FileSystem]
    part_label: str | None = None
    mapper_uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an fstab: what is mounted, where (steps of the path), and the subvolume of it: a path, a
    number, or None for the default one."""

    device: str
    place: tuple[bytes, ...]
    subvolume: bytes | int | None = None


@dataclass(frozen=True, slots=True)
class Linux:
    """A system: the directory `root` of the volume `number`, and the lines of its fstab."""

    number: int
    root: Entry
    lines: list[Line]


def parse_fstab(text: bytes) -> list[Line]:
    """The lines of an fstab that mount something in a directory, in order; see fstab(5)."""
    found: list[Line] = []
    for line in text.split(b"\n"):
        fields = line.split()
        if len(fields) < 3 or fields[0].startswith(b"#") or not fields[1].startswith(b"/"):
            continue
        if fields[2] in {b"swap", b"proc", b"sysfs", b"tmpfs", b"devpts", b"nfs", b"nfs4", b"cifs"}:
            continue
        place = tuple(step for step in _plain(fields[1]).split(b"/") if step)
        options = fields[3].split(b",") if len(fields) > 3 else []
        if b".." in place or len(found) >= MOST_MOUNTS:
            continue
        device = _plain(fields[0]).decode(errors="replace").replace('"', "")
        found.append(Line(device, place, _subvolume(options)))
    return found


def _subvolume(options: Sequence[bytes]) -> bytes | int | None:
    for option in options:
        if option.startswith(b"subvol="):
            return option[7:].strip(b"/")
    for option in options:
        if option.startswith(b"subvolid=") and option[9:].isdigit() and len(option) < 30:
            return int(option[9:])
    return None


def _named(device: str) -> tuple[str, str]:
    """What the device of a line is found by, as `UUID`, and the value; both are empty for other names."""
    for directory, what in _BY.items():
        if device.startswith(directory) and len(device) > len(directory):
            # udev escapes what a path cannot have (udev_util_encode_string).
            name = device[len(directory) :].encode(errors="replace")
            name = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name)
            return what, name.decode(errors="replace")
    what, _equals, value = device.partition("=")
    return (what, value) if value else ("", "")


def _plain(field: bytes) -> bytes:
    """A field with its octal escapes resolved: `\\040` is a space."""
    return re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), field)


class Guest(Contents):
    """The tree of a machine. Its `facts` say which volume is where, and what its fstab names that is not on
    its disks."""

    def __init__(self, parts: Sequence[Part], disks: Sequence[Disk]) -> None:
        """`disks`: by the numbers of pieces."""
        self.streams = ()
        self._disks = disks
        self._parts = list(parts[:_MOUNTS])
        # Each volume has a view, and each place where it is mounted another one. What is mounted in one view
        # of a file system is not in its others, as with mount(8), so that every walk ends.
        self._views = {number: number for number in range(len(self._parts))}  # the number of the volume
        self._systems: dict[int, FileSystem] = {}
        self._mounts: dict[tuple[int, int], Entry] = {}  # a view and a directory of it: what is shown there
        self._facts: dict[str, str] = {}
        self._drives: dict[bytes, Entry] = {}
        self._hidden: DamageError | None = None  # why there may be more than these drives, or a root
        self._damaged: dict[tuple[int, int], DamageError] = {}  # directories whose volume can't be read
        self.root = self._find_linux() or self._windows()

    def facts(self) -> dict[str, str]:
        return self._facts

    # --- putting it together

    def _system(self, view: int) -> FileSystem:
        number = self._views[view]
        if number not in self._systems:
            self._systems[number] = self._parts[number].open()
        return self._systems[number]

    def _wrapped(self, view: int, entry: Entry) -> Entry:
        mounted = self._mounts.get((view, entry.inode)) if entry.is_directory else None
        if mounted is not None:
            return mounted.but(name=entry.name)
        return entry.but(inode=entry.inode * MOST + view)

    def _unwrapped(self, entry: Entry) -> tuple[int, Entry]:
        return entry.inode % MOST, entry.but(inode=entry.inode // MOST)

    def _at(self, number: int, steps: Sequence[bytes], start: Entry | None = None) -> Entry | None:
        """What is at a path in one file system, from its root or from `start` on; links are not followed."""
        system = self._system(number)
        here: Entry | None = start or system.root
        for step in steps:
            here = system.child(here, step) if here is not None and here.is_directory else None
        return here

    def _start(self, number: int, subvolume: bytes | int | None) -> Entry | None:
        """The directory that is shown where a file system is mounted; `subvolume`: as in `Line`."""
        if isinstance(subvolume, bytes):
            return self._at(number, [step for step in subvolume.split(b"/") if step])
        return self._system(number).subvolume(subvolume)

    def _find_linux(self) -> Entry | None:
        for number, part in enumerate(self._parts):
            if part.kind not in UNIX | {UNREADABLE}:
                continue
            for where in (None, *_ROOTS) if part.kind == "btrfs" else (None,):
                try:
                    system = self._linux(number, self._start(number, where))
                    if system is not None:
                        system = self._named_root(system)
                        self._facts["root"] = self._parts[system.number].name
                        self._mount(system.number, system.root, system.lines)
                        return self._wrapped(system.number, system.root.but(name=b""))
                except DamageError as error:
                    self._hide(part, error)
        return None

    def _linux(self, number: int, root: Entry | None) -> Linux | None:
        """The system whose root is a directory; None where that has no fstab."""
        fstab = None if root is None else self._at(number, _FSTAB, root)
        if root is None or fstab is None or not fstab.is_file:
            return None
        return Linux(number, root, parse_fstab(self._read(number, fstab)))

    def _named_root(self, system: Linux) -> Linux:
        """The system whose root is what the fstab of `system` names: that may be a copy of it."""
        line = next((line for line in system.lines if not line.place), None)
        if line is None:
            return system
        try:
            number, goal = self._goal(line)
            return self._linux(number, goal) or system
        except DamageError:
            return system

    def _hide(self, part: Part, error: DamageError) -> None:
        self._hidden = DamageError(f"{part.name}: {error}")
        self._facts["problem"] = str(self._hidden)

    def _read(self, number: int, file: Entry) -> bytes:
        system = self._system(number)
        size = min(file.size, MOST_FSTAB)
        found = bytearray()
        for piece in system.data(file):
            length = min(piece.length, size - len(found))
            if length <= 0:
                break
            found += self._bytes(system, file, piece, length)
        return bytes(found)

    def _bytes(self, system: FileSystem, file: Entry, piece: Piece, length: int) -> bytes:
        if piece.stream is None:
            return bytes(length)
        if piece.stream == DECODED:
            return system.read(file, piece.offset, length)
        return self._disks[piece.stream].read(piece.offset, length)

    def _mount(self, number: int, root: Entry, lines: Sequence[Line]) -> None:
        missing: list[str] = []
        mounted: list[str] = []
        # Views have the numbers of lines: the next process has the same, whatever can't be read there.
        for view, line in sorted(enumerate(lines, _MOUNTS), key=lambda numbered: len(numbered[1].place)):
            if not line.place:
                continue
            where = "/" + b"/".join(line.place).decode(errors="replace")
            place: tuple[int, int] | None = None
            try:
                place = self._follow(number, root, line.place)
                found, goal = self._goal(line)
            except DamageError as error:
                missing.append(f"{where} ({error})")
                if place is not None:
                    self._damaged[place] = error
                continue
            if goal is None or place is None or not goal.is_directory:
                missing.append(f"{where} ({line.device})")
                continue
            self._mounts[place] = goal.but(inode=goal.inode * MOST + view)
            self._views[view] = found
            mounted.append(f"{where} ({self._parts[found].name})")
        if mounted:
            self._facts["mounted"] = ", ".join(mounted)
        if missing:
            self._facts["not_mounted"] = ", ".join(missing)

    def _goal(self, line: Line) -> tuple[int, Entry | None]:
        """What a line mounts, and the system that it is in. Raises DamageError, with the volume's name."""
        found = self._part_of(line.device)
        if found is None:
            return _TOP, None
        try:
            return found, self._start(found, line.subvolume)
        except DamageError as error:
            raise DamageError(f"{self._parts[found].name}: {error}") from None

    def _follow(self, number: int, root: Entry, steps: Sequence[bytes]) -> tuple[int, int] | None:
        """The directory at a path of the machine as far as it is put together: its view and inode."""
        here, where = root, number
        for step in steps:
            found = self._system(where).child(here, step)
            if found is None or not found.is_directory:
                return None
            mounted = self._mounts.get((where, found.inode))
            if mounted is not None:
                where, here = self._unwrapped(mounted)
            else:
                here = found
        return where, here.inode

    def _part_of(self, device: str) -> int | None:
        """The volume that an fstab names. Device names such as /dev/sda1 say nothing of which disk it is.

        Raises DamageError where it may be one that can't be read.
        """
        damage: DamageError | None = None
        what, value = _named(device)
        for number, part in enumerate(self._parts):
            if what == "PARTUUID" and (part.part_uuid or "").lower() == value.lower():
                return number
            if what == "PARTLABEL" and part.part_label == value:
                return number
            if what in {"UUID", "LABEL"}:
                try:
                    told = self._system(number).facts().get(what.lower(), "")
                except DamageError as error:
                    damage = DamageError(f"{part.name}: {error}")
                    continue
                if told and (told == value or (what == "UUID" and told.lower() == value.lower())):
                    return number
            if device in {f"/dev/mapper/{part.name}", f"/dev/disk/by-id/dm-name-{part.name}"}:
                return number
            if part.mapper_uuid is not None and device == f"/dev/disk/by-id/dm-uuid-{part.mapper_uuid}":
                return number
            group, _slash, volume = device.removeprefix("/dev/").partition("/")
            if volume and part.name == f"{group.replace('-', '--')}-{volume.replace('-', '--')}":
                return number
        if damage is not None:
            raise damage
        return None

    def _windows(self) -> Entry:
        letters = iter(_LETTERS)
        others: list[int] = []
        for number, part in enumerate(self._parts):
            if part.kind not in DOS | {UNREADABLE}:
                continue
            try:
                if b"C" not in self._drives and self._has(number, _WINDOWS):
                    self._drives[b"C"] = self._wrapped(number, self._system(number).root.but(name=b"C"))
                elif part.kind == "ntfs" or not self._has(number, _EFI):
                    others.append(number)
            except DamageError as error:
                self._hide(part, error)
        if b"C" in self._drives:
            for number in others:
                name = next(letters, "").encode()
                try:
                    if name:
                        self._drives[name] = self._wrapped(number, self._system(number).root.but(name=name))
                except DamageError as error:
                    self._hide(self._parts[number], error)
        else:
            self._facts["root"] = "none: no volume has /etc/fstab, or the directory Windows"
        for name, entry in self._drives.items():
            self._facts[f"drive_{name.decode().lower()}"] = self._parts[entry.inode % MOST].name
        return Entry(b"", stat_bits.S_IFDIR | 0o755, inode=_TOP)

    def _has(self, number: int, steps: Sequence[Sequence[bytes]]) -> bool:
        """Whether a file system has a directory at a path, whose names may have capitals; `steps`: the names
        that each step may have. Raises DamageError where it may have one that can't be read."""
        system = self._system(number)
        here = [system.root]
        for names in steps:
            below: list[Entry] = []
            damage: DamageError | None = None
            for directory in here:
                found = system.children(directory, names_only=True)
                damage = damage or found.damage
                below += [each for each in found.entries if each.name.lower() in names and each.is_directory]
            if not below and damage is not None:
                raise damage
            here = below
        return bool(here)

    def _check(self, number: int, directory: Entry) -> None:
        """Raises DamageError for a directory that shows a volume that can't be read: it would look empty."""
        if (number, directory.inode) in self._damaged:
            raise self._damaged[number, directory.inode]

    # --- what Contents asks for

    def children(self, directory: Entry, *, names_only: bool = False) -> Found:
        if directory.inode == _TOP:
            return Found(list(self._drives.values()), self._hidden)
        number, inner = self._unwrapped(directory)
        self._check(number, inner)
        found = self._system(number).children(inner, names_only=names_only)
        return Found([self._wrapped(number, entry) for entry in found.entries], found.damage)

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        if directory.inode == _TOP:
            if self._hidden is not None and name not in self._drives:
                raise self._hidden
            return self._drives.get(name)
        number, inner = self._unwrapped(directory)
        self._check(number, inner)
        found = self._system(number).child(inner, name)
        return None if found is None else self._wrapped(number, found)

    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        if directory.inode == _TOP:
            return list(entries)
        number, inner = self._unwrapped(directory)
        # What is mounted here is exact, and of another file system.
        wanted = [entry.but(inode=entry.inode // MOST) for entry in entries if not entry.exact]
        answers = iter(self._system(number).complete(inner, wanted))
        done: list[Entry | DamageError | None] = []
        for entry in entries:
            answer = entry if entry.exact else next(answers)
            if isinstance(answer, Entry) and not entry.exact:
                answer = self._wrapped(number, answer)
            done.append(answer)
        return done

    def link_count(self, entry: Entry) -> int:
        return entry.links if entry.is_file else 1

    @property
    def knows_link_counts(self) -> bool:
        return True

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        number, inner = self._unwrapped(file)
        return self._system(number).data(inner, unconfirmed=unconfirmed)

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        number, inner = self._unwrapped(file)
        return self._system(number).read(inner, offset, size)

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        if entry.inode == _TOP:
            return {}
        number, inner = self._unwrapped(entry)
        return self._system(number).xattrs(inner)
