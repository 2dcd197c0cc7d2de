"""Requests on their way from tasks of the trio loop to the thread of a session.

Used by `session`, whose tasks add requests and cancel them, and by `conversation`, whose thread takes them.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque

import trio

from pbsfs.sources.server.protocol import Response


class Exchange:
    """A request and the place for its answer.

    `until`: the time of `time.monotonic()` at which the limit of its retries ends. `given_up`: the caller was
    cancelled. `number`: the answer's, once the request was sent. `refused`: the server refused the request
    once.
    """

    __slots__ = ("answered", "given_up", "limit", "number", "path", "refused", "result", "until")

    def __init__(self, path: str, limit: int, until: float = math.inf) -> None:
        self.path = path
        self.limit = limit
        self.until = until
        self.given_up = False
        self.number: int | None = None
        self.refused = False
        self.answered = trio.Event()
        self.result: Response | Exception | None = None

    def answer(self, result: Response | Exception) -> None:
        """Wakes the caller up with `result`. In the trio loop."""
        self.result = result
        self.answered.set()


class Inbox:
    """The requests that wait for a session's thread, and what wakes the thread. For any thread.

    `requests`: to send, in this order; only the thread removes any. `cancelled`: sent or not. `closing`: the
    session is to end.
    """

    def __init__(self) -> None:
        self.requests: deque[Exchange] = deque()
        self.cancelled: deque[Exchange] = deque()
        self.closing = False
        self.descriptor = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        """Makes `descriptor`, an eventfd that is readable after `notify`. Raises OSError."""
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def add(self, exchange: Exchange) -> None:
        """Has the thread send a request."""
        self.requests.append(exchange)
        self.notify()

    def cancel(self, exchange: Exchange) -> None:
        """Has the thread give a request up, whether it was sent or not."""
        exchange.given_up = True
        exchange.until = math.inf  # it stays in `requests` until its turn, without a limit
        self.cancelled.append(exchange)
        self.notify()

    def close(self) -> None:
        """Tells the thread to end; also more than once."""
        self.closing = True
        self.notify()

    def clear(self) -> None:
        """The thread has been woken and looks at everything now."""
        os.eventfd_read(self.descriptor)

    def end(self) -> None:
        """Closes the descriptor: the thread ends."""
        with self._lock:
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1

    def notify(self) -> None:
        """Wakes the thread."""
        with self._lock:
            if self.descriptor >= 0:
                os.eventfd_write(self.descriptor, 1)
