"""Writes a directory or a file of an archive as a tar archive to a stream.

Plain synchronous code that runs in a worker thread. The form is PAX (POSIX.1-2008, pax): ustar headers, and
records for what these cannot hold, with those of star for extended attributes and access control lists, and
GNU's sparse format 1.0 (GNU tar manual, "Storing Sparse Files"). GNU tar and bsdtar read all of it.

The headers are made here, since the standard library's `tarfile` takes names and values for text, and marks
those that are not with a record that GNU tar warns of. It also takes a third of a millisecond for an entry.
Called by `pbsfs export --format tar`.
"""

from __future__ import annotations

import contextlib
import os
import stat as stat_bits
import struct
import tarfile
import zlib
from typing import IO

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import Entry
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.image import Extent
from pbsfs.tasks.pack import Packing

LEAST_HOLE = 64 << 10
"""Bytes of holes from which a file is stored as a sparse one."""

_TYPES = {
    stat_bits.S_IFREG: tarfile.REGTYPE,
    stat_bits.S_IFDIR: tarfile.DIRTYPE,
    stat_bits.S_IFLNK: tarfile.SYMTYPE,
    stat_bits.S_IFCHR: tarfile.CHRTYPE,
    stat_bits.S_IFBLK: tarfile.BLKTYPE,
    stat_bits.S_IFIFO: tarfile.FIFOTYPE,
}
"""The types that tar has; it has none for sockets."""

_DEVICES = {tarfile.CHRTYPE, tarfile.BLKTYPE}

_BLOCK = tarfile.BLOCKSIZE
_USTAR = struct.Struct("100s48s8sc100s8s64x16s167x")
"""A header: name, five numbers, checksum, type, link, magic number and version, device numbers."""

_MAGIC = b"ustar\x0000"
_SUM_OF_REST = sum(_MAGIC) + 8 * ord(" ")  # in a checksum, its own bytes are spaces
_NAME = tarfile.LENGTH_NAME
_MOST_ID = 0o7777777
_MOST_SIZE = 0o77777777777
_ZEROS = bytes(1 << 20)
_PADDING = bytes(_BLOCK)
_SMALL, _GATHERED = 64 << 10, 256 << 10

Records = dict[bytes, bytes]


def write_tar(packing: Packing, top: Entry, out: IO[bytes]) -> None:
    """Writes `top`, and all below it, to `out`. Raises what reading raises, and OSError.

    When reading fails, programs that read what is written report an incomplete archive.
    """
    stream = _Stream(out)
    try:
        _write_entries(packing, top, stream)
    except BaseException:
        with contextlib.suppress(OSError):
            stream.break_off()
        raise
    stream.write(bytes(2 * _BLOCK + -(stream.size + 2 * _BLOCK) % tarfile.RECORDSIZE))
    stream.flush()


