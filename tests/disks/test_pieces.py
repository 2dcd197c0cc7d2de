"""The pieces of a file: joined where one goes on where the last one ends, and limited."""

from __future__ import annotations

import pytest

from pbsfs.base.errors import UnsupportedError
from pbsfs.contents.base import DECODED, Piece
from pbsfs.disks import pieces
from pbsfs.disks.pieces import append


@pytest.mark.parametrize("stream", [0, 3, DECODED])
def test_a_piece_that_goes_on_is_joined(stream: int) -> None:
    found = [Piece(stream, 100, 10)]
    append(found, Piece(stream, 110, 5))
    append(found, Piece(stream, 115, 0))
    assert found == [Piece(stream, 100, 15)]


def test_zeros_are_joined() -> None:
    found = [Piece(None, 0, 10)]
    append(found, Piece(None, 0, 5))
    assert found == [Piece(None, 0, 15)]


@pytest.mark.parametrize(
    "piece", [Piece(0, 111, 5), Piece(0, 109, 5), Piece(1, 110, 5), Piece(None, 0, 5), Piece(DECODED, 110, 5)]
)
def test_other_pieces_stay_apart(piece: Piece) -> None:
    found = [Piece(0, 100, 10)]
    append(found, piece)
    assert found == [Piece(0, 100, 10), piece]


def test_too_many_pieces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MOST_PIECES", 2)
    found = [Piece(0, 0, 1), Piece(0, 10, 1)]
    append(found, Piece(0, 11, 1))  # needs no place of its own
    with pytest.raises(UnsupportedError, match="a file in more than 2 parts is not supported"):
        append(found, Piece(0, 20, 1))
