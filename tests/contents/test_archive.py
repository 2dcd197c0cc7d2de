"""Archives that were made: what was written is read, in both versions, with and without a catalog."""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.contents import items, links
from pbsfs.contents.archive import Archive
from pbsfs.contents.base import Entry
from pbsfs.formats import pxar
from pbsfs.formats.pxar import HEADER, HEADER_SIZE
from pbsfs.testing.archives import Node, Row, item, write, write_catalog
from tests.contents.trees import NAME, content, directory, expected, file, open_tree, shown, some
from tests.support.archives import Memory

both = pytest.mark.parametrize("split", [False, True], ids=["version 1", "version 2"])


# --- what was written is read


@both
@pytest.mark.parametrize("catalog", [False, True], ids=["alone", "with a catalog"])
def test_every_kind_of_entry(split: bool, catalog: bool) -> None:
    assert shown(open_tree(some(), split=split, catalog=catalog)) == expected(some()) | (
        {} if split or catalog else {b"first": expected(some())[b"first"]}
    )


@pytest.mark.parametrize(
    "options",
    [
        {"prelude": b'{"exclude-patterns": "*.log"}'},
        {"prelude": b""},
        {"padding": item(pxar.PAYLOAD, b"stale") + item(pxar.PAYLOAD_START)},
        {"padding": b"half a paylo"},
        {"backwards": True},
        {"old_entries": True},
    ],
    ids=str,
)
def test_forms_of_version_2(options: dict[str, Any]) -> None:
    root = some()
    for node in root.children:
        node.mtime_ns = max(node.mtime_ns, 0)  # ENTRY_V1 has none before the epoch
    assert shown(open_tree(root, split=True, **options)) == expected(root)


def test_entries_as_they_were_written_until_2020() -> None:
    root = directory(b"", file(b"a", b"1", mtime_ns=1_500_000_000_000_000_001), directory(b"d"))
    assert shown(open_tree(root, split=False, old_entries=True)) == expected(root)


names = st.binary(min_size=1, max_size=40).filter(lambda n: not {0, 47} & set(n) and n not in (b".", b".."))
times = st.integers(-(10**18), 4 * 10**18)
targets = st.binary(min_size=1).filter(lambda target: 0 not in target)
numbers = st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1))
plain = st.one_of(
    st.builds(file, names, st.binary(max_size=200), uid=st.integers(0, 2**32 - 1), mtime_ns=times),
    st.builds(
        lambda n, t: Node(n, stat.S_IFLNK | 0o777, target=t),
        names,
        st.binary(min_size=1).filter(lambda t: 0 not in t),
    ),
    st.builds(lambda n, k: Node(n, k | 0o600), names, st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK])),
    st.builds(
        lambda n, d: Node(n, stat.S_IFBLK, device=d),
        names,
        st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    ),
)
trees = st.recursive(
    plain,
    lambda below: st.builds(
        lambda name, nodes: directory(name, *nodes),
        names,
        st.lists(below, max_size=8, unique_by=lambda node: node.name),
    ),
    max_leaves=25,
)


@settings(deadline=None)
@given(st.lists(trees, max_size=6, unique_by=lambda node: node.name))
def test_any_tree_is_read_as_it_was_written(nodes: list[Node]) -> None:
    root = directory(b"", *nodes)
    for split in (False, True):
        archive = open_tree(root, split=split, catalog=not split)
        assert shown(archive) == expected(root)
        for entry in archive.children(archive.root).entries:
            assert archive.child(archive.root, entry.name) == entry


@both
def test_directories_with_more_entries_than_fit_a_window(split: bool) -> None:
    root = directory(b"", *(file(b"%06d" % n, b"x" * (n % 7)) for n in range(9000)))
    archive = open_tree(root, split=split, catalog=True)
    main = archive.streams[0]
    assert isinstance(main, Memory)
    main.reads = 0
    found = archive.children(archive.root)
    assert found.damage is None
    assert [entry.name for entry in found.entries] == [node.name for node in root.children]
    assert main.reads < 20
    for number in (0, 1, 4500, 8999):
        entry = archive.child(archive.root, b"%06d" % number)
        assert entry == found.entries[number]
        assert content(archive, entry) == b"x" * (number % 7)


def test_headers_of_large_files_are_requested_side_by_side() -> None:
    root = directory(b"", *(file(b"%03d" % n, bytes(items.GAP + 1)) for n in range(3 * items.BATCH + 1)))
    archive = open_tree(root, split=False, catalog=True)
    main = archive.streams[0]
    assert isinstance(main, Memory)
    main.requested = 0
    named = archive.children(archive.root, names_only=True)
    assert main.requested == 0
    assert [entry.size for entry in named.entries] == [items.GAP + 1] * len(root.children)
    exact = archive.complete(archive.root, named.entries)
    assert exact == archive.children(archive.root).entries
    assert len(exact) == len(root.children), "no batch loses any"
    assert main.requested == 2 * 3 * items.BATCH, "the last one is alone in its batch"


