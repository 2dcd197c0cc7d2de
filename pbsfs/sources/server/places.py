"""The bound on sessions: each has a place from before it is opened until its connection is closed.

If all places are taken, an idle session ends for a new one; if none is idle, the oldest one does after its
turn. Used by `pool`, in tasks of one trio loop.
"""

from __future__ import annotations

import math

import trio

from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.readers import Readers
from pbsfs.sources.server.session import Session


class Places:
    """The places of the sessions of one mount, `ServerLimits.max_sessions` in all."""

    def __init__(self, readers: Readers, limits: ServerLimits) -> None:
        self._readers = readers
        self._limits = limits
        self._taken: set[Session] = set()
        self._queue = trio.Lock()  # first come, first served
        self._changed = trio.Event()

    @property
    def free(self) -> int:
        """How many sessions could be opened now without ending another."""
        return self._limits.max_sessions - len(self._taken)

    async def take(self, session: Session) -> None:
        """Gives `session` a place: a free one, or that of another session, which ends for it."""
        async with self._queue:
            while self.free <= 0:
                self._changed = trio.Event()
                with trio.move_on_after(self._make_room()):
                    await self._changed.wait()
            self._taken.add(session)

    def end(self, session: Session) -> None:
        """The connection of `session` is closed."""
        self._taken.discard(session)
        self.look_again()

    def look_again(self) -> None:
        """A session may end now that could not before: it has fewer users."""
        self._changed.set()

    async def close(self) -> None:
        """Closes all sessions that have a place; returns when they have ended, or after `closing_time`."""
        for session in self._taken:
            session.close()
        with trio.move_on_after(self._limits.closing_time):
            for session in list(self._taken):
                await session.ended.wait()

    def _make_room(self) -> float:
        """Ends a session if that is required and possible; returns the seconds after which to look again."""
        if any(session.ending for session in self._taken):
            return math.inf
        idle = self._readers.idle()
        if idle:
            reader, snapshot = min(idle, key=lambda found: found[0].idle_since)
            self._readers.drop(snapshot, reader)
            return math.inf
        busy = self._readers.all()
        if not busy or any(reader.retiring for reader in busy):
            return math.inf
        # All are in constant use. The one opened first ends as soon as its requests are answered.
        oldest = min(busy, key=lambda reader: reader.opened)
        left = oldest.opened + self._limits.turn - trio.current_time()
        if left <= 0:
            oldest.retiring = True
        return max(left, self._limits.turn / 10)
