"""Gives restored files what is stored with them, as far as the user may; what could not be set is counted.

The order matters: the owner before the mode, since chown(2) takes away set-user-ID bits and capabilities;
times last. Synchronous.
"""

from __future__ import annotations

import os
import stat as stat_bits
from collections import Counter
from dataclasses import dataclass, field

from pbsfs.contents.base import Entry

_ACL_PREFIX = b"system.posix_acl_"


@dataclass(frozen=True, slots=True)
class Kept:
    """Which of the attributes are restored."""

    ownership: bool = True
    permissions: bool = True
    acls: bool = True
    xattrs: bool = True


@dataclass(slots=True)
class Unset:
    """What could not be set: how often, and the first reason, by what it is."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, error: OSError) -> None:
        self.counts[what] += 1
        self.reasons.setdefault(what, error.strerror or str(error))


class Attributes:
    """Sets the attributes of files that were made just now. `unset`: what could not be set."""

    def __init__(self, kept: Kept) -> None:
        """Call in the main thread: it looks at the umask of the process."""
        self._kept = kept
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self.unset = Unset()

    def set(self, file: int, entry: Entry, xattrs: dict[bytes, bytes]) -> None:
        """Of the file or directory with the descriptor `file`."""
        kept, unset = self._kept, self.unset
        if kept.ownership:
            found = os.fstat(file)
            if (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
                try:
                    os.fchown(file, entry.uid, entry.gid)
                except OSError as error:
                    unset.add("owners", error)
        if kept.xattrs:
            for name, value in xattrs.items():
                if not name.startswith(_ACL_PREFIX):
                    try:
                        os.setxattr(file, name, value)
                    except OSError as error:
                        unset.add(_kind(name), error)
        if kept.permissions:
            mode = stat_bits.S_IMODE(entry.mode)
            try:
                os.fchmod(file, mode)
            except OSError as error:
                unset.add("modes", error)
        else:
            os.fchmod(file, (0o777 if entry.is_directory else 0o666) & ~self._umask)
        if kept.acls:
            for name, value in xattrs.items():
                if name.startswith(_ACL_PREFIX):
                    try:
                        os.setxattr(file, name, value)
                    except OSError as error:
                        unset.add("access control lists", error)
        try:
            os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            unset.add("times", error)

    def set_beneath(self, directory: int, name: bytes, entry: Entry, xattrs: dict[bytes, bytes]) -> None:
        """Of a link, device, FIFO or socket, which must not be opened, in the directory `directory`."""
        kept, unset = self._kept, self.unset
        if kept.ownership:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
                try:
                    os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
                except OSError as error:
                    unset.add("owners", error)
        place = b"/proc/self/fd/%d/%b" % (directory, name)
        for key, value in xattrs.items():
            is_acl = key.startswith(_ACL_PREFIX)
            if kept.acls if is_acl else kept.xattrs:
                try:
                    os.setxattr(place, key, value, follow_symlinks=False)
                except OSError as error:
                    unset.add("access control lists" if is_acl else _kind(key), error)
        if not entry.is_link:
            mode = stat_bits.S_IMODE(entry.mode) if kept.permissions else 0o666 & ~self._umask
            try:
                # Not through a link: it was made just now, in a directory that nobody else can write to.
                os.chmod(name, mode, dir_fd=directory)
            except OSError as error:
                unset.add("modes", error)
        try:
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            unset.add("times", error)


def _kind(name: bytes) -> str:
    return "file capabilities" if name == b"security.capability" else "extended attributes"
