"""Catalogs: bytes that are known, what was written, and bytes that are wrong."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError
from pbsfs.formats.catalog import MAGIC, Catalog, CatalogEntry
from pbsfs.testing.archives import Node, write_catalog


def catalog(raw: bytes) -> Catalog:
    return Catalog(lambda offset, size: raw[offset : offset + size], len(raw))


def with_table(table: bytes) -> Catalog:
    """A catalog whose root's table is `table`, with its length in front; it starts at 8."""
    return catalog(MAGIC + table + (8).to_bytes(8, "little"))


def test_a_catalog_of_known_bytes() -> None:
    raw = MAGIC + bytes.fromhex(
        "0b 02"  # 11 bytes, two entries
        "66 01 61 8001 8100"  # file a, 128 bytes, 1 second before the epoch
        "68 01 62"  # hard link b
    )
    start = len(raw)
    raw += bytes.fromhex("05 01 64 01 63") + bytes([start - 8]) + start.to_bytes(8, "little")
    found = catalog(raw)
    assert found.root == start
    assert found.table(start) == [CatalogEntry(ord("d"), b"c", 0, 0, 8)]
    assert found.table(8) == [
        CatalogEntry(ord("f"), b"a", 128, -1, 0),
        CatalogEntry(ord("h"), b"b", 0, 0, 0),
    ]


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, (1 << 20)))
def test_numbers_are_read_as_they_were_written(seconds: int, size: int) -> None:
    node = Node(b"f", stat.S_IFREG, data=Sized(size), mtime_ns=seconds * 10**9)
    found = catalog(write_catalog({b"root": Node(children=[node])}))
    ((_type, name, _size, _mtime, block),) = found.table(found.root)
    assert name == b"root"
    assert found.table(block) == [CatalogEntry(ord("f"), b"f", size, seconds, 0)]


class Sized(bytes):
    """Data of which the size alone counts."""

    def __new__(cls, size: int) -> Sized:
        made = super().__new__(cls)
        made.size = size
        return made

    size: int

    def __len__(self) -> int:
        return self.size


def test_a_table_larger_than_the_first_read() -> None:
    nodes = [Node(b"%05d" % n, stat.S_IFREG) for n in range(20_000)]
    found = catalog(write_catalog({b"root": Node(children=nodes)}))
    (root,) = found.table(found.root)
    assert [entry.name for entry in found.table(root.block)] == [node.name for node in nodes]


@pytest.mark.parametrize(
    "table",
    [
        "",
        "00",
        "80",
        "ffffffffffffffffffff01",
        "ffffffffffffffffff7f00",
        "05 01 70 01 61",  # longer than the catalog
        "04 02 70 01 61",  # two entries, of which one is missing
        "05 01 70 01 61 00",  # a byte more
        "04 01 78 01 61",  # unknown type
        "04 01 70 00 61",  # no name
        "04 01 70 7f 61",
        "05 01 64 01 61 00",  # a directory that holds itself
        "05 01 64 01 61 01",  # before the first table
        "05 01 64 01 61 7f",
        "04 01 64 01 61",
        "04 01 66 01 61",
        "05 01 66 01 61 01",
        "0f 01 66 01 61 01 ffffffffffffffffffff00",
        "0f 01 66 01 61 01 ffffffffffffffffffff01",
        "0a ff ff ff ff ff ff ff ff ff 01",
    ],
)
def test_a_table_that_is_wrong_is_damage(table: str) -> None:
    with pytest.raises(DamageError):
        with_table(bytes.fromhex(table)).table(8)


def test_a_table_has_to_be_in_the_catalog() -> None:
    found = with_table(bytes.fromhex("01 00"))
    assert found.table(8) == []
    for block in (0, 7, 10, 1 << 63):
        with pytest.raises(DamageError, match="no table"):
            found.table(block)


@pytest.mark.parametrize("raw", [b"", MAGIC, MAGIC + bytes(9), bytes(100)])
def test_what_is_not_a_catalog(raw: bytes) -> None:
    with pytest.raises(DamageError, match="magic"):
        catalog(raw)
