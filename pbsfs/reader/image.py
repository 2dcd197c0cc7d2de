"""An archive with an index as a file of bytes: images and, alike, pxar streams.

An `Image` is opened once and shared; every open file has a `Handle` on it, with a read-ahead of its
own. `read_cached` and `extents` may be called from any thread; `read` is called from tasks of the
trio loop. Nothing that failed a check is ever returned: a read is answered in full with verified
bytes, or raises.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pbsfs.base.errors import DamageError, UsageError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.chunks.prefetch import ReadAhead
from pbsfs.chunks.store import Chunk, ChunkStore, Fetch
from pbsfs.formats.blob import MAX_CHUNK_SIZE
from pbsfs.formats.index import Index
from pbsfs.formats.keys import Key
from pbsfs.reader.damage import Range, ZeroedRanges

_ZEROS = memoryview(bytes(MAX_CHUNK_SIZE))  # never written, so it takes no memory

Buffer = bytes | memoryview
"""A chunk's bytes, or, of a hole, a view of `_ZEROS`."""

ZEROS_LAST = 60.0
"""Seconds for which a damaged chunk is shown as zeros before it is tried again: it may be repaired, but
each try costs its reader the time that it takes to be sure."""

LARGE_COPY = 64 << 10
"""Bytes from which letting go of Python's lock costs less than holding on to it."""

_LIBC = ctypes.CDLL(None)
_LIBC.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBC.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_LIBC.memcpy.restype = _LIBC.memset.restype = None

R = TypeVar("R")

_READS = itertools.count()
"""Numbers the reads of all images, in order. Usable from any thread."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes that is all hole (reads as zeros, takes no storage) or all data."""

    offset: int
    length: int
    hole: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """The part of a read that falls into one chunk: `length` bytes from `start` within it."""

    chunk: int
    start: int
    length: int


