"""Questions that are asked before somebody needs the answers, so that their round trips pass side by side.

Used by `source`, in tasks of one trio loop.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar, cast

import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.base.names import Archive, Group, Namespace, Snapshot
from pbsfs.sources.base import Expected
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import ServerLimits
from pbsfs.sources.server.pool import SessionPool

log = logging.getLogger(__name__)

R = TypeVar("R")


class FetchFile(Protocol):
    """Fetches a file of a snapshot, of at most `limit` bytes. `session`: whether there is one in any case."""

    def __call__(
        self, snapshot: Snapshot, archive: Archive, *, limit: int, session: bool
    ) -> Awaitable[bytes]: ...


class _Question:
    def __init__(self, ask: Callable[[], Awaitable[object]]) -> None:
        self.ask = ask
        self.ended = trio.Event()  # there is an answer, or will be none
        self.when = -math.inf  # the answer came, by the loop's clock
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
        self._questions: dict[Hashable, _Question] = {}
        self._nursery: trio.Nursery | None = None
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
        self._nursery = nursery
        once_accepted = [self._question(ns, functools.partial(groups, ns)) for ns in expected.namespaces]
        if expected.group is not None:
            ask_group = functools.partial(snapshots, expected.group)
            once_accepted.append(self._question(expected.group, ask_group))
        if expected.snapshot is not None:
            fetch = functools.partial(
                file, expected.snapshot, limit=self._limits.max_ahead, session=expected.sessions
            )
            files = [
                self._question((expected.snapshot, archive), functools.partial(fetch, archive))
                for archive in expected.files
            ]
            if expected.sessions:
                open_session = functools.partial(self._pool.open, expected.snapshot)
                nursery.start_soon(self._ask_after, open_session, files)
            else:
                once_accepted += files
        nursery.start_soon(self._ask_after, self.accepted.wait, once_accepted)
        for _ in once_accepted[1:]:  # the first has the connection that opens the source
            nursery.start_soon(self._ask_after, self._api.connect, ())

    def prepare(self, snapshot: Snapshot) -> None:
        """Opens a session to `snapshot` in the background, if there is none and there is a place for it."""
        if self._nursery is not None and self._pool.could_open(snapshot):
            self._nursery.start_soon(self._ask_after, functools.partial(self._pool.open, snapshot), ())

    async def answer(self, question: Hashable, work: Callable[[], Awaitable[R]]) -> R:
        """The answer that was asked for ahead, and otherwise that of `work`. Raises what `work` raises."""
        asked = self._questions.pop(question, None)
        if asked is not None:
            await asked.ended.wait()
            if trio.current_time() - asked.when < self._limits.ahead_kept:
                if asked.failure is not None:
                    raise asked.failure
                return cast("R", asked.answer)
        return await work()

    def _question(self, question: Hashable, ask: Callable[[], Awaitable[object]]) -> _Question:
        return self._questions.setdefault(question, _Question(ask))

    async def _ask_after(
        self, ready: Callable[[], Awaitable[object]], questions: Sequence[_Question]
    ) -> None:
        """Asks `questions` side by side after `ready`; leaves them to those who need them if that fails."""
        try:
            await ready()
            async with trio.open_nursery() as nursery:
                for question in questions:
                    nursery.start_soon(self._ask, question)
        except PbsfsError as error:  # the one who needs it asks again
            log.debug("%s: not asked ahead: %s", self._api.repository, error)
        except Exception:  # in the source's nursery it would end all reading
            log.exception("%s: not asked ahead, unexpected error", self._api.repository)
        finally:
            for question in questions:
                question.ended.set()

    async def _ask(self, question: _Question) -> None:
        try:
            question.answer = await question.ask()
        except PbsfsError as error:
            log.debug("%s: asked ahead: %s", self._api.repository, error)
            question.failure = error.with_traceback(None)
        question.when = trio.current_time()
        question.ended.set()
