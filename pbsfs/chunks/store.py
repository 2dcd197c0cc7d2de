"""The chunk store: from a chunk's name to its verified, decoded bytes.

The store answers from the cache, or with the fetch that already runs for the chunk, or with a new one:
get the stored blob from the source, verify and decode it in a worker thread, and cache it. Fetches run in the
store's own nursery, so they continue for the other readers when one is cancelled. A fetch that fails raises
its error in each reader that waits for it and is then forgotten, so the next read tries again.

Memory is bounded: the bytes in the cache, and the decoded bytes of the fetches that run. Tasks of one trio
loop call all of this; any thread may call `peek` and `under_way`.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections import deque
from typing import NamedTuple

import trio

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.chunks.budget import Budget
from pbsfs.chunks.cache import BEHIND, ChunkCache
from pbsfs.chunks.decoder import Decoding, decode_pair, is_pure
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.formats import blob
from pbsfs.formats.blob import Stored
from pbsfs.formats.keys import Key
from pbsfs.runtime import process
from pbsfs.runtime.memory import Memory
from pbsfs.runtime.stats import COUNTS
from pbsfs.runtime.threads import Threads
from pbsfs.sources.base import Source

log = logging.getLogger(__name__)

Identity = tuple[bytes, Key | None]


class Chunk(NamedTuple):
    """A chunk of an archive: where to fetch it, and how to verify it.

    `length`: decoded bytes. `key`: the archive's key where it is encrypted, else None.
    """

    snapshot: Snapshot
    archive: Archive
    digest: bytes
    length: int
    encrypted: bool
    key: Key | None

    @property
    def identity(self) -> Identity:
        """The key of the content in the cache.

        It includes the encryption key: content that was verified for a plain archive must not answer for an
        encrypted one, or a server could insert plain data into it by way of the cache.
        """
        return self.digest, self.key

    def matches(self, data: bytes | memoryview) -> bool:
        """Whether `data` is the chunk's decoded content, by length and digest. Any thread may call this."""
        return len(data) == self.length and blob.chunk_digest(data, self.key) == self.digest


