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
from pbsfs.contents.base import Contents, Entry, Stream
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.image import Extent
from pbsfs.tasks.extract.attributes import Attributes
from pbsfs.tasks.extract.destination import Destination, Steps
from pbsfs.tasks.patterns import Selection

ZERO_BLOCK = 64 << 10
"""Bytes of zeros that become a hole of a restored file."""

_ZEROS = bytes(ZERO_BLOCK)


class SpannedStream(Stream, Protocol):
    """A stream that knows its holes."""

    def spans(self, offset: int, size: int) -> Iterator[Extent]:
        """The range in pieces: holes, and data by chunk, so that damage costs no more than one."""


@dataclass(slots=True)
class Restored:
    """What a restore has done. `lost`: paths that could not be read, with the reason. `zeroed`: files of
    which ranges read as zeros instead of damaged data, with the reason."""

    files: int = 0
    size: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)
    zeroed: list[tuple[str, list[Range], str]] = field(default_factory=list)


@dataclass(slots=True)
class Restore:
    """One restore. `streams`: by the numbers of `Piece.stream`. `skip_damage`: continue at damage, with zeros
    instead of damaged data, and without entries that cannot be read. `advance`: called with the bytes of each
    step; it may raise to end the restore.
    """

    contents: Contents
    streams: Sequence[SpannedStream]
    destination: Destination
    attributes: Attributes
    selection: Selection = field(default_factory=Selection)
    skip_damage: bool = False
    advance: Callable[[int], None] = lambda _count: None
    result: Restored = field(default_factory=Restored)
    _first_names: dict[int, Steps] = field(default_factory=dict)  # of files with several, by inode

    def directory(self, top: Entry) -> Restored:
        """Restores what is in `top`, and its attributes, to the destination itself.

        Raises DamageError, KeyRequiredError, SourceError and OutputError.
        """
        levels: list[tuple[Steps, Entry]] = [((), top)]
        for path, entry in self.selection.walk(self.contents, top):
            steps = tuple(path.split(b"/")) if path else ()
            if not isinstance(entry, Entry):
                self._lose(steps, entry)
                continue
            while levels[-1][0] != steps[:-1]:
                self._leave(*levels.pop())
            if entry.is_directory:
                self.advance(0)
                self.destination.make_directory(steps)
                self.result.files += 1
                levels.append((steps, entry))
            else:
                self.entry(entry, steps)
        while levels:
            self._leave(*levels.pop())
        return self.result

    def entry(self, entry: Entry, steps: Steps) -> Restored:
        """Restores an entry that is not a directory as `steps`. Raises like `directory`."""
        self.advance(0)
        try:
            if entry.is_file:
                self._file(entry, steps)
            else:
                self._other(entry, steps)
        except DamageError as error:
            self._lose(steps, error)
        except OSError as error:
            where = self.destination.shown(steps)
            raise OutputError(f"cannot write {where}: {error.strerror}") from None
        return self.result

    def _leave(self, steps: Steps, entry: Entry) -> None:
        """Sets a directory's attributes, after all that was made in it."""
        try:
            xattrs = self._xattrs(entry)
        except DamageError as error:
            self._lose(steps, error)
            xattrs = {}
        self.attributes.set(self.destination.directory(steps), entry, xattrs)

    def _file(self, entry: Entry, steps: Steps) -> None:
        first = self._first_names.get(entry.inode)
        if first is not None:
            self.destination.make_hard_link(steps, first)
            self.result.files += 1
            return
        xattrs, pieces = self._xattrs(entry), self.contents.data(entry)
        zeroed: list[Range] = []
        reason = ""
        with self.destination.new_file(steps) as fd:
            place = 0
            for piece in pieces:
                if piece.stream is not None:
                    stream = self.streams[piece.stream]
                    for span in stream.spans(piece.offset, piece.length):
                        at = place + span.offset - piece.offset
                        try:
                            if not span.hole:
                                _write(fd, at, stream.pread(span.offset, span.length))
                        except DamageError as error:
                            if not self.skip_damage:
                                raise
                            zeroed.append(Range(at, span.length))
                            reason = str(error)
                        self.advance(span.length)
                place += piece.length
            os.ftruncate(fd, entry.size)
            self.attributes.set(fd, entry, xattrs)
        self.result.files += 1
        self.result.size += entry.size
        if zeroed:
            self.result.zeroed.append((self.destination.shown(steps), merged(zeroed), reason))
        if self.contents.link_count(entry) > 1:
            self._first_names[entry.inode] = steps

    def _other(self, entry: Entry, steps: Steps) -> None:
        xattrs = self._xattrs(entry)
        if entry.is_link:
            self.destination.make_link(steps, entry.target or b"")
        else:
            try:
                self.destination.make_special(steps, entry.mode, entry.rdev)
            except PermissionError as error:
                self.attributes.unset.add("devices", error)
                return
        self.attributes.set_beneath(self.destination.directory(steps[:-1]), steps[-1], entry, xattrs)
        self.result.files += 1

    def _xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        return self.contents.xattrs(entry) if entry.has_xattrs else {}

    def _lose(self, steps: Steps, error: DamageError) -> None:
        where = os.fsdecode(b"/".join(steps))
        if not self.skip_damage:
            raise DamageError(f"{where}: {error}" if where else str(error)) from None
        self.result.lost.append((where, str(error)))


def _write(fd: int, offset: int, data: bytes) -> None:
    """Writes `data`, leaving out blocks of zeros: the file reads as zeros there already."""
    start = None
    for at in range(0, len(data), ZERO_BLOCK):
        block = data[at : at + ZERO_BLOCK]
        if block[0] == 0 and block == _ZEROS[: len(block)]:
            if start is not None:
                _write_all(fd, offset + start, memoryview(data)[start:at])
                start = None
        elif start is None:
            start = at
    if start is not None:
        _write_all(fd, offset + start, memoryview(data)[start:])


def _write_all(fd: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
