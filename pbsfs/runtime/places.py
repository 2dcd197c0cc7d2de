"""Places in the file system that belong to this user: for settings, for a log, for what is temporary.

Any of them may be missing: services run without a home, containers with a read-only root and users that no
passwd file names. Synchronous.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pbsfs.base.errors import HelperError

MAX_PRIVATE_PATH = 80
"""Bytes of the path of a private directory: with the name of a socket in it, 107 are the most (unix(7))."""


def config_home(environment: Mapping[str, str]) -> Path | None:
    """Where programs keep their settings (XDG base directory specification); None without a home."""
    return _base("XDG_CONFIG_HOME", ".config", environment)


def state_home(environment: Mapping[str, str]) -> Path | None:
    """The same for logs and other state; None without a home directory that exists."""
    home = _home(environment)
    if environment.get("XDG_STATE_HOME", "").startswith("/") or (home is not None and home.is_dir()):
        return _base("XDG_STATE_HOME", ".local/state", environment)
    return None


def runtime_home(environment: Mapping[str, str]) -> Path | None:
    """Where programs keep what lasts until the user logs out; None without such a directory.

    Programs that `su` or `sudo` start lack XDG_RUNTIME_DIR, so the place is that of systemd then.
    """
    named = environment.get("XDG_RUNTIME_DIR", "")
    if named.startswith("/"):
        return Path(named)
    usual = Path(f"/run/user/{os.geteuid()}")
    return usual if usual.is_dir() else None


def _base(variable: str, below_home: str, environment: Mapping[str, str]) -> Path | None:
    named = environment.get(variable, "")
    if named.startswith("/"):
        return Path(named)
    home = _home(environment)
    return None if home is None else home / below_home


def _home(environment: Mapping[str, str]) -> Path | None:
    if environment.get("HOME", "").startswith("/"):
        return Path(environment["HOME"])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that only this user can enter; removed at the end. Raises HelperError.

    Tried in this order: XDG_RUNTIME_DIR, TMPDIR, /tmp, /run, /dev/shm; never the current directory.
    """
    import shutil  # noqa: PLC0415 - few commands need one
    import tempfile  # noqa: PLC0415

    directory = _make_private(tempfile.mkdtemp)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _make_private(make: Callable[..., str]) -> Path:
    named = [os.environ.get(name, "") for name in ("XDG_RUNTIME_DIR", "TMPDIR")]
    bases = dict.fromkeys([*(base for base in named if base.startswith("/")), "/tmp", "/run", "/dev/shm"])  # noqa: S108
    for base in bases:
        if len(os.fsencode(base)) + len("/pbsfs-xxxxxxxx") <= MAX_PRIVATE_PATH:
            with suppress(OSError):
                return Path(make(prefix="pbsfs-", dir=base))
    raise HelperError(
        f"no place for a private directory: cannot write to {', '.join(bases)}; "
        "set TMPDIR to a directory that can be written, with a short path"
    )
