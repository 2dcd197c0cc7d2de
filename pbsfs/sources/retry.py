"""Trying again: what may succeed later is asked again, with growing pauses, up to a limit.

Used by the server source, in the trio loop: a pause ends at once when the reader gives up, or the mount
is ended.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import trio

from pbsfs.base.errors import ConnectError, PbsfsError, SourceError

log = logging.getLogger(__name__)

R = TypeVar("R")

DEFAULT_LIMIT = 120.0
"""Seconds for which a read survives a server that is away: a restart or an update takes less."""

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 10.0
"""Seconds between tries: soon at first, for a connection that was only dropped; then so that a server that
starts again is found soon and not flooded."""


LEAST_TRY = 5.0
"""Seconds that a try has for its connection, also where the limit ends earlier: the last one begins then."""

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)
"""When the limit of the work that is tried again ends, by the clock of the trio loop."""


@contextmanager
def connecting(address: str) -> Iterator[None]:
    """The part of a try that makes a connection: it ends with the limit, with ConnectError.

    The limit is for a server that can't be reached. The answer of one that can may take longer.
    """
    started = trio.current_time()
    until = max(_deadline.get(), started + LEAST_TRY)
    with trio.move_on_at(until) as scope:
        yield
    if scope.cancelled_caught:
        raise ConnectError(f"{address}: no connection within {until - started:.0f} s")


class SharedTry(Generic[R]):
    """What many tasks need and one of them fetches: the others wait for it, and share its failure.

    Otherwise each task that waits would begin its own try after the one before it had failed, and with an
    unreachable server the last would wait for the time limits of all.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._failures = 0
        self._failure: PbsfsError | None = None

    @property
    def idle(self) -> bool:
        """Whether no task tries, or waits for one that does."""
        return not self._lock.locked()

    async def run(self, known: Callable[[], R | None], work: Callable[[], Awaitable[R]]) -> R:
        """What `known` returns, or if that is None, the result of `work`.

        Raises what `work` raises, and the PbsfsError of another task's try that failed meanwhile.
        """
        failures = self._failures
        async with self._lock:
            found = known()
            if found is not None:
                return found
            if self._failure is not None and self._failures != failures:
                raise copy.copy(self._failure)  # a copy: the traceback of one task holds its frames
            try:
                found = await work()
            except PbsfsError as error:
                self._failures += 1
                self._failure = copy.copy(error)
                raise
            self._failure = None
            return found


class Outage:
    """What all that is tried again at one time has in common: it is told of once, and not by each."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known = False


async def retried(
    work: Callable[[], Awaitable[R]],
    limit: float,
    what: str,
    outage: Outage | None = None,
    *,
    of: type[SourceError] = SourceError,
    log: logging.Logger = log,
) -> R:
    """The result of `work`, tried again for `limit` seconds while it raises a retryable SourceError.

    Then that error is raised. `what`: names the work in the log. `outage`: shared with other work on the
    same server. `of`: the errors that are waited for. `log`: where it is reported.
    """
    outage = outage or Outage()
    deadline = trio.current_time() + limit
    before = _deadline.set(deadline)
    try:
        return await _tried(work, deadline, what, outage, of, log)
    finally:
        _deadline.reset(before)


async def _tried(
    work: Callable[[], Awaitable[R]],
    deadline: float,
    what: str,
    outage: Outage,
    of: type[SourceError],
    log: logging.Logger,
) -> R:
    pause = FIRST_PAUSE
    tries = 1
    while True:
        try:
            result = await work()
        except of as error:
            left = deadline - trio.current_time()
            if not error.retryable or left <= 0:
                raise
            # Aloud once, and from the second try on: what is cured by the first is of no interest.
            aloud = tries == 2 and not outage.known
            outage.known = outage.known or aloud
            log.log(logging.WARNING if aloud else logging.DEBUG, "%s: %s; trying again", what, error)
            await trio.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
            tries += 1
        else:
            if outage.known:
                outage.known = False
                log.warning("%s: goes on", what)
            return result
