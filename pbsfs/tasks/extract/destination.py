"""The directory that files are restored to: everything is made beneath it, and no link is followed there.

Each name is opened or made relative to the descriptor of its directory, so whatever an archive says, and
whatever other users do in the destination meanwhile, nothing outside of it is touched. Synchronous; one
thread uses a `Destination`. Paths are names with slashes between, from the destination on; the empty one is
the destination itself.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat as stat_bits
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress

from pbsfs.base.errors import OutputError
from pbsfs.base.text import quoted

MAX_OPEN = 64
"""Descriptors of directories that are kept: paths may have 2,000 levels, a process 1,024 descriptors."""

LARGE = 1 << 20
"""Bytes of a file before which pbsfs looks whether its name is taken; for others, making the name says so."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PRIVATE_FILE = 0o600
_PRIVATE_DIRECTORY = 0o700
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""What file systems answer that have no files without a name (open(2) on O_TMPFILE)."""

_NOT_POSSIBLE = (errno.EPERM, errno.EOPNOTSUPP)
"""What file systems answer that have no links or devices, and what users get who may not make devices."""


class Destination:
    """A directory to restore to.

    `inherits`: whether there is a directory from which others get access control lists.
    """

    def __init__(self, path: str, *, overwrite: bool = False, existing_directories: bool = False) -> None:
        """`path`: an existing directory, or a link to one. `overwrite`: files that exist are replaced.
        `existing_directories`: directories may exist. Raises OutputError."""
        self.path = path
        self.inherits = False
        self._overwrite = overwrite
        self._existing_directories = existing_directories
        self._open: OrderedDict[bytes, int] = OrderedDict()
        self._has_nameless = True
        with self._words(b""):
            self._root = os.open(path, _DIRECTORY)
        self._note_inheritance(self._root)

    def close(self) -> None:
        for fd in (self._root, *self._open.values()):
            os.close(fd)
        self._open.clear()

    def directory(self, path: bytes) -> int:
        """A descriptor of a directory, valid until the next call. Raises OutputError."""
        if not path:
            return self._root
        fd = self._open.get(path)
        if fd is not None:
            self._open.move_to_end(path)
            return fd
        missing = [path]
        while fd is None:
            parent = missing[-1].rpartition(b"/")[0]
            fd = self._open.get(parent) if parent else self._root
            if fd is None:
                missing.append(parent)
        while missing:
            inner = missing.pop()
            with self._words(inner):
                fd = os.open(_name_of(inner), _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            self._open[inner] = fd
            # The least recently used is another one: this was added just now.
            while len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
        return fd

    def make_directory(self, path: bytes) -> bool:
        """Makes a directory, for its owner only; returns whether it is new. Raises OutputError where there is
        something else."""
        above, name = self._place(path)
        with self._words(path):
            try:
                os.mkdir(name, _PRIVATE_DIRECTORY, dir_fd=above)
            except FileExistsError:
                if not stat_bits.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                    if not self._overwrite:
                        raise
                    os.unlink(name, dir_fd=above)
                    os.mkdir(name, _PRIVATE_DIRECTORY, dir_fd=above)
                elif not self._existing_directories:
                    raise
                else:
                    self.use_directory(path)
                    return False
        return True

    def remove_empty(self, path: bytes) -> None:
        """Removes a directory if it is empty."""
        with suppress(OSError, OutputError):
            above, name = self._place(path)
            os.rmdir(name, dir_fd=above)

    def use_directory(self, path: bytes) -> None:
        """Has a directory that exists take new entries, where it is the user's own. Raises OutputError."""
        with self._words(path):
            if path:
                above, name = self._place(path)
                fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            else:
                fd = os.dup(self._root)
            try:
                found = os.fstat(fd)
                if ~found.st_mode & _PRIVATE_DIRECTORY and found.st_uid == os.geteuid() != 0:
                    os.chmod(_proc(fd), stat_bits.S_IMODE(found.st_mode) | _PRIVATE_DIRECTORY)
            finally:
                os.close(fd)
        self._note_inheritance(self.directory(path))

    @contextmanager
    def new_file(self, path: bytes, size: int) -> Iterator[int]:
        """The descriptor of a file that gets its name when the context is left without an error.

        `size`: bytes that it will have. Until then it has no name, or where the file system cannot do that,
        one that starts with `.pbsfs-`. Raises OutputError, also for an OSError in the context.
        """
        above, name = self._place(path)
        with self._words(path):
            if size >= LARGE and not self._overwrite:
                self._refuse_existing(name, above)
            fd, part = self._new(above)
            try:
                try:
                    yield fd
                    if part is None:
                        source = _proc(fd)
                        self._put(name, above, lambda to: os.link(source, to, dst_dir_fd=above))
                finally:
                    # Network file systems say only now that they have no room: the name comes after it.
                    os.close(fd)
                if part is not None:
                    self._put_part(part, name, above)
                    part = None
            finally:
                if part is not None:
                    with suppress(OSError):
                        os.unlink(part, dir_fd=above)

    def _new(self, above: int) -> tuple[int, bytes | None]:
        """A new file in a directory, and its name if it has one."""
        if self._has_nameless:
            try:
                flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
                return os.open(b".", flags, _PRIVATE_FILE, dir_fd=above), None
            except OSError as error:
                if error.errno not in _NO_NAMELESS:
                    raise
            self._has_nameless = False
        part = _part_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(part, flags, _PRIVATE_FILE, dir_fd=above), part

    def _put_part(self, part: bytes, name: bytes, above: int) -> None:
        """Gives a complete file its name."""
        if not self._overwrite:
            try:
                os.link(part, name, src_dir_fd=above, dst_dir_fd=above, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                self._refuse_existing(name, above)  # there are no hard links, so no way to do both at once
            else:
                os.unlink(part, dir_fd=above)
                return
        os.rename(part, name, src_dir_fd=above, dst_dir_fd=above)

    def make_link(self, path: bytes, target: bytes) -> None:
        """Makes a symbolic link. Raises OSError where the file system has none, and OutputError."""
        above, name = self._place(path)
        with self._words(path, but=_NOT_POSSIBLE):
            self._put(name, above, lambda to: os.symlink(target, to, dir_fd=above))

    def make_hard_link(self, path: bytes, first: bytes) -> None:
        """Makes another name of the file `first`, which was restored.

        Raises OSError where that cannot be, and OutputError.
        """
        try:
            source = os.dup(self.directory(first.rpartition(b"/")[0]))
        except OutputError:  # it may have got its mode already, with which nothing in it can be reached
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        old = _name_of(first)

        def make(to: bytes) -> None:
            os.link(old, to, src_dir_fd=source, dst_dir_fd=above, follow_symlinks=False)

        try:
            above, name = self._place(path)
            with self._words(path, but=set(errno.errorcode) - {errno.EEXIST}):
                self._put(name, above, make)
        finally:
            os.close(source)

    def make_special(self, path: bytes, mode: int, device: int) -> None:
        """Makes a device, FIFO or socket, for its owner only.

        Raises OSError where the user may not or the file system has none, and OutputError.
        """
        above, name = self._place(path)
        kind = stat_bits.S_IFMT(mode) | _PRIVATE_FILE
        with self._words(path, but=_NOT_POSSIBLE):
            self._put(name, above, lambda to: os.mknod(to, kind, device, dir_fd=above))

    @contextmanager
    def made(self, path: bytes, mode: int) -> Iterator[bytes]:
        """A path to the link, device, FIFO or socket that was made as `path`, which leads nowhere else.

        Raises OutputError where something else is there meanwhile.
        """
        above, name = self._place(path)
        with self._words(path):
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            try:
                found = os.fstat(fd)
                if (
                    stat_bits.S_IFMT(found.st_mode) != stat_bits.S_IFMT(mode)
                    or found.st_uid != os.geteuid()
                    or found.st_nlink != 1
                ):
                    raise OutputError(
                        f"cannot write {self.shown(path)}: somebody else replaces it meanwhile; restore to a "
                        "directory that only you may write to"
                    )
                yield _proc(fd)
            finally:
                os.close(fd)

    def _put(self, name: bytes, above: int, make: Callable[[bytes], None]) -> None:
        """Has `make` make an entry, under `name` or, to replace what has that, first under another.

        Raises OSError.
        """
        try:
            make(name)
        except FileExistsError:
            if not self._overwrite:
                raise
            part = _part_name()
            make(part)
            try:
                os.rename(part, name, src_dir_fd=above, dst_dir_fd=above)
            finally:
                # It is still there if that failed, or if both are names of one file.
                with suppress(OSError):
                    os.unlink(part, dir_fd=above)

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The directory that `path` is in, and its name there."""
        return self.directory(path.rpartition(b"/")[0]), _name_of(path)

    def _refuse_existing(self, name: bytes, above: int) -> None:
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=above, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _note_inheritance(self, directory: int) -> None:
        with suppress(OSError):
            os.getxattr(directory, "system.posix_acl_default")
            self.inherits = True

    def shown(self, path: bytes) -> str:
        """The path, for messages."""
        inner = os.fsdecode(path)
        whole = f"{self.path}/{inner}" if inner else self.path
        return whole if whole.isprintable() else quoted(whole)

    @contextmanager
    def _words(self, path: bytes, but: Container[int] = ()) -> Iterator[None]:
        """Makes an OutputError of an OSError, unless its number is in `but`."""
        try:
            yield
        except OSError as error:
            if error.errno in but:
                raise
            advice = _ADVICE.get(error.errno or 0, "")
            raise OutputError(f"cannot write {self.shown(path)}: {error.strerror}{advice}") from None


_ADVICE = {
    errno.EEXIST: "; restore to an empty directory, or add --overwrite for files and --allow-existing-dirs "
    "for directories",
    errno.ELOOP: "; a link is where a directory has to be: remove it",
    errno.ENOTDIR: "; a file or link is where a directory has to be: remove it",
    errno.EISDIR: "; a directory is where a file has to be: remove it",
    errno.ENOSPC: "; make room, then run it again with --overwrite --allow-existing-dirs",
    errno.EDQUOT: "; make room, then run it again with --overwrite --allow-existing-dirs",
    errno.EINVAL: "; the file system does not take this name: leave it out with --exclude",
    errno.ENAMETOOLONG: "; the file system does not take this name: leave it out with --exclude",
    errno.EFBIG: "; the file system takes no file of this size: leave it out with --exclude",
}
"""What to do about failures of the system, by number."""


def _name_of(path: bytes) -> bytes:
    name = path.rpartition(b"/")[2]
    if name in (b"", b".", b"..") or b"\0" in name:
        raise OutputError(
            f"cannot write {quoted(os.fsdecode(path))}: this is not a name of a file; "
            "leave it out with --exclude"
        )
    return name


def _part_name() -> bytes:
    return b".pbsfs-" + secrets.token_hex(8).encode()


def _proc(fd: int) -> bytes:
    """A path to an open file, also to one without a name."""
    return b"/proc/self/fd/%d" % fd
