"""The chunk store: from a chunk's name to its verified, decoded bytes.

A chunk is answered from the cache, or by joining the flight that is already under way for it, or by
a new flight: fetch the stored blob from the source, verify and decode it in a worker thread, keep
it. Flights run in the store's own nursery, so a reader that gives up does not take the chunk away
from the others. A failed flight fails those who wait for it and is forgotten: the next read tries
again.

Memory is bounded: the cache in bytes, and the flights by a budget of bytes in flight. Everything is called
from tasks of one trio loop, but `peek` and `under_way`, which any thread may call.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass

import trio

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.chunks.budget import Budget
from pbsfs.chunks.cache import ChunkCache
from pbsfs.formats import blob
from pbsfs.formats.keys import Key
from pbsfs.sources.base import Source

log = logging.getLogger(__name__)

DEFAULT_CACHE_SIZE = 256 << 20
"""Bytes of decoded chunks that are kept: enough for the working set of a booting guest."""

FLIGHT_BUDGET = 96 << 20
"""Decoded bytes that may be in flight at once: 24 chunks of 4 MiB. On the way they take their stored size."""

PREFETCH_SHARE = 2 / 3
"""The part of the flight budget that prefetching may fill; the rest stays free for reads on demand. These 16
chunks of 4 MiB, 20 MB as they are usually stored, are what fills 1 Gbit/s at 50 ms; 8 filled 60 % of it."""

SPARE_DECODERS = 1
"""Threads that decode, beyond one for each core: what ends is followed by the next only after a turn of the
loop, in which the core would be idle. A whole image from a directory took an eighth longer without."""

Identity = tuple[bytes, Key | None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of an archive: where to fetch it and what it has to be.

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
        """What the cache knows the content by.

        With the key: what was verified for a plain archive must not answer for an encrypted one, or a
        server could slip plain data into it by way of the cache.
        """
        return self.digest, self.key


class Flight:
    """A chunk on its way. Tasks `wait` for it; other threads `join` it."""

    __slots__ = ("_data", "_error", "_is_down", "_joined", "_landed", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._landed = trio.Event()
        self._is_down = False
        self._joined: list[threading.Lock] = []
        self._data: bytes | None = None
        self._error: PbsfsError | None = None

    def land(self, result: bytes | PbsfsError) -> None:
        if isinstance(result, PbsfsError):
            self._error = result.with_traceback(None)  # whose frames hold this flight: a cycle
        else:
            self._data = result
        self._landed.set()
        self._is_down = True  # before looking who has joined: who joins looks at it afterwards
        for turn in self._joined:
            turn.release()

    async def wait(self) -> bytes:
        """The chunk's bytes. Raises what the flight failed with."""
        await self._landed.wait()
        return self._result()

    def join(self, timeout: float) -> bytes | None:
        """The same for a thread that is not the loop's; None when it has not landed after so many seconds."""
        turn = threading.Lock()
        turn.acquire()
        self._joined.append(turn)
        if not self._is_down and not turn.acquire(timeout=timeout):
            return None
        return self._result()

    def _result(self) -> bytes:
        if self._data is None:
            assert self._error is not None
            # To each its own: what is raised holds on to all who wait, and so to images that are closed.
            raise copy.copy(self._error)
        return self._data


