"""Disks for readers of file systems: golden ones, files, and memory; and the truth about what is in them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.base import DECODED, Contents, Entry, Stream
from pbsfs.formats.blob import decode_chunk
from pbsfs.formats.index import FixedIndex
from tests.support.needs import need
from tests.support.truth import FILES


class GoldenDisk:
    """A disk image of the golden datastore, `vm/320/…/drive-scsi0.img`, not encrypted."""

    def __init__(self, vm: int, drive: str) -> None:
        (found,) = (FILES / "datastore" / "vm" / str(vm)).glob(f"*/{drive}.img.fidx")
        self._index = FixedIndex(found.read_bytes())
        self.size = self._index.size
        self._chunk = functools.lru_cache(8)(self._load)

    def _load(self, number: int) -> bytes:
        digest = self._index.digest(number)
        start, end = self._index.span(number)
        raw = (FILES / "datastore/.chunks" / digest.hex()[:4] / digest.hex()).read_bytes()
        return decode_chunk(raw, digest=digest, length=end - start, encrypted=False)

    def pread(self, offset: int, size: int) -> bytes:
        parts = []
        end = min(offset + size, self.size)
        while offset < end:
            number = self._index.find(offset)
            start, stop = self._index.span(number)
            parts.append(self._chunk(number)[offset - start : end - start])
            offset = stop
        return b"".join(parts)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass


class FileDisk:
    """A disk image that is a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size

    def pread(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def __del__(self) -> None:
        self._file.close()


class MemoryDisk:
    """A disk in memory, which tests can change."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def pread(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass


class Patched:
    """A disk with changed bytes, by where they begin."""

    def __init__(self, disk: Stream) -> None:
        self._disk = disk
        self.size = disk.size
        self.changes: dict[int, bytes] = {}

    def pread(self, offset: int, size: int) -> bytes:
        data = bytearray(self._disk.pread(offset, size))
        for start, change in self.changes.items():
            first, last = max(start, offset), min(start + len(change), offset + size)
            if first < last:
                data[first - offset : last - offset] = change[first - start : last - start]
        return bytes(data)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass


class HoledDisk:
    """Another disk of which ranges are damaged, each an offset and a length."""

    def __init__(self, disk: Stream, damaged: Sequence[tuple[int, int]]) -> None:
        self._disk = disk
        self._damaged = damaged
        self.size = disk.size

    def pread(self, offset: int, size: int) -> bytes:
        if any(offset < at + length and at < offset + size for at, length in self._damaged):
            raise DamageError("damaged")
        return self._disk.pread(offset, size)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass


def check_decoded_from(opened: Callable[[Stream], Contents], disk: Stream, *, most: int = 5) -> int:
    """Checks of `most` files that what they are decoded from is what reading them needs. Returns how many it
    has found. `opened`: the contents of a disk."""
    contents = opened(disk)
    count = 0
    for _path, entry in contents.walk(contents.root):
        if isinstance(entry, Entry) and entry.is_file and count < most:
            stored = contents.decoded_from(entry)
            if not any(piece.stream == DECODED for piece in contents.data(entry)):
                assert not stored
            elif stored:
                count += 1
                holed = HoledDisk(disk, [(piece.offset, piece.length) for piece in stored])
                other = opened(holed)
                other.data(entry)
                with pytest.raises(DamageError):
                    list(content_of(other, [holed], entry))
    return count


def lines_of(name: str) -> dict[bytes, dict[str, Any]]:
    """The truth of a volume, `server.root`, by path; the root's is empty."""
    found = map(json.loads, (FILES / "truth" / f"{name}.jl").read_text().splitlines())
    return {bytes.fromhex(line["p"]): line for line in found}


def content_of(contents: Contents, streams: Sequence[Stream], file: Entry) -> Iterator[bytes]:
    """The bytes of a file, as its pieces say."""
    for piece in contents.data(file):
        for at in range(0, piece.length, 1 << 20):
            size = min(1 << 20, piece.length - at)
            if piece.stream is None:
                yield bytes(size)
            elif piece.stream == DECODED:
                yield contents.read(file, piece.offset + at, size)
            else:
                yield streams[piece.stream].pread(piece.offset + at, size)


def fields_of(contents: Contents, streams: Sequence[Stream], entry: Entry) -> dict[str, Any]:
    """What the truth says of an entry, as the reader of it has it."""
    kind = stat.S_IFMT(entry.mode)
    fields: dict[str, Any] = {"t": kind, "m": stat.S_IMODE(entry.mode), "mt": entry.mtime_ns}
    fields |= {"u": entry.uid, "g": entry.gid}
    fields["x"] = {name.hex(): value.hex() for name, value in contents.xattrs(entry).items()}
    if kind != stat.S_IFDIR:
        fields["s"] = entry.size
        fields["n"] = entry.links
    if kind == stat.S_IFREG:
        digest, length = hashlib.sha256(), 0
        for part in content_of(contents, streams, entry):
            digest.update(part)
            length += len(part)
        fields["h"] = digest.hexdigest() if length == entry.size else f"{length} bytes"
    elif kind == stat.S_IFLNK:
        fields["l"] = (entry.target or b"").hex()
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        fields["d"] = [os.major(entry.rdev), os.minor(entry.rdev)]
    return fields


def differences(
    contents: Contents, streams: Sequence[Stream], truth: dict[bytes, dict[str, Any]], *, but: str = ""
) -> list[str]:
    """How contents differ from the truth; `but`: the letters of fields that are not looked at."""
    found: list[str] = []
    there: set[bytes] = {b""}
    walked: list[tuple[bytes, Entry | DamageError]] = [(b"", contents.root), *contents.walk(contents.root)]
    for path, entry in walked:
        there.add(path)
        if isinstance(entry, DamageError):
            found.append(f"{path!r}: {entry}")
        elif path not in truth:
            found.append(f"{path!r} should not be there")
        else:
            fields = fields_of(contents, streams, entry)
            found.extend(
                f"{path!r}: {field} is {fields[field]!r}, not {truth[path].get(field)!r}"
                for field in sorted(fields.keys() - set(but.split(",")))
                if truth[path].get(field) != fields[field]
            )
    return found + [f"{path!r} is missing" for path in truth.keys() - there]


def image_from(path: Path, size: int) -> Path:
    """An empty sparse file to make a file system in."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def partitioned(system: bytes) -> bytes:
    """A disk with a file system on its first partition, and an encrypted one."""
    start, size = 2048, len(system) // 512
    table = bytearray(512)
    struct.pack_into("<B3xB3xII", table, 446, 0, 0x83, start, size)
    struct.pack_into("<B3xB3xII", table, 462, 0, 0x83, start + size, 2048)
    table[510:512] = b"\x55\xaa"
    head = bytes(table).ljust(start * 512, b"\0")
    return head + system + b"LUKS\xba\xbe\0\2".ljust(1 << 20, b"\0")


def ext4_of(tree: Path, image: Path, *, size: int = 16 << 20) -> bytes:
    """An ext4 file system with the files of `tree`, made at `image`: the same for the same files."""
    need("mke2fs")
    image_from(image, size)
    same = (
        "-U",
        "1c4b7a52-0a1e-4a39-8d2a-1c8c1f1c7a01",
        "-E",
        "hash_seed=1c4b7a52-0a1e-4a39-8d2a-1c8c1f1c7a01",
    )
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", *same, "-d", tree, image],
        check=True,
        capture_output=True,
        env=os.environ | {"E2FSPROGS_FAKE_TIME": "1700000000"},
    )
    return image.read_bytes()
