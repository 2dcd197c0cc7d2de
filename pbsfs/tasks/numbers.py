"""What a mount or an NBD server did and uses, as numbers and as text.

The process counts in `COUNTS`; `Numbers` adds what the reader knows. Nothing here waits for the source, or
needs memory that is charged. Used in the trio loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pbsfs.reader.reader import Reader
from pbsfs.runtime.stats import COUNTS

_MEMORY = Path("/proc/self/statm")


class Numbers:
    """What a process that serves `reader` did, and what it uses now."""

    def __init__(self, reader: Reader, more: Mapping[str, Callable[[], int]]) -> None:
        """`more`: numbers that only this kind of process has, by name."""
        self._reader = reader
        self._more = more
        self._since = time.monotonic()

    def all(self) -> dict[str, int | float]:
        """All of it, by name; sizes are in bytes."""
        store, zeroed = self._reader.store, self._reader.zeroed
        found: dict[str, int | float] = {"uptime_seconds": int(time.monotonic() - self._since)}
        found |= COUNTS
        found["ranges_shown_as_zeros"] = 0 if zeroed is None else zeroed.count
        found["bytes_shown_as_zeros"] = 0 if zeroed is None else zeroed.size
        found |= {name: count() for name, count in self._more.items()}
        found["cache_bytes"] = store.cache.size
        found["cache_limit_bytes"] = store.cache.room
        found["charged_bytes"] = store.memory.charged()
        found["resident_bytes"] = _resident()
        return found

    def text(self) -> str:
        """One line for each number: its name, a space, and its value."""
        return "".join(f"{name} {_shown(value)}\n" for name, value in self.all().items())

    def line(self) -> str:
        """The same in one line, for the log."""
        return " ".join(f"{name}={_shown(value)}" for name, value in self.all().items())


def _shown(value: int | float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _resident() -> int:
    """Bytes of memory that the process takes (the second field of statm, proc(5)); 0 where it is unknown."""
    try:
        return int(_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
