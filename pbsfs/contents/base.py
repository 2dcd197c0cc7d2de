"""What every reader of contents offers: directories, entries, and the ranges that hold a file's bytes.

A reader of contents gives the positions of a file's bytes, not the bytes: they come from the stream itself,
with its cache and read-ahead. Synchronous; a reader may be called from several threads at once.
"""

from __future__ import annotations

import abc
import re
import stat as stat_bits
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pbsfs.base.errors import DamageError

MAX_PATH = 64 << 10
"""Bytes of a path that `walk` follows: far more than programs can open, and few enough to be built anew for
each entry."""

WALKED_TOGETHER = 1024
"""Entries of a directory that `walk` comes to together."""

FILE_TYPES = frozenset(
    (
        *(stat_bits.S_IFREG, stat_bits.S_IFDIR, stat_bits.S_IFLNK, stat_bits.S_IFCHR),
        *(stat_bits.S_IFBLK, stat_bits.S_IFIFO, stat_bits.S_IFSOCK),
    )
)
"""The types that an entry may have, as in st_mode."""


class Stream(Protocol):
    """The bytes that a reader of contents reads: an archive, or a disk. `size`: in bytes."""

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, size: int) -> bytes:
        """The bytes `offset` … `offset + size`, cut at the end of the stream; never zeros instead of
        damaged data. Raises DamageError, KeyRequiredError, SourceError."""

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Requests ranges, each of an offset and a size, side by side, ahead of `pread`. Raises nothing."""


class Entry(NamedTuple):
    """A directory, file, link, device, FIFO or socket, as it is stored.

    `name`: empty for the root. `mode`: type and permissions, as st_mode. `mtime_ns`: nanoseconds since the
    epoch, negative before it. `size`: of a file, in bytes; of a link, the length of its target; else 0.
    `inode`: the same for all names of one file, and for nothing else in these contents. `rdev`: the device
    number of a device, as `os.makedev` returns it. `target`: of a link. `has_xattrs`: whether it has extended
    attributes or access control lists.

    `exact`: False where only `name`, the type in `mode`, and perhaps `size` and `mtime_ns` are known, from a
    source that may be wrong; `Contents.complete` reads the rest. `position`: about where it reads them in a
    stream. `end`, `hint`: the reader's own. `links`: how many names a file has, where an entry says it.
    """

    name: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    inode: int = 0
    rdev: int = 0
    target: bytes | None = None
    has_xattrs: bool = False
    exact: bool = True
    position: int = 0
    end: int = 0
    hint: int = 0
    links: int = 1

    def but(self, **changes: Any) -> Entry:
        """The entry with other values of some fields."""
        return self._replace(**changes)

    def named(self, name: bytes) -> Entry:
        """`but(name=name)`, in a quarter of the time: done for every entry of a file system."""
        return Entry._make((name, *self[1:]))

    @property
    def is_directory(self) -> bool:
        return stat_bits.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat_bits.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat_bits.S_ISLNK(self.mode)


DECODED = -1
"""As `Piece.stream`: bytes that lie in no stream as they are; `offset` counts in the file."""


class Piece(NamedTuple):
    """`length` bytes of a file: from `offset` of the stream with the number `stream`; None for zeros, and
    DECODED for those that `Contents.read` returns."""

    stream: int | None
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a directory holds. `damage`: why there may be more than these entries; None where all are here."""

    entries: list[Entry]
    damage: DamageError | None = None


