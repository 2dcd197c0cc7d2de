"""Threads: every thread of pbsfs starts here, where a lack of them becomes an error of pbsfs.

`Threads` are for much work that blocks or computes: one queue before them and one behind them.
`trio.to_thread` takes a turn of the loop for each piece of work, in which the thread waits for its next one.
Here a thread takes the next piece itself, and several results wake the loop up once. Where more wait than
threads come, a thread may take two pieces, which take less time together than one by one. The chunk store
decodes in such threads, and the directory source reads in others, in tasks of one trio loop. The threads are
trio's own, and go back there when nothing is left to do. `in_thread` is for single pieces of work.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar, TypeVarTuple, Unpack

import trio

from pbsfs.base.errors import ALLOW_TASKS, SourceError

T = TypeVar("T")
A = TypeVarTuple("A")

Together = Callable[[Any, Any], tuple[Any, Any]]
"""Does two pieces of work at once. None for one that it can't do: that one is done alone."""


_NO_THREAD = "can't start new thread"  # CPython's words, whatever limit was met


def no_task(problem: str) -> SourceError:
    """The error where the system has no further thread or process, as `problem` says. It may pass."""
    return SourceError(f"{problem}; {ALLOW_TASKS}", retryable=True)


def start(thread: threading.Thread) -> None:
    """Starts `thread`. Raises SourceError where the system has none."""
    try:
        thread.start()
    except RuntimeError as error:
        raise no_task(str(error)) from None


async def in_thread(
    work: Callable[[Unpack[A]], T],
    *arguments: *A,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """As `trio.to_thread.run_sync`, but raises SourceError where the system has no thread."""
    try:
        return await trio.to_thread.run_sync(
            work, *arguments, limiter=limiter, abandon_on_cancel=abandon_on_cancel
        )
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        raise no_task(str(error)) from None


class _Job(Generic[T]):
    """`work` for a thread. `task`: waits for its result; None if it does not any more."""

    __slots__ = ("_error", "_result", "task", "work")

    def __init__(self, work: Callable[[], T], task: trio.lowlevel.Task) -> None:
        self.work = work
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.task: trio.lowlevel.Task | None = task

    def run(self) -> None:
        try:
            self._result.append(self.work())
        except BaseException as error:
            self._error = error

    def end(self, result: T) -> None:
        """The work was done elsewhere."""
        self._result.append(result)

    def result(self) -> T:
        """Raises what `work` has raised."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its frames refer to this job: a cycle
        return self._result.pop()


class Threads:
    """At most `count` threads, which do the work in the order in which it came."""

    def __init__(self, count: int, together: Together | None = None) -> None:
        """`together`: called with two of what `run` gets, where two wait that no other thread comes for."""
        self._count = count
        self._together = together
        self._token: trio.lowlevel.TrioToken | None = None
        self._lock = threading.Lock()  # guards these three
        self._threads = 0
        self._coming = 0  # those of them that have not taken any work yet: at most one
        self._waiting: deque[_Job[Any]] = deque()
        self._done: deque[_Job[Any]] = deque()
        self._is_told = False  # whether the loop will call `_deliver`

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, which blocks or computes. Raises what it raises, and SourceError where the
        system has no thread for it.

        A cancelled task does not wait: work that has not begun is left out, and the rest goes on for nobody.
        """
        self._token = trio.lowlevel.current_trio_token()
        job = _Job(work, trio.lowlevel.current_task())
        self._submit(job)

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            job.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return job.result()

    def _submit(self, job: _Job[Any]) -> None:
        with self._lock:
            self._waiting.append(job)
            if not self._calls_another():
                return
        try:
            trio.lowlevel.start_thread_soon(self._work, _drop)
        except (RuntimeError, MemoryError) as error:  # the system has no more threads
            with self._lock:
                self._threads -= 1
                self._coming -= 1
                if self._threads or job not in self._waiting:
                    return  # one that runs gets to it, or one that has ended since did it
                self._waiting.remove(job)
            if isinstance(error, MemoryError):
                raise
            raise no_task(str(error)) from None

    def _calls_another(self) -> bool:
        """Whether another thread is to be started, which then counts. Call with the lock.

        One after the other: each that takes work has the next one started. So no more come than there is work
        for that the others are not done with by then, and do not keep them from Python's lock.
        """
        if not self._waiting or self._coming or self._threads == self._count:
            return False
        self._threads += 1
        self._coming += 1
        return True

    def _work(self) -> None:
        """What each thread does: all work that waits."""
        comes = 1
        while True:
            with self._lock:
                self._coming -= comes
                comes = 0
                jobs = self._take()
                if not jobs:
                    self._threads -= 1
                    return
                calls_another = self._calls_another()
            if calls_another:
                self._call()
            self._run(jobs)
            self._done.extend(jobs)
            self._tell()
            del jobs  # and what they hold, while this thread waits

    def _call(self) -> None:
        try:
            trio.lowlevel.start_thread_soon(self._work, _drop)
        except (RuntimeError, MemoryError):  # this one goes on, and gets to the work
            with self._lock:
                self._threads -= 1
                self._coming -= 1

    def _take(self) -> list[_Job[Any]]:
        """The next piece of work that a task waits for, and one more where no other thread comes for it."""
        jobs: list[_Job[Any]] = []
        free = self._coming + self._count - self._threads
        while self._waiting:
            if jobs and (len(jobs) == 2 or self._together is None or len(self._waiting) <= free):
                break
            job = self._waiting.popleft()
            if job.task is not None:
                jobs.append(job)
        return jobs

    def _run(self, jobs: list[_Job[Any]]) -> None:
        results: tuple[Any, ...] = (None, None)
        if len(jobs) == 2:
            assert self._together is not None
            with contextlib.suppress(Exception):  # each raises its own
                results = self._together(jobs[0].work, jobs[1].work)
        for job, result in zip(jobs, results, strict=False):
            if result is None:
                job.run()
            else:
                job.end(result)

    def _tell(self) -> None:
        # `_deliver` clears this before it looks for results, so a result is never left behind.
        if not self._is_told:
            self._is_told = True
            assert self._token is not None
            with contextlib.suppress(trio.RunFinishedError):  # then nobody waits any more
                self._token.run_sync_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_told = False
        while self._done:
            job = self._done.popleft()
            if job.task is not None:
                trio.lowlevel.reschedule(job.task)
                job.task = None


def _drop(_outcome: object) -> None:
    """`_work` neither returns nor raises anything."""
