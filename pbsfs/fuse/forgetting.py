"""Directories of archives that the kernel is asked to forget when all listings take too much memory.

As long as the kernel remembers a directory or something in it, pbsfs has to keep the listing. The kernel
forgets when it needs memory itself, which on a large machine is long after pbsfs does. `Operations` has one
`Forgetting`, which notes every use of a directory; its task runs beside the requests in the trio loop.
"""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import logging
from collections import OrderedDict
from weakref import ReferenceType, ref

import pyfuse3
import trio

from pbsfs.fuse.inodes import InodeTable
from pbsfs.fuse.notices import Notices
from pbsfs.runtime.memory import Memory
from pbsfs.tree import ContentsDirectory, Node
from pbsfs.tree.node import HOLDER, KEPT_DIRECTORIES

log = logging.getLogger(__name__)

MOST, LEAST = 3 / 4, 1 / 2
"""Parts of the limit of what is open: where listings take more than the one, the kernel is asked to forget
directories until they take less than the other. The rest is for listings that are made meanwhile."""

FORGOTTEN_AT_ONCE = 64
"""Directories that one call of a thread has the kernel forget."""


class Forgetting:
    """The directories of archives that were used, those not used for longest first."""

    def __init__(self, inodes: InodeTable, memory: Memory, notices: Notices) -> None:
        self._inodes = inodes
        self._memory = memory
        self._notices = notices
        self._used: OrderedDict[bytes, ReferenceType[Node]] = OrderedDict()  # by path
        self._wanted = trio.Event()

    def used(self, directory: Node) -> None:
        """Notes that `directory` was listed or looked at, and wakes the task where memory is short."""
        node: Node | None = directory
        while isinstance(node, ContentsDirectory):  # those above it are needed as long as it is
            self._used[node.path] = ref(node)
            self._used.move_to_end(node.path)
            node = node.parent
        for _ in range(2):  # what the kernel forgot before it was asked
            path = next(iter(self._used), None)
            if path is not None and self._used[path]() is None:
                del self._used[path]
        if self._memory.charged(HOLDER) > MOST * self._memory.open_limit:
            self._wanted.set()

    async def run(self) -> None:
        """Has the kernel forget directories whenever that is needed, but not those that are held anyway."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            excess = self._memory.charged(HOLDER) - LEAST * self._memory.open_limit
            while excess > 0 and len(self._used) > KEPT_DIRECTORIES:
                places, size = self._oldest(excess)
                excess -= size
                await self._notices.send(_forget, places)

    def _oldest(self, excess: float) -> tuple[list[tuple[int, bytes]], int]:
        """The directories used longest ago, each as the number of the one above and its name; and the bytes
        of their listings: `excess` or more, or of as many as are forgotten at once."""
        places: list[tuple[int, bytes]] = []
        size = 0
        while len(self._used) > KEPT_DIRECTORIES and size < excess and len(places) < FORGOTTEN_AT_ONCE:
            node = self._used.popitem(last=False)[1]()
            if isinstance(node, ContentsDirectory) and node.parent is not None:
                places.append((self._inodes.number(node.parent.key), node.name))
                size += node.listing_size
        return places, size


def _forget(places: list[tuple[int, bytes]]) -> None:
    for above, name in places:
        try:
            pyfuse3.invalidate_entry(above, name)
        except OSError as error:  # the kernel does not know it
            log.debug("inode %d: %r was not forgotten: %s", above, name, error.strerror)
