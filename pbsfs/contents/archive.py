"""A pxar archive: its directories by their goodbye tables, at random.

Version 1 is one stream, version 2 is one of metadata and one of payloads. Nothing that an archive says is
believed: every range is checked against the one it has to lie in, so that no directory can hold itself. From
any thread; threads share only values that never change (the last window that was read is one).
"""

from __future__ import annotations

import stat as stat_bits
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Contents, Entry, Found, Piece, Stream
from pbsfs.formats import pxar
from pbsfs.formats.pxar import HEADER, HEADER_SIZE, ITEM, ITEM_SIZE, Parsed, ShortError

WINDOW = 256 << 10
"""Bytes that are read in one go, where entries lie close together."""

GAP = 16 << 10
"""Bytes between two entries that are read across: less than a request of their own costs."""

HEAD = 1 << 10
"""Bytes that hold most entries, without payload."""

TAIL = 16 << 10
"""Bytes at a directory's end that are read first: they hold the tables of most directories, 680 entries."""

BATCH = 64
"""Windows that are requested side by side."""

MAX_ENTRIES = 4 << 20
"""Entries of one directory, at most."""

ROOT_INODE = 1
"""No other entry lies there: the root's own ENTRY item does."""

Decoded = tuple[int, "Parsed | DamageError"]


class _Table(NamedTuple):
    """A directory's goodbye table. `goodbye`: where it starts. `rows`: its items as they are stored."""

    goodbye: int
    rows: bytes