class ChunkStore:
    """All chunks of one source; shared by every image that is read from it."""

    def __init__(self, source: Source, nursery: trio.Nursery, cache_size: int = DEFAULT_CACHE_SIZE) -> None:
        """`nursery`: where flights live; cancelling it ends them. `cache_size`: in bytes."""
        self._source = source
        self._nursery = nursery
        self.cache = ChunkCache(cache_size)
        # By length too: where an index lies about it, its flight fails, and not that of an honest one.
        self._flights: dict[tuple[Identity, int], Flight] = {}
        # Flights whose task has not run yet. trio runs new tasks in no certain order, so each takes the
        # first from here: what is read on demand must not take off behind what is fetched ahead of it.
        self._departing: deque[tuple[Chunk, Flight, bool]] = deque()
        self._prefetching = 0
        self.sequential_readers = 0
        self._budget = Budget(FLIGHT_BUDGET)
        self._decoders = trio.CapacityLimiter(len(os.sched_getaffinity(0)) + SPARE_DECODERS)

    def peek(self, digest: bytes, key: Key | None) -> bytes | None:
        """The decoded bytes of the chunk that has `digest`, if they are in the cache.

        `key`: the archive's key where it is encrypted, else None.
        """
        return self.cache.get((digest, key))

    @property
    def window_limit(self) -> int:
        """Bytes that one sequential reader may have fetched ahead, so that all of them fit the cache."""
        return self.cache.room // 2 // max(1, self.sequential_readers)

    def under_way(self, chunk: Chunk) -> Flight | None:
        """The flight that brings `chunk`, if there is one already. From any thread."""
        return self._flights.get((chunk.identity, chunk.length))

    def request(self, chunk: Chunk) -> Flight:
        """The flight that brings `chunk`: the one under way, or a new one."""
        flight = self._flights.get((chunk.identity, chunk.length))
        if flight is None:
            flight = self._launch(chunk)
        return flight

    def request_or_kept(self, chunk: Chunk) -> Flight:
        """Like `request`; for a chunk that may have landed since it was looked for, one that is down."""
        data = self.cache.get(chunk.identity)
        if data is None or len(data) != chunk.length:
            return self.request(chunk)
        flight = Flight(chunk.length)
        flight.land(data)
        return flight

    def prefetch(self, chunk: Chunk) -> bool:
        """Sees to it that `chunk` gets into the cache; False where there is no room for it now."""
        if chunk.identity in self.cache or (chunk.identity, chunk.length) in self._flights:
            return True
        if chunk.length > self.cache.room:
            return False  # it would not be kept
        room = min(FLIGHT_BUDGET * PREFETCH_SHARE, self.cache.room / 2)  # what lands has to stay for a while
        if self._prefetching and self._prefetching + chunk.length > room:
            return False
        self._launch(chunk, prefetch=True)
        return True

    def _launch(self, chunk: Chunk, *, prefetch: bool = False) -> Flight:
        flight = Flight(chunk.length)
        self._nursery.start_soon(self._fly)  # fails where the reader was closed
        self._departing.append((chunk, flight, prefetch))
        self._flights[chunk.identity, chunk.length] = flight
        if prefetch:
            self._prefetching += chunk.length
        return flight

    async def _fly(self) -> None:
        chunk, flight, prefetch = self._departing.popleft()
        result: bytes | PbsfsError = SourceError("reading ends: the source is being closed")
        try:
            async with self._budget.take(chunk.length):
                result = await self._fetch(chunk)
                self.cache.put(chunk.identity, result)
        except PbsfsError as error:
            result = error
        except Exception as error:
            log.exception("chunk %s: unexpected failure", chunk.digest.hex())
            result = SourceError(f"chunk {chunk.digest.hex()}: {type(error).__name__}: {error}")
        finally:
            if prefetch:
                self._prefetching -= chunk.length
            del self._flights[chunk.identity, chunk.length]
            flight.land(result)

    async def _fetch(self, chunk: Chunk) -> bytes:
        limit = blob.stored_limit(chunk.length)

        async def fetch() -> bytes:
            raw = await self._source.fetch_chunk(chunk.snapshot, chunk.archive, chunk.digest, limit)
            return await trio.to_thread.run_sync(_decode, raw, chunk, limiter=self._decoders)

        try:
            return await self._source.confirmed(fetch)
        except DamageError as error:
            raise DamageError(f"chunk {chunk.digest.hex()}: {error}") from None


def _decode(raw: bytes, chunk: Chunk) -> bytes:
    return blob.decode_chunk(
        raw, digest=chunk.digest, length=chunk.length, encrypted=chunk.encrypted, key=chunk.key
    )
