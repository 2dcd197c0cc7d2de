"""Copies an image to where it is wanted: a file, a block device or a stream.

Reading and writing overlap: one task reads in order, with the read-ahead of an open file, and hands
over to one that writes in a worker thread. Called by `pbsfs export`.

A regular file is written under `<name>.part` and gets its name when it is complete, so that a file of
the final name is always whole. Where a symbolic link is to be overwritten, the file it points to is, as with
cp, and the part lies beside that. On failure the part is removed; what a killed process leaves is marked by
its name, and is not continued. Who writes a part holds a lock on it, so that no other export takes it for
such a left-over.
"""

from __future__ import annotations

import abc
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from pbsfs.base.errors import OutputError, UsageError
from pbsfs.reader.damage import Range
from pbsfs.reader.image import Buffer, Extent, Image

PIECE = 4 << 20
"""Bytes that are read and written at a time: one chunk of a usual image."""

HOLE_PIECE = 256 << 20
"""Bytes of a hole that a target zeroes at a time: between two, Ctrl-C works and the progress moves."""

QUEUED_PIECES = 2
"""Pieces that may wait for the writer: it has the next at hand, and memory stays small."""

_PRIVATE = 0o600
_BLKZEROOUT = 0x127F  # linux/fs.h: zero a range, by the device's own means where it has some
_SECTOR = 512
_ZEROS = bytes(1 << 20)


class Target(abc.ABC):
    """Where an image goes. Methods block and are called in order, from worker threads.

    `endless`: writing may block for ever, when nobody reads the other end. Such a write is left behind
    in its thread when copying is cancelled, and the descriptor stays open for it.
    """

    endless = False
    hole_piece = HOLE_PIECE
    """The most bytes of a hole that one call of `hole` gets."""
    map_file: Path | None = None
    """Where a map of the copy belongs, unless told otherwise."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    def write(self, offset: int, data: Buffer) -> None:
        """Writes all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            offset += written
            view = view[written:]

    @abc.abstractmethod
    def hole(self, offset: int, length: int) -> None:
        """Makes a range read as zeros."""

    def finish(self) -> None:
        """All is written: sees to it that it stays."""
        os.fsync(self._fd)

    def abandon(self) -> None:  # noqa: B027 - most targets have nothing to take back
        """Copying failed."""

    def close(self) -> None:
        if not self.endless:
            os.close(self._fd)

    def __str__(self) -> str:
        return self._name


class _FileTarget(Target):
    """A regular file: holes stay holes."""

    hole_piece = 1 << 62  # a hole takes no time, however large it is

    def __init__(self, path: Path, size: int, *, force: bool, mode: int | None) -> None:
        self.map_file = path.with_name(path.name + ".map")
        if not force:
            refuse_existing(path)
        self._path = path = _followed(path)
        self._part = path.with_name(path.name + ".part")
        self._force = force
        self._mode = _mode_of(path) if mode is None else mode
        with self._left_over():
            if not force and os.path.lexists(self._part):
                raise OutputError(_exists(self._part, "is what is left of an earlier export"))
            # Not truncated: who was killed while finishing left two names of one file, `path` and this.
            self._part.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            # Only for its owner: an image holds every file of a machine.
            super().__init__(os.open(self._part, flags, _PRIVATE), str(path))
            try:
                if self._mode != _PRIVATE:  # the owner may write it until it is complete: locking takes that
                    os.fchmod(self._fd, self._mode | _PRIVATE)
                self._lock(self._fd)
                if os.fstat(self._fd).st_nlink == 0:  # taken for a left-over before it was locked
                    raise self._in_use()
            except BaseException:
                os.close(self._fd)
                raise
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            os.close(self._fd)
            self.abandon()
            raise

    @contextmanager
    def _left_over(self) -> Iterator[None]:
        """Holds the lock on a part that is there already. Raises OutputError where that is in use."""
        try:
            # For writing: NFS gives nobody else an exclusive lock. What is no file of ours is not opened.
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
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        except OSError:  # a file system without locks
            pass

    def _in_use(self) -> OutputError:
        return OutputError(f"{self._part} is being written by another export")

    def hole(self, offset: int, length: int) -> None:
        pass  # never written, so it is one

    def finish(self) -> None:
        if self._mode != self._mode | _PRIVATE:
            os.fchmod(self._fd, self._mode)
        super().finish()
        if self._force:
            os.replace(self._part, self._path)
            return
        try:
            os.link(self._part, self._path)  # unlike a rename, does not replace what came up meanwhile
        except FileExistsError:
            raise OutputError(_exists(self._path)) from None
        except OSError:  # a file system without links
            if os.path.lexists(self._path):
                raise OutputError(_exists(self._path)) from None
            os.rename(self._part, self._path)
        else:
            os.unlink(self._part)

    def abandon(self) -> None:
        self._part.unlink(missing_ok=True)