class _Stream:
    """Where the archive goes: gathers small parts, and counts the bytes.

    `within`: what is written ends within the bytes of a file.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._gathered = bytearray()
        self.size = 0
        self.within = False

    def write(self, data: Buffer) -> None:
        self.size += len(data)
        if len(data) >= _SMALL:
            self.flush()
            self._out.write(data)
            return
        self._gathered += data  # a copy: a view would hold all of its chunk
        if len(self._gathered) >= _GATHERED:
            self.flush()

    def flush(self) -> None:
        """Writes what was gathered."""
        if self._gathered:
            self._out.write(self._gathered)
            self._gathered = bytearray()

    def break_off(self) -> None:
        """Makes an archive that ends here incomplete.

        Programs take one that ends between two entries for a complete one, but not one that ends after the
        first half of a header. Within a file, that would be taken for bytes of the file.
        """
        if not self.within:
            self.write(_ustar(b"incomplete", tarfile.XHDTYPE, _BLOCK))
        self.flush()


def _write_entries(packing: Packing, top: Entry, out: _Stream) -> None:
    first_names: dict[int, bytes] = {}
    for path, entry in packing.entries(top):
        kind = _TYPES.get(stat_bits.S_IFMT(entry.mode))
        if kind is None:
            packing.leave_out("sockets")
            continue
        name = b"./" + path if path else b"."
        try:
            records = _attributes(packing, entry) if entry.has_xattrs else {}
            if kind is not tarfile.REGTYPE:
                if kind is tarfile.DIRTYPE:
                    name += b"/"
                out.write(_header(name, kind, entry, 0, entry.target or b"", records))
            elif (first := first_names.get(entry.inode)) is not None:
                out.write(_header(name, tarfile.LNKTYPE, entry, 0, b"./" + first, records))
            else:
                if entry.size < LEAST_HOLE:
                    data = packing.content(path, entry)
                    header = _header(name, kind, entry, entry.size, b"", records)
                    out.write(b"".join((header, data, _PADDING[: -entry.size % _BLOCK])))
                else:
                    _put_large(packing, out, path, name, entry, records)
                if packing.contents.link_count(entry) > 1:
                    first_names[entry.inode] = path
        except DamageError as error:
            packing.lose(path, error)
            continue
        packing.result.files += bool(path)  # not the top, as in a restore
        packing.result.size += entry.size


def _attributes(packing: Packing, entry: Entry) -> Records:
    records: Records = {}
    for name, value in packing.contents.xattrs(entry).items():
        if name == b"system.posix_acl_access":
            records[b"SCHILY.acl.access"] = _acl_text(value)
        elif name == b"system.posix_acl_default":
            records[b"SCHILY.acl.default"] = _acl_text(value)
        else:
            # As GNU tar has it (xheader.c): in the archive `=` ends the name.
            encoded = name.replace(b"%", b"%25").replace(b"=", b"%3D")
            records[b"SCHILY.xattr." + encoded] = value
    return records


def _put_large(
    packing: Packing, out: _Stream, path: bytes, name: bytes, entry: Entry, records: Records
) -> None:
    """Writes a file's header and bytes, without its holes where they are large."""
    spans, read = packing.data(path, entry)
    head, size, header_name = b"", entry.size, name
    stored = spans
    if sum(span.length for span in spans if span.hole) >= LEAST_HOLE:
        stored, regions = _without_holes(spans, entry.size)
        head = _sparse_map(regions, entry.size)
        size = len(head) + sum(span.length for span in stored)
        folder, _slash, last = name.rpartition(b"/")
        header_name = folder + b"/GNUSparseFile.0/" + last
        records = records | {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": name,
            b"GNU.sparse.realsize": b"%d" % entry.size,
        }
    # The first bytes are read before the header is written, so that a damaged file leaves nothing of itself.
    first = read(stored[0]) if stored and not stored[0].hole else None
    out.write(_header(header_name, tarfile.REGTYPE, entry, size, b"", records))
    out.within = size > 0
    out.write(head)
    for number, span in enumerate(stored):
        if span.hole:
            for start in range(0, span.length, len(_ZEROS)):
                out.write(_ZEROS[: span.length - start])
        else:
            out.write(first if number == 0 and first is not None else read(span))
    out.write(bytes(-size % _BLOCK))
    out.within = False


def _without_holes(spans: list[Extent], size: int) -> tuple[list[Extent], list[Extent]]:
    """What of a file is stored, holes in it as zeros, and the regions that it makes.

    Regions begin and end at blocks, or at the end of the file: GNU tar reads each from a block of its own,
    other programs without a gap.
    """
    stored: list[Extent] = []
    regions: list[Extent] = []

    def store(span: Extent) -> None:
        if not span.length:
            return
        stored.append(span)
        last = regions[-1] if regions else None
        if last is not None and last.offset + last.length == span.offset:
            regions[-1] = Extent(last.offset, last.length + span.length, hole=False)
        else:
            regions.append(Extent(span.offset, span.length, hole=False))

    for span in spans:
        end = span.offset + span.length
        first = span.offset + -span.offset % _BLOCK
        after = end if end == size else end - end % _BLOCK
        if not span.hole or after <= first:
            store(span)
        else:
            store(Extent(span.offset, first - span.offset, hole=True))
            store(Extent(after, end - after, hole=True))
    return stored, regions


