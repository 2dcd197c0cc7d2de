"""Reader sessions: opened when something is read, shared, bounded, closed when idle.

A session belongs to one snapshot and is a task and a lock on the server, so there are as few as the reading
needs: one for a snapshot, more only where the round trip is long and a single connection could not fill
the link; all together at most `MAX_SESSIONS`. Called from tasks of one trio loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from pbsfs.errors import AuthError, ConnectError, DamageError, NotFoundError, PbsfsError, SourceError
from pbsfs.names import Archive, Snapshot
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.protocol import Response
from pbsfs.sources.server.session import RefusedError, Session

log = logging.getLogger(__name__)

MAX_SESSIONS = 16
"""Sessions at once over the whole mount. Each is a worker task in the server's list."""

IDLE_TIME = 30.0
"""Seconds after which a session that nobody used is closed: a person who looks around keeps his, and a
prune of the snapshot does not wait long."""

SHORT_ROUND_TRIP = 0.005
"""Seconds up to which one connection fills the link: a local network."""

ROUND_TRIP_PER_CONNECTION = 0.015
"""Seconds of round trip for each further connection: at 50 ms there are four, each of which has to carry a
fourth of what the link holds, less than Linux's default socket buffers."""

MAX_CONNECTIONS = 6
"""Connections to one snapshot at most."""


