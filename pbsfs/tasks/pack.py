"""Writes a directory or a file of an archive as a tar or zip archive to a stream.

Plain synchronous code that runs in a worker thread. Tar archives are PAX (POSIX.1-2001) with the records of
star for extended attributes and access control lists, and GNU's sparse format 1.0 (GNU tar manual, "Storing
Sparse Files"), as GNU tar and bsdtar read them. Called by `pbsfs export --format`.
"""

from __future__ import annotations

import io
import os
import stat as stat_bits
import struct
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Contents, Entry
from pbsfs.reader.damage import Range, merged
from pbsfs.reader.image import Extent
from pbsfs.tasks.extract.extract import Restored, SpannedStream
from pbsfs.tasks.patterns import Selection

LEAST_HOLE = 64 << 10
"""Bytes of holes from which a file is stored as a sparse one."""

_ZEROS = bytes(1 << 20)

_TAR_TYPES = {
    stat_bits.S_IFREG: tarfile.REGTYPE,
    stat_bits.S_IFDIR: tarfile.DIRTYPE,
    stat_bits.S_IFLNK: tarfile.SYMTYPE,
    stat_bits.S_IFCHR: tarfile.CHRTYPE,
    stat_bits.S_IFBLK: tarfile.BLKTYPE,
    stat_bits.S_IFIFO: tarfile.FIFOTYPE,
}
"""The types that tar has; it has none for sockets."""

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

    def data(self, path: bytes, entry: Entry) -> tuple[list[Extent], Callable[[Extent], bytes]]:
        """The holes and data of a file, and what reads one of data: zeros where damage is skipped.

        An extent's offset is that in the file. Raises DamageError.
        """
        spans: list[Extent] = []
        sources: dict[int, tuple[SpannedStream, int]] = {}
        place = 0
        for piece in self.contents.data(entry):
            if piece.stream is None:
                spans.append(Extent(place, piece.length, hole=True))
            else:
                stream = self.streams[piece.stream]
                for span in stream.spans(piece.offset, piece.length):
                    at = place + span.offset - piece.offset
                    spans.append(Extent(at, span.length, span.hole))
                    sources[at] = stream, span.offset
            place += piece.length
        zeroed: list[Range] = []

        def read(span: Extent) -> bytes:
            stream, offset = sources[span.offset]
            self.advance(span.length)
            try:
                return stream.pread(offset, span.length)
            except DamageError as error:
                if not self.skip_damage:
                    raise DamageError(f"{os.fsdecode(path)}: {error}") from None
                if not zeroed:
                    self.result.zero(os.fsdecode(path), zeroed, str(error))
                zeroed[:] = merged([*zeroed, Range(span.offset, span.length)])
                return bytes(span.length)

        return spans, read

    def lose(self, path: bytes, error: DamageError) -> None:
        """Notes an entry that cannot be read. Raises `error` where damage is not skipped."""
        where = os.fsdecode(path)
        if not self.skip_damage:
            raise DamageError(f"{where}: {error}" if where else str(error)) from None
        self.result.lose(where, str(error))


def write_tar(packing: Packing, top: Entry, out: IO[bytes]) -> None:
    """Writes `top`, and all below it, to `out`. Raises what reading raises, and OSError."""
    first_names: dict[int, bytes] = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        for path, entry in packing.entries(top):
            kind = _TAR_TYPES.get(stat_bits.S_IFMT(entry.mode))
            if kind is None:
                packing.left_out["sockets"] += 1
                continue
            try:
                info = _tar_header(packing, path, entry, kind)
                first = first_names.get(entry.inode)
                if first is not None and entry.is_file:
                    info.type, info.linkname = tarfile.LNKTYPE, os.fsdecode(b"./" + first)
                    tar.addfile(info)
                elif entry.is_file:
                    _add_file(packing, tar, info, path, entry)
                else:
                    tar.addfile(info)
            except DamageError as error:
                packing.lose(path, error)
                continue
            if entry.is_file and packing.contents.link_count(entry) > 1:
                first_names.setdefault(entry.inode, path)
            packing.result.files += 1
            packing.result.size += entry.size


