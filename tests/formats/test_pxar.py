"""The pxar format: bytes that are known, and bytes that are wrong."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.formats import pxar
from pbsfs.formats.pxar import ShortError
from pbsfs.testing.archives import Node, item, write

REFERENCE_KEY = struct.unpack("<QQ", bytes(range(16)))
"""The key of the vectors of SipHash's authors."""

VECTORS = {
    0: 0x726FDB47DD0E0E31,
    1: 0x74F839C593DC67FD,
    7: 0xAB0200F58B01D137,
    8: 0x93F5F5799A932462,
    15: 0xA129CA6149BE45E5,
    63: 0x958A324CEB064572,
}
"""Of the bytes 0, 1, 2 …, by their count."""

STAT = struct.pack("<QQIIqII", stat.S_IFREG | 0o644, 0, 1000, 100, -1, 999_999_999, 0)
ENTRY = item(pxar.FILENAME, b"name\0") + item(pxar.ENTRY, STAT)


@pytest.mark.parametrize("length", VECTORS)
def test_names_are_hashed_by_siphash_2_4(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pxar, "NAME_KEYS", REFERENCE_KEY)
    assert pxar.hash_name(bytes(range(length))) == VECTORS[length]


def test_a_device_number_is_the_one_that_stat_returns() -> None:
    for major, minor in [(0, 0), (1, 3), (259, 300_000), (4095, 1_048_575)]:
        assert pxar.device_number(major, minor) == os.makedev(major, minor)
    for major, minor in [(1 << 12, 0), (0, 1 << 20), (1 << 32, 0), (0, 1 << 32)]:  # none that Linux has
        with pytest.raises(DamageError):
            pxar.device_number(major, minor)


def test_an_entry_of_known_bytes() -> None:
    data = bytes.fromhex(
        "b317390621117016 1600000000000000 612e747874 00"  # FILENAME a.txt
        "efac88e5746495d5 3800000000000000"  # ENTRY
        "a481000000000000 0000000000000000 e8030000 64000000"  # mode, flags, uid, gid
        "00f1536500000000 15cd5b07 00000000"  # 1700000000.123456789
        "251a7c0b1b7a1428 1300000000000000 616263"  # PAYLOAD abc
    )
    parsed = pxar.parse_entry(b"??" + data, 2, 1000, split=False)
    assert parsed == (
        *(b"a.txt", stat.S_IFREG | 0o644, 1000, 100, 1_700_000_000_123_456_789, 3),
        *(0, None, False, 1000 + len(data) + 2),
    )


def test_a_time_before_the_epoch() -> None:
    parsed = pxar.parse_entry(ENTRY + item(pxar.PAYLOAD), 0, 0, split=False)
    assert parsed.mtime_ns == -1


@pytest.mark.parametrize("split", [False, True])
def test_a_window_that_is_too_short_says_so_at_every_length(split: bool) -> None:
    ending = item(pxar.PAYLOAD_REF, struct.pack("<QQ", 16, 3)) if split else item(pxar.PAYLOAD, b"abc")
    data = ENTRY + item(pxar.XATTR, b"user.a\0b") + ending
    needed = len(data) if split else len(data) - 3  # the content itself is not needed
    for length in range(needed):
        with pytest.raises(ShortError) as caught:
            pxar.parse_entry(data[:length], 0, 0, split=split)
        assert length < caught.value.needed <= needed
    assert pxar.parse_entry(data[:needed], 0, 0, split=split).has_xattrs


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        (stat.S_IFREG, item(pxar.GOODBYE)),
        (stat.S_IFREG, item(pxar.PAYLOAD_REF, bytes(16))),
        (stat.S_IFDIR, item(pxar.PAYLOAD)),
        (stat.S_IFLNK, item(pxar.PAYLOAD)),
        (stat.S_IFLNK, item(pxar.SYMLINK, b"\0")),
        (stat.S_IFLNK, item(pxar.SYMLINK, b"no end")),
        (stat.S_IFLNK, item(pxar.SYMLINK, b"a\0b\0")),
        (stat.S_IFLNK, item(pxar.SYMLINK, b"a" * 4097 + b"\0")),
        (stat.S_IFBLK, item(pxar.DEVICE, bytes(8))),
        (stat.S_IFCHR, item(pxar.DEVICE, struct.pack("<QQ", 1 << 40, 0))),
        (stat.S_IFIFO, item(pxar.PAYLOAD)),
        (stat.S_IFSOCK, item(pxar.DEVICE, bytes(16))),
        (0, item(pxar.PAYLOAD)),
        (1 << 63 | stat.S_IFREG, item(pxar.PAYLOAD)),
        (0o20000 | stat.S_IFREG | 0o4000000, item(pxar.PAYLOAD)),
    ],
)
def test_a_type_with_the_wrong_ending_is_damage(mode: int, ending: bytes) -> None:
    raw = item(pxar.ENTRY, struct.pack("<Q", mode) + STAT[8:])
    with pytest.raises(DamageError):
        pxar.parse_entry(item(pxar.FILENAME, b"a\0") + raw + ending, 0, 0, split=False)


