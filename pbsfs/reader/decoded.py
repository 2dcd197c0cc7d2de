"""The bytes of a file that lie in no stream as they are: its reader decodes them. For worker threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from pbsfs.contents.base import DECODED, Contents, Entry, Piece
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.image import Extent

STEP = 1 << 20
"""Bytes that are decoded at a time."""

S = TypeVar("S")


class DecodedStream:
    """What `Contents.read` returns of `file`, like an `ImageStream`; offsets count in the file."""

    def __init__(self, contents: Contents, file: Entry) -> None:
        self._contents = contents
        self._file = file
        self.size = file.size

    def pread(self, offset: int, size: int) -> bytes:
        """Raises DamageError, KeyRequiredError, SourceError."""
        parts = [
            self._contents.read(self._file, span.offset, span.length) for span in self.spans(offset, size)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def view(self, offset: int, size: int) -> Buffer:
        """The same."""
        return self.pread(offset, size)

    def spans(self, offset: int, size: int) -> Iterator[Extent]:
        """The range in pieces that are decoded at a time."""
        end = min(offset + size, self.size)
        for at in range(offset, end, STEP):
            yield Extent(at, min(STEP, end - at), hole=False)

    def chunks(self, offset: int, size: int) -> list[tuple[bytes | None, int, int]]:
        """See `ImageStream.chunks`: nothing has the same digest."""
        return [(b"%d" % id(self), offset, size)]

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `contents.base.Stream`."""


def stream_of(
    piece: Piece, streams: Sequence[S], contents: Contents, file: Entry
) -> S | DecodedStream | None:
    """What holds a piece of `file`: one of `streams`, the file decoded, or None for zeros."""
    if piece.stream is None:
        return None
    return DecodedStream(contents, file) if piece.stream == DECODED else streams[piece.stream]
