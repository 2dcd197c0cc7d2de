"""The items of a pxar archive, read from its stream in windows.

`Archive` asks for entries and tables by position; what it gets fits the format, but may still contradict the
rest of the archive. From any thread: threads share the last window that was read, a value that never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Stream
from pbsfs.contents.faults import damaged
from pbsfs.contents.table import Table
from pbsfs.formats import pxar
from pbsfs.formats.pxar import HEADER, HEADER_SIZE, ITEM, ITEM_SIZE, Parsed, ShortError

WINDOW = 256 << 10
"""Bytes that are read in one go, where entries lie close together."""

GAP = 16 << 10
"""Bytes between two entries that are read across: they cost less than another request."""

HEAD = 1 << 10
"""Bytes that hold most entries, without payload."""

TAIL = 16 << 10
"""Bytes at a directory's end that are read first: they hold most tables whole, with up to 680 entries."""

BATCH = 64
"""Windows that are requested side by side."""

MAX_ENTRIES = 4 << 20
"""Entries of one directory, at most."""

T = TypeVar("T")


class Items:
    """The items of the archive in `stream`. `split`: whether that is the metadata stream of version 2."""

    def __init__(self, stream: Stream, *, split: bool) -> None:
        """Raises DamageError, KeyRequiredError, SourceError, as all methods do."""
        self.stream = stream
        self.split = split
        self._window: tuple[int, bytes] = (0, b"")
        self.start = self._skip_start()
        """Where the root's ENTRY item is."""

    def _skip_start(self) -> int:
        kind, size, version = ITEM.unpack(self.read(0, ITEM.size))
        if kind != pxar.FORMAT_VERSION:
            if self.split:
                raise DamageError("the archive has a payload stream, though it is not of version 2")
            return 0
        if not self.split:
            raise DamageError("the archive is of version 2, and has no payload stream")
        if size != ITEM.size or version != 2:
            raise DamageError(f"the archive is of version {version}, which pbsfs cannot read")
        kind, size = HEADER.unpack(self.read(ITEM.size, HEADER_SIZE))
        if kind != pxar.PRELUDE:
            return ITEM.size
        if not HEADER_SIZE <= size <= self.stream.size - ITEM.size:
            raise DamageError(f"the archive has a prelude of {size} bytes, more than all of it")
        return ITEM.size + int(size)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises DamageError where there are fewer."""
        base, data = self._at(offset, size)
        found = data[offset - base : offset - base + size]
        if len(found) < size:
            raise damaged(offset, "the archive is cut short")
        return found

    def _at(self, offset: int, size: int) -> tuple[int, bytes]:
        """A window with `size` bytes from `offset`, as far as they exist, and where it starts."""
        base, data = window = self._window
        if base <= offset and offset + size <= base + len(data):
            return window
        end = min(offset + size, self.stream.size)
        base = offset
        if self.split and size < WINDOW:
            # Metadata lie close together: what is read next is most likely near.
            base &= -(WINDOW // 4)
            end = min(max(base + WINDOW, end), self.stream.size)
        try:
            window = (base, self.stream.pread(base, max(0, end - base)))
        except DamageError:
            if end - base <= size:
                raise
            # The damage may lie in what was not asked for.
            end = min(offset + size, self.stream.size)
            return offset, self.stream.pread(offset, max(0, end - offset))
        self._window = window
        return window

    def _before_damage(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` up to the first that cannot be read, which is among `size` bytes: what lies
        before a damaged chunk is not damaged."""
        found = b""
        while size > 1:
            half = size // 2
            try:
                found += self.stream.pread(offset + len(found), half)
            except DamageError:
                size = half
            else:
                size -= half
        return found

    def take(self, position: int, limit: int, parse: Callable[[bytes, int], T]) -> T:
        """What `parse` makes of the entry at `position`, which lies before `limit`.

        It is called with a window and the entry's offset in it, and raises ShortError where it needs more.
        """
        size = HEAD
        damage: DamageError | None = None
        while True:
            whole = size >= limit - position
            try:
                base, data = self._at(position, min(size, limit - position))
            except DamageError as error:
                damage = error
                base, data = position, self._before_damage(position, min(size, limit - position))
            try:
                return parse(data, position - base)
            except ShortError as error:
                if damage is not None:
                    raise damage from None
                if whole or size > pxar.MAX_ENTRY:
                    raise damaged(position, "an entry reaches beyond its directory") from None
                size = max(size * 4, error.needed)
            except DamageError as error:
                raise damaged(position, str(error)) from None

    def entry(self, position: int, limit: int) -> Parsed:
        """The entry whose FILENAME item is at `position`, with offsets of the archive.

        `limit`: where its directory's table starts, or a byte behind it that is as sure.
        """
        split = self.split

        def parse(data: bytes, at: int) -> Parsed:
            return pxar.parse_entry(data, at, position - at, split=split)

        parsed = self.take(position, limit + HEADER_SIZE, parse)
        if parsed.end > limit:
            raise damaged(position, "an entry reaches beyond its directory")
        return parsed

    def entries(self, positions: Sequence[int], limit: int) -> Iterator[tuple[int, Parsed | DamageError]]:
        """As `entry`, for `positions` in rising order."""
        split = self.split
        windows = _windows(positions, min(limit + HEADER_SIZE, self.stream.size))
        while batch := list(islice(windows, BATCH)):
            if len(batch) > 1 and not split:
                self.stream.prefetch([(start, size) for start, size, _ in batch])
            for start, size, members in batch:
                try:
                    base, data = self._at(start, size)
                except DamageError:
                    base, data = start, b""  # each is read anew: the damage may not hit all of them
                for position in members:
                    try:
                        parsed = pxar.parse_entry(data, position - base, base, split=split)
                        if parsed.end > limit:
                            yield position, damaged(position, "an entry reaches beyond its directory")
                        else:
                            yield position, parsed
                    except ShortError:
                        yield position, self._tried(position, limit)
                    except DamageError as error:
                        yield position, damaged(position, str(error))

    def _tried(self, position: int, limit: int) -> Parsed | DamageError:
        try:
            return self.entry(position, limit)
        except DamageError as error:
            return error

    def table(self, start: int, entry: int, end: int) -> Table:
        """The table of the directory from `start` to `end`.

        `entry`: the table has to say that the directory's ENTRY item is there (of the root: at 0).
        """
        guess = min(TAIL, end - start)
        if guess < ITEM_SIZE or end > self.stream.size:
            raise damaged(start, "a directory is cut short")
        try:
            base, data = self._at(end - guess, guess)
        except DamageError:
            base, data = self._at(end - ITEM_SIZE, ITEM_SIZE)  # what lies before the table may be damaged
        try:
            offset, size = pxar.parse_tail(data[end - base - ITEM_SIZE : end - base])
        except DamageError as error:
            raise damaged(end - ITEM_SIZE, str(error)) from None
        goodbye = end - size
        if goodbye <= start or goodbye - offset != entry:
            raise damaged(end - ITEM_SIZE, "a directory ends with a table that is not its own")
        if size > HEADER_SIZE + ITEM_SIZE * (MAX_ENTRIES + 1):
            raise damaged(goodbye, f"a directory has more than {MAX_ENTRIES} entries")
        raw = self.read(goodbye, size)
        if HEADER.unpack_from(raw) != (pxar.GOODBYE, size):
            raise damaged(goodbye, "a directory's table does not start where its end says")
        return Table(start, goodbye, raw[HEADER_SIZE:-ITEM_SIZE])


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
