"""Log lines that are not repeated: each text once, and again after some time.

Problems recur as long as nobody repairs them, and programs that retry would fill the log. So the sources
report what they leave out of listings through a `Reporter`, and the mount reports errors of files.
For any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict

HOUR = 3600.0
DAY = 24 * HOUR

MOST = 10_000
"""Texts that are remembered by their hashes (some 2 MB): hostile lists must not take more and more memory."""


class Reporter:
    """Writes each text to `log` once in `repeat_after` seconds; forgets the oldest of more than `most`."""

    def __init__(self, log: logging.Logger, *, repeat_after: float, most: int = MOST) -> None:
        self._log = log
        self._repeat_after = repeat_after
        self._most = most
        self._written: OrderedDict[int, float] = OrderedDict()  # hash -> when, in that order
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._written)

    def report(self, text: str, level: int = logging.WARNING) -> None:
        """Logs `text`, unless it was logged less than `repeat_after` seconds ago."""
        now, key = time.monotonic(), hash(text)
        with self._lock:
            if now - self._written.get(key, float("-inf")) < self._repeat_after:
                return
            self._written[key] = now
            self._written.move_to_end(key)
            if len(self._written) > self._most:
                self._written.popitem(last=False)
        self._log.log(level, "%s", text)
