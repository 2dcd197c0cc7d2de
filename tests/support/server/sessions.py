"""Reader sessions and the locks they hold: what the real server's task log would show.

Changed by the server's loop only, except that tests lock snapshots; read from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pbsfs.base.names import Snapshot
from tests.support.server import texts
from tests.support.server.answers import RefusedError
from tests.support.server.clock import Clock
from tests.support.server.datastore import Datastore
from tests.support.server.releases import Release


@dataclass(eq=False)
class Session:
    """A session. `user`: who opened it; `opened`, `closed`: when, by the server's clock.

    `streams`: requests that run now; `peak`: the most that ever ran at once. `max_streams`: the most that are
    allowed; `refused`: how many were refused because of that. `when_limited`: called when that changes.
    `pings`: how many came.
    """

    user: str
    store: str
    snapshot: Snapshot
    opened: int
    closed: int | None = None
    digests: set[str] = field(default_factory=set, repr=False)
    streams: int = 0
    peak: int = 0
    max_streams: int | None = None
    max_header_list: int = 16 << 20
    refused: int = 0
    pings: int = 0
    when_limited: Callable[[], None] = field(default=lambda: None, repr=False)

    def begin(self) -> None:
        self.streams += 1
        self.peak = max(self.peak, self.streams)

    def end(self) -> None:
        self.streams -= 1


class Sessions:
    """All sessions since the server started, the newest last.

    `max_streams`: requests at once that sessions opened from now on allow; None to say nothing about it.
    """

    def __init__(self, clock: Clock, release: Release) -> None:
        self._clock = clock
        self._release = release
        self.max_streams: int | None = release.max_streams
        self._guard = threading.Lock()
        self._all: list[Session] = []
        self._shared: Counter[Snapshot] = Counter()
        self._exclusive: set[Snapshot] = set()

    def all(self) -> list[Session]:
        with self._guard:
            return list(self._all)

    def open(self) -> list[Session]:
        """Those that are open now."""
        return [session for session in self.all() if session.closed is None]

    def locks(self) -> dict[Snapshot, int]:
        """The snapshots that sessions hold a shared lock on, and how many do."""
        with self._guard:
            return {snapshot: count for snapshot, count in self._shared.items() if count}

    def lock(self, snapshot: Snapshot) -> None:
        """Locks a snapshot as a running backup or a delete does. Raises ValueError if it is in use."""
        with self._guard:
            if self._shared[snapshot] or snapshot in self._exclusive:
                raise ValueError(f"{snapshot} is locked already")
            self._exclusive.add(snapshot)

    def unlock(self, snapshot: Snapshot) -> None:
        with self._guard:
            self._exclusive.discard(snapshot)

    def begin(self, user: str, store: Datastore, snapshot: Snapshot) -> Session:
        """Opens a session, which takes a shared lock. Raises RefusedError if it can't have it."""
        with self._guard:
            if snapshot in self._exclusive:
                path = store.shown_path(store.snapshot_path(snapshot))
                older = f"unable to acquire lock on snapshot directory {path} - locked by another operation"
                raise RefusedError(400, texts.LOCKED[1] if self._release.newer else older)
            session = Session(user, store.name, snapshot, self._clock.now(), max_streams=self.max_streams)
            session.max_header_list = self._release.max_header_list
            self._shared[snapshot] += 1
            self._all.append(session)
            return session

    def finish(self, session: Session) -> None:
        with self._guard:
            session.closed = self._clock.now()
            self._shared[session.snapshot] -= 1
