"""The texts of errors where a file or device can't be written: what the system reports, and what to do.

Called by the targets of a copy, its map, and `pbsfs key recover`. Only looks at names; synchronous.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pbsfs.base.errors import OutputError

_ACTIONS = {
    errno.EACCES: "name another place, or run pbsfs as a user with write access to it",
    errno.EPERM: "name another place, or run pbsfs as a user with write access to it",
    errno.EROFS: "name a place on a file system that is mounted for writing",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOTDIR: "name a place in a directory",
    errno.ETXTBSY: "end the program that uses it, or name another place",
    errno.EISDIR: "remove it, or name another file",
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some space, or name another place",
    errno.EFBIG: "name a place on a file system that takes files of this size",
    errno.EBUSY: "unmount it first, or name another device",
    errno.EIO: "look for the reason in the kernel's log, or name another place",
}


def refusal(place: Path | str, error: OSError) -> str:
    """The text of an OutputError for `place`: the system's error, and what to do."""
    action = _ACTIONS.get(error.errno or 0)
    parent = Path(str(place)).parent
    if error.errno == errno.ENOENT and not os.path.exists(parent):
        action = f"there is no directory {parent}: create it with mkdir"
    return f"cannot write {place}: {error.strerror}" + (f"; {action}" if action else "")


def exists(path: Path, what: str = "exists") -> str:
    """The text of an OutputError for a file that is not overwritten; `what`: what is wrong with it."""
    return f"{path} {what}; remove it, or overwrite it with --force"


def refuse_existing(path: Path) -> None:
    """Raises OutputError if `path` exists, also as a link to a missing file."""
    if os.path.lexists(path):
        raise OutputError(exists(path))
