"""One reader of an image, with a read-ahead of its own.

Every open file, copy and connection has a `Handle`. Tasks of the trio loop call `read_cached` and `read`;
other threads call `read_into`, and reach the loop through a `Loop`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from pbsfs.base.errors import UsageError
from pbsfs.chunks.prefetch import ReadAhead
from pbsfs.chunks.store import Fetch
from pbsfs.reader.buffers import LARGE_COPY, Buffer, copy, join

if TYPE_CHECKING:
    from pbsfs.reader.image import Image

R = TypeVar("R")


class Loop(Protocol):
    """The trio loop as other threads see it. `patience`: seconds to wait between two calls of `check`."""

    patience: float

    def call(self, work: Callable[[], Awaitable[R]]) -> R:
        """The result of `work`, a task in the loop."""

    def post(self, work: Callable[[], object]) -> None:
        """Has `work` called in the loop, soon."""

    def check(self) -> None:
        """Raises SourceError where waiting makes no sense any more."""


NOTHING = -1, 0
"""The chunk and window of a handle that fetches nothing ahead yet."""


class Handle:
    """Reads an image, and fetches ahead while it is read in sequence."""

    def __init__(self, image: Image, *, whole: bool = False) -> None:
        self.image = image
        self.size = image.size
        self._lock = threading.Lock()  # guards all of these but `_sequential`, which is the loop's
        self._ahead = ReadAhead(image.store.limits, whole=whole)
        self._wanted = 0  # bytes behind its position that are worth fetching
        self._next = 0  # where the data begins that was not fetched ahead yet
        self._fetched = 0  # bytes of data before that, from `_counted` on
        self._counted = 0
        self._launched = NOTHING  # the chunk at the position, and `_wanted`, when all of it was launched
        self._sequential = False

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """Like `Image.read_cached`. Call from the trio loop's thread."""
        data = self.image.read_cached(offset, size)
        if data is not None and self.observe(offset, size):
            self.fetch_ahead()
        return data

    async def read(self, offset: int, size: int) -> Buffer:
        """Like `Image.read`."""
        return join(await self.read_parts(offset, size))

    async def read_parts(self, offset: int, size: int) -> list[Buffer]:
        """The same, without a copy where the range lies in several chunks: the bytes in each of them."""
        await self.image.load()
        # The chunks of this read are requested before those of reads that may follow.
        started = self.image.start(offset, size)
        if self.observe(offset, size):
            self.fetch_ahead()
        return await self.image.finish(started)

    def read_into(self, buffer: memoryview, offset: int, loop: Loop) -> None:
        """Fills `buffer` with the bytes from `offset` on. Call from a thread that is not the loop's.

        Copies what is cached, waits for what is being fetched, and has `loop` start fetching the rest. Raises
        DamageError, SourceError, and UsageError where some of the range lies beyond the end.
        """
        image = self.image
        size = len(buffer)
        if offset + size > image.size:
            raise UsageError(f"{image}: a read of {size} bytes at {offset} goes beyond the end")
        if size < LARGE_COPY:
            found = image.read_cached(offset, size)  # as most small reads are
            if found is not None:
                buffer[:] = found
                if self.observe(offset, size):
                    loop.post(self.fetch_ahead)
                return
        image.note_read()
        parts = [(part, image.peek(part.chunk)) for part in image.parts(offset, size)]
        fetches: dict[int, Fetch] = {}
        wanted: list[int] = []
        for part, data in parts:
            if data is None:
                fetch = image.under_way(part.chunk)
                if fetch is None:
                    wanted.append(part.chunk)
                else:
                    fetches[part.chunk] = fetch
        if wanted:
            fetches |= loop.call(functools.partial(image.request, wanted))
        if self.observe(offset, size):
            loop.post(self.fetch_ahead)
        done = 0
        for part, cached in parts:
            data = image.join(part.chunk, fetches.pop(part.chunk), loop) if cached is None else cached
            copy(buffer, done, data, part.start, part.length)
            done += part.length

    def observe(self, offset: int, size: int) -> bool:
        """Takes note of a read; whether `fetch_ahead` is to be called for it. From any thread."""
        with self._lock:
            wanted = self._ahead.observe(offset, size)
            self._wanted = wanted
            if not wanted:
                self._next = 0
                self._launched = NOTHING
                return self._sequential
            # Nothing is new before the reader gets to the next chunk, or has shown that it wants much more:
            # each small read shows that it wants a little more.
            chunk, enough = self._launched
            return wanted >= 2 * max(1, enough) or self._chunk_at(self._ahead.position) != chunk

    def fetch_ahead(self) -> None:
        """Starts fetching what is likely to be read after the observed reads. Call from the trio loop."""
        store = self.image.store
        with self._lock:
            self._set_sequential(self._wanted > 0)
            position, wanted = self._ahead.position, self._wanted
            self._pass(position)
            left = min(wanted, store.window_limit) - self._fetched
            for number in self.image.data_chunks(self._next, left):
                if not self.image.prefetch(number):
                    return  # there is no memory now, but there may be at the next read
                start, end = self.image.index.span(number)
                self._fetched += end - max(start, self._next)
                self._next = end
            self._launched = self._chunk_at(position), wanted

    def _pass(self, position: int) -> None:
        """Takes note that what lies before `position` is not ahead any more."""
        if position >= self._next:
            self._next, self._fetched = position, 0
        else:
            passed = self.image.extents(self._counted, position - self._counted)
            self._fetched -= sum(extent.length for extent in passed if not extent.hole)
        self._counted = position

    def _chunk_at(self, position: int) -> int:
        return self.image.index.find(position) if position < self.image.size else self.image.index.count

    def skip_hole(self, end: int) -> None:
        """Takes note that the reader skips a hole that ends at `end`: it still reads in sequence."""
        with self._lock:
            self._ahead.skip(end)

    def close(self) -> None:
        """Gives back this reader's part of the read-ahead memory. Call from the trio loop."""
        self._set_sequential(False)

    def _set_sequential(self, sequential: bool) -> None:
        if sequential != self._sequential:
            self._sequential = sequential
            self.image.store.sequential_readers += 1 if sequential else -1
