"""`pbsfs info`: what is known of one place in the tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pbsfs.tasks.attributes import span_text
from pbsfs.testing.writer import DatastoreWriter
from tests.support import damage, made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.server.accounts import READER
from tests.support.serving import STORE, access, serving
from tests.support.stocked import CHUNK, ENCRYPTED, FIRST, IMAGE, Stocked, stock


def info(stocked: Stocked, path: str) -> dict[str, Any]:
    text = output_of(PBSFS, "info", "--datastore-dir", stocked.path, "--json", path)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_file_is_told_with_its_size_and_its_data(stocked: Stocked) -> None:
    found = info(stocked, IMAGE)
    assert found["path"] == IMAGE
    assert (found["size"], found["data_size"], found["chunk_size"]) == ("525824", "329216", str(CHUNK))
    assert (found["backup_time"], found["crypt_mode"]) == ("2023-11-14T22:13:20Z", "none")


def test_a_snapshot_is_told_with_its_files_by_their_stored_names(stocked: Stocked) -> None:
    found = info(stocked, FIRST)
    assert {"drive-scsi0.img.fidx", "qemu-server.conf.blob"} <= set(found["files"])
    assert (found["protected"], found["verify_state"]) == ("true", "ok")


def test_a_group_is_told_with_its_last_backup(stocked: Stocked) -> None:
    found = info(stocked, "vm/100")
    assert (found["backup_count"], found["last_backup"]) == ("2", "2023-11-15T22:13:20Z")


def test_an_encrypted_file_is_told_with_its_key(stocked: Stocked) -> None:
    found = info(stocked, ENCRYPTED)
    assert (found["crypt_mode"], found["key_fingerprint"]) == ("encrypt", made.KEY.fingerprint)


def test_stored_names_find_the_file_too(stocked: Stocked) -> None:
    assert info(stocked, f"{IMAGE}.fidx")["path"] == IMAGE
    assert info(stocked, "vm/101/latest")["path"] == "vm/101/2023-11-14T22:13:20Z"


def test_text_is_aligned_and_obeyed_by_no_terminal(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    own.writer.add_snapshot(made.snapshot("9"), {"a.conf.blob": b"x"}, notes="one\ntwo \x1b[31m\x07 red")
    text = output_of(PBSFS, "info", "--datastore-dir", own.path, "vm/9/latest")
    assert "\x1b" not in text
    assert "\x07" not in text
    lines = text.splitlines()
    values = [line for line in lines if not line.startswith(" ")]
    assert all(line.index(":") < 17 and line[16] == " " for line in values)
    at = lines.index("notes:           one")
    assert lines[at + 1].startswith(" " * 17 + "two ")


def test_what_does_not_exist_is_status_3(stocked: Stocked) -> None:
    text = error_of(pbsfs("info", "--datastore-dir", stocked.path, "vm/999"), 3)
    assert text == "vm: there is no '999'; there is 100, 101"


# --- what people ask


A, B, C, D, E = (made.image(number, "r") for number in range(1, 6))
HOLE = bytes(CHUNK)
DAYS = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "2023-11-16T22:13:20Z"]
DAY = made.DAY


def nights(path: Path) -> Path:
    """Three nights of one disk: 4, 5 and 5 chunks, the second with one twice."""
    writer = DatastoreWriter(path)
    disks = [A + B + HOLE + C + D, A + B + A + C + E, HOLE + B + A + C + E]
    for number, disk in enumerate(disks):
        snapshot = made.snapshot("7", time=made.TIME + number * DAY)
        state = ("ok", "failed", None)[number]
        files = {"disk.img.fidx": disk, "log.blob": b"x"}
        writer.add_snapshot(snapshot, files, chunk_size=CHUNK, verify_state=state)
    return path


AMOUNTS: list[dict[str, int | str]] = [
    {"data_size": 4, "restore_size": 4},
    {"data_size": 5, "restore_size": 4, "shared_size": 4, "shared_with": DAYS[0]},
    {"data_size": 4, "restore_size": 4, "shared_size": 4, "shared_with": DAYS[1]},
]


@pytest.fixture(params=["directory", "server"])
def place_of_nights(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which pbsfs reads the three nights."""
    place = nights(tmp_path / "store")
    if request.param == "directory":
        yield environment(PBSFS_DATASTORE_DIR=str(place))
        return
    with serving(place) as server:
        yield access(server)


@pytest.mark.parametrize("name", ["", "/disk.img"], ids=["snapshot", "image"])
def test_amounts_are_those_of_the_indexes(place_of_nights: dict[str, str], name: str) -> None:
    for day, amounts in zip(DAYS, AMOUNTS, strict=True):
        found = json.loads(output_of(PBSFS, "info", "--json", f"vm/7/{day}{name}", env=place_of_nights))
        expected = {key: str(n * CHUNK) if isinstance(n, int) else n for key, n in amounts.items()}
        kept = ("data_size", "restore_size", "shared_size", "shared_with")
        assert {key: found[key] for key in kept if key in found} == expected


def test_a_group_is_told_with_its_habit_and_its_newest_snapshot(place_of_nights: dict[str, str]) -> None:
    found = json.loads(output_of(PBSFS, "info", "--json", "vm/7", env=place_of_nights))
    assert (found["first_backup"], found["last_backup"]) == (DAYS[0], DAYS[2])
    assert found["backup_interval"] == str(DAY)
    assert sorted(found["verify_states"]) == ["failed: 1", "none: 1", "ok: 1"]
    assert (found["newest"], found["shared_with"]) == (DAYS[2], DAYS[1])
    assert found["restore_size"] == str(4 * CHUNK)


