"""Buffers that reads return: joined without copies where that can be."""

from __future__ import annotations

from pbsfs.reader.buffers import is_hole, join, zeros


def test_only_what_zeros_returned_is_a_hole() -> None:
    assert is_hole(zeros(5))
    assert is_hole(memoryview(zeros(5))[1:3])
    assert not is_hole(bytes(5))
    assert not is_hole(memoryview(bytes(5)))


def test_joined_holes_stay_a_hole() -> None:
    assert is_hole(joined := join([zeros(3), zeros(4)]))
    assert joined == bytes(7)
    assert join([zeros(3), b"data"]) == b"\0\0\0data"
    assert not is_hole(join([zeros(3), bytes(4)]))
    assert join([]) == b""


def test_one_part_is_not_copied() -> None:
    data = b"one"
    assert join([data]) is data