def _mode_of(path: Path) -> int:
    """The mode of the file that is there, which overwriting keeps; 0600 for a new one."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode) & 0o777
    except OSError:
        return _PRIVATE


class _BlockTarget(Target):
    """A block device, which may hold anything: holes have to be zeroed."""

    def __init__(self, path: Path, size: int, *, force: bool) -> None:
        if not force:
            raise OutputError(f"{path} is a block device; --force overwrites what it holds")
        # O_EXCL: the kernel refuses a device that is mounted or otherwise in use.
        super().__init__(os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC), str(path))
        room = os.lseek(self._fd, 0, os.SEEK_END)
        if room < size:
            os.close(self._fd)
            raise OutputError(f"{path} has {room} bytes, the image needs {size}")

    def hole(self, offset: int, length: int) -> None:
        if offset % _SECTOR == 0 and length % _SECTOR == 0:
            try:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("@QQ", offset, length))
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise
        for start in range(offset, offset + length, len(_ZEROS)):
            self.write(start, memoryview(_ZEROS)[: offset + length - start])


class _StreamTarget(Target):
    """A pipe, terminal or character device: everything is written, in order."""

    endless = True

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def hole(self, offset: int, length: int) -> None:
        for start in range(0, length, len(_ZEROS)):
            self.write(offset + start, memoryview(_ZEROS)[: length - start])

    def finish(self) -> None:
        pass


def _followed(path: Path) -> Path:
    """The file that is at the end of a symbolic link: the link stays, and what it points to is written."""
    if not path.is_symlink():
        return path
    if not path.exists():
        raise OutputError(f"{path} is a symbolic link to nothing; remove it, or make the file it points to")
    return path.resolve()


def refuse_existing(path: Path) -> None:
    """Raises OutputError where there is something at `path`."""
    if os.path.lexists(path):
        raise OutputError(_exists(path))


def check_map_file(path: Path, target: Target, *, force: bool) -> None:
    """Raises OutputError where `write_map` could not write: before a copy is made, and not after hours."""
    if os.path.realpath(path) == os.path.realpath(str(target)):
        raise OutputError(f"{path} can't be both the copy and its map")
    if not force:
        refuse_existing(path)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = errno.EACCES if path.parent.is_dir() else errno.ENOENT
        raise OutputError(refusal(path, OSError(reason, os.strerror(reason))))


def _exists(path: Path, what: str = "exists") -> str:
    return f"{path} {what}; remove it, or overwrite it with --force"


_ACTIONS = {
    errno.EACCES: "name another place, or run pbsfs as a user with write access to it",
    errno.EPERM: "name another place, or run pbsfs as a user with write access to it",
    errno.EROFS: "name a place on a file system that is mounted for writing",
    errno.EISDIR: "remove it, or name another file",
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some space, or name another place",
    errno.EFBIG: "name a place on a file system that takes files of this size",
    errno.EBUSY: "unmount it first, or name another device",
    errno.EIO: "look for the reason in the kernel's log, or name another place",
}


def refusal(place: Path | Target, error: OSError) -> str:
    """The text of an OutputError: what the system said when `place` was to be written, and what to do."""
    action = _ACTIONS.get(error.errno or 0)
    parent = Path(str(place)).parent
    if error.errno == errno.ENOENT and not parent.exists():
        action = f"there is no directory {parent}: make it with mkdir"
    return f"cannot write {place}: {error.strerror}" + (f"; {action}" if action else "")


@contextmanager
def open_target(
    dest: Path, name: str, size: int, *, force: bool, mode: int | None = None
) -> Iterator[Target]:
    """The target for `size` bytes at `dest`; `name` is the file's name where `dest` is a directory.

    `mode`: of a new file, once it is complete; None for 0600, or for that of the file that is overwritten.

    Leaving it without an error completes the target, leaving it with one removes what is partial.
    Raises UsageError for a mode where no file is made, and OutputError for what can't be written; errors of
    the system in the body become one too.
    """
    try:
        target = _target(dest, name, size, force=force, mode=mode)
    except OSError as error:
        raise OutputError(refusal(dest, error)) from None
    try:
        yield target
        target.finish()
    except BrokenPipeError:
        target.abandon()
        raise  # who reads has seen enough; not an error that needs words
    except OSError as error:
        target.abandon()
        raise OutputError(refusal(target, error)) from None
    except BaseException:
        target.abandon()
        raise
    finally:
        target.close()


def _target(dest: Path, name: str, size: int, *, force: bool, mode: int | None) -> Target:
    if str(dest) == "-":
        if mode is not None:
            raise UsageError("standard output: --mode goes with a new file; leave it out")
        if os.isatty(1):
            raise OutputError("standard output is a terminal; send it to a file or program")
        return _StreamTarget(1, "standard output")
    if dest.is_dir():
        dest /= name
    kind = dest.stat().st_mode if dest.exists() else stat.S_IFREG
    if mode is not None and not stat.S_ISREG(kind):
        raise UsageError(f"{dest}: --mode goes with a new file; leave it out")
    if stat.S_ISBLK(kind):
        return _BlockTarget(dest, size, force=force)
    if stat.S_ISREG(kind):
        return _FileTarget(dest, size, force=force, mode=mode)
    return _StreamTarget(_open_stream(dest, kind), str(dest))


def _open_stream(dest: Path, mode: int) -> int:
    """A device or named pipe, opened without waiting for a reader: no signal could end that wait."""
    try:
        fd = os.open(dest, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO and stat.S_ISFIFO(mode):
            raise OutputError(f"nobody reads from {dest}; start what is to read it first") from None
        raise
    os.set_blocking(fd, True)
    return fd


async def copy_image(image: Image, target: Target, advance: Callable[[int], None]) -> None:
    """Writes all of `image` to `target`; `advance` is told of the bytes that are done.

    Raises DamageError and SourceError from reading, OSError from writing.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        sending, receiving = trio.open_memory_channel[tuple[Extent, Buffer]](QUEUED_PIECES)

        async def read() -> None:
            handle = image.handle(whole=True)
            try:
                with sending:
                    for extent in _pieces(image, target.hole_piece):
                        data: Buffer = b""
                        if extent.hole:
                            handle.skip_hole(extent.offset + extent.length)
                        else:
                            data = await handle.read(extent.offset, extent.length)
                        await sending.send((extent, data))
            finally:
                handle.close()

        async def write() -> None:
            with receiving:  # closed before anybody runs, or `read` could be the one to report a failure
                async for extent, data in receiving:
                    await trio.to_thread.run_sync(
                        _put, target, extent, data, abandon_on_cancel=target.endless
                    )
                    advance(extent.length)

        async def guarded(task: Callable[[], Awaitable[None]]) -> None:
            nonlocal failure
            try:
                await task()
            except Exception as error:  # raised outside, so that the nursery does not wrap it in a group
                failure = failure or error
                nursery.cancel_scope.cancel()

        nursery.start_soon(guarded, read)
        nursery.start_soon(guarded, write)
    if failure is not None:
        raise failure


