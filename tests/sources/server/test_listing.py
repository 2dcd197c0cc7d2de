"""The server's lists: what it answered reads right, and no entry hides its neighbours."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, PbsfsError, SourceError
from pbsfs.base.names import CLIENT_LOG, ROOT_NAMESPACE, Archive, Group, Namespace, Snapshot
from pbsfs.formats.manifest import CryptMode
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo, Usage
from pbsfs.sources.server.listing import (
    parse_group,
    parse_list,
    parse_namespace,
    parse_snapshot,
    parse_snapshots,
    parse_store,
    parse_usage,
)
from tests.support import golden

T = TypeVar("T")

VM100 = Group(ROOT_NAMESPACE, "vm", "100")
PROD = Namespace(("prod",))

GROUP = {"backup-type": "vm", "backup-id": "100", "backup-count": 2, "last-backup": 1_700_000_000}
FILES = [
    {"filename": "a.img.fidx", "crypt-mode": "none", "size": 5},
    {"filename": "index.json.blob", "crypt-mode": "none", "size": 400},
]
SNAPSHOT = {
    "backup-type": "vm",
    "backup-id": "100",
    "backup-time": 1_700_000_000,
    "files": FILES,
    "size": 405,
    "protected": False,
}


def recorded(name: str) -> Any:
    """The data of an answer that a real server gave."""
    return json.loads((golden.ROOT / "api" / f"{name}.json").read_text())["body"]["data"]


def entries(data: object, parse: Callable[[dict[str, Any]], T]) -> tuple[list[T], str]:
    listed = parse_list(data, parse)
    return listed.entries, listed.refused


def groups(data: object, namespace: Namespace = ROOT_NAMESPACE) -> tuple[list[GroupInfo], str]:
    return entries(data, functools.partial(parse_group, namespace))


def snapshots(data: object, group: Group = VM100) -> tuple[list[SnapshotInfo | None], str]:
    found, refused = entries(data, functools.partial(parse_snapshot, group))
    return [info for info, _files in found], refused


def one_snapshot(**changes: object) -> SnapshotInfo | None:
    found, refused = snapshots([SNAPSHOT | changes])
    assert not refused
    return found[0]


# --- what was recorded


@pytest.mark.golden
def test_recorded_namespaces_read_as_what_they_are() -> None:
    assert entries(recorded("namespaces"), parse_namespace) == (
        [ROOT_NAMESPACE, Namespace(("empty",)), PROD, Namespace(("prod", "db"))],
        "",
    )
    assert entries(recorded("namespaces-limited"), parse_namespace) == (
        [PROD, Namespace(("prod", "db"))],
        "",
    )


@pytest.mark.golden
def test_recorded_datastores_read_as_what_they_are() -> None:
    assert entries(recorded("datastores"), parse_store) == (["golden"], "")


@pytest.mark.golden
def test_recorded_groups_read_as_what_they_are() -> None:
    found, refused = groups(recorded("groups"))
    assert not refused
    assert {str(info.group) for info in found} == {
        *("ct/200", "host/web1"),
        *(f"vm/{number}" for number in range(100, 108)),
    }
    assert GroupInfo(VM100, 1_700_172_800, 3, "tester@pbs") in found

    assert groups(recorded("groups-prod-db"), Namespace(("prod", "db"))) == (
        [
            GroupInfo(
                Group(Namespace(("prod", "db")), "host", "db.example_1-a"), 1_700_000_000, 1, "tester@pbs"
            )
        ],
        "",
    )


@pytest.mark.golden
def test_recorded_snapshots_read_as_what_they_are() -> None:
    found, refused = snapshots(recorded("snapshots-vm-100"))
    assert not refused
    infos = [info for info in found if info is not None]
    assert len(infos) == len(found) == 3

    by_time = {info.snapshot.time: info for info in infos}
    assert sorted(by_time) == [1_700_000_000, 1_700_086_400, 1_700_172_800]
    assert by_time[1_700_000_000] == SnapshotInfo(
        Snapshot(VM100, 1_700_000_000),
        (
            FileInfo(Archive("drive-scsi0.img.fidx"), 50_333_184, CryptMode.NONE),
            FileInfo(Archive("drive-virtio1.img.fidx"), 5_246_464, CryptMode.NONE),
            FileInfo(Archive("qemu-server.conf.blob"), 103, CryptMode.NONE),
            FileInfo(Archive("index.json.blob"), 529, CryptMode.NONE),
        ),
        owner="tester@pbs",
        verify_state="ok",
    )
    assert by_time[1_700_086_400].protected
    assert by_time[1_700_086_400].notes
    assert not by_time[1_700_172_800].protected


@pytest.mark.golden
def test_recorded_snapshots_of_all_groups_read_as_what_they_are() -> None:
    modes = set()
    for entry in recorded("snapshots"):
        group = Group(ROOT_NAMESPACE, entry["backup-type"], entry["backup-id"])
        (info,), refused = snapshots([entry], group)
        assert not refused
        assert info is not None
        assert sum(file.size for file in info.files) == entry["size"]
        assert (info.key_fingerprint is None) == ("fingerprint" not in entry)
        modes |= {file.crypt_mode for file in info.files}
    assert modes >= {CryptMode.NONE, CryptMode.ENCRYPT, CryptMode.SIGN_ONLY}


@pytest.mark.golden
def test_a_recorded_empty_list_is_empty() -> None:
    assert snapshots(recorded("snapshots-group-missing")) == ([], "")


# --- what is made of an entry


def test_a_snapshot_whose_manifest_the_server_cannot_read_is_listed_with_that_error() -> None:
    files = [{"filename": "a.img.fidx"}, {"filename": "index.json.blob"}]
    found = one_snapshot(files=files, size=None, owner="root@pam")
    assert found is not None
    assert (found.files, found.owner) == ((), "root@pam")
    assert found.error == "unreadable manifest: the server can't read it"


def test_a_snapshot_without_manifest_or_sizes_is_not_finished() -> None:
    assert one_snapshot() is not None
    assert one_snapshot(files=[{"filename": "a.img.fidx"}]) is None
    assert one_snapshot(size=None) is None
    assert one_snapshot(files=FILES[:1]) is None
    assert one_snapshot(files=[{"filename": "index.json.blob"}]) is None


def test_a_group_without_a_finished_backup_has_no_newest() -> None:
    (info,), refused = groups([GROUP | {"backup-count": 0, "last-backup": -(1 << 63)}])
    assert not refused
    assert (info.last_backup, info.snapshot_count) == (None, 0)


def test_a_group_whose_newest_snapshot_is_not_finished_has_none_that_the_list_tells() -> None:
    (running,), _refused = groups([GROUP | {"files": ["a.img.fidx"]}])
    (finished,), _refused = groups([GROUP | {"files": ["a.img.fidx", "index.json.blob"]}])
    assert (running.last_backup, running.snapshot_count) == (None, 2)
    assert finished.last_backup == GROUP["last-backup"]


def test_the_client_log_is_listed_without_a_size_and_other_strangers_are_not() -> None:
    info = one_snapshot(files=[*FILES, {"filename": "client.log.blob"}, {"filename": "stray.img.fidx"}])
    assert info is not None
    assert [str(file.archive) for file in info.files] == ["a.img.fidx", "index.json.blob", "client.log.blob"]
    assert info.files[2] == FileInfo(CLIENT_LOG, 0, None)


def test_a_file_that_is_listed_twice_is_there_once() -> None:
    info = one_snapshot(files=[*FILES, FILES[0] | {"size": 6}])
    assert info is not None
    assert [(str(f.archive), f.size) for f in info.files] == [("a.img.fidx", 6), ("index.json.blob", 400)]


@pytest.mark.parametrize(
    "file",
    [
        None,
        "a.img.fidx",
        {},
        {"filename": "../../etc/passwd", "size": 1},
        {"filename": "a.txt", "size": 1},
        {"filename": "b.img.fidx", "size": -1},
        {"filename": "b.img.fidx", "size": 1 << 80},
        {"filename": "b.img.fidx", "size": "1"},
        {"filename": "b.img.fidx", "size": True},
        {"filename": "b.img.fidx", "size": 1.0},
        {"filename": "b.img.fidx", "size": 1, "crypt-mode": "rot13"},
        {"filename": "b.img.fidx", "size": 1, "crypt-mode": ["none"]},
        {"filename": 7, "size": 1},
    ],
)
def test_a_file_that_makes_no_sense_does_not_hide_the_others(file: object) -> None:
    info = one_snapshot(files=[FILES[0], file, FILES[1]])
    assert info is not None
    assert [str(f.archive) for f in info.files] == ["a.img.fidx", "index.json.blob"]


def test_what_is_optional_and_of_the_wrong_kind_is_not_there() -> None:
    info = one_snapshot(
        owner=7, comment=["x"], fingerprint={}, protected="yes", verification="ok", unknown="field"
    )
    assert info is not None
    assert (info.owner, info.notes, info.key_fingerprint, info.protected, info.verify_state) == (
        *(None, None, None),
        False,
        None,
    )


def test_texts_can_be_written_to_any_terminal_or_file() -> None:
    info = one_snapshot(comment="half a character: \ud83d", verification={"state": "ok"})
    assert info is not None
    assert info.notes == "half a character: ?"
    assert info.verify_state == "ok"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        [],
        {},
        GROUP | {"backup-type": "tape"},
        GROUP | {"backup-id": "../x"},
        GROUP | {"backup-id": "a\nb"},
        GROUP | {"backup-id": "\ud800"},
        GROUP | {"backup-id": "x" * 300},
        GROUP | {"backup-id": 100},
        GROUP | {"backup-count": -1},
        GROUP | {"backup-count": True},
        GROUP | {"backup-count": 1e300},
        GROUP | {"last-backup": 1 << 60},
        GROUP | {"last-backup": None},
    ],
)
def test_a_group_that_makes_no_sense_is_left_out_and_told_of(entry: object) -> None:
    found, refused = groups([GROUP, entry, GROUP | {"backup-id": "101"}])
    assert [info.group.id for info in found] == ["100", "101"]
    assert refused.startswith("left out 1 entry of the server's list: ")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        SNAPSHOT | {"backup-id": "101"},
        SNAPSHOT | {"backup-type": "ct"},
        SNAPSHOT | {"backup-time": -1},
        SNAPSHOT | {"backup-time": "1700000000"},
        SNAPSHOT | {"backup-time": 1 << 55},
        {key: value for key, value in SNAPSHOT.items() if key != "backup-time"},
    ],
)
def test_a_snapshot_that_makes_no_sense_is_left_out_and_told_of(entry: object) -> None:
    found, refused = snapshots([SNAPSHOT, entry])
    assert [info.snapshot.time for info in found if info] == [1_700_000_000]
    assert refused.startswith("left out 1 entry of the server's list: ")


def test_a_namespace_that_could_not_exist_is_left_out_and_told_of() -> None:
    hostile = ["../x", "a//b", "a/../b", "x" * 300, "/".join("abcdefgh"), "a\0b", 7, None]
    found, refused = entries([{"ns": "a/b"}, *({"ns": ns} for ns in hostile), {"ns": ""}], parse_namespace)
    assert found == [Namespace(("a", "b")), ROOT_NAMESPACE]
    assert refused.startswith("left out 8 entries of the server's list: ")


def test_of_many_entries_that_make_no_sense_the_first_are_reported_and_the_number() -> None:
    hostile = [{"ns": "\x1b[2J" + "x" * 100_000}] * 10_000
    found, refused = entries([*hostile, {"ns": "good"}], parse_namespace)
    assert found == [Namespace(("good",))]
    assert refused.startswith("left out 10000 entries of the server's list (the first 8 of 10000): ")
    assert len(refused) < 2000
    assert refused.isprintable()


@pytest.mark.parametrize("data", [None, {}, "list", 7, True, {"data": []}])
def test_an_answer_that_is_no_list_is_a_fault_of_the_source(data: object) -> None:
    with pytest.raises(SourceError, match="not a list"):
        groups(data)


def test_a_snapshot_whose_files_are_no_list_is_a_fault_that_is_told_of() -> None:
    found, refused = snapshots([SNAPSHOT | {"files": "none"}, SNAPSHOT])
    assert len(found) == 1
    assert "left out 1 entry" in refused


def test_a_file_that_makes_no_sense_is_left_out_and_reported() -> None:
    bad = {"filename": "drive-scsi1.img.fidx", "size": -1, "crypt-mode": "none"}
    listed = parse_snapshots(VM100, [SNAPSHOT | {"files": [*FILES, bad]}, SNAPSHOT | {"backup-time": 9}])
    assert [len(info.files) for info in listed.entries] == [len(FILES), len(FILES)]
    where = "vm/100/2023-11-14T22:13:20Z"
    assert listed.refused == f"{where}: left out 1 entry of the server's list: it has no valid 'size'"
    many = [SNAPSHOT | {"files": [*FILES, bad], "backup-time": time} for time in range(100)]
    assert "(100 in all)" in parse_snapshots(VM100, many).refused


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
KEYS = [*GROUP, *SNAPSHOT, "ns", "store", "owner", "comment", "verification", "fingerprint"]
ENTRIES = st.lists(JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=12), max_size=4) | JSON
PARSERS: list[Callable[[dict[str, Any]], object]] = [
    parse_namespace,
    parse_store,
    functools.partial(parse_group, PROD),
    functools.partial(parse_snapshot, VM100),
]


@given(ENTRIES, st.sampled_from(PARSERS))
def test_whatever_the_server_says_is_read_or_refused(
    data: object, parse: Callable[[dict[str, Any]], object]
) -> None:
    try:
        listed = parse_list(data, parse)
    except SourceError:
        assert not isinstance(data, list)
    else:
        assert isinstance(data, list)
        assert listed.count == len(data)
        assert (len(listed.entries) < len(data)) == bool(listed.refused)


@given(st.sampled_from(sorted(SNAPSHOT)), JSON)
def test_no_field_of_a_snapshot_breaks_the_list(key: str, value: object) -> None:
    found, refused = snapshots([SNAPSHOT | {key: value}, SNAPSHOT])
    assert len(found) == (1 if refused else 2)
    assert found[-1] == one_snapshot()


def test_refusals_are_errors_of_ours() -> None:
    with pytest.raises(PbsfsError):
        parse_store({})
    with pytest.raises(DamageError, match="no valid 'ns'"):
        parse_namespace({"ns": 7})


def test_a_status_has_the_space_of_the_datastore() -> None:
    status = {"total": 1000, "used": 400, "avail": 550, "gc-status": {"upid": None}}
    assert parse_usage(status) == Usage(total=1000, used=400, available=550)


def test_a_status_of_zeros_is_one_that_this_user_is_not_told() -> None:
    assert parse_usage({"total": 0, "used": 0, "avail": 0}) is None


@pytest.mark.parametrize("data", [None, [], "x", {}, {"total": 1, "used": -1, "avail": 0}, {"total": "1"}])
def test_what_is_not_a_status_is_refused(data: object) -> None:
    with pytest.raises(DamageError):
        parse_usage(data)
