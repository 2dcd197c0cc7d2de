"""Where the clusters of an attribute are: its mapping pairs, decoded.

Layout: "NTFS Documentation" of the Linux-NTFS project, "Data Runs". Plain values; of one thread.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator

from pbsfs.base.errors import DamageError, UnsupportedError

HOLE = -1
"""As the place of an extent: clusters that are not stored."""

MOST_EXTENTS = 1_000_000
"""Extents of an attribute: 16 bytes of memory each."""


class Extents:
    """The extents of an attribute, in order. `end`: the clusters that are mapped so far."""

    def __init__(self, clusters: int) -> None:
        """`clusters`: of the volume."""
        self.end = 0
        self._clusters = clusters
        self._starts = array("q")
        self._places = array("q")

    def add(self, pairs: bytes, lowest: int, highest: int) -> None:
        """Adds what mapping pairs say, which map the clusters `lowest` to `highest` of the attribute.

        Raises DamageError where they do not continue what is there, or map other clusters.
        """
        if lowest != self.end:
            raise DamageError(f"its clusters {self.end} to {lowest} are mapped nowhere")
        at, place, end = 0, 0, self.end
        while at < len(pairs) and pairs[at]:
            length, offset = pairs[at] & 15, pairs[at] >> 4
            stop = at + 1 + length + offset
            if not 1 <= length <= 8 or offset > 8 or stop > len(pairs):
                raise DamageError("its mapping pairs are damaged")
            count = int.from_bytes(pairs[at + 1 : at + 1 + length], "little", signed=True)
            if count <= 0 or end + count > highest + 1:
                raise DamageError("its mapping pairs map more clusters than they should")
            where = HOLE
            if offset:
                place += int.from_bytes(pairs[at + 1 + length : stop], "little", signed=True)
                where = place
                if where < 0 or where + count > self._clusters:
                    raise DamageError(f"its mapping pairs lead to cluster {where}, beyond the volume")
            if len(self._starts) >= MOST_EXTENTS:
                raise UnsupportedError(f"a file in more than {MOST_EXTENTS} extents is not supported")
            self._starts.append(end)
            self._places.append(where)
            end += count
            at = stop
        if end != highest + 1:
            raise DamageError("its mapping pairs map fewer clusters than they should")
        self.end = end

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The clusters `start` to `end` of the attribute, in order: where they are (HOLE: nowhere), and how
        many. Raises DamageError where they are not mapped."""
        if not 0 <= start <= end <= self.end:
            raise DamageError(f"its clusters {start} to {end} are mapped nowhere")
        number = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            first, place = self._starts[number], self._places[number]
            number += 1
            stop = min(self._starts[number] if number < len(self._starts) else self.end, end)
            yield (place if place == HOLE else place + start - first), stop - start
            start = stop
