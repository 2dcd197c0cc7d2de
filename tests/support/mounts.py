"""Mounts made by the real program, which are gone when a test ends, whatever happens in it.

A mount knows its own mount path and process, and nothing else is ever unmounted or killed. A test
that hangs in a mount is set free by the kernel when the mount's process is killed, which happens
`LIFETIME` after the test began, or the mount.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from pbsfs.fuse.mountpoint import mounted_at, mounts
from tests.support.needs import need_fuse
from tests.support.program import environment, error_of, pbsfs
from tests.support.waiting import wait_until
from tests.support.watchdog import watched

LIFETIME = 60.0
"""Seconds after which a mount's process is killed, so that no test hangs for ever. A test that starts gives
mounts that live longer, as those of a module do, their time again: see `watchdog`."""

SOON = ("--refresh", "0.1")
"""Options of a mount that soon shows what changed."""


class Mounted:
    """A mount. `pid`: the process that serves it."""

    def __init__(self, place: Path, log: Path, pid: int) -> None:
        self.place = place
        self.pid = pid
        self._log = log
        self._log_is_looked_at = False

    def __truediv__(self, path: str) -> Path:
        return self.place / path

    def log_lines(self) -> list[str]:
        """What was logged so far. A test that never asks says that nothing is logged."""
        self._log_is_looked_at = True
        return self._log.read_text().splitlines()

    def is_mounted(self) -> bool:
        return mounted_at(self.place) is not None

    def is_running(self) -> bool:
        return is_running(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if it is still there."""
        if self.is_running():
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """Whether the mount is gone, and its process too."""
        return not self.is_mounted() and not self.is_running()

    def is_dead(self) -> bool:
        """Whether the process is gone and what it left answers so: the kernel lets go a moment later."""
        if self.is_running():
            return False
        try:
            os.stat(self.place)
        except OSError:
            return True
        return False

    def check_log(self) -> None:
        text = self._log.read_text()
        assert self._log_is_looked_at or not text, f"logged unexpectedly: {text}"
        assert "Traceback" not in text, text


@contextmanager
def mounted(
    source: Path | dict[str, str],
    place: Path,
    *options: str,
    lifetime: float = LIFETIME,
    files: bool = False,
) -> Iterator[Mounted]:
    """Mounts a datastore at `place`, which is made, and unmounts it again.

    `source`: its directory, or the environment that tells which server has it. `files`: whether the mount
    shows `files`, which would have tests that walk through a mount open all archives.
    """
    options = options if files else (*options, "-o", "nofiles")
    need_fuse()
    place.mkdir(exist_ok=True)
    log = place.with_name(f"{place.name}.log")
    if isinstance(source, Path):
        options, told = ("--datastore-dir", str(source), *options), environment()
    else:
        told = source
    with cleaned_up(place):
        done = pbsfs("mount", "--log-file", log, *options, place, env=told)
        said = (done.returncode, done.stdout, done.stderr)
        assert said == (0, "", ""), f"not mounted in silence: {said}"
        (pid,) = serving(place)
        mount = Mounted(place, log, pid)
        with watched(lifetime, lambda: mount.signal(signal.SIGKILL)):
            yield mount
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_running(), "the mount's process ends")
            mount.check_log()


@contextmanager
def cleaned_up(place: Path) -> Iterator[None]:
    """Sees to it that nothing more is mounted at `place` afterwards, and no process serves it."""

    def count() -> int:
        return sum(mount.path == place for mount in mounts())

    before = count()
    try:
        yield
    finally:
        for pid in serving(place):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not serving(place), f"no process serves {place}")
        while count() > before:
            command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            subprocess.run([*command, place], check=True, timeout=30)


def refusal(place: Path, *options: str | Path) -> str:
    """The reason why `pbsfs mount OPTIONS place` refuses a mount point, with the status it has to have."""
    # What is mounted there already is somebody else's to clean up.
    with nullcontext() if mounted_at(place) else cleaned_up(place):
        return error_of(pbsfs("mount", "--log-file", os.devnull, *options, place), 7)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor; closing it may fail, as it does where the mount is gone meanwhile."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """One read of a file that is opened for it, and that the kernel has nothing of."""
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, size, offset)


def fails_with(number: int, action: Callable[[], object]) -> bool:
    """Whether `action` fails with this errno; another one is a failure of the test."""
    try:
        action()
    except OSError as error:
        if error.errno != number:
            raise AssertionError(f"{error}, expected {errno.errorcode[number]}") from error
        return True
    return False


def is_running(pid: int) -> bool:
    """Whether there is a process `pid` that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_with(*words: str | Path) -> list[int]:
    """The running processes whose command lines have all of `words`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if {os.fsencode(word) for word in words} <= set(line) and is_running(int(directory.name)):
            found.append(int(directory.name))
    return found


def serving(place: Path) -> list[int]:
    """The processes that serve a mount at `place`, by their command lines."""
    return processes_with("pbsfs", "--foreground", place)


def is_free(place: Path) -> bool:
    """Whether nothing is mounted at `place`, and no process is about to."""
    return not serving(place) and not mounted_at(place)
