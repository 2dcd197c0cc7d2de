"""The master file table: records by number, and inodes with all their attributes.

An inode has a base record, and an attribute list where its attributes need more records. Records are read in
windows, of which some are kept. Of one thread.
"""

from __future__ import annotations

import functools
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.disks.ntfs.boot import Geometry
from pbsfs.disks.ntfs.extents import HOLE
from pbsfs.disks.ntfs.records import ATTRIBUTE_LIST, DATA, NUMBER, Attribute, Record, parse_record
from pbsfs.disks.ntfs.streams import Stream, stream_of
from pbsfs.disks.volume import Volume

WINDOW = 64 << 10
"""Bytes that are read of the table at once."""

_WINDOWS = 64

MOST_LIST = 256 << 10
"""Bytes of an attribute list: what Windows allows."""

_MIRRORED = 4
"""Records that have a copy."""

_LISTED = struct.Struct("<IHBBQQH")


class Listed(NamedTuple):
    """An entry of an attribute list. `record`: reference of the record that the attribute is in."""

    kind: int
    name: bytes
    lowest: int
    record: int


class Inode:
    """A base record, and the attributes of it and its other records. Every method raises DamageError,
    KeyRequiredError and SourceError."""

    def __init__(self, mft: Mft, base: Record) -> None:
        self._mft = mft
        self.base = base
        self._listed: list[Listed] | None = None
        for attribute in base.attributes:
            if attribute.kind == ATTRIBUTE_LIST:
                self._listed = _parse_list(mft.stream([attribute]))
                break

    def names(self, kind: int) -> set[bytes]:
        """The names of all attributes of a kind, as UTF-16."""
        listed: Sequence[Attribute | Listed] = self.base.attributes if self._listed is None else self._listed
        return {entry.name for entry in listed if entry.kind == kind}

    def first(self, kind: int, name: bytes = b"") -> Attribute | None:
        """The first part of an attribute; None where there is no such attribute."""
        if self._listed is None:
            for attribute in self.base.attributes:
                if attribute.kind == kind and attribute.name == name:
                    return attribute
            return None
        return next(self.parts(kind, name), None)

    def parts(self, kind: int, name: bytes = b"") -> Iterator[Attribute]:
        """The parts of an attribute in order, or all attributes where a kind has several of one name. Each
        record is read when its part is asked for."""
        if self._listed is None:
            for attribute in self.base.attributes:
                if attribute.kind == kind and attribute.name == name:
                    yield attribute
            return
        done: set[tuple[int, int]] = set()
        for entry in self._listed:
            place = (entry.lowest, entry.record)
            if entry.kind != kind or entry.name != name or place in done:
                continue
            done.add(place)
            found = False
            for attribute in self._mft.part(entry.record, self.base).attributes:
                if attribute.kind == kind and attribute.name == name and attribute.lowest == entry.lowest:
                    found = True
                    yield attribute
            if not found:
                raise DamageError(f"record {entry.record & NUMBER} does not have its attribute {kind:#x}")

    def stream(self, kind: int, name: bytes = b"") -> Stream | None:
        """The bytes of an attribute; None where there is no such attribute."""
        if self.first(kind, name) is None:
            return None
        return self._mft.stream(self.parts(kind, name))


class Mft:
    """The table. `records`: how many there are. Every method raises DamageError, KeyRequiredError and
    SourceError; text of those of `inode` begins with its number."""

    def __init__(self, volume: Volume, geometry: Geometry) -> None:
        self._volume = volume
        self._geometry = geometry
        self._size = geometry.record
        self._window = functools.lru_cache(_WINDOWS)(self._load)
        self._loaded: deque[int] = deque(maxlen=_WINDOWS)
        self._stream: Stream | None = None
        self.records = 0
        inode = Inode(self, self._record(0))
        for part in inode.parts(DATA):  # each further part lies in a record that those before it map
            if self._stream is None:
                self._stream = Stream(volume, geometry, part)
            else:
                self._stream.add(part)
            self.records = min(self._stream.initialized, self._stream.mapped) // self._size
            self._window.cache_clear()
        if self._stream is None or self._stream.mapped < self._stream.initialized:
            raise DamageError("MFT: a part of its map is missing")

    def inode(self, number: int) -> Inode:
        """The inode with a base record of this number."""
        try:
            record = self._record(number)
            if record.base:
                raise DamageError("it continues another inode")
            return Inode(self, record)
        except DamageError as error:
            raise type(error)(f"inode {number}: {error}") from None

    def part(self, reference: int, base: Record) -> Record:
        """A record that `base` has attributes in."""
        number = reference & NUMBER
        if reference == base.reference:
            return base
        try:
            record = self._record(number)
        except DamageError as error:
            raise type(error)(f"record {number}: {error}") from None
        if record.reference != reference or record.base != base.reference:
            raise DamageError(f"record {number} belongs to another inode")
        return record

    def stream(self, parts: Iterable[Attribute]) -> Stream:
        """The bytes of the attribute that has these parts."""
        return stream_of(self._volume, self._geometry, parts)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Requests records, side by side."""
        each = WINDOW // self._size
        wanted = {number // each for number in numbers if 0 <= number < self.records}
        ranges: list[tuple[int, int]] = []
        for window in sorted(wanted.difference(self._loaded)):
            ranges += [place for place in self._places(window) if place[0] != HOLE]
        if ranges:
            self._volume.prefetch(joined(ranges))

    def _record(self, number: int) -> Record:
        if not 0 <= number < max(self.records, 1):
            raise DamageError(f"it lies beyond the MFT of {self.records} records")
        try:
            record = parse_record(self._raw(number), number)
        except DamageError:
            if number >= _MIRRORED:
                raise
            place = self._geometry.mirror * self._geometry.cluster + number * self._size
            record = parse_record(self._volume.read(place, self._size), number)
        if record is None:
            raise DamageError("it is not in use")
        return record

    def _raw(self, number: int) -> bytes:
        if self._stream is None:
            return self._volume.read(self._geometry.mft * self._geometry.cluster, self._size)
        window, at = divmod(number * self._size, WINDOW)
        try:
            return self._window(window)[at : at + self._size]
        except DamageError:  # what is damaged may be another part of the window
            return self._stream.read(number * self._size, self._size)

    def _load(self, window: int) -> bytes:
        assert self._stream is not None
        self._loaded.append(window)
        start = window * WINDOW
        return self._stream.read(start, min(WINDOW, self.records * self._size - start))

    def _places(self, window: int) -> Iterator[tuple[int, int]]:
        assert self._stream is not None
        start = window * WINDOW
        return self._stream.ranges(start, min(WINDOW, self.records * self._size - start))


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges, with those put together that continue each other."""
    found: list[tuple[int, int]] = []
    for offset, size in ranges:
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((offset, size))
    return found


def _parse_list(stream: Stream) -> list[Listed]:
    if stream.size > MOST_LIST:
        raise DamageError(f"its attribute list has {stream.size} bytes")
    data = stream.read(0, stream.size)
    found: list[Listed] = []
    at = 0
    while at + _LISTED.size <= len(data):
        kind, length, letters, name, lowest, record, _instance = _LISTED.unpack_from(data, at)
        if length < _LISTED.size or at + length > len(data) or (letters and name + 2 * letters > length):
            break
        found.append(
            Listed(kind, data[at + name : at + name + 2 * letters] if letters else b"", lowest, record)
        )
        at += length
    if at != len(data):
        raise DamageError("its attribute list is damaged")
    return sorted(found, key=lambda entry: entry.lowest)
