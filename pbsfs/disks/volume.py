"""A volume: a range of bytes in which a file system may lie, mapped to the disks of a snapshot.

Volumes are stacked: a disk, a partition of it, a logical volume on several partitions. Synchronous; of one
thread.
"""

from __future__ import annotations

import abc
import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Piece, Stream

MOST_READ = 64 << 20
"""Bytes of one read: what is on a disk must not make pbsfs allocate more at once."""


class Volume(abc.ABC):
    """`size` bytes. Every method raises DamageError where a range does not lie in them, whole."""

    size: int

    @abc.abstractmethod
    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Where the range is: pieces of the disks, by their numbers, in order; None for zeros. Lazily."""

    @abc.abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises DamageError, KeyRequiredError, SourceError too, and DamageError for
        more than MOST_READ bytes."""

    @abc.abstractmethod
    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Requests ranges, each of an offset and a size, side by side, ahead of `read`. Raises nothing but
        for ranges that do not lie in the volume."""

    def check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise DamageError(f"bytes {offset} to {offset + size} lie beyond the volume of {self.size} bytes")


class Disk(Volume):
    """A whole disk: the stream with the number `number`."""

    def __init__(self, stream: Stream, number: int = 0) -> None:
        self._stream = stream
        self._number = number
        self.size = stream.size

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        self.check(offset, length)
        return iter((Piece(self._number, offset, length),) if length else ())

    def read(self, offset: int, size: int) -> bytes:
        self.check(offset, size)
        if size > MOST_READ:
            raise DamageError(f"{size} bytes are too many to read at once")
        data = self._stream.pread(offset, size)
        if len(data) != size:
            raise DamageError(f"byte {offset} lies beyond the disk")
        return data

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        for offset, size in ranges:
            self.check(offset, size)
        self._stream.prefetch(ranges)


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` bytes of a mapped volume, from `start` on: those from `offset` of `volume` on; None for
    zeros."""

    start: int
    length: int
    volume: Volume | None
    offset: int


class Mapped(Volume):
    """A volume that is put together from ranges of others: a partition, a linear or thin logical volume."""

    def __init__(self, size: int, segments: Sequence[Segment]) -> None:
        """`segments`: in rising order; a range that none of them holds is damage. Raises DamageError where
        they overlap or do not lie in their volumes."""
        end = 0
        for segment in segments:
            if segment.start < end or segment.length <= 0:
                raise DamageError("the ranges of a volume overlap")
            end = segment.start + segment.length
            if segment.volume is not None:
                segment.volume.check(segment.offset, segment.length)
        if end > size:
            raise DamageError("a range of a volume lies beyond its end")
        self.size = size
        self._segments = segments
        self._starts = [segment.start for segment in segments]

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        self.check(offset, length)
        number = max(bisect.bisect_right(self._starts, offset) - 1, 0)
        segment = self._segments[number] if number < len(self._segments) else None
        if segment is not None and segment.volume is not None and length:
            start = offset - segment.start
            if start >= 0 and start + length <= segment.length:  # as nearly always
                return segment.volume.pieces(segment.offset + start, length)
        return self._all_pieces(offset, length)

    def _all_pieces(self, offset: int, length: int) -> Iterator[Piece]:
        for segment, start, part in self._parts(offset, length):
            if segment.volume is None:
                yield Piece(None, 0, part)
            else:
                yield from segment.volume.pieces(segment.offset + start, part)

    def read(self, offset: int, size: int) -> bytes:
        if size > MOST_READ:
            raise DamageError(f"{size} bytes are too many to read at once")
        parts = [
            bytes(part) if segment.volume is None else segment.volume.read(segment.offset + start, part)
            for segment, start, part in self._parts(offset, size)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        below: dict[int, tuple[Volume, list[tuple[int, int]]]] = {}
        for offset, size in ranges:
            for segment, start, part in self._parts(offset, size):
                if segment.volume is not None:
                    wanted = below.setdefault(id(segment.volume), (segment.volume, []))[1]
                    wanted.append((segment.offset + start, part))
        for volume, wanted in below.values():
            volume.prefetch(wanted)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Segment, int, int]]:
        """The segments that a range lies in, each with the part of it: where in the segment, how long."""
        self.check(offset, length)
        end = offset + length
        number = max(bisect.bisect_right(self._starts, offset) - 1, 0)
        while offset < end:
            segment = self._segments[number] if number < len(self._segments) else None
            if segment is None or not segment.start <= offset < segment.start + segment.length:
                raise DamageError(f"byte {offset} of the volume is stored nowhere")
            start = offset - segment.start
            part = min(segment.length - start, end - offset)
            yield segment, start, part
            offset += part
            number += 1


def part_of(volume: Volume, offset: int, size: int) -> Volume:
    """`size` bytes of `volume` from `offset` on, as a volume. Raises DamageError."""
    return Mapped(size, [Segment(0, size, volume, offset)] if size else [])
