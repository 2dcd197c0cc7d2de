"""A limit on the connections of NBD clients, which hold threads and buffers of nbdkit.

nbdkit calls a plugin when a connection begins, but not when one ends that never opened an export. Each
connection has a thread of nbdkit from its beginning to its end, so the limit counts those threads.
"""

from __future__ import annotations

import os
import threading

from pbsfs.base.errors import UnavailableError


class Connections:
    """At most `most` connections at once. Any thread may call `admit`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._threads: set[int] = set()  # the kernel's ids; also of threads that have ended since
        self._lock = threading.Lock()

    def count(self) -> int:
        """How many there are."""
        with self._lock:
            self._forget_ended()
            return len(self._threads)

    def admit(self) -> None:
        """Counts the connection of the calling thread until that thread ends. Raises UnavailableError."""
        own = threading.get_native_id()
        with self._lock:
            self._threads.discard(own)  # an ended thread had the same id
            if len(self._threads) >= self._most:
                self._forget_ended()
            if len(self._threads) >= self._most:
                raise UnavailableError(
                    f"connection refused: {self._most} NBD connections are open; "
                    "close some, or give a larger nbd_connections="
                )
            self._threads.add(own)

    def _forget_ended(self) -> None:
        self._threads = {thread for thread in self._threads if _is_running(thread)}


def _is_running(thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{thread}")
