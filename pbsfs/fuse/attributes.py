"""What the kernel gets as a node's attributes: a `Stat` of the tree, with the mount's owner and permissions.

Pure functions of their arguments, called by the operations from the trio loop's thread.
"""

from __future__ import annotations

from pbsfs.fuse.shim import Attributes  # before pyfuse3, see there

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


def attributes_of(
    stat: Stat, inode: int, ownership: Ownership, *, default_mtime_ns: int, lasts: float
) -> Attributes:
    """The attributes of the node with the number `inode`.

    `default_mtime_ns`: the time of a node that has none. `lasts`: seconds for which the kernel may keep the
    name, and what can change about the node.
    """
    mode, uid, gid = ownership.of(stat)
    return Attributes(
        inode,
        mode,
        stat.nlink,  # 1 for directories too: find(1) and others take that as "not counted"
        uid,
        gid,
        stat.rdev,
        stat.size,
        PREFERRED_IO_SIZE,
        -(-stat.data_size // BLOCK_SIZE),
        default_mtime_ns if stat.mtime_ns is None else stat.mtime_ns,
        # The kernel asks for names again even inside snapshots, where a look-up costs no I/O: a snapshot may
        # be forgotten and made again, and what is known about it (notes, the verify state) changes. They go
        # out of date with the listing that they come from: times to live must not add up on the way down.
        lasts,
        lasts if stat.exact else 0,
    )


def entry_of(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """The same, for pyfuse3."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = attributes.inode
    entry.st_mode, entry.st_uid, entry.st_gid = attributes.mode, attributes.uid, attributes.gid
    entry.st_nlink = attributes.nlink
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blksize = attributes.block_size
    entry.st_blocks = attributes.blocks
    entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.mtime_ns
    entry.entry_timeout, entry.attr_timeout = attributes.entry_lasts, attributes.lasts
    return entry
