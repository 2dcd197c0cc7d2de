"""What the kernel gets as a node's attributes: a `Stat` of the tree, with the mount's owner and permissions.

Pure functions of their arguments, called by the operations from the trio loop's thread.
"""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import stat as stat_bits
from dataclasses import dataclass

import pyfuse3

from pbsfs.tree import Stat

BLOCK_SIZE = 512  # the unit of st_blocks
PREFERRED_IO_SIZE = 1 << 20
"""The read size that `st_blksize` suggests to programs: the largest read that FUSE passes on whole."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """The owner of the files and who may read them: as `uid=`, `gid=` and `umask=` of mount(8).

    `as_stored`: entries of archives have the owner and permissions that are stored with them. Otherwise they
    have this owner, who may read all of them.
    """

    uid: int
    gid: int
    umask: int
    as_stored: bool = True

    def of(self, stat: Stat) -> tuple[int, int, int]:
        """Mode, user and group that are shown for `stat`."""
        if stat_bits.S_ISLNK(stat.mode) and (stat.uid is None or not self.as_stored):
            return stat.mode, self.uid, self.gid
        if stat.uid is None or stat.gid is None:
            return stat.mode & ~self.umask, self.uid, self.gid
        if self.as_stored:
            return stat.mode, stat.uid, stat.gid
        readable = 0o500 if stat_bits.S_ISDIR(stat.mode) else 0o400
        return stat.mode | readable, self.uid, self.gid


def entry_of(
    stat: Stat, inode: int, ownership: Ownership, *, default_mtime_ns: int, lasts: float
) -> pyfuse3.EntryAttributes:
    """The attributes of the node with the number `inode`.

    `default_mtime_ns`: the time of a node that has none. `lasts`: seconds for which the kernel may keep the
    name, and what can change about the node.
    """
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.st_mode, entry.st_uid, entry.st_gid = ownership.of(stat)
    # 1 for directories too: find(1) and others take that as "not counted".
    entry.st_nlink = stat.nlink
    entry.st_rdev = stat.rdev
    entry.st_size = stat.size
    entry.st_blksize = PREFERRED_IO_SIZE
    entry.st_blocks = -(-stat.data_size // BLOCK_SIZE)
    time = default_mtime_ns if stat.mtime_ns is None else stat.mtime_ns
    entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = time
    # The kernel asks for names again even inside snapshots, where a look-up costs no I/O: a snapshot may be
    # forgotten and made again, and what is known about it (notes, the verify state) changes. They go
    # out of date with the listing that they come from: times to live must not add up on the way down.
    entry.entry_timeout = lasts
    entry.attr_timeout = lasts if stat.exact else 0
    return entry
