"""ext2, ext3 and ext4 as a `FileSystem`. Of one thread."""

from __future__ import annotations

import functools
import itertools
import stat as stat_bits
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import DECODED, Entry, Piece
from pbsfs.contents.faults import Faults
from pbsfs.disks.ext import directory as directories
from pbsfs.disks.ext import superblock as superblocks
from pbsfs.disks.ext import xattr
from pbsfs.disks.ext.blocks import WINDOW, Blocks
from pbsfs.disks.ext.groups import Groups
from pbsfs.disks.ext.inode import (
    ENCRYPTED,
    EXTENTS,
    INLINE,
    ROOT,
    XATTR_VALUE,
    Inode,
    check_named,
)
from pbsfs.disks.ext.inodes import PREFETCHED, Inodes
from pbsfs.disks.ext.journal import Journal, Replay
from pbsfs.disks.ext.mapping import Mapping, Run
from pbsfs.disks.ext.superblock import HAS_JOURNAL, RECOVER
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.pieces import append
from pbsfs.disks.volume import Volume

MOST_DIRECTORY: Final = 4 << 30
"""Bytes of a directory."""

MOST_TARGET: Final = 4095
"""Bytes of the target of a link, as the kernel allows."""

MOST_INODES: Final = 4 << 20
"""Bytes of inodes that are kept: those of a directory of files that are listed, and then read."""


def recognise(volume: Volume) -> bool:
    """Whether an ext file system seems to be in `volume`. Raises KeyRequiredError, SourceError."""
    try:
        return superblocks.is_superblock(volume.read(superblocks.OFFSET, superblocks.SIZE))
    except DamageError:
        return False


