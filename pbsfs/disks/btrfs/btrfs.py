"""A btrfs that is open: its subvolumes and snapshots as directories of one tree of files.

The root is the tree 5, as with `mount -o subvolid=5`, whatever the default subvolume is. Synchronous; of one
thread.
"""

from __future__ import annotations

import functools
import stat as stat_bits
import uuid
from collections.abc import Iterator, Sequence

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.btrfs.chunks import Chunks, Devices
from pbsfs.disks.btrfs.data import Data
from pbsfs.disks.btrfs.items import (
    DIR_INDEX,
    DIR_ITEM,
    EXTENT_DATA,
    INODE_ITEM,
    NO_CHECKSUMS,
    ROOT_ITEM,
    ROOT_REF,
    XATTR_ITEM,
    Inode,
    Name,
    extent_in,
    inode_in,
    names_in,
    reference_in,
    root_in,
)
from pbsfs.disks.btrfs.superblock import MAGIC, MAGIC_AT, PLACES, Root
from pbsfs.disks.btrfs.trees import FILE_TREE, FIRST_FREE, Tree, is_subvolume, read_chunks
from pbsfs.disks.crc32c import crc32c
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.volume import Volume

_ROOT_TREE, _CHECKSUM_TREE = 1, 7
_ROOT_DIRECTORY, _DEFAULT = 6, b"default"
"""The directory in the tree of roots, and the name in it of the default subvolume."""

_BITS = 40
"""Bits of an inode's number in its subvolume; those above them are the subvolume's number."""
_MOST_SUBVOLUMES = 1 << 23
_EMPTY = (1 << _BITS) - _MOST_SUBVOLUMES
"""Added to the number of a subvolume that is not here: the number of the empty directory in its place."""
_MOST_ABOVE = 10_000
"""Empty directories whose directories are kept, as their owners are those of the empty ones."""

_MOST_LINK = 4095


