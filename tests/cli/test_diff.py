"""`pbsfs diff`: the vendor's archives against the truth about them, made ones, images, and damage."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from pbsfs.formats.index import DynamicIndex
from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, keyfiles, made
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.stocked import CHUNK, CONFIGURATION, FIRST, IMAGE, NEWER_IMAGE, SECOND, Stocked
from tests.support.truth import ARCHIVES, FILES, truth

OLD, NEW = "2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z"
DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


def diff(place: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        output_of(PBSFS, "diff", "--datastore-dir", place, "--json", *arguments)
    )
    return report


def changes(report: dict[str, Any]) -> dict[str, Any]:
    """What changed: the fields by path, or the kind of change where it is another."""
    return {
        row["path"]: set(row["fields"]) if row["change"] == "changed" else row["change"]
        for row in report["changes"]
    }


# --- the vendor's data


def true_changes() -> dict[str, Any]:
    old, new = truth(ARCHIVES[0]), truth(ARCHIVES[1])
    found: dict[str, Any] = {}
    for path in {*old, *new}:
        before, after = old.get(path), new.get(path)
        if before is None or after is None:
            found[path.decode(errors="surrogateescape")] = "added" if before is None else "removed"
        elif before["t"] != after["t"]:
            found[path.decode(errors="surrogateescape")] = "type"
        else:
            fields = {"mt": "mtime", "m": "mode", "l": "link", "x": "xattrs", "d": "device", "h": "content"}
            changed = {name for key, name in fields.items() if before.get(key) != after.get(key)}
            if (before["u"], before["g"]) != (after["u"], after["g"]):
                changed.add("owner")
            if before["t"] != stat.S_IFDIR and before["s"] != after["s"]:
                changed = (changed - {"content"}) | {"size"}
            if changed:
                found[path.decode(errors="surrogateescape")] = changed
    return found


@pytest.mark.golden
@pytest.mark.parametrize("group", ["ct/210", "ct/211"], ids=["version 1", "version 2"])
def test_the_changes_of_a_day_are_those_of_the_truth(group: str) -> None:
    days = [f"files/{group}/{archive.path.split('/')[2]}/root" for archive in ARCHIVES[:2]]
    expected = true_changes()
    assert {"added", "removed"} < {kind for kind in expected.values() if isinstance(kind, str)}
    found = changes(diff(FILES / "datastore", "--content", *days))
    assert {path or "": fields for path, fields in found.items()} == expected
    without = {
        path: fields - {"content"} if isinstance(fields, set) else fields for path, fields in expected.items()
    }
    assert changes(diff(FILES / "datastore", *days)) == {p: f for p, f in without.items() if f}


@pytest.mark.golden
def test_the_two_forms_of_one_archive_do_not_differ() -> None:
    report = diff(FILES / "datastore", "--content", "files/ct/210/latest/root", "files/ct/211/latest/root")
    assert report["changes"] == []


@pytest.mark.golden
def test_an_encrypted_archive_is_compared_with_its_key() -> None:
    key = str(golden.ROOT / "keys" / "plain.json")
    days = ["files/host/laptop/2024-11-07T17:20:00Z/home", "files/host/laptop/latest/home"]
    assert diff(FILES / "datastore", "--content", "--keyfile", key, *days)["changes"] == []
    done = pbsfs("diff", "--datastore-dir", FILES / "datastore", *days)
    assert "which was not given" in error_of(done, 5)


# --- made archives


def archive(*children: Node, split: bool = True) -> dict[str, bytes]:
    written = write(Node(b"", DIRECTORY, children=list(children)), split=split)
    if written.payload is None:
        return {"root.pxar.didx": written.main}
    return {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """Two days of a container, of which the second is of the other version."""
    writer = DatastoreWriter(tmp_path / "store")
    old = archive(
        Node(b"changed", FILE, data=b"1234"),
        Node(b"gone", DIRECTORY, children=[Node(b"file", FILE, data=b"12")]),
        Node(b"link", LINK, target=b"a"),
        Node(b"other", FILE, 1, 2),
        Node(b"same", FILE, data=b"s"),
        Node(b"secret", FILE, data=b"abcd"),
        Node(b"turned", FILE, data=b"12345"),
    )
    new = archive(
        Node(b"changed", FILE, data=b"123456"),
        Node(b"link", LINK, target=b"b"),
        Node(b"new", FILE, data=b"123"),
        Node(b"other", stat.S_IFREG | 0o600, 1, 3, xattrs={b"user.x": b"1"}),
        Node(b"same", FILE, data=b"s"),
        Node(b"secret", FILE, data=b"abcx"),
        Node(b"turned", DIRECTORY, children=[Node(b"in", FILE)]),
        split=False,
    )
    writer.add_snapshot(made.snapshot("200", type="ct"), {**old, "pct.conf.blob": b"memory: 1"})
    writer.add_snapshot(
        made.snapshot("200", type="ct", time=made.TIME + made.DAY), {**new, "pct.conf.blob": b"memory: 12"}
    )
    return writer.path


def test_everything_that_can_change_is_listed(days: Path) -> None:
    expected = {
        "pct.conf": {"size", "content"},
        "root/changed": {"size"},
        "root/gone": "removed",
        "root/gone/file": "removed",
        "root/link": {"link"},
        "root/new": "added",
        "root/other": {"mode", "owner", "xattrs"},
        "root/turned": "type",
        "root/turned/in": "added",
    }
    snapshots = f"ct/200/{OLD}", f"ct/200/{NEW}"
    assert changes(diff(days, *snapshots)) == expected
    assert changes(diff(days, "--content", *snapshots)) == expected | {"root/secret": {"content"}}
    assert changes(diff(days, *(f"files/{snapshot}" for snapshot in snapshots))) == expected


def test_lines_say_what_changed_to_what(days: Path) -> None:
    text = output_of(PBSFS, "diff", "--datastore-dir", days, f"ct/200/{OLD}", f"ct/200/{NEW}")
    assert text.splitlines() == [
        "M pct.conf (size 9 → 10, content)",
        "M root/changed (size 4 → 6)",
        "- root/gone/",
        "- root/gone/file",
        "M root/link (link a → b)",
        "+ root/new",
        "M root/other (mode 0644 → 0600, owner 1:2 → 1:3, xattrs)",
        "T root/turned/ (file → directory)",
        "+ root/turned/in",
    ]


def test_times_that_differ_by_less_than_a_second_are_shown_in_full(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    for day in range(2):
        snapshot = made.snapshot("200", type="ct", time=made.TIME + day * made.DAY)
        writer.add_snapshot(snapshot, archive(Node(b"f", FILE, mtime_ns=made.TIME * 10**9 + day)))
    text = output_of(PBSFS, "diff", "--datastore-dir", writer.path, f"ct/200/{OLD}", f"ct/200/{NEW}")
    assert text == "M root/f (mtime 2023-11-14T22:13:20Z → 2023-11-14T22:13:20.000000001Z)\n"


def test_stat_counts(days: Path) -> None:
    arguments = ("diff", "--datastore-dir", days, "--stat", f"ct/200/{OLD}", f"ct/200/{NEW}")
    assert output_of(PBSFS, *arguments).splitlines() == [
        "added: 2 entries, 3 bytes",
        "removed: 2 entries, 2 bytes",
        "changed: 4 entries, 17 bytes",
        "type: 1 entry, 0 bytes",
    ]
    assert json.loads(output_of(PBSFS, *arguments, "--json"))["counts"]["added"] == {"count": 2, "bytes": 3}


def test_names_from_outside_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    writer.add_snapshot(made.snapshot("200", type="ct"), archive())
    writer.add_snapshot(
        made.snapshot("200", type="ct", time=made.TIME + made.DAY), archive(Node(b"\x1b[2J\nx", FILE))
    )
    text = output_of(PBSFS, "diff", "--datastore-dir", writer.path, f"ct/200/{OLD}", f"ct/200/{NEW}")
    assert "\x1b" not in text
    assert len(text.splitlines()) == 1


def test_damage_hides_a_part_and_no_more(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    names = [b"a", b"b", b"z"]
    for time in (made.TIME, made.TIME + made.DAY):
        files = [Node(name, FILE, data=made.image(7 + time, "rrrr", tail=9)) for name in names]
        writer.add_snapshot(made.snapshot("200", type="ct", time=time), archive(*files))
    stored = writer.snapshot_path(made.snapshot("200", type="ct")) / "root.ppxar.didx"
    index = DynamicIndex(stored.read_bytes())
    writer.chunk_path(index.digest(index.count - 1)).unlink()
    arguments = ("diff", "--datastore-dir", writer.path, "--content", "--json")
    done = pbsfs(*arguments, f"ct/200/{OLD}", f"ct/200/{NEW}")
    assert done.returncode == 6
    assert changes(json.loads(done.stdout)) == {"root/a": {"content"}, "root/b": {"content"}}
    assert done.stderr.startswith("pbsfs: root/z: ")
    assert len(done.stderr.splitlines()) == 1


# --- images


def test_the_ranges_of_an_image_that_changed_come_from_its_index(stocked: Stocked) -> None:
    report = diff(stocked.path, IMAGE, NEWER_IMAGE)
    (row,) = report["changes"]
    old, new = stocked.contents[IMAGE], stocked.contents[NEWER_IMAGE]
    assert (row["old_size"], row["new_size"]) == (len(old), len(new))
    changed = bytearray(max(len(old), len(new)))
    for found in row["ranges"]:
        changed[found["offset"] : found["offset"] + found["length"]] = b"x" * found["length"]
    for offset in range(len(changed)):
        differs = old[offset : offset + 1] != new[offset : offset + 1]
        assert changed[offset] or not differs
    assert not all(changed) or old[:10] != new[:10]


def test_one_changed_chunk_of_an_image_is_counted_and_named(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    disk = made.image(1, "rrrr", chunk_size=CHUNK)
    for day, content in enumerate((disk, disk[:CHUNK] + disk[:CHUNK] + disk[2 * CHUNK :])):
        snapshot = made.snapshot("7", time=made.TIME + day * made.DAY)
        writer.add_snapshot(snapshot, {"disk.img.fidx": content}, chunk_size=CHUNK)
    places = [f"vm/7/{day}/disk.img" for day in (OLD, NEW)]
    place = ("diff", "--datastore-dir", writer.path)
    assert output_of(PBSFS, *place, *places) == (f"M disk.img ({CHUNK} bytes in 1 range: {CHUNK}+{CHUNK})\n")
    counts = output_of(PBSFS, *place, "--stat", *places).splitlines()
    assert f"changed: 1 entry, {CHUNK} bytes" in counts
    nights = output_of(PBSFS, *place, "--stat", *(f"vm/7/{day}" for day in (OLD, NEW))).splitlines()
    assert nights == counts


def test_holes_that_different_keys_made_are_the_same(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    for day, key in enumerate((None, made.KEY)):
        writer.add_snapshot(
            made.snapshot("7", time=made.TIME + day * made.DAY),
            {"disk.img.fidx": made.image(1, "r00r", chunk_size=CHUNK)},
            crypt_mode=CryptMode.NONE if key is None else CryptMode.ENCRYPT,
            key=key,
            chunk_size=CHUNK,
        )
    keyfile = tmp_path / "key.json"
    keyfile.write_bytes(keyfiles.key_file())
    report = diff(writer.path, "--keyfile", str(keyfile), f"vm/7/{OLD}/disk.img", f"vm/7/{NEW}/disk.img")
    assert report["changes"][0]["ranges"] == [
        {"offset": 0, "length": CHUNK},
        {"offset": 3 * CHUNK, "length": CHUNK},
    ]


def test_a_snapshot_has_images_and_configurations(stocked: Stocked) -> None:
    found = changes(diff(stocked.path, FIRST, SECOND))
    assert found == {"drive-scsi0.img": {"size"}, "qemu-server.conf": "removed"}
    assert diff(stocked.path, FIRST, FIRST)["changes"] == []


def test_what_cannot_be_compared_is_refused(stocked: Stocked) -> None:
    done = pbsfs("diff", "--datastore-dir", stocked.path, IMAGE, CONFIGURATION)
    assert "cannot be compared" in error_of(done, 2)
