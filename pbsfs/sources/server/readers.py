"""The reader sessions that are open, by snapshot: which one serves a request, and which ones may end.

Used by `pool` and `places`, in tasks of one trio loop. Nothing here waits.
"""

from __future__ import annotations

import trio

from pbsfs.base.names import Archive, Snapshot
from pbsfs.sources.server.session import Session


class Reader:
    """A session and the indexes downloaded in it: the server sends only chunks that these indexes name.

    `indexes`: length and checksum of each. `users`: how many requests use it now. `retiring`: it takes no new
    users, because another snapshot waits for its place, or because its own snapshot was made again after it
    was opened. `opened`, `idle_since`: times of the trio loop's clock.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.indexes: dict[Archive, tuple[int, bytes]] = {}
        self.downloading: dict[Archive, trio.Lock] = {}
        self.users = 0
        self.retiring = False
        self.opened = self.idle_since = trio.current_time()


class Readers:
    """All open sessions of one mount."""

    def __init__(self) -> None:
        self._readers: dict[Snapshot, list[Reader]] = {}
        self._added = trio.Event()

    def __len__(self) -> int:
        return sum(len(readers) for readers in self._readers.values())

    def count(self, snapshot: Snapshot) -> int:
        """How many sessions to `snapshot` are open."""
        return len(self._readers.get(snapshot, ()))

    def add(self, snapshot: Snapshot, reader: Reader) -> None:
        """Takes an open session."""
        self._readers.setdefault(snapshot, []).append(reader)
        self._added.set()

    async def wait_for_one(self) -> None:
        """Waits until a session is open."""
        if not self._readers:
            self._added = trio.Event()
            await self._added.wait()

    def least_used(self, snapshot: Snapshot) -> Reader | None:
        """The session to `snapshot` that has the fewest users; None if none takes another user."""
        usable = [
            reader
            for reader in self._readers.get(snapshot, ())
            if reader.session.failure is None and not reader.retiring
        ]
        return min(usable, key=lambda reader: reader.users, default=None)

    def idle(self) -> list[tuple[Reader, Snapshot]]:
        """The sessions without users."""
        return [
            (reader, snapshot)
            for snapshot, readers in self._readers.items()
            for reader in readers
            if reader.users == 0
        ]

    def all(self) -> list[Reader]:
        """All sessions, to any snapshot."""
        return [reader for readers in self._readers.values() for reader in readers]

    def drop(self, snapshot: Snapshot, reader: Reader) -> None:
        """Closes a session; it serves no further request."""
        reader.session.close()
        readers = self._readers.get(snapshot, [])
        if reader in readers:
            readers.remove(reader)
        if not readers:
            self._readers.pop(snapshot, None)

    def retire(self, snapshot: Snapshot) -> None:
        """Ends the sessions to `snapshot` once their requests are answered.

        Called when the snapshot was made again: their lock is on the removed one, and does not protect the
        new one.
        """
        for reader in list(self._readers.get(snapshot, ())):
            reader.retiring = True
            if reader.users == 0:
                self.drop(snapshot, reader)

    def clear(self) -> None:
        """Forgets all sessions, without closing them."""
        self._readers.clear()
