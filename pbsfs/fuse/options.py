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

OPTIONS = {
    "allow_other": "Give all users access, as far as the modes allow it (default: only the user who mounts). "
    "For other users than root, /etc/fuse.conf must have the line user_allow_other.",
    "allow_root": "Give root access too.",
    "uid=": "Make this user the owner of the files and directories (default: the user who mounts).",
    "gid=": "Make this group the group of the files and directories (default: that of the user who mounts).",
    "umask=": "Remove these permissions, in octal, from the files and directories (default: 0007).",
    "nonempty": "Mount over a directory that is not empty.",
    "nofiles": "Leave out files/, which shows the files in archives.",
    "safe_names": "Write the times of snapshots without colons: 2023-11-14T22-13-20Z.",
    "fsname=": "Show this source in the mount table (default: the repository, directory or bucket).",
    "ignore_permissions": "Give files in archives the owner and mode of all other files (default, "
    "except for root).",
    "noignore_permissions": "Give files in archives the owner and mode that are stored with them (default "
    "for root).",
}
"""The options that have a meaning of their own in pbsfs, as users write them, and what they do."""

_PASSED_ON = frozenset(("allow_other", "allow_root", "nosuid", "nodev", "noexec", "exec", "noatime", "atime"))
_FULFILLED = frozenset(("ro", "default_permissions", "defaults", "auto", "noauto", "user", "users", "nouser"))
_FULFILLED_ALSO = frozenset(
    (
        *("_netdev", "nofail", "owner", "group", "noowner", "async", "silent", "loud"),
        *("relatime", "norelatime", "strictatime", "nodiratime", "diratime", "lazytime", "nolazytime"),
    )
)
GENERAL = tuple(sorted((_PASSED_ON | _FULFILLED | _FULFILLED_ALSO) - OPTIONS.keys()))
"""The options of mount(8) that pbsfs accepts, besides those that start with `x-`, `X-` and `comment`."""

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
    def parse(cls, texts: Iterable[str], others: Iterable[str] = ()) -> FuseOptions:
        """From the arguments of all `-o`. `others`: options that the caller knows. Raises UsageError."""
        options = cls()
        for option in split_options(texts):
            options._take(option, others)
        return options

    def _take(self, option: str, others: Iterable[str]) -> None:
        name, _equals, value = option.partition("=")
        if option in _PASSED_ON:
            self.flags.add(option)
        elif option == "nonempty":
            self.nonempty = True
        elif option in ("rw", "remount"):
            raise UsageError(f"mount option {option}: backups are mounted read-only; leave it out")
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
            shown = f"{name}=…" if value else option  # the value may be a secret
            raise UsageError(
                f"mount option '{shown}' is not known; there are {', '.join((*others, *OPTIONS, *GENERAL))}, "
                "and all that begin with x- or comment"
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
