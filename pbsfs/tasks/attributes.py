"""The attributes of nodes as text: type, mode, device, time; and which of them differ between two entries.

Used by `pbsfs ls`, `info`, `diff` and `versions`.

Pure functions, for any thread.
"""

from __future__ import annotations

import os
import stat as stat_bits

from pbsfs.base.names import format_time
from pbsfs.base.text import counted
from pbsfs.contents.base import Entry

_SECOND = 1_000_000_000

_SPANS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))

_TYPES = {
    stat_bits.S_IFREG: "file",
    stat_bits.S_IFDIR: "directory",
    stat_bits.S_IFLNK: "link",
    stat_bits.S_IFCHR: "character device",
    stat_bits.S_IFBLK: "block device",
    stat_bits.S_IFIFO: "fifo",
    stat_bits.S_IFSOCK: "socket",
}


def type_text(mode: int) -> str:
    """The type in an st_mode, in words."""
    return _TYPES.get(stat_bits.S_IFMT(mode), "unknown")


def mode_text(mode: int) -> str:
    """The permissions in an st_mode, in four octal digits."""
    return f"{stat_bits.S_IMODE(mode):04o}"


def device_text(mode: int, rdev: int) -> str | None:
    """The major and minor number of a device file; None for any other type."""
    if stat_bits.S_ISCHR(mode) or stat_bits.S_ISBLK(mode):
        return f"{os.major(rdev)},{os.minor(rdev)}"
    return None


def time_text(time_ns: int, *, whole_seconds: bool = False) -> str:
    """A time in nanoseconds since the epoch as `2024-11-07T17:20:00.123456789Z`, without a fraction of 0.

    A time outside of the years 1 to 9999, which an archive may have, is `@` and the seconds, as date(1) reads
    it. `whole_seconds`: leave out the fraction.
    """
    seconds, fraction = divmod(time_ns, _SECOND)
    try:
        text = format_time(seconds)
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}"
    if fraction and not whole_seconds:
        text = f"{text.removesuffix('Z')}.{fraction:09}Z"
    return text


def span_text(seconds: int) -> str:
    """A span of time for people, in its largest unit: `2 days`, `1 hour`."""
    unit, size = next((u for u in _SPANS if round(seconds / u[1]) >= 1), _SPANS[-1])
    return counted(round(seconds / size), unit)


def differing(old: Entry, new: Entry) -> list[str]:
    """Which of type, size, mtime, mode, owner, link and device differ."""
    pairs = (
        ("type", stat_bits.S_IFMT(old.mode), stat_bits.S_IFMT(new.mode)),
        ("size", old.size, new.size),
        ("mtime", old.mtime_ns, new.mtime_ns),
        ("mode", stat_bits.S_IMODE(old.mode), stat_bits.S_IMODE(new.mode)),
        ("owner", (old.uid, old.gid), (new.uid, new.gid)),
        ("link", old.target, new.target),
        ("device", old.rdev, new.rdev),
    )
    return [name for name, before, after in pairs if before != after]
