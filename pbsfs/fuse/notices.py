"""What pbsfs has the kernel drop: pages and names, by calls of libfuse in worker threads.

The kernel may hold such a call until reads are answered, so the loop must not make it. libfuse's session is
freed when the mount ends, so the mount waits for these calls before (`end`). Used by the operations, `Pages`
and `Forgetting`, in the trio loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import ParamSpec

import trio

from pbsfs.base.errors import SourceError
from pbsfs.runtime.threads import in_thread

log = logging.getLogger(__name__)

P = ParamSpec("P")

PAUSE = 1.0
"""Seconds until a call is tried again for which the system had no thread."""


class Notices:
    """The calls of one mount."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._has_ended = False

    async def send(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Makes `call` in a thread, and waits for it. Raises like it. If cancelled, the thread continues.

        Where the system has no thread, tries again: the tasks that call this are not to end the mount.
        """

        def make() -> None:
            with self._changed:
                if self._has_ended:
                    return
                self._running += 1
            try:
                call(*args, **kwargs)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        while True:
            try:
                return await in_thread(make, abandon_on_cancel=True)
            except SourceError as error:  # the system has no thread now: serving continues meanwhile
                log.debug("the kernel is asked later: %s", error)
                await trio.sleep(PAUSE)

    def end(self, within: float) -> bool:
        """Lets no call begin from now on. Returns whether all return within so many seconds; blocks."""
        with self._changed:
            self._has_ended = True
            return self._changed.wait_for(lambda: not self._running, within)
