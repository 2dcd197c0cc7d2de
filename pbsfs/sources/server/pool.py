"""Reader sessions: opened when something is read, shared, bounded, closed when idle.

A session belongs to one snapshot and is a task and a lock on the server, so there are as few as the reading
needs: one for a snapshot, more only where the round trip is long and a single connection could not fill
the link; all together at most `MAX_SESSIONS`. Called from tasks of one trio loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    DamageError,
    PbsfsError,
    SourceError,
    UnavailableError,
)
from pbsfs.base.names import Archive, Snapshot
from pbsfs.sources.retry import SharedTry, connecting
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.protocol import Response
from pbsfs.sources.server.refusals import (
    Meaning,
    error_of,
    meaning_of,
    meaning_of_chunk,
    meaning_of_file,
    words_of,
)
from pbsfs.sources.server.session import Session
from pbsfs.sources.server.upgrade import RefusedError

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

TURN = 5.0
"""Seconds that a session in constant use keeps its place when others wait for one."""

PAUSE = 5.0
"""Seconds after which further sessions are tried again when one could not be had."""

CLOSING_TIME = 2.0
"""Seconds that closing waits for sessions to end: they do so at once, but for one that still connects."""


_MAX_INDEX = (1 << 30) + 4096


class _Reader:
    """A session and the indexes that were downloaded in it: the server gives no chunk of any other.

    `indexes`: length and checksum of each. `retiring`: it takes no new users, because another snapshot waits
    for its place, or its own snapshot was made again since it was opened.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.indexes: dict[Archive, tuple[int, bytes]] = {}
        self.downloading: dict[Archive, trio.Lock] = {}
        self.users = 0
        self.retiring = False
        self.opened = self.idle_since = trio.current_time()


