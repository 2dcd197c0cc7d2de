"""exFAT, as Linux shows it.

Times that have no zone are taken as UTC. Synchronous; of one thread.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry, Piece
from pbsfs.contents.faults import Faults
from pbsfs.disks.fat import sets
from pbsfs.disks.fat.clusters import Clusters, add_piece
from pbsfs.disks.fat.common import ITEM, ROOT, FatLike
from pbsfs.disks.fat.exboot import DIRTY, looks_like_exfat, read_exboot
from pbsfs.disks.fat.names import utf16_name
from pbsfs.disks.volume import Volume

_ALONE = (0x81, 0x82, sets.LABEL, 0xA0, 0xA1)
"""Kinds in the root that are not files: the bitmap of clusters, the table of capitals, the label, and
numbers."""


class ExFat(FatLike):
    """An exFAT volume."""

    kind = "exfat"

    def __init__(self, volume: Volume) -> None:
        self._boot = boot = read_exboot(volume)
        clusters = Clusters(
            volume,
            start=boot.start,
            size=boot.cluster_size,
            count=boot.clusters,
            table=boot.table,
            bits=32,
            most=max(sets.MOST_DIRECTORY // boot.cluster_size, 1),
        )
        clusters.position(boot.root)
        super().__init__(volume, clusters, boot.root, boot.root << 1)

    @staticmethod
    def recognise(volume: Volume) -> bool:
        """Whether the boot sector says that it is exFAT."""
        return looks_like_exfat(volume)

    def facts(self) -> dict[str, str]:
        boot = self._boot
        facts = {"journal": "none", "uuid": f"{boot.serial >> 16:04X}-{boot.serial & 0xFFFF:04X}"}
        facts["state"] = "not cleanly unmounted" if boot.flags & DIRTY else "clean"
        if boot.backup:
            facts["boot"] = "the first boot region is damaged: read from its backup"
        with suppress(DamageError):  # listing the root reports it
            for _position, item in self._items(self.root):
                if item[0] == sets.LABEL:
                    label = utf16_name(item[2 : 2 + 2 * min(item[1], 11)])
                    if label:
                        facts["label"] = label.decode("utf-8", "replace")
                    break
        return facts

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        faults = Faults()
        try:
            for position, data in self._sets(directory, faults):
                try:
                    sets.check(data)
                except DamageError as error:
                    faults.add(error)
                    continue
                kind = stat.S_IFDIR if sets.is_directory(data) else stat.S_IFREG
                yield sets.name_of(data), position // ITEM, kind
        except DamageError as error:
            faults.add(error)
        damage = faults.summary()
        if damage is not None:
            raise damage

    def inode(self, number: int) -> Entry:
        if number == ROOT:
            return self.root
        try:
            data = self._set_at(number * ITEM)
            entry = sets.entry_of(data, number, self.clusters.size)
            if entry.is_directory and entry.hint >> 1:
                self.claim(number, entry.hint >> 1)
            return entry
        except DamageError as error:
            raise DamageError(f"inode {number}: {error}") from None

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        if not file.size:
            return []
        try:
            pieces = self.clusters.pieces(self._runs(file, file.size), file.end)
        except DamageError as error:
            raise type(error)(f"inode {file.inode}: {error}") from None
        if file.size > file.end:  # never written
            add_piece(pieces, Piece(None, 0, file.size - file.end))
        return pieces

    def _runs(self, entry: Entry, size: int) -> Iterator[tuple[int, int]]:
        """The clusters of a file, or of a directory other than the root."""
        wanted = self.clusters.clusters_of(size)
        if entry.hint & 1:
            return self.clusters.side_by_side(entry.hint >> 1, wanted)
        return self.clusters.chain(entry.hint >> 1, wanted)

    # --- directories

    def _sets(self, directory: Entry, faults: Faults) -> Iterator[tuple[int, bytes]]:
        """The sets of files in a directory, each with its place; not checked. `faults`: gets what else is
        wrong with the directory. Raises DamageError."""
        parts: list[bytes] = []
        place, left = 0, 0
        for position, item in self._items(directory):
            kind = item[0]
            if kind & (sets.IN_USE | sets.SECONDARY) == sets.IN_USE | sets.SECONDARY:
                if not left:
                    faults.add(DamageError(f"byte {position}: a directory entry belongs to no file"))
                    continue
                parts.append(item)
                left -= 1
                if not left and parts[0][0] == sets.FILE:
                    yield place, b"".join(parts)
                continue
            if left:
                faults.add(DamageError(f"byte {place}: the directory entries of a file are not whole"))
                left = 0
            if not kind & sets.IN_USE or kind in _ALONE:
                continue
            if kind == sets.FILE or kind & sets.BENIGN:
                place, left, parts = position, item[1], [item]
                if kind == sets.FILE and not left:
                    faults.add(DamageError(f"byte {place}: the directory entries of a file are not whole"))
            else:
                faults.add(DamageError(f"byte {position}: directory entries of kind {kind} are not known"))
        if left:
            faults.add(DamageError(f"byte {place}: the directory entries of a file are not whole"))

    def _items(self, directory: Entry) -> Iterator[tuple[int, bytes]]:
        """The directory entries up to the end mark, each with its place. Raises DamageError after those that
        can be read."""
        for position, block in self.blocks(self._ranges(directory)):
            for at in range(0, len(block), ITEM):
                if not block[at]:
                    return
                yield position + at, block[at : at + ITEM]

    def _ranges(self, directory: Entry) -> Iterator[tuple[int, int]]:
        try:
            if directory.inode == ROOT:
                runs = self.clusters.chain(self._boot.root)
            elif directory.end:
                runs = self._runs(directory, directory.end)
            else:
                return
            for cluster, count in runs:
                yield self.clusters.position(cluster), count * self.clusters.size
        except DamageError as error:
            raise DamageError(f"directory {directory.inode}: {error}") from None

    def _set_at(self, position: int) -> bytes:
        """The checked set that starts at a byte of the volume. Raises DamageError."""
        head = self.clusters.read(position, 2)
        cluster = self.clusters.containing(position)
        end = self.clusters.position(cluster) + self.clusters.size
        size = (head[1] + 1) * ITEM
        error = DamageError("the directory entries of a file are not whole")
        if head[0] != sets.FILE or size > 19 * ITEM:
            raise error
        first = self.clusters.read(position, min(size, end - position))
        for rest in self._continued(cluster, size - len(first)):
            try:
                sets.check(first + rest)
                return first + rest
            except DamageError as wrong:
                error = wrong
        raise error

    def _continued(self, cluster: int, size: int) -> Iterator[bytes]:
        """What may be the `size` bytes of a directory after a cluster: the entry does not say whether its
        directory has a chain. The set's checksum decides which it is."""
        if not size:
            yield b""
            return
        nexts = {self.clusters.item(cluster): None, cluster + 1: None}  # the table is not used without chain
        for number in nexts:
            with suppress(DamageError):
                part = self.clusters.read(self.clusters.position(number), min(size, self.clusters.size))
                for rest in self._continued(number, size - len(part)):
                    yield part + rest