@both
def test_entries_with_large_attributes(split: bool) -> None:
    large = {b"user.%d" % n: bytes([n]) * 65_000 for n in range(20)}
    root = directory(b"", file(b"a", b"1", xattrs=large), file(b"b", b"2", xattrs={b"user.x": bytes(5000)}))
    assert shown(open_tree(root, split=split)) == expected(root)


def test_several_threads_read_at_once() -> None:
    root = directory(b"", *(directory(b"%d" % n, *some().children) for n in range(20)))
    archive = open_tree(root, split=True)
    goal = shown(archive)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == goal for found in pool.map(lambda _: shown(archive), range(12)))


# --- hard links


def test_hard_links_are_counted_when_a_directory_is_listed() -> None:
    archive = open_tree(some(), split=True)
    assert not archive.knows_link_counts
    archive.children(archive.root, names_only=True)
    assert not archive.knows_link_counts, "who needs names only does not wait for it"
    archive.children(archive.root)
    assert archive.knows_link_counts


def test_what_looks_like_a_hard_link_is_none() -> None:
    root = directory(b"", file(pxar.HARDLINK.to_bytes(8, "little"), b"1"))
    assert shown(open_tree(root, split=True)) == expected(root)


def test_hard_links_are_found_wherever_a_step_of_the_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(20, 60):
        monkeypatch.setattr(links, "STEP", step)
        archive = open_tree(some(), split=True)
        first = archive.child(archive.root, b"first")
        assert first is not None
        assert archive.link_count(first) == 3


def test_hard_links_of_version_1_are_counted_by_the_catalog() -> None:
    archive = open_tree(some(), split=False, catalog=True)
    first = archive.child(archive.root, b"first")
    assert first is not None
    assert not archive.knows_link_counts
    assert archive.link_count(first) == 3
    assert archive.knows_link_counts


def test_damage_elsewhere_does_not_keep_hard_links_from_being_counted() -> None:
    root = some()
    written = write(root, split=True)
    assert written.payload is not None
    stream = Holey(written.main, damaged=written.positions[root.children[1].children[2]])
    archive = Archive(stream, Memory(written.payload))
    first = archive.child(archive.root, b"first")
    assert first is not None
    assert archive.link_count(first) == 3


class Holey(Memory):
    """A stream with a damaged byte."""

    def __init__(self, data: bytes, damaged: int, error: type[Exception] = DamageError) -> None:
        super().__init__(data)
        self.damaged = damaged
        self.error = error

    def pread(self, offset: int, size: int) -> bytes:
        if offset <= self.damaged < offset + size:
            raise self.error("chunk damaged")
        return super().pread(offset, size)


# --- damage costs what it hits


@both
def test_a_damaged_byte_costs_its_entry_alone(split: bool) -> None:
    root = directory(b"", *(file(b"%05d" % n, b"x" * 50) for n in range(6000)))
    written = write(root, split=split)
    hit = written.positions[root.children[3000]] + 20  # in its name
    archive = Archive(
        Holey(written.main, hit), Memory(written.payload) if written.payload is not None else None
    )
    found = archive.children(archive.root)
    assert found.damage is not None
    assert [entry.name for entry in found.entries] == [
        node.name for node in root.children if node.name != b"03000"
    ]
    assert archive.child(archive.root, b"00001") == found.entries[1]
    with pytest.raises(DamageError):
        archive.child(archive.root, b"03000")


def test_a_fault_that_may_pass_is_not_called_damage() -> None:
    written = write(some(), split=True)
    assert written.payload is not None
    stream = Holey(written.main, len(written.main) - 1, SourceError)
    with pytest.raises(SourceError, match="chunk damaged"):
        Archive(stream, Memory(written.payload))


# --- hostile archives


def damage_of(archive: Archive) -> str:
    """What is wrong with the root's entries."""
    damage = archive.children(archive.root).damage
    assert damage is not None
    return str(damage)


def names_of(archive: Archive) -> list[bytes]:
    return [entry.name for entry in archive.children(archive.root).entries]


GOOD = file(b"good", b"!")


