"""How many names each file of an archive has. An archive does not say: its hard links have to be counted.

In version 2 all metadata are searched once for hard links, and all directories are read if there are any. In
version 1, where that would cost the whole archive, the catalog says in which directories they are; without a
catalog, those count that were seen. From any thread: one counts while the others wait.
"""

from __future__ import annotations

import stat as stat_bits
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from pbsfs.base.errors import DamageError, PbsfsError
from pbsfs.contents.base import Entry
from pbsfs.contents.hints import Hints
from pbsfs.contents.items import Items
from pbsfs.formats import pxar

SMALL = 8 << 20
"""Bytes of metadata that are searched as soon as a directory is listed."""

STEP = 1 << 20
"""Bytes that are searched in one go."""

AHEAD = 16
"""Steps that are requested side by side."""

MAX_SEEN = 1 << 16
"""Hard links that are kept, where those count that were seen."""

_MARK = pxar.HARDLINK.to_bytes(8, "little")


class Directories(Protocol):
    """What is asked of the archive."""

    @property
    def root(self) -> Entry: ...

    def exact(self, directory: Entry) -> tuple[list[Entry], list[int]]:
        """The entries of a directory, and the targets of the hard links in it."""

    def named(self, directory: Entry) -> list[Entry] | None:
        """The entries by the catalog, not exact; None where it differs from the archive."""

    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]: ...


class LinkCounts:
    """The numbers of names of an archive's files, by position."""

    def __init__(self, items: Items, hints: Hints | None) -> None:
        self._items = items
        self._hints = hints
        self._lock = threading.Lock()
        self._targets: array[int] | None = None  # one for each hard link, sorted
        self.counts_seen = hints is None and not items.split
        """Whether `of` counts those names only that were seen."""
        self._seen: dict[int, int] = {}
        self._seen_counts: Counter[int] = Counter()

    @property
    def known(self) -> bool:
        """Whether `of` returns without reading."""
        return self._targets is not None or self.counts_seen

    def of(self, archive: Directories, position: int) -> int:
        """How many names the file at `position` has. Raises KeyRequiredError, SourceError."""
        targets = self._targets  # which never changes once it is set
        if targets is None:
            targets = self._count(archive)
        if targets is None:
            with self._lock:
                return 1 + self._seen_counts[position]
        return 1 + bisect_right(targets, position) - bisect_left(targets, position)

    def saw(self, position: int, target: int) -> None:
        """Takes note of the hard link at `position`."""
        if not self.counts_seen:
            return
        with self._lock:
            if position not in self._seen and len(self._seen) < MAX_SEEN:
                self._seen[position] = target
                self._seen_counts[target] += 1

    def prepare(self, archive: Directories) -> None:
        """Counts where that costs little, so that listings have the numbers. Raises nothing."""
        if self.known or not self._items.split or self._items.stream.size > SMALL:
            return
        try:
            self._count(archive)
        except PbsfsError:
            return  # `of` tries again, and raises it

    def _count(self, archive: Directories) -> array[int] | None:
        """The targets; None where those count that were seen."""
        with self._lock:
            if self._targets is not None or self.counts_seen:
                return self._targets
            if self._hints is None:
                targets = _in_all_directories(archive) if self._may_have_links() else array("Q")
            else:
                blocks = self._hints.with_hard_links()
                if blocks is None:
                    self.counts_seen = True
                    return None
                targets = _in_directories(archive, blocks) if blocks else array("Q")
            self._targets = array("Q", sorted(targets))
            return self._targets

    def _may_have_links(self) -> bool:
        """Whether the type of hard links occurs in the metadata, as it may in a name too."""
        stream = self._items.stream
        for start in range(0, stream.size, STEP):
            if start % (AHEAD * STEP) == 0:
                stop = min(start + AHEAD * STEP, stream.size)
                stream.prefetch([(at, min(STEP, stop - at)) for at in range(start, stop, STEP)])
            size = min(STEP + len(_MARK) - 1, stream.size - start)
            try:
                if _MARK in stream.pread(start, size):
                    return True
            except DamageError:
                return True  # they may lie beside the damage
        return False


def _in_all_directories(archive: Directories) -> array[int]:
    targets = array("Q")
    stack = [archive.root]
    while stack:
        try:
            entries, links = archive.exact(stack.pop())
        except DamageError:
            continue  # what cannot be listed has no names
        targets.extend(links)
        stack.extend(entry for entry in entries if entry.is_directory)
    return targets


def _in_directories(archive: Directories, blocks: set[int]) -> array[int]:
    """The targets in the directories with these tables in the catalog."""
    targets = array("Q")
    stack = [archive.root]
    while stack:
        directory = stack.pop()
        try:
            entries = archive.named(directory)
            if entries is None:
                entries, links = archive.exact(directory)
                targets.extend(links)
            else:
                wanted = [entry for entry in entries if stat_bits.S_ISREG(entry.mode) and not entry.inode]
                for entry, done in zip(wanted, archive.complete(directory, wanted), strict=True):
                    if isinstance(done, Entry) and done.position != entry.position:
                        targets.append(done.position)
        except DamageError:
            continue
        stack.extend(entry for entry in entries if entry.is_directory and entry.hint in blocks)
    return targets
