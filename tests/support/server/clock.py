"""The server's clock: real time, and what a test adds to it."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the epoch. May be read and set from any thread."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def now(self) -> int:
        return int(time.time() + self._ahead)

    def advance(self, seconds: float) -> None:
        """Sets the clock forward; back with a negative number."""
        self._ahead += seconds

    def set(self, now: float) -> None:
        """Makes it `now`, in seconds since the epoch; the clock goes on from there."""
        self._ahead = now - time.time()