@both
@pytest.mark.parametrize("name", [b"", b"a/b", b"/", b"a\0b", b".", b".."])
def test_a_name_that_no_file_can_have_is_damage(split: bool, name: bytes) -> None:
    archive = open_tree(directory(b"", file(name, b"1"), GOOD), split=split)
    assert "a name" in damage_of(archive)
    assert names_of(archive) == [b"good"]


@both
def test_a_name_of_more_than_4096_bytes_is_damage(split: bool) -> None:
    longest = file(b"n" * 4096, b"1")
    archive = open_tree(directory(b"", longest, file(b"n" * 4097, b"1"), GOOD), split=split)
    assert "a name of 4097 bytes" in damage_of(archive)
    assert names_of(archive) == [longest.name, b"good"]


@both
def test_of_two_entries_with_a_name_the_first_is_shown(split: bool) -> None:
    archive = open_tree(directory(b"", file(b"a", b"first"), directory(b"a"), GOOD), split=split)
    assert "the same name" in damage_of(archive)
    assert names_of(archive) == [b"a", b"good"]
    entry = archive.child(archive.root, b"a")
    assert entry is not None
    assert content(archive, entry) == b"first"


@both
def test_a_hard_link_leads_back_to_a_file(split: bool) -> None:
    first = file(b"a", b"1")
    link = Node(b"link", stat.S_IFLNK | 0o777, target=b"a")
    for node, problem in [
        (Node(b"bad", link_to=first, back=0), "does not lie before it"),
        (Node(b"bad", link_to=first, back=1 << 63), "does not lie before it"),
        (Node(b"bad", link_to=first, back=17), "cannot be read"),
        (Node(b"bad", link_to=link), "not a file"),
        (Node(b"bad", link_to=Node(b"d")), "not a file"),
    ]:
        before = [n for n in (first, link) if n is not node.link_to]
        target = node.link_to
        assert target is not None
        archive = open_tree(directory(b"", *before, target, node, GOOD), split=split)
        assert problem in damage_of(archive)
        assert b"good" in names_of(archive)
        assert b"bad" not in names_of(archive)
        with pytest.raises(DamageError, match=problem):
            archive.child(archive.root, b"bad")


@both
def test_a_hard_link_to_a_hard_link_is_damage(split: bool) -> None:
    first = file(b"a", b"1")
    second = Node(b"b", link_to=first)
    archive = open_tree(directory(b"", first, second, Node(b"c", link_to=second), GOOD), split=split)
    assert "a hard link" in damage_of(archive)
    assert names_of(archive) == [b"a", b"b", b"good"]


def test_a_file_has_to_end_within_its_directory() -> None:
    archive = open_tree(directory(b"", GOOD, file(b"a", b"1", claimed_size=10**6)), split=False)
    assert "beyond its directory" in damage_of(archive)
    assert names_of(archive) == [b"good"]


def test_a_file_that_reaches_into_the_next_entry_is_damage() -> None:
    archive = open_tree(directory(b"", file(b"a", b"1", claimed_size=20), GOOD), split=False)
    assert "into the next one" in damage_of(archive)
    assert names_of(archive) == [b"good"]


def test_a_reference_has_to_lead_to_the_payload_of_its_size() -> None:
    bad = [
        file(b"wrong size", b"1", claimed_size=2),
        file(b"no header", b"1", reference=0),
        file(b"in the middle", b"1", reference=17),
    ]
    archive = open_tree(directory(b"", *bad, GOOD), split=True)
    found = archive.children(archive.root)
    assert found.damage is None
    for entry in found.entries[:-1]:
        with pytest.raises(DamageError, match="another file's content"):
            archive.data(entry)
    assert content(archive, found.entries[-1]) == b"!"
    for where in (10**6, (1 << 64) - 1):
        archive = open_tree(directory(b"", file(b"a", b"1", reference=where), GOOD), split=True)
        assert "beyond the payload stream" in damage_of(archive)
        assert names_of(archive) == [b"good"]


def test_the_place_of_a_file_is_confirmed_with_the_streams_of_the_caller() -> None:
    archive = open_tree(directory(b"", file(b"wrong", b"1", claimed_size=2), GOOD), split=True)
    own = archive.streams[1]
    assert isinstance(own, Memory)
    callers = [Memory(b""), Memory(own.data)]
    wrong, good = archive.children(archive.root).entries
    before = own.reads
    with pytest.raises(DamageError, match="another file's content"):
        archive.data_through(wrong, callers)
    pieces = archive.data_through(good, callers)
    assert own.reads == before
    assert callers[1].reads == 2
    assert pieces == archive.data(good)


def test_two_references_may_share_a_payload() -> None:
    archive = open_tree(
        directory(b"", file(b"a", b"same"), file(b"b", b"same", reference=HEADER_SIZE)), split=True
    )
    assert [content(archive, entry) for entry in archive.children(archive.root).entries] == [b"same"] * 2


