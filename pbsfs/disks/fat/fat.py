"""FAT12, FAT16 and FAT32 with long names, as Linux's vfat shows them.

Times have no zone and are taken as UTC, as Linux does without the option `tz`. Synchronous; of one thread.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.fat.boot import looks_like_fat, read_boot
from pbsfs.disks.fat.clusters import Clusters
from pbsfs.disks.fat.common import DIRECTORY, ITEM, ROOT, FatLike, mode_of
from pbsfs.disks.fat.names import LongName, dos_time, short_label, short_name
from pbsfs.disks.volume import Volume

MOST_BYTES = 65_536 * ITEM
"""Of a directory, as the specification says."""

_VOLUME, _LONG = 0x08, 0x0F
"""Attributes: of the volume's label, and of a part of a long name."""

_FREE, _DELETED = 0x00, 0xE5
"""The first byte of directory entries that no file has; from _FREE on there are no others."""

_DOTS = (b".          ", b"..         ")

_ITEM = struct.Struct("<11sBB7xHHHHI")
"""A directory entry: short name, attributes, small letters, high half of the cluster, time, date, low half of
the cluster, size."""

_CLEAN = {12: 0, 16: 0x8000, 28: 0x8000000}
"""Of the table's second item: Windows clears it while it uses the volume."""


class Fat(FatLike):
    """A FAT12, FAT16 or FAT32 volume."""

    kind = "vfat"

    def __init__(self, volume: Volume) -> None:
        self._boot = boot = read_boot(volume)
        clusters = Clusters(
            volume,
            start=boot.start,
            size=boot.cluster_size,
            count=boot.clusters,
            table=boot.table,
            bits=boot.bits,
            most=max(MOST_BYTES // boot.cluster_size, 1),
        )
        if boot.bits == 28:
            clusters.position(boot.root)
        super().__init__(volume, clusters, boot.root, boot.root)

    @staticmethod
    def recognise(volume: Volume) -> bool:
        """Whether the boot sector looks like that of a FAT volume."""
        return looks_like_fat(volume)

    def facts(self) -> dict[str, str]:
        boot = self._boot
        facts = {"form": "FAT32" if boot.bits == 28 else f"FAT{boot.bits}", "journal": "none"}
        clean = _CLEAN[boot.bits]
        dirty = boot.dirty or self.clusters.item(1) & clean != clean
        facts["state"] = "not cleanly unmounted" if dirty else "clean"
        label = boot.label
        with suppress(DamageError):  # listing the root reports it
            for _position, stored, attributes, _flags, _item in self._items(self.root):
                if attributes & 0x3F != _LONG and attributes & _VOLUME and stored[0] != _DELETED:
                    label = stored
                    break
        text = short_label(label)
        if text and text != "NO NAME":
            facts["label"] = text
        if boot.serial is not None:
            facts["uuid"] = f"{boot.serial >> 16:04X}-{boot.serial & 0xFFFF:04X}"
        return facts

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        long = LongName()
        missing = 0 if directory.inode == ROOT else 2  # of `.` and `..`
        for position, stored, attributes, flags, item in self._items(directory):
            if attributes & 0x3F == _LONG and stored[0] != _DELETED:
                long.add(item)
            elif attributes & _VOLUME or stored[0] == _DELETED:
                long.clear()
            elif missing:
                if stored != _DOTS[2 - missing] or not attributes & DIRECTORY:
                    break
                missing -= 1
            else:
                name = long.take(stored) or short_name(stored, flags)
                yield name, position // ITEM, stat.S_IFDIR if attributes & DIRECTORY else stat.S_IFREG
        if missing:
            raise DamageError(f"directory {directory.inode} does not start with '.' and '..'")

    def inode(self, number: int) -> Entry:
        if number == ROOT:
            return self.root
        item = self.clusters.read(number * ITEM, ITEM)
        stored, attributes, _flags, high, time, date, low, size = _ITEM.unpack(item)
        if stored[0] in (_FREE, _DELETED) or attributes & _VOLUME:
            raise DamageError(f"inode {number}: there is no directory entry")
        first = low | high << 16 if self._boot.bits == 28 else low
        if attributes & DIRECTORY:
            size = 0
            try:
                self.claim(number, first)
            except DamageError as error:
                raise DamageError(f"directory {number}: {error}") from None
        mtime = dos_time(date, time)
        return Entry(b"", mode_of(attributes), mtime_ns=mtime, size=size, inode=number, hint=first)

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        if not file.size and not file.hint:
            return []
        try:
            chain = self.clusters.chain(file.hint, self.clusters.clusters_of(file.size))
            return self.clusters.pieces(chain, file.size)
        except DamageError as error:
            raise type(error)(f"inode {file.inode}: {error}") from None

    def _items(self, directory: Entry) -> Iterator[tuple[int, bytes, int, int, bytes]]:
        """The directory entries up to the first one that was never used, each with its place, its first
        fields, and its bytes. Raises DamageError after those that can be read."""
        for position, block in self.blocks(self._ranges(directory)):
            at = 0
            for stored, attributes, flags, *_ in _ITEM.iter_unpack(block):
                if stored[0] == _FREE:
                    return
                yield position + at, stored, attributes, flags, block[at : at + ITEM]
                at += ITEM

    def _ranges(self, directory: Entry) -> Iterator[tuple[int, int]]:
        """Where a directory lies: bytes of the volume, and how many. Raises DamageError after those that can
        be read."""
        if not directory.hint:
            yield self._boot.root_start, self._boot.root_size
            return
        try:
            for cluster, count in self.clusters.chain(directory.hint):
                yield self.clusters.position(cluster), count * self.clusters.size
        except DamageError as error:
            raise DamageError(f"directory {directory.inode}: {error}") from None
