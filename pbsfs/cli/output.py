"""Standard output for commands that write much, from a worker thread.

Without a buffer: a thread that is blocked because nobody reads the other end would hold the buffer's lock,
and the process could not end on Ctrl-C.
"""

from __future__ import annotations

import io
import sys
from typing import IO, cast

from pbsfs.base.errors import UsageError


class _Output:
    """A raw file, of which each `write` writes all."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        while view:
            view = view[self._raw.write(view) or 0 :]
        return len(data)

    def flush(self) -> None:
        """Nothing waits to be written."""


def standard_output() -> IO[bytes]:
    """Standard output as a binary file, for `write`. Raises UsageError where it is closed."""
    if sys.stdout is None:
        raise UsageError("standard output is closed; redirect it to a file or program")
    sys.stdout.flush()
    raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
    return cast("IO[bytes]", _Output(cast("io.RawIOBase", raw)))