def _sparse_map(regions: list[Extent], size: int) -> bytes:
    """Where the data of a sparse file are: decimal numbers, one a line, in whole blocks."""
    if not regions or regions[-1].offset + regions[-1].length < size:
        regions = [*regions, Extent(size, 0, hole=False)]
    numbers = [len(regions), *(number for region in regions for number in (region.offset, region.length))]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + bytes(-len(text) % _BLOCK)


def _header(name: bytes, kind: bytes, entry: Entry, size: int, link: bytes, records: Records) -> bytes:
    """The header of an entry, after a header with records where it needs some: `records`, to which those are
    added that the header cannot hold.

    Names that fit a ustar header stand there as they are, whatever their bytes: readers change those in
    records to the form of UTF-8 that they like.
    """
    mtime, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    in_range = 0 <= mtime <= _MOST_SIZE
    if nanoseconds or not in_range:
        sign = b"" if mtime >= 0 else b"-"
        records[b"mtime"] = b"%b%d.%09d" % (sign, *divmod(abs(entry.mtime_ns), 1_000_000_000))
        if not in_range:
            mtime = 0
    devices = b""
    if kind in _DEVICES:
        major = _number(os.major(entry.rdev), _MOST_ID, b"SCHILY.devmajor", records)
        minor = _number(os.minor(entry.rdev), _MOST_ID, b"SCHILY.devminor", records)
        devices = b"%07o\0%07o\0" % (major, minor)
    uid, gid = entry.uid, entry.gid
    shown = name
    if len(name) > _NAME or size > _MOST_SIZE or len(link) > _NAME or uid > _MOST_ID or gid > _MOST_ID:
        shown = _fitting(name, b"path", records)
        size = _number(size, _MOST_SIZE, b"size", records)
        link = _fitting(link, b"linkpath", records)
        uid = _number(uid, _MOST_ID, b"uid", records)
        gid = _number(gid, _MOST_ID, b"gid", records)
    block = _ustar(shown, kind, size, link, entry.mode & 0o7777, uid, gid, mtime, devices)
    if not records:
        return block
    for key in (b"path", b"linkpath"):
        if key in records and not _is_text(records[key]):
            records = {b"hdrcharset": b"BINARY", **records}
    body = b"".join([_record(key, value) for key, value in records.items()])
    extended = b"./PaxHeaders/" + name.strip(b"/").rpartition(b"/")[2][:60]
    padding = _PADDING[: -len(body) % _BLOCK]
    return b"".join((_ustar(extended, tarfile.XHDTYPE, len(body)), body, padding, block))


def _ustar(
    name: bytes,
    kind: bytes,
    size: int,
    link: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    devices: bytes = b"",
) -> bytes:
    """A header (POSIX.1-2008, pax, "ustar Interchange Format"), all of whose values fit."""
    numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, mtime)
    checksum = _SUM_OF_REST + _sum(name) + _sum(numbers) + kind[0]
    if link or devices:
        checksum += _sum(link) + _sum(devices)
    return _USTAR.pack(name, numbers, b"%06o\0 " % checksum, kind, link, _MAGIC, devices)


def _sum(data: bytes) -> int:
    """The sum of at most 256 bytes, in a twentieth of the time of `sum`: half of an Adler-32 is one more than
    that, modulo 65521 (RFC 1950)."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _fitting(text: bytes, key: bytes, records: Records) -> bytes:
    """What a header can hold of a name; the whole name goes to `records` where that is not all."""
    if len(text) > _NAME:
        records[key] = text
        text = text[:_NAME].rstrip(b"/")
    return text


def _number(number: int, most: int, key: bytes, records: Records) -> int:
    if number <= most:
        return number
    records[key] = b"%d" % number
    return 0


def _record(key: bytes, value: bytes) -> bytes:
    """A record of a PAX header: its length in decimal, which counts itself, key and value."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


_ACL_TAGS = {0x01: "user:", 0x02: "user:{}", 0x04: "group:", 0x08: "group:{}", 0x10: "mask:", 0x20: "other:"}


def _acl_text(value: bytes) -> bytes:
    """The kernel's form of an access control list as text: `user::rw-,user:1000:r--,…`."""
    entries = []
    for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]):
        rights = "".join(
            letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1))
        )
        entries.append(f"{_ACL_TAGS[tag].format(number)}:{rights}")
    return ",".join(entries).encode()
