"""Opens the target that a destination of `pbsfs export` names, and completes or removes what is written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pbsfs.base.errors import OutputError, UsageError
from pbsfs.tasks.image.compared import ExistingDevice, ExistingFile
from pbsfs.tasks.image.file_target import FileTarget
from pbsfs.tasks.image.refusals import refusal
from pbsfs.tasks.image.target import BlockTarget, StreamTarget, Target


@contextmanager
def open_target(
    dest: Path, name: str, size: int, *, force: bool, mode: int | None = None
) -> Iterator[Target]:
    """The target for `size` bytes at `dest`; `name` is the file's name if `dest` is a directory.

    `mode`: of the complete file; None for the mode of the file that is overwritten, or 0600 for a new one.

    Without an error, the end of the context completes the target; an error removes the partial copy.
    Raises UsageError for a mode where `dest` is not a file, and OutputError where it can't be written, also
    for an OSError of the body.
    """
    try:
        target = _target(dest, name, size, force=force, mode=mode)
    except OSError as error:
        raise OutputError(refusal(dest, error)) from None
    with _completed(target):
        yield target


@contextmanager
def open_existing(
    dest: Path, name: str, size: int, *, force: bool = False, only_compared: bool = False
) -> Iterator[ExistingFile | ExistingDevice]:
    """The file or block device at `dest`, to turn it into an image of `size` bytes; else as `open_target`.

    `force`, `only_compared`: as `ExistingFile` has them.
    """
    try:
        target = _existing(dest, name, size, force=force, only_compared=only_compared)
    except OSError as error:
        raise OutputError(refusal(dest, error)) from None
    with _completed(target):
        yield target


@contextmanager
def open_resumed(
    dest: Path, name: str, size: int, *, force: bool, mode: int | None = None
) -> Iterator[FileTarget]:
    """A file as `open_target` opens it, which continues the part of an earlier copy, and leaves its own."""
    try:
        if str(dest) != "-" and dest.is_dir():
            dest /= name
        if str(dest) == "-" or (dest.exists() and not dest.is_file()):
            raise UsageError(f"{dest}: --resume requires a file; for a block device, use --in-place")
        target = FileTarget(dest, size, force=force, mode=mode, resume=True)
    except OSError as error:
        raise OutputError(refusal(dest, error)) from None
    with _completed(target):
        yield target


@contextmanager
def _completed(target: Target) -> Iterator[None]:
    try:
        yield
        target.finish()
    except BrokenPipeError:
        target.abandon()
        raise  # the reader needs no more of it; not an error to report
    except OSError as error:
        target.abandon()
        raise OutputError(refusal(str(target), error)) from None
    except BaseException:
        target.abandon()
        raise
    finally:
        target.close()


def _target(dest: Path, name: str, size: int, *, force: bool, mode: int | None) -> Target:
    if str(dest) == "-":
        if mode is not None:
            raise UsageError("standard output: --mode requires a file; leave it out")
        if os.isatty(1):
            raise OutputError("standard output is a terminal; redirect it to a file or program")
        return StreamTarget(1, "standard output")
    if dest.is_dir():
        dest /= name
    kind = dest.stat().st_mode if dest.exists() else stat.S_IFREG
    if mode is not None and not stat.S_ISREG(kind):
        raise UsageError(f"{dest}: --mode requires a file; leave it out")
    if stat.S_ISBLK(kind):
        return BlockTarget(dest, size, force=force)
    if stat.S_ISREG(kind):
        return FileTarget(dest, size, force=force, mode=mode)
    return StreamTarget(_open_stream(dest, kind), str(dest))


def _existing(
    dest: Path, name: str, size: int, *, force: bool, only_compared: bool
) -> ExistingFile | ExistingDevice:
    if str(dest) == "-":
        raise UsageError("standard output: --in-place requires a file or block device; name one")
    if dest.is_dir():
        dest /= name
    if not dest.exists():
        raise OutputError(f"{dest} does not exist, and --in-place changes what exists; leave out --in-place")
    kind = dest.stat().st_mode
    if stat.S_ISBLK(kind):
        return ExistingDevice(dest, size, force=force)
    if stat.S_ISREG(kind):
        return ExistingFile(dest, size, force=force, only_compared=only_compared)
    raise OutputError(f"{dest}: --in-place requires a file or block device; name one")


def _open_stream(dest: Path, mode: int) -> int:
    """Opens a device or named pipe without waiting for a reader, as no signal could end that wait."""
    try:
        fd = os.open(dest, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO and stat.S_ISFIFO(mode):
            raise OutputError(f"nothing reads from {dest}; start the program that reads it first") from None
        raise
    os.set_blocking(fd, True)
    return fd
