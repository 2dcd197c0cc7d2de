"""Restores a directory or a file of an archive, with all that is stored with it, to a directory.

Plain synchronous code that runs in a worker thread: it goes through the archive in the order in which it is
stored, so that both streams are read in sequence. A file gets its name when it is complete, so a restore that
was killed leaves no half files. Called by `pbsfs export`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pbsfs.base.errors import DamageError, OutputError
from pbsfs.contents.base import Contents, Entry, Piece, Stream
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.decoded import stream_of
from pbsfs.reader.image import Extent
from pbsfs.tasks.extract.attributes import Attributes, Part
from pbsfs.tasks.extract.destination import Destination
from pbsfs.tasks.patterns import Selection

ZERO_BLOCK = 64 << 10
"""Bytes of zeros that become a hole of a restored file."""

MAX_FIRST_NAMES = 1 << 18
"""Files whose names are kept where the archive does not say which have several."""

MAX_LISTED = 10_000
"""Damaged entries that are listed; more are only counted."""

_ZEROS = bytes(ZERO_BLOCK)


class SpannedStream(Stream, Protocol):
    """A stream that knows its holes."""

    def view(self, offset: int, size: int) -> Buffer:
        """As `pread`, without a copy where that is possible."""

    def kept(self, offset: int, size: int) -> Buffer | None:
        """The same where that is in memory and takes no waiting; otherwise it may be None."""

    def spans(self, offset: int, size: int) -> Iterator[Extent]:
        """The range in pieces: holes, and data by chunk, so that damage costs no more than one."""


@dataclass(slots=True)
class Restored:
    """What a restore has done. `lost`: paths that could not be read, with the reason. `zeroed`: files of
    which ranges read as zeros instead of damaged data, with the reason. Of both, at most MAX_LISTED; the
    counts count all."""

    files: int = 0
    size: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)
    zeroed: list[tuple[str, list[Range], str]] = field(default_factory=list)
    lost_count: int = 0
    zeroed_count: int = 0

    def lose(self, path: str, reason: str) -> None:
        """Counts an entry that could not be read, and lists it if there is room."""
        self.lost_count += 1
        if self.lost_count <= MAX_LISTED:
            self.lost.append((path, reason))

    def zero(self, path: str, ranges: list[Range], reason: str) -> None:
        """Counts a file with zeros instead of damaged ranges, and lists it if there is room."""
        self.zeroed_count += 1
        if self.zeroed_count <= MAX_LISTED:
            self.zeroed.append((path, ranges, reason))


@dataclass(frozen=True, slots=True)
class OnDamage:
    """What to do at damage. `zero`: write zeros instead of damaged bytes of a file. `skip`: leave out entries
    that cannot be read. Otherwise a restore ends there."""

    zero: bool = False
    skip: bool = False


@dataclass(slots=True)
class Restore:
    """One restore. `streams`: by the numbers of `Piece.stream`. `advance`: called with the bytes of each
    step; it may raise to end the restore.
    """

    contents: Contents
    streams: Sequence[SpannedStream]
    destination: Destination
    attributes: Attributes
    selection: Selection = field(default_factory=Selection)
    on_damage: OnDamage = field(default_factory=OnDamage)
    advance: Callable[[int], None] = lambda _count: None
    result: Restored = field(default_factory=Restored)
    _first_names: dict[int, bytes] = field(default_factory=dict)  # of files with several, by inode

    def directory(self, top: Entry) -> Restored:
        """Restores what is in `top`, and its attributes, to the destination itself.

        Raises DamageError, KeyRequiredError, SourceError and OutputError.
        """
        self.destination.use_directory(b"")
        levels: list[tuple[bytes, Entry, bool]] = [(b"", top, False)]  # the flag: made by this restore
        try:
            for path, entry in self.selection.walk(self.contents, top):
                self.advance(0)
                if not isinstance(entry, Entry):
                    self._lose(path, entry)
                    continue
                parent = path.rpartition(b"/")[0]
                while levels[-1][0] != parent:
                    self._leave(*levels.pop()[:2])
                if entry.is_directory:
                    levels.append((path, entry, self.destination.make_directory(path)))
                    self.result.files += 1
                else:
                    self.entry(entry, path)
            while levels:
                self._leave(*levels.pop()[:2])
            self.advance(0)
        except BaseException:
            for path, _entry, is_new in reversed(levels):
                if is_new:
                    self.destination.remove_empty(path)
            raise
        return self.result

    def entry(self, entry: Entry, path: bytes) -> Restored:
        """Restores an entry that is not a directory as `path`. Raises like `directory`."""
        try:
            if entry.is_file:
                self._file(entry, path)
            else:
                self._other(entry, path)
        except DamageError as error:
            self._lose(path, error)
        except OSError as error:
            where = self.destination.shown(path)
            raise OutputError(f"cannot write {where}: {error.strerror}") from None
        return self.result

    def _leave(self, path: bytes, entry: Entry) -> None:
        """Sets a directory's attributes, after all that was made in it."""
        try:
            xattrs = self._xattrs(entry)
        except DamageError as error:
            self._lose(path, error)
            xattrs = {}
        self._set(self.destination.directory(path), entry, xattrs)

    def _set(self, place: int | bytes, entry: Entry, xattrs: dict[bytes, bytes]) -> None:
        self.attributes.set(place, entry, xattrs, inherited=self.destination.inherits)

    def _file(self, entry: Entry, path: bytes) -> None:
        first = self._first_names.get(entry.inode)
        if first is not None and self._hard_link(path, first):
            return
        xattrs = self._xattrs(entry)
        pieces = self.contents.data_through(entry, self.streams, unconfirmed=self.on_damage.zero)
        zeroed: list[tuple[Range, str]] = []
        with self.destination.new_file(path, entry.size) as fd:
            if self._write(fd, entry, pieces, zeroed) < entry.size:
                os.ftruncate(fd, entry.size)
            self._set(fd, entry, xattrs)
        self.result.files += 1
        self.result.size += entry.size
        if zeroed:
            ranges = merged([where for where, _reason in zeroed])
            self.result.zero(os.fsdecode(path), ranges, zeroed[0][1])
        if first is None:
            self._keep_name(entry, path)

    def _hard_link(self, path: bytes, first: bytes) -> bool:
        """Whether `path` could be made another name of the file `first`."""
        try:
            self.destination.make_hard_link(path, first)
        except OSError as error:
            self.attributes.unset.add(Part.HARD_LINK, error)
            return False
        self.result.files += 1
        return True

    def _keep_name(self, entry: Entry, path: bytes) -> None:
        has_several = self.contents.link_count(entry) > 1
        if self.contents.counts_all_links:
            if has_several:
                self._first_names[entry.inode] = path
        elif len(self._first_names) < MAX_FIRST_NAMES:
            self._first_names[entry.inode] = path
        elif has_several:
            self.attributes.unset.add(Part.HARD_LINK, "the archive has too many files without a catalog")

    def _write(self, fd: int, entry: Entry, pieces: Sequence[Piece], zeroed: list[tuple[Range, str]]) -> int:
        """Writes a file's bytes but its holes; returns where the last that was written ends.

        Adds to `zeroed` the ranges that are left zeros because they are damaged, with the reason.
        """
        place = end = 0
        for piece in pieces:
            stream = stream_of(piece, self.streams, self.contents, entry)
            if stream is not None:
                shift = place - piece.offset
                for span in stream.spans(piece.offset, piece.length):
                    if not span.hole:
                        try:
                            data = stream.view(span.offset, span.length)
                        except DamageError as error:
                            if not self.on_damage.zero:
                                raise
                            zeroed.append((Range(span.offset + shift, span.length), str(error)))
                        else:
                            end = _write(fd, span.offset + shift, data) or end
                    self.advance(span.length)
            place += piece.length
        return end

    def _other(self, entry: Entry, path: bytes) -> None:
        xattrs = self._xattrs(entry)
        try:
            if entry.is_link:
                self.destination.make_link(path, entry.target or b"")
            else:
                self.destination.make_special(path, entry.mode, entry.rdev)
        except OSError as error:
            self.attributes.unset.add(Part.LINK if entry.is_link else Part.DEVICE, error)
            return
        with self.destination.made(path, entry.mode) as place:
            self._set(place, entry, xattrs)
        self.result.files += 1

    def _xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        return self.contents.xattrs(entry) if entry.has_xattrs else {}

    def _lose(self, path: bytes, error: DamageError) -> None:
        where = os.fsdecode(path)
        if not self.on_damage.skip:
            advice = "restore the rest with --on-damage skip"
            raise DamageError(f"{where or '.'}: {error}; {advice}") from None
        self.result.lose(where, str(error))


def _write(fd: int, offset: int, data: Buffer) -> int:
    """Writes `data`, leaving out blocks of zeros: the file reads as zeros there already. Returns where the
    last bytes end that were written; 0 if none were."""
    view = memoryview(data)
    start: int | None = None
    end = 0
    for at in range(0, len(view), ZERO_BLOCK):
        block = view[at : at + ZERO_BLOCK]
        if not block[0] and not block[-1] and bytes(block) == _ZEROS[: len(block)]:
            if start is not None:
                end = _write_all(fd, offset + start, view[start:at])
                start = None
        elif start is None:
            start = at
    return end if start is None else _write_all(fd, offset + start, view[start:])


def _write_all(fd: int, offset: int, data: memoryview) -> int:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return offset