@pytest.mark.parametrize("mode", [stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK])
def test_what_ends_with_the_next_entry_is_there_though_that_is_damaged(mode: int) -> None:
    raw = item(pxar.FILENAME, b"a\0") + item(pxar.ENTRY, struct.pack("<Q", mode) + STAT[8:])
    parsed = pxar.parse_entry(raw + item(0x1234), 0, 0, split=False)
    assert parsed.end == len(raw)
    assert parsed.has_xattrs, "it may have some, which an unknown item hides"
    with pytest.raises(DamageError, match="unknown type"):
        pxar.parse_xattrs(raw + item(0x1234), 0, named=True)


def test_a_time_with_too_many_nanoseconds_is_damage() -> None:
    raw = STAT[:32] + struct.pack("<I", 1_000_000_000) + STAT[36:]
    with pytest.raises(DamageError, match="nanoseconds"):
        pxar.parse_entry(
            item(pxar.FILENAME, b"a\0") + item(pxar.ENTRY, raw) + item(pxar.PAYLOAD), 0, 0, split=False
        )


# --- access control lists, as proxmox-backup's pbs-client/src/pxar/metadata.rs sets them

NOBODY = 0xFFFFFFFF
ALL = (1 << 64) - 1


def acls(mode: int, *items: bytes) -> dict[bytes, list[tuple[int, int, int]]]:
    """The entries (tag, permissions, id) of the lists that `items` make."""
    raw = item(pxar.ENTRY, struct.pack("<Q", stat.S_IFDIR | mode) + STAT[8:]) + b"".join(items)
    found = pxar.parse_xattrs(raw + item(pxar.GOODBYE), 0, named=False)
    assert all(value[:4] == b"\2\0\0\0" for value in found.values())
    return {name: list(struct.iter_unpack("<HHI", value[4:])) for name, value in found.items()}


def numbers(kind: int, *values: int) -> bytes:
    return item(kind, struct.pack(f"<{len(values)}Q", *values))


def test_an_access_list_takes_owner_and_others_from_the_mode_and_the_mask_from_its_group() -> None:
    found = acls(
        0o751,
        numbers(pxar.ACL_USER, 2000, 6),
        numbers(pxar.ACL_USER, 1000, 4),
        numbers(pxar.ACL_GROUP, 50, 1),
        numbers(pxar.ACL_GROUP_OBJ, 2),
    )
    assert found == {
        b"system.posix_acl_access": [
            *((1, 7, NOBODY), (2, 4, 1000), (2, 6, 2000), (4, 2, NOBODY), (8, 1, 50)),
            *((16, 5, NOBODY), (32, 1, NOBODY)),
        ]
    }


def test_an_access_list_without_a_group_takes_that_from_the_mode() -> None:
    assert acls(0o640, numbers(pxar.ACL_USER, 7, 6)) == {
        b"system.posix_acl_access": [
            *((1, 6, NOBODY), (2, 6, 7), (4, 4, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY))
        ]
    }


def test_a_default_list_has_its_own_permissions_and_a_mask_if_it_is_set() -> None:
    assert acls(0o700, numbers(pxar.ACL_DEFAULT, 7, 5, 1, ALL)) == {
        b"system.posix_acl_default": [(1, 7, NOBODY), (4, 5, NOBODY), (32, 1, NOBODY)]
    }
    assert acls(
        0o700,
        numbers(pxar.ACL_DEFAULT, 7, 5, 1, 6),
        numbers(pxar.ACL_DEFAULT_USER, 8, 3),
        numbers(pxar.ACL_DEFAULT_GROUP, 9, 2),
    ) == {
        b"system.posix_acl_default": [
            *((1, 7, NOBODY), (2, 3, 8), (4, 5, NOBODY), (8, 2, 9), (16, 6, NOBODY), (32, 1, NOBODY))
        ]
    }


def test_without_items_there_are_no_lists() -> None:
    assert acls(0o755, numbers(pxar.QUOTA_PROJID, 1)) == {}
    assert acls(0o755, numbers(pxar.ACL_DEFAULT_USER, 8, 3)) == {}


def test_a_tail_is_checked() -> None:
    assert pxar.parse_tail(struct.pack("<QQQ", pxar.GOODBYE_TAIL, 100, 40)) == (100, 40)
    for mark, size in [
        (pxar.GOODBYE, 40),
        (pxar.GOODBYE_TAIL, 39),
        (pxar.GOODBYE_TAIL, 16),
        (pxar.GOODBYE_TAIL, 0),
    ]:
        with pytest.raises(DamageError):
            pxar.parse_tail(struct.pack("<QQQ", mark, 100, size))


@pytest.mark.parametrize("backwards", [False, True])
def test_zeros_written_as_holes_are_the_same_bytes(tmp_path: Path, *, backwards: bool) -> None:
    def tree(data: bytes, zeros: int) -> Node:
        sparse = Node(b"a", stat.S_IFREG | 0o644, data=data, zeros=zeros)
        return Node(children=[sparse, Node(b"b", stat.S_IFREG | 0o644, data=b"behind")])

    expected = write(tree(b"start" + bytes(100_000), 0), split=True, backwards=backwards)
    with (tmp_path / "payload").open("wb") as file:
        found = write(tree(b"start", 100_000), split=True, backwards=backwards, payload_to=file)
    assert (found.main, found.payload) == (expected.main, None)
    assert (tmp_path / "payload").read_bytes() == expected.payload
    assert (
        write(tree(b"start", 100_000), split=False).main
        == write(tree(b"start" + bytes(100_000), 0), split=False).main
    )