@both
@pytest.mark.parametrize("kind", [0x1234, pxar.PRELUDE, pxar.PAYLOAD_START, pxar.ENTRY])
def test_an_unknown_item_is_damage_of_its_entry(split: bool, kind: int) -> None:
    archive = open_tree(directory(b"", file(b"a", b"1", extra=item(kind, b"?")), GOOD), split=split)
    assert "unknown type" in damage_of(archive)
    assert names_of(archive) == [b"good"]


@both
@pytest.mark.parametrize(
    "extra",
    [
        item(pxar.ACL_GROUP_OBJ, bytes(8)) * 2,
        item(pxar.ACL_USER, bytes(15)),
        item(pxar.XATTR, bytes(66_000)),
        HEADER.pack(pxar.XATTR, 15),
        HEADER.pack(pxar.XATTR, 1 << 63),
        item(pxar.XATTR, b"user.a\0" + bytes(60_000)) * 80,
    ],
    ids=["twice", "short", "long", "shorter than its header", "endless", "too many"],
)
def test_attributes_beyond_their_limits_are_damage(split: bool, extra: bytes) -> None:
    archive = open_tree(directory(b"", file(b"a", b"1", extra=extra), GOOD), split=split)
    assert "attribute" in damage_of(archive)
    assert names_of(archive) == [b"good"]


@both
@pytest.mark.parametrize(
    "extra",
    [
        item(pxar.XATTR, b"no end"),
        item(pxar.XATTR, b"\0value"),
        item(pxar.XATTR, b"n" * 256 + b"\0value"),
        item(pxar.XATTR, b"system.posix_acl_access\0value"),
        item(pxar.ACL_USER, struct.pack("<QQ", 1 << 32, 7)),
        item(pxar.ACL_GROUP, struct.pack("<QQ", 0, 8)),
        item(pxar.ACL_DEFAULT, struct.pack("<QQQQ", 7, 8, 7, 7)),
    ],
)
def test_an_attribute_that_cannot_be_costs_the_attributes(split: bool, extra: bytes) -> None:
    archive = open_tree(directory(b"", file(b"a", b"1", extra=extra)), split=split)
    (entry,) = archive.children(archive.root).entries
    assert content(archive, entry) == b"1"
    with pytest.raises(DamageError):
        archive.xattrs(entry)


# --- hostile tables


def rows_of(change: Callable[[list[Row]], list[Row]], *, split: bool) -> Archive:
    """An archive with `change` made to the root's table of files `a` and `b` and the directory `c`."""
    root = directory(b"", file(b"a", b"1"), file(b"b", b"2"), directory(b"c", file(b"d")), rows=change)
    return open_tree(root, split=split)


@both
def test_a_table_in_the_wrong_order_is_read(split: bool) -> None:
    archive = rows_of(lambda rows: rows[::-1], split=split)
    assert archive.children(archive.root).damage is None
    assert all(archive.child(archive.root, name) for name in (b"a", b"b", b"c"))


@both
@pytest.mark.parametrize("offset", [0, 1, 1 << 20, (1 << 64) - 1])
def test_a_table_that_points_elsewhere_costs_one_entry(split: bool, offset: int) -> None:
    where = pxar.hash_name(b"b")
    archive = rows_of(lambda rows: [(h, offset if h == where else o, s) for h, o, s in rows], split=split)
    assert archive.children(archive.root).damage is not None
    assert names_of(archive) == [b"a", b"c"]


@both
def test_a_table_that_points_to_one_entry_twice(split: bool) -> None:
    archive = rows_of(lambda rows: [*rows, rows[0]], split=split)
    assert archive.children(archive.root).damage is not None
    assert names_of(archive) == [b"a", b"b", b"c"]


@both
@pytest.mark.parametrize("size", [0, 1, 70, 80, 1 << 20, (1 << 64) - 1])
def test_a_directory_with_a_wrong_end(split: bool, size: int) -> None:
    where = pxar.hash_name(b"c")
    archive = rows_of(lambda rows: [(h, o, size if h == where else s) for h, o, s in rows], split=split)
    errors = [error for _path, error in archive.walk(archive.root) if isinstance(error, DamageError)]
    assert len(errors) == 1
    within = size == 80  # only its own table shows that such an end is wrong
    assert names_of(archive) == [b"a", b"b", b"c"][: 3 if within else 2]