class Archive(Contents):
    """An archive that is open."""

    def __init__(self, main: Stream, payload: Stream | None = None) -> None:
        """`main`: the archive, or in version 2 its metadata; then `payload` is its payload stream.

        Raises DamageError, KeyRequiredError, SourceError.
        """
        self.streams = [main] if payload is None else [main, payload]
        self._main = main
        self._payload = payload
        self._window: tuple[int, bytes] = (0, b"")
        self._root_at = self._skip_start()
        self.root = self._open_root()

    # --- opening

    def _skip_start(self) -> int:
        """Where the root's ENTRY item is."""
        kind, size, version = ITEM.unpack(self._read(0, ITEM.size))
        if (kind == pxar.FORMAT_VERSION) != (self._payload is not None):
            raise DamageError(
                "the archive is not of version 2, though it has a payload stream"
                if self._payload is not None
                else "the archive is of version 2, and its payload stream is missing"
            )
        if kind != pxar.FORMAT_VERSION:
            return 0
        if size != ITEM.size or version != 2:
            raise DamageError(f"an archive of version {version}, which pbsfs cannot read")
        kind, size = HEADER.unpack(self._read(ITEM.size, HEADER_SIZE))
        if kind != pxar.PRELUDE:
            return ITEM.size
        if not HEADER_SIZE <= size <= self._main.size:
            raise DamageError(f"a prelude of {size} bytes")
        return ITEM.size + int(size)

    def _open_root(self) -> Entry:
        parsed = self._parse_one(self._root_at, self._main.size, root=True)
        return Entry(
            b"",
            parsed.mode,
            parsed.uid,
            parsed.gid,
            parsed.mtime_ns,
            inode=ROOT_INODE,
            has_xattrs=parsed.has_xattrs,
            position=self._root_at,
            end=self._main.size,
        )

    # --- bytes

    def _read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes of the archive. Raises DamageError where there are fewer."""
        base, data = self._at(offset, size)
        start = offset - base
        if len(data) < start + size:
            raise DamageError(f"the archive ends in the middle of an item at byte {offset}")
        return data[start : start + size]

    def _at(self, offset: int, size: int) -> tuple[int, bytes]:
        """A window that holds `size` bytes from `offset`, as far as they exist, and where it starts."""
        base, data = window = self._window
        if base <= offset and offset + size <= base + len(data):
            return window
        if self._payload is not None and size < WINDOW:
            # Metadata lie close together: what is read next is most likely near.
            base = offset & -(WINDOW // 4)
            size = max(WINDOW, offset + size - base)
        else:
            base = offset
        size = max(0, min(size, self._main.size - base))
        window = (base, self._main.pread(base, size))
        self._window = window
        return window

    # --- entries

    def _parse_one(self, position: int, limit: int, *, root: bool = False) -> Parsed:
        """The entry at `position`, with offsets of the archive. `limit`: the end of what may belong to it."""
        parse = pxar.parse_root if root else pxar.parse_entry
        size = HEAD
        while True:
            whole = size >= limit - position
            base, data = self._at(position, min(size, limit - position))
            try:
                # A window may hold more than belongs to this entry.
                at = position - base
                data = data[at : limit - base] if whole else data[at:]
                parsed = parse(data, 0, split=self._payload is not None)
            except ShortError as error:
                if whole:
                    raise _damaged(position, "an entry reaches beyond its directory") from None
                size = max(size * 4, error.needed)
                if size > 4 * pxar.MAX_ENTRY:
                    raise _damaged(position, "an entry is too large") from None
            except DamageError as error:
                raise _damaged(position, str(error)) from None
            else:
                return _moved(parsed, position, self._payload is not None)

    def _parse_all(self, positions: Sequence[int], limit: int) -> Iterator[Decoded]:
        """The entries at `positions`, in rising order, with offsets of the archive."""
        split = self._payload is not None
        windows = _windows(positions, limit)
        while batch := [window for window, _ in zip(windows, range(BATCH), strict=False)]:
            if len(batch) > 1 and not split:
                self._main.prefetch([(start, size) for start, size, _ in batch])
            for start, size, members in batch:
                base, data = self._at(start, size)
                stop = min(len(data), limit - base)
                for position in members:
                    try:
                        parsed = pxar.parse_entry(data, position - base, split=split)
                        if parsed.end > stop and (split or base + parsed.end > limit):
                            raise ShortError(0)
                        yield position, _moved(parsed, base, split)
                    except ShortError:
                        yield position, self._tried(position, limit)
                    except DamageError as error:
                        yield position, _damaged(position, str(error))

    def _tried(self, position: int, limit: int) -> Parsed | DamageError:
        try:
            return self._parse_one(position, limit)
        except DamageError as error:
            return error

    def _entry(self, position: int, parsed: Parsed, end: int, directory_end: int) -> Entry:
        """`end`: of a directory, as its parent's table has it. `directory_end`: of what holds it."""
        name, mode, uid, gid, mtime_ns, size, value, target, has_xattrs, after = parsed
        kind = mode & 0o170000
        if kind == stat_bits.S_IFREG:
            if self._payload is None:
                if after > directory_end:
                    raise _damaged(position, "a file reaches beyond its directory")
                end = after
            else:
                end = value + HEADER_SIZE + size
                if end > self._payload.size:
                    raise _damaged(position, "a file's content lies beyond the payload stream")
            return Entry(
                name, mode, uid, gid, mtime_ns, size, position, 0, None, has_xattrs, True, position, end
            )
        if kind == stat_bits.S_IFDIR:
            if not after < end <= directory_end:
                raise _damaged(position, "a directory reaches beyond the one that holds it")
            return Entry(
                name, mode, uid, gid, mtime_ns, 0, position, 0, None, has_xattrs, True, position, end
            )
        if mode == 0:
            where = position - value
            if not self._root_at < where < position:
                raise _damaged(position, "a hard link to what does not lie before it")
            try:
                goal = self._parse_one(where, position + HEADER_SIZE)
            except DamageError as error:
                raise _damaged(position, f"a hard link to what cannot be read: {error}") from None
            if not stat_bits.S_ISREG(goal.mode):
                raise _damaged(position, "a hard link to what is not a file")
            return replace(self._entry(where, goal, 0, position), name=name)
        return Entry(
            name, mode, uid, gid, mtime_ns, size, position, value, target, has_xattrs, True, position, after
        )

    # --- directories

    def _table(self, directory: Entry) -> _Table:
        """Raises DamageError, where a directory has none that is its own."""
        start, end = directory.position, directory.end
        guess = min(TAIL, end - start)
        base, data = self._at(end - guess, guess)
        if len(data) < end - base or guess < ITEM_SIZE:
            raise _damaged(start, "a directory is cut short")
        try:
            offset, size = pxar.parse_tail(data[end - base - ITEM_SIZE : end - base])
        except DamageError as error:
            raise _damaged(end - ITEM_SIZE, str(error)) from None
        goodbye = end - size
        name = directory.name
        entry = start + HEADER_SIZE + len(name) + 1 if directory is not self.root and name else 0
        if goodbye <= start or goodbye - offset != entry:
            raise _damaged(end - ITEM_SIZE, "a directory ends with a table that is not its own")
        if size > HEADER_SIZE + ITEM_SIZE * (MAX_ENTRIES + 1):
            raise _damaged(goodbye, f"a directory has more than {MAX_ENTRIES} entries")
        raw = self._read(goodbye, size)
        if HEADER.unpack_from(raw) != (pxar.GOODBYE, size):
            raise _damaged(goodbye, "a directory's table does not start where its end says")
        return _Table(goodbye, raw[HEADER_SIZE:-ITEM_SIZE])

    def children(self, directory: Entry, *, names_only: bool = False) -> Found:
        table = self._table(directory)
        goodbye = table.goodbye
        first = directory.position
        faults: list[DamageError] = []
        ends: dict[int, int] = {}
        for _hash, offset, size in ITEM.iter_unpack(table.rows):
            position = goodbye - offset
            if not first < position < goodbye or position in ends:
                faults.append(_damaged(goodbye, "a directory's table points to what is not its own"))
            else:
                ends[position] = position + size
        entries: list[Entry] = []
        names: set[bytes] = set()
        before = 0
        for position, parsed in self._parse_all(array("Q", sorted(ends)), goodbye + HEADER_SIZE):
            if isinstance(parsed, DamageError):
                faults.append(parsed)
                continue
            if before > position and entries:
                faults.append(_damaged(entries.pop().position, "an entry reaches into the next one"))
            try:
                entry = self._entry(position, parsed, ends[position], goodbye)
            except DamageError as error:
                faults.append(error)
                continue
            before = entry.end if entry.is_directory else parsed.end
            if entry.name in names:
                faults.append(_damaged(position, "a second entry with the same name"))
                continue
            names.add(entry.name)
            entries.append(entry)
        return Found(entries, _summary(faults))

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        table = self._table(directory)
        goodbye, rows = table
        wanted = struct.pack("<Q", pxar.hash_name(name))
        places = []
        at = rows.find(wanted)
        while at >= 0:
            if at % ITEM_SIZE == 0:
                _hash, offset, size = ITEM.unpack_from(rows, at)
                position = goodbye - offset
                if directory.position < position < goodbye:
                    places.append((position, position + size))
            at = rows.find(wanted, at + 1)
        for position, end in sorted(places):
            parsed = self._parse_one(position, goodbye + HEADER_SIZE)
            if parsed.name == name:
                return self._entry(position, parsed, end, goodbye)
        return None

    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        return list(entries)

    # --- files

    def data(self, file: Entry) -> Sequence[Piece]:
        start = file.end - file.size
        if self._payload is not None:
            found = HEADER.unpack(self._payload.pread(start - HEADER_SIZE, HEADER_SIZE))
            if found != (pxar.PAYLOAD, HEADER_SIZE + file.size):
                raise DamageError(f"the payload at byte {start - HEADER_SIZE} is not the one of this file")
        return [Piece(len(self.streams) - 1, start, file.size)] if file.size else []

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        if not entry.has_xattrs:
            return {}
        position = entry.position
        named = position != self._root_at
        # The entry was parsed, so its attributes are in what a parser takes.
        size = HEAD
        while True:
            size = min(size, self._main.size - position)
            base, data = self._at(position, size)
            parse = pxar.parse_entry if named else pxar.parse_root
            try:
                parse(data, position - base, split=self._payload is not None)
                return pxar.parse_xattrs(data, position - base, named=named)
            except ShortError as error:
                if size >= self._main.size - position or size > 4 * pxar.MAX_ENTRY:
                    raise _damaged(position, "an entry is cut short") from None
                size = max(4 * size, error.needed)
            except DamageError as error:
                raise _damaged(position, str(error)) from None

    def link_count(self, entry: Entry) -> int:
        return 1

    @property
    def knows_link_counts(self) -> bool:
        return True


def _windows(positions: Sequence[int], limit: int) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Windows that hold the entries at `positions`: start, size, and the positions in each."""
    count = len(positions)
    first = 0
    while first < count:
        start = last = positions[first]
        after = first + 1
        while after < count:
            position = positions[after]
            if position - last > GAP or position - start > WINDOW - HEAD:
                break
            last = position
            after += 1
        yield start, min(last + HEAD, limit) - start, positions[first:after]
        first = after


def _moved(parsed: Parsed, by: int, split: bool) -> Parsed:
    """`parsed` with offsets of the archive."""
    if split or not stat_bits.S_ISREG(parsed.mode):
        return parsed._replace(end=parsed.end + by)
    return parsed._replace(end=parsed.end + by, value=parsed.value + by)


def _damaged(position: int, problem: str) -> DamageError:
    return DamageError(f"{problem}, at byte {position} of the archive")


def _summary(faults: list[DamageError]) -> DamageError | None:
    if len(faults) < 2:
        return faults[0] if faults else None
    return DamageError(f"{len(faults)} entries cannot be read; first: {faults[0]}")
