"""Receiving: as much as is there in one go, and no longer than a turn may take."""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable
from typing import cast

import pytest

from pbsfs.sources.server.conversation import fill

RECORD = 16 << 10


class Records:
    """A TLS socket with the bytes of `content`, of which it gives a record at a time; then `after`."""

    def __init__(self, content: bytes, after: Callable[[], int]) -> None:
        self._left = memoryview(content)
        self._after = after

    def recv_into(self, target: memoryview) -> int:
        count = min(len(target), len(self._left), RECORD)
        if not count:
            return self._after()
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def nothing_yet() -> int:
    raise ssl.SSLWantReadError


def filled(
    size: int, content: bytes, after: Callable[[], int] = nothing_yet, until: float = math.inf
) -> tuple[bytes, bool | None]:
    target = bytearray(size)
    count, more = fill(cast("ssl.SSLSocket", Records(content, after)), memoryview(target), until)
    return bytes(target[:count]), more


CONTENT = bytes(range(251)) * 1000


def test_a_place_is_filled_from_many_records_at_once() -> None:
    assert filled(len(CONTENT) - 5, CONTENT) == (CONTENT[:-5], True)


def test_what_is_there_is_received_where_the_rest_is_still_to_come() -> None:
    assert filled(len(CONTENT) + 5, CONTENT) == (CONTENT, False)
    assert filled(5, b"") == (b"", False)


def test_what_came_before_the_end_of_the_connection_is_received() -> None:
    assert filled(len(CONTENT) + 5, CONTENT, lambda: 0) == (CONTENT, None)


def test_many_small_records_do_not_make_a_turn_longer() -> None:
    found, more = filled(len(CONTENT), CONTENT, until=time.monotonic() - 1)
    assert (found, more) == (CONTENT[:RECORD], True)


def test_a_connection_that_is_lost_is_an_error() -> None:
    def lost() -> int:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        filled(len(CONTENT) + 5, CONTENT, lost)
