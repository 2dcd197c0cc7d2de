"""What the catalog says about the directories of one archive of version 1.

A hint: `Archive` compares it with the archive's own tables, and reads the archive where they differ or where
the catalog is damaged. From any thread; the root's table is found again by each until one has found it.
"""

from __future__ import annotations

import stat as stat_bits
from collections.abc import Iterator

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry, Stream
from pbsfs.contents.faults import Faults
from pbsfs.contents.table import Table
from pbsfs.formats import catalog
from pbsfs.formats.catalog import Catalog, CatalogEntry
from pbsfs.formats.pxar import hash_name

TYPES = {
    catalog.DIRECTORY: stat_bits.S_IFDIR,
    catalog.FILE: stat_bits.S_IFREG,
    catalog.HARDLINK: stat_bits.S_IFREG,
    catalog.SYMLINK: stat_bits.S_IFLNK,
    catalog.BLOCK: stat_bits.S_IFBLK,
    catalog.CHARACTER: stat_bits.S_IFCHR,
    catalog.FIFO: stat_bits.S_IFIFO,
    catalog.SOCKET: stat_bits.S_IFSOCK,
}
"""The bits of st_mode for the types in a catalog."""


class Hints:
    """The archive `name` (`root.pxar.didx`) in the catalog that `stream` holds."""

    def __init__(self, stream: Stream, name: bytes) -> None:
        self._stream = stream
        self._name = name
        self._opened: tuple[Catalog, int] | None = None

    def _open(self) -> tuple[Catalog, int]:
        """The catalog, and the table of the archive's root."""
        if self._opened is None:
            opened = Catalog(self._stream.pread, self._stream.size)
            blocks = [
                entry.block
                for entry in opened.table(opened.root)
                if entry.name == self._name and entry.type == catalog.DIRECTORY
            ]
            if not blocks:
                raise DamageError("the catalog does not have the archive")
            self._opened = (opened, blocks[0])
        return self._opened

    def table(self, directory: Entry) -> list[CatalogEntry] | None:
        """The entries of `directory`; None where the catalog does not help.

        Raises KeyRequiredError, SourceError.
        """
        try:
            opened, root = self._open()
            block = directory.hint or (0 if directory.name else root)
            return opened.table(block) if block else None
        except DamageError:
            return None

    def entries(self, directory: Entry, table: Table) -> list[Entry] | None:
        """The entries of `directory`, not exact, in the order of the archive.

        None where the catalog and the directory's `table` differ in any way. Raises as `table`.
        """
        hints = self.table(directory)
        if hints is None:
            return None
        faults = Faults()
        ends, positions = table.ends(faults), table.by_hash()
        if faults.count or not len(hints) == len(ends) == len(positions):
            return None
        found: dict[int, Entry] = {}
        for hint in hints:
            position = positions.get(hash_name(hint.name))
            if position is None or position in found:
                return None
            found[position] = Entry(
                hint.name,
                TYPES[hint.type],
                mtime_ns=hint.mtime * 1_000_000_000,
                size=hint.size,
                inode=0 if hint.type == catalog.HARDLINK else position,
                exact=False,
                position=position,
                end=ends[position],
                hint=hint.block,
            )
        entries = [found[position] for position in sorted(found)]
        before = table.start
        for entry in entries:
            if before > entry.position:
                return None
            before = entry.end if entry.is_directory else entry.position
        return entries if before <= table.goodbye else None

    def blocks(self, directory: Entry) -> dict[bytes, int]:
        """The hints of the directories in `directory`, by name."""
        return {entry.name: entry.block for entry in self.table(directory) or () if entry.block}

    def with_hard_links(self) -> set[int] | None:
        """The tables in which hard links are, and those through which they are reached; None where the
        catalog does not help."""
        try:
            return self._with_hard_links()
        except DamageError:
            return None

    def _with_hard_links(self) -> set[int]:
        opened, root = self._open()
        left = opened.size  # each entry takes some bytes, so there are fewer, unless tables overlap
        found: set[int] = set()
        seen = {root}

        def subdirectories(block: int) -> Iterator[int]:
            nonlocal left
            entries = opened.table(block)
            left -= len(entries) + 1
            if left < 0:
                raise DamageError("the catalog's tables overlap")
            if any(entry.type == catalog.HARDLINK for entry in entries):
                found.add(block)
            return iter([entry.block for entry in entries if entry.block])

        stack = [(root, subdirectories(root))]
        while stack:
            block, below = stack[-1]
            child = next(below, None)
            if child is None:
                stack.pop()
                if block in found and stack:
                    found.add(stack[-1][0])
            elif child not in seen:
                seen.add(child)
                stack.append((child, subdirectories(child)))
        return found
