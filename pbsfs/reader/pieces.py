"""A file in an archive or a disk as bytes: ranges of images, read by the images' own readers.

Used in the trio loop; `extents` and what is made from it may be called from any thread.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from pbsfs.contents.base import Piece
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Extent, Image


class PiecesHandle:
    """One reader of a file. `size`: the file's bytes."""

    def __init__(self, pieces: Sequence[Piece], handles: Sequence[Handle], *, own: bool) -> None:
        """`handles`: of the streams that the pieces lie in, by their numbers; `own`: closed with this one."""
        self._pieces = [piece for piece in pieces if piece.length]
        self._handles = handles
        self._own = own
        self._starts: list[int] = []
        self.size = 0
        for piece in self._pieces:
            self._starts.append(self.size)
            self.size += piece.length

    @property
    def images(self) -> list[Image]:
        """What the file lies in."""
        return [handle.image for handle in self._handles]

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """The bytes `offset` … `offset + size`, cut at the end; None where some have to be fetched."""
        parts: list[Buffer] = []
        for piece, start, length in self._ranges(offset, size):
            if piece.stream is None:
                parts.append(bytes(length))
                continue
            data = self._handles[piece.stream].read_cached(piece.offset + start, length)
            if data is None:
                return None
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, offset: int, size: int) -> Buffer:
        """Like `Image.read`."""
        parts: list[Buffer] = []
        for piece, start, length in self._ranges(offset, size):
            if piece.stream is None:
                parts.append(bytes(length))
            else:
                parts.append(await self._handles[piece.stream].read(piece.offset + start, length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def extents(self, offset: int, size: int) -> Iterator[Extent]:
        """Holes and data from `offset` on, cut to the range and the file; neighbours are merged, lazily."""
        last: Extent | None = None
        for found in self._unmerged(offset, size):
            if last is None:
                last = found
            elif last.hole == found.hole:
                last = Extent(last.offset, last.length + found.length, last.hole)
            else:
                yield last
                last = found
        if last is not None:
            yield last

    def next_data(self, offset: int) -> int | None:
        """The first byte from `offset` on that is not in a hole; None where only a hole follows."""
        return next((e.offset for e in self.extents(offset, self.size) if not e.hole), None)

    def next_hole(self, offset: int) -> int:
        """The first byte from `offset` on that is in a hole; the end of the file counts as one."""
        return next((e.offset for e in self.extents(offset, self.size) if e.hole), self.size)

    def close(self) -> None:
        """Call from the trio loop."""
        if self._own:
            for handle in self._handles:
                handle.close()

    def _unmerged(self, offset: int, size: int) -> Iterator[Extent]:
        for piece, start, length in self._ranges(offset, size):
            if piece.stream is None:
                yield Extent(offset, length, hole=True)
            else:
                here = piece.offset + start
                for found in self._handles[piece.stream].image.extents(here, length):
                    yield Extent(offset + found.offset - here, found.length, found.hole)
            offset += length

    def _ranges(self, offset: int, size: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that a range of the file lies in, each with the part: where in the piece, how long."""
        end = min(offset + size, self.size)
        number = bisect.bisect_right(self._starts, offset) - 1
        while offset < end:
            piece = self._pieces[number]
            start = offset - self._starts[number]
            length = min(piece.length - start, end - offset)
            yield piece, start, length
            offset += length
            number += 1
