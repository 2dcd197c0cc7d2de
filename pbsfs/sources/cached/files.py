"""The files of a cache on disk: one for each entry, in 256 directories by the first byte of its name.

`DIR/pbsfs-1/ab/ab12…` holds a chunk, `….file` an index or blob, `….list` a record. The modification time is
the time of use. A file is written under another name and then renamed, so that an entry is complete or does
not exist, whatever ends the process; after a power failure it may be empty or cut short, which reading it
shows. Nothing here is trusted: links are not followed, nothing but regular files is opened, sizes are checked
before reading, and no path comes from contents.

Only the group of the cache's directory may get access besides the owner, if the directory's mode says so.
Synchronous; from any thread of any number of processes.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.formats.blob import Stored
from pbsfs.sources.cached.limits import CacheLimits
from pbsfs.sources.directory.root import Root

log = logging.getLogger(__name__)

INNER = "pbsfs-1"
"""The directory below that of the user, with the number of this layout: other files there are not touched."""

SHARDS = 256

_BLOCK = 4096
_SHARE_LEFT = 20
_MOST_LEFT = 1 << 30
"""One part in so many of the disk is left free, and at most so many bytes: a full disk stops others."""

_ENDLESS = 1 << 60

_ENTRY = re.compile(r"[0-9a-f]{64}(\.file|\.list)?", re.ASCII)
_UNFINISHED_END = ".new"
_UNFINISHED = re.compile(r"[0-9a-f]{64}(\.file|\.list)?\.[0-9a-f]{8}\.new", re.ASCII)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_STATE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_REGULAR = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # a link, a directory, a socket
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of pbsfs: see https://bford.info/cachedir/\n"


class Kind(enum.Enum):
    """What an entry holds; the value ends its file's name."""

    CHUNK = ""
    FILE = ".file"
    RECORD = ".list"


@dataclass(frozen=True, slots=True)
class Name:
    """The name of an entry: 32 bytes, and what it holds."""

    digest: bytes
    kind: Kind

    @property
    def shard(self) -> int:
        return self.digest[0]

    def __str__(self) -> str:
        return self.digest.hex() + self.kind.value


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """A file in a shard: when it was used (nanoseconds; 0 if its time is in the future, so that it goes
    first), its size on disk in bytes, and its name."""

    used: int
    size: int
    name: str

    @property
    def is_unfinished(self) -> bool:
        """Whether a process writes it, or was killed meanwhile."""
        return self.name.endswith(_UNFINISHED_END)


