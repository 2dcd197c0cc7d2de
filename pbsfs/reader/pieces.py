"""A file in an archive or a disk as bytes: ranges of images, read by the images' own readers.

Used in the trio loop; `extents` and what is made from it may be called from any thread.
"""

from __future__ import annotations

import bisect
from collections.abc import Awaitable, Callable, Iterator, Sequence

from pbsfs.contents.base import DECODED, Piece
from pbsfs.formats.blob import MAX_CHUNK_SIZE
from pbsfs.reader.buffers import Buffer, join, zeros
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Extent, Image

FOLLOWED = 16 << 20
"""Bytes of a file behind a reader that are read ahead in other pieces than its own."""

MOST_FOLLOWED = 64
"""Pieces that are read ahead."""


class PiecesHandle:
    """One reader of a file. `size`: the file's bytes."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        handles: Sequence[Handle],
        *,
        own: bool,
        decode: Callable[[int, int], Awaitable[bytes]],
    ) -> None:
        """`handles`: of the streams that the pieces lie in, by their numbers; `own`: closed with this one.
        `decode`: the bytes of a range that is DECODED."""
        self._decode = decode
        self._pieces = [piece for piece in pieces if piece.length]
        self._handles = handles
        self._own = own
        self._starts: list[int] = []
        self._end = 0  # where the last read ended that did not find all in memory
        self._followed = 0  # the last piece that was read ahead
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
                parts.append(zeros(length) if length <= MAX_CHUNK_SIZE else bytes(length))
                continue
            if piece.stream == DECODED:
                return None
            data = self._handles[piece.stream].read_cached(piece.offset + start, length)
            if data is None:
                return None
            parts.append(data)
        return join(parts)

    async def read(self, offset: int, size: int) -> Buffer:
        """Like `Image.read`."""
        self._follow(offset, size)
        parts: list[Buffer] = []
        for piece, start, length in self._ranges(offset, size):
            if piece.stream is None:
                parts.append(zeros(length) if length <= MAX_CHUNK_SIZE else bytes(length))
            elif piece.stream == DECODED:
                parts.append(await self._decode(piece.offset + start, length))
            else:
                parts.append(await self._handles[piece.stream].read(piece.offset + start, length))
        return join(parts)

    def _follow(self, offset: int, size: int) -> None:
        """Reads ahead in the pieces that come next, where a reader goes through a file in order: those of a
        file in a disk lie anywhere on it. In the piece itself, its image's handle does."""
        in_order, self._end = offset == self._end, offset + size
        last = bisect.bisect_right(self._starts, self._end) - 1
        if not in_order or last < self._followed:
            self._followed = last
        if not in_order:
            return
        while self._followed + 1 < len(self._pieces):
            start = self._starts[self._followed + 1]
            if start >= self._end + FOLLOWED or self._followed - last >= MOST_FOLLOWED:
                return
            self._followed += 1
            piece = self._pieces[self._followed]
            if piece.stream is not None and piece.stream != DECODED:
                image = self._handles[piece.stream].image
                for number in image.data_chunks(piece.offset, min(piece.length, FOLLOWED)):
                    if image.peek(number) is None and not image.prefetch(number):
                        return

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
            elif piece.stream == DECODED:
                yield Extent(offset, length, hole=False)
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
