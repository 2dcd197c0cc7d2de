"""The clusters of a FAT or exFAT volume: where each is, and which one follows it.

The table of what follows is read in pieces, and only those that a chain goes through are: it may have a GiB.
Callers: the readers of FAT and exFAT. Of one thread.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Piece
from pbsfs.disks.volume import Volume

FIRST = 2
"""The number of the first cluster: the table's first two items are flags."""

BLOCK = 64 << 10
"""Bytes that are read at once."""

PART = 16 << 10
"""Items of the table that are decoded at once: a multiple of 2, for those of 12 bits."""

MOST_PIECES = 250_000
"""Pieces of a file: their list has to stay within tens of MiB."""

_MASK = {12: 0xFFF, 16: 0xFFFF, 28: 0xFFFFFFF, 32: 0xFFFFFFFF}
_LAST = {12: 0xFF8, 16: 0xFFF8, 28: 0xFFFFFF8, 32: 0xFFFFFFFF}
"""From which number on an item says that its cluster is the last one."""

_BAD = {12: 0xFF7, 16: 0xFFF7, 28: 0xFFFFFF7, 32: 0xFFFFFFF7}


class Clusters:
    """`size`: bytes of a cluster. `count`: clusters. `most`: clusters of a directory."""

    def __init__(
        self, volume: Volume, *, start: int, size: int, count: int, table: int, bits: int, most: int
    ) -> None:
        """`start`: the byte where the first cluster lies. `table`: the byte where the table lies; `bits`:
        what counts of its items, 28 and 32 in 4 bytes. Raises nothing."""
        self.size = size
        self.count = count
        self._volume = volume
        self._start = start
        self._end = FIRST + count
        self._table = table
        self._bits = bits
        self._most = most
        self._block = functools.lru_cache(maxsize=64)(self._load_block)
        self._part = functools.lru_cache(maxsize=64)(self._load_part)

    # --- bytes of the volume

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the volume, through a cache: for directories. Raises DamageError."""
        self._volume.check(offset, size)
        number, at = divmod(offset, BLOCK)
        if at + size <= BLOCK:
            return self._block(number)[at : at + size]
        end = offset + size
        return b"".join(
            self._block(number)[max(offset - number * BLOCK, 0) : end - number * BLOCK]
            for number in range(number, (end - 1) // BLOCK + 1)
        )

    def prefetch(self, offsets: Iterable[int]) -> None:
        """Requests the blocks in which bytes lie that `read` will return, side by side."""
        numbers = sorted({offset // BLOCK for offset in offsets})
        size = self._volume.size
        self._volume.prefetch(
            [
                (number * BLOCK, min(BLOCK, size - number * BLOCK))
                for number in numbers
                if number * BLOCK < size
            ]
        )

    def _load_block(self, number: int) -> bytes:
        return self._volume.read(number * BLOCK, min(BLOCK, self._volume.size - number * BLOCK))

    # --- chains

    def position(self, cluster: int) -> int:
        """The byte where a cluster lies. Raises DamageError where there is no such cluster."""
        if not FIRST <= cluster < self._end:
            raise DamageError(f"cluster {cluster} does not exist")
        return self._start + (cluster - FIRST) * self.size

    def containing(self, offset: int) -> int:
        """The cluster in which a byte lies. Raises DamageError."""
        cluster = (offset - self._start) // self.size + FIRST
        self.position(cluster)
        return cluster

    def item(self, number: int) -> int:
        """What the table says of a cluster; of 0 and 1, flags. Raises DamageError."""
        if not 0 <= number < self._end:
            raise DamageError(f"cluster {number} does not exist")
        return self._part(number - number % PART)[number % PART] & _MASK[self._bits]

    def chain(self, first: int, wanted: int | None = None) -> Iterator[tuple[int, int]]:
        """The clusters of a chain as runs: a cluster, and how many lie side by side from it on.

        `wanted`: how many clusters it has to have; None for a directory, of any length. Raises DamageError
        after the runs that can be read: where it meets a cluster that is free, bad, or does not exist, comes
        to a cluster again, or has another length.
        """
        most = self._most if wanted is None else wanted
        last = _LAST[self._bits]
        found, cluster = 0, first
        mark, steps, lap = first, 0, 1  # Brent's way to find a loop: no set of what was visited
        while True:
            if not FIRST <= cluster < self._end:
                raise DamageError(f"its chain of clusters leads to {self._described(cluster)}")
            length, following = self._run(cluster, most - found + 1)
            yield cluster, length
            found += length
            if found > most:
                raise DamageError(f"its chain of clusters is longer than {most}, or a loop")
            if following >= last:
                break
            if following == mark:
                raise DamageError("its chain of clusters is a loop")
            steps += 1
            if steps == lap:
                mark, steps, lap = following, 0, lap * 2
            cluster = following
        if wanted is not None and found < wanted:
            raise DamageError(f"its chain of clusters ends after {found} of {wanted}")

    def side_by_side(self, first: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Clusters that have no chain. Raises DamageError where there are not as many."""
        if not FIRST <= first <= first + wanted <= self._end:
            raise DamageError(f"there are no {wanted} clusters from {first} on")
        if wanted:
            yield first, wanted

    def _described(self, cluster: int) -> str:
        if cluster == 0:
            return "a free cluster"
        if cluster == _BAD[self._bits]:
            return "a bad cluster"
        return f"cluster {cluster}, which does not exist"

    def _run(self, cluster: int, most: int) -> tuple[int, int]:
        """How many clusters, at most `most`, follow each other side by side; and what follows the last."""
        mask, first = _MASK[self._bits], cluster
        while True:
            base = cluster - cluster % PART
            part = self._part(base)
            at, stop = cluster - base, min(len(part), first + most - base)
            while at < stop:
                following = part[at] & mask
                at += 1
                if following != base + at:
                    return base + at - first, following
            cluster = base + stop
            if cluster - first >= most or cluster >= self._end:
                return cluster - first, cluster

    def _load_part(self, base: int) -> Sequence[int]:
        """The items of the table from `base` on: PART of them, or up to the last cluster."""
        count = min(PART, self._end - base)
        if self._bits == 12:
            size = (count * 3 + 1) // 2
            data = self._volume.read(self._table + base * 3 // 2, size) + b"\0\0"
            items = array("H")
            for at in range(0, size, 3):
                three = int.from_bytes(data[at : at + 3], "little")
                items.append(three & 0xFFF)
                items.append(three >> 12)
            return items[:count]
        width = 2 if self._bits == 16 else 4
        items = array("H" if width == 2 else "I")
        items.frombytes(self._volume.read(self._table + base * width, count * width))
        if sys.byteorder == "big":
            items.byteswap()
        return items

    # --- files

    def clusters_of(self, size: int) -> int:
        """How many clusters hold `size` bytes."""
        return -(-size // self.size)

    def pieces(self, runs: Iterable[tuple[int, int]], length: int) -> list[Piece]:
        """The first `length` bytes of runs of clusters. Raises DamageError."""
        pieces: list[Piece] = []
        left = length
        for cluster, count in runs:
            part = min(count * self.size, left)
            left -= part
            for piece in self._volume.pieces(self.position(cluster), part):
                add_piece(pieces, piece)
            if len(pieces) > MOST_PIECES:
                raise UnsupportedError(f"a file in more than {MOST_PIECES} pieces is not supported")
        if left:
            raise DamageError(f"{left} of its {length} bytes have no clusters")
        return pieces


def add_piece(pieces: list[Piece], piece: Piece) -> None:
    """Adds a piece to a list, merged with the last one where they are side by side."""
    last = pieces[-1] if pieces else None
    if last is None or last.stream != piece.stream:
        pieces.append(piece)
    elif piece.stream is None:
        pieces[-1] = Piece(None, 0, last.length + piece.length)
    elif last.offset + last.length == piece.offset:
        pieces[-1] = Piece(last.stream, last.offset, last.length + piece.length)
    else:
        pieces.append(piece)
