"""What waits to be written to the cache on disk: a queue of bounded size, and the tasks that empty it.

Reading never waits for it: what does not fit into the queue is not kept, unless the caller asks to wait.
While the disk is full or can't be written, nothing is kept; that is reported once a day, and tried again
after a pause. Used from tasks of one trio loop; the writing runs in worker threads.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
from collections import deque
from dataclasses import dataclass

import trio

from pbsfs.base.errors import SourceError
from pbsfs.formats.blob import Stored
from pbsfs.runtime.report import DAY, Reporter
from pbsfs.sources.cached.files import Name
from pbsfs.sources.cached.limits import CacheLimits
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.workers import WorkerLimits, Workers

log = logging.getLogger(__name__)

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""A cache that this user may only read: the administrator's choice, so not a warning."""

_IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOTEMPTY)
"""Something else is where one entry or shard should be: the others can still be written."""


@dataclass(frozen=True, slots=True)
class Item:
    """An entry to write. `replace`: also if there is one."""

    name: Name
    data: Stored
    replace: bool = False


class Keeper:
    """Writes to `cache`."""

    def __init__(self, cache: DiskCache, limits: CacheLimits) -> None:
        self._cache = cache
        self._limits = limits
        self._workers = Workers(
            str(cache), WorkerLimits(io_timeout=limits.io_timeout, threads=limits.writers)
        )
        self._reporter = Reporter(log, repeat_after=DAY)
        self._queue: deque[Item] = deque()
        self._size = 0  # of what waits and what is being written
        self._more = trio.lowlevel.ParkingLot()  # writers that have nothing to do
        self._less = trio.lowlevel.ParkingLot()  # tasks that wait for room
        self._paused_until = -math.inf
        self.written = 0
        """Bytes that were written."""
        self.lost = 0
        """Entries that were offered and could not be written."""

    @property
    def is_paused(self) -> bool:
        """Whether nothing is written for now."""
        return trio.current_time() < self._paused_until

    def offer(self, item: Item) -> bool:
        """Has `item` written soon; False if it will not be. One larger than the queue waits there alone."""
        room = self._limits.queue - self._size
        is_alone = self._limits.queue > 0 and not self._size
        if self.is_paused or (len(item.data) > room and not is_alone):
            self.lost += 1
            return False
        self._size += len(item.data)
        self._queue.append(item)
        self._more.unpark()
        return True

    async def wait_for_room(self, size: int) -> None:
        """Waits until an item of `size` bytes fits, unless nothing is written for now."""
        while self._size and self._size + size > self._limits.queue and not self.is_paused:
            await self._less.park()

    async def wait_until_empty(self) -> None:
        """Waits until everything that was offered is written, or lost."""
        while self._size:
            await self._less.park()

    async def run(self) -> None:
        """Writes what is offered, until it is cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._limits.writers):
                nursery.start_soon(self._run)

    async def _run(self) -> None:
        while True:
            while self._queue:
                await self._write(self._queue.popleft())
                await trio.lowlevel.checkpoint_if_cancelled()  # the write is shielded
            await self._more.park()

    async def aclose(self) -> None:
        """Writes what waits, for a limited time."""
        with trio.move_on_after(self._limits.closing):
            while self._queue and not self.is_paused:
                await self._write(self._queue.popleft())
                await trio.lowlevel.checkpoint_if_cancelled()
        for item in self._queue:
            self._end(item)
        self._queue.clear()

    async def _write(self, item: Item) -> None:
        try:
            with trio.CancelScope(shield=True):  # an abandoned thread would leave an unfinished file
                kept = await self._workers.run(functools.partial(self._put, item, keep=not self.is_paused))
            if kept:
                self.written += len(item.data)
            else:
                self.lost += 1
        except OSError as error:
            self.lost += 1
            if error.errno in _IN_THE_WAY:
                log.debug("%s: %s: %s", self._cache, item.name, error)
            else:
                self._pause(error.strerror or str(error), is_expected=error.errno in _READ_ONLY)
        except SourceError as error:
            self.lost += 1
            self._pause(str(error))
        finally:
            self._end(item)

    def _end(self, item: Item) -> None:
        self._size -= len(item.data)
        self._less.unpark_all()

    def _put(self, item: Item, *, keep: bool) -> bool:
        try:
            return keep and self._cache.put(item.name, item.data, replace=item.replace)
        finally:
            self._cache.claims.give_back(item.name)

    def report(self, problem: str, *, is_expected: bool = False) -> None:
        """Reports why the cache is not used, once a day."""
        self._reporter.report(
            f"{self._cache}: {problem}; pbsfs reads from the source instead: check the directory, "
            "its disk and who may write there",
            logging.INFO if is_expected else logging.WARNING,
        )

    def _pause(self, problem: str, *, is_expected: bool = False) -> None:
        self._paused_until = trio.current_time() + self._limits.pause
        self.report(f"nothing is kept for now: {problem}", is_expected=is_expected)
