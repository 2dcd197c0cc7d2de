"""The read-ahead policy: what to fetch before it is read, judged by the reads of one open handle.

A pure policy without I/O. A `ReadAhead` observes the reads of a handle and returns how many bytes to fetch
ahead. The window grows with the evidence that the handle reads in sequence, and becomes 0 at a jump. A handle
calls it from any thread, under its own lock.

The evidence is the bytes read in sequence minus the bytes skipped in between. The kernel splits one
sequential read into requests that arrive out of order, so skipped bytes that are read shortly after count
again; bytes that are read twice count against it. A random reader skips more than it reads, so it gathers no
evidence; a reader that stays within a small region reads the same bytes again, and soon loses the evidence of
its first reads.
"""

from __future__ import annotations

from pbsfs.chunks.limits import DEFAULT, FetchLimits


class ReadAhead:
    """The window of one open handle. `position`: the first byte after all that was read so far."""

    __slots__ = ("_limits", "_read", "_skipped", "position")

    def __init__(self, limits: FetchLimits = DEFAULT, *, whole: bool = False) -> None:
        """`whole`: the handle reads everything from the beginning, so no evidence is needed."""
        self._limits = limits
        # Otherwise nothing was read yet, so the first read counts as a jump.
        self.position = 0 if whole else -limits.reorder_distance - 1
        self._read = limits.max_window // limits.growth if whole else 0
        self._skipped = 0

    def observe(self, offset: int, length: int) -> int:
        """Records a read. Returns how many bytes after `position` to fetch ahead; 0 for none."""
        limits = self._limits
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
        if abs(gap) > limits.reorder_distance or self._skipped > limits.reorder_distance:
            self._read = self._skipped = 0
            self.position = end
        evidence = self._read - self._skipped
        return min(limits.max_window, limits.growth * evidence) if evidence >= limits.evidence else 0

    def skip(self, end: int) -> None:
        """Records that the handle deliberately skips to `end`: that is not a jump."""
        self.position = max(self.position, end)
