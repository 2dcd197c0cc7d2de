"""ISO 9660 as contents: entries, and where files are.

Used by the process that reads the file systems of a snapshot's disks. Of Rock Ridge and Joliet the first is
shown that there is, as the kernel does. An inode's number here is the byte of its record: of a directory,
the one in itself. Synchronous; of one thread.
"""

from __future__ import annotations

import functools
import stat as stat_bits
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import FILE_TYPES, Entry, Piece
from pbsfs.contents.faults import Faults
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.iso.descriptors import FIRST, MAGIC, descriptors
from pbsfs.disks.iso.records import Record, joliet_name, plain_name, record_in
from pbsfs.disks.iso.rockridge import Attributes, attributes, skipped
from pbsfs.disks.volume import Volume

_DIRECTORY, _FILE = stat_bits.S_IFDIR | 0o555, stat_bits.S_IFREG | 0o555
"""Modes where there is no Rock Ridge: of the kernel."""

_MOST_SECTIONS = 1000
_MOST_SIZE = 256 << 20
"""Bytes of a directory."""

_KEPT = 4096
_KEPT_BLOCKS = 64


class _File(NamedTuple):
    """An entry, the places of its data, each a block and a size, and why that cannot be read."""

    entry: Entry
    sections: tuple[tuple[int, int], ...]
    problem: str | None


