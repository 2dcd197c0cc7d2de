"""The pieces of a file, as readers of file systems put them together. Pure."""

from __future__ import annotations

from pbsfs.base.errors import UnsupportedError
from pbsfs.contents.base import Piece

MOST_PIECES = 600_000
"""Pieces of a file: enough for all extents that XFS may have here, with a hole before each."""


def append(pieces: list[Piece], piece: Piece) -> None:
    """Appends a piece, as one with the last where it continues that; an empty one not. Raises
    UnsupportedError where there are too many."""
    if piece.length <= 0:
        return
    if pieces:
        last = pieces[-1]
        if last.stream == piece.stream and (last.stream is None or last.offset + last.length == piece.offset):
            pieces[-1] = Piece(last.stream, last.offset, last.length + piece.length)
            return
    if len(pieces) >= MOST_PIECES:
        raise UnsupportedError(f"a file in more than {MOST_PIECES} parts is not supported")
    pieces.append(piece)
