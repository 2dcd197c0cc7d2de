"""The bytes of an attribute: a stream that is resident, mapped, sparse or compressed.

The reader of the file system gives maps of files from these; the metadata that is in attributes is read with
`read`. Of one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import DECODED, Piece
from pbsfs.disks.ntfs.boot import Geometry
from pbsfs.disks.ntfs.extents import HOLE, Extents
from pbsfs.disks.ntfs.lznt1 import CHUNK, decompress
from pbsfs.disks.ntfs.records import COMPRESSED, ENCRYPTED, Attribute
from pbsfs.disks.volume import Volume

MOST_UNIT = 1 << 20
"""Bytes of a compression unit; Windows makes 64 KiB at most."""

COMPRESSED_UNIT = -2
"""As the place of clusters: they are compressed."""

_UNITS = 4
"""Decoded units that a stream keeps: those of one request, and one before."""


class Stream:
    """`size` bytes. Every method raises DamageError, KeyRequiredError and SourceError."""

    def __init__(self, volume: Volume, geometry: Geometry, first: Attribute) -> None:
        """`first`: the part of the attribute that begins at its first cluster."""
        self._volume = volume
        self._cluster = geometry.cluster
        self._value = first.value if first.resident else None
        self._extents = Extents(geometry.clusters)
        self._unit = 0
        self.size = first.size
        self.initialized = first.size if first.resident else first.initialized
        self.encrypted = first.flags & ENCRYPTED != 0
        if not first.resident:
            if first.flags & COMPRESSED:
                self._unit = _unit_of(first, self._cluster)
            self.add(first)
        self._decoded = functools.lru_cache(_UNITS)(self._decode)

    def add(self, part: Attribute) -> None:
        """One more part of the attribute."""
        if part.resident or self._value is not None:
            raise DamageError("a resident attribute has two parts")
        self._extents.add(part.value, part.lowest, part.highest)

    @property
    def mapped(self) -> int:
        """Bytes whose places are known so far."""
        return self.size if self._value is not None else min(self._extents.end * self._cluster, self.size)

    @property
    def is_whole(self) -> bool:
        """Whether every byte is stored."""
        return self.initialized == self.size and all(
            place != HOLE for place, _count in self._clusters(self.size)
        )

    def pieces(self) -> Iterator[Piece]:
        """All bytes, in order; neighbours are not merged."""
        if self._value is not None:
            if self.size:
                yield Piece(DECODED, 0, self.size)
            return
        at, end = 0, self.initialized
        for place, count in self._units() if self._unit else self._clusters(end):
            if at >= end:
                break
            length = min(count * self._cluster, end - at)
            if place == HOLE:
                yield Piece(None, 0, length)
            elif place == COMPRESSED_UNIT:
                yield Piece(DECODED, at, length)
            else:
                yield from self._volume.pieces(place * self._cluster, length)
            at += length
        if at < self.size:
            yield Piece(None, 0, self.size - at)

    def stored(self) -> Iterator[Piece]:
        """Where the bytes of a compressed stream are stored; nothing of others. Neighbours are not merged."""
        if self._unit and self._value is None:
            for place, count in self._extents.parts(0, self._extents.end):
                if place != HOLE:
                    yield from self._volume.pieces(place * self._cluster, count * self._cluster)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise DamageError(f"its bytes {offset} to {offset + size} lie beyond its end")
        if self._value is not None:
            return self._value[offset : offset + size]
        stored = max(min(size, self.initialized - offset), 0)
        parts = list(self._stored(offset, stored))
        if stored < size:
            parts.append(bytes(size - stored))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _stored(self, offset: int, size: int) -> Iterator[bytes]:
        if self._unit:
            unit = self._unit * self._cluster
            end = offset + size
            while offset < end:
                number, start = divmod(offset, unit)
                part = min(unit - start, end - offset)
                yield self._decoded(number)[start : start + part]
                offset += part
            return
        for place, length in self.ranges(offset, size):
            yield bytes(length) if place == HOLE else self._volume.read(place, length)

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Where bytes of a mapped attribute are in the volume (HOLE: nowhere), as they are stored."""
        cluster = self._cluster
        skip = offset % cluster
        for place, count in self._extents.parts(offset // cluster, -(-(offset + size) // cluster)):
            length = min(count * cluster - skip, size)
            yield (place if place == HOLE else place * cluster + skip), length
            size -= length
            skip = 0

    def _clusters(self, end: int) -> Iterator[tuple[int, int]]:
        return self._extents.parts(0, -(-end // self._cluster))

    def _units(self) -> Iterator[tuple[int, int]]:
        """The extents of a compressed attribute: whole units that are stored as they are or not at all, and
        those that are compressed."""
        unit = self._unit
        held: list[tuple[int, int]] = []  # what is there of a unit that is in several extents
        filled = 0
        for place, count in self._clusters(self.initialized):
            left = count
            while left:
                if not filled and left >= unit:
                    whole = left - left % unit
                    yield (place if place == HOLE else place + count - left), whole
                    left -= whole
                    continue
                take = min(left, unit - filled)
                held.append((place if place == HOLE else place + count - left, take))
                filled += take
                left -= take
                if filled == unit:
                    yield from self._mixed(held)
                    held, filled = [], 0
        if held:  # how the last unit ends lies beyond the data
            yield from self._mixed(self._parts_of(-(-self.initialized // self._cluster) // unit))

    def _parts_of(self, number: int) -> list[tuple[int, int]]:
        """The extents of one unit."""
        start = number * self._unit
        return list(self._extents.parts(start, min(start + self._unit, self._extents.end)))

    def _mixed(self, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if all(place != HOLE for place, _count in parts) or all(place == HOLE for place, _count in parts):
            return parts
        return [(COMPRESSED_UNIT, sum(count for _place, count in parts))]

    def _decode(self, number: int) -> bytes:
        """All bytes of one unit."""
        parts = self._parts_of(number)
        cluster = self._cluster
        size = self._unit * cluster
        stored = [(place, count) for place, count in parts if place != HOLE]
        data = b"".join(self._volume.read(place * cluster, count * cluster) for place, count in stored)
        if len(stored) == len(parts):
            return data + bytes(size - len(data))
        if not stored:
            return bytes(size)
        if any(place == HOLE for place, _count in parts[: len(stored)]):
            raise DamageError("compressed data begins after a hole")
        return decompress(data, size)


def _unit_of(first: Attribute, cluster: int) -> int:
    """Clusters of a compression unit."""
    size = cluster << first.unit
    if first.flags & COMPRESSED != 1 or not 1 <= first.unit <= 16 or size > MOST_UNIT or size % CHUNK:
        form = f"{first.flags & COMPRESSED} in units of {size} bytes"
        raise UnsupportedError(f"compression of form {form} is not supported")
    return 1 << first.unit


def stream_of(volume: Volume, geometry: Geometry, parts: Iterable[Attribute]) -> Stream:
    """The stream of an attribute, from all its parts in order."""
    stream: Stream | None = None
    for part in parts:
        if stream is None:
            stream = Stream(volume, geometry, part)
        else:
            stream.add(part)
    if stream is None or stream.mapped < stream.size:
        raise DamageError("a part of its map is missing")
    return stream


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """`pieces` with those put together that continue each other."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if (
            last is not None
            and last.stream == piece.stream
            and (last.stream is None or last.offset + last.length == piece.offset)
        ):
            found[-1] = Piece(last.stream, last.offset, last.length + piece.length)
        elif piece.length:
            found.append(piece)
    return found