class Iso(FileSystem):
    """ISO 9660."""

    kind = "iso9660"

    def __init__(self, volume: Volume) -> None:
        """Raises DamageError, KeyRequiredError, SourceError."""
        super().__init__(volume)
        primary, joliet = descriptors(volume)
        self._size = primary.block_size
        self._block = functools.lru_cache(_KEPT_BLOCKS)(self._load_block)
        self._file = functools.lru_cache(_KEPT)(self._load)
        self._skipped = skipped(self._record(primary.root).system)
        self._is_joliet = self._skipped is None and joliet is not None
        if self._skipped is not None:
            self._names = "Rock Ridge"
        else:
            self._names = "Joliet" if joliet is not None else "ISO 9660"
        self._descriptor = primary
        if self._is_joliet and joliet is not None:
            self._descriptor = joliet
            self._size = joliet.block_size
            self._block.cache_clear()
        self.root = self.inode(self._descriptor.root)
        if not self.root.is_directory:
            raise DamageError("its root is not a directory")

    @staticmethod
    def recognise(volume: Volume) -> bool:
        """Whether this looks like ISO 9660. Raises KeyRequiredError, SourceError."""
        return volume.size >= FIRST + 2048 and volume.read(FIRST + 1, len(MAGIC)) == MAGIC

    def facts(self) -> dict[str, str]:
        descriptor = self._descriptor
        return {
            "label": descriptor.label,
            "uuid": descriptor.uuid,
            "journal": "none",
            "names": self._names,
        }

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        size = self._record(directory.inode).size
        if size > _MOST_SIZE:
            raise DamageError(f"the directory at byte {directory.inode} is too large")
        faults = Faults()
        continues = False
        for start in range(directory.inode, directory.inode + size, self._size):
            try:
                for at, record in self._records(start):
                    is_next, continues = continues, record.continues
                    if is_next or record.is_special or record.is_associated:
                        continue
                    try:
                        found = self._name(start + at, record)
                    except DamageError as error:
                        faults.add(_about(start + at, error))
                        continue
                    if found is not None:
                        yield found
            except DamageError as error:
                faults.add(_about(start, error))
        problem = faults.summary()
        if problem is not None:
            raise problem

    def inode(self, number: int) -> Entry:
        return self._file(number).entry

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        found = self._file(file.inode)
        if found.problem is not None:
            raise UnsupportedError(f"the file at byte {file.inode}: {found.problem}")
        pieces: list[Piece] = []
        try:
            for block, size in found.sections:
                pieces.extend(self.volume.pieces(block * self._size, size))
        except DamageError as error:
            raise _about(file.inode, error) from None
        return pieces

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        return {}

    # --- records

    def _load_block(self, start: int) -> bytes:
        """A block, as far as it lies in the volume. Raises DamageError."""
        self.volume.check(start, 1)
        return self.volume.read(start, min(self._size, self.volume.size - start))

    def _records(self, start: int) -> Iterator[tuple[int, Record]]:
        """The records in the block at byte `start`, each with where it is in it. Raises DamageError."""
        block = self._block(start)
        at = 0
        while at < len(block) and block[at]:
            record = record_in(block, at)
            yield at, record
            at += record.length

    def _record(self, place: int) -> Record:
        """The record at a byte of the volume. Raises DamageError."""
        start = place - place % self._size
        return record_in(self._block(start), place - start)

    def _attributes(self, record: Record) -> Attributes:
        if self._skipped is None:
            return Attributes()
        # The first record of the root has the entry that says how much is skipped at its very beginning.
        system = record.system if skipped(record.system) is not None else record.system[self._skipped :]
        return attributes(system, self._area)

    def _area(self, block: int, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise DamageError("entries of Rock Ridge continue beyond a block")
        return self._block(block * self._size)[offset : offset + size]

    def _name(self, place: int, record: Record) -> tuple[bytes, int, int] | None:
        """What `names` gives for the record at byte `place`; None where it is not shown here."""
        found = self._attributes(record)
        if found.was_moved:
            return None
        name = joliet_name(record.name) if self._is_joliet else found.name or plain_name(record.name)
        if found.child is not None:
            return name, found.child * self._size, stat_bits.S_IFDIR
        if record.is_directory:
            return name, record.start * self._size, stat_bits.S_IFDIR
        mode = _FILE if found.mode is None else found.mode
        return name, place, stat_bits.S_IFMT(mode)

    def _load(self, number: int) -> _File:
        try:
            record = self._record(number)
            found = self._attributes(record)
            return self._made(number, record, found)
        except DamageError as error:
            raise _about(number, error) from None

    def _made(self, number: int, record: Record, found: Attributes) -> _File:
        mode = (_DIRECTORY if record.is_directory else _FILE) if found.mode is None else found.mode & 0xFFFF
        kind = stat_bits.S_IFMT(mode)
        if kind not in FILE_TYPES or (kind == stat_bits.S_IFDIR) != record.is_directory:
            raise DamageError("its type is wrong")
        if record.is_directory and record.name != b"\0":
            raise DamageError("its directory does not begin with itself")
        sections: tuple[tuple[int, int], ...] = ()
        size, problem = 0, None
        if kind == stat_bits.S_IFREG:
            parts = list(self._parts(number, record))
            sections = tuple((part.start, part.size) for part in parts if part.size)
            size = sum(part.size for part in parts)
            if any(part.is_interleaved for part in parts):
                problem = "interleaved files are not supported"
            if found.unpacked is not None:
                size, problem = found.unpacked, "files that are compressed with zisofs are not supported"
        elif kind == stat_bits.S_IFLNK:
            if found.target is None or b"\0" in found.target:
                raise DamageError("its target is wrong")
            size = len(found.target)
        is_device = kind in {stat_bits.S_IFCHR, stat_bits.S_IFBLK}
        entry = Entry(
            b"",
            mode,
            found.uid,
            found.gid,
            (record.mtime if found.mtime is None else found.mtime) * 10**9,
            size,
            number,
            found.rdev if is_device else 0,
            found.target if kind == stat_bits.S_IFLNK else None,
            links=found.links,
        )
        return _File(entry, sections, problem)

    def _parts(self, place: int, record: Record) -> Iterator[Record]:
        """The records of a file, which may have one for each part of its data. Raises DamageError."""
        first = record
        for _ in range(_MOST_SECTIONS):
            yield record
            if not record.continues:
                return
            place += record.length
            start = place - place % self._size
            block = self._block(start)
            if place == start or not block[place - start : place - start + 1].strip(b"\0"):
                place = start if place == start else start + self._size
            record = self._record(place)
            if record.name != first.name or record.is_directory:
                raise DamageError("a part of it is missing")
        raise DamageError("it has too many parts")


def _about(place: int, error: DamageError) -> DamageError:
    return DamageError(f"the record at byte {place}: {error}")
