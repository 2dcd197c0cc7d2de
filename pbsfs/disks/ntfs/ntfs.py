"""NTFS as a file system of a disk image: directories, inodes, places of data, and streams as xattrs.

Alternate streams of up to 64 KiB are the xattrs `user.<stream>`; larger ones are left out. Names in the form
8.3 and the metadata files in the root are left out. A name with half a surrogate pair is shown as WTF-8.
The journal is not replayed. Synchronous; of one thread.
"""

from __future__ import annotations

import functools
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry, Piece
from pbsfs.contents.faults import Faults
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.ntfs import boot, logfile, records, reparse, special
from pbsfs.disks.ntfs.index import DOS, I30, read_names
from pbsfs.disks.ntfs.mft import Inode, Mft
from pbsfs.disks.ntfs.sequences import Sequences
from pbsfs.disks.ntfs.streams import Stream, merged
from pbsfs.disks.volume import Volume

MOST_XATTR = 64 << 10
"""Bytes of a stream that is shown as an xattr: what Linux allows."""

MOST_XATTRS = 1 << 20
"""Bytes of all xattrs of a file."""

MOST_NAME = 255
"""Bytes of the name of an xattr: what Linux allows."""

MOST_TARGET = 64 << 10
"""Bytes of the target of a link: Linux follows 4 KiB."""

_ROOT = 5
_LOGFILE = 2
_VOLUME = 3
_RESERVED = 16
"""Records below are metadata files."""

_STANDARD = struct.Struct("<8xq16xI")
_VERSION = struct.Struct("<8xBBH")
_EPOCH = 116_444_736_000_000_000
"""1970 in units of 100 ns since 1601."""

_READ_ONLY = 0x1
_HIDDEN = 0x2
_SYSTEM = 0x4
_REPARSE = 0x400
_ELSEWHERE = 0x1000 | 0x40000 | 0x400000  # offline, recall on open, recall on access
_DIRECTORY = 0x10000000  # in an index only
_DIRTY = 1
_SPACE_OF_NAME = 65
_WOF_STREAM = "WofCompressedData".encode("utf-16-le")


