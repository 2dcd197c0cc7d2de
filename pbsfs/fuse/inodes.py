"""Inode numbers and the nodes behind them.

A number is made from the node's path, so it is the same whenever the path is looked up again, over
forgetting, remounting and on other machines; nothing has to be remembered for that. The table holds
only what the kernel holds: it grows with look-ups and shrinks when the kernel forgets. Used from the
trio loop's thread.
"""

from __future__ import annotations

import hashlib

from pbsfs.errors import NotFoundError
from pbsfs.tree import Node

ROOT = 1
_FIRST_FREE = 16  # small numbers have meanings: 0 is none, 1 the root


class Inode:
    """A node that the kernel knows. `opened`: checksum of what was opened under this number last."""

    __slots__ = ("lookups", "node", "opened")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.lookups = 0
        self.opened: bytes | None = None


class InodeTable:
    """Which node each inode number stands for."""

    def __init__(self, root: Node) -> None:
        self._inodes = {ROOT: Inode(root)}

    def __len__(self) -> int:
        return len(self._inodes)

    def __getitem__(self, number: int) -> Inode:
        """Raises NotFoundError for a number that the kernel was never given, or gave back."""
        try:
            return self._inodes[number]
        except KeyError:
            raise NotFoundError(f"inode {number} is not known") from None

    def number(self, path: str) -> int:
        """The inode number of the node at `path`."""
        if not path:
            return ROOT
        salt = 0
        while True:
            digest = hashlib.blake2b(path.encode(), digest_size=8, salt=salt.to_bytes(2, "little")).digest()
            number = int.from_bytes(digest, "little") >> 1  # 63 bits: some programs keep it signed
            taken = self._inodes.get(number)
            if number >= _FIRST_FREE and (taken is None or taken.node.path == path):
                return number
            salt += 1

    def remember(self, node: Node) -> int:
        """Counts a look-up of `node` by the kernel; returns its inode number."""
        number = self.number(node.path)
        inode = self._inodes.get(number)
        if inode is None:
            inode = self._inodes[number] = Inode(node)
        inode.node = node  # a newer listing may have made a new one
        inode.lookups += 1
        return number

    def forget(self, number: int, lookups: int) -> None:
        """The kernel gives back `lookups` look-ups."""
        inode = self._inodes.get(number)
        if inode is not None and number != ROOT:
            inode.lookups -= lookups
            if inode.lookups <= 0:
                del self._inodes[number]
