"""Which chunks processes fetch at this moment, so that two of them don't fetch the same.

A claim is a lock on one byte of a file that all share: the byte's place comes from the chunk's name. The
kernel ends it with the process. Synchronous; from any thread.

Source of the locks: fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading

from pbsfs.sources.cached.files import CacheFiles, Name

_FILE = "fetching"
_BUSY = (errno.EAGAIN, errno.EACCES)


class Claims:
    """The claims of this process on what the cache in `files` lacks."""

    def __init__(self, files: CacheFiles) -> None:
        self._files = files
        self._file: int | None = None
        self._guard = threading.Lock()  # a thread must not lock what another has closed

    def take(self, name: Name) -> bool:
        """Whether no other process fetches `name`; this one does from now on. Raises OSError."""
        with self._guard:
            if self._file is None:
                self._file = self._files.state_file(_FILE)
            try:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, name))
            except OSError as error:
                if error.errno in _BUSY:
                    return False
                raise
        return True

    def give_back(self, name: Name) -> None:
        """Ends a claim. Raises OSError."""
        with self._guard:
            if self._file is not None:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, name))

    def close(self) -> None:
        """Ends all claims."""
        with self._guard:
            if self._file is not None:
                os.close(self._file)
            self._file = None


def _lock(kind: int, name: Name) -> bytes:
    place = int.from_bytes(name.digest[:7], "big")
    return struct.pack("@hhqqi4x", kind, os.SEEK_SET, place, 1, 0)
