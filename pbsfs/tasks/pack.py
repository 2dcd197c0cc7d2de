"""What of an archive goes into a tar or zip archive, and writing a zip archive to a stream.

Plain synchronous code that runs in a worker thread. Called by `pbsfs export --format`.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Contents, Entry, Piece
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.decoded import DecodedStream, stream_of
from pbsfs.reader.image import Extent
from pbsfs.tasks.extract.extract import Restored, SpannedStream
from pbsfs.tasks.patterns import Selection

_ZEROS = bytes(1 << 20)

_ZIP_TIMES = (315532800, 4354819198)
"""The first and last second that a zip archive can hold: 1980 to 2107."""


@dataclass(slots=True)
class Packing:
    """What is written to an archive, and how it goes. The fields are those of `Restore`.

    `left_out`: entries that the form cannot hold, counted by kind.
    """

    contents: Contents
    streams: Sequence[SpannedStream]
    selection: Selection = field(default_factory=Selection)
    skip_damage: bool = False
    advance: Callable[[int], None] = lambda _count: None
    result: Restored = field(default_factory=Restored)
    left_out: Counter[str] = field(default_factory=Counter)

    def entries(self, top: Entry) -> Iterator[tuple[bytes, Entry]]:
        """What is to be written, in order, each directory before what it holds."""
        if not top.is_directory:
            yield top.name, top
            return
        yield b"", top
        for path, entry in self.selection.walk(self.contents, top):
            if isinstance(entry, Entry):
                yield path, entry
            else:
                self.lose(path, entry)

    def content(self, path: bytes, entry: Entry) -> Buffer:
        """All bytes of a small file, with zeros where damage is skipped. Raises DamageError."""
        pieces = self.contents.data_through(entry, self.streams, unconfirmed=self.skip_damage)
        if len(pieces) == 1 and (number := pieces[0].stream) is not None and number != DECODED:
            # Most of them lie in the chunk of the file before.
            data = self.streams[number].kept(pieces[0].offset, pieces[0].length)
            if data is not None:
                self.advance(len(data))
                return data
        spans, read = self._spans(path, entry, pieces)
        return b"".join(bytes(span.length) if span.hole else read(span) for span in spans)

    def data(self, path: bytes, entry: Entry) -> tuple[list[Extent], Callable[[Extent], Buffer]]:
        """The holes and data of a file, and what reads one of data: zeros where damage is skipped.

        An extent's offset is that in the file. Raises DamageError.
        """
        pieces = self.contents.data_through(entry, self.streams, unconfirmed=self.skip_damage)
        return self._spans(path, entry, pieces)

    def _spans(
        self, path: bytes, entry: Entry, pieces: Sequence[Piece]
    ) -> tuple[list[Extent], Callable[[Extent], Buffer]]:
        spans: list[Extent] = []
        sources: dict[int, tuple[SpannedStream | DecodedStream, int]] = {}
        place = 0
        for piece in pieces:
            stream = stream_of(piece, self.streams, self.contents, entry)
            if stream is None:
                spans.append(Extent(place, piece.length, hole=True))
            else:
                for span in stream.spans(piece.offset, piece.length):
                    at = place + span.offset - piece.offset
                    spans.append(Extent(at, span.length, span.hole))
                    sources[at] = stream, span.offset
            place += piece.length
        zeroed: list[Range] = []

        def read(span: Extent) -> Buffer:
            stream, offset = sources[span.offset]
            self.advance(span.length)
            try:
                return stream.view(offset, span.length)
            except DamageError as error:
                if not self.skip_damage:
                    raise DamageError(f"{os.fsdecode(path)}: {error}") from None
                if not zeroed:
                    self.result.zero(os.fsdecode(path), zeroed, str(error))
                zeroed[:] = merged([*zeroed, Range(span.offset, span.length)])
                return bytes(span.length)

        return spans, read

    def leave_out(self, kind: str) -> None:
        """Counts an entry that the form cannot hold."""
        self.left_out[kind] += 1

    def lose(self, path: bytes, error: DamageError) -> None:
        """Notes an entry that cannot be read. Raises `error` where damage is not skipped."""
        where = os.fsdecode(path)
        if not self.skip_damage:
            raise DamageError(f"{where}: {error}" if where else str(error)) from None
        self.result.lose(where, str(error))


class _Reading(io.RawIOBase):
    """The bytes of a file one after the other, holes as zeros."""

    def __init__(self, spans: list[Extent], read: Callable[[Extent], Buffer]) -> None:
        self._data = memoryview(b"")
        self._spans = iter(spans)
        self._read = read
        self._zeros = 0

    def read(self, size: int = -1) -> bytes:
        parts: list[bytes | memoryview] = []
        while size:
            if self._data:
                parts.append(self._data[:size])
                self._data = self._data[size:]
                size -= len(parts[-1])
            elif self._zeros:
                parts.append(_ZEROS[: min(size, self._zeros)])
                self._zeros -= len(parts[-1])
                size -= len(parts[-1])
            else:
                span = next(self._spans, None)
                if span is None:
                    break
                if span.hole:
                    self._zeros = span.length
                else:
                    self._data = memoryview(self._read(span))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)


@contextmanager
def _zip_archive(out: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    archive = zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False)
    try:
        yield archive
        archive.close()
    except BaseException:
        archive.fp = None  # otherwise zipfile writes a directory, which fails anew and hides the error
        raise


def write_zip(packing: Packing, top: Entry, out: IO[bytes]) -> None:
    """Writes `top`, and all below it, to `out`. Raises what reading raises, and OSError.

    Zip archives have no owners, extended attributes, hard links and devices: files with several names are
    written once for each.
    """
    with _zip_archive(out) as archive:
        for path, entry in packing.entries(top):
            if not path:
                continue
            if not (entry.is_file or entry.is_directory or entry.is_link):
                packing.leave_out("devices, FIFOs and sockets")
                continue
            seconds = min(max(entry.mtime_ns // 10**9, _ZIP_TIMES[0]), _ZIP_TIMES[1])
            name = path.decode("utf-8", "backslashreplace") + ("/" if entry.is_directory else "")
            info = zipfile.ZipInfo(name, time.gmtime(seconds)[:6])
            info.external_attr = entry.mode << 16 | (0x10 if entry.is_directory else 0)
            info.create_system = 3  # Unix
            info.compress_type = zipfile.ZIP_DEFLATED
            try:
                if entry.is_file:
                    spans, read = packing.data(path, entry)
                    with archive.open(info, "w", force_zip64=entry.size >= 1 << 31) as file:
                        reading = _Reading(spans, read)
                        while data := reading.read(1 << 20):
                            file.write(data)
                else:
                    archive.writestr(info, entry.target or b"")
            except DamageError as error:
                packing.lose(path, error)
                continue
            packing.result.files += 1
            packing.result.size += entry.size
