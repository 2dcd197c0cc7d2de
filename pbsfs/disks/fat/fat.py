"""FAT12, FAT16 and FAT32 with long names, as Linux's vfat shows them.

FAT keeps no owners, no modes and no zone: all belong to root, directories have mode 0755 and files 0644
(without w where they are read-only), and times are taken as UTC. An inode's number says where its directory
entry lies: its byte in the volume, divided by 32. Synchronous; of one thread.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Sequence

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.fat.boot import looks_like_fat, read_boot
from pbsfs.disks.fat.clusters import BLOCK, FIRST, Clusters
from pbsfs.disks.fat.names import LongName, dos_time, short_name
from pbsfs.disks.filesystem import MOST_DIRECTORIES, FileSystem
from pbsfs.disks.volume import Volume

ROOT = 1
"""The root's inode: no directory entry lies in the boot sector."""

MOST_BYTES = 65_536 * 32
"""Of a directory, as the specification says."""

READ_ONLY, VOLUME, DIRECTORY, LONG = 0x01, 0x08, 0x10, 0x0F
DELETED = 0xE5

_ITEM = struct.Struct("<11sBB7xHHHHI")
"""A directory entry: short name, attributes, small letters, high half of the cluster, time, date, low half of
the cluster, size."""

_CLEAN = {16: 0x8000, 28: 0x8000000}
"""Of the table's second item: Windows cleared it when it mounted the volume."""


class Fat(FileSystem):
    """A FAT12, FAT16 or FAT32 volume."""

    kind = "vfat"

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume)
        self._boot = boot = read_boot(volume)
        self._clusters = Clusters(
            volume,
            start=boot.start,
            size=boot.cluster_size,
            count=boot.clusters,
            table=boot.table,
            bits=boot.bits,
            most=max(MOST_BYTES // boot.cluster_size, 1),
        )
        if boot.bits == 28:
            self._clusters.position(boot.root)
        self._starts = {boot.root: ROOT}
        self.root = Entry(b"", stat.S_IFDIR | 0o755, inode=ROOT, hint=boot.root)

    @staticmethod
    def recognise(volume: Volume) -> bool:
        """Whether the boot sector looks like that of a FAT volume."""
        return looks_like_fat(volume)

    def facts(self) -> dict[str, str]:
        boot = self._boot
        label = boot.label
        try:
            for _position, stored, attributes, _flags, _slot in self._items(self.root):
                if attributes & VOLUME and attributes != LONG:
                    label = stored
                    break
        except DamageError:
            pass  # whoever lists the root is told of it
        facts = {"form": "FAT32" if boot.bits == 28 else f"FAT{boot.bits}", "journal": "none"}
        clean = _CLEAN.get(boot.bits, 0)
        dirty = boot.dirty or self._clusters.item(1) & clean != clean
        facts["state"] = "not cleanly unmounted" if dirty else "clean"
        text = short_name(label[:8] + b"   ", 0) if len(label) < 11 else _label(label)
        if text and text != b"NO NAME":
            facts["label"] = text.decode("utf-8", "replace")
        if boot.serial is not None:
            facts["uuid"] = f"{boot.serial >> 16:04X}-{boot.serial & 0xFFFF:04X}"
        return facts

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        long = LongName()
        dots = 0
        for position, stored, attributes, flags, slot in self._items(directory):
            if attributes & 0x3F == LONG:
                long.add(slot)
                continue
            if attributes & VOLUME or stored[0] == DELETED:
                long.clear()
                continue
            if stored in (b".          ", b"..         "):
                dots += 1
                long.clear()
                continue
            if dots < 2 and directory.inode != ROOT:
                raise DamageError(f"directory {directory.inode} does not start with '.' and '..'")
            name = long.take(stored) or short_name(stored, flags)
            yield name, position // 32, stat.S_IFDIR if attributes & DIRECTORY else stat.S_IFREG
        if dots < 2 and directory.inode != ROOT:
            raise DamageError(f"directory {directory.inode} does not start with '.' and '..'")

    def inode(self, number: int) -> Entry:
        if number == ROOT:
            return self.root
        stored, attributes, _flags, high, time, date, low, size = _ITEM.unpack(
            self._clusters.read(number * 32, 32)
        )
        if stored[0] in (0, DELETED) or attributes & VOLUME:
            raise DamageError(f"inode {number}: there is no directory entry")
        first = low | high << 16 if self._boot.bits == 28 else low
        mtime = dos_time(date, time)
        if attributes & DIRECTORY:
            self._claim(number, first)
            mode = stat.S_IFDIR | (0o555 if attributes & READ_ONLY else 0o755)
            return Entry(b"", mode, mtime_ns=mtime, inode=number, hint=first)
        mode = stat.S_IFREG | (0o444 if attributes & READ_ONLY else 0o644)
        return Entry(b"", mode, mtime_ns=mtime, size=size, inode=number, hint=first)

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        self._clusters.prefetch(number * 32 for number in numbers)

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        wanted = self._clusters.clusters_of(file.size)
        try:
            if not wanted and not file.hint:
                return []
            return self._clusters.pieces(self._clusters.chain(file.hint, wanted), file.size)
        except DamageError as error:
            raise type(error)(f"inode {file.inode}: {error}") from None

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        return {}

    def _claim(self, number: int, first: int) -> None:
        """Notes that a directory starts at a cluster. Raises DamageError where another one does: without
        that, a directory in itself would have no end."""
        if not FIRST <= first < FIRST + self._clusters.count:
            raise DamageError(f"directory {number} starts at cluster {first}, which does not exist")
        if len(self._starts) >= MOST_DIRECTORIES and first not in self._starts:
            raise DamageError(f"there are more than {MOST_DIRECTORIES} directories")
        if self._starts.setdefault(first, number) != number:
            raise DamageError(f"directory {number} has the clusters of another directory")

    def _items(self, directory: Entry) -> Iterator[tuple[int, bytes, int, int, bytes]]:
        """The directory entries up to the end mark, each with its byte in the volume, its first fields, and
        its 32 bytes. Raises DamageError after those that can be read."""
        for start, size in self._ranges(directory):
            for at in range(start, start + size, BLOCK):
                block = self._clusters.read(at, min(BLOCK, start + size - at))
                position = at
                for fields in _ITEM.iter_unpack(block):
                    stored = fields[0]
                    if not stored[0]:
                        return
                    yield position, stored, fields[1], fields[2], block[position - at : position - at + 32]
                    position += 32

    def _ranges(self, directory: Entry) -> Iterator[tuple[int, int]]:
        """Where a directory lies: bytes of the volume, and how many."""
        if directory.inode == ROOT and not self._boot.root:
            yield self._boot.root_start, self._boot.root_size
            return
        try:
            runs = self._clusters.chain(directory.hint)
            for cluster, count in runs:
                yield self._clusters.position(cluster), count * self._clusters.size
        except DamageError as error:
            raise DamageError(f"directory {directory.inode}: {error}") from None


def _label(stored: bytes) -> bytes:
    """A label in code page 437 as UTF-8: 11 bytes without a dot."""
    if stored[0] == 0x05:
        stored = b"\xe5" + stored[1:]
    return stored.split(b"\0", 1)[0].decode("cp437").rstrip(" ").encode()