class Contents(abc.ABC):
    """An archive or a file system. Every method raises DamageError, KeyRequiredError and SourceError."""

    streams: Sequence[Stream]
    """What it reads from, in the order that `Piece.stream` counts."""

    root: Entry

    @abc.abstractmethod
    def children(self, directory: Entry, *, names_only: bool = False) -> Found:
        """What `directory` holds, in the order in which it is stored.

        `names_only`: the caller needs names and types only; where the rest costs more reads, the entries are
        not exact.
        """

    @abc.abstractmethod
    def child(self, directory: Entry, name: bytes) -> Entry | None:
        """The exact entry `name` of `directory`; None where there is none."""

    @abc.abstractmethod
    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        """The exact forms of `entries`, which `children` returned of `directory`, read side by side.

        For each: None where it does not exist after all, an error where it cannot be read.
        """

    @abc.abstractmethod
    def link_count(self, entry: Entry) -> int:
        """How many names a file has; 1 for all else. The first call may read all metadata once."""

    @property
    @abc.abstractmethod
    def knows_link_counts(self) -> bool:
        """Whether `link_count` returns without reading."""

    @property
    def counts_all_links(self) -> bool:
        """Whether `link_count`, once it was called, counts all names, not only those that were listed."""
        return True

    @abc.abstractmethod
    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        """Where the bytes of an exact `file` are: pieces in order, `file.size` bytes in all.

        Zeros that the stream itself stores as a hole are not set apart. `unconfirmed`: also where damage
        hides what confirms the place, for callers that put zeros instead of damaged bytes.
        """

    def data_at_once(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece] | None:
        """`data` for a thread that must wait for nothing but `streams`; None where more is needed."""
        return self.data(file, unconfirmed=unconfirmed)

    def data_through(
        self, file: Entry, streams: Sequence[Stream], *, unconfirmed: bool = False
    ) -> Sequence[Piece]:
        """`data` for a caller that reads the bytes with `streams`, its own for the same bytes: what confirms
        the place may be read with them too."""
        return self.data(file, unconfirmed=unconfirmed)

    def stored_at(self, file: Entry) -> Piece | None:
        """Where the bytes of an exact `file` are, if the entry says that without reading; not checked."""
        return None

    @abc.abstractmethod
    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        """The extended attributes by name, with access control lists as `system.posix_acl_access` and
        `system.posix_acl_default` in the kernel's form (linux/posix_acl_xattr.h)."""

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of an exact `file`, of a range that lies in pieces which are DECODED."""
        raise NotImplementedError

    def decoded_from(self, file: Entry) -> Sequence[Piece] | None:
        """The ranges of streams that the DECODED bytes of an exact `file` are decoded from, in any order, all
        copies of them; None where only `read` gives them. What lies with the metadata is not among them."""
        return None

    def facts(self) -> dict[str, str]:
        """What people ask about these contents as a whole, by name; text from outside is not escaped."""
        return {}

    def size_below(self, directory: Entry) -> int | None:
        """Bytes of the files below `directory`, about; None where finding out costs much."""
        return None

    def walk(
        self, directory: Entry, *, enter: Callable[[bytes], bool] = lambda _path: True
    ) -> Iterator[tuple[bytes, Entry | DamageError]]:
        """All below `directory`, in the order in which it is stored, each directory before what it holds.

        Yields paths relative to `directory` with exact entries. Where a directory cannot be listed, or not in
        full, its path comes with the error (again, if it was yielded before). `enter`: called with the path
        of each directory after it was yielded: whether to list it.
        """
        stack: list[Iterator[tuple[bytes, Entry | DamageError]]] = [self._level(directory, b"")]
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
                continue
            yield item
            path, entry = item
            if isinstance(entry, Entry) and entry.is_directory and enter(path):
                stack.append(self._level(entry, path + b"/"))

    def reach(self, entries: Sequence[Entry]) -> None:
        """Takes note that `walk` yields `entries` next, which `children` returned long before."""
        return

    def search(
        self, directory: Entry, name: re.Pattern[bytes]
    ) -> Iterator[tuple[bytes, Entry | DamageError]]:
        """What `walk` yields, but only entries whose whole name matches; what cannot be read too.

        `name`: matches neither NUL nor a slash.
        """
        for path, entry in self.walk(directory):
            if not isinstance(entry, Entry) or name.fullmatch(entry.name):
                yield path, entry

    def _level(self, directory: Entry, prefix: bytes) -> Iterator[tuple[bytes, Entry | DamageError]]:
        if len(prefix) > MAX_PATH:
            yield prefix.removesuffix(b"/"), DamageError("directories are nested too deep")
            return
        try:
            found = self.children(directory)
        except DamageError as error:
            yield prefix.removesuffix(b"/"), error
            return
        for start in range(0, len(found.entries), WALKED_TOGETHER):
            together = found.entries[start : start + WALKED_TOGETHER]
            if start:
                self.reach(together)
            for entry in together:
                yield prefix + entry.name, entry
        if found.damage is not None:
            yield prefix.removesuffix(b"/"), found.damage
