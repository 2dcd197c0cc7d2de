"""A regular file as the target of a copy.

The copy is written as `<name>.part` and gets its name when it is complete, so a file with the final name is
always whole. If the name is a symbolic link, the file that it points to is overwritten, as with cp, and the
part is beside that file. A failed copy removes its part, unless it may be resumed. A killed process leaves
its part, which only a copy that resumes continues: it compares what is there with the image. A copy holds a
lock on its part, so that another copy does not replace it.

Used from worker threads, one at a time, but by a copy that resumes as `ComparedTarget` has it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pbsfs.base.errors import OutputError
from pbsfs.tasks.image.compared import ComparedFile
from pbsfs.tasks.image.locks import lock
from pbsfs.tasks.image.refusals import exists, refuse_existing

_PRIVATE = 0o600


class FileTarget(ComparedFile):
    """A regular file: holes stay holes."""

    hole_piece = 1 << 62  # a hole of any size takes no time

    def __init__(self, path: Path, size: int, *, force: bool, mode: int | None, resume: bool = False) -> None:
        """`resume`: continue a part that is left, and leave it where the copy fails."""
        self.map_file = path.with_name(path.name + ".map")
        if not force:
            refuse_existing(path)
        self._path = path = _followed(path)
        self._part = path.with_name(path.name + ".part")
        self._force = force
        self._mode = _mode_of(path) if mode is None else mode
        self._resume = resume
        self._continues = resume and os.path.lexists(self._part)
        if self._continues:
            self._continue()
        else:
            self._create(force=force)
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            os.close(self._fd)
            self.abandon()
            raise

    @property
    def part(self) -> Path:
        """Where the copy is until it is complete."""
        return self._part

    def _continue(self) -> None:
        """Opens the part that is left."""
        try:
            fd = os.open(self._part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise self._foreign() from None
        super().__init__(fd, str(self._path))
        try:
            self._lock(fd)
            found = os.fstat(fd)
            if not self._is_part(found):  # another copy completed or removed it before it was locked
                raise self._in_use()
            # Another user could read what is written to their file. A second name may be a complete copy.
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
                raise self._foreign()
            os.fchmod(fd, self._mode | _PRIVATE)
        except BaseException:
            os.close(fd)
            raise

    def _is_part(self, found: os.stat_result) -> bool:
        try:
            return os.path.samestat(found, os.lstat(self._part))
        except FileNotFoundError:
            return False

    def _create(self, *, force: bool) -> None:
        """Makes a new part."""
        with self._left_over():
            if not force and os.path.lexists(self._part):
                raise OutputError(exists(self._part, "is left from an earlier export (see --resume)"))
            # Removed, not truncated: a process killed in `finish` leaves both names for one file.
            self._part.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            # Only the owner may read it: an image contains every file of a machine.
            super().__init__(os.open(self._part, flags, _PRIVATE), str(self._path))
            try:
                if self._mode != _PRIVATE:  # until `finish`, the owner may write it: the lock requires that
                    os.fchmod(self._fd, self._mode | _PRIVATE)
                self._lock(self._fd)
                if os.fstat(self._fd).st_nlink == 0:  # another copy removed it before it was locked
                    raise self._in_use()
            except BaseException:
                os.close(self._fd)
                raise

    @contextmanager
    def _left_over(self) -> Iterator[None]:
        """Holds the lock on a part that exists already. Raises OutputError if that is in use."""
        try:
            # For writing, as NFS requires for an exclusive lock; neither follows a link nor waits for a pipe.
            fd = os.open(self._part, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            yield
            return
        try:
            self._lock(fd)
            yield
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        if not lock(fd, only_start=True):  # qemu-img may write to the part
            raise self._in_use()

    def _in_use(self) -> OutputError:
        return OutputError(f"{self._part}: another export is writing it; wait for it, or name another file")

    def _foreign(self) -> OutputError:
        return OutputError(
            f"{self._part}: not a file that an export of this user left; remove it, or name another file"
        )

    def hole(self, offset: int, length: int) -> None:
        if self._continues:  # a new part is sparse
            super().hole(offset, length)

    def finish(self) -> None:
        if self._mode != self._mode | _PRIVATE:
            os.fchmod(self._fd, self._mode)
        super().finish()
        if self._force:
            os.replace(self._part, self._path)
            return
        try:
            os.link(self._part, self._path)  # unlike a rename, never replaces a new file
        except FileExistsError:
            raise OutputError(exists(self._path)) from None
        except OSError:  # a file system without links
            if os.path.lexists(self._path):
                raise OutputError(exists(self._path)) from None
            os.rename(self._part, self._path)
        else:
            os.unlink(self._part)

    def abandon(self) -> None:
        if not self._resume:
            self._part.unlink(missing_ok=True)


def _mode_of(path: Path) -> int:
    """The mode of the file at `path`, which overwriting keeps; 0600 for a new file."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode) & 0o777
    except OSError:
        return _PRIVATE


def _followed(path: Path) -> Path:
    """The file that a symbolic link points to, which is the one to write: the link stays."""
    if not path.is_symlink():
        return path
    if not path.exists():
        raise OutputError(f"{path} is a symbolic link to a missing file; remove it, or create that file")
    return path.resolve()
