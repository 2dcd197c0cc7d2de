"""The mount options of `-o`, in the words of mount(8) and mount.fuse3(8).

Used by `pbsfs mount`. Synchronous; imports nothing of pyfuse3, which the waiting process does without.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from pbsfs.base.errors import UsageError
from pbsfs.base.permissions import DEFAULT_UMASK

_PASSED_ON = frozenset(("allow_other", "allow_root", "nosuid", "nodev", "noexec", "exec", "noatime", "atime"))
_FULFILLED = frozenset(("ro", "default_permissions", "defaults", "auto", "noauto", "user", "users", "nouser"))
_FULFILLED_ALSO = frozenset(
    (
        *("_netdev", "nofail", "owner", "group", "noowner", "async", "silent", "loud"),
        *("relatime", "norelatime", "strictatime", "nodiratime", "diratime", "lazytime", "nolazytime"),
    )
)
_OPTION = re.compile(r"(?:[^,\\]|\\.|\\$)+")  # as in libfuse, a backslash keeps a comma


@dataclass(slots=True)
class FuseOptions:
    """What `-o` says, in the words of mount(8) and mount.fuse3(8).

    `flags` go to libfuse as they stand. `umask` 0007 gives files mode 0440 and directories 0550. `as_stored`:
    files in archives have the owner and permissions that are stored with them (by default where root mounts).
    `files`: whether the mount shows them. `safe_names`: whether it lists snapshots without colons.
    `fsname`: the source's name in the mount table; None for the usual.
    """

    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int = DEFAULT_UMASK
    nonempty: bool = False
    flags: set[str] = field(default_factory=set)
    as_stored: bool = field(default_factory=lambda: os.geteuid() == 0)
    files: bool = True
    safe_names: bool = False
    fsname: str | None = None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> FuseOptions:
        """From the arguments of all `-o`. Raises UsageError."""
        options = cls()
        for option in split_options(texts):
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
        elif option in ("suid", "dev"):
            raise UsageError(f"mount option {option}: files in backups get no privileges; leave it out")
        elif option in ("files", "nofiles"):
            self.files = option == "files"
        elif option in ("safe_names", "nosafe_names"):
            self.safe_names = option == "safe_names"
        elif option in ("ignore_permissions", "noignore_permissions"):
            self.as_stored = option == "noignore_permissions"
        elif name in ("uid", "gid"):
            setattr(self, name, _number(option, value, 10, 0xFFFFFFFE))
        elif name == "fsname" and value:
            self.fsname = re.sub(r"\\(.)", r"\1", value)
        elif name == "umask":
            self.umask = _number(option, value, 8, 0o777)
        elif option not in _FULFILLED | _FULFILLED_ALSO and not name.startswith(("x-", "X-", "comment")):
            raise UsageError(
                f"mount option '{option}' is not known; there are allow_other, allow_root, uid=, gid=, "
                "umask=, nonempty, nofiles, safe_names, fsname=, ignore_permissions, noignore_permissions, "
                "and the general ones of mount(8)"
            )


def split_options(texts: Iterable[str]) -> list[str]:
    """The options in the arguments of all `-o`, which are separated by commas."""
    return _OPTION.findall(",".join(texts))


def _number(option: str, value: str, base: int, most: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if not 0 <= number <= most or not value.isalnum():
        raise UsageError(
            f"mount option '{option}': not a number from 0 to {f'{most:o} (octal)' if base == 8 else most}"
        )
    return number
