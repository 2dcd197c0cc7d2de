"""Watchdogs, which end what a test started, so that no test hangs for ever.

What is shared by the tests of a module lives longer than a test: each test that starts gives all of it its
time again. Used by `mounts`, and by the fixture in tests/conftest.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watchdog:
    """Calls `end` when so many seconds have passed since its start, or since the last test started."""

    def __init__(self, lifetime: float, end: Callable[[], None]) -> None:
        self._lifetime = lifetime
        self._end = end
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Starts its time, also again."""
        self.stop()
        self._timer = threading.Timer(self._lifetime, self._end)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


_watching: list[Watchdog] = []


@contextmanager
def watched(lifetime: float, end: Callable[[], None]) -> Iterator[None]:
    """Calls `end` if the block takes longer than `lifetime` seconds, without a test that starts meanwhile."""
    watchdog = Watchdog(lifetime, end)
    _watching.append(watchdog)
    watchdog.start()
    try:
        yield
    finally:
        _watching.remove(watchdog)
        watchdog.stop()


def start_again() -> None:
    """A test starts: whatever is watched has its time again."""
    for watchdog in _watching:
        watchdog.start()