@both
def test_a_directory_cannot_hold_itself(split: bool) -> None:
    """The child's row leads to the directory's own start, and to its own end."""
    inner = directory(b"inner", file(b"a"))
    inner.rows = lambda rows: [(h, o + 16 + 6 + 56, 10**4) for h, o, _s in rows]
    archive = open_tree(directory(b"", inner, GOOD), split=split)
    found = list(archive.walk(archive.root))
    assert [path for path, entry in found if isinstance(entry, Entry)] == [b"inner", b"good"]
    assert [path for path, entry in found if isinstance(entry, DamageError)] == [b"inner"]


@both
def test_trailing_and_leading_bytes_are_damage(split: bool) -> None:
    written = write(some(), split=split)
    payload = Memory(written.payload) if written.payload is not None else None
    for main in (written.main + bytes(100), b"x" * 24 + written.main, written.main[: len(written.main) // 2]):
        with pytest.raises(DamageError):
            shown(Archive(Memory(main), payload))


def test_a_version_1_archive_has_no_payload_stream_and_version_2_has_one() -> None:
    one, two = write(some(), split=False), write(some(), split=True)
    assert two.payload is not None
    with pytest.raises(DamageError, match="not of version 2"):
        Archive(Memory(one.main), Memory(two.payload))
    with pytest.raises(DamageError, match="no payload stream"):
        Archive(Memory(two.main))
    for version in (0, 1, 3):
        changed = two.main[:16] + struct.pack("<Q", version) + two.main[24:]
        with pytest.raises(DamageError, match=f"version {version}"):
            Archive(Memory(changed), Memory(two.payload))


@both
def test_deep_nesting_is_walked_up_to_a_limit(split: bool) -> None:
    node = directory(b"d" * 250)
    for _ in range(400):
        node = directory(b"d" * 250, node)
    archive = open_tree(directory(b"", node), split=split)
    found = list(archive.walk(archive.root))
    assert isinstance(found[-1][1], DamageError)
    assert len(found) == 263


# --- catalogs that are wrong


@pytest.mark.parametrize(
    "other",
    [
        directory(b"", file(b"a", b"1"), file(b"b", b"2")),
        directory(b"", file(b"a", b"1"), file(b"b", b"2"), file(b"c"), file(b"d")),
        directory(b"", file(b"a", b"1"), file(b"b", b"2"), file(b"x")),
        directory(b"", file(b"a", b"1"), file(b"a", b"2"), file(b"c")),
        directory(),
    ],
    ids=["fewer", "more", "another", "twice", "none"],
)
def test_where_the_catalog_differs_the_archive_is_read(other: Node) -> None:
    root = directory(b"", file(b"a", b"1"), file(b"b", b"2"), file(b"c", b"3"))
    main = Memory(write(root, split=False).main)
    for name in (NAME, "other.pxar.didx"):
        archive = Archive(main, catalog=Memory(write_catalog({name.encode(): other})), name=NAME)
        entries = archive.children(archive.root, names_only=True).entries
        assert [entry.name for entry in entries] == [b"a", b"b", b"c"]
        assert all(entry.exact for entry in entries)


def test_where_directories_overlap_the_catalog_is_not_used() -> None:
    where = pxar.hash_name(b"c")
    root = directory(b"", directory(b"c", file(b"d")), file(b"e", b"1"))
    root.rows = lambda rows: [(h, o, o if h == where else s) for h, o, s in rows]
    archive = open_tree(root, split=False, catalog=True)
    found = archive.children(archive.root, names_only=True)
    assert found.damage is not None
    assert [(entry.name, entry.exact) for entry in found.entries] == [(b"e", True)]


def test_what_the_catalog_has_wrong_is_made_right() -> None:
    root = directory(b"", file(b"a", b"1"), directory(b"b"), Node(b"p", stat.S_IFIFO))
    other = directory(b"", Node(b"a", stat.S_IFLNK, target=b"?"), file(b"b"), directory(b"p"))
    main = Memory(write(root, split=False).main)
    archive = Archive(main, catalog=Memory(write_catalog({NAME.encode(): other})), name=NAME)
    named = archive.children(archive.root, names_only=True).entries
    exact = archive.children(archive.root).entries
    done = archive.complete(archive.root, named)
    assert [entry.but(hint=0) for entry in done if isinstance(entry, Entry)] == [
        entry.but(hint=0) for entry in exact
    ]


def test_a_name_that_the_catalog_alone_has_does_not_exist() -> None:
    archive = open_tree(directory(b"", file(b"a", b"1")), split=False, catalog=True)
    (named,) = archive.children(archive.root, names_only=True).entries
    assert archive.complete(archive.root, [named.but(name=b"b"), named]) == [
        None,
        archive.child(archive.root, b"a"),
    ]
