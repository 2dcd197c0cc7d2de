"""Settings: from options and the environment to what the other rooms take.

Pure but for `open_source`, which looks at the source that was named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pbsfs.errors import UsageError
from pbsfs.sources.base import Source
from pbsfs.sources.directory import DirectorySource

REPOSITORY_VARIABLE = "PBS_REPOSITORY"

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

MIN_CACHE_SIZE = 32 << 20
"""Bytes; two chunks of the largest size that exists. With less, no chunk would stay for its second read."""


def open_source(repository: str | None, datastore_dir: Path | None) -> Source:
    """The source that the options name, or else the environment. Raises UsageError, SourceError."""
    if repository is not None and datastore_dir is not None:
        raise UsageError("--repository and --datastore-dir exclude each other")
    if datastore_dir is not None:
        return DirectorySource(Path(os.path.abspath(datastore_dir)))
    if repository or os.environ.get(REPOSITORY_VARIABLE):
        raise UsageError(
            "reading from a server (--repository, PBS_REPOSITORY) is not yet possible; "
            "use --datastore-dir with a datastore's directory"
        )
    raise UsageError("no source: name a datastore's directory with --datastore-dir DIR")


def parse_size(text: str) -> int:
    """`256M`, `1G`, `65536` in bytes (powers of 1024). Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or len(match[1]) > 18:
        raise UsageError(f"'{text}' is not a size (they look like 256M or 1G)")
    return int(match[1]) * _UNITS[match[2].lower()]


def parse_cache_size(text: str) -> int:
    """A size that the chunk cache can work with. Raises UsageError."""
    size = parse_size(text)
    if size < MIN_CACHE_SIZE:
        raise UsageError(f"a cache of {text} is too small; the least is {MIN_CACHE_SIZE >> 20}M")
    return size


_PASSED_ON = frozenset(
    ("allow_other", "allow_root", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime")
)
_FULFILLED = frozenset(("ro", "default_permissions", "defaults", "auto", "noauto", "user", "users", "nouser"))
_FULFILLED_ALSO = frozenset(
    ("_netdev", "nofail", "owner", "group", "noowner", "relatime", "norelatime", "async")
)


@dataclass(slots=True)
class FuseOptions:
    """What `-o` says, in the words of mount(8) and mount.fuse3(8).

    `flags` go to libfuse as they stand. `umask` 0007 gives files mode 0440 and directories 0550.
    """

    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int = 0o007
    nonempty: bool = False
    flags: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> FuseOptions:
        """From the arguments of all `-o`. Raises UsageError."""
        options = cls()
        for option in ",".join(texts).split(","):
            if option:
                options._take(option)
        return options

    def _take(self, option: str) -> None:
        name, _equals, value = option.partition("=")
        if option in _PASSED_ON:
            self.flags.add(option)
        elif option == "nonempty":
            self.nonempty = True
        elif option in ("rw", "remount"):
            raise UsageError(f"mount option {option}: backups are mounted read-only")
        elif name in ("uid", "gid"):
            setattr(self, name, _number(option, value, 10, 0xFFFFFFFE))
        elif name == "umask":
            self.umask = _number(option, value, 8, 0o777)
        elif option not in _FULFILLED | _FULFILLED_ALSO and not name.startswith(("x-", "X-", "comment")):
            raise UsageError(
                f"mount option '{option}' is not known; there are allow_other, allow_root, uid=, gid=, "
                "umask=, nonempty, and the general ones of mount(8)"
            )


def _number(option: str, value: str, base: int, most: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if not 0 <= number <= most or not value.isalnum():
        raise UsageError(
            f"mount option '{option}': not a number from 0 to {most:{'o' if base == 8 else 'd'}}"
        )
    return number
