"""The trees of btrfs: nodes that are verified, and the items in them by key.

A key is an object's number, a type, and a number whose meaning depends on the type. Nodes carry a checksum,
their own address, generation, level and owner, and all of them are checked. Synchronous; of one thread.
"""

from __future__ import annotations

import functools
import operator
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pbsfs.base.errors import DamageError
from pbsfs.disks.btrfs.chunks import CHUNK_ITEM, Chunks
from pbsfs.disks.btrfs.superblock import Root, Superblock

Key = tuple[int, int, int]

CHUNK_TREE, FILE_TREE, LOG_TREE = 3, 5, (1 << 64) - 6
FIRST_FREE, LAST_FREE = 256, (1 << 64) - 256
"""Numbers of objects and subvolumes."""

_HEADER = struct.Struct("<32s16sQ7sB16sQQIB")
_ITEM = struct.Struct("<QBQII")
_POINTER = struct.Struct("<QBQQQ")

_LAST_KEY: Key = ((1 << 64) - 1, 255, (1 << 64) - 1)
_CACHE = 6 << 20
"""Bytes of nodes that are kept; decoded they take about three times as many."""
_AHEAD = 64
"""Nodes that are requested ahead of reading them."""


class Node:
    """A node. `rows`: of a leaf, each with a key, and where in `data` its item is and how long it is; of
    other nodes, each with a key, and the address and generation of a node."""

    __slots__ = ("data", "owner", "rows")

    def __init__(self, rows: list[tuple[int, int, int, int, int]], data: bytes, owner: int) -> None:
        self.rows = rows
        self.data = data
        self.owner = owner

    def item(self, row: tuple[int, int, int, int, int]) -> bytes:
        return self.data[row[3] : row[3] + row[4]]