class Ntfs(FileSystem):
    """An NTFS volume."""

    kind = "ntfs"

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume)
        self._geometry = boot.read_geometry(volume)
        self._mft = Mft(volume, self._geometry)
        self._sequences = Sequences()
        self._opened = functools.lru_cache(4)(self._stream_of)
        self.root = self.inode(_ROOT)
        if not self.root.is_directory:
            raise DamageError("the root is not a directory")

    @classmethod
    def recognise(cls, volume: Volume) -> bool:
        """Whether there is the magic number of NTFS. Raises KeyRequiredError, SourceError."""
        return boot.recognise(volume)

    def facts(self) -> dict[str, str]:
        facts = {"uuid": f"{self._geometry.serial:016X}"}
        try:
            volume = self._mft.inode(_VOLUME)
            label = volume.first(records.VOLUME_NAME)
            if label is not None and label.resident and len(label.value) % 2 == 0:
                facts["label"] = reparse.utf8(label.value).decode(errors="replace")
            version = volume.first(records.VOLUME_INFORMATION)
            if version is not None and len(version.value) >= _VERSION.size:
                major, minor, flags = _VERSION.unpack_from(version.value)
                facts["version"] = f"{major}.{minor}"
                facts["dirty"] = "yes" if flags & _DIRTY else "no"
        except DamageError as error:
            facts["dirty"] = f"unknown: {error}"
        facts["journal"] = self._journal()
        return facts

    def names(self, directory: Entry) -> Iterator[tuple[bytes, int, int]]:
        faults = Faults()
        try:
            inode = self._inode(directory.inode)
            for name in read_names(inode, self._geometry):
                number = name.record & records.NUMBER
                if name.space == DOS or (number < _RESERVED and directory.inode == _ROOT):
                    continue
                if number < _RESERVED:
                    faults.add(DamageError(f"a name in it is of the metadata file {number}"))
                elif not self._sequences.note(number, name.record >> 48) and not self._is_now(name.record):
                    faults.add(DamageError(f"inode {number}: it was used again since it got a name"))
                else:
                    yield reparse.utf8(name.name), number, _type_of(name.flags, name.tag)
        except DamageError as error:
            text = str(error)
            start = f"inode {directory.inode}: "
            faults.add(error if text.startswith(start) else type(error)(start + text))
        problem = faults.summary()
        if problem is not None:
            raise problem

    def inode(self, number: int) -> Entry:
        inode = self._inode(number)
        try:
            return self._entry(number, inode)
        except DamageError as error:
            raise type(error)(f"inode {number}: {error}") from None

    def prefetch_inodes(self, numbers: Sequence[int]) -> None:
        self._mft.prefetch(numbers)

    def data(self, file: Entry, *, unconfirmed: bool = False) -> Sequence[Piece]:
        if not file.is_file or not file.size:
            return []
        try:
            stream = self._opened(file.inode)
            if stream.size != file.size:
                raise DamageError("its size is another than before")
            return merged(stream.pieces())
        except DamageError as error:
            raise type(error)(f"inode {file.inode}: {error}") from None

    def read(self, file: Entry, offset: int, size: int) -> bytes:
        try:
            return self._opened(file.inode).read(offset, size)
        except DamageError as error:
            raise type(error)(f"inode {file.inode}: {error}") from None

    def decoded_from(self, file: Entry) -> Sequence[Piece]:
        try:
            return merged(self._opened(file.inode).stored())
        except DamageError as error:
            raise type(error)(f"inode {file.inode}: {error}") from None

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        if not entry.has_xattrs:
            return {}
        found: dict[bytes, bytes] = {}
        inode = self._inode(entry.inode)
        try:
            total = 0
            for name in sorted(_streams_of(inode)):
                shown = b"user." + reparse.utf8(name)
                if len(shown) > MOST_NAME or b"\0" in shown:
                    continue
                first = inode.first(records.DATA, name)
                if first is None or first.size > MOST_XATTR:
                    continue
                total += first.size + len(shown)
                if total > MOST_XATTRS:
                    raise UnsupportedError(
                        f"more than {MOST_XATTRS} bytes of streams of a file are not supported"
                    )
                stream = self._mft.stream(inode.parts(records.DATA, name))
                if stream.encrypted:
                    raise UnsupportedError("a file encrypted with EFS is not supported")
                found[shown] = stream.read(0, stream.size)
        except DamageError as error:
            raise type(error)(f"inode {entry.inode}: {error}") from None
        return found

    def _inode(self, number: int) -> Inode:
        inode = self._mft.inode(number)
        known = self._sequences.of(number)
        if known and known != inode.base.sequence:
            raise DamageError(f"inode {number}: it was used again since it got its name")
        return inode

    def _is_now(self, reference: int) -> bool:
        """Whether a reference is right, where another one to the same record was noted."""
        number = reference & records.NUMBER
        try:
            if self._mft.inode(number).base.reference != reference:
                return False
        except DamageError:
            return False
        self._sequences.forget(number)
        return self._sequences.note(number, reference >> 48)

    def _entry(self, number: int, inode: Inode) -> Entry:
        standard = inode.first(records.STANDARD_INFORMATION)
        if standard is None or len(standard.value) < _STANDARD.size or not standard.resident:
            raise DamageError("it has no times")
        time, flags = _STANDARD.unpack_from(standard.value)
        mode, target, rdev, size = 0, None, 0, 0
        if flags & _REPARSE:
            mode, target = self._reparsed(inode)
        if not mode:
            if inode.base.is_directory:
                if inode.first(records.INDEX_ROOT, I30) is None:
                    raise DamageError("it is a directory without an index")
                mode = stat.S_IFDIR
            else:
                mode = stat.S_IFREG
                data = inode.first(records.DATA)
                size = data.size if data is not None else 0
                is_small = data is not None and (size > 1 or not flags & _HIDDEN) and size <= special.MOST
                if flags & _SYSTEM and is_small:
                    mode, target, rdev = self._special(inode)
        if target is not None:
            if len(target) > MOST_TARGET:
                raise UnsupportedError(f"a link with a target of {len(target)} bytes is not supported")
            mode, size = mode | 0o777, len(target)
        else:
            mode |= 0o755 if stat.S_ISDIR(mode) else 0o644
            if flags & _READ_ONLY:
                mode &= ~0o222
            if not stat.S_ISREG(mode):
                size = 0
        links = 1
        if inode.base.links > 1 and not stat.S_ISDIR(mode):
            found = inode.parts(records.FILE_NAME)
            links = max(
                sum(len(each.value) > _SPACE_OF_NAME and each.value[_SPACE_OF_NAME] != DOS for each in found),
                1,
            )
        return Entry(
            b"",
            mode,
            mtime_ns=(time - _EPOCH) * 100,
            size=size,
            inode=number,
            rdev=rdev,
            target=target,
            has_xattrs=bool(_streams_of(inode)),
            links=links,
        )

    def _reparsed(self, inode: Inode) -> tuple[int, bytes | None]:
        """The type and target of a reparse point; 0 where it is a file or directory like others."""
        value = self._reparse_value(inode)
        tag = reparse.read_tag(value)
        if tag in reparse.LINKS:
            return stat.S_IFLNK, reparse.read_target(value)
        return reparse.TYPES.get(tag, 0), None

    def _reparse_value(self, inode: Inode) -> bytes:
        stream = inode.stream(records.REPARSE_POINT)
        if stream is None or stream.size > reparse.MOST:
            raise DamageError("it has no reparse point")
        return stream.read(0, stream.size)

    def _special(self, inode: Inode) -> tuple[int, bytes | None, int]:
        stream = self._mft.stream(inode.parts(records.DATA))
        head = stream.read(0, min(stream.size, 8)) if not stream.encrypted else b"encrypted"
        if len(head) < 8 or head.startswith(b"Intx"):
            found = special.read_special(stream.read(0, stream.size))
            if found is not None:
                return found
        return stat.S_IFREG, None, 0

    def _stream_of(self, number: int) -> Stream:
        """The bytes of a file; an error where its own data is not all of them."""
        inode = self._inode(number)
        stream = inode.stream(records.DATA)
        if stream is None:
            raise DamageError("it has no data")
        if stream.encrypted:
            raise UnsupportedError("a file encrypted with EFS is not supported")
        standard = inode.first(records.STANDARD_INFORMATION)
        flags = _STANDARD.unpack_from(standard.value)[1] if standard is not None else 0
        if flags & _REPARSE:
            tag = reparse.read_tag(self._reparse_value(inode))
            if not reparse.is_cloud(tag):
                name = reparse.UNSUPPORTED.get(tag, f"the reparse tag {tag:#010x}")
                raise UnsupportedError(f"{name} is not supported")
            if flags & _ELSEWHERE or not stream.is_whole:
                raise UnsupportedError("a file whose data is in the cloud is not supported")
        return stream

    def _journal(self) -> str:
        try:
            log = self._mft.inode(_LOGFILE).stream(records.DATA)
            if log is None:
                raise DamageError("it is missing")
            state = logfile.read_state(log)
            if self._is_hibernated():
                return "not replayed: Windows is hibernated, and keeps changes in its memory"
        except DamageError as error:
            return f"not replayed: its state is unknown ({error})"
        return state

    def _is_hibernated(self) -> bool:
        for name, number, _kind in self.names(self.root):
            if name.lower() == b"hiberfil.sys":
                stream = self._mft.inode(number).stream(records.DATA)
                return stream is not None and stream.size >= 4 and stream.read(0, 4).lower() == b"hibr"
        return False


def _type_of(flags: int, tag: int) -> int:
    """The type as in st_mode, as far as an index has it; 0 where the record has to be read."""
    if flags & _REPARSE:
        if tag in reparse.LINKS:
            return stat.S_IFLNK
        return stat.S_IFREG if tag == reparse.WOF and not flags & _DIRECTORY else 0
    if flags & _DIRECTORY:
        return stat.S_IFDIR
    return 0 if flags & _SYSTEM else stat.S_IFREG


def _streams_of(inode: Inode) -> Iterable[bytes]:
    """The names of the alternate streams."""
    return [name for name in inode.names(records.DATA) if name and name != _WOF_STREAM]
