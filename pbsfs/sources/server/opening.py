"""Opening a reader session: as which user, for which snapshot, and what a refusal means.

Used by `pool`, in tasks of one trio loop.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pbsfs.base.errors import AuthError, ConnectError, PbsfsError, UnavailableError
from pbsfs.base.names import Snapshot
from pbsfs.sources.retry import connecting
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.places import Places
from pbsfs.sources.server.refusals import Meaning, error_of, meaning_of, words_of
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.session import Session
from pbsfs.sources.server.upgrade import RefusedError

log = logging.getLogger(__name__)


class Opener:
    """Opens the sessions of one mount, each in a place of its own. Times are in seconds, as `Session`'s."""

    def __init__(
        self, api: Api, places: Places, limits: ServerLimits, *, stall_timeout: float, answer_timeout: float
    ) -> None:
        self._api = api
        self._places = places
        self._limits = limits
        self._stall_timeout = stall_timeout
        self._answer_timeout = answer_timeout

    async def open(self, snapshot: Snapshot) -> Session:
        """A new session to `snapshot`. Raises SourceError and its subclasses, and NotFoundError."""
        for last_try in (False, True):
            headers: Mapping[str, str] = {}

            async def authenticate() -> Mapping[str, str]:
                nonlocal headers
                headers = await self._api.login.headers()
                return headers

            session = Session(
                self._api.repository,
                self._api.trust,
                self._api.proxy,
                snapshot_query(self._api.repository.store, snapshot),
                stall_timeout=self._stall_timeout,
                answer_timeout=self._answer_timeout,
                limits=self._limits,
                when_ended=self._places.end,
            )
            await self._places.take(session)
            try:
                with connecting(self._api.repository.address):
                    await session.open(authenticate)
            except RefusedError as refused:
                error = _refusal(snapshot, refused, self._api.repository)
                if isinstance(error, AuthError) and not last_try and self._api.login.forget_ticket(headers):
                    continue
                raise error from None
            log.debug("%s: session opened, round trip %.1f ms", snapshot, session.round_trip * 1000)
            return session
        raise AssertionError("unreachable")


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


def _refusal(snapshot: Snapshot, refused: RefusedError, repository: Repository) -> PbsfsError:
    words = words_of(refused.words.encode(), refused.status)
    meaning = meaning_of(refused.status, words)
    if meaning is Meaning.LOCKED:
        return UnavailableError(
            f"{snapshot} is locked on the server, by a backup, a removal or the like: {words}"
        )
    if meaning is Meaning.PASSING:
        return ConnectError(f"{snapshot}: the server can't open a session now: {words}")
    return error_of(meaning, refused.status, words, repository)