class Nodes:
    """Reads nodes, verifies them, and keeps some."""

    def __init__(self, superblock: Superblock, chunks: Chunks) -> None:
        self.chunks = chunks
        self.size = superblock.node_size
        self._sector = superblock.sector_size
        self._uuid = superblock.node_uuid
        self._checksum = superblock.checksum
        self.get = functools.lru_cache(max(_CACHE // self.size, 64))(self._load)

    def _load(self, address: int, level: int, generation: int) -> Node:
        """Raises DamageError."""
        if address % self._sector:
            raise DamageError(f"node {address} is not at an address of a sector")
        problem: DamageError | None = None
        for copy in range(self.chunks.copies(address)):
            try:
                return self._checked(self.chunks.read(address, self.size, copy), address, level, generation)
            except DamageError as error:
                problem = problem or error
        raise problem or DamageError(f"node {address} cannot be read")

    def _checked(self, block: bytes, address: int, level: int, generation: int) -> Node:
        (checksum, uuid, at, _flags, _revision, _chunks_uuid, written, owner, count, found) = (
            _HEADER.unpack_from(block)
        )
        of = self._checksum
        if of.of(block[32:]) != checksum[: of.size]:
            raise DamageError(f"node {address} has a wrong checksum")
        if uuid != self._uuid or at != address or written != generation or found != level:
            raise DamageError(f"node {address} is another one than expected")
        data = block[_HEADER.size :]
        if level:
            if not 0 < count <= len(data) // _POINTER.size:
                raise DamageError(f"node {address} has an impossible number of pointers")
            rows = list(_POINTER.iter_unpack(memoryview(data)[: count * _POINTER.size]))
            data = b""
        else:
            if count > len(data) // _ITEM.size:
                raise DamageError(f"node {address} has an impossible number of items")
            rows = list(_ITEM.iter_unpack(memoryview(data)[: count * _ITEM.size]))
            end = len(data)
            for row in rows:
                if row[3] + row[4] != end:
                    raise DamageError(f"node {address} has an item out of its place")
                end = row[3]
            if end < count * _ITEM.size:
                raise DamageError(f"node {address} has an item over its table")
        keys = [row[:3] for row in rows]
        if not all(map(operator.lt, keys, keys[1:])):
            raise DamageError(f"node {address} has keys out of order")
        return Node(rows, data, owner)


class Tree:
    """A tree of items."""

    def __init__(self, nodes: Nodes, root: Root, owner: int) -> None:
        """`owner`: the number of the tree."""
        self._nodes = nodes
        self._root = root
        self._owner = owner
        self._last: tuple[Key, Key, Node] = (_LAST_KEY, (0, 0, 0), Node([], b"", 0))

    def leaf(self, key: Key) -> tuple[Node, int, Key | None]:
        """The leaf in which `key` is or would be, the number of the row with it or the next higher one, and
        the key of the next leaf. Raises DamageError."""
        low, high, node = self._last
        if not low <= key < high:
            low, high, node = self._last = self._down(key)
        return node, bisect_left(node.rows, key), None if high == _LAST_KEY else high

    def find(self, key: Key) -> bytes | None:
        """The item with this key. Raises DamageError."""
        node, at, _next = self.leaf(key)
        if at < len(node.rows) and node.rows[at][:3] == key:
            return node.item(node.rows[at])
        return None

    def items(self, low: Key, high: Key) -> Iterator[tuple[Key, bytes]]:
        """The items with keys from `low` on and below `high`, in order. Raises DamageError."""
        after: Key | None = low
        while after is not None and after < high:
            node, at, after = self.leaf(after)
            data = node.data
            for object_, kind, offset, start, size in node.rows[at:]:
                key = (object_, kind, offset)
                if key >= high:
                    return
                yield key, data[start : start + size]
            if after is not None and after < high:
                self._prefetch(after, high)

    def from_before(self, key: Key) -> Key:
        """`key`, or the highest key in the tree below it that has the same object and type."""
        node, at, _next = self.leaf(key)
        if at < len(node.rows) and node.rows[at][:3] == key:
            return key
        # A leaf begins with the key that leads to it: what is below `key` is in the same leaf, if anywhere.
        if at and node.rows[at - 1][:2] == key[:2]:
            return node.rows[at - 1][:3]
        return key

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Requests the leaves of `keys`, which are in order, side by side. Raises DamageError."""
        wanted: dict[int, None] = {}
        high: Key = (0, 0, 0)
        for key in keys:
            if key < high:
                continue
            parent, at, high = self._parent(key)
            if parent is None:
                return
            wanted[parent.rows[at][3]] = None
        self._request(list(wanted))

    def _prefetch(self, low: Key, high: Key) -> None:
        """Requests the leaves from that of `low` to that of `high`, as far as one node leads to them."""
        parent, at, _next = self._parent(low)
        if parent is not None:
            rows = parent.rows[at : at + _AHEAD]
            self._request([row[3] for row in rows if row[:3] < high])

    def _request(self, addresses: Sequence[int]) -> None:
        if len(addresses) > 1:
            with suppress(DamageError):  # reading says which is wrong
                self._nodes.chunks.prefetch([(address, self._nodes.size) for address in addresses])

    def _parent(self, key: Key) -> tuple[Node | None, int, Key]:
        """The node above the leaf of `key`, the number of the row that leads to it, and the key of the
        next."""
        if not self._root.level:
            return None, 0, _LAST_KEY
        _low, high, node = self._down(key, 1)
        at = max(bisect_right(node.rows, (*key, 1 << 64)) - 1, 0)
        return node, at, node.rows[at + 1][:3] if at + 1 < len(node.rows) else high

    def _down(self, key: Key, to: int = 0) -> tuple[Key, Key, Node]:
        """The node of level `to` in which `key` is, and the keys from which and below which it holds all."""
        root = self._root
        node = self._checked(self._nodes.get(root.address, root.level, root.generation), root.address)
        low, high = (0, 0, 0), _LAST_KEY
        for level in range(root.level - 1, to - 1, -1):
            rows = node.rows
            at = max(bisect_right(rows, (*key, 1 << 64)) - 1, 0)
            row = rows[at]
            first = row[:3]
            if at:
                low = first
            if at + 1 < len(rows):
                high = rows[at + 1][:3]
            node = self._checked(self._nodes.get(row[3], level, row[4]), row[3])
            if not node.rows or node.rows[0][:3] != first or node.rows[-1][:3] >= high:
                raise DamageError(f"node {row[3]} has other keys than the node above it says")
        return low, high, node

    def _checked(self, node: Node, address: int) -> Node:
        """`node`, if it may be in this tree: subvolumes share nodes, other trees do not."""
        shared = is_subvolume(self._owner) and is_subvolume(node.owner)
        if self._owner not in {node.owner, LOG_TREE} and not shared:
            raise DamageError(f"node {address} belongs to another tree")
        return node


def is_subvolume(number: int) -> bool:
    """Whether a tree is one of files: of a subvolume or snapshot."""
    return number == FILE_TREE or FIRST_FREE <= number <= LAST_FREE


def read_chunks(superblock: Superblock, chunks: Chunks) -> Nodes:
    """Adds to `chunks` those of the superblock, and then of the chunk tree. Raises DamageError."""
    chunks.add_system(superblock)
    nodes = Nodes(superblock, chunks)
    tree = Tree(nodes, superblock.chunk_root, CHUNK_TREE)
    for (_object, kind, start), item in tree.items((0, 0, 0), _LAST_KEY):
        if kind == CHUNK_ITEM:
            chunks.add(start, item)
    return nodes
