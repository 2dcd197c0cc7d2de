"""The kernel's pages of holes, which it drops when a program that reads them in order is past them.

The kernel gets a page of zeros again faster than it finds a free one. Without this, reading a sparse image of
1 TiB to its end would displace what else the kernel keeps of files. Used by the operations, in the trio loop.
"""

from __future__ import annotations

import logging
from collections import deque

import trio

from pbsfs.fuse import shim
from pbsfs.fuse.notices import Notices
from pbsfs.reader.buffers import Buffer, is_hole

log = logging.getLogger(__name__)

AT_ONCE = 32 << 20
"""Bytes of a hole that were read in order, from which the kernel is asked to drop them."""

KEPT = 8 << 20
"""Bytes before the last read that stay: the kernel reads up to 1 MiB ahead, several requests at once."""

MOST_WAITING = 64


class HoleReads:
    """How far a program has read holes of one open file, in order. `inode`: its number."""

    __slots__ = ("end", "inode", "start")

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.start = self.end = 0

    def passed(self, offset: int, size: int) -> tuple[int, int] | None:
        """Takes note of a read; the range that the program is past, if it is large."""
        if not self.start <= offset <= self.end + KEPT:  # the kernel's requests overtake each other
            self.start = self.end = offset
        self.end = max(self.end, offset + size)
        if self.end - self.start < AT_ONCE:
            return None
        start, self.start = self.start, self.end - KEPT
        return start, self.start


class Pages:
    """The ranges that the kernel is to drop."""

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._ranges: deque[tuple[int, int, int]] = deque()
        self._wanted = trio.Event()

    def was_read(self, reads: HoleReads, offset: int, data: Buffer) -> None:
        """Takes note of what a read returned."""
        if is_hole(data) and (found := reads.passed(offset, len(data))) and len(self._ranges) < MOST_WAITING:
            self._ranges.append((reads.inode, *found))
            self._wanted.set()

    async def run(self) -> None:
        """Has the kernel drop what it is to drop, until it is cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while self._ranges:
                await self._notices.send(_drop, *self._ranges.popleft())


def _drop(inode: int, start: int, end: int) -> None:
    try:
        shim.drop_pages(inode, start, end - start)
    except OSError as error:  # the kernel has forgotten the inode meanwhile
        log.debug("inode %d: its pages were not dropped: %s", inode, error.strerror)
