"""Questions that are asked before somebody needs the answers, so that their round trips pass side by side.

Used by `source`, in tasks of one trio loop.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Protocol, TypeVar, cast

import trio

from pbsfs.base.errors import PbsfsError, SourceError
from pbsfs.base.names import Archive, Group, Namespace, Snapshot
from pbsfs.sources.base import Expected
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.pool import SessionPool

log = logging.getLogger(__name__)

R = TypeVar("R")


class FetchFile(Protocol):
    """Fetches a file of a snapshot, of at most `limit` bytes; by a session if there is one."""

    def __call__(
        self, snapshot: Snapshot, archive: Archive, limit: int, *, session: bool
    ) -> Awaitable[bytes]: ...


class _Asked:
    def __init__(self) -> None:
        self.answered = trio.Event()
        self.when = 0.0  # by the loop's clock
        self.answer: Any = None
        self.failure: PbsfsError | None = None


class Ahead:
    """What was asked ahead. Each answer, or failure, is for the first who asks the same.

    `accepted`: to be set when the server has answered this user. Until then, only one session asks beside the
    opening of the source: each request with a wrong secret is one in the server's log, after some of which an
    administrator may have it lock this computer out.
    """

    def __init__(self, api: Api, pool: SessionPool, limits: ServerLimits) -> None:
        self._api = api
        self._pool = pool
        self._limits = limits
        self._asked: dict[Hashable, _Asked] = {}
        self._has_session = False
        self.accepted = trio.Event()

    def start(
        self,
        nursery: trio.Nursery,
        expected: Expected,
        *,
        groups: Callable[[Namespace], Awaitable[object]],
        snapshots: Callable[[Group], Awaitable[object]],
        file: FetchFile,
    ) -> None:
        """Asks for all that is expected, by these functions. The questions are the namespaces, the group, and
        pairs of the snapshot and an archive."""

        def ask(question: Hashable, work: Callable[[], Awaitable[object]], after: trio.Event) -> None:
            asked = self._asked[question] = _Asked()
            nursery.start_soon(self._ask, question, asked, work, after)

        for namespace in expected.namespaces:
            ask(namespace, functools.partial(groups, namespace), self.accepted)
        if expected.group is not None:
            ask(expected.group, functools.partial(snapshots, expected.group), self.accepted)
        connections = len(self._asked)
        if expected.snapshot is not None:
            prepared = self.accepted
            if expected.sessions:
                prepared = trio.Event()
                nursery.start_soon(self._prepare, expected.snapshot, prepared)
            else:
                connections += len(expected.files)
            for archive in expected.files:
                fetch = functools.partial(self._fetch, file, expected.snapshot, archive)
                ask((expected.snapshot, archive), fetch, prepared)
        for _ in range(connections - 1):  # one is that which opens the source
            nursery.start_soon(self._connect)

    async def answer(self, question: Hashable, work: Callable[[], Awaitable[R]]) -> R:
        """The answer that was asked for ahead, and otherwise that of `work`. Raises what `work` raises."""
        asked = self._asked.pop(question, None)
        if asked is not None:
            await asked.answered.wait()
            if trio.current_time() - asked.when < self._limits.ahead_kept:
                if asked.failure is not None:
                    raise asked.failure
                return cast("R", asked.answer)
        return await work()

    async def _ask(
        self, question: Hashable, asked: _Asked, work: Callable[[], Awaitable[object]], after: trio.Event
    ) -> None:
        asked.failure = SourceError("request cancelled: the source is being closed")
        try:
            await after.wait()
            asked.answer = await work()
            asked.failure = None
        except PbsfsError as error:
            log.debug("%s: asked ahead: %s", question, error)
            asked.failure = error.with_traceback(None)
        except Exception as error:  # in the source's nursery it would end all reading
            log.exception("%s: asked ahead, unexpected error", question)
            asked.failure = SourceError(f"{type(error).__name__}: {error}")
        finally:
            asked.when = trio.current_time()
            asked.answered.set()

    async def _fetch(self, file: FetchFile, snapshot: Snapshot, archive: Archive) -> bytes:
        return await file(snapshot, archive, self._limits.max_ahead, session=self._has_session)

    async def _prepare(self, snapshot: Snapshot, prepared: trio.Event) -> None:
        try:
            await self._pool.prepare(snapshot)
            self._has_session = True
        except PbsfsError as error:  # whoever reads the snapshot gets it
            log.debug("%s: no session ahead: %s", snapshot, error)
            await self.accepted.wait()
        prepared.set()

    async def _connect(self) -> None:
        try:
            await self._api.connect()
        except PbsfsError as error:  # the next request gets it
            log.debug("%s: no connection ahead: %s", self._api.repository, error)
