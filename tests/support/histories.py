"""Random histories of a mounted file system: what programs do to it, copied at moments in between.

For tests that compare a reader of journals with the kernel. A history is a kind of file system and a number:
both seed the operations, so that one that failed can be repeated alone. Only the kernel's own threads, which
write in the background, differ from run to run: a test that fails keeps its image.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.truth import fields_at, names_below

_GOING_DOWN = 0x8004587D  # XFS_IOC_GOINGDOWN, and EXT4_IOC_SHUTDOWN
_FLUSH_LOG, _DROP_LOG = 1, 2
_CLONE_RANGE = 0x4020940D  # FICLONERANGE
_KEEP_SIZE, _PUNCH, _COLLAPSE, _ZERO, _INSERT, _UNSHARE = 1, 2, 8, 16, 32, 64
_FALLOCATE = (0, _KEEP_SIZE, _PUNCH | _KEEP_SIZE, _COLLAPSE, _ZERO, _ZERO | _KEEP_SIZE, _INSERT, _UNSHARE)
_EXCHANGE, _WHITEOUT = 2, 4
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def mounted(image: Path, where: Path, kind: str, options: str) -> Iterator[str]:
    """The kernel's mount of an image, whose journal it replays. Gives the loop device's name, `loop7`."""
    where.mkdir(exist_ok=True)
    loop = run("losetup", "--find", "--show", image)
    try:
        run("mount", "-t", kind, "-o", options or "defaults", loop, where)
        try:
            yield os.path.basename(loop)
        finally:
            run("umount", where)
    finally:
        run("losetup", "--detach", loop)


def shown(image: Path, where: Path, kind: str) -> dict[bytes, dict[str, Any]]:
    """All entries of a copy with every field, as the kernel shows them after it has replayed the journal."""
    with mounted(image, where, kind, "nouuid" if kind == "xfs" else ""):  # it is mounted twice
        top = os.fsencode(where)
        return {b"": fields_at(top)} | {
            path: fields_at(os.path.join(top, path)) for path in names_below(where)
        }


def copied(image: Path, loop: str, copy: Path) -> Path:
    """A copy of a mounted image as it was at one moment: one during which the kernel wrote nothing to it."""
    for _ in range(1000):
        before = _written(loop)
        run("cp", "--sparse=always", image, copy)
        if before == _written(loop) and not before[1]:
            return copy
    raise AssertionError(f"{loop} is written all the time")


def _written(loop: str) -> tuple[str, int]:
    """The writes that a device completed, and the requests that it works on."""
    values = Path("/sys/block", loop, "stat").read_text(encoding="ascii").split()
    return values[4], int(values[8])


class History:
    """Operations below a directory: each is tried, and those that the file system refuses change nothing.

    `heavy`: with more data and larger directories, so that the journal goes round.
    """

    def __init__(self, top: Path, chance: random.Random, *, heavy: bool = False) -> None:
        self._top = os.fsencode(top)
        self._chance = chance
        self._heavy = heavy
        self._directories = [self._top]
        self._files: list[bytes] = []
        self._open: list[int] = []
        self._count = 0
        self._choices: list[Callable[[], None]] = [
            *[self._create] * 5,
            *[self._write] * 5,
            *[self._fallocate] * 3,
            *[self._rename] * 3,
            *[self._remove] * 4,
            *[self._xattr] * 3,
            *[self._attributes] * 3,
            *[self._link] * 2,
            self._truncate,
            self._crowd,
            self._clear,
            self._clone,
            self._orphan,
            self._flush,
        ]

    def go(self, count: int) -> None:
        for _ in range(count):
            try:
                self._chance.choice(self._choices)()
            except OSError as error:
                if error.errno in (errno.EIO, errno.ESHUTDOWN):
                    raise

    def sync(self, *, everything: bool = False) -> None:
        """Has what was done committed to the journal; `everything`: written to its place too."""
        descriptor = os.open(self._top, os.O_RDONLY)
        try:
            if everything:
                _libc.syncfs(descriptor)
            else:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def shut_down(self, flags: int) -> None:
        descriptor = os.open(self._top, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _GOING_DOWN, struct.pack("I", flags))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """What was removed while it was open goes."""
        while self._open:
            with suppress(OSError):
                os.close(self._open.pop())

    # --- operations

    def _create(self) -> None:
        path = self._new()
        if self._chance.random() < 0.25:
            os.mkdir(path)
            self._directories.append(path)
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(path)
        try:
            os.write(descriptor, self._data(self._size()))
        finally:
            os.close(descriptor)

    def _write(self) -> None:
        with self._opened() as descriptor:
            size = os.fstat(descriptor).st_size
            for _ in range(self._chance.choice((1, 1, 3, 20))):
                start = self._chance.choice((0, size, self._chance.randrange(size + 1), self._size() * 3))
                os.pwrite(descriptor, self._data(self._size()), start)
            if self._chance.random() < 0.4:
                os.fsync(descriptor)

    def _truncate(self) -> None:
        with self._opened() as descriptor:
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, self._chance.choice((0, size // 2, size + self._size())))

    def _fallocate(self) -> None:
        with self._opened() as descriptor:
            unit = self._chance.choice((1, 1024, 4096, 65536))
            start, size = unit * self._chance.randrange(20), unit * self._chance.randrange(1, 20)
            mode = self._chance.choice(_FALLOCATE)
            if _libc.fallocate(descriptor, mode, ctypes.c_int64(start), ctypes.c_int64(size)):
                raise OSError(ctypes.get_errno(), "fallocate")

    def _rename(self) -> None:
        old = self._any([*self._files, *self._directories[1:]])
        flags = self._chance.choice((0, 0, 0, _EXCHANGE, _WHITEOUT))
        is_there = flags == _EXCHANGE or self._chance.random() < 0.2
        new = self._any(self._files) if is_there else self._new()
        is_directory = old in self._directories
        if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flags):
            raise OSError(ctypes.get_errno(), "rename")
        if flags == _EXCHANGE and is_directory:
            self._forget(old)  # it is a file now, and the other a directory: neither is used again
            self._forget(new)
            return
        if flags == _EXCHANGE:
            return
        known = self._directories if is_directory else self._files
        self._forget(old)
        if new not in known:
            known.append(new)

    def _remove(self) -> None:
        if self._chance.random() < 0.2 and len(self._directories) > 1:
            path = self._any(self._directories[1:])
            os.rmdir(path)
            self._forget(path)
            return
        path = self._any(self._files)
        os.unlink(path)
        self._files.remove(path)

    def _xattr(self) -> None:
        path = self._chance.choice([*self._files, *self._directories])
        name = self._chance.choice(("user", "trusted", "security")) + f".n{self._chance.randrange(8)}"
        if self._chance.random() < 0.3:
            os.removexattr(path, name, follow_symlinks=False)
            return
        if self._chance.random() < 0.15:
            mode = 0o7 & self._chance.randrange(8)
            people = ((1, mode, -1), (2, 6, 1000), (4, 5, -1), (16, 7, -1), (32, 4, -1))
            acl = b"".join(struct.pack("<HHi", *person) for person in people)
            kind = "default" if path in self._directories else "access"
            os.setxattr(path, f"system.posix_acl_{kind}", struct.pack("<I", 2) + acl)
            return
        size = self._chance.choice((0, 1, 30, 150, 700, 3000, 20_000))
        os.setxattr(path, name, self._chance.randbytes(size), follow_symlinks=False)

    def _attributes(self) -> None:
        path = self._chance.choice([*self._files, *self._directories])
        if not os.path.islink(path):
            os.chmod(path, self._chance.randrange(0o10000))
        os.chown(
            path, self._chance.randrange(1 << 31), self._chance.randrange(1 << 17), follow_symlinks=False
        )
        time = self._chance.randrange(-(1 << 31) * 10**9, (1 << 33) * 10**9)
        os.utime(path, ns=(time, time), follow_symlinks=False)

    def _link(self) -> None:
        path = self._new()
        kind = self._chance.randrange(4)
        if kind == 0:
            os.link(self._any(self._files), path, follow_symlinks=False)
        elif kind == 1:
            device = os.makedev(self._chance.randrange(4096), self._chance.randrange(1 << 18))
            os.mknod(path, self._chance.choice((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)) | 0o600, device)
        else:
            os.symlink("t" * self._chance.choice((1, 20, 59, 60, 150, 300, 900)), path)
        self._files.append(path)

    def _crowd(self) -> None:
        """Many entries of one directory."""
        inside = self._chance.choice(self._directories)
        for _ in range(self._chance.choice((20, 100, 600 if self._heavy else 200))):
            self._files.append(self._new(inside))
            os.close(os.open(self._files[-1], os.O_WRONLY | os.O_CREAT, 0o600))

    def _clear(self) -> None:
        """Most entries of one directory go, so that inodes and blocks are free and are used again."""
        inside = self._chance.choice(self._directories) + b"/"
        here = [path for path in self._files if path.startswith(inside)]
        for path in self._chance.sample(here, len(here) * 3 // 4):
            self._files.remove(path)
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)

    def _clone(self) -> None:
        with self._opened() as source, self._opened() as target:
            unit = self._chance.choice((0, 4096))
            start = unit * self._chance.randrange(10)
            fcntl.ioctl(target, _CLONE_RANGE, struct.pack("qQQQ", source, start, unit * 3, start))

    def _orphan(self) -> None:
        """A file that has no name any more, and is still open."""
        path = self._any(self._files)
        self._open.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW))
        os.unlink(path)
        self._files.remove(path)
        if len(self._open) > 5:
            os.close(self._open.pop(0))

    def _flush(self) -> None:
        self.sync(everything=self._chance.random() < 0.3)

    # --- what they work on

    @contextmanager
    def _opened(self) -> Iterator[int]:
        path = self._any(self._files)
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "not a file")
        descriptor = os.open(path, os.O_RDWR)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _any(self, paths: list[bytes]) -> bytes:
        if not paths:
            raise OSError(errno.ENOENT, "there is none")
        return self._chance.choice(paths)

    def _new(self, inside: bytes | None = None) -> bytes:
        self._count += 1
        name = b"%d-" % self._count + b"n" * self._chance.choice((0, 5, 30, 100, 240))
        return os.path.join(inside or self._chance.choice(self._directories), name)

    def _size(self) -> int:
        return self._chance.choice((0, 1, 50, 130, 1000, 4096, 10_000, 70_000, 400_000 if self._heavy else 5))

    def _data(self, size: int) -> bytes:
        head = self._chance.choice((b"", b"\xc0\x3b\x39\x98"))  # what a journal has to escape
        return (head + self._chance.randbytes(size))[:size]

    def _forget(self, path: bytes) -> None:
        for known in (self._files, self._directories):
            known[:] = [other for other in known if other != path and not other.startswith(path + b"/")]


def moments(
    image: Path, where: Path, kind: str, options: str, chance: random.Random, *, heavy: bool = False
) -> Generator[tuple[str, Path], None, None]:
    """Copies of an image at random moments of a history: while it is mounted, and at the end either so or
    when the file system has been shut down by force, for half of these in the middle of operations.

    Gives each with what it is, before the next is made.
    """
    end = chance.choice(("copied", "flushed", "dropped", "flushed at work", "dropped at work"))
    copy = image.with_name("copy")
    with (
        mounted(image, where, kind, options) as loop,
        closing(History(where, chance, heavy=heavy)) as history,
    ):
        for number in range(chance.choice((1, 2))):
            history.go(chance.choice((3, 30, 150)))
            if chance.random() < 0.7:
                history.sync()
                history.go(chance.choice((0, 5, 40)))
            yield f"copied after {number} others", copied(image, loop, copy)
        history.go(chance.choice((10, 100)))
        if end == "copied":
            yield end, copied(image, loop, copy)
        else:
            flags = _FLUSH_LOG if end.startswith("flushed") else _DROP_LOG
            worker = threading.Thread(target=_until_it_fails, args=(history,))
            if end.endswith("work"):
                worker.start()
                history.sync()
            history.shut_down(flags)
            if worker.ident:
                worker.join()
    if end != "copied":
        run("cp", "--sparse=always", image, copy)
        yield end, copy


def _until_it_fails(history: History) -> None:
    with suppress(OSError):
        while True:
            history.go(10)
