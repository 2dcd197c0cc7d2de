"""A pxar archive: its directories by their goodbye tables, at random.

Version 1 is one stream, version 2 is one of metadata and one of payloads. Nothing that an archive says is
believed: every range is checked against the one it has to lie in, so that no directory can hold itself, and
two entries never share bytes. From any thread.
"""

from __future__ import annotations

import re
import stat as stat_bits
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Contents, Entry, Found, Piece, Stream
from pbsfs.contents.faults import Faults, damaged
from pbsfs.contents.hints import Hints
from pbsfs.contents.items import Items
from pbsfs.contents.links import LinkCounts
from pbsfs.contents.names import candidates
from pbsfs.contents.table import Table
from pbsfs.formats import pxar
from pbsfs.formats.pxar import HEADER, HEADER_SIZE, Parsed

ROOT_INODE = 1
"""No other entry has it: an entry's inode is its position, and a root comes before all of them."""


class Archive(Contents):
    """An archive that is open.

    Of its entries, `position` is that of the FILENAME item; of an exact hard link, that of its target. `end`:
    where a directory ends, where a file's bytes end. `hint`: a directory's table in the catalog.
    """

    def __init__(
        self, main: Stream, payload: Stream | None = None, *, catalog: Stream | None = None, name: str = ""
    ) -> None:
        """`main`: the archive, or in version 2 its metadata; then `payload` is its payload stream. `catalog`:
        the snapshot's, in which the archive is called `name` (`root.pxar.didx`).

        Raises DamageError, KeyRequiredError, SourceError.
        """
        self.streams = [main] if payload is None else [main, payload]
        self._payload = payload
        self._items = Items(main, split=payload is not None)
        self._hints = Hints(catalog, name.encode()) if catalog is not None and payload is None else None
        self._links = LinkCounts(self._items, self._hints)
        self.root = self._open_root()

    def _open_root(self) -> Entry:
        start, size = self._items.start, self.streams[0].size
        split = self._payload is not None

        def parse(data: bytes, at: int) -> Parsed:
            return pxar.parse_root(data, at, start - at, split=split)

        parsed = self._items.take(start, size, parse)
        return Entry(
            b"",
            parsed.mode,
            parsed.uid,
            parsed.gid,
            parsed.mtime_ns,
            inode=ROOT_INODE,
            has_xattrs=parsed.has_xattrs,
            position=start,
            end=size,
        )

    # --- entries

    def _entry(self, position: int, parsed: Parsed, end: int, limit: int) -> Entry:
        """Any entry but a hard link. `end`: of a directory, as the table of its parent has it. `limit`: the
        start of that table."""
        name, mode, uid, gid, mtime_ns, size, value, target, has_xattrs, after = parsed
        kind = mode & 0o170000
        rdev = 0
        if kind == stat_bits.S_IFREG:
            end = after
            if self._payload is not None:
                end = value + HEADER_SIZE + size
                if end > self._payload.size:
                    raise damaged(position, "a file's content lies beyond the payload stream")
        elif kind == stat_bits.S_IFDIR:
            if not after < end <= limit:
                raise damaged(position, "a directory reaches beyond the one that holds it")
        else:
            rdev = value
        return Entry(
            name, mode, uid, gid, mtime_ns, size, position, rdev, target, has_xattrs, True, position, end
        )

    def _targets(self, positions: Iterable[int]) -> dict[int, Entry | DamageError]:
        """The files at `positions`, to which hard links lead."""
        found: dict[int, Entry | DamageError] = {}
        limit = self.streams[0].size
        for position, parsed in self._items.entries(array("Q", sorted(set(positions))), limit):
            if isinstance(parsed, DamageError):
                found[position] = parsed
            elif not stat_bits.S_ISREG(parsed.mode):
                found[position] = damaged(position, "a hard link leads to what is not a file")
            else:
                try:
                    found[position] = self._entry(position, parsed, 0, limit)
                except DamageError as error:
                    found[position] = error
        return found

    def _target_of(self, position: int, parsed: Parsed) -> int:
        where = position - parsed.value
        if not self._items.start < where < position:
            raise damaged(position, "a hard link leads to what does not lie before it")
        return where

    def _link(self, position: int, name: bytes, goal: Entry | DamageError) -> Entry:
        """The hard link at `position`, as another name of its target."""
        if isinstance(goal, DamageError):
            raise damaged(position, f"a hard link's target cannot be read ({goal})")
        self._links.saw(position, goal.position)
        return goal.but(name=name)

    def _one(self, position: int, parsed: Parsed, end: int, limit: int) -> Entry:
        if parsed.mode:
            return self._entry(position, parsed, end, limit)
        where = self._target_of(position, parsed)
        return self._link(position, parsed.name, self._targets([where])[where])

    # --- directories

    def _table(self, directory: Entry) -> Table:
        start = directory.position
        entry = start + HEADER_SIZE + len(directory.name) + 1
        return self._items.table(start, 0 if start == self._items.start else entry, directory.end)

    def children(self, directory: Entry, *, names_only: bool = False) -> Found:
        named = self.named(directory) if names_only else None
        if named is not None:
            return Found(named)
        if not names_only:
            self._links.prepare(self)
        entries, faults, _links = self._listing(directory)
        return Found(entries, faults.summary())

    def exact(self, directory: Entry) -> tuple[list[Entry], list[int]]:
        """The exact entries of `directory`, and the target's position of each hard link in it."""
        entries, _faults, links = self._listing(directory)
        return entries, links

    def _listing(self, directory: Entry) -> tuple[list[Entry], Faults, list[int]]:
        faults = Faults()
        table = self._table(directory)
        ends, goodbye = table.ends(faults), table.goodbye
        blocks = self._hints.blocks(directory) if self._hints is not None else {}
        entries: list[Entry] = []
        names: set[bytes] = set()
        before, last = 0, 0
        has_links = False
        for position, parsed in self._items.entries(array("Q", sorted(ends)), goodbye):
            if isinstance(parsed, DamageError):
                faults.add(parsed)
                continue
            try:
                if parsed.mode:
                    entry = self._entry(position, parsed, ends[position], goodbye)
                else:
                    has_links = True
                    where = self._target_of(position, parsed)
                    entry = Entry(parsed.name, 0, position=position, end=where)
            except DamageError as error:
                faults.add(error)
                continue
            if before > position:
                # What reaches into the next entry is wrong, whatever else it says.
                names.discard(entries.pop().name)
                faults.add(damaged(last, "an entry reaches into the next one"))
            if parsed.name in names:
                faults.add(damaged(position, "a second entry has the same name"))
                continue
            names.add(parsed.name)
            before = parsed.end
            if stat_bits.S_ISDIR(parsed.mode):
                before = entry.end
                if parsed.name in blocks:
                    entry = entry.but(hint=blocks[parsed.name])
            last = position
            entries.append(entry)
        targets: list[int] = []
        if has_links:
            entries = self._followed(entries, faults, targets)
        return entries, faults, targets

    def _followed(self, entries: list[Entry], faults: Faults, targets: list[int]) -> list[Entry]:
        """`entries` with their files instead of hard links. Those have no mode, and as `end` their target's
        position, which is added to `targets`."""
        goals = self._targets(entry.end for entry in entries if not entry.mode)
        followed = []
        for entry in entries:
            if entry.mode:
                followed.append(entry)
                continue
            try:
                followed.append(self._link(entry.position, entry.name, goals[entry.end]))
                targets.append(entry.end)
            except DamageError as error:
                faults.add(error)
        return followed

    def named(self, directory: Entry) -> list[Entry] | None:
        """The entries of `directory` by the catalog; None where that and the archive differ in any way."""
        if self._hints is None:
            return None
        return self._hints.entries(directory, self._table(directory))

    def search(
        self, directory: Entry, name: re.Pattern[bytes]
    ) -> Iterator[tuple[bytes, Entry | DamageError]]:
        places = None
        if self._payload is not None:
            with suppress(DamageError):  # what is not damaged is found entry by entry
                places = candidates(self.streams[0], directory.position, directory.end, name)
        if places is None:
            yield from super().search(directory, name)
            return
        stack = [self._matching(directory, b"", places, name)]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
                continue
            path, entry, below = found
            if entry is not None:
                yield path, entry
            if below is not None:
                inner, inside = below
                stack.append(self._matching(inner, path + b"/", inside, name))

    def _matching(
        self, directory: Entry, prefix: bytes, places: array[int], name: re.Pattern[bytes]
    ) -> Iterator[tuple[bytes, Entry | DamageError | None, tuple[Entry, array[int]] | None]]:
        """The entries of `directory` that match, and the directories in it that candidates lie in.

        `places`: the candidates in it, in rising order.
        """
        above = prefix.removesuffix(b"/")
        faults = Faults()
        try:
            table = self._table(directory)
        except DamageError as error:
            yield above, error, None
            return
        ends = table.ends(faults)
        positions = array("Q", sorted(ends))
        names: set[bytes] = set()
        at = 0
        while at < len(places):
            number = bisect_right(positions, places[at]) - 1
            if number < 0:
                at += 1
                continue
            position = positions[number]
            stop = positions[number + 1] if number + 1 < len(positions) else table.goodbye
            after = bisect_left(places, stop, max(at + 1, bisect_left(places, position)))
            inside = places[at + (places[at] == position) : after]
            try:
                parsed = self._items.entry(position, table.goodbye)
                entry = self._one(position, parsed, ends[position], table.goodbye)
            except DamageError as error:
                faults.add(error)
            else:
                matches = places[at] == position and name.fullmatch(entry.name) and entry.name not in names
                names.add(entry.name)
                below = (entry, inside) if entry.is_directory and inside else None
                if matches or below:
                    yield prefix + entry.name, entry if matches else None, below
            at = after
        if (damage := faults.summary()) is not None:
            yield above, damage, None

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        table = self._table(directory)
        for position, end in table.places(name):
            parsed = self._items.entry(position, table.goodbye)
            if parsed.name == name:
                entry = self._one(position, parsed, end, table.goodbye)
                if entry.is_directory and self._hints is not None:
                    entry = entry.but(hint=self._hints.blocks(directory).get(name, 0))
                return entry
        return None

    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        wanted = {entry.position: entry for entry in entries if not entry.exact}
        if not wanted:
            return list(entries)
        goodbye = self._table(directory).goodbye
        parsed_at = dict(self._items.entries(array("Q", sorted(wanted)), goodbye))
        links = {}
        for position, parsed in parsed_at.items():
            if not isinstance(parsed, DamageError) and not parsed.mode:
                try:
                    links[position] = self._target_of(position, parsed)
                except DamageError as error:
                    parsed_at[position] = error
        goals = self._targets(links.values())
        done: list[Entry | DamageError | None] = []
        for entry in entries:
            position = entry.position
            parsed_or_error = parsed_at[position] if not entry.exact else None
            if parsed_or_error is None:
                done.append(entry)
            elif isinstance(parsed_or_error, DamageError):
                done.append(parsed_or_error)
            elif parsed_or_error.name != entry.name:
                done.append(None)
            else:
                try:
                    if position in links:
                        exact = self._link(position, entry.name, goals[links[position]])
                    else:
                        exact = self._entry(position, parsed_or_error, entry.end, goodbye)
                    done.append(exact.but(hint=entry.hint) if exact.is_directory else exact)
                except DamageError as error:
                    done.append(error)
        return done

    # --- files

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        return self.data_through(file, self.streams, unconfirmed=unconfirmed)

    def data_through(
        self, file: Entry, streams: Sequence[Stream], *, unconfirmed: bool = False
    ) -> Sequence[Piece]:
        start = file.end - file.size
        if self._payload is not None:
            self._confirm(streams[-1], start - HEADER_SIZE, file.size, unconfirmed)
        return [Piece(len(streams) - 1, start, file.size)] if file.size else []

    def _confirm(self, payload: Stream, where: int, size: int, unconfirmed: bool) -> None:
        try:
            raw = payload.pread(where, HEADER_SIZE)
        except DamageError:
            if unconfirmed:
                return
            raise
        if len(raw) < HEADER_SIZE or HEADER.unpack(raw) != (pxar.PAYLOAD, HEADER_SIZE + size):
            raise DamageError(f"the payload stream has another file's content or none at byte {where}")

    def stored_at(self, file: Entry) -> Piece | None:
        return Piece(len(self.streams) - 1, file.end - file.size, file.size)

    def size_below(self, directory: Entry) -> int | None:
        if directory.position == self._items.start:
            return self.streams[-1].size
        if self._payload is None:
            return directory.end - directory.position
        return sum(entry.size for _path, entry in self.walk(directory) if isinstance(entry, Entry))

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        if not entry.has_xattrs:
            return {}
        named = entry.position != self._items.start
        parse = pxar.parse_entry if named else pxar.parse_root
        split = self._payload is not None

        def both(data: bytes, at: int) -> dict[bytes, bytes]:
            parse(data, at, 0, split=split)  # so that all attributes are in the window
            return pxar.parse_xattrs(data, at, named=named)

        return self._items.take(entry.position, self.streams[0].size, both)

    def link_count(self, entry: Entry) -> int:
        return self._links.of(self, entry.position) if entry.is_file else 1

    @property
    def knows_link_counts(self) -> bool:
        return self._links.known

    @property
    def counts_all_links(self) -> bool:
        return not self._links.counts_seen
