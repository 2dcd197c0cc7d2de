"""Gives restored files what is stored with them, as far as the user may; what could not be set is counted.

The order matters: the owner before the mode, since chown(2) takes away set-user-ID bits and capabilities;
times last. Synchronous; one thread uses an `Attributes`.
"""

from __future__ import annotations

import enum
import os
import re
import stat as stat_bits
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pbsfs.base.text import counted
from pbsfs.contents.base import Entry

_ACCESS_ACL = b"system.posix_acl_access"
_DEFAULT_ACL = b"system.posix_acl_default"
_ACLS = (_ACCESS_ACL, _DEFAULT_ACL)

_NOBODY = 0xFFFF_FFFF
"""The user and group that chown(2) takes for "leave it"."""

_LEAVE = -1

_SAFE_TIMES = 400_000_000 * 10**9, (1 << 31) * 10**9
"""Every file system can hold the times from the first to before the second, in ns since the epoch. FAT begins
in 1980; ext4 with small inodes and XFS without bigtime end in 2038."""

_COARSEST = 2 * 10**9
"""Nanoseconds of the coarsest times that a file system has: a time that differs by less was only rounded."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which of the attributes are restored."""

    ownership: bool = True
    permissions: bool = True
    acls: bool = True
    xattrs: bool = True


class Part(enum.Enum):
    """What may not be possible to restore: a sentence with what is counted in braces, and what to do."""

    OWNER = "the owner of {entry}", "restore as root, or add --ignore-ownership"
    NO_OWNER = (
        f"the owner or group {_NOBODY} of {{entry}}",
        "no system has it: pbsfs leaves it out, set another with chown",
    )
    SET_ID = "{set-user-ID or set-group-ID bit}", "the files belong to another user or group than stored"
    MODE = "the mode of {entry}", "restore to another file system, or add --ignore-permissions"
    XATTR = "{extended attribute}", "restore as root, to a file system with them, or add --ignore-xattrs"
    CAPABILITY = "the capabilities of {file}", "restore as root, or add --ignore-xattrs"
    ACL = "{access control list}", "restore to a file system with them, or add --ignore-acls"
    TIME = "the time of {entry}", "restore to another file system"
    CUT_TIME = (
        "the time of {entry}, set to the nearest time that fits",
        "restore to a file system with a larger range of times",
    )
    DEVICE = "{special file} (device, FIFO, socket)", "restore as root, to a file system with them"
    LINK = "{symbolic link}", "restore to a file system with them"
    HARD_LINK = "{hard link}, copied instead", "restore to a file system with them"


@dataclass(slots=True)
class Unset:
    """What could not be restored: how often, and the first reason."""

    counts: Counter[Part] = field(default_factory=Counter)
    reasons: dict[Part, str] = field(default_factory=dict)

    def add(self, part: Part, reason: OSError | str) -> None:
        """Counts a part that was not restored, and keeps the first reason."""
        self.counts[part] += 1
        if part not in self.reasons:
            self.reasons[part] = reason if isinstance(reason, str) else reason.strerror or str(reason)

    @contextmanager
    def noting(self, part: Part) -> Iterator[None]:
        """Takes note of a failure of the system in this context, and ends it."""
        try:
            yield
        except OSError as error:
            self.add(part, error)

    def __str__(self) -> str:
        """A line for each part."""
        lines = []
        for part, count in self.counts.items():
            what, advice = part.value
            before, noun, behind = re.split(r"[{}]", what)
            shown = before + counted(count, noun) + behind
            lines.append(f"could not restore {shown}: {self.reasons[part]}; {advice}")
        return "\n".join(lines)


class Attributes:
    """Sets the attributes of files that were made just now. `unset`: what could not be set."""

    def __init__(self, kept: Kept) -> None:
        """Call in the main thread: it looks at the umask of the process."""
        self._kept = kept
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self.unset = Unset()

    def set(
        self, place: int | bytes, entry: Entry, xattrs: Mapping[bytes, bytes], *, inherited: bool = False
    ) -> None:
        """Of `place`: the descriptor of a file or directory, or for what cannot be opened a path that leads
        to it and nowhere else.

        `inherited`: whether it may have got access control lists from the directory that it is in.
        """
        kept, unset = self._kept, self.unset
        has_owner = self._set_owner(place, entry) if kept.ownership else None
        if kept.xattrs:
            for name, value in xattrs.items():
                if name not in _ACLS:
                    with unset.noting(Part.CAPABILITY if name == b"security.capability" else Part.XATTR):
                        os.setxattr(place, name, value)
        if inherited and kept.acls:
            for name in _ACLS:
                if name not in xattrs:
                    with suppress(OSError):  # it has none, or may have none
                        os.removexattr(place, name)
        if not entry.is_link:
            with unset.noting(Part.MODE):
                os.chmod(place, self._mode(place, entry, has_owner))
        if kept.acls and xattrs:
            for name in _ACLS:
                if name in xattrs:
                    with unset.noting(Part.ACL):
                        os.setxattr(place, name, xattrs[name])
        with unset.noting(Part.TIME):
            os.utime(place, ns=(entry.mtime_ns, entry.mtime_ns))
            if not _SAFE_TIMES[0] <= entry.mtime_ns < _SAFE_TIMES[1]:
                found = os.stat(place).st_mtime_ns
                if abs(found - entry.mtime_ns) >= _COARSEST:
                    unset.add(Part.CUT_TIME, "the file system cannot hold it")

    def _set_owner(self, place: int | bytes, entry: Entry) -> bool:
        """Whether the owner is as stored. The group alone is set where the user may do only that."""
        uid, gid = (_LEAVE if number == _NOBODY else number for number in (entry.uid, entry.gid))
        is_valid = _LEAVE not in (uid, gid)
        if not is_valid:
            self.unset.add(Part.NO_OWNER, "not a valid user or group")
        try:
            os.chown(place, uid, gid)
        except OSError as error:
            if is_valid:
                self.unset.add(Part.OWNER, error)
            with suppress(OSError):
                os.chown(place, _LEAVE, gid)
            return False
        return is_valid

    def _mode(self, place: int | bytes, entry: Entry, has_owner: bool | None) -> int:
        """The permissions to set.

        Set-ID bits of files are for the stored owner only, as POSIX has it of cp and pax: for another, a
        program would run with rights that nobody meant to give.
        """
        if not self._kept.permissions:
            return (0o777 if entry.is_directory else 0o666) & ~self._umask
        mode = stat_bits.S_IMODE(entry.mode)
        if has_owner or not entry.is_file or not mode & (stat_bits.S_ISUID | stat_bits.S_ISGID):
            return mode
        found = os.stat(place)
        for bit, is_same in (
            (stat_bits.S_ISUID, found.st_uid == entry.uid),
            (stat_bits.S_ISGID, found.st_gid == entry.gid),
        ):
            if mode & bit and not is_same:
                self.unset.add(Part.SET_ID, "the owner differs")
                mode &= ~bit
        return mode
