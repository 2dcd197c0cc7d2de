"""A directory beneath which pbsfs follows no symbolic link, opens nothing odd, and leaves no trace.

A datastore may come from anywhere. A link in it could lead to any file of this machine, and opening a device
or a FIFO has effects of its own. So pbsfs opens every step below the root relative to the one above, with
O_NOFOLLOW; the root itself, and what is above it, may be links. Access times stay as they are if the kernel
allows it (O_NOATIME: for the file's owner and root).

Used by the directory source, from its worker threads; everything blocks, and nothing is shared.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.sources.layout import Steps

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class Root:
    """The directory `path`. Every OSError that its methods raise has the whole path as its `filename`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def joined(self, steps: Steps) -> str:
        """The path at `steps`, for messages."""
        return "/".join((self.path, *steps))

    def problem(self, error: OSError | SourceError, steps: Steps = ()) -> str:
        """The problem that `error` reports; `steps`: what was read, for an error that does not name it."""
        if not isinstance(error, OSError):
            return str(error)
        return f"cannot read {error.filename or self.joined(steps)}: {error.strerror}"

    def read_file(self, steps: Steps, limit: int) -> bytes:
        """All bytes of a regular file.

        Raises DamageError if it has more than `limit` bytes or is of another kind, SourceError for a symbolic
        link, OSError.
        """
        with self.opened(steps) as (file, found):
            if found.st_size > limit:
                raise DamageError(f"{self.joined(steps)} has {found.st_size} bytes where {limit} is the most")
            data = os.read(file, found.st_size)
            while len(data) < found.st_size:
                more = os.read(file, found.st_size - len(data))
                if not more:
                    raise DamageError(f"{self.joined(steps)} became shorter while pbsfs read it")
                data += more
            return data

    @contextmanager
    def opened(self, steps: Steps) -> Iterator[tuple[int, os.stat_result]]:
        """A descriptor of a regular file, and what fstat(2) says of it, until the context ends.

        Raises DamageError if it is of another kind, SourceError for a symbolic link, OSError.
        """
        file = self._open(steps, _FILE)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):  # exchanged since `_open` looked at it
                raise DamageError(f"{self.joined(steps)} is not a regular file")
            yield file, found
        except OSError as error:
            error.filename = self.joined(steps)  # read(2) does not know it
            raise
        finally:
            os.close(file)

    @contextmanager
    def scanned(self, steps: Steps) -> Iterator[Iterator[os.DirEntry[str]]]:
        """The entries of a directory, valid until the context ends.

        Raises SourceError for a symbolic link, OSError.
        """
        directory = self._open(steps, _DIRECTORY)
        try:
            with os.scandir(directory) as entries:
                yield entries
        except OSError as error:
            if not isinstance(error.filename, str):
                error.filename = self.joined(steps)
            raise
        finally:
            os.close(directory)

    def exists(self, steps: Steps) -> bool:
        """Whether there is anything at `steps`, a link included. Raises like `scanned`."""
        try:
            os.close(self._open(steps, os.O_PATH | os.O_CLOEXEC))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def enter(self, steps: Steps) -> None:
        """Checks that there is a directory at `steps`. Raises like `scanned`."""
        os.close(self._open(steps, _STEP))

    def _open(self, steps: Steps, flags: int) -> int:
        """A descriptor of what is at `steps`, opened with `flags`."""
        above: int | None = None
        name = self.path
        try:
            for number, step in enumerate(steps):
                name = step if number else f"{self.path}/{step}"
                if number < len(steps) - 1:
                    inner = os.open(name, _STEP | os.O_NOFOLLOW, dir_fd=above)
                    if above is not None:
                        os.close(above)
                    above = inner
            flags |= os.O_NOFOLLOW if steps else 0
            if not flags & (os.O_DIRECTORY | os.O_PATH):
                kind = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
                if stat.S_ISLNK(kind):
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if not stat.S_ISREG(kind):  # never opened: opening alone rewinds a tape
                    raise DamageError(f"{self.joined(steps)} is not a regular file")
            return _open_without_trace(name, flags, above)
        except OSError as error:
            error.filename = self.joined(steps)
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                self._refuse_link(steps)
            raise
        finally:
            if above is not None:
                os.close(above)

    def _refuse_link(self, steps: Steps) -> None:
        """Raises SourceError if a step is a symbolic link, which then is what went wrong."""
        for count in range(1, len(steps) + 1):
            path = self.joined(steps[:count])
            if os.path.islink(path):
                raise SourceError(
                    f"{path} is a symbolic link, which is not followed inside a datastore; "
                    "replace it by what it points to, or by a bind mount"
                )


def _open_without_trace(name: str, flags: int, above: int | None) -> int:
    if flags & os.O_PATH:
        return os.open(name, flags, dir_fd=above)
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=above)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return os.open(name, flags, dir_fd=above)  # another user's file
