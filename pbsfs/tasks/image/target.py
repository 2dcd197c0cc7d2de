"""What a copy writes to: the interface of all targets, and the block device and the stream.

The copy calls the methods from worker threads, in order and never two at once.
"""

from __future__ import annotations

import abc
import errno
import fcntl
import os
import struct
from pathlib import Path

from pbsfs.base.errors import OutputError
from pbsfs.reader.buffers import Buffer

HOLE_PIECE = 256 << 20
"""Bytes of a hole that a target zeroes at a time. Between two pieces, Ctrl-C ends the copy and the progress
moves."""

_BLKZEROOUT = 0x127F  # linux/fs.h: zero a range, without writing where the device can
_SECTOR = 512
_ZEROS = bytes(1 << 20)


class Target(abc.ABC):
    """Where an image is written to. Its methods block and raise OSError.

    `endless`: a write may block forever, if nothing reads the other end. When the copy is cancelled, such a
    write stays behind in its thread, and the descriptor stays open for it.
    """

    endless = False
    hole_piece = HOLE_PIECE
    """Bytes of a hole that one call of `hole` gets at most."""
    map_file: Path | None = None
    """The default path of a map of the copy; None for no map."""

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

    def write_zeros(self, offset: int, length: int) -> None:
        """Writes zeros to a range, as data."""
        for start in range(offset, offset + length, len(_ZEROS)):
            self.write(start, memoryview(_ZEROS)[: offset + length - start])

    @abc.abstractmethod
    def hole(self, offset: int, length: int) -> None:
        """Makes a range read as zeros."""

    def finish(self) -> None:
        """Completes the copy, all of which is written: it is then on stable storage."""
        os.fsync(self._fd)

    def abandon(self) -> None:  # noqa: B027 - most targets have nothing to remove
        """Removes what a failed copy has written, where that is possible."""

    def close(self) -> None:
        if not self.endless:
            os.close(self._fd)

    def __str__(self) -> str:
        return self._name


class BlockTarget(Target):
    """A block device. It may hold any bytes, so holes are zeroed."""

    def __init__(self, path: Path, size: int, *, force: bool, access: int = os.O_WRONLY) -> None:
        """`access`: O_WRONLY, or O_RDWR for a device that is read too."""
        if not force:
            raise OutputError(f"{path} is a block device; use --force to overwrite all of it")
        # O_EXCL: the kernel refuses a device that is mounted or otherwise in use.
        super().__init__(os.open(path, access | os.O_EXCL | os.O_CLOEXEC), str(path))
        self.capacity = os.lseek(self._fd, 0, os.SEEK_END)
        if self.capacity < size:
            os.close(self._fd)
            raise OutputError(
                f"{path} has {self.capacity} bytes, the image needs {size}; name a larger device"
            )

    def hole(self, offset: int, length: int) -> None:
        if offset % _SECTOR == 0 and length % _SECTOR == 0:
            try:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("@QQ", offset, length))
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise
        self.write_zeros(offset, length)


class StreamTarget(Target):
    """A pipe, terminal or character device: everything is written, in order."""

    endless = True

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def hole(self, offset: int, length: int) -> None:
        self.write_zeros(offset, length)

    def finish(self) -> None:
        pass
