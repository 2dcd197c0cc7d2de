"""Retries: what may succeed later is tried again, with growing pauses, up to a limit.

Used by the server source, in tasks of the trio loop. Cancelling a task ends its pause at once.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, NamedTuple, TypeVar

import trio

from pbsfs.base.errors import ConnectError, PbsfsError, SourceError
from pbsfs.runtime.stats import COUNTS
from pbsfs.sources.pacing import DEFAULT_PACING, Pacing

log = logging.getLogger(__name__)

R = TypeVar("R")

SILENT_PARTS = 3
"""Parts of a try, each of which may be silent for `Pacing.least_try` seconds after the limit: connecting, the
answer with an index, that with a chunk. A try that ends still later was not silent."""


class _Limit(NamedTuple):
    """`deadline`: the time of the trio loop's clock at which the retries end."""

    deadline: float = math.inf
    least_try: float = DEFAULT_PACING.least_try


_NO_LIMIT = _Limit()

_limit: ContextVar[_Limit] = ContextVar("limit", default=_NO_LIMIT)
"""The limit of the work that this task retries."""


def patience_ends() -> float:
    """The time of `time.monotonic()` from which a try that begins now may not be silent any more.

    That is when the limit ends, and at least `Pacing.least_try` seconds from now; without a limit, infinity.
    """
    limit = _limit.get()
    return time.monotonic() + max(limit.least_try, limit.deadline - trio.current_time())


@contextmanager
def connecting(address: str) -> Iterator[None]:
    """The part of a try that makes a connection: it ends with the limit, with ConnectError."""
    started = trio.current_time()
    limit = _limit.get()
    until = max(limit.deadline, started + limit.least_try)
    with trio.move_on_at(until) as scope:
        yield
    if scope.cancelled_caught:
        raise ConnectError(f"{address}: no connection within {until - started:.0f} s")


class SharedTry(Generic[R]):
    """One try for many tasks: one task fetches what all need, the others wait and share its failure.

    Otherwise each waiting task would begin a try of its own after the previous one failed, and with an
    unreachable server the last task would wait as long as all tries together.
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
    """The outage of one server: pbsfs reports it once, however much it retries at that time."""

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
    pacing: Pacing = DEFAULT_PACING,
) -> R:
    """The result of `work`, tried again for `limit` seconds while it raises a retryable SourceError.

    After that, raises the last error. The limit begins once more where a try ends long after it: an
    answer that made progress was lost, or this process was stopped meanwhile. `what`: names the work in the
    log. `outage`: shared with other work on the same server. `of`: the errors to retry. `log`: receives the
    reports.
    """
    before = _limit.set(_Limit(trio.current_time() + limit, pacing.least_try))
    try:
        return await _tried(work, limit, what, outage or Outage(), of, log, pacing)
    finally:
        _limit.reset(before)


async def _tried(
    work: Callable[[], Awaitable[R]],
    limit: float,
    what: str,
    outage: Outage,
    of: type[SourceError],
    log: logging.Logger,
    pacing: Pacing,
) -> R:
    pause = pacing.first_pause
    tries = 1
    begun_anew = False
    while True:
        try:
            result = await work()
        except of as error:
            left = _limit.get().deadline - trio.current_time()
            if limit and left < -SILENT_PARTS * pacing.least_try and not begun_anew:
                begun_anew, left = True, limit
                _limit.set(_Limit(trio.current_time() + limit, pacing.least_try))
            if not error.retryable or left <= 0:
                raise
            # A warning once, and only if the second try fails too: most faults end before that.
            warn = tries == 2 and not outage.known
            outage.known = outage.known or warn
            COUNTS.outages += warn
            COUNTS.retries += 1
            log.log(
                logging.WARNING if warn else logging.DEBUG,
                "%s: %s; trying again",
                what,
                error,
                extra={"tries": tries},
            )
            await trio.sleep(min(pause, left))
            pause = min(2 * pause, pacing.longest_pause)
            tries += 1
        else:
            if outage.known:
                outage.known = False
                log.warning("%s: available again", what)
            return result