class Loop(Protocol):
    """The trio loop as other threads see it. `patience`: seconds to wait between two calls of `check`."""

    patience: float

    def call(self, work: Callable[[], Awaitable[R]]) -> R:
        """The result of `work`, a task in the loop."""

    def post(self, work: Callable[[], object]) -> None:
        """Has `work` called in the loop, soon."""

    def check(self) -> None:
        """Raises SourceError where waiting makes no sense any more."""


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
        """`key`: the archive's key where it is encrypted, else None. `restore`: gives the index its digest
        table again when that was dropped. `zeroed`: where damaged chunks are to read as zeros, what takes
        note of them.
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
        # Damaged chunks, and when each was found to be so, by time.monotonic(). From any thread.
        self._zero_chunks: dict[int, float] = {}

    def __str__(self) -> str:
        return f"{self.snapshot}/{self.archive.name}"

    @property
    def shows_zeros(self) -> bool:
        """Whether damaged chunks read as zeros."""
        return self._zeroed is not None

    def strict(self) -> Image:
        """The same image, whose damaged chunks never read as zeros."""
        image = copy.copy(self)
        image._zeroed = None
        image._zero_chunks = {}
        return image

    def handle(self, *, whole: bool = False) -> Handle:
        """A reader of its own; `whole`: one that reads all of the image, from its beginning."""
        return Handle(self, whole=whole)

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """The bytes `offset` … `offset + size`, cut at the end; None where some would have to be fetched."""
        self.last_read = next(_READS)
        parts: list[Buffer] = []
        for piece in self._pieces(offset, size):
            data = self._at_hand(piece.chunk)
            if data is None:
                return None
            parts.append(memoryview(data)[piece.start : piece.start + piece.length])
        return _join(parts)

    async def read(self, offset: int, size: int) -> Buffer:
        """The bytes `offset` … `offset + size`, cut at the end of the image.

        All chunks of the range are fetched side by side, so callers bound `size` (doors pass what
        one request of theirs may ask for). Raises DamageError and SourceError.
        """
        await self.load()
        return await self._finish(self._start(offset, size))

    async def load(self) -> None:
        """Sees to it that the index has its digest table, until the caller waits for something.

        Raises DamageError and SourceError.
        """
        self.last_read = next(_READS)
        if not self.index.has_table():
            await self._restore(self.index)

    async def request(self, numbers: Iterable[int]) -> dict[int, Fetch]:
        """What brings these chunks. Raises like `load`."""
        await self.load()
        return {number: self.store.request_or_kept(self.chunk(number)) for number in numbers}

    def under_way(self, number: int) -> Fetch | None:
        """What brings chunk `number`, if it is under way and known to be. From any thread."""
        digest = self.index.find_digest(number)
        return None if digest is None else self.store.under_way(self._chunk(number, digest))

    def prefetch(self, number: int) -> bool:
        """Has the store fetch chunk `number`; False where there is no room for it now, or no digest table."""
        digest = self.index.find_digest(number)
        return digest is not None and self.store.prefetch(self._chunk(number, digest))

    def _start(self, offset: int, size: int) -> list[tuple[_Piece, Buffer | Fetch]]:
        """Asks for all chunks of a range: each piece with its chunk's bytes, or with what brings them."""
        started: list[tuple[_Piece, Buffer | Fetch]] = []
        for piece in self._pieces(offset, size):
            data = self._at_hand(piece.chunk)
            started.append((piece, self.store.request(self.chunk(piece.chunk)) if data is None else data))
        return started

    async def _finish(self, started: list[tuple[_Piece, Buffer | Fetch]]) -> Buffer:
        parts: list[Buffer] = []
        for piece, source in started:
            if isinstance(source, Fetch):
                try:
                    data: Buffer = await source.wait()
                except DamageError as error:
                    data = self._zeros_for(piece.chunk, self._damage(piece.chunk, error))
            else:
                data = source
            parts.append(memoryview(data)[piece.start : piece.start + piece.length])
        return _join(parts)

    def _join(self, number: int, fetch: Fetch, loop: Loop) -> Buffer:
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
        while offset < self.size and size > 0:
            number = self.index.find(offset)
            if self.index.is_hole(number):
                _hole, behind = self.index.run(number)
                offset = self.index.span(behind - 1)[1]
                continue
            yield number
            end = self.index.span(number)[1]
            size -= end - offset
            offset = end

    def _pieces(self, offset: int, size: int) -> Iterator[_Piece]:
        end = min(offset + size, self.size)
        while offset < end:
            number = self.index.find(offset)
            start, stop = self.index.span(number)
            length = min(stop, end) - offset
            yield _Piece(number, offset - start, length)
            offset += length

    def _at_hand(self, number: int) -> Buffer | None:
        start, end = self.index.span(number)
        if self.index.is_hole(number):
            return _ZEROS[: end - start]
        digest = self.index.find_digest(number)
        data = None if digest is None else self.store.peek(digest, self._key)
        if data is None and number in self._zero_chunks and not self._is_due(number):
            return _ZEROS[: end - start]
        if digest is None or data is None:
            return None
        # Two indexes may name one digest with different lengths; at most one of them tells the truth.
        if len(data) != end - start:
            wrong = DamageError(
                f"chunk {digest.hex()}: holds {len(data)} bytes, the index says {end - start}"
            )
            return self._zeros_for(number, self._damage(number, wrong))
        return data

    def _zeros_for(self, number: int, error: DamageError) -> Buffer:
        """What a damaged chunk reads as: nothing, `error` is raised, unless zeros were asked for."""
        if self._zeroed is None:
            try:
                raise error from None
            finally:
                del error  # or it would hold this frame, that it holds, and so the image
        start, end = self.index.span(number)
        self._zero_chunks[number] = time.monotonic()
        self._zeroed.add(str(self), Range(start, end - start), str(error))
        return _ZEROS[: end - start]

    def _is_due(self, number: int) -> bool:
        """Whether it is time to try a damaged chunk again."""
        return time.monotonic() - self._zero_chunks.get(number, -math.inf) >= ZEROS_LAST

    def forget_zeros(self) -> bool:
        """Forgets the damaged chunks that are to be tried again; whether there were any.

        Whoever keeps what was read has to drop it then, or nobody reads it again. Call from the trio loop.
        """
        due = [number for number in list(self._zero_chunks) if self._is_due(number)]
        for number in due:
            del self._zero_chunks[number]
        return bool(due)

    def _damage(self, number: int, error: DamageError) -> DamageError:
        """`error`, which names the chunk, with the place of it."""
        start, end = self.index.span(number)
        return DamageError(f"{self}: bytes {start} to {end - 1}: {error}")


def _copy(target: memoryview, at: int, source: Buffer, start: int, length: int) -> None:
    """Copies `length` bytes of `source` from `start` into `target` from `at` on.

    With slices Python's lock (GIL) would be held: 1 ms for 4 MiB of fresh memory, without anything received.
    """
    if length < LARGE_COPY:
        target[at : at + length] = memoryview(source)[start : start + length]
        return
    place = ctypes.addressof(ctypes.c_char.from_buffer(target, at))
    if isinstance(source, bytes):
        origin = ctypes.cast(ctypes.c_char_p(source), ctypes.c_void_p).value or 0
        _LIBC.memcpy(place, origin + start, length)
    elif source.obj is _ZEROS.obj:
        _LIBC.memset(place, 0, length)
    else:
        raise TypeError("a chunk's bytes are neither bytes nor a view of the zeros of a hole")


