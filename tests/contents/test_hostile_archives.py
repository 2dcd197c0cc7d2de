"""Every bit of small archives and catalogs flipped, and every length: entries or an error, and nothing else.

What a flipped bit hits may be wrong or missing, as no checksum covers a stream itself; all else is right.
"""

from __future__ import annotations

import random
import stat
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Entry
from pbsfs.contents.hints import Hints
from pbsfs.formats import pxar
from pbsfs.formats.catalog import MAGIC
from pbsfs.testing.archives import Node, Written, item, write, write_catalog
from tests.contents.trees import NAME, Shown, directory, expected, file, shown_of, some
from tests.support.archives import Memory

MOST_ENTRIES = 40
"""More than any of these archives holds: each name that is shown takes bytes of its own."""


def small() -> Node:
    """A tree whose names are more than a bit apart."""
    first = file(b"first", b"hello", mtime_ns=10**18)
    return directory(
        b"",
        first,
        directory(b"inner", file(b"below", b"x")),
        Node(b"link", stat.S_IFLNK | 0o777, target=b"first"),
        Node(b"null", stat.S_IFCHR | 0o666, device=(1, 3)),
        Node(b"pipe", stat.S_IFIFO | 0o600),
        file(b"user", b"", xattrs={b"user.a": b"1"}),
        Node(b"zz", link_to=first),
    )


def read(archive: Archive) -> Shown:
    """All that can be read, all ways to ask tried; links are not counted in it."""
    found: Shown = {}
    directories = [archive.root]
    listed = [(b"", archive.root), *archive.walk(archive.root)]
    assert len(listed) < MOST_ENTRIES
    for path, entry in listed:
        if isinstance(entry, Entry):
            found.update(tried(archive, path, entry))
            if entry.is_directory and path:
                directories.append(entry)
    for parent in directories:
        ways(archive, parent)
    return found


def tried(archive: Archive, path: bytes, entry: Entry) -> Iterator[tuple[bytes, tuple[Any, ...]]]:
    with suppress(DamageError):
        yield path, shown_of(archive, entry)[:-1]
    assert 1 <= archive.link_count(entry) < MOST_ENTRIES


def ways(archive: Archive, parent: Entry) -> None:
    """Look-up and listing by the catalog agree with the listing, or fail."""
    try:
        exact = archive.children(parent)
        named = archive.children(parent, names_only=True)
    except DamageError:
        return
    assert len(named.entries) < MOST_ENTRIES
    for entry in exact.entries:
        try:
            found = archive.child(parent, entry.name)
        except DamageError:
            continue
        assert found in (None, entry)  # None where the hash in the table is wrong
    for entry, done in zip(named.entries, archive.complete(parent, named.entries), strict=True):
        assert done is None or isinstance(done, DamageError) or done.name == entry.name


@dataclass
class Made:
    """A small archive, and where each entry that is not a directory lies in it."""

    written: Written
    catalog: bytes
    whole: Shown
    ranges: dict[bytes, range]

    def open(self, main: bytes | None = None, catalog: bytes | None = None) -> Archive:
        payload = self.written.payload
        return Archive(
            Memory(self.written.main if main is None else main),
            Memory(payload) if payload is not None else None,
            catalog=Memory(self.catalog if catalog is None else catalog),
            name=NAME,
        )

    def unhurt(self, byte: int) -> set[bytes]:
        """The paths that must be right where this byte of the archive is not."""
        for path, place in self.ranges.items():
            if byte in place:
                # What has no end of its own may have attributes that are hidden by damage behind it.
                hidden = {b"first": {b"", b"zz"}, b"inner/below": {b"inner"}, b"user": {b"pipe"}}
                return self.whole.keys() - {path} - hidden.get(path, set())
        return set()