def size_on_disk(size: int) -> int:
    """The bytes that a file of `size` bytes counts as."""
    return -(-size // _BLOCK) * _BLOCK


def shard_name(shard: int) -> str:
    return f"{shard:02x}"


class CacheFiles:
    """The files below `directory`."""

    def __init__(self, directory: Path, limits: CacheLimits) -> None:
        self.directory = directory
        self._limits = limits
        self._inner = os.path.join(directory, INNER)
        self._root = Root(str(directory))

    def prepare(self) -> None:
        """Makes the directories that are missing. Raises OSError."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        mode = os.stat(self.directory).st_mode & 0o2770 | 0o700
        with suppress(FileExistsError):
            os.mkdir(self._inner, 0o700)
            with self._opened_inner() as inner:
                _let_in(inner, mode)
            with suppress(FileExistsError), open(os.path.join(self.directory, "CACHEDIR.TAG"), "xb") as file:
                file.write(_TAG)

    def exists(self) -> bool:
        """Whether `prepare` was called here before. Raises OSError."""
        try:
            return stat.S_ISDIR(os.stat(self._inner).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def is_writable(self) -> bool:
        """Whether this user may make files here."""
        return os.access(self._inner, os.W_OK | os.X_OK)

    def lacking(self, size: int) -> int:
        """The bytes that the disk lacks to take `size` and leave some to other programs. Raises OSError."""
        disk = os.statvfs(self._inner)
        if not disk.f_blocks:  # it does not know
            return size - _ENDLESS
        return (
            size
            + min(disk.f_blocks // _SHARE_LEFT * disk.f_frsize, _MOST_LEFT)
            - (disk.f_bavail * disk.f_frsize)
        )

    def state_file(self, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        """A descriptor of a file beside the shards, which all that may write the cache may write.

        Removes what is in its place and is not a regular file. Raises SourceError if it can't, OSError.
        """
        with self._opened_inner() as inner:
            file = _opened_regular(name, flags, inner)
            if file is None:
                self._remove_wrong(name, inner)
                file = _opened_regular(name, flags, inner)
            if file is None:
                raise self._wrong(name)
            try:
                found, mode = os.fstat(file), os.fstat(inner).st_mode
                if found.st_uid == os.geteuid() and found.st_mode & 0o777 != mode & 0o660:
                    os.fchmod(file, mode & 0o660)
            except BaseException:
                os.close(file)
                raise
        return file

    def _remove_wrong(self, name: str, inner: int) -> None:
        """Removes a link, directory or the like where a file belongs. Raises SourceError."""
        try:
            try:
                os.unlink(name, dir_fd=inner)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=inner)
        except FileNotFoundError:  # another process has removed it
            return
        except OSError:
            raise self._wrong(name) from None
        log.warning("%s/%s: removed, it was not a regular file", self._inner, name)

    def _wrong(self, name: str) -> SourceError:
        return SourceError(f"{self._inner}/{name}: not a regular file; remove it")

    @contextmanager
    def _opened_inner(self) -> Iterator[int]:
        inner = os.open(self._inner, _FOLDER)
        try:
            yield inner
        finally:
            os.close(inner)

    def read(self, name: Name, limit: int, *, own: bool = False) -> bytes | None:
        """The bytes of an entry, of at most `limit`; None if it is missing or can't be used.

        `own`: only if this user or root wrote it, and nobody else may. Raises DamageError if something else
        is in its place, OSError.
        """
        try:
            with self._root.opened((INNER, shard_name(name.shard), str(name))) as (file, found):
                if found.st_size > limit or not found.st_size:
                    raise DamageError(f"{name} has {found.st_size} bytes")
                if own and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022):
                    return None
                data = _read(file, found.st_size)
                # Also if it is in the future, as after a clock that was wrong: it would never be removed.
                if abs(time.time() - found.st_mtime) > self._limits.touch_after:
                    with suppress(OSError):  # another user's, or the disk can't be written
                        os.utime(file)
                return data
        except (FileNotFoundError, NotADirectoryError):
            return None
        except SourceError as error:  # a link
            raise DamageError(str(error)) from None

    def size_of(self, name: Name) -> int | None:
        """The bytes on disk of an entry; None if there is none. Raises OSError."""
        try:
            with self._shard(name.shard) as (folder, _mode):
                return size_on_disk(os.stat(str(name), dir_fd=folder, follow_symlinks=False).st_size)
        except FileNotFoundError:
            return None

    def write(self, name: Name, data: Stored, reserve: Callable[[], bool]) -> bool:
        """Writes an entry instead of the one that may exist; whether it did. Raises OSError.

        `reserve`: counts the entry, or returns False if it does not fit. When it is called, the file has its
        size already, but no content: what is counted is found by those who count all files meanwhile.
        """
        unfinished = f"{name}.{secrets.token_hex(4)}{_UNFINISHED_END}"
        with self._shard(name.shard, make=True) as (folder, mode):
            allowed = 0o640 if name.kind is Kind.RECORD else 0o660
            file = os.open(unfinished, _NEW, 0o600, dir_fd=folder)
            try:
                try:
                    if mode & 0o070:
                        os.fchmod(file, mode & allowed | 0o600)
                    os.ftruncate(file, len(data))
                    if not reserve():
                        os.unlink(unfinished, dir_fd=folder)
                        return False
                    view = memoryview(data)
                    while view:
                        view = view[os.write(file, view) :]
                finally:
                    os.close(file)
                os.rename(unfinished, str(name), src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=folder)
                raise
        return True

    def remove(self, shard: int, name: str) -> bool:
        """Removes a file; whether it was there. Raises OSError."""
        try:
            with self._shard(shard) as (folder, _mode):
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return False
        return True

    def scan(self, shard: int) -> list[Found]:
        """The entries of a shard; removes unfinished files that are old. Raises OSError."""
        entries: list[Found] = []
        try:
            with self._shard(shard) as (folder, _mode), os.scandir(folder) as names:
                for number, each in enumerate(names):
                    if number >= self._limits.most_names:
                        break
                    with suppress(FileNotFoundError):
                        self._look_at(each, folder, entries)
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # also a link, or another user's
            return []
        return entries

    def _look_at(self, each: os.DirEntry[str], folder: int, entries: list[Found]) -> None:
        is_entry = _ENTRY.fullmatch(each.name) is not None
        if not is_entry and _UNFINISHED.fullmatch(each.name) is None:
            return
        found = each.stat(follow_symlinks=False)
        age = time.time() - found.st_mtime
        if not is_entry and abs(age) > self._limits.left_after:
            with suppress(OSError):  # another user's, a directory, or the disk can't be written
                os.unlink(each.name, dir_fd=folder)
                return
        used = found.st_mtime_ns if age > -self._limits.touch_after else 0
        entries.append(Found(used, size_on_disk(found.st_size), each.name))

    @contextmanager
    def _shard(self, shard: int, *, make: bool = False) -> Iterator[tuple[int, int]]:
        """A descriptor of a shard's directory, and its mode. Raises OSError."""
        with self._opened_inner() as inner:
            name = shard_name(shard)
            made = False
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=inner)
                    made = True
            folder = os.open(name, _FOLDER, dir_fd=inner)
            try:
                if made:
                    _let_in(folder, os.fstat(inner).st_mode & 0o2770 | 0o700)
                yield folder, os.fstat(folder).st_mode
            finally:
                os.close(folder)


def _opened_regular(name: str, flags: int, folder: int) -> int | None:
    """A descriptor of a regular file; None if something else is in its place. Raises OSError."""
    try:
        file = os.open(name, flags | _STATE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in _NOT_REGULAR:
            return None
        raise
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return None


def _let_in(folder: int, mode: int) -> None:
    """Gives a directory that this process made its mode, whatever the umask says."""
    if os.fstat(folder).st_uid == os.geteuid():
        os.fchmod(folder, mode)


def _read(file: int, size: int) -> bytes:
    data = os.read(file, size)
    while len(data) < size:
        more = os.read(file, size - len(data))
        if not more:
            raise DamageError("it became shorter while pbsfs read it")
        data += more
    return data
