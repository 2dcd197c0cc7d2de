"""Inode numbers and the nodes behind them.

A number is a hash of the node's key, which is its path but for entries of archives. So a path has the same
number after the kernel forgot it, after a new mount, and on other machines. The table holds the nodes that
the kernel holds: it grows with look-ups and shrinks when the kernel forgets. It keeps the paths of forgotten
numbers for a while, because an NFS server's clients come back with numbers. Called by the operations, from
the trio loop's thread.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from pbsfs.base.errors import NotFoundError
from pbsfs.tree import File, Node

ROOT = 1
_FIRST_FREE = 16  # small numbers have meanings: 0 is none, 1 the root

MAX_FORGOTTEN = 1 << 16
"""Numbers that the kernel forgot whose paths are kept, the latest; about 0.3 KiB each, 20 MiB in all."""


class Inode:
    """A node that the kernel knows.

    `size`: the length in bytes that the kernel has. `opened`: checksum of what the kernel's page
    cache has under this number. `readers`: the open files that are read through it.
    """

    __slots__ = ("lookups", "node", "opened", "readers", "size")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.lookups = 0
        self.size = 0
        self.opened: bytes | None = None
        self.readers = 0


class InodeTable:
    """Maps each inode number to its node."""

    def __init__(self, root: Node) -> None:
        """`root`: what the mount shows at its root, any node of the tree."""
        self._root = root.key
        self._inodes = {ROOT: Inode(root)}
        self._forgotten: OrderedDict[int, bytes] = OrderedDict()  # paths, the latest last

    def __len__(self) -> int:
        return len(self._inodes)

    def __getitem__(self, number: int) -> Inode:
        """Raises NotFoundError for a number that the kernel never got, or has forgotten."""
        try:
            return self._inodes[number]
        except KeyError:
            raise NotFoundError(f"inode {number} is not known") from None

    def path(self, number: int) -> bytes:
        """The path of a number that the kernel has, or has forgotten.

        Raises NotFoundError for others, and for those that were forgotten long ago.
        """
        inode = self._inodes.get(number)
        if inode is not None:
            return inode.node.path
        try:
            return self._forgotten[number]
        except KeyError:
            raise NotFoundError(f"inode {number} is not known") from None

    def number(self, key: bytes, node: Node | None = None) -> int:
        """The inode number of the node with this key.

        It differs from the usual one where `node` is a file that was made again while the former one is open:
        an open file keeps its size and content.
        """
        if key == self._root:
            return ROOT
        salt = 0
        while True:
            digest = hashlib.blake2b(key, digest_size=8, salt=salt.to_bytes(2, "little")).digest()
            number = int.from_bytes(digest, "little") >> 1  # 63 bits: some programs keep it signed
            taken = self._inodes.get(number)
            mine = taken is None or (taken.node.key == key and not _is_open_otherwise(taken, node))
            if number >= _FIRST_FREE and mine:
                return number
            salt += 1

    def remember(self, node: Node, size: int, number: int | None = None) -> int:
        """Counts a look-up of `node` by the kernel, which gets `size`, in bytes, and the number that is
        returned: `number` if the answer has been made already."""
        number = self.number(node.key, node) if number is None else number
        inode = self._inodes.get(number)
        if inode is None:
            inode = self._inodes[number] = Inode(node)
            self._forgotten.pop(number, None)
        inode.node = node  # a newer listing may have made a new one
        inode.size = size
        inode.lookups += 1
        return number

    def forget(self, number: int, lookups: int) -> None:
        """The kernel forgets `lookups` look-ups."""
        inode = self._inodes.get(number)
        if inode is not None and number != ROOT:
            inode.lookups -= lookups
            if inode.lookups <= 0:
                del self._inodes[number]
                self._forgotten[number] = inode.node.path
                if len(self._forgotten) > MAX_FORGOTTEN:
                    self._forgotten.popitem(last=False)


def _is_open_otherwise(inode: Inode, node: Node | None) -> bool:
    """Whether `inode` is a file that is open, and `node` is listed as another one."""
    known = inode.node
    return (
        bool(inode.readers) and isinstance(known, File) and isinstance(node, File) and known.file != node.file
    )