class Ext(FileSystem):
    """An ext2, ext3 or ext4 that is open, as it is after the replay of its journal."""

    def __init__(self, volume: Volume) -> None:
        """Raises DamageError where `volume` does not hold one that can be read; UnsupportedError where it has
        a feature that pbsfs does not read."""
        super().__init__(volume)
        self._open(Blocks(volume, superblocks.parse_superblock(self._head()).block_size), self._head())
        self._journal = self._replay()
        self.kind = self._superblock.kind
        self.root = self.inode(ROOT)
        if not self.root.is_directory:
            raise DamageError("the root is not a directory")

    def facts(self) -> dict[str, str]:
        uuid = self._superblock.uuid.hex()
        return {
            "label": self._superblock.label.decode(errors="backslashreplace"),
            "uuid": "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:])),
            "journal": self._journal,
        }

    # --- directories and inodes

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        inode = self._inode(directory.inode)
        if inode.flags & ENCRYPTED:
            raise UnsupportedError(f"directory {inode.number}: an encrypted directory is not supported")
        if inode.size > MOST_DIRECTORY:
            raise UnsupportedError(f"directory {inode.number}: one of {inode.size} bytes is not supported")
        if inode.flags & INLINE:
            yield from self._inline_names(inode)
            return
        faults = Faults()
        for number, block in self._directory_blocks(inode):
            try:
                data = self._blocks.read(block)
                directories.verify(self._superblock, inode, data, first=number == 0)
                yield from directories.names_in(self._superblock, inode.number, data, first=number == 0)
            except DamageError as error:
                faults.add(error)
        problem = faults.summary()
        if problem is not None:
            raise problem

    def inode(self, number: int) -> Entry:
        inode = self._inode(number)
        check_named(self._superblock, inode)
        kind = stat_bits.S_IFMT(inode.mode)
        target = self._target(inode) if kind == stat_bits.S_IFLNK else None
        device = kind in {stat_bits.S_IFCHR, stat_bits.S_IFBLK}
        size = inode.size if kind in {stat_bits.S_IFREG, stat_bits.S_IFLNK} else 0
        links = inode.links if kind != stat_bits.S_IFDIR else 1
        rdev = inode.rdev if device else 0
        has_xattrs = xattr.has_shown(inode)
        owner = inode.uid, inode.gid
        rest = rdev, target, has_xattrs, True, 0, 0, 0, links
        return Entry._make((b"", inode.mode, *owner, inode.mtime_ns, size, number, *rest))

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        self._inodes.prefetch(numbers)

    def _target(self, inode: Inode) -> bytes:
        if inode.flags & ENCRYPTED:
            raise UnsupportedError(f"inode {inode.number}: an encrypted link is not supported")
        size = inode.size
        if size > MOST_TARGET or not size:
            raise DamageError(f"inode {inode.number}: the target of the link has {size} bytes")
        if inode.flags & INLINE:
            target = self._inline(inode)
        elif size < 60 and not inode.flags & EXTENTS:
            target = inode.map[:size]
        else:
            target = self._whole(inode)
        if len(target) != size or b"\0" in target:
            raise DamageError(f"inode {inode.number}: the target of the link is damaged")
        return target

    def _inline_names(self, inode: Inode) -> Iterator[tuple[bytes, int, int]]:
        """The inode of the parent, then two rows of names: in the map, and where it goes on."""
        data = self._inline(inode)
        for part in (data[4:60], data[60:]):
            if part:
                yield from directories.names_in(self._superblock, inode.number, part, first=False)

    def _directory_blocks(self, inode: Inode) -> Iterator[tuple[int, int]]:
        """The blocks of a directory: in it, and in the volume. Raises DamageError for a hole in it, and where
        two parts of it are in the same place."""
        size = self._blocks.size
        count, rest = divmod(inode.size, size)
        runs = list(self._until(inode, count))
        places = sorted((run.block, run.count) for run in runs if run.block is not None)
        whole = sum(length for _, length in places)
        apart = all(one[0] + one[1] <= other[0] for one, other in itertools.pairwise(places))
        if rest or whole != count or not apart:
            raise DamageError(f"directory {inode.number}: its blocks are not all there")
        if len(places) > 1 or count * size > WINDOW:
            with suppress(DamageError):  # reading says which
                self.volume.prefetch([(block * size, length * size) for block, length in places[:PREFETCHED]])
        for run in runs:
            if run.block is not None:
                for index in range(run.count):
                    yield run.logical + index, run.block + index

    # --- data

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        inode = self._file(file)
        pieces: list[Piece] = []
        if inode.flags & INLINE:
            stored = len(self._inline(inode))
            append(pieces, Piece(DECODED, 0, stored))
            append(pieces, Piece(None, 0, inode.size - stored))
            return pieces
        size = self._blocks.size
        at = 0
        for run in self._until(inode, -(-inode.size // size)):
            start = run.logical * size
            append(pieces, Piece(None, 0, start - at))
            at = min(start + run.count * size, inode.size)
            if run.block is None:
                append(pieces, Piece(None, 0, at - start))
                continue
            for first, count, copied in self._blocks.stretches(run.block, run.count):
                offset = start + (first - run.block) * size
                length = min(count * size, inode.size - offset)
                if copied:
                    append(pieces, Piece(DECODED, offset, length))
                else:
                    for piece in self.volume.pieces(first * size, length):
                        append(pieces, piece)
        append(pieces, Piece(None, 0, inode.size - at))
        return pieces

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        inode = self._file(file)
        if inode.flags & INLINE:
            found = self._inline(inode)[offset : offset + size]
        else:
            found = b"".join(self._decoded(inode, offset, offset + size))
        if len(found) != size:
            raise DamageError(f"inode {inode.number}: bytes {offset} to {offset + size} are not stored in it")
        return found

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        inode = self._inode(entry.inode)
        found = xattr.in_inode(inode, self._value)
        if inode.xattr_block:
            block = self._blocks.read(inode.xattr_block)
            found |= xattr.in_block(self._superblock, inode, block, self._value)
        return found

    def _file(self, file: Entry) -> Inode:
        inode = self._inode(file.inode)
        if inode.flags & ENCRYPTED:
            raise UnsupportedError(f"inode {inode.number}: an encrypted file is not supported")
        return inode

    def _inline(self, inode: Inode) -> bytes:
        """The data that is in an inode; what lacks to its size reads as zeros."""
        found = xattr.inline_data(inode)[: inode.size]
        if inode.size > max(len(found), self._blocks.size):
            raise DamageError(f"inode {inode.number}: the data in it is shorter than its size")
        return found

    def _decoded(self, inode: Inode, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, of blocks."""
        size = self._blocks.size
        for run in self._until(inode, -(-end // size)):
            first = max(run.logical, start // size)
            for number in range(first, run.logical + run.count):
                if run.block is not None:
                    block = self._blocks.read(run.block + number - run.logical)
                    yield block[max(start - number * size, 0) : end - number * size]

    def _until(self, inode: Inode, end: int) -> Iterator[Run]:
        """The runs of the blocks before `end`."""
        for run in self._mapping.runs(inode):
            if run.logical >= end:
                return
            yield Run(run.logical, run.block, min(run.count, end - run.logical))

    def _whole(self, inode: Inode) -> bytes:
        """All bytes of a small file."""
        return b"".join(self._decoded(inode, 0, inode.size))

    def _value(self, number: int, size: int) -> bytes:
        """The value of an extended attribute that is in an inode of its own (fs/ext4/xattr.c)."""
        inode = self._inode(number)
        if not inode.flags & XATTR_VALUE or inode.size != size:
            raise DamageError(f"inode {number}: it is not the value of an extended attribute")
        value = self._whole(inode)
        if len(value) != size:
            raise DamageError(f"inode {number}: the value of an extended attribute is not all there")
        return value

    # --- opening

    def _head(self) -> bytes:
        return self.volume.read(superblocks.OFFSET, superblocks.SIZE)

    def _open(self, blocks: Blocks, head: bytes) -> None:
        self._superblock = superblocks.parse_superblock(head)
        self._blocks = blocks
        self._inodes = Inodes(self._superblock, blocks, Groups(self._superblock, blocks))
        self._mapping = Mapping(self._superblock, blocks)
        kept = MOST_INODES // (self._superblock.inode_size + 1024)  # an inode with its fields as objects
        self._inode = functools.lru_cache(kept)(self._inodes.read)

    def _replay(self) -> str:
        """Reads all blocks through the journal from now on. Returns what `facts` says of it."""
        superblock = self._superblock
        if not superblock.compat & HAS_JOURNAL:
            return "none"
        if not superblock.incompat & RECOVER:
            return "clean"
        if not superblock.journal_inode:
            return "not replayed: it is on another device"
        try:
            inode = self._inode(superblock.journal_inode)
            journal = Journal(self._blocks, list(self._until(inode, inode.size // self._blocks.size)))
        except DamageError as error:
            return f"not replayed: {error}"
        if not journal.is_open:
            return "clean"
        done = journal.replay(self.volume.size // self._blocks.size)
        self._use(done)
        replayed = f"replayed: {len(done.copies)} blocks of {done.transactions} transactions"
        if done.problem is None:
            return replayed
        return f"not replayed: {done.problem}" + (f"; before it, {replayed}" if done.transactions else "")

    def _use(self, done: Replay) -> None:
        if not done.copies:
            return
        blocks = Blocks(self.volume, self._blocks.size, done.copies)
        number, offset = divmod(superblocks.OFFSET, blocks.size)
        self._open(blocks, blocks.read(number)[offset : offset + superblocks.SIZE])