class Fetch:
    """One fetch of a chunk. Tasks `wait` for its result; other threads `join` it.

    `is_awaited`: whether any does, or did.
    """

    __slots__ = ("_data", "_error", "_finished", "_is_finished", "_joined", "is_awaited", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.is_awaited = False
        self._finished = trio.Event()
        self._is_finished = False
        self._joined: list[threading.Lock] = []
        self._data: bytes | None = None
        self._error: PbsfsError | None = None

    def finish(self, result: bytes | PbsfsError) -> None:
        """Gives `result` to all that wait. Called from the trio loop, once."""
        if isinstance(result, PbsfsError):
            self._error = result.with_traceback(None)  # its frames refer to this fetch: a cycle
        else:
            self._data = result
        self._finished.set()
        self._is_finished = True  # set before the loop below: a thread that joins checks it after that
        for turn in self._joined:
            turn.release()

    async def wait(self) -> bytes:
        """The chunk's bytes. Raises the error of the fetch."""
        self.is_awaited = True
        await self._finished.wait()
        return self._result()

    def join(self, timeout: float) -> bytes | None:
        """Like `wait`, for a thread other than the loop's. Returns None after `timeout` seconds."""
        self.is_awaited = True
        turn = threading.Lock()
        turn.acquire()
        self._joined.append(turn)
        if not self._is_finished and not turn.acquire(timeout=timeout):
            return None
        return self._result()

    def _result(self) -> bytes:
        if self._data is None:
            assert self._error is not None
            # A copy for each: a raised error refers to the frames of its task, and so to closed images.
            raise copy.copy(self._error)
        return self._data


class ChunkStore:
    """The chunks of one source, shared by all of its images."""

    def __init__(
        self, source: Source, nursery: trio.Nursery, memory: Memory, limits: FetchLimits = DEFAULT
    ) -> None:
        """`nursery`: runs the fetches; cancelling it ends them. `memory`: what it leaves is for the cache."""
        self._source = source
        self._nursery = nursery
        log.debug("%s decodes chunks", "Python" if is_pure() else "the C extension")
        self.memory = memory
        self.limits = limits
        self.cache = ChunkCache(memory.cache_size)
        memory.resize_cache_with(self.cache.resize)
        # By length too: where one index has a wrong length, the fetch of another index must not fail.
        self._fetches: dict[tuple[Identity, int], Fetch] = {}
        # Fetches whose task has not run yet. trio runs new tasks in random order, so each task takes the
        # first from here: a chunk that is read must not start after one that was prefetched later.
        self._queued: deque[tuple[Chunk, Fetch, bool]] = deque()
        self._prefetching = 0
        self.sequential_readers = 0
        self._budget = Budget(min(limits.fetch_budget, memory.cache_size))
        threads = len(os.sched_getaffinity(0)) + limits.spare_decoders
        self._decoders = Threads(threads, together=None if is_pure() else decode_pair)

    def peek(self, digest: bytes, key: Key | None) -> bytes | None:
        """The decoded bytes of the chunk that has `digest`, if they are in the cache.

        `key`: the archive's key where it is encrypted, else None.
        """
        data = self.cache.get((digest, key))
        if data is not None:
            COUNTS.cache_hits += 1
        return data

    @property
    def window_limit(self) -> int:
        """Bytes to prefetch for one sequential reader, so that those of all readers fit the cache."""
        room = self.cache.room_ahead
        if self._source.rate is not None:
            room = min(room, self._source.rate.limit * self.limits.rate_window)
        return room // max(1, self.sequential_readers)

    def serve_copy(self, streams: int, *, in_order: bool = False) -> None:
        """From now on, the cache has room for little more than what is fetched ahead of so many streams.

        A copy needs most chunks once, and each new page of memory costs time. `in_order`: there is one
        stream, of which each chunk is read once and in order; so what was read makes room for the rest.
        """
        window = self.limits.max_window
        if in_order:
            self.cache.is_for_copy = True
            self.memory.limit_cache(window * BEHIND // (BEHIND - 1))
        else:
            self.memory.limit_cache((1 + streams) * window)
        process.keep_freed_memory()

    def under_way(self, chunk: Chunk) -> Fetch | None:
        """The fetch of `chunk` that runs already, or None. Any thread may call this."""
        return self._fetches.get((chunk.identity, chunk.length))

    def request(self, chunk: Chunk) -> Fetch:
        """The fetch of `chunk` that runs already, or a new one."""
        COUNTS.cache_misses += 1
        fetch = self._fetches.get((chunk.identity, chunk.length))
        if fetch is None:
            fetch = self._start(chunk)
        return fetch

    def request_or_kept(self, chunk: Chunk) -> Fetch:
        """Like `request`, but looks in the cache first: a chunk found there gives a finished fetch."""
        data = self.cache.get(chunk.identity)
        if data is None or len(data) != chunk.length:
            return self.request(chunk)
        fetch = Fetch(chunk.length)
        fetch.finish(data)
        return fetch

    def prefetch(self, chunk: Chunk) -> bool:
        """Fetches `chunk` into the cache, unless it is there. Returns False if it does not fit now."""
        if self.cache.expect(chunk.identity) or (chunk.identity, chunk.length) in self._fetches:
            return True
        if chunk.length > self.cache.room:
            return False  # the cache would not take it
        room = min(self.limits.fetch_budget * self.limits.prefetch_share, self.cache.room_ahead)
        if self._prefetching and self._prefetching + chunk.length > room:
            return False
        COUNTS.chunks_prefetched += 1
        self._start(chunk, prefetch=True)
        return True

    def _start(self, chunk: Chunk, *, prefetch: bool = False) -> Fetch:
        fetch = Fetch(chunk.length)
        self._nursery.start_soon(self._run_next)  # fails where the reader was closed
        self._queued.append((chunk, fetch, prefetch))
        self._fetches[chunk.identity, chunk.length] = fetch
        if prefetch:
            self._prefetching += chunk.length
        return fetch

    async def _run_next(self) -> None:
        chunk, fetch, prefetch = self._queued.popleft()
        result: bytes | PbsfsError = SourceError("reading ends: the source is being closed")
        try:
            async with self._budget.take(chunk.length):
                result = await self._fetch(chunk, fetch)
                self.memory.settle()
                self.cache.put(chunk.identity, result, is_read=fetch.is_awaited)
        except PbsfsError as error:
            result = error
        except MemoryError:  # below the limit of pbsfs, but not of this process (ulimit -v)
            result = SourceError(
                f"chunk {chunk.digest.hex()}: the system gives no memory for it; allow this process more, or "
                "give a smaller --cache-size",
                retryable=True,
            )
        except Exception as error:
            log.exception("chunk %s: unexpected failure", chunk.digest.hex())
            result = SourceError(f"chunk {chunk.digest.hex()}: {type(error).__name__}: {error}")
        finally:
            if prefetch:
                self._prefetching -= chunk.length
            del self._fetches[chunk.identity, chunk.length]
            fetch.finish(result)

    async def _fetch(self, chunk: Chunk, fetch: Fetch) -> bytes:
        async def decoded() -> bytes:
            raw = await self._fetch_stored(chunk, fetch)
            return await self._decoders.run(
                Decoding(raw, chunk.digest, chunk.length, chunk.encrypted, chunk.key)
            )

        try:
            return await self._source.confirmed(decoded)
        except DamageError as error:
            raise DamageError(f"chunk {chunk.digest.hex()}: {error}") from None

    async def _fetch_stored(self, chunk: Chunk, fetch: Fetch) -> Stored:
        limit, rate = blob.stored_limit(chunk.length), self._source.rate
        kept = await self._source.kept_chunk(chunk.digest, limit, claim=rate is None)
        if kept is not None:
            return kept
        if rate is None:
            return await self._fetch_now(chunk)
        async with rate.turn(chunk.length, lambda: fetch.is_awaited) as turn:
            turn.size = 0
            # Claimed only now: other processes would wait as long as this one waited for its turn.
            kept = await self._source.kept_chunk(chunk.digest, limit)
            if kept is not None:
                return kept
            raw = await self._fetch_now(chunk)
            turn.size = len(raw)
        return raw

    async def _fetch_now(self, chunk: Chunk) -> Stored:
        limit = blob.stored_limit(chunk.length)
        started = time.monotonic()
        raw = await self._source.fetch_chunk(chunk.snapshot, chunk.archive, chunk.digest, limit)
        COUNTS.chunk_fetched(len(raw), time.monotonic() - started)
        return raw
