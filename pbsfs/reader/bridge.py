"""Runs readers of contents, which are synchronous, where they cannot block the trio loop.

A reader of contents reads `ImageStream`s. In a worker thread, bytes that are cached are returned at once, and
for others the thread waits for a task of the loop. When the task that waits for the thread is cancelled, the
thread's next read ends the work. The threads are limited by a limiter of their own: threads that wait for a
slow server take none from the work that decodes what it sends.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import trio

from pbsfs.base.errors import DamageError
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.image import Extent, Image
from pbsfs.runtime.threads import in_thread

R = TypeVar("R")

THREADS = 8
"""Readers of contents that run at once: most of the time, all but one or two wait for storage."""


DAMAGE_LASTS = 60.0
"""Seconds for which a damaged chunk is not read again: it may be repaired, but each try takes some time."""

MOST_DAMAGED = 10_000
"""Damaged chunks of an image that are remembered."""


class _NotCachedError(Exception):
    """The bytes are not in memory."""


_here = threading.local()
"""`inline`: whether this thread is the loop's, which must not wait."""


class Bridge:
    """Where the readers of contents of one `Reader` run."""

    def __init__(self, threads: int = THREADS) -> None:
        self._limiter = trio.CapacityLimiter(threads)

    async def run(self, work: Callable[[], R], *, abandon: bool = False) -> R:
        """The result of `work`, called in a worker thread. Raises what it raises.

        `abandon`: cancelling does not wait for the thread, which may be blocked by something else.
        """
        return await in_thread(work, limiter=self._limiter, abandon_on_cancel=abandon)

    def run_cached(self, work: Callable[[], R | None]) -> R | None:
        """The result of work that takes less time than going to a thread; None where what it reads is not
        cached. Call from the trio loop."""
        _here.inline = True
        try:
            return work()
        except _NotCachedError:
            return None
        finally:
            _here.inline = False


class ImageStream:
    """An image as a `contents.base.Stream`. For work that a `Bridge` runs."""

    def __init__(self, image: Image, *, whole: bool = False) -> None:
        """Call from the trio loop. `whole`: the image is most likely read whole, from its beginning, and by
        one thread; the stream keeps the chunk that was read last, so that `kept` finds it."""
        self._image = image.strict()
        self._handle = self._image.handle(whole=whole)
        self._whole = whole
        self._kept: tuple[int, int, memoryview] = 0, 0, memoryview(b"")  # where it begins and ends, its bytes
        self._noted = self._read_to = 0  # in it, up to where reads were observed, and up to where it was read
        self._loop = trio.lowlevel.current_trio_token()
        self._damaged: dict[int, tuple[float, str]] = {}  # chunks: when they were found to be, and why

    @property
    def size(self) -> int:
        """In bytes."""
        return self._image.size

    def pread(self, offset: int, size: int) -> bytes:
        """See `contents.base.Stream`."""
        return bytes(self.view(offset, size))

    def view(self, offset: int, size: int) -> Buffer:
        """The same without a copy, where the bytes lie in one chunk."""
        found = self.kept(offset, size)
        if found is not None:
            trio.from_thread.check_cancelled()  # work that finds all in memory has to end too
            return found
        if self._read_to > self._noted:
            self._handle.observe(self._noted, self._read_to - self._noted)
        data = self._view(offset, size)
        if self._whole and size > 0:
            self._keep(offset + size)
        return data

    def kept(self, offset: int, size: int) -> Buffer | None:
        """The same of the chunk that was read last, at once; None for all else. Reading many small files,
        this costs a third of `view`. Only for streams that are `whole`."""
        start, end, data = self._kept
        if not start <= offset <= offset + size <= end:
            return None
        self._read_to = max(self._read_to, offset + size)
        return data[offset - start : offset - start + size]

    def _keep(self, read_to: int) -> None:
        """Keeps the chunk in which a read ended."""
        read_to = min(read_to, self._image.size)
        number = self._image.index.find(read_to - 1)
        data = self._image.peek(number)
        start, end = self._image.index.span(number)
        self._kept = (0, 0, memoryview(b"")) if data is None else (start, end, memoryview(data))
        self._noted = self._read_to = read_to

    def _view(self, offset: int, size: int) -> Buffer:
        if self._damaged:
            self._raise_known_damage(offset, size)
        data = self._image.read_cached(offset, size)
        if getattr(_here, "inline", False):
            if data is None:
                raise _NotCachedError
        elif data is None:
            try:
                data = trio.from_thread.run(self._handle.read, offset, size)
            except DamageError:
                self._remember_damage(offset, size)
                raise
        else:
            trio.from_thread.check_cancelled()
            if self._handle.observe(offset, size):
                self._loop.run_sync_soon(self._handle.fetch_ahead, idempotent=True)
        return data

    def _remember_damage(self, offset: int, size: int) -> None:
        """Notes which chunks of a range are damaged. A reader of contents looks at each of the thousands of
        entries in a chunk, and it takes pbsfs seconds to be sure of damage."""
        index = self._image.index
        end = min(offset + size, self._image.size)
        while offset < end:
            number = index.find(offset)
            if self._image.read_cached(offset, 1) is None:
                try:
                    trio.from_thread.run(self._handle.read, offset, 1)
                except DamageError as error:
                    if len(self._damaged) < MOST_DAMAGED:
                        self._damaged[number] = time.monotonic(), str(error)
            offset = index.span(number)[1]

    def _raise_known_damage(self, offset: int, size: int) -> None:
        index = self._image.index
        end = min(offset + size, self._image.size)
        while offset < end:
            number = index.find(offset)
            found, text = self._damaged.get(number, (-math.inf, ""))
            if time.monotonic() - found < DAMAGE_LASTS:
                raise DamageError(text)
            offset = index.span(number)[1]

    def spans(self, offset: int, size: int) -> Iterator[Extent]:
        """The range, cut at the end, in pieces: holes, and data by chunk. Reads nothing."""
        for found in self._image.extents(offset, size):
            if found.hole:
                yield found
                continue
            here, end = found.offset, found.offset + found.length
            while here < end:
                stop = min(self._image.index.span(self._image.index.find(here))[1], end)
                yield Extent(here, stop - here, hole=False)
                here = stop

    def chunks(self, offset: int, size: int) -> list[tuple[bytes | None, int, int]]:
        """The chunks that hold a range: their digests, each with the range's offset in it and length there.

        None instead of a digest for zeros, whose neighbours are one.
        """
        index = self._image.index
        found: list[tuple[bytes | None, int, int]] = []
        for span in self.spans(offset, size):
            number = index.find(span.offset)
            start = index.span(number)[0]
            digest = None if span.hole else digest_of(self._image, number)
            found.append((digest, 0 if span.hole else span.offset - start, span.length))
        return found

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `contents.base.Stream`."""
        if not getattr(_here, "inline", False):
            trio.from_thread.run(functools.partial(self._prefetch, ranges))

    async def _prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        await self._image.load()
        for offset, size in ranges:
            for number in self._image.data_chunks(offset, size):
                if not self._image.prefetch(number):
                    return

    def close(self) -> None:
        """Gives back this reader's part of the read-ahead memory. Call from the trio loop."""
        self._handle.close()


def digest_of(image: Image, number: int) -> bytes:
    """The digest of a chunk, in work that a `Bridge` runs: has the index fetch its table again where that was
    dropped. Raises like `Image.load`."""
    while True:
        digest = image.index.find_digest(number)
        if digest is not None:
            return digest
        trio.from_thread.run(image.load)
