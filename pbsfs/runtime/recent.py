"""The last warnings and errors of the log, kept in memory for a person who looks at a mount.

A handler beside the one that writes the log. Any thread may log; `text` may be called from any thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque

from pbsfs.base.text import MAX_SHOWN, excerpt

MOST = 100
"""Records that are kept, each of at most MAX_SHOWN characters of message."""


class Recent(logging.Handler):
    """Keeps the last records of at least level WARNING."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=MOST)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
            message = excerpt(record.getMessage(), MAX_SHOWN)
            self._lines.append(f"{moment} {record.levelname} {message}\n")
        except Exception:
            self.handleError(record)

    def text(self) -> str:
        """One line for each record, the oldest first: its time in UTC, its level and its message."""
        return "".join(self._lines.copy())
