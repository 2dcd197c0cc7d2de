"""What to fetch before it is asked for, from what one reader has asked for so far.

A pure policy, no I/O: one `ReadAhead` watches the reads of one open handle and answers how many bytes
are worth fetching ahead. The window grows with evidence of sequential reading and falls to nothing
on a jump.

The evidence is the bytes read in sequence less the bytes skipped on the way. The kernel splits one
sequential read into requests that arrive out of order, so what was skipped may be read shortly after
and then counts again; what is read twice counts against. A random reader skips more than it reads and
gathers no evidence; one that stays within a small region reads the same again and soon loses what
its first few reads may have looked like.
"""

from __future__ import annotations

REORDER_DISTANCE = 2 << 20
"""Bytes by which a request may lie before or behind the expected place and still be part of one
sequential read: the kernel keeps at most two read-ahead windows of 1 MiB in flight."""

EVIDENCE = 256 << 10
"""Bytes that are read in sequence before anything is fetched ahead: two requests of the kernel's
default read-ahead."""

GROWTH = 4
"""Bytes that are fetched ahead for each byte of evidence: the full window is reached after 16 MiB."""

MAX_WINDOW = 64 << 20
"""Bytes that are fetched ahead at most: 16 chunks of 4 MiB, which keeps many cores, or a long way, busy."""


class ReadAhead:
    """The window of one open handle. `position`: the first byte behind what was read so far."""

    __slots__ = ("_read", "_skipped", "position")

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: all of it will be read, from its beginning; there is nothing to find out."""
        # Else nothing was read: whatever comes first is a jump.
        self.position = 0 if whole else -REORDER_DISTANCE - 1
        self._read = MAX_WINDOW // GROWTH if whole else 0
        self._skipped = 0

    def observe(self, offset: int, length: int) -> int:
        """Takes note of a read. Returns how many bytes behind `position` to fetch ahead; 0 for none."""
        end = offset + length
        gap = offset - self.position
        if gap >= 0:
            self._skipped += gap
            self._read += length
            self.position = end
        else:
            old = min(length, -gap)
            filled = min(old, self._skipped)
            self._skipped -= filled
            self._read = max(0, self._read + length - old - (old - filled))
            self.position = max(self.position, end)
        if abs(gap) > REORDER_DISTANCE or self._skipped > REORDER_DISTANCE:
            self._read = self._skipped = 0
            self.position = end
        evidence = self._read - self._skipped
        return min(MAX_WINDOW, GROWTH * evidence) if evidence >= EVIDENCE else 0

    def skip(self, end: int) -> None:
        """Takes note that nothing will be read before `end`, on purpose: that is no jump."""
        self.position = max(self.position, end)
