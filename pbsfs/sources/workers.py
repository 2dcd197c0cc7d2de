"""Threads for file operations, which pbsfs gives up on when the storage does not answer in time.

Nothing ends a file operation that is stuck, as on a network file system whose server is unreachable. So
pbsfs abandons the thread: the reader gets an error, and the mount keeps working. Other files may still be
readable, on another disk or on the same, so pbsfs tries them. Used from tasks of one trio loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import trio

from pbsfs.base.errors import SourceError
from pbsfs.runtime.threads import Threads

LATE = 1.0
"""Seconds after the end of a limit from which it says nothing: this process was stopped meanwhile (Ctrl-Z, a
container that is paused), and the storage may have answered."""

_ADVICE = "look at the kernel's log for its disk or network"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Times are in seconds."""

    io_timeout: float = 60.0
    """How long one file operation may take. A sick disk answers within its own retries (tens of seconds); a
    network file system whose server is unreachable never does."""

    stuck_timeout: float = 2.0
    """How long a file operation may take while another one is stuck for longer than `io_timeout`."""

    stuck_pause: float = 10.0
    """How long all operations fail at once after one took longer than `stuck_timeout`: a listing of many
    files must not wait for each."""

    threads: int = 32
    """Threads in file operations at once. Most of them wait for the disk. They are apart from trio's own
    threads, on which decoding depends: stuck operations would use those up."""


class _Operation(Generic[T]):
    """Blocking `work` for a thread. `is_running`: whether a thread is in it; only that thread changes it."""

    __slots__ = ("_work", "is_running")

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.is_running = False

    def __call__(self) -> T:
        self.is_running = True
        try:
            return self._work()
        finally:
            self.is_running = False


class Workers:
    """The threads that work on the storage `name`."""

    def __init__(self, name: str, limits: WorkerLimits) -> None:
        self._name = name
        self._limits = limits
        self._threads = Threads(limits.threads)
        self._abandoned: list[_Operation[Any]] = []
        self._try_at = float("-inf")  # trio's time before which all operations fail while some are stuck

    def stuck(self) -> int:
        """How many abandoned operations still occupy a thread."""
        self._abandoned = [operation for operation in self._abandoned if operation.is_running]
        return len(self._abandoned)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs blocking `work` in a thread and returns its result.

        Raises what `work` raises, and a retryable SourceError if the storage does not answer in time. Then a
        thread may still be in `work`; after a stop of this process, two may be at once.
        """
        limits, stuck = self._limits, self.stuck()
        if stuck and trio.current_time() < self._try_at:
            raise SourceError(
                f"no answer from {self._name}: earlier reads of it are stuck; {_ADVICE}", retryable=True
            )
        limit = limits.stuck_timeout if stuck else limits.io_timeout
        operation, until = _Operation(work), trio.current_time() + limit
        with trio.move_on_at(until):
            result = await self._threads.run(operation)
            self._try_at = float("-inf")
            return result
        if trio.current_time() > until + LATE:
            return await self.run(work)
        if operation.is_running:
            self._abandoned.append(operation)
        self._try_at = trio.current_time() + limits.stuck_pause
        raise SourceError(f"no answer from {self._name} within {limit:.0f} s; {_ADVICE}", retryable=True)
