"""How many bytes a cache on disk uses: a number for each shard, in a file that all processes share.

A process adds what it is going to write when the file has its size and no content yet, and subtracts what it
has removed, so that one that is killed leaves a number that is too large, never too small. Whatever else
makes it wrong, such as another user, is corrected when the shard is counted. Synchronous; from any thread of
any number of processes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pbsfs.sources.cached.files import SHARDS, CacheFiles

_FILE = "usage"
_NUMBERS = struct.Struct(f"<{SHARDS}Q")
_MOST = 1 << 52
"""Bytes of a shard. Another user's sparse files may claim more than 64 bits can count."""

_TRIES = 50
_PAUSE = 0.002
"""Seconds. The lock is held for microseconds; another user may hold it for ever."""


class Usage:
    """The numbers of the cache in `files`."""

    def __init__(self, files: CacheFiles) -> None:
        self._files = files

    def numbers(self) -> list[int]:
        """The bytes of each shard. Raises OSError."""
        try:
            file = self._files.state_file(_FILE, os.O_RDONLY)
        except FileNotFoundError:
            return [0] * SHARDS
        try:
            return _numbers(file)
        finally:
            os.close(file)

    def total(self) -> int:
        """The bytes of all shards. Raises OSError."""
        return sum(self.numbers())

    def add(self, shard: int, size: int, *, most: int | None = None) -> bool:
        """Adds `size` bytes, which may be negative, to a shard. Raises OSError.

        Returns False, and adds nothing, if the total would be more than `most`.
        """
        with self._locked() as file:
            numbers = _numbers(file)
            if most is not None and sum(numbers) + size > most:
                return False
            number = min(max(0, numbers[shard] + size), _MOST)
            os.pwrite(file, struct.pack("<Q", number), 8 * shard)
        return True

    def correct(self, shard: int, wrong: int, right: int) -> None:
        """Sets the number of a shard to `right`, if it is still `wrong`. Raises OSError.

        If it is not, others have written, removed or corrected something meanwhile, which the count that
        found `right` may have seen or not.
        """
        with self._locked() as file:
            if _numbers(file)[shard] == wrong:
                os.pwrite(file, struct.pack("<Q", min(right, _MOST)), 8 * shard)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = self._files.state_file(_FILE)
        try:
            for _ in range(_TRIES):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_PAUSE)
            else:
                raise OSError(errno.EAGAIN, "another process keeps it locked", _FILE)
            yield file
        finally:
            os.close(file)  # which unlocks it


def _numbers(file: int) -> list[int]:
    found = os.pread(file, _NUMBERS.size, 0)
    return [min(number, _MOST) for number in _NUMBERS.unpack(found.ljust(_NUMBERS.size, b"\0"))]
