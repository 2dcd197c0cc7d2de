"""The file of known fingerprints: certificates that the user has accepted, one line `host fingerprint` each.

It is the file of proxmox-backup-client, which reads and writes it too. `pbsfs.access.trust` calls this
module. Synchronous; several processes may write at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pbsfs.base.errors import UsageError
from pbsfs.sources.http.tls import parse_fingerprint, show_fingerprint

MAX_SIZE = 1 << 20
"""Bytes of the file: some 8000 hosts."""


def fingerprints_file(config_home: Path) -> Path:
    """The path of the file in a user's directory of settings (`~/.config`)."""
    return config_home / "proxmox-backup" / "fingerprints"


def known_fingerprint(file: Path, host: str) -> str | None:
    """The accepted fingerprint of `host`: 64 hex digits; None where the file has none or can't be read."""
    try:
        text = _read(file)[0]
    except OSError:
        return None
    for line in text.split("\n"):
        words = line.split()
        if len(words) == 2 and words[0] in _names_of(host):
            with contextlib.suppress(UsageError):
                return parse_fingerprint(words[1])
    return None


def remember_fingerprint(file: Path, host: str, fingerprint: str) -> None:
    """Replaces what the file has for `host`; `fingerprint`: 64 hex digits.

    The file keeps its mode and its owner; of a symbolic link, the file that it points to is written. A
    crash leaves the old file or the new one. Raises UsageError where that is not possible.
    """
    try:
        target = Path(os.path.realpath(file))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            _replace(target, host, fingerprint)
    except OSError as error:
        raise UsageError(f"cannot remember the fingerprint in {file}: {error.strerror}") from None


def _replace(target: Path, host: str, fingerprint: str) -> None:
    old: os.stat_result | None = None
    text = ""
    with contextlib.suppress(FileNotFoundError):
        text, old = _read(target)
        if old.st_size > MAX_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    names = _names_of(host)
    kept = [line for line in text.split("\n") if line.split() and line.split()[0] not in names]
    new = target.with_name(f"{target.name}.new")
    new.unlink(missing_ok=True)  # a crash left it there: the lock excludes other writers
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if old is None else 0o600)
    try:
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            if old is not None:
                made = os.fstat(fd)
                if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
                    os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, stat.S_IMODE(old.st_mode))
            file.writelines(f"{line}\n" for line in [*kept, f"{names[0]} {show_fingerprint(fingerprint)}"])
            file.flush()
            os.fsync(fd)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _read(file: Path) -> tuple[str, os.stat_result]:
    """At most the first MAX_SIZE bytes, and the file's status. Raises OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # does not wait at a named pipe
    with open(fd, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return lines.read(MAX_SIZE), status


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Excludes other writers of pbsfs.

    The lock is on the directory: replacing the file would leave a lock on the old one.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _names_of(host: str) -> tuple[str, ...]:
    """The names of a host in the file; proxmox-backup-client writes IPv6 addresses in brackets."""
    return (f"[{host}]", host) if ":" in host else (host,)
