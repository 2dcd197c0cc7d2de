"""Targets that exist already, and are compared with the image before anything is written to them.

A restore in place opens a file or block device as `ExistingFile` or `ExistingDevice`. Both refuse what other
programs use: writing there would damage what those have in memory. Several worker threads use one target at
once, each for a range of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from pbsfs.base.errors import OutputError
from pbsfs.tasks.image.formats import HEAD, form_of
from pbsfs.tasks.image.locks import lock
from pbsfs.tasks.image.target import BlockTarget, Target

_LOOPS = Path("/sys/block")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ComparedTarget(Target):
    """A target that can be read. Its file is open for reading and writing."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `offset` on; behind the end of a file, with zeros."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                view[done:] = bytes(len(view) - done)
                return
            done += count

    def next_data(self, offset: int, end: int) -> int:
        """The first byte from `offset` on that may not be zero; `end` where there is none before."""
        return min(offset, end)

    def settle(self) -> None:
        """Has all bytes on stable storage, so that later reads return what is there."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class ComparedFile(ComparedTarget):
    """A regular file that can be read: a hole stays one."""

    def next_data(self, offset: int, end: int) -> int:
        try:
            return min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return end
            raise

    def hole(self, offset: int, length: int) -> None:
        if _LIBC.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        self.write_zeros(offset, length)


class ExistingFile(ComparedFile):
    """A file that is turned into the image. It gets the image's size when all else is written."""

    def __init__(self, path: Path, size: int, *, force: bool = False, only_compared: bool = False) -> None:
        """`force`: whether a file that is an image of another form may become a raw one. `only_compared`:
        whether nothing is written, so that it does not matter what the file is."""
        self.map_file = path.with_name(path.name + ".map")
        self._size = size
        access = os.O_RDONLY if only_compared else os.O_RDWR
        super().__init__(os.open(path, access | os.O_CLOEXEC), str(path))
        try:
            self.size = os.fstat(self._fd).st_size
            if not only_compared:
                _refuse_loop(path)
                _refuse_form(self._fd, path, force=force)
            _lock(self._fd, path, shared=only_compared)
        except BaseException:
            os.close(self._fd)
            raise

    def settle(self) -> None:
        os.ftruncate(self._fd, self._size)
        super().settle()


class ExistingDevice(BlockTarget, ComparedTarget):
    """A block device that is turned into the image. What is behind the image's end stays."""

    def __init__(self, path: Path, size: int, *, force: bool = False) -> None:
        """`force`: as for `ExistingFile`."""
        super().__init__(path, size, force=True, access=os.O_RDWR)
        try:
            _refuse_form(self._fd, path, force=force)
            _lock(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise


def _lock(fd: int, path: Path, *, shared: bool = False) -> None:
    """Holds a lock, as long as the file is open. Raises OutputError if another program holds one."""
    if not lock(fd, shared=shared):
        raise OutputError(
            f"{path}: another program has locked it, as QEMU or another export does; end that first"
        )


def _refuse_form(fd: int, path: Path, *, force: bool) -> None:
    """Raises OutputError if the file is an image of another form than raw, unless the user forces it."""
    form = form_of(os.pread(fd, HEAD, 0))
    if form is not None and not force:
        raise OutputError(
            f"{path}: it is a {form.name} image, and would become a raw one; {form.access}, or add --force "
            "if the backup is of all these bytes"
        )


def _refuse_loop(path: Path) -> None:
    """Raises OutputError if a loop device uses the file: what is mounted from it would be damaged."""
    own = os.stat(path)
    for backing in sorted(_LOOPS.glob("loop*/loop/backing_file")):
        try:
            other = os.stat(backing.read_text(errors="surrogateescape").rstrip("\n"))
        except (OSError, ValueError):  # detached meanwhile, removed, or not visible here
            continue
        if os.path.samestat(own, other):
            device = f"/dev/{backing.parent.parent.name}"
            raise OutputError(
                f"{path}: the loop device {device} uses it; unmount that and detach it with: "
                f"losetup -d {device}"
            )