def _join(parts: list[Buffer]) -> Buffer:
    return parts[0] if len(parts) == 1 else b"".join(parts)


NOTHING = -1, 0
"""The chunk and window of a handle that has launched nothing."""


class Handle:
    """One reader of an image: reads, and fetches ahead while it reads in sequence.

    The FUSE door and copies use `read_cached` and `read`, in the trio loop; other threads use `read_into`.
    """

    def __init__(self, image: Image, *, whole: bool = False) -> None:
        self.image = image
        self.size = image.size
        self._lock = threading.Lock()  # guards all of these but `_sequential`, which is the loop's
        self._ahead = ReadAhead(image.store.limits, whole=whole)
        self._wanted = 0  # bytes behind its position that are worth fetching
        self._next_chunk = 0  # the first chunk that was not fetched ahead yet
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
        await self.image.load()
        # What is asked for takes off first; what may be asked for next, right behind it.
        started = self.image._start(offset, size)
        if self.observe(offset, size):
            self.fetch_ahead()
        return await self.image._finish(started)

    def read_into(self, buffer: memoryview, offset: int, loop: Loop) -> None:
        """Fills `buffer` with the bytes from `offset` on; from a thread that is not the loop's.

        Takes what is at hand, joins what is under way, and has `loop` start the rest. Raises DamageError,
        SourceError, and UsageError where some of it lies beyond the end.
        """
        image = self.image
        size = len(buffer)
        if offset + size > image.size:
            raise UsageError(f"{image}: a read of {size} bytes at {offset} goes beyond the end")
        image.last_read = next(_READS)
        pieces = [(piece, image._at_hand(piece.chunk)) for piece in image._pieces(offset, size)]
        fetches: dict[int, Fetch] = {}
        wanted: list[int] = []
        for piece, data in pieces:
            if data is None:
                fetch = image.under_way(piece.chunk)
                if fetch is None:
                    wanted.append(piece.chunk)
                else:
                    fetches[piece.chunk] = fetch
        if wanted:
            fetches |= loop.call(functools.partial(image.request, wanted))
        if self.observe(offset, size):
            loop.post(self.fetch_ahead)
        done = 0
        for piece, at_hand in pieces:
            data = image._join(piece.chunk, fetches.pop(piece.chunk), loop) if at_hand is None else at_hand
            _copy(buffer, done, data, piece.start, piece.length)
            done += piece.length

    def observe(self, offset: int, size: int) -> bool:
        """Takes note of a read; whether `fetch_ahead` is to be called for it. From any thread."""
        with self._lock:
            wanted = self._ahead.observe(offset, size)
            self._wanted = wanted
            if not wanted:
                self._next_chunk = 0
                self._launched = NOTHING
                return self._sequential
            # Nothing is new before the reader gets to the next chunk, or has shown that it wants more.
            chunk, enough = self._launched
            return wanted > enough or self._chunk_at(self._ahead.position) != chunk

    def fetch_ahead(self) -> None:
        """Starts fetching what is worth it after the reads that were observed. Call from the trio loop."""
        store = self.image.store
        with self._lock:
            self._set_sequential(self._wanted > 0)
            position, wanted = self._ahead.position, self._wanted
            for number in self.image.data_chunks(position, min(wanted, store.window_limit)):
                if number < self._next_chunk:
                    continue
                if not self.image.prefetch(number):
                    return  # there is no room now, but there may be at the next read
                self._next_chunk = number + 1
            self._launched = self._chunk_at(position), wanted

    def _chunk_at(self, position: int) -> int:
        return self.image.index.find(position) if position < self.image.size else self.image.index.count

    def skip_hole(self, end: int) -> None:
        """Tells that the reader leaves out a hole that ends at `end`: it still reads in sequence."""
        with self._lock:
            self._ahead.skip(end)

    def close(self) -> None:
        """Gives back this reader's part of the read-ahead memory. Call from the trio loop."""
        self._set_sequential(False)

    def _set_sequential(self, sequential: bool) -> None:
        if sequential != self._sequential:
            self._sequential = sequential
            self.image.store.sequential_readers += 1 if sequential else -1