class SessionPool:
    """All sessions of one mount."""

    def __init__(
        self,
        api: Api,
        *,
        connections: int | None,
        stall_timeout: float,
        answer_timeout: float,
        limits: ServerLimits = DEFAULT,
    ) -> None:
        """`connections`: how many to one snapshot; None to go by the round trip."""
        self._api = api
        self._connections = connections
        self._stall_timeout = stall_timeout
        self._answer_timeout = answer_timeout
        self._limits = limits
        self._readers: dict[Snapshot, list[_Reader]] = {}
        self._opening: dict[Snapshot, SharedTry[_Reader]] = {}
        # Sessions that have a place: from before they are opened until their connection is closed.
        self._placed: set[Session] = set()
        self._nursery: trio.Nursery | None = None
        self._coming: dict[Snapshot, int] = {}  # further sessions that are being opened
        self._no_more_before = -math.inf  # the time of the loop's clock at which they are tried again
        self._queue = trio.Lock()  # for a place: first come, first served
        self._changed = trio.Event()  # a place may be had now
        self._opened = trio.Event()
        self._closed = False
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
            if not self._has_index(reader, snapshot, archive):
                async with reader.downloading.setdefault(archive, trio.Lock()):
                    if not self._has_index(reader, snapshot, archive):
                        await self._download(reader, snapshot, archive, None)
            answer = await reader.session.get(f"/chunk?digest={digest.hex()}", limit)
            if answer.status == 401:  # not for who we are, which is looked at when a session is opened
                raise _replaced(snapshot, archive)
            return self._body(answer, meaning_of_chunk)

    def start(self, nursery: trio.Nursery) -> None:
        """Starts what the pool does in the background. Call once, before the first request."""
        self._nursery = nursery
        nursery.start_soon(self._tidy)

    async def _tidy(self) -> None:
        """Closes sessions when they were idle for long."""
        while True:
            if not self._readers:
                self._opened = trio.Event()
                await self._opened.wait()
            now = trio.current_time()
            for reader, snapshot in self._idle():
                if now - reader.idle_since >= IDLE_TIME or reader.session.failure is not None:
                    self._drop(snapshot, reader)
            await trio.sleep(IDLE_TIME / 6)

    async def aclose(self) -> None:
        """Ends all sessions, and waits for that; no more are opened."""
        self._closed = True
        for session in self._placed:
            session.close()
        self._readers.clear()
        with trio.move_on_after(CLOSING_TIME):
            for session in list(self._placed):
                await session.ended.wait()

    def _body(self, answer: Response, meaning: Callable[[int, str], Meaning]) -> bytes:
        if answer.status != 200:
            words = words_of(answer.body, answer.status)
            raise error_of(meaning(answer.status, words), answer.status, words, self._api.repository)
        return answer.body

    async def _download(
        self, reader: _Reader, snapshot: Snapshot, archive: Archive, limit: int | None
    ) -> bytes:
        known = self._sums.get((snapshot, archive))
        again = limit is None
        if limit is None:
            limit = known[0] if known is not None else _MAX_INDEX
        try:
            body = self._body(
                await reader.session.get(f"/download?file-name={archive}", limit), meaning_of_file
            )
            found = len(body), await trio.to_thread.run_sync(_sum, body)
        except DamageError as error:
            if not again:
                raise
            # Of its chunks nothing is known, so this is not damage that could be shown as zeros.
            raise SourceError(
                f"{snapshot}/{archive}: the index that was opened can't be read any more: {error}"
            ) from None
        if again and known not in (None, found):
            raise _replaced(snapshot, archive)
        if known not in (None, found):
            self._retire(snapshot)
        self._sums[snapshot, archive] = found
        reader.indexes[archive] = found
        return body

    def _has_index(self, reader: _Reader, snapshot: Snapshot, archive: Archive) -> bool:
        """Whether the index as it was read last was downloaded in this session."""
        return reader.indexes.get(archive, ()) == self._sums.get((snapshot, archive))

    def _retire(self, snapshot: Snapshot) -> None:
        """Ends the sessions to `snapshot` when their requests are answered: their lock is that of a snapshot
        that was forgotten, and does not protect the one that was made in its place."""
        for reader in list(self._readers.get(snapshot, ())):
            reader.retiring = True
            if reader.users == 0:
                self._drop(snapshot, reader)

    @asynccontextmanager
    async def _reader(self, snapshot: Snapshot) -> AsyncIterator[_Reader]:
        """A session to `snapshot` to send a request on; one that fails under it is dropped."""
        reader = await self._choose(snapshot)
        try:
            yield reader
        finally:
            reader.users -= 1
            reader.idle_since = trio.current_time()
            if reader.session.failure is not None or (reader.retiring and reader.users == 0):
                self._drop(snapshot, reader)
            self._changed.set()

    async def _choose(self, snapshot: Snapshot) -> _Reader:
        """A session to `snapshot`, open or new; whoever asks is counted as its user."""
        least = self._least_used(snapshot)
        if least is None:
            opening = self._opening.setdefault(snapshot, SharedTry())
            try:
                least = await opening.run(lambda: self._least_used(snapshot), lambda: self._open(snapshot))
            finally:
                if opening.idle:
                    self._opening.pop(snapshot, None)
        elif least.users >= 2:
            self._open_more(snapshot, least)
        least.users += 1
        return least

    def _least_used(self, snapshot: Snapshot) -> _Reader | None:
        readers = self._readers.get(snapshot, [])
        usable = [r for r in readers if r.session.failure is None and not r.retiring]
        return min(usable, key=lambda reader: reader.users, default=None)

    def _open_more(self, snapshot: Snapshot, like: _Reader) -> None:
        """Has further connections opened beside `like`, where they would help: all at once, and nobody waits
        for them. They never take the place of another snapshot's."""
        coming = self._coming.get(snapshot, 0)
        missing = self._wanted(like.session.round_trip) - len(self._readers.get(snapshot, ())) - coming
        missing = min(missing, MAX_SESSIONS - len(self._placed) - sum(self._coming.values()))
        if missing <= 0 or self._nursery is None or trio.current_time() < self._no_more_before:
            return
        self._coming[snapshot] = coming + missing
        for _ in range(missing):
            self._nursery.start_soon(self._open_another, snapshot, frozenset(like.indexes))

    async def _open_another(self, snapshot: Snapshot, indexes: frozenset[Archive]) -> None:
        try:
            session = await self._open_session(snapshot)
            reader = _Reader(session)
            try:
                for archive in indexes:
                    await self._download(reader, snapshot, archive, None)
            except BaseException:
                session.close()
                raise
            self._keep(snapshot, reader)
        except PbsfsError as error:
            # Nobody needs it: there is one. But not at every request again.
            self._no_more_before = trio.current_time() + PAUSE
            log.debug("%s: no further session: %s", snapshot, error)
        except Exception:  # in the source's nursery it would end all reading
            self._no_more_before = trio.current_time() + PAUSE
            log.exception("%s: no further session, for a reason that was not foreseen", snapshot)
        finally:
            self._coming[snapshot] -= 1
            if not self._coming[snapshot]:
                del self._coming[snapshot]

    def _wanted(self, round_trip: float) -> int:
        if self._connections is not None:
            return self._connections
        if round_trip <= SHORT_ROUND_TRIP:
            return 1
        return min(MAX_CONNECTIONS, 1 + math.ceil(round_trip / ROUND_TRIP_PER_CONNECTION))

    async def _open(self, snapshot: Snapshot) -> _Reader:
        reader = _Reader(await self._open_session(snapshot))
        self._keep(snapshot, reader)
        return reader

    def _keep(self, snapshot: Snapshot, reader: _Reader) -> None:
        self._readers.setdefault(snapshot, []).append(reader)
        self._opened.set()

    async def _take_place(self, session: Session) -> None:
        """A place among `MAX_SESSIONS`: a free one, or that of another session, which ends for it."""
        async with self._queue:
            while len(self._placed) >= MAX_SESSIONS:
                self._changed = trio.Event()
                with trio.move_on_after(self._make_room()):
                    await self._changed.wait()
            self._placed.add(session)

    def _make_room(self) -> float:
        """Has a session end, if that has to be and one can; returns the seconds after which to ask again."""
        if any(session.ending for session in self._placed):
            return math.inf
        idle = self._idle()
        if idle:
            reader, snapshot = min(idle, key=lambda found: found[0].idle_since)
            self._drop(snapshot, reader)
            return math.inf
        busy = [reader for readers in self._readers.values() for reader in readers]
        if not busy or any(reader.retiring for reader in busy):
            return math.inf
        # All are in constant use. The one that was first ends as soon as its requests are answered.
        oldest = min(busy, key=lambda reader: reader.opened)
        left = oldest.opened + TURN - trio.current_time()
        if left <= 0:
            oldest.retiring = True
        return max(left, TURN / 10)

    def _end_place(self, session: Session) -> None:
        self._placed.discard(session)
        self._changed.set()

    def _idle(self) -> list[tuple[_Reader, Snapshot]]:
        return [
            (reader, snapshot)
            for snapshot, readers in self._readers.items()
            for reader in readers
            if reader.users == 0
        ]

    def _drop(self, snapshot: Snapshot, reader: _Reader) -> None:
        reader.session.close()
        readers = self._readers.get(snapshot, [])
        if reader in readers:
            readers.remove(reader)
        if not readers:
            self._readers.pop(snapshot, None)

    async def _open_session(self, snapshot: Snapshot) -> Session:
        for last_try in (False, True):
            headers = await self._api.login.headers()
            session = Session(
                self._api.repository,
                self._api.trust,
                self._api.proxy,
                snapshot_query(self._api.repository.store, snapshot),
                headers,
                stall_timeout=self._stall_timeout,
                answer_timeout=self._answer_timeout,
                pacing=self._limits.pacing,
                when_ended=self._end_place,
            )
            await self._take_place(session)
            try:
                with connecting(self._api.repository.address):
                    await session.open()
            except RefusedError as refused:
                error = self._refusal(snapshot, refused)
                if isinstance(error, AuthError) and not last_try and self._api.login.forget_ticket(headers):
                    continue
                raise error from None
            if self._closed:
                session.close()
                raise SourceError("reading ends: the source is being closed")
            log.debug("%s: session opened, round trip %.1f ms", snapshot, session.round_trip * 1000)
            return session
        raise AssertionError("unreachable")

    def _refusal(self, snapshot: Snapshot, refused: RefusedError) -> PbsfsError:
        words = words_of(refused.words.encode(), refused.status)
        meaning = meaning_of(refused.status, words)
        if meaning is Meaning.LOCKED:
            return UnavailableError(
                f"{snapshot} is locked on the server, by a backup, a removal or the like: {words}"
            )
        if meaning is Meaning.PASSING:
            return ConnectError(f"{snapshot}: the server can't open a session now: {words}")
        return error_of(meaning, refused.status, words, self._api.repository)


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


def _replaced(snapshot: Snapshot, archive: Archive) -> SourceError:
    return SourceError(
        f"{snapshot}/{archive}: the index on the server is not the one that was opened; "
        f"if the snapshot was made again, open the file again"
    )


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
