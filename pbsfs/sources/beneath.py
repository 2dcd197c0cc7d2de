"""Opens files and directories beneath a root directory without following a symbolic link there.

A datastore may come from anywhere: a link in it could lead to any file of this machine, and opening a device
or a FIFO has effects of its own. So every step below the root is opened relative to the one above, with
O_NOFOLLOW; the root itself, and what lies above it, may be links. Access times stay as they are where the
kernel allows it (O_NOATIME: for the file's owner and root).

Called by the directory source, from its worker threads; everything blocks, and nothing is shared.
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


def joined(root: str, steps: Steps) -> str:
    """The path, for messages."""
    return "/".join((root, *steps))


def read_file(root: str, steps: Steps, limit: int) -> bytes:
    """All bytes of a regular file.

    Raises DamageError where it has more than `limit` bytes or is of another kind, SourceError for a symbolic
    link, and OSError, with the path as its `filename`.
    """
    file = _open(root, steps, _FILE)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):  # exchanged since it was looked at
            raise DamageError(f"{joined(root, steps)} is not a regular file")
        if found.st_size > limit:
            raise DamageError(f"{joined(root, steps)} has {found.st_size} bytes where {limit} is the most")
        data = os.read(file, found.st_size)
        while len(data) < found.st_size:
            more = os.read(file, found.st_size - len(data))
            if not more:
                raise DamageError(f"{joined(root, steps)} got shorter while it was read")
            data += more
        return data
    except OSError as error:
        error.filename = joined(root, steps)  # read(2) does not know it, and the message needs it
        raise
    finally:
        os.close(file)


@contextmanager
def scanned(root: str, steps: Steps) -> Iterator[Iterator[os.DirEntry[str]]]:
    """The entries of a directory, valid until the context is left.

    Raises SourceError for a symbolic link, and OSError, with the path as its `filename`.
    """
    directory = _open(root, steps, _DIRECTORY)
    try:
        with os.scandir(directory) as entries:
            yield entries
    except OSError as error:
        if not isinstance(error.filename, str):
            error.filename = joined(root, steps)
        raise
    finally:
        os.close(directory)


def exists(root: str, steps: Steps) -> bool:
    """Whether there is anything of that name, a link included. Raises like `scanned`."""
    try:
        os.close(_open(root, steps, os.O_PATH | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def enter(root: str, steps: Steps) -> None:
    """Raises NotADirectoryError for what is not a directory; else like `scanned`."""
    os.close(_open(root, steps, _STEP))


def _open(root: str, steps: Steps, flags: int) -> int:
    """A descriptor of what lies at the end of `steps`, opened with `flags`."""
    above: int | None = None
    name = root
    try:
        for number, step in enumerate(steps):
            name = step if number else f"{root}/{step}"
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
            if not stat.S_ISREG(kind):  # not opened at all: that alone rewinds a tape
                raise DamageError(f"{joined(root, steps)} is not a regular file")
        return _without_trace(name, flags, above)
    except OSError as error:
        error.filename = joined(root, steps)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            _refuse_link(root, steps)
        raise
    finally:
        if above is not None:
            os.close(above)


def _without_trace(name: str, flags: int, above: int | None) -> int:
    if flags & os.O_PATH:
        return os.open(name, flags, dir_fd=above)
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=above)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return os.open(name, flags, dir_fd=above)  # of another user


def _refuse_link(root: str, steps: Steps) -> None:
    """Raises SourceError where a step is a symbolic link: that is what went wrong then."""
    for count in range(1, len(steps) + 1):
        path = joined(root, steps[:count])
        if os.path.islink(path):
            raise SourceError(
                f"{path} is a symbolic link, which is not followed inside a datastore; "
                "put what it points to in its place, or a bind mount"
            )