def test_people_get_units_and_words(tmp_path: Path) -> None:
    place = nights(tmp_path / "store")
    text = output_of(PBSFS, "info", "--datastore-dir", place, f"vm/7/{DAYS[1]}/disk.img")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    values = {name: value.strip() for name, value in lines.items()}
    assert values["size"] == "327680 (320 KiB)"
    assert values["restore_size"] == "262144 (256 KiB, what a restore fetches, before compression)"
    assert values["shared_size"] == "262144 (256 KiB, 80% of the data)"
    assert values["verify_state"].startswith("failed (the last verification on the server found damage; ")
    assert values["backup_time"].startswith(f"{DAYS[1]} (")
    assert values["backup_time"].endswith(" days ago)")
    group = output_of(PBSFS, "info", "--datastore-dir", place, "vm/7")
    assert "\nbackup_interval: 86400 (about every 1 day)\n" in group


def test_a_damaged_index_is_said_and_hides_nothing_else(tmp_path: Path) -> None:
    place = nights(tmp_path / "store")
    damage.truncate(place / "vm/7" / DAYS[2] / "disk.img.fidx", 4128)
    found = json.loads(output_of(PBSFS, "info", "--datastore-dir", place, "--json", f"vm/7/{DAYS[2]}"))
    assert "disk.img" in found["error"]
    assert found["backup_id"] == "7"
    assert "restore_size" not in found


def test_a_key_that_is_missing_is_said(stocked: Stocked) -> None:
    assert made.KEY.fingerprint in info(stocked, ENCRYPTED)["error"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (89, "1 minute"),
        (3600, "1 hour"),
        (90_000, "1 day"),
        (10 * 86400, "10 days"),
    ],
)
def test_spans_of_time_are_in_their_largest_unit(seconds: int, text: str) -> None:
    assert span_text(seconds) == text


# --- the store and its namespaces


def store_info(stocked: Stocked, kind: str, *arguments: str) -> dict[str, Any]:
    """What info says from a directory or a server; of a store, without what the file system makes of it."""
    if kind == "directory":
        told = environment(PBSFS_DATASTORE_DIR=str(stocked.path))
        return dict(json.loads(output_of(PBSFS, "info", "--json", *arguments, env=told)))
    with serving(stocked.path) as server:
        text = output_of(PBSFS, "info", "--json", *arguments, env=access(server))
        # Snapshots are counted without a look into them.
        asked = {record.target.partition("?")[0].rpartition("/")[2] for record in server.requests.all()}
        assert ("snapshots" in asked) == ("--states" in arguments)
        assert "download" not in asked
    return dict(json.loads(text))


@pytest.fixture
def collected(tmp_path: Path) -> Stocked:
    own = stock(tmp_path / "collected")
    (own.path / ".gc-status").write_text(json.dumps(made.COLLECTION))
    return own


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_a_store_is_counted_and_has_its_space_and_garbage_collection(collected: Stocked, kind: str) -> None:
    found = store_info(collected, kind)
    space = {name: int(found.pop(f"{name}_space")) for name in ("total", "used", "available")}
    assert space["total"] > space["used"] > 0
    begin = f"datastore directory {collected.path}" if kind == "directory" else "reader@pbs@"
    assert found.pop("source").startswith(begin)
    assert found.pop("gc_state", "OK") == "OK"
    assert found == {
        "path": "",
        "namespace": "",
        "namespaces": "1",
        "groups": "4",
        "groups_by_type": ["ct: 1", "vm: 3"],
        "snapshots": "5",
        "last_backup": "2023-11-15T22:13:20Z",
        "gc_time": "2023-11-14T22:13:20Z",
        "gc_indexed_size": "9000",
        "gc_stored_size": "3000",
        "gc_pending_size": "500",
        "gc_bad_chunks": "2",
    }
    assert store_info(collected, kind, "--states")["verify_states"] == ["none: 4", "ok: 1"]


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_parts_of_a_store_are_counted_alone(stocked: Stocked, kind: str) -> None:
    keys = ("namespaces", "groups", "snapshots")
    for path, counts in {
        "vm": (None, "2", "3"),
        "ct": (None, "1", "1"),
        "ns": ("1", "1", "1"),
        "ns/prod": ("0", "1", "1"),
    }.items():
        found = store_info(stocked, kind, path)
        assert tuple(found.get(key) for key in keys) == counts
        assert "total_space" not in found
    found = store_info(stocked, kind, "--ns", "prod")
    assert tuple(found.get(key) for key in keys) == ("0", "1", "1")


def test_people_get_words_for_a_store(collected: Stocked) -> None:
    text = output_of(PBSFS, "info", "--datastore-dir", collected.path, "--states")
    lines = text.splitlines()
    assert lines[0] == "path:            /"
    assert "namespace:       (root)" in lines
    assert "verify_states:   none: 4 (never verified), ok: 1 (no damage found)" in lines
    assert "gc_indexed_size: 9000 (8.8 KiB, what all backups refer to, 3.0 times what is stored)" in lines
    assert any(line.startswith("used_space:") and line.endswith("% of the total)") for line in lines)


def test_a_user_of_some_namespaces_sees_their_counts_and_no_garbage_collection(collected: Stocked) -> None:
    with serving(collected.path) as server:
        server.add_user("limited@pbs", "x", grants={f"/datastore/{STORE}/prod": READER})
        text = output_of(PBSFS, "info", "--json", env=access(server, "limited@pbs", "x"))
    found = json.loads(text)
    assert (found["groups"], found["snapshots"], found["hidden"]) == ("1", "1", "1")
    assert not {"gc_time", "total_space"} & set(found)
