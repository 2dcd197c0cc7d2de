"""The pool of reader sessions: opened when something is read, shared, bounded, closed when idle.

A session belongs to one snapshot and is a task and a lock on the server, so there are as few as the reading
needs: one for a snapshot, more only if the round trip is long and a single connection could not fill the
link; all together at most `ServerLimits.max_sessions`. Used by `source`, in tasks of one trio loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import Archive, Snapshot
from pbsfs.formats.blob import Stored
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.retry import SharedTry
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.opening import Opener
from pbsfs.sources.server.places import Places
from pbsfs.sources.server.protocol import Response
from pbsfs.sources.server.readers import Reader, Readers
from pbsfs.sources.server.refusals import Meaning, error_of, meaning_of_chunk, meaning_of_file, words_of
from pbsfs.sources.server.session import Session

log = logging.getLogger(__name__)

_MAX_INDEX = (1 << 30) + 4096


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
        """`connections`: how many to one snapshot; None to choose by the round trip."""
        self._api = api
        self._connections = connections
        self._limits = limits
        self._readers = Readers()
        self._places = Places(self._readers, limits)
        self._opener = Opener(
            api, self._places, limits, stall_timeout=stall_timeout, answer_timeout=answer_timeout
        )
        self._opening: dict[Snapshot, SharedTry[Reader]] = {}
        self._nursery: trio.Nursery | None = None
        self._coming: dict[Snapshot, int] = {}  # further sessions that are being opened
        self._no_more_before = -math.inf  # the time of the loop's clock at which they are tried again
        self._closed = False
        # Length and checksum of each index as it was read: another index must not replace it unnoticed.
        self._sums: dict[tuple[Snapshot, Archive], tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return len(self._readers)

    async def index(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        """The stored bytes of an index. Raises like `chunk`, and NotFoundError."""
        async with self._reader(snapshot) as reader:
            return await self._download(reader, snapshot, archive, limit)

    async def chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> Stored:
        """The stored bytes of a chunk of `archive`. Raises SourceError, its subclasses, and DamageError."""
        async with self._reader(snapshot) as reader:
            if not self._has_index(reader, snapshot, archive):
                async with reader.downloading.setdefault(archive, trio.Lock()):
                    if not self._has_index(reader, snapshot, archive):
                        await self._download(reader, snapshot, archive, None)
            answer = await reader.session.get(f"/chunk?digest={digest.hex()}", limit)
            if answer.status == 401:  # not for the user, whom the server checks when a session is opened
                raise _replaced(snapshot, archive)
            return self._body(answer, meaning_of_chunk)

    def could_open(self, snapshot: Snapshot) -> bool:
        """Whether `open` would open a session, and no other one had to end for it."""
        is_there = snapshot in self._opening or self._readers.least_used(snapshot) is not None
        return not is_there and self._places.free > 0

    async def open(self, snapshot: Snapshot) -> None:
        """Opens a session to `snapshot`, if there is none. Raises SourceError, and NotFoundError."""
        async with self._reader(snapshot):
            pass

    def start(self, nursery: trio.Nursery) -> None:
        """Starts the background work of the pool. Call once, before the first request."""
        self._nursery = nursery
        nursery.start_soon(self._tidy)

    async def _tidy(self) -> None:
        """Closes sessions that are idle for too long."""
        while True:
            await self._readers.wait_for_one()
            now = trio.current_time()
            for reader, snapshot in self._readers.idle():
                if now - reader.idle_since >= self._limits.idle_time or reader.session.failure is not None:
                    self._readers.drop(snapshot, reader)
            await trio.sleep(self._limits.idle_time / 6)

    async def aclose(self) -> None:
        """Ends all sessions, and waits for that; the pool opens no more."""
        self._closed = True
        self._readers.clear()
        await self._places.close()

    def _body(self, answer: Response, meaning: Callable[[int, str], Meaning]) -> Stored:
        if answer.status != 200:
            words = words_of(bytes(answer.body), answer.status)
            raise error_of(meaning(answer.status, words), answer.status, words, self._api.repository)
        return answer.body

    async def _download(
        self, reader: Reader, snapshot: Snapshot, archive: Archive, limit: int | None
    ) -> bytes:
        known = self._sums.get((snapshot, archive))
        again = limit is None
        if limit is None:
            limit = known[0] if known is not None else _MAX_INDEX
        try:
            answer = await reader.session.get(f"/download?file-name={archive}", limit)
            body = bytes(self._body(answer, meaning_of_file))  # an index of several frames is bytes already
            found = len(body), await in_thread(_sum, body)
        except DamageError as error:
            if not again:
                raise
            # Nothing is known of the chunks, so this is not damage that could be shown as zeros.
            raise SourceError(
                f"{snapshot}/{archive}: the index that was opened can't be read any more: {error}"
            ) from None
        if again and known not in (None, found):
            raise _replaced(snapshot, archive)
        if known not in (None, found):
            self._readers.retire(snapshot)
        self._sums[snapshot, archive] = found
        reader.indexes[archive] = found
        return body

    def _has_index(self, reader: Reader, snapshot: Snapshot, archive: Archive) -> bool:
        """Whether the index as it was read last was downloaded in this session."""
        return reader.indexes.get(archive, ()) == self._sums.get((snapshot, archive))

    @asynccontextmanager
    async def _reader(self, snapshot: Snapshot) -> AsyncIterator[Reader]:
        """A session to `snapshot` for one request; drops the session if it fails meanwhile."""
        reader = await self._choose(snapshot)
        try:
            yield reader
        finally:
            reader.users -= 1
            reader.idle_since = trio.current_time()
            if reader.session.failure is not None or (reader.retiring and reader.users == 0):
                self._readers.drop(snapshot, reader)
            self._places.look_again()

    async def _choose(self, snapshot: Snapshot) -> Reader:
        """A session to `snapshot`, open or new; counts the caller as its user."""
        least = self._readers.least_used(snapshot)
        if least is None:
            opening = self._opening.setdefault(snapshot, SharedTry())
            try:
                least = await opening.run(
                    lambda: self._readers.least_used(snapshot), lambda: self._open(snapshot)
                )
            finally:
                if opening.idle:
                    self._opening.pop(snapshot, None)
        elif least.users >= 2:
            self._open_more(snapshot, least)
        least.users += 1
        return least

    def _open_more(self, snapshot: Snapshot, like: Reader) -> None:
        """Opens further connections beside `like` if they would help: all at once, in the background.

        They never take the place of another snapshot's session.
        """
        coming = self._coming.get(snapshot, 0)
        missing = self._wanted(like.session.round_trip) - self._readers.count(snapshot) - coming
        missing = min(missing, self._places.free - sum(self._coming.values()))
        if missing <= 0 or self._nursery is None or trio.current_time() < self._no_more_before:
            return
        self._coming[snapshot] = coming + missing
        for _ in range(missing):
            self._nursery.start_soon(self._open_another, snapshot, frozenset(like.indexes))

    async def _open_another(self, snapshot: Snapshot, indexes: frozenset[Archive]) -> None:
        try:
            session = await self._open_session(snapshot)
            reader = Reader(session)
            try:
                for archive in indexes:
                    await self._download(reader, snapshot, archive, None)
            except BaseException:
                session.close()
                raise
            self._readers.add(snapshot, reader)
        except PbsfsError as error:
            # One session is enough to read. The pause keeps pbsfs from trying again at every request.
            self._no_more_before = trio.current_time() + self._limits.further_pause
            log.debug("%s: no further session: %s", snapshot, error)
        except Exception:  # in the source's nursery it would end all reading
            self._no_more_before = trio.current_time() + self._limits.further_pause
            log.exception("%s: no further session, unexpected error", snapshot)
        finally:
            self._coming[snapshot] -= 1
            if not self._coming[snapshot]:
                del self._coming[snapshot]

    def _wanted(self, round_trip: float) -> int:
        if self._connections is not None:
            return self._connections
        if round_trip <= self._limits.short_round_trip:
            return 1
        further = math.ceil(round_trip / self._limits.round_trip_per_connection)
        return min(self._limits.max_connections, 1 + further)

    async def _open(self, snapshot: Snapshot) -> Reader:
        reader = Reader(await self._open_session(snapshot))
        self._readers.add(snapshot, reader)
        return reader

    async def _open_session(self, snapshot: Snapshot) -> Session:
        session = await self._opener.open(snapshot)
        if self._closed:
            session.close()
            raise SourceError("request cancelled: the source is being closed")
        return session


def _replaced(snapshot: Snapshot, archive: Archive) -> SourceError:
    return SourceError(
        f"{snapshot}/{archive}: the index on the server is not the one that was opened; "
        f"if the snapshot was made again, open the file again"
    )


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