def made(split: bool) -> Made:
    root = small()
    written = write(root, split=split, prelude=b"{}" if split else None)
    starts = sorted(written.positions.values())
    ranges = {}
    for parent, prefix in [(root, b""), (root.children[1], b"inner/")]:
        for node in parent.children:
            start = written.positions[node]
            if node.is_directory or node is parent.children[-1]:
                continue
            ranges[prefix + node.name] = range(start, min(at for at in starts if at > start))
    whole = {path: fields[:-1] for path, fields in expected(root).items()}
    return Made(written, write_catalog({NAME.encode(): root}), whole, ranges)


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("split", [False, True], ids=["version 1", "version 2"])
def test_every_bit_of_an_archive(split: bool) -> None:
    subject = made(split)
    assert read(subject.open()) == subject.whole
    for bit in range(8 * len(subject.written.main)):
        found: Shown = {}
        with suppress(DamageError):
            found = read(subject.open(flipped(subject.written.main, bit)))
        for path in subject.unhurt(bit // 8):
            assert found.get(path) == subject.whole[path], (bit, path)


@pytest.mark.parametrize("split", [False, True], ids=["version 1", "version 2"])
def test_every_length_of_an_archive(split: bool) -> None:
    subject = made(split)
    for length in range(len(subject.written.main)):
        try:
            found = read(subject.open(subject.written.main[:length]))
        except DamageError:
            continue
        assert found.keys() <= {b""}, "without its end, a directory has no table"


def test_every_bit_and_every_length_of_a_payload_stream() -> None:
    subject = made(True)
    payload = subject.written.payload
    assert payload is not None
    changes = [flipped(payload, bit) for bit in range(8 * len(payload))]
    changes += [payload[:length] for length in range(len(payload))]
    for changed in changes:
        found = read(Archive(Memory(subject.written.main), Memory(changed)))
        wrong = {path for path, fields in subject.whole.items() if found.get(path) != fields}
        # Of the content itself, chunks have checksums; it is not the archive's to check.
        assert len(wrong - {b"zz"}) <= 1 or len(changed) < len(payload)


def test_every_bit_and_every_length_of_a_catalog() -> None:
    subject = made(False)
    changes = [flipped(subject.catalog, bit) for bit in range(8 * len(subject.catalog))]
    changes += [subject.catalog[:length] for length in range(len(subject.catalog))]
    for changed in changes:
        archive = subject.open(catalog=changed)
        assert read(archive) == subject.whole, "the archive is right, whatever the catalog says"


def test_random_changes_of_a_larger_archive() -> None:
    source = random.Random(1)
    for split in (False, True):
        written = write(some(), split=split)
        for _ in range(3000):
            changed = bytearray(written.main)
            for _ in range(source.randrange(1, 6)):
                changed[source.randrange(len(changed))] = source.choice([0, 1, 255, source.randrange(256)])
            try:
                archive = Archive(
                    Memory(bytes(changed)), Memory(written.payload) if written.payload is not None else None
                )
                read(archive)
            except DamageError:
                continue


# --- what costs much


class Zeros:
    """A stream of zeros, but for what is given: as large as a sparse one may be."""

    def __init__(self, size: int, parts: dict[int, bytes]) -> None:
        self.size = size
        self.parts = parts
        self.read = 0

    def pread(self, offset: int, size: int) -> bytes:
        self.read += size
        data = bytearray(size)
        for start, part in self.parts.items():
            for place in range(max(start, offset), min(start + len(part), offset + size)):
                data[place - offset] = part[place - start]
        return bytes(data)

    def prefetch(self, ranges: object) -> None:
        pass


ROOT = item(pxar.ENTRY, struct.pack("<QQIIqII", stat.S_IFDIR | 0o755, 0, 0, 0, 0, 0, 0)) + item(pxar.GOODBYE)


@pytest.mark.parametrize("rows", [1 << 16, 1 << 20, 1 << 30])
def test_a_table_of_zeros_in_an_endless_archive(rows: int) -> None:
    table = 16 + 24 * (rows + 1)
    size = 100 + table
    tail = struct.pack("<QQQ", pxar.GOODBYE_TAIL, 100, table)
    stream = Zeros(size, {0: ROOT, 100: struct.pack("<QQ", pxar.GOODBYE, table), size - 24: tail})
    archive = Archive(stream)
    if rows > 1 << 22:
        with pytest.raises(DamageError, match="more than"):
            archive.children(archive.root)
        assert stream.read < 1 << 20
        return
    tracemalloc.start()
    try:
        found = Archive(stream).children(archive.root)
        _now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.entries == []
    assert found.damage is not None
    assert most < 4 * table + (1 << 20)


def test_memory_stays_near_what_is_shown() -> None:
    """Of entries that claim much: attributes, names, tables."""
    claims = [struct.pack("<QQ", kind, 1 << 40) for kind in (pxar.XATTR, pxar.FILENAME, pxar.GOODBYE)]
    subject = made(True)
    tracemalloc.start()
    try:
        for claim in claims:
            for at in range(0, len(subject.written.main) - 16, 8):
                changed = subject.written.main[:at] + claim + subject.written.main[at + 16 :]
                try:
                    read(subject.open(changed))
                except DamageError:
                    continue
        _now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 << 20


def test_a_catalog_whose_tables_overlap() -> None:
    """Each table holds all tables before it, twice: whoever followed them all would never end."""
    raw = bytearray(MAGIC)
    starts: list[int] = []
    for _ in range(200):
        here = len(raw)
        rows = b"".join(
            b"d" + b"\x02" + struct.pack("<H", 0x2121 + n) + varint(here - at) for n, at in enumerate(starts)
        )
        count = varint(len(starts))
        raw += varint(len(rows) + len(count)) + count + rows
        starts.append(here)
    here = len(raw)
    name = NAME.encode()
    rows = b"d" + varint(len(name)) + name + varint(here - starts[-1])
    raw += varint(len(rows) + 1) + b"\1" + rows + struct.pack("<Q", here)
    main = write(small(), split=False).main
    archive = Archive(Memory(main), catalog=Memory(bytes(raw)), name=NAME)
    first = archive.child(archive.root, b"first")
    assert first is not None
    assert archive.link_count(first) == 1
    assert Hints(Memory(bytes(raw)), name).with_hard_links() == set()
    assert archive.children(archive.root, names_only=True).entries[0].name == b"first"


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])
