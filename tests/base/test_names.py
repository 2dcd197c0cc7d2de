"""Names: they say what they are, round-trip, and are safe to make a path of."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import UsageError
from pbsfs.base.names import (
    MAX_NAMESPACE_DEPTH,
    ROOT_NAMESPACE,
    Archive,
    ArchiveKind,
    Group,
    Namespace,
    Snapshot,
    format_time,
    is_safe_name,
    parse_time,
    safe_name,
    usual_name,
)
from tests.support.made import TIME

SAFE = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)

GOOD = ["100", "web1", "_", "a.b-c_d", "A", "0..", "x" * 255]
BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "-x",
    "a/b",
    "/",
    "a b",
    "a\n",
    "\n",
    "a\0",
    "é",
    "٣",
    "x" * 256,
    "a\\b",
    "*",
]

FIRST = parse_time("0001-01-01T00:00:00Z")
LAST = parse_time("9999-12-31T23:59:59Z")


# --- safe names


@pytest.mark.parametrize("name", GOOD)
def test_a_safe_name_is_an_id_and_a_namespace(name: str) -> None:
    assert is_safe_name(name)
    assert Group(ROOT_NAMESPACE, "vm", name).id == name
    assert Namespace((name,)).parts == (name,)


@pytest.mark.parametrize("name", BAD)
def test_an_unsafe_name_is_no_part_of_anything(name: str) -> None:
    assert not is_safe_name(name)
    with pytest.raises(UsageError):
        Group(ROOT_NAMESPACE, "vm", name)
    with pytest.raises(UsageError):
        Namespace((name,))
    with pytest.raises(UsageError):
        ROOT_NAMESPACE.child(name)
    with pytest.raises(UsageError):
        Archive(f"{name}.blob")


@given(st.text(max_size=10))
def test_a_safe_name_is_one_path_component_of_ascii(name: str) -> None:
    if is_safe_name(name):
        assert name.isascii()
        assert not set(name) & set("/\0\n ")
        assert name not in ("", ".", "..")


# --- times


def test_a_time_is_written_in_utc() -> None:
    assert format_time(TIME) == "2023-11-14T22:13:20Z"
    assert parse_time("2023-11-14T22:13:20Z") == TIME
    assert parse_time("1970-01-01T00:00:00Z") == 0


@given(st.integers(FIRST, LAST))
def test_every_time_goes_there_and_back(seconds: int) -> None:
    text = format_time(seconds)

    assert parse_time(text) == seconds
    assert datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp() == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        "2023-11-14",
        "2023-11-14T22:13:20",
        "2023-11-14 22:13:20Z",
        "2023-11-14T22:13:20+00:00",
        "2023-11-14T22:13:20.0Z",
        "2023-11-14T22:13:20Z\n",
        " 2023-11-14T22:13:20Z",
        "2023-11-14t22:13:20z",
        "2023-02-29T00:00:00Z",
        "2023-13-01T00:00:00Z",
        "2023-11-14T24:00:00Z",
        "2023-11-14T23:60:00Z",
        "2016-12-31T23:59:60Z",
        "0000-01-01T00:00:00Z",
        "٢٠٢٣-11-14T22:13:20Z",
        "../../../etc/passwd",
    ],
)
def test_any_other_form_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="is not a backup time"):
        parse_time(text)


@given(st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fullmatch=True))
def test_a_time_that_parses_has_no_second_spelling(text: str) -> None:
    try:
        seconds = parse_time(text)
    except UsageError:
        return
    assert Snapshot(Group(ROOT_NAMESPACE, "vm", "1"), seconds).time_text == text


# --- namespaces


def test_a_namespace_is_written_with_slashes() -> None:
    assert Namespace.parse("prod/db") == Namespace(("prod", "db")) == Namespace(("prod",)).child("db")
    assert str(Namespace(("prod", "db"))) == "prod/db"
    assert Namespace.parse("/prod/") == Namespace(("prod",))


@pytest.mark.parametrize("text", ["", "/", "//"])
def test_the_root_namespace_has_no_name(text: str) -> None:
    assert Namespace.parse(text) == ROOT_NAMESPACE
    assert not str(ROOT_NAMESPACE)


@given(st.lists(SAFE, max_size=MAX_NAMESPACE_DEPTH))
def test_every_namespace_goes_there_and_back(parts: list[str]) -> None:
    namespace = Namespace(tuple(parts))
    assert Namespace.parse(str(namespace)) == namespace


@pytest.mark.parametrize("text", ["a//b", "a/../b", "./a", "a/ b", "..", "a/."])
def test_a_namespace_with_an_unsafe_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a namespace"):
        Namespace.parse(text)


def test_namespaces_nest_seven_levels_deep_and_no_deeper() -> None:
    deepest = Namespace.parse("a/b/c/d/e/f/g")
    with pytest.raises(UsageError, match="deeper than 7"):
        deepest.child("h")


# --- groups and snapshots


@given(st.integers(0, 253402300799))
def test_names_of_snapshots_go_to_the_form_without_colons_and_back(seconds: int) -> None:
    name = format_time(seconds).encode()
    assert safe_name(name) == name.replace(b":", b"-")
    assert usual_name(safe_name(name)) == usual_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(b"latest", b"2023-11-14T22-13:20Z", b"2023-11-14T22_13_20Z", b"2023-11-14T22-13-20"),
        *(b"2023-11-14T22-13-20Z\n", b"x2023-11-14T22-13-20Z", b"\xd9\xa2023-11-14T22-13-20Z"),
    ],
)
def test_other_names_have_no_form_without_colons(name: bytes) -> None:
    assert usual_name(name) == name


def test_groups_and_snapshots_are_written_as_paths_below_a_mount() -> None:
    group = Group(Namespace.parse("prod/db"), "host", "web1")

    assert str(group) == "ns/prod/ns/db/host/web1"
    assert str(group.snapshot(TIME)) == "ns/prod/ns/db/host/web1/2023-11-14T22:13:20Z"
    assert str(Group(ROOT_NAMESPACE, "vm", "100")) == "vm/100"


@pytest.mark.parametrize("backup_type", ["", "VM", "vms", "qemu", "ns", "..", ".chunks"])
def test_there_are_three_backup_types(backup_type: str) -> None:
    assert [Group(ROOT_NAMESPACE, known, "1").type for known in ("vm", "ct", "host")]
    with pytest.raises(UsageError, match="is not a backup type"):
        Group(ROOT_NAMESPACE, backup_type, "1")


@pytest.mark.parametrize("time", [FIRST - 1, LAST + 1, 1 << 40, 1 << 63, 1 << 200, -(1 << 63)])
def test_a_time_that_has_no_text_is_no_snapshot(time: int) -> None:
    with pytest.raises(UsageError, match="is not a backup time"):
        Snapshot(Group(ROOT_NAMESPACE, "vm", "1"), time)


def test_snapshots_sort_by_time_within_their_group() -> None:
    group, other = Group(ROOT_NAMESPACE, "vm", "100"), Group(ROOT_NAMESPACE, "vm", "101")
    snapshots = [other.snapshot(1), group.snapshot(20), group.snapshot(3)]

    assert sorted(snapshots) == [group.snapshot(3), group.snapshot(20), other.snapshot(1)]


def test_equal_names_are_one_key() -> None:
    assert (
        len({Group(ROOT_NAMESPACE, "vm", "1").snapshot(TIME), Group(Namespace(), "vm", "1").snapshot(TIME)})
        == 1
    )


# --- archives


@pytest.mark.parametrize(
    ("filename", "kind", "name"),
    [
        ("drive-scsi0.img.fidx", ArchiveKind.FIXED, "drive-scsi0.img"),
        ("root.pxar.didx", ArchiveKind.DYNAMIC, "root.pxar"),
        ("qemu-server.conf.blob", ArchiveKind.BLOB, "qemu-server.conf"),
        ("x.fidx.blob", ArchiveKind.BLOB, "x.fidx"),
    ],
)
def test_an_archive_is_told_by_the_end_of_its_stored_name(
    filename: str, kind: ArchiveKind, name: str
) -> None:
    archive = Archive(filename)

    assert (archive.kind, archive.name, str(archive)) == (kind, name, filename)


@pytest.mark.parametrize(
    "filename",
    ["", "disk.img", ".fidx", "fidx", "disk.FIDX", "disk.fidx.tmp", "a/b.blob", "a.blob\n", "..blob"],
)
def test_any_other_name_is_no_archive(filename: str) -> None:
    with pytest.raises(UsageError, match="is not the name of an archive"):
        Archive(filename)
