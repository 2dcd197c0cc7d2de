"""The log of XFS: where it begins and ends, torn records, versions, and the changes of inodes in it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Disk
from pbsfs.disks.xfs.inode_item import InodeItem, converted
from pbsfs.disks.xfs.log import BLOCK, Log
from pbsfs.disks.xfs.transactions import Transaction, committed
from tests.disks.xfs_logs import (
    COMMIT,
    CONTINUED,
    CONTINUES,
    COUNT,
    START,
    UNMOUNT,
    UUID,
    Part,
    Written,
    item,
    parts,
)
from tests.support.disks import MemoryDisk


def lsns(found: Sequence[Transaction]) -> list[int]:
    return [transaction.lsn for transaction in found]


def test_a_log_that_was_never_written_to_is_clean() -> None:
    written = Written()
    written.data[:] = bytes(len(written.data))
    assert written.log().is_clean


def test_a_log_that_ends_with_an_unmount_record_is_clean() -> None:
    written = Written()
    written.add(parts(1, item(b"one")), tail=written.lsn)
    written.add([(2, UNMOUNT, b"Un" + bytes(6))], tail=written.lsn)
    assert written.log().is_clean
    assert written.texts() == []


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("at", "cycle"), [(0, 1), (0, 7), (200, 7), (4500, 2), (COUNT - 12, 3), (COUNT - 30, 3), (COUNT - 5, 1)]
)
def test_transactions_are_found_wherever_the_log_begins(
    at: int, cycle: int, version: int, checksums: bool
) -> None:
    written = Written(at=at, cycle=cycle, version=version, checksums=checksums)
    written.add(parts(9, item(b"before the tail")), tail=written.lsn)
    tail = written.lsn
    for number in range(6):
        written.add(parts(number, item(b"%d" % number * 400), item(b"a")), tail=tail)
    assert written.texts() == [text for number in range(6) for text in (b"%d" % number * 400, b"a")]


def test_data_longer_than_one_header_and_padding_are_read() -> None:
    text = bytes(range(256)) * 700
    tail = 4 << 32 | COUNT - 300
    written = Written(at=COUNT - 300, cycle=4)
    written.add(parts(1, item(text)), tail=tail, size=256 << 10, pad=192 << 10)
    written.add(parts(2, item(b"after")), tail=tail, size=256 << 10, pad=64 << 10)
    assert written.texts() == [text, b"after"]


def test_a_transaction_over_several_records_is_joined_and_has_the_first_ones_lsn() -> None:
    written = Written(at=50, cycle=2)
    tail = written.lsn
    first: list[Part] = [(1, START, b""), (1, 0, b"NART" + bytes(12)), (1, CONTINUES, item(b"be"))]
    written.add(first, tail=tail)
    written.add([(1, CONTINUED, b"gin"), (1, 0, item(b"next")), (1, COMMIT, b"")], tail=tail)
    assert written.texts() == [b"begin", b"next"]
    assert lsns(list(committed(written.log()))) == [tail]


def test_what_was_not_committed_and_what_began_before_the_tail_is_left_out() -> None:
    written = Written(at=50, cycle=2)
    tail = written.lsn
    written.add(parts(5, item(b"began before"), lead=False), tail=tail)
    written.add(parts(6, item(b"whole")), tail=tail)
    written.add(parts(7, item(b"open"))[:-1], tail=tail)
    assert written.texts() == [b"whole"]


@pytest.mark.parametrize("missing", [1, 4, 7])
def test_a_record_whose_last_blocks_were_not_written_is_left_out(missing: int) -> None:
    written = Written(at=50, cycle=2)
    tail = written.lsn
    written.add(parts(1, item(b"whole")), tail=tail)
    written.add(parts(2, item(b"torn" * 1000)), tail=tail)
    for block in range(written.at - missing, written.at):
        written.data[block * BLOCK : block * BLOCK + 4] = (1).to_bytes(4, "big")
    assert written.texts() == [b"whole"]


def test_records_after_one_that_was_not_written_are_left_out() -> None:
    written = Written(at=50, cycle=2)
    tail = written.lsn
    written.add(parts(1, item(b"whole")), tail=tail)
    hole = written.add(parts(2, item(b"hole")), tail=tail)
    written.add(parts(3, item(b"after")), tail=tail)
    written.data[hole * BLOCK : hole * BLOCK + 4] = (1).to_bytes(4, "big")
    written.data[hole * BLOCK + BLOCK : hole * BLOCK + BLOCK + 4] = (1).to_bytes(4, "big")
    assert written.texts() == [b"whole"]


@pytest.mark.parametrize(("records", "is_replayed"), [(3, True), (8, True), (9, False), (20, False)])
def test_a_wrong_checksum_is_the_end_only_where_writes_may_be_unfinished(
    records: int, is_replayed: bool
) -> None:
    written = Written(at=4500, cycle=2)
    tail = written.lsn
    written.add(parts(1, item(b"whole")), tail=tail)
    torn = written.add(parts(2, item(b"torn")), tail=tail)
    for number in range(1, records):
        written.add(parts(2 + number, item(b"after")), tail=tail)
    written.data[(torn + 1) * BLOCK + 40] ^= 1
    if is_replayed:
        assert written.texts() == [b"whole"]
    else:
        with pytest.raises(DamageError, match=f"the record at block {torn} has a wrong checksum"):
            written.log()


def test_a_tail_that_unfinished_writes_went_over_moves() -> None:
    written = Written(at=100, cycle=2)
    tail = written.lsn
    overwritten = written.add(parts(1, item(b"overwritten")), tail=tail)
    while written.at < COUNT - 700:
        written.add(parts(2, item(b"t" * 30000)), tail=tail)
    written.add(parts(3, item(b"t" * (COUNT - written.at - 2) * 500)), tail=tail, size=512 << 10)
    while written.cycle < 3 or written.at < 40:
        written.add(parts(4, item(b"last" * 100)), tail=tail)
    assert written.texts()[0] == b"overwritten"
    written.data[(overwritten + 1) * BLOCK + 30] ^= 1
    assert written.texts()[0] == b"t" * 30000
    assert written.texts()[-1] == b"last" * 100


@pytest.mark.parametrize("offset", [8, 12, 40, 300, 310, 320])
def test_a_record_that_is_wrong_in_the_middle_is_damage(offset: int) -> None:
    written = Written(at=4500, cycle=2)
    tail = written.lsn
    written.add(parts(1, item(b"whole")), tail=tail)
    wrong = written.add(parts(2, item(b"wrong")), tail=tail)
    for number in range(20):
        written.add(parts(3 + number, item(b"after")), tail=tail)
    written.data[wrong * BLOCK + offset : wrong * BLOCK + offset + 4] = b"\xff\xee\xdd\xcc"
    with pytest.raises(DamageError):
        written.log()


@pytest.mark.parametrize("blocks", [0, 3, (2 << 30) // BLOCK + 1])
def test_a_log_of_a_wrong_size_is_damage(blocks: int) -> None:
    class Large(MemoryDisk):
        size = blocks * BLOCK

    with pytest.raises(DamageError, match="it has a wrong size"):
        Log(Disk(Large(b"")), uuid=UUID, is_v2=True, has_checksums=True)


# --- changes of inodes


def core(*, version: int, flush: int = 0, flags2: int = 0) -> bytearray:
    """An inode in the log: a link of 10 bytes, owner 5."""
    made = bytearray(176 if version == 3 else 96)
    struct.pack_into("<2sHBBHIII", made, 0, b"NI", 0o120777, version, 1, 0, 5, 6, 1)
    struct.pack_into("<H", made, 30, flush)
    struct.pack_into("<iI", made, 40, -7, 9)
    struct.pack_into("<QQIIHBBIHHI", made, 56, 10, 0, 0, 0, 0, 0, 2, 0, 0, 0, 77)
    if version == 3:
        struct.pack_into("<Q", made, 120, flags2)
        made[160:176] = UUID
    return made


def change(fields: int, *regions: bytes | bytearray, packed: bool = False) -> InodeItem:
    form = "<HHIHHQ16sQII" if packed else "<HHIHH4xQ16sQII"
    head = struct.pack(
        form, 0x123B, 1 + len(regions), fields, 0, 0, 133, b"\x12\x34\x56\x78" + bytes(12), 64, 32, 0
    )
    return InodeItem.of([head, *map(bytes, regions)])


@pytest.mark.parametrize("packed", [True, False])
def test_both_forms_of_an_inodes_change_are_read(packed: bool) -> None:
    found = change(1, core(version=2), packed=packed)
    assert (found.number, found.block, found.length, found.offset) == (133, 64, 32, 0)
    assert found.device == b"\x12\x34\x56\x78"


@pytest.mark.parametrize(("version", "start", "size"), [(2, 100, 256), (3, 176, 512)])
def test_an_inode_is_in_the_order_of_bytes_of_the_disk(version: int, start: int, size: int) -> None:
    found = converted(
        change(3, core(version=version), b"target-ten"), bytes(size), 99, has_checksums=version == 3
    )
    assert found is not None
    assert found[:4] == b"IN\xa1\xff"
    assert struct.unpack_from(">III", found, 8) == (5, 6, 1)
    assert struct.unpack_from(">iI", found, 40) == (-7, 9)
    assert struct.unpack_from(">Q", found, 56) == (10,)
    assert found[start : start + 10] == b"target-ten"
    if version == 3:
        assert struct.unpack_from(">Q", found, 112) == (99,)
        assert struct.unpack_from(">Q", found, 152) == (133,)


def test_large_times_and_counts_are_kept_as_one_number() -> None:
    made = core(version=3, flags2=8 | 16)
    struct.pack_into("<Q", made, 24, 1 << 40 | 3)
    struct.pack_into("<Q", made, 40, 1 << 50 | 5)
    struct.pack_into("<IH", made, 76, 1 << 20, 0)
    found = converted(change(1, made), bytes(512), 99, has_checksums=True)
    assert found is not None
    assert struct.unpack_from(">Q", found, 24) == (1 << 40 | 3,)
    assert struct.unpack_from(">Q", found, 40) == (1 << 50 | 5,)
    assert struct.unpack_from(">I", found, 76) == (1 << 20,)


def test_a_device_number_is_swapped() -> None:
    found = converted(change(0x11, core(version=3)), bytes(512), 99, has_checksums=True)
    assert found is not None
    assert found[176:180] == b"\x78\x56\x34\x12"


@pytest.mark.parametrize(
    ("stored", "is_older"), [(98, False), (99, False), (100, True), ((1 << 64) - 1, False)]
)
def test_a_newer_inode_on_the_disk_stays(stored: int, is_older: bool) -> None:
    on_disk = bytearray(512)
    on_disk[4] = 3
    on_disk[112:120] = stored.to_bytes(8, "big")
    found = converted(change(1, core(version=3)), bytes(on_disk), 99, has_checksums=True)
    assert (found is None) is is_older


@pytest.mark.parametrize(
    ("stored", "logged", "is_older"), [(3, 4, False), (4, 4, False), (5, 4, True), (0xFFFF, 2, False)]
)
def test_an_old_inode_that_was_written_more_often_stays(stored: int, logged: int, is_older: bool) -> None:
    on_disk = bytearray(256)
    on_disk[30:32] = stored.to_bytes(2, "big")
    found = converted(change(1, core(version=2, flush=logged)), bytes(on_disk), 99, has_checksums=False)
    assert (found is None) is is_older


@pytest.mark.parametrize(("version", "head", "start", "size"), [(2, 24, 100, 256), (3, 72, 176, 512)])
def test_the_root_of_a_tree_of_extents_is_packed(version: int, head: int, start: int, size: int) -> None:
    many = 7
    root = bytearray(head + 16 * many)
    struct.pack_into(">HH", root, 4, 1, 2)
    struct.pack_into(">QQ", root, head, 11, 12)
    struct.pack_into(">QQ", root, head + 8 * many, 21, 22)
    found = converted(change(9, core(version=version), root), bytes(size), 99, has_checksums=version == 3)
    assert found is not None
    fit = (size - start - 4) // 16
    assert struct.unpack_from(">HHQQ", found, start) == (1, 2, 11, 12)
    assert struct.unpack_from(">QQ", found, start + 4 + 8 * fit) == (21, 22)


def test_forks_that_do_not_fit_are_damage() -> None:
    for wrong in (change(3, core(version=3), b"x" * 337), change(9, core(version=3), b"x" * 80)):
        with pytest.raises(DamageError):
            converted(wrong, bytes(512), 99, has_checksums=True)