def _tar_header(packing: Packing, path: bytes, entry: Entry, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(os.fsdecode(b"./" + path if path else b"."))
    info.type = kind
    info.mode = stat_bits.S_IMODE(entry.mode)
    info.uid, info.gid = entry.uid, entry.gid
    sign, magnitude = ("-" if entry.mtime_ns < 0 else ""), abs(entry.mtime_ns)
    records = {"mtime": f"{sign}{magnitude // 10**9}.{magnitude % 10**9:09d}"}
    if entry.is_link:
        info.linkname = os.fsdecode(entry.target or b"")
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = os.major(entry.rdev), os.minor(entry.rdev)
    if entry.has_xattrs:
        for name, value in packing.contents.xattrs(entry).items():
            if name == b"system.posix_acl_access":
                records["SCHILY.acl.access"] = _acl_text(value)
            elif name == b"system.posix_acl_default":
                records["SCHILY.acl.default"] = _acl_text(value)
            else:
                records["SCHILY.xattr." + os.fsdecode(name)] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = records
    return info


def _add_file(
    packing: Packing, tar: tarfile.TarFile, info: tarfile.TarInfo, path: bytes, entry: Entry
) -> None:
    spans, read = packing.data(path, entry)
    if sum(span.length for span in spans if span.hole) < LEAST_HOLE:
        info.size = entry.size
        tar.addfile(info, _Reading(b"", spans, read))
        return
    # GNU.sparse 1.0: the map stands before the data, as decimal numbers, in whole blocks.
    stored: list[Extent] = []
    for span in spans:
        if not span.hole:
            if stored and stored[-1].offset + stored[-1].length == span.offset:
                stored[-1] = Extent(stored[-1].offset, stored[-1].length + span.length, hole=False)
            else:
                stored.append(span)
    if not stored or stored[-1].offset + stored[-1].length < entry.size:
        stored.append(Extent(entry.size, 0, hole=False))
    numbers = [len(stored), *(number for span in stored for number in (span.offset, span.length))]
    text = b"".join(b"%d\n" % number for number in numbers)
    text += bytes(-len(text) % tarfile.BLOCKSIZE)
    info.pax_headers = {
        **info.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": info.name,
        "GNU.sparse.realsize": str(entry.size),
    }
    folder, _slash, name = info.name.rpartition("/")
    info.name = f"{folder or '.'}/GNUSparseFile.0/{name}"
    data = [span for span in spans if not span.hole]
    info.size = len(text) + sum(span.length for span in data)
    tar.addfile(info, _Reading(text, data, read))


class _Reading(io.RawIOBase):
    """A file as tarfile reads it: `head`, then the spans one after the other, holes as zeros."""

    def __init__(self, head: bytes, spans: list[Extent], read: Callable[[Extent], bytes]) -> None:
        self._data: bytes | memoryview = memoryview(head)
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


_ACL_TAGS = {0x01: "user:", 0x02: "user:{}", 0x04: "group:", 0x08: "group:{}", 0x10: "mask:", 0x20: "other:"}


def _acl_text(value: bytes) -> str:
    """The kernel's form of an access control list as text: `user::rw-,user:1000:r--,…`."""
    entries = []
    for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]):
        rights = "".join(
            letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1))
        )
        entries.append(f"{_ACL_TAGS[tag].format(number)}:{rights}")
    return ",".join(entries)


def write_zip(packing: Packing, top: Entry, out: IO[bytes]) -> None:
    """Writes `top`, and all below it, to `out`. Raises what reading raises, and OSError.

    Zip archives have no owners, extended attributes, hard links and devices: files with several names are
    written once for each.
    """
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path, entry in packing.entries(top):
            if not path:
                continue
            if not (entry.is_file or entry.is_directory or entry.is_link):
                packing.left_out["devices, FIFOs and sockets"] += 1
                continue
            seconds = min(max(entry.mtime_ns // 10**9, _ZIP_TIMES[0]), _ZIP_TIMES[1])
            name = path.decode("utf-8", "replace") + ("/" if entry.is_directory else "")
            info = zipfile.ZipInfo(name, time.gmtime(seconds)[:6])
            info.external_attr = entry.mode << 16 | (0x10 if entry.is_directory else 0)
            info.create_system = 3  # Unix
            info.compress_type = zipfile.ZIP_DEFLATED
            try:
                if entry.is_file:
                    spans, read = packing.data(path, entry)
                    with archive.open(info, "w", force_zip64=entry.size >= 1 << 31) as file:
                        reading = _Reading(b"", spans, read)
                        while data := reading.read(1 << 20):
                            file.write(data)
                else:
                    archive.writestr(info, entry.target or b"")
            except DamageError as error:
                packing.lose(path, error)
                continue
            packing.result.files += 1
            packing.result.size += entry.size