async def copy_blob(data: bytes, target: Target) -> None:
    """Writes a small file's content to `target`. Raises OSError."""
    await trio.to_thread.run_sync(target.write, 0, data, abandon_on_cancel=target.endless)


def _pieces(image: Image, hole_piece: int) -> Iterator[Extent]:
    """The image's extents, data cut at multiples of `PIECE`, holes at multiples of `hole_piece` bytes."""
    for extent in image.extents(0, image.size):
        piece = hole_piece if extent.hole else PIECE
        offset, end = extent.offset, extent.offset + extent.length
        while offset < end:
            stop = min(end, offset - offset % piece + piece)
            yield Extent(offset, stop - offset, extent.hole)
            offset = stop


def _put(target: Target, extent: Extent, data: Buffer) -> None:
    if extent.hole:
        target.hole(extent.offset, extent.length)
    else:
        target.write(extent.offset, data)


def write_map(path: Path, size: int, zeros: list[Range], *, force: bool) -> None:
    """Writes which ranges of a copy of `size` bytes are good, as a map file of GNU ddrescue.

    `zeros`: the others, in order. So ddrescue can fill them from another copy. Raises OutputError.
    """
    lines = ["# Mapfile. Written by pbsfs", "# current_pos  current_status  current_pass"]
    lines += [f"0x{size:08X}     +               1", "#      pos        size  status"]
    done = 0
    for zero in [*zeros, Range(size, 0)]:
        if zero.offset > done:
            lines.append(f"0x{done:08X}  0x{zero.offset - done:08X}  +")
        if zero.length:
            lines.append(f"0x{zero.offset:08X}  0x{zero.length:08X}  -")
        done = zero.offset + zero.length
    try:
        with open(path, "w" if force else "x", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise OutputError(_exists(path)) from None
    except OSError as error:
        raise OutputError(refusal(path, error)) from None
