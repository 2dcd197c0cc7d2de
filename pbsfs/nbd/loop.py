"""The trio loop of an nbdkit process: the thread that runs it, and how nbdkit's threads give it work.

nbdkit calls the plugin from threads of its own, one for each request that is under way. They block until the
loop has answered, or until their client has gone. The loop's thread starts after nbdkit's fork into the
background: no thread lives on in the child of a fork.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import trio

from pbsfs.base.errors import SourceError
from pbsfs.runtime.threads import start

log = logging.getLogger(__name__)

R = TypeVar("R")


class StoppedError(SourceError):
    """The server ends, or the client has gone: the request is cancelled."""

    errno = errno.ESHUTDOWN


class LoopThread:
    """A trio loop in a thread of its own, as other threads see it (`reader.handle.Loop`).

    `start` and `stop` belong to one thread. Any thread may call the other methods between the two.
    """

    def __init__(self, wanted: Callable[[], bool], patience: float) -> None:
        """`wanted`: asked in a thread that waits: whether its client still waits. `patience`: seconds between
        two such questions.
        """
        self.patience = patience
        self._wanted = wanted
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stopping = False

    def start(self, context: AbstractAsyncContextManager[object], ended: Callable[[bool], object]) -> None:
        """Starts the loop, which holds `context` open until `stop`. Raises what entering `context` raises.

        `ended`: called last in the loop's thread; its argument says whether the loop failed after its start.
        """
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(context, started, ended), name="pbsfs", daemon=True
        )
        start(self._thread)
        started.result()

    def stop(self) -> None:
        """Ends the loop; calls that still wait raise StoppedError."""
        if self._token is not None and self._thread is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._cancel)
            self._thread.join()
            self._thread = None

    def call(
        self, work: Callable[[], Awaitable[R]], unwanted: Callable[[R], object] = lambda _result: None
    ) -> R:
        """The result of `work`, a task in the loop. Raises StoppedError, and what `work` raises.

        `unwanted`: called in the loop with the result if the client has gone meanwhile.
        """
        assert self._token is not None
        answer: concurrent.futures.Future[R] = concurrent.futures.Future()
        try:
            self._token.run_sync_soon(self._start_soon, work, answer)
        except trio.RunFinishedError:
            raise StoppedError("the server is shutting down") from None
        while True:
            try:
                return answer.result(self.patience)
            except TimeoutError:
                if answer.done():  # meanwhile, or the work raised that
                    return answer.result()
            try:
                self.check()
            except StoppedError:
                answer.add_done_callback(
                    lambda done: None if done.exception() else self.post(lambda: unwanted(done.result()))
                )
                raise

    def post(self, work: Callable[[], object]) -> None:
        """Has `work` called in the loop, soon; does nothing if the loop has ended."""

        def guarded() -> None:  # an exception would end the loop
            try:
                work()
            except Exception:
                if not self._stopping:
                    log.exception("a request to the loop failed")

        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(guarded)

    def check(self) -> None:
        """Raises StoppedError if the client of the calling thread's request has gone."""
        if not self._wanted():
            raise StoppedError("request cancelled")

    def _run(
        self,
        context: AbstractAsyncContextManager[object],
        started: concurrent.futures.Future[None],
        ended: Callable[[bool], object],
    ) -> None:
        async def serve() -> None:
            self._token = trio.lowlevel.current_trio_token()
            async with context, trio.open_nursery() as nursery:
                self._nursery = nursery
                started.set_result(None)
                await trio.sleep_forever()

        failed = False
        try:
            trio.run(serve)
        except BaseException as error:
            if started.done():
                log.exception("serving failed; nbdkit ends, start it again")
                failed = True
            else:
                started.set_exception(error)
        ended(failed)

    def _cancel(self) -> None:
        self._stopping = True
        self._nursery.cancel_scope.cancel()

    def _start_soon(self, work: Callable[[], Awaitable[R]], answer: concurrent.futures.Future[R]) -> None:
        async def run() -> None:
            try:
                result = await work()
            except Exception as error:
                answer.set_exception(error.with_traceback(None))
            except BaseException:  # Cancelled, or a group of several
                answer.set_exception(StoppedError("the server is shutting down"))
                raise
            else:
                answer.set_result(result)

        try:
            self._nursery.start_soon(run)
        except RuntimeError:  # the nursery is closed
            answer.set_exception(StoppedError("the server is shutting down"))