class _Reader:
    """A session and the indexes that were downloaded in it: the server gives no chunk of any other."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.indexes: set[Archive] = set()
        self.downloading: dict[Archive, trio.Lock] = {}
        self.users = 0
        self.idle_since = trio.current_time()


class SessionPool:
    """All sessions of one mount."""

    def __init__(self, api: Api, *, connections: int | None, stall_timeout: float) -> None:
        """`connections`: how many to one snapshot; None to go by the round trip."""
        self._api = api
        self._connections = connections
        self._stall_timeout = stall_timeout
        self._readers: dict[Snapshot, list[_Reader]] = {}
        self._opening: dict[Snapshot, trio.Lock] = {}
        self._places = trio.Semaphore(MAX_SESSIONS)
        self._freed = trio.Event()
        self._opened = trio.Event()
        # Length and checksum of each index as it was read: a reader must not go on with another one.
        self._sums: dict[tuple[Snapshot, Archive], tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return sum(len(readers) for readers in self._readers.values())

    async def index(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        """The stored bytes of an index. Raises like `chunk`, and NotFoundError."""
        async with self._reader(snapshot) as reader:
            return await self._download(reader, snapshot, archive, limit)

    async def chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        """The stored bytes of a chunk of `archive`. Raises SourceError and its kin, and DamageError."""
        async with self._reader(snapshot) as reader:
            if archive not in reader.indexes:
                async with reader.downloading.setdefault(archive, trio.Lock()):
                    if archive not in reader.indexes:
                        await self._download(reader, snapshot, archive, None)
            answer = await reader.session.get(f"/chunk?digest={digest.hex()}", limit)
            if answer.status in (400, 404):
                # The server names the chunk's file and what is wrong with it.
                raise DamageError(f"the server can't read it: {_words(answer)}")
            return self._body(answer)

    async def tidy(self) -> None:
        """Closes sessions when they were idle for long; runs as long as the pool is used."""
        while True:
            if not self._readers:
                self._opened = trio.Event()
                await self._opened.wait()
            now = trio.current_time()
            for reader, snapshot in self._idle():
                if now - reader.idle_since >= IDLE_TIME or reader.session.failure is not None:
                    self._drop(snapshot, reader)
            await trio.sleep(IDLE_TIME / 6)

    def close(self) -> None:
        for snapshot, readers in list(self._readers.items()):
            for reader in list(readers):
                self._drop(snapshot, reader)

    def _body(self, answer: Response) -> bytes:
        if answer.status != 200:
            raise self._api.error(answer.status, _words(answer))
        return answer.body

    async def _download(
        self, reader: _Reader, snapshot: Snapshot, archive: Archive, limit: int | None
    ) -> bytes:
        known = self._sums.get((snapshot, archive))
        if limit is None:
            assert known is not None  # no chunk is asked for before its index was read
            limit, again = known[0], True
        else:
            again = False
        answer = await reader.session.get(f"/download?file-name={archive}", limit)
        if answer.status in (400, 404):
            raise NotFoundError(f"{snapshot}/{archive}: {_words(answer)}")
        body = self._body(answer)
        found = len(body), await trio.to_thread.run_sync(_sum, body)
        if again and known != found:
            raise DamageError(f"{snapshot}/{archive}: the index on the server is not the one it was")
        self._sums[snapshot, archive] = found
        reader.indexes.add(archive)
        return body

    @asynccontextmanager
    async def _reader(self, snapshot: Snapshot) -> AsyncIterator[_Reader]:
        """A session to `snapshot` to send a request on; one that fails under it is dropped."""
        reader = await self._choose(snapshot)
        reader.users += 1
        try:
            yield reader
        finally:
            reader.users -= 1
            reader.idle_since = trio.current_time()
            if reader.session.failure is not None:
                self._drop(snapshot, reader)
            if reader.users == 0:
                self._freed.set()

    async def _choose(self, snapshot: Snapshot) -> _Reader:
        lock = self._opening.setdefault(snapshot, trio.Lock())
        async with lock:
            readers = [r for r in self._readers.get(snapshot, []) if r.session.failure is None]
            if readers:
                least = min(readers, key=lambda reader: reader.users)
                if least.users < 2 or len(readers) >= self._wanted(least.session.round_trip):
                    return least
            return await self._open(snapshot)

    def _wanted(self, round_trip: float) -> int:
        if self._connections is not None:
            return self._connections
        if round_trip <= SHORT_ROUND_TRIP:
            return 1
        return min(MAX_CONNECTIONS, 1 + math.ceil(round_trip / ROUND_TRIP_PER_CONNECTION))

    async def _open(self, snapshot: Snapshot) -> _Reader:
        await self._take_place()
        try:
            session = await self._open_session(snapshot)
        except BaseException:
            self._places.release()
            raise
        reader = _Reader(session)
        self._readers.setdefault(snapshot, []).append(reader)
        self._opened.set()
        return reader

    async def _take_place(self) -> None:
        """A place among `MAX_SESSIONS`: a free one, or that of the session that is idle for longest."""
        while True:
            try:
                self._places.acquire_nowait()
            except trio.WouldBlock:
                idle = self._idle()
                if idle:
                    self._drop(*min(idle, key=lambda found: found[0].idle_since)[::-1])
                    continue
                self._freed = trio.Event()
                await self._freed.wait()
            else:
                return

    def _idle(self) -> list[tuple[_Reader, Snapshot]]:
        return [
            (reader, snapshot)
            for snapshot, readers in self._readers.items()
            for reader in readers
            if reader.users == 0
        ]

    def _drop(self, snapshot: Snapshot, reader: _Reader) -> None:
        readers = self._readers.get(snapshot, [])
        if reader in readers:
            readers.remove(reader)
            reader.session.close()
            self._places.release()
            self._freed.set()
        if not readers:
            self._readers.pop(snapshot, None)
            lock = self._opening.get(snapshot)
            if lock is not None and not lock.statistics().locked:
                del self._opening[snapshot]

    async def _open_session(self, snapshot: Snapshot) -> Session:
        for last_try in (False, True):
            headers = await self._api.headers()
            session = Session(
                self._api.repository,
                self._api.trust,
                snapshot_query(self._api.repository.store, snapshot),
                headers,
                stall_timeout=self._stall_timeout,
            )
            try:
                await session.open()
            except RefusedError as refused:
                error = self._refusal(snapshot, refused)
                if isinstance(error, AuthError) and not last_try and self._api.forget_ticket(headers):
                    continue
                raise error from None
            log.debug("%s: session opened, round trip %.1f ms", snapshot, session.round_trip * 1000)
            return session
        raise AssertionError("unreachable")

    def _refusal(self, snapshot: Snapshot, refused: RefusedError) -> PbsfsError:
        words = " ".join(refused.words.split()) or f"status {refused.status}"
        if refused.status == 400 and "lock" in words:
            return SourceError(f"{snapshot} is locked on the server: {words}", retryable=True)
        if refused.status >= 500 or refused.status == 429:
            return ConnectError(f"{snapshot}: the server can't open a session now: {words}")
        return self._api.error(refused.status, words)


def snapshot_query(store: str, snapshot: Snapshot) -> dict[str, str]:
    """The parameters that name a snapshot in requests."""
    query = {
        "store": store,
        "backup-type": snapshot.group.type,
        "backup-id": snapshot.group.id,
        "backup-time": str(snapshot.time),
    }
    if snapshot.group.namespace.parts:
        query["ns"] = str(snapshot.group.namespace)
    return query


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _words(answer: Response) -> str:
    text = answer.body.decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text).strip() or f"status {answer.status}"
