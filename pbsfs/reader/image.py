"""An archive with an index as a file of bytes: images and, alike, pxar streams.

An `Image` is opened once and shared; every open file reads it through a `Handle` of its own. `read_cached`,
`extents`, and what handles call in other threads may be called from any thread; `read` is called from tasks
of the trio loop. A read returns all of its bytes, verified, or raises: never bytes that failed a check.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.chunks.store import Chunk, ChunkStore, Fetch
from pbsfs.formats.index import Index
from pbsfs.formats.keys import Key
from pbsfs.reader.buffers import Buffer, join, zeros
from pbsfs.reader.damage import Range, ZeroedChunks, ZeroedRanges
from pbsfs.reader.handle import Handle, Loop

_READS = itertools.count()
"""Numbers the reads of all images, in order. Usable from any thread."""


class Extent(NamedTuple):
    """A range of bytes that is all hole (reads as zeros, takes no storage) or all data."""

    offset: int
    length: int
    hole: bool


class Part(NamedTuple):
    """The part of a read that falls into one chunk: `length` bytes from `start` within it."""

    chunk: int
    start: int
    length: int


class Image:
    """The bytes of one archive of a snapshot."""

    def __init__(
        self,
        store: ChunkStore,
        snapshot: Snapshot,
        archive: Archive,
        index: Index,
        *,
        encrypted: bool,
        key: Key | None,
        restore: Callable[[Index], Awaitable[None]],
        zeroed: ZeroedRanges | None = None,
    ) -> None:
        """`key`: the archive's key where it is encrypted, else None. `restore`: restores the
        index's digest table after it was dropped. `zeroed`: remembers the damaged chunks that read as zeros;
        None if none may.
        """
        self.store = store
        self.snapshot = snapshot
        self.archive = archive
        self.index = index
        self.size = index.size
        self.last_read = next(_READS)
        self._restore = restore
        self._encrypted = encrypted
        self._key = key
        self._zeroed = zeroed
        self._zeroed_chunks = ZeroedChunks()

    def __str__(self) -> str:
        return f"{self.snapshot}/{self.archive.name}"

    @property
    def shows_zeros(self) -> bool:
        """Whether damaged chunks read as zeros."""
        return self._zeroed is not None

    def strict(self) -> Image:
        """The same image, whose damaged chunks never read as zeros."""
        return Image(
            self.store,
            self.snapshot,
            self.archive,
            self.index,
            encrypted=self._encrypted,
            key=self._key,
            restore=self._restore,
        )

    def handle(self, *, whole: bool = False) -> Handle:
        """A reader of its own; `whole`: one that reads all of the image, from its beginning."""
        return Handle(self, whole=whole)

    def note_read(self) -> None:
        """Takes note that the image is read now: the digest table of the one read last is dropped last."""
        self.last_read = next(_READS)

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """The bytes `offset` … `offset + size`, cut at the end; None where some would have to be fetched."""
        self.note_read()
        if 0 < size <= self.size - offset:  # most reads lie in one chunk
            number = self.index.find(offset)
            start, stop = self.index.span(number)
            if offset + size <= stop:
                data = self.peek(number)
                return None if data is None else memoryview(data)[offset - start : offset - start + size]
        parts: list[Buffer] = []
        for part in self.parts(offset, size):
            data = self.peek(part.chunk)
            if data is None:
                return None
            parts.append(memoryview(data)[part.start : part.start + part.length])
        return join(parts)

    async def read(self, offset: int, size: int) -> Buffer:
        """The bytes `offset` … `offset + size`, cut at the end of the image.

        All chunks of the range are fetched side by side, so callers bound `size`: they pass that of one
        request. Raises DamageError and SourceError.
        """
        await self.load()
        return join(await self.finish(self.start(offset, size)))

    async def load(self) -> None:
        """Has the digest table of the index in memory, until the caller waits for something.

        Raises DamageError and SourceError.
        """
        self.note_read()
        while not self.index.has_table():  # a cache that is being filled may wait after it was restored
            await self._restore(self.index)

    async def request(self, numbers: Iterable[int]) -> dict[int, Fetch]:
        """The fetches of these chunks. Raises like `load`."""
        await self.load()
        return {number: self.store.request_or_kept(self.chunk(number)) for number in numbers}

    def under_way(self, number: int) -> Fetch | None:
        """The fetch of chunk `number`, if one is known to be under way. From any thread."""
        digest = self.index.find_digest(number)
        return None if digest is None else self.store.under_way(self._chunk(number, digest))

    def prefetch(self, number: int) -> bool:
        """Has the store fetch chunk `number`; False if it has no memory now, or the table is dropped."""
        digest = self.index.find_digest(number)
        return digest is not None and self.store.prefetch(self._chunk(number, digest))

    def start(self, offset: int, size: int) -> list[tuple[Part, Buffer | Fetch]]:
        """Requests all chunks of a range: each part with its chunk's bytes, or with the fetch of it.

        Call from the trio loop. Raises TableDroppedError.
        """
        started: list[tuple[Part, Buffer | Fetch]] = []
        for part in self.parts(offset, size):
            data = self.peek(part.chunk)
            started.append((part, self.store.request(self.chunk(part.chunk)) if data is None else data))
        return started

    async def finish(self, started: list[tuple[Part, Buffer | Fetch]]) -> list[Buffer]:
        """The bytes of what `start` returned, part by part. Raises DamageError, SourceError."""
        parts: list[Buffer] = []
        for part, source in started:
            if isinstance(source, Fetch):
                try:
                    data: Buffer = await source.wait()
                except DamageError as error:
                    data = self._zeros_for(part.chunk, self._damage(part.chunk, error))
            else:
                data = source
            parts.append(memoryview(data)[part.start : part.start + part.length])
        return parts

    def join(self, number: int, fetch: Fetch, loop: Loop) -> Buffer:
        """The bytes of chunk `number`, which `fetch` brings, for a thread that is not the loop's.

        Raises DamageError, SourceError.
        """
        try:
            while (data := fetch.join(loop.patience)) is None:
                loop.check()
        except DamageError as error:
            return self._zeros_for(number, self._damage(number, error))
        return data

    def extents(self, offset: int, size: int) -> Iterator[Extent]:
        """Holes and data from `offset` on, neighbours merged, cut to the range and the image; lazily."""
        end = min(offset + size, self.size)
        stop = self.index.find(end - 1) + 1 if offset < end else 0
        while offset < end:
            hole, behind = self.index.run(self.index.find(offset), stop)
            run_end = min(self.index.span(behind - 1)[1], end)
            yield Extent(offset, run_end - offset, hole)
            offset = run_end

    def data_size(self) -> int:
        """Bytes of the image that are not holes."""
        return self.index.data_size

    def next_data(self, offset: int) -> int | None:
        """The first byte from `offset` on that is not in a hole; None where only a hole follows."""
        return next((e.offset for e in self.extents(offset, self.size) if not e.hole), None)

    def next_hole(self, offset: int) -> int:
        """The first byte from `offset` on that is in a hole; the end of the image counts as one."""
        return next((e.offset for e in self.extents(offset, self.size) if e.hole), self.size)

    def chunk(self, number: int) -> Chunk:
        """What the store needs to know of chunk `number`. Raises TableDroppedError."""
        return self._chunk(number, self.index.digest(number))

    def _chunk(self, number: int, digest: bytes) -> Chunk:
        start, end = self.index.span(number)
        return Chunk(self.snapshot, self.archive, digest, end - start, self._encrypted, self._key)

    def data_chunks(self, offset: int, size: int) -> Iterator[int]:
        """The numbers of the chunks that hold `size` bytes of data from `offset` on; holes don't count."""
        number = self.index.find(offset) if offset < self.size else self.index.count
        while number < self.index.count and size > 0:
            if self.index.is_hole(number):
                _hole, number = self.index.run(number)
                continue
            yield number
            start, end = self.index.span(number)
            size -= end - max(start, offset)
            number += 1

    def parts(self, offset: int, size: int) -> Iterator[Part]:
        """The parts of a range, cut at the end of the image. From any thread."""
        end = min(offset + size, self.size)
        while offset < end:
            number = self.index.find(offset)
            start, stop = self.index.span(number)
            length = min(stop, end) - offset
            yield Part(number, offset - start, length)
            offset += length

    def peek(self, number: int) -> Buffer | None:
        """The bytes of chunk `number` if they are in memory. From any thread. Raises DamageError."""
        start, end = self.index.span(number)
        if self.index.is_hole(number):
            return zeros(end - start)
        digest = self.index.find_digest(number)
        data = None if digest is None else self.store.peek(digest, self._key)
        if data is None and self._zeroed_chunks.shows(number):
            return zeros(end - start)
        if digest is None or data is None:
            return None
        # Two indexes may name one digest with different lengths; at most one of them is right.
        if len(data) != end - start:
            wrong = DamageError(
                f"chunk {digest.hex()}: holds {len(data)} bytes, the index says {end - start}"
            )
            return self._zeros_for(number, self._damage(number, wrong))
        return data

    def _zeros_for(self, number: int, error: DamageError) -> Buffer:
        """The zeros that a damaged chunk reads as if the user asked for them. Raises `error` otherwise."""
        if self._zeroed is None:
            try:
                raise error from None
            finally:
                del error  # otherwise it and this frame would refer to each other, and keep the image
        start, end = self.index.span(number)
        self._zeroed_chunks.add(number)
        self._zeroed.add(str(self), Range(start, end - start), str(error))
        return zeros(end - start)

    def forget_zeros(self) -> bool:
        """Forgets the damaged chunks that are to be tried again; whether there were any.

        The caller then has to drop what it cached of the image, or they are not read again. Call from the
        trio loop.
        """
        return self._zeroed_chunks.forget_due()

    def _damage(self, number: int, error: DamageError) -> DamageError:
        """`error`, which names the chunk, with its place in the image."""
        start, end = self.index.span(number)
        return DamageError(f"{self}: bytes {start} to {end - 1}: {error}")
