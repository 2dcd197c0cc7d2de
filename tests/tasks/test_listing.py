"""Rows of listings: attributes as text, and what is listed when a part can't be read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tasks.attributes import time_text
from pbsfs.tasks.listing import WIDTHS, Lister, Row, line_of
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Stat, Tree
from tests.support import made

SECOND = 1_000_000_000
PLAIN = stat.S_IFREG | 0o644
FILE = Stat(7, 5, stat.S_IFREG | 0o4750, SECOND, 1000, 100, nlink=2)


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_700_000_000 * SECOND + 5, "2023-11-14T22:13:20.000000005Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (-62135596800 * SECOND, "0001-01-01T00:00:00Z"),
        (-62135596801 * SECOND, "@-62135596801"),
        (253402300799 * SECOND, "9999-12-31T23:59:59Z"),
        (253402300800 * SECOND, "@253402300800"),
        (((1 << 63) - 1) * SECOND, f"@{(1 << 63) - 1}"),
        (-(1 << 63) * SECOND, f"@{-(1 << 63)}"),
    ],
)
def test_every_time_that_an_archive_may_have_is_shown(time_ns: int, text: str) -> None:
    assert time_text(time_ns) == text


def test_a_listing_may_leave_out_the_fraction_of_a_time() -> None:
    assert time_text(-1, whole_seconds=True) == "1969-12-31T23:59:59Z"


def line(name: bytes, stat: Stat, target: bytes | None = None) -> list[str]:
    return line_of(Row(name, b"x/" + name, stat, target, stored=True).as_cells(), WIDTHS).split()


def test_a_line_is_that_of_ls() -> None:
    assert line(b"a", FILE) == ["-rwsr-x---", "1000", "100", "7", "5", "1970-01-01T00:00:01Z", "a"]
    link = Stat(3, 3, stat.S_IFLNK | 0o777, -SECOND, 0, 0, target=b"b/c")
    assert line(b"l", link, b"b/c")[5:] == ["1969-12-31T23:59:59Z", "l", "->", "b/c"]
    device = Stat(0, 0, stat.S_IFBLK | 0o660, 0, 0, 6, rdev=os.makedev(8, 17))
    assert line(b"sda", device) == ["brw-rw----", "0", "6", "8,17", "-", "1970-01-01T00:00:00Z", "sda"]
    assert line(b"d", Stat(mode=stat.S_IFDIR | 0o1777, uid=0, gid=0))[0] == "drwxrwxrwt"


def test_what_cannot_be_read_of_an_archive_is_not_made_up() -> None:
    unknown = Stat(7, 7, stat.S_IFREG | 0o444, SECOND, exact=False)
    assert line(b"a", unknown)[:3] == ["-?????????", "-", "-"]
    row = Row(b"a", b"x/a", unknown, stored=True).as_json()
    assert not {"mode", "uid", "gid", "links", "mtime_ns"} & set(row)


def test_a_row_for_programs_has_what_is_known() -> None:
    assert Row(b"a", b"x/a", FILE, stored=True).as_json() == {
        "name": "a",
        "path": "x/a",
        "type": "file",
        "size": 7,
        "data_size": 5,
        "time": "1970-01-01T00:00:01Z",
        "mode": "4750",
        "uid": 1000,
        "gid": 100,
        "links": 2,
        "mtime_ns": SECOND,
    }
    assert Row(b"a", b"x/a", FILE).as_json().keys() == {
        "name",
        "path",
        "type",
        "size",
        "data_size",
        "time",
    }


def test_what_is_in_an_archive_is_listed_by_name(tmp_path: Path) -> None:
    """Disks and other clients store names in any order."""
    below = Node(b"m", children=[Node(b"2", PLAIN), Node(b"1", PLAIN)])
    root = Node(b"", children=[Node(b"z", PLAIN), below, Node(b"a", PLAIN)])
    writer = DatastoreWriter(tmp_path / "store")
    writer.add_snapshot(made.snapshot(type="host"), {"root.pxar.didx": write(root, split=False).main})
    listed: list[bytes] = []
    failed: list[PbsfsError] = []

    async def main() -> None:
        async with open_reader(DirectorySource(writer.path)) as reader:
            node = await Tree(reader, files=True).find("files/host/100/latest/root")
            await Lister(lambda row: listed.append(row.name), failed.append, recursive=True).list(node)

    trio.run(main)  # threads on a true clock
    assert (listed, failed) == ([b"a", b"m", b"m/1", b"m/2", b"z"], [])
