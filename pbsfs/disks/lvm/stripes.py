"""A volume whose bytes alternate between others, a stripe on each in turn. Synchronous; of one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Piece
from pbsfs.disks.volume import MOST_READ, Volume


class Striped(Volume):
    def __init__(self, parts: Sequence[Volume], stripe: int) -> None:
        """`parts`: of equal sizes. `stripe`: bytes. Raises DamageError."""
        if not parts or stripe <= 0 or parts[0].size % stripe or len({part.size for part in parts}) > 1:
            raise DamageError(f"{len(parts)} parts cannot have stripes of {stripe} bytes")
        self.size = sum(part.size for part in parts)
        self._parts = parts
        self._stripe = stripe

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        for number, start, part in self._ranges(offset, length):
            yield from self._parts[number].pieces(start, part)

    def read(self, offset: int, size: int) -> bytes:
        if size > MOST_READ:
            raise DamageError(f"{size} bytes are too many to read at once")
        return b"".join(
            self._parts[number].read(start, part) for number, start, part in self._ranges(offset, size)
        )

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        below: dict[int, list[tuple[int, int]]] = {}
        for offset, size in ranges:
            for number, start, part in self._ranges(offset, size):
                below.setdefault(number, []).append((start, part))
        for number, wanted in below.items():
            self._parts[number].prefetch(wanted)

    def _ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Which part has a range, where in it, and how much."""
        self.check(offset, length)
        end = offset + length
        while offset < end:
            row, number = divmod(offset // self._stripe, len(self._parts))
            within = offset % self._stripe
            part = min(self._stripe - within, end - offset)
            yield number, row * self._stripe + within, part
            offset += part
