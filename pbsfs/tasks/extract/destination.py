"""The directory that files are restored to: everything is made beneath it, and no link is followed there.

Each name is opened or made relative to the descriptor of its directory, so whatever an archive says, nothing
outside of the destination is touched. Synchronous; one thread uses a `Destination`.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pbsfs.base.errors import OutputError
from pbsfs.base.text import quoted

Steps = tuple[bytes, ...]
"""Names from the destination to a directory below it; none: the destination."""

MAX_OPEN = 64
"""Descriptors of directories that are kept: paths may have 2,000 levels, a process 1,024 descriptors."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PRIVATE_FILE = 0o600
_PRIVATE_DIRECTORY = 0o700
_PART = b".pbsfs-part"


class Destination:
    """A directory to restore to."""

    def __init__(self, path: str, *, overwrite: bool = False, existing_directories: bool = False) -> None:
        """`path`: an existing directory, or a link to one. `overwrite`: files that exist are replaced.
        `existing_directories`: directories may exist. Raises OutputError."""
        self.path = path
        self._overwrite = overwrite
        self._existing_directories = existing_directories
        self._open: OrderedDict[Steps, int] = OrderedDict()
        with self._words():
            self._root = os.open(path, _DIRECTORY)

    def close(self) -> None:
        for fd in (self._root, *self._open.values()):
            os.close(fd)
        self._open.clear()

    def directory(self, steps: Steps) -> int:
        """A descriptor of a directory, valid until the next call. Raises OutputError."""
        depth = len(steps)
        while depth and steps[:depth] not in self._open:
            depth -= 1
        fd = self._open[steps[:depth]] if depth else self._root
        while depth < len(steps):
            depth += 1
            with self._words(*steps[:depth]):
                fd = os.open(steps[depth - 1], _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            self._open[steps[:depth]] = fd
            # The least recently used are others: these were all added or moved just now.
            while len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
        if steps:
            self._open.move_to_end(steps)
        return fd

    def make_directory(self, steps: Steps) -> None:
        """Makes a directory, for its owner only. Raises OutputError where there is something else."""
        with self._words(*steps):
            above = self.directory(steps[:-1])
            try:
                os.mkdir(steps[-1], _PRIVATE_DIRECTORY, dir_fd=above)
            except FileExistsError:
                kind = os.stat(steps[-1], dir_fd=above, follow_symlinks=False).st_mode
                if not stat_bits.S_ISDIR(kind):
                    if not self._overwrite:
                        raise
                    os.unlink(steps[-1], dir_fd=above)
                    os.mkdir(steps[-1], _PRIVATE_DIRECTORY, dir_fd=above)
                elif not self._existing_directories:
                    raise

    @contextmanager
    def new_file(self, steps: Steps) -> Iterator[int]:
        """The descriptor of a file that gets its name when the context is left without an error.

        Until then it has none, or where the file system cannot do that, a name with `.pbsfs-part`. Raises
        OutputError.
        """
        name = steps[-1]
        above = self.directory(steps[:-1])
        if not self._overwrite:
            self._refuse_existing(steps, above)
        with self._words(*steps):
            part: bytes | None = None
            try:
                fd = os.open(b".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, _PRIVATE_FILE, dir_fd=above)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
                part = name[: 255 - len(_PART)] + _PART
                with suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=above)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(part, flags, _PRIVATE_FILE, dir_fd=above)
        try:
            try:
                yield fd
                with self._words(*steps):
                    self._name(fd, part, name, above)
                    part = None
            finally:
                os.close(fd)
        finally:
            if part is not None:
                with suppress(OSError):
                    os.unlink(part, dir_fd=above)

    def _name(self, fd: int, part: bytes | None, name: bytes, above: int) -> None:
        if part is not None:
            if self._overwrite:
                self._make_way(name, above)
                os.rename(part, name, src_dir_fd=above, dst_dir_fd=above)
            else:
                os.link(part, name, src_dir_fd=above, dst_dir_fd=above, follow_symlinks=False)
                os.unlink(part, dir_fd=above)
            return
        source = f"/proc/self/fd/{fd}"
        try:
            os.link(source, name, dst_dir_fd=above, follow_symlinks=True)
        except FileExistsError:
            if not self._overwrite:
                raise
            self._make_way(name, above)
            other = name[: 255 - len(_PART)] + _PART
            with suppress(FileNotFoundError):
                os.unlink(other, dir_fd=above)
            os.link(source, other, dst_dir_fd=above, follow_symlinks=True)
            os.rename(other, name, src_dir_fd=above, dst_dir_fd=above)

    def make_link(self, steps: Steps, target: bytes) -> None:
        """Makes a symbolic link. Raises OutputError."""
        above = self._way(steps)
        with self._words(*steps):
            os.symlink(target, steps[-1], dir_fd=above)

    def make_hard_link(self, steps: Steps, first: Steps) -> None:
        """Makes another name of the file `first`, which was restored. Raises OutputError."""
        above = self._way(steps)
        kept = os.dup(above)
        try:
            with self._words(*steps):
                source = self.directory(first[:-1])
                os.link(first[-1], steps[-1], src_dir_fd=source, dst_dir_fd=kept, follow_symlinks=False)
        finally:
            os.close(kept)

    def make_special(self, steps: Steps, mode: int, device: int) -> None:
        """Makes a device, FIFO or socket, for its owner only.

        Raises PermissionError where the user may not, and OutputError.
        """
        above = self._way(steps)
        with self._words(*steps, but=PermissionError):
            os.mknod(steps[-1], stat_bits.S_IFMT(mode) | _PRIVATE_FILE, device, dir_fd=above)

    def _way(self, steps: Steps) -> int:
        """The directory in which `steps` are to be made, where nothing is in the way."""
        above = self.directory(steps[:-1])
        if not self._overwrite:
            self._refuse_existing(steps, above)
            return above
        with self._words(*steps):
            self._make_way(steps[-1], above)
        return above

    def _make_way(self, name: bytes, above: int) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=above)  # of a directory it fails, and so does the restore

    def _refuse_existing(self, steps: Steps, above: int) -> None:
        try:
            os.stat(steps[-1], dir_fd=above, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError:
            pass  # making it says why
        else:
            raise OutputError(
                f"cannot write {self.shown(steps)}: it exists; "
                "replace existing files with --overwrite, or restore to an empty directory"
            )

    def shown(self, steps: Steps) -> str:
        """The path, for messages."""
        inner = os.fsdecode(b"/".join(steps))
        path = f"{self.path}/{inner}" if inner else self.path
        return path if path.isprintable() else quoted(path)

    @contextmanager
    def _words(self, *steps: bytes, but: type[OSError] | tuple[()] = ()) -> Iterator[None]:
        try:
            yield
        except but:
            raise
        except OSError as error:
            advice = ""
            if error.errno == errno.EEXIST:
                advice = "; add --allow-existing-dirs, or restore to an empty directory"
            elif error.errno in (errno.ELOOP, errno.ENOTDIR):
                advice = "; a file or link is where a directory has to be"
            elif error.errno == errno.EISDIR:
                advice = "; a directory is where a file has to be"
            raise OutputError(f"cannot write {self.shown(steps)}: {error.strerror}{advice}") from None
