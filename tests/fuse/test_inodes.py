"""Inode numbers: the same for a path for ever, and remembered only as long as the kernel does."""

from __future__ import annotations

from typing import cast

import pytest

from pbsfs.base.errors import NotFoundError
from pbsfs.fuse.inodes import MAX_FORGOTTEN, ROOT, InodeTable
from pbsfs.tree import Node, Nodes, Stat

PATHS = [
    b"vm",
    b"ct",
    b"vm/100",
    b"vm/100/latest",
    b"ns/prod/vm/100",
    b"vm/100/2023-11-14T22:13:20Z/index.json",
    b"vm/\xff/a\nb",
]


class _Place(Node):
    async def stat(self) -> Stat:
        return Stat()


def place(path: bytes) -> _Place:
    return _Place(cast(Nodes, None), None, path)


@pytest.fixture
def table() -> InodeTable:
    return InodeTable(place(b""))


def test_the_root_is_number_1(table: InodeTable) -> None:
    assert table.number(b"") == ROOT == 1
    assert table[1].node.path == b""


def test_the_root_may_be_below_that_of_the_tree() -> None:
    table = InodeTable(place(b"vm/100"))

    assert table.number(b"vm/100") == ROOT
    assert table.number(b"vm/100/latest") != ROOT


def test_a_path_has_the_same_number_in_every_table(table: InodeTable) -> None:
    numbers = [table.remember(place(path), 0) for path in PATHS]
    other = InodeTable(place(b""))
    assert [other.number(path) for path in reversed(PATHS)] == numbers[::-1]
    assert [table.number(path) for path in PATHS] == numbers
    assert len({ROOT, *numbers}) == len(PATHS) + 1


def test_numbers_are_positive_signed_64_bit_and_no_small_ones(table: InodeTable) -> None:
    assert all(16 <= table.number(b"vm/%d" % number) < 2**63 for number in range(5000))


def test_two_paths_never_share_a_number(table: InodeTable) -> None:
    taken = table.number(b"vm/100")
    table._inodes[taken] = table._inodes[ROOT]  # as if another path had the same hash
    moved = table.remember(place(b"vm/100"), 0)
    assert moved != taken
    assert table.number(b"vm/100") == moved
    assert table[taken].node.path == b""


def test_a_number_is_known_until_every_lookup_is_forgotten(table: InodeTable) -> None:
    number = table.remember(place(b"vm"), 0)
    assert table.remember(place(b"vm"), 0) == number
    assert len(table) == 2
    table.forget(number, 1)
    assert table[number].node.path == b"vm"
    table.forget(number, 1)
    assert len(table) == 1
    with pytest.raises(NotFoundError, match=str(number)):
        _ = table[number]


def test_the_root_is_never_forgotten(table: InodeTable) -> None:
    table.forget(ROOT, 1000)
    assert table[ROOT].node.path == b""


def test_forgetting_what_is_not_known_does_no_harm(table: InodeTable) -> None:
    table.forget(999, 1)
    assert len(table) == 1


def test_a_newer_node_of_the_same_path_replaces_the_older(table: InodeTable) -> None:
    older, newer = place(b"vm"), place(b"vm")
    number = table.remember(older, 0)
    table[number].opened = b"checksum"
    assert table.remember(newer, 0) == number
    assert table[number].node is newer
    assert table[number].opened == b"checksum"


def test_the_path_of_a_number_is_known_after_the_kernel_forgot_it(table: InodeTable) -> None:
    number = table.remember(place(b"vm/100"), 0)
    assert (table.path(ROOT), table.path(number)) == (b"", b"vm/100")
    table.forget(number, 1)
    assert table.path(number) == b"vm/100"
    with pytest.raises(NotFoundError, match="12345"):
        table.path(12345)


def test_of_forgotten_paths_the_latest_are_kept_up_to_a_limit(table: InodeTable) -> None:
    numbers = [table.remember(place(b"vm/%d" % number), 0) for number in range(MAX_FORGOTTEN + 2)]
    table.forget(numbers[0], 1)
    table.remember(place(b"vm/0"), 0)
    for number in (*numbers[1:], numbers[0]):  # the first one last
        table.forget(number, 1)
    assert len(table._forgotten) == MAX_FORGOTTEN
    assert table.path(numbers[0]) == b"vm/0"
    assert table.path(numbers[3]) == b"vm/3"
    with pytest.raises(NotFoundError):
        table.path(numbers[1])


def test_the_length_is_the_one_that_was_told_last(table: InodeTable) -> None:
    number = table.remember(place(b"vm"), 5)
    assert table.remember(place(b"vm"), 7) == number
    assert table[number].size == 7
