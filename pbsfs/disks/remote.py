"""A file system that a parser process reads, as contents: its answers, checked.

Synchronous, for worker threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pbsfs.base.errors import DamageError
from pbsfs.base.text import one_line
from pbsfs.contents.base import WALKED_TOGETHER, Contents, Entry, Found, Piece
from pbsfs.disks import wire
from pbsfs.disks.host import MOST_NAME, Parser, ParserError, VolumeInfo

MOST_NEAR = WALKED_TOGETHER
"""Files whose order is known, so that their maps can be asked for together; up to twice as many."""

MAPS_AT_ONCE = 64
"""Files whose maps are asked for together."""

MOST_KEPT = 64
"""Pieces of a map that is kept: a larger one takes too long to use in the thread that handles requests."""


class _Near:
    """The files that were listed last, in that order. Used by several threads."""

    def __init__(self) -> None:
        self._files: list[Entry] = []
        self._places: dict[Entry, int] = {}

    def with_more(self, files: Sequence[Entry]) -> _Near:
        """This, with `files` at the end; where there are too many, another one with the last of them.
        Listings of a few files each cost no more than these."""
        near = self
        if len(self._files) + len(files) > 2 * MOST_NEAR:
            near, files = _Near(), [*self._files, *files][-MOST_NEAR:]
        for file in files:
            near._places[file] = len(near._files)
            near._files.append(file)
        return near

    def from_on(self, file: Entry, most: int) -> list[Entry]:
        """`file`, and up to `most` with those listed after it."""
        place = self._places.get(file)
        found = [] if place is None else self._files[place : place + most]
        return found if found and found[0] == file else [file]


class RemoteVolume(Contents):
    """A file system that a parser process reads."""

    def __init__(self, parser: Parser, info: VolumeInfo) -> None:
        """Opens it. Raises DamageError, KeyRequiredError, SourceError."""
        self.streams = parser.streams
        self.info = info
        self._parser = parser
        self._maps: dict[Entry, list[Piece]] = {}  # those of files that are likely to be read next
        self._near = _Near()
        answer = self._ask("open")
        try:
            root, facts = answer
            self.root = wire.entry_of(root, root=True)
            self._facts = {str(name)[:MOST_NAME]: str(value)[: 1 << 16] for name, value in facts.items()}
        except (AttributeError, TypeError, ValueError, wire.WireError):
            raise self._wrong("its description of a volume is not valid") from None

    def _ask(self, method: str, *arguments: object) -> Any:
        return self._parser.ask(method, self.info.number, *arguments)

    def _wrong(self, why: str) -> ParserError:
        return self._parser.failed(why)

    def children(self, directory: Entry, *, names_only: bool = False) -> Found:
        answer = self._ask("children", wire.entry_row(directory), names_only)
        try:
            rows, damage = answer
            entries = [wire.entry_of(row) for row in rows]
        except (TypeError, ValueError, wire.WireError) as error:
            raise self._wrong(str(error)) from None
        self._listed(entries[:WALKED_TOGETHER])
        return Found(entries, None if damage is None else DamageError(one_line(str(damage))))

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        row = self._ask("child", wire.entry_row(directory), wire.text(name))
        try:
            return None if row is None else wire.entry_of(row)
        except wire.WireError as error:
            raise self._wrong(str(error)) from None

    def complete(self, directory: Entry, entries: Sequence[Entry]) -> list[Entry | DamageError | None]:
        rows = self._ask("complete", wire.entry_row(directory), [wire.entry_row(entry) for entry in entries])
        done: list[Entry | DamageError | None] = []
        try:
            for row in rows:
                if row is None:
                    done.append(None)
                elif isinstance(row, str):
                    done.append(DamageError(one_line(row)))
                else:
                    done.append(wire.entry_of(row))
        except (TypeError, wire.WireError) as error:
            raise self._wrong(str(error)) from None
        if len(done) != len(entries):
            raise self._wrong("it answers for another number of entries")
        self._listed(done)
        return done

    def reach(self, entries: Sequence[Entry]) -> None:
        self._listed(entries)

    def _listed(self, entries: Sequence[Entry | DamageError | None]) -> None:
        """Takes note of files that come one after the other."""
        files = [entry for entry in entries if isinstance(entry, Entry) and entry.exact and entry.is_file]
        self._near = self._near.with_more(files)

    def data_at_once(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece] | None:
        return self._maps.get(file)

    def facts(self) -> dict[str, str]:
        return self._facts

    def link_count(self, entry: Entry) -> int:
        return entry.links if entry.is_file else 1

    @property
    def knows_link_counts(self) -> bool:
        return True

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        known = self._maps.get(file)
        if known is not None:
            return known
        wanted = self._near.from_on(file, MAPS_AT_ONCE)
        rows = self._ask("data", [wire.entry_row(one) for one in wanted], unconfirmed)
        sizes = [stream.size for stream in self.streams]
        maps: dict[Entry, list[Piece]] = {}
        try:
            for one, row in zip(wanted, rows, strict=True):
                if row is not None:
                    maps[one] = wire.pieces_of(row, one.size, sizes)
        except (TypeError, ValueError, wire.WireError) as error:
            raise self._wrong(str(error)) from None
        if file not in maps:
            raise self._wrong("it does not know where a file is")
        wanted_now = maps[file]
        if len(wanted_now) > MOST_KEPT:
            del maps[file]
        self._maps = maps
        return wanted_now

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        data = self._ask("read", wire.entry_row(file), offset, size)
        if not isinstance(data, bytes) or len(data) != size:
            raise self._wrong("it reads another number of bytes than it was asked for")
        return data

    def decoded_from(self, file: Entry) -> Sequence[Piece] | None:
        rows = self._ask("decoded_from", wire.entry_row(file))
        try:
            return None if rows is None else wire.ranges_of(rows, [stream.size for stream in self.streams])
        except wire.WireError as error:
            raise self._wrong(str(error)) from None

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        rows = self._ask("xattrs", wire.entry_row(entry))
        try:
            found = {wire.raw(name): wire.raw(value) for name, value in rows}
        except (TypeError, ValueError, wire.WireError):
            raise self._wrong("its extended attributes are not valid") from None
        return {name: value for name, value in found.items() if name and b"\0" not in name}