class Btrfs(FileSystem):
    """The file system of which `volume` is a device."""

    kind = "btrfs"

    def __init__(self, volume: Volume, others: Sequence[Volume] = ()) -> None:
        """`others`: volumes among which its further devices are. Raises DamageError, UnsupportedError,
        KeyRequiredError, SourceError."""
        super().__init__(volume)
        self._devices = Devices(volume, others)
        self._superblock = superblock = self._devices.superblock
        chunks = Chunks(self._devices)
        self._nodes = read_chunks(superblock, chunks)
        self._roots = Tree(self._nodes, superblock.root, _ROOT_TREE)
        self._above: dict[int, int] = {}
        self._tree = functools.lru_cache(256)(self._open_tree)
        self._data = Data(superblock, chunks, self._tree(_CHECKSUM_TREE))
        self.root = self.inode(FILE_TREE << _BITS | FIRST_FREE)

    @staticmethod
    def recognise(volume: Volume) -> bool:
        """Whether this looks like a btrfs. Raises KeyRequiredError, SourceError."""
        at = PLACES[0] + MAGIC_AT
        return volume.size >= at + len(MAGIC) and volume.read(at, len(MAGIC)) == MAGIC

    def facts(self) -> dict[str, str]:
        superblock = self._superblock
        journal = "clean"
        if not superblock.first:
            journal = "not replayed: the first superblock is damaged, and only it says where the log is"
        elif superblock.log is not None:
            journal = "not replayed: what programs wrote last with fsync may be missing or old"
        return {
            "label": superblock.label.decode("utf-8", "replace"),
            "uuid": str(uuid.UUID(bytes=superblock.uuid)),
            "journal": journal,
            "checksums": superblock.checksum.name,
            "data checksums": "verified only for compressed data and data in stripes",
            "devices": f"{self._devices.count} of {superblock.devices}",
        }

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        tree, number = _split(directory.inode)
        if number >= _EMPTY:
            return
        try:
            for _key, item in self._tree(tree).items((number, DIR_INDEX, 0), (number, DIR_INDEX + 1, 0)):
                for name in names_in(item):
                    yield name.name, self._number(tree, number, name), name.kind
        except DamageError as error:
            raise _about(directory.inode, error) from None

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        tree, number = _split(directory.inode)
        if number >= _EMPTY:
            return None
        hash_ = crc32c(name, 1) ^ 0xFFFFFFFF
        try:
            item = self._tree(tree).find((number, DIR_ITEM, hash_))
            found = [] if item is None else [found for found in names_in(item) if found.name == name]
            entries = [
                Entry(name, found.kind, inode=self._number(tree, number, found), exact=False)
                for found in found
            ]
        except DamageError as error:
            raise _about(directory.inode, error) from None
        if not entries:
            return None
        answer = self.complete(directory, entries[:1])[0]
        if isinstance(answer, DamageError):
            raise answer
        return answer

    def inode(self, number: int) -> Entry:
        tree, within = _split(number)
        if within >= _EMPTY:
            above = self._above.get(number)
            inode = None if above is None else self._inode(tree, above)[0]
            owner = (0, 0, 0) if inode is None else (inode.uid, inode.gid, inode.mtime_ns)
            return Entry(b"", stat_bits.S_IFDIR | 0o755, *owner, inode=number)
        try:
            inode, has_xattrs = self._inode(tree, within)
            target: bytes | None = None
            kind = stat_bits.S_IFMT(inode.mode)
            size = 0
            if kind == stat_bits.S_IFREG:
                size = inode.size
            elif kind == stat_bits.S_IFLNK:
                target = self._target(tree, within, inode.size)
                size = inode.size
        except DamageError as error:
            raise _about(number, error) from None
        return Entry(
            b"",
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime_ns,
            size,
            number,
            inode.rdev,
            target,
            has_xattrs,
            links=1 if kind == stat_bits.S_IFDIR else inode.links,
        )

    def subvolume(self, number: int | None) -> Entry | None:
        """See `FileSystem.subvolume`. The default one is in a directory of the tree of roots."""
        if number is None:
            hash_ = crc32c(_DEFAULT, 1) ^ 0xFFFFFFFF
            item = self._roots.find((_ROOT_DIRECTORY, DIR_ITEM, hash_))
            found = [] if item is None else [name.key for name in names_in(item) if name.name == _DEFAULT]
            number = found[0][0] if found else FILE_TREE
        number = number or FILE_TREE  # 0 is another number of it
        if not is_subvolume(number) or number >= _MOST_SUBVOLUMES or self._root_of(number) is None:
            return None
        return self.inode(number << _BITS | FIRST_FREE)

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        wanted: dict[int, list[tuple[int, int, int]]] = {}
        for number in sorted(numbers):
            tree, within = _split(number)
            if within < _EMPTY:
                wanted.setdefault(tree, []).append((within, INODE_ITEM, 0))
        for tree, keys in wanted.items():
            self._tree(tree).prefetch(keys)

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        tree, number = _split(file.inode)
        try:
            return self._data.pieces(self._tree(tree), number, file.size)
        except DamageError as error:
            raise _about(file.inode, error) from None

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        tree, number = _split(file.inode)
        try:
            inode, _has_xattrs = self._inode(tree, number)
            checked = not inode.flags & NO_CHECKSUMS
            return self._data.read(self._tree(tree), number, offset, size, checked=checked)
        except DamageError as error:
            raise _about(file.inode, error) from None

    def decoded_from(self, file: Entry) -> Sequence[Piece]:
        tree, number = _split(file.inode)
        try:
            inode, _has_xattrs = self._inode(tree, number)
            checked = not inode.flags & NO_CHECKSUMS
            return self._data.stored(self._tree(tree), number, file.size, checked=checked)
        except DamageError as error:
            raise _about(file.inode, error) from None

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        tree, number = _split(entry.inode)
        found: dict[bytes, bytes] = {}
        if not entry.has_xattrs:
            return found
        try:
            for _key, item in self._tree(tree).items((number, XATTR_ITEM, 0), (number, XATTR_ITEM + 1, 0)):
                for name in names_in(item):
                    if not name.name or b"\0" in name.name or name.name in found:
                        raise DamageError(
                            "the name of an extended attribute is empty, is there twice, or contains NUL"
                        )
                    found[name.name] = name.value
        except DamageError as error:
            raise _about(entry.inode, error) from None
        return found

    def _open_tree(self, number: int) -> Tree:
        """Raises DamageError."""
        root = self._root_of(number)
        if root is None:
            raise DamageError(f"there is no tree {number}")
        return Tree(self._nodes, root, number)

    def _root_of(self, number: int) -> Root | None:
        """Where a tree begins; None where there is none. Raises DamageError."""
        for _key, item in self._roots.items((number, ROOT_ITEM, 0), (number, ROOT_ITEM + 1, 0)):
            return root_in(item)
        return None

    def _inode(self, tree: int, number: int) -> tuple[Inode, bool]:
        """An inode, and whether it has extended attributes. Raises DamageError."""
        key = (number, INODE_ITEM, 0)
        opened = self._tree(tree)
        node, at, after = opened.leaf(key)
        rows = node.rows
        if at == len(rows) or rows[at][:3] != key:
            raise DamageError("there is no such inode")
        for row in rows[at:]:
            if row[1] >= XATTR_ITEM or row[0] != number:
                return inode_in(node.item(rows[at])), row[0] == number and row[1] == XATTR_ITEM
        # The leaf ends before the inode's names do.
        end = (number, XATTR_ITEM + 1, 0)
        has_xattrs = after is not None and any(
            key[1] == XATTR_ITEM for key, _item in opened.items(after, end)
        )
        return inode_in(node.item(rows[at])), has_xattrs

    def _target(self, tree: int, number: int, size: int) -> bytes:
        item = self._tree(tree).find((number, EXTENT_DATA, 0))
        if item is None or not 0 < size <= _MOST_LINK:
            raise DamageError("a link has an impossible target")
        extent = extent_in(0, item, self._superblock.sector_size, _MOST_LINK + 1)
        # mkfs.btrfs stores a NUL after the target of a link that it copies.
        target = None if extent.inline is None or extent.compression else extent.inline[:size]
        if target is None or len(target) != size or b"\0" in target:
            raise DamageError("a link has an impossible target")
        return target

    def _number(self, tree: int, directory: int, name: Name) -> int:
        """The number of the inode that a name in a directory is of. Raises DamageError, UnsupportedError."""
        object_, kind, _offset = name.key
        if kind == INODE_ITEM:
            if not object_ >= FIRST_FREE:
                raise DamageError(f"a name has the impossible inode {object_}")
            if object_ >= _EMPTY:
                raise UnsupportedError(f"the inode number {object_} is not supported")
            return tree << _BITS | object_
        if kind != ROOT_ITEM or not is_subvolume(object_):
            raise DamageError("a name leads to something that is neither an inode nor a subvolume")
        if object_ >= _MOST_SUBVOLUMES:
            raise UnsupportedError(f"the subvolume number {object_} is not supported")
        item = self._roots.find((tree, ROOT_REF, object_))
        if (
            item is not None
            and reference_in(item) == (directory, name.name)
            and self._root_of(object_) is not None
        ):
            return object_ << _BITS | FIRST_FREE
        # A snapshot has an empty directory where the subvolume that it is of has a subvolume.
        number = tree << _BITS | _EMPTY | object_
        if len(self._above) >= _MOST_ABOVE:
            self._above.clear()
        self._above[number] = directory
        return number


def _split(number: int) -> tuple[int, int]:
    """The subvolume of an inode, and its number there."""
    return number >> _BITS, number & ((1 << _BITS) - 1)


def _about(number: int, error: DamageError) -> DamageError:
    tree, within = _split(number)
    return type(error)(f"inode {within} of subvolume {tree}: {error}")
