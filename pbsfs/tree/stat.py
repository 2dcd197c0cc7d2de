"""What `stat` returns for a node of the tree. Nodes make it; the mount and the commands show it. Pure."""

from __future__ import annotations

import stat as stat_bits
from typing import NamedTuple

DIRECTORY_MODE = stat_bits.S_IFDIR | 0o555
FILE_MODE = stat_bits.S_IFREG | 0o444
LINK_MODE = stat_bits.S_IFLNK | 0o777


class Stat(NamedTuple):
    """What `stat` returns for a node, as far as the tree knows it.

    `size` and `data_size`: in bytes; `data_size` without holes. `mode`: type and permissions, as in st_mode.
    `mtime_ns`: nanoseconds since the epoch, negative before it; None where the node has no time. `uid` and
    `gid`: None for the owner of the mount. `rdev`: the device number of a device file. `target`: where a link
    points to; None for all else, and for a link that can't be read now. `exact`: whether `size` and
    `data_size` are final.
    """

    size: int = 0
    data_size: int = 0
    mode: int = FILE_MODE
    mtime_ns: int | None = None
    uid: int | None = None
    gid: int | None = None
    nlink: int = 1
    rdev: int = 0
    target: bytes | None = None
    exact: bool = True


def nanoseconds(seconds: int | None) -> int | None:
    """A time of the source, in seconds since the epoch, as a stat has it."""
    return None if seconds is None else seconds * 1_000_000_000
