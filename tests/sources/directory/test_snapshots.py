"""Listing the snapshots of a directory: unfinished, broken, repaired and unchanged ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from pbsfs.base.names import MANIFEST
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE
from pbsfs.sources.base import GroupInfo
from pbsfs.sources.directory.limits import DirectoryLimits
from pbsfs.sources.directory.root import Root
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.sources.layout import Steps
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.conformance import CONFIG, IMAGE, VM, add
from tests.sources.directory.asking import assert_told_once, groups, instead, snapshots
from tests.support import damage, made
from tests.support.made import KEY, TIME

BREAKAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda m: damage.truncate(m, 0),
    "cut short": lambda m: damage.truncate(m, 100),
    "a bit flipped": lambda m: damage.flip_bit(m, 8 * 60 + 3),
    "not a blob": lambda m: damage.replace(m, b"{}" * 50),
    "not JSON": lambda m: damage.replace(m, blob.encode(b"\0" * 9)),
    "not a manifest": lambda m: damage.replace(m, blob.encode(b'{"files": 1}')),
    "encrypted": lambda m: damage.replace(m, blob.encode(b"{}", key=KEY)),
    "too large": lambda m: os.truncate(m, blob.stored_limit(MAX_MANIFEST_SIZE) + 1),
    "a bomb": lambda m: damage.replace(m, blob.encode(b" " * (MAX_MANIFEST_SIZE + 1))),
    "a looping link": lambda m: instead(m).symlink_to(m.name),
    "a dangling link": lambda m: instead(m).symlink_to("nowhere"),
    "a directory": lambda m: instead(m).mkdir(),
    "a FIFO": lambda m: os.mkfifo(instead(m)),
}


@pytest.mark.parametrize("break_it", [pytest.param(work, id=name) for name, work in BREAKAGES.items()])
def test_a_manifest_that_cannot_be_read_is_shown_as_such_and_told_once(
    neighbours: list[Path],
    writer: DatastoreWriter,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Path], object],
) -> None:
    break_it(neighbours[1] / MANIFEST.filename)
    source = DirectorySource(writer.path)
    for _turn in range(3):
        before, broken, after = snapshots(source)

        assert (len(before.files), len(after.files)) == (4, 4)
        assert (before.error, after.error) == (None, None)
        assert broken.files == ()
        assert broken.error
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_a_snapshot_without_a_manifest_is_left_out_and_told_once(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    (neighbours[1] / MANIFEST.filename).unlink()
    source = DirectorySource(writer.path)
    for _turn in range(3):
        assert [info.snapshot.time for info in snapshots(source)] == [TIME, TIME + 2]
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_an_unfinished_backup_is_neither_counted_nor_the_last(
    neighbours: list[Path], writer: DatastoreWriter
) -> None:
    for unfinished in (neighbours[0], neighbours[2]):
        (unfinished / MANIFEST.filename).unlink()
    (neighbours[2] / IMAGE.filename).rename(neighbours[2] / "disk.img.tmp_fidx")
    assert groups(DirectorySource(writer.path)) == [GroupInfo(VM, TIME + 1, 1, "root@pam")]
    source = DirectorySource(writer.path, DirectoryLimits(looks=0))  # then the newest is right still
    assert groups(source) == [GroupInfo(VM, TIME + 1, 2, "root@pam")]


def test_a_group_whose_only_backup_is_unfinished_has_none(
    writer: DatastoreWriter,
) -> None:
    (add(writer) / MANIFEST.filename).unlink()
    assert groups(DirectorySource(writer.path)) == [GroupInfo(VM, None, 0, "root@pam")]


def test_what_is_in_the_trash_is_left_out(neighbours: list[Path], writer: DatastoreWriter) -> None:
    add(writer, made.snapshot("101"))
    (neighbours[2] / ".trashed").touch()
    (writer.path / "vm" / "101" / ".trashed").touch()
    (writer.path / "vm" / ".trash").mkdir()
    source = DirectorySource(writer.path)
    assert [info.snapshot.time for info in snapshots(source)] == [TIME, TIME + 1]
    assert groups(source) == [GroupInfo(VM, TIME + 1, 2, "root@pam")]


def test_concurrent_listings_tell_of_a_broken_snapshot_once(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    damage.truncate(neighbours[1] / MANIFEST.filename, 20)
    source = DirectorySource(writer.path)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _turn in range(40):
                nursery.start_soon(source.snapshots, VM)

    trio.run(main)
    assert_told_once(caplog, str(VM.snapshot(TIME + 1)))


def test_a_snapshot_that_was_repaired_is_read_again(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = neighbours[1] / MANIFEST.filename
    whole = manifest.read_bytes()
    damage.flip_bit(manifest, 100)
    source = DirectorySource(writer.path)
    assert snapshots(source)[1].error
    damage.replace(manifest, whole)

    assert [info.error for info in snapshots(source)] == [None] * 3
    caplog.clear()


def test_a_file_that_the_manifest_names_but_is_missing_is_told_once(
    neighbours: list[Path], writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    (neighbours[1] / CONFIG.filename).unlink()
    source = DirectorySource(writer.path)
    for _turn in range(2):
        assert [len(info.files) for info in snapshots(source)] == [4, 4, 4]
    assert_told_once(caplog, f"{VM.snapshot(TIME + 1)}: {CONFIG} is in the manifest, but missing")


def test_a_file_of_an_unknown_kind_is_told_once_and_its_neighbours_are_listed(
    writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
) -> None:
    path = add(writer) / MANIFEST.filename
    text = blob.decode(path.read_bytes(), max_size=1 << 20)
    path.write_bytes(blob.encode(text.replace(CONFIG.filename.encode(), b"x\\nstate.zst")))
    source = DirectorySource(writer.path)
    for _turn in range(2):
        assert {file.archive.filename for info in snapshots(source) for file in info.files} == {
            "disk.img.fidx",
            "root.pxar.didx",
            "index.json.blob",
        }
    assert_told_once(caplog, r"'x\nstate.zst'")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in order."""
    names: list[str] = []
    real = Root.read_file

    def read_file(root: Root, steps: Steps, limit: int) -> bytes:
        names.append(steps[-1])
        return real(root, steps, limit)

    monkeypatch.setattr(Root, "read_file", read_file)
    return names


@pytest.mark.parametrize(("limit", "parsed_again"), [(4, 6), (5, 6), (6, 0), (7, 0)])
def test_parsed_manifests_are_kept_up_to_a_limit_and_none_is_ever_mixed_up(
    writer: DatastoreWriter, read: list[str], limit: int, parsed_again: int
) -> None:
    for number in range(6):
        writer.add_snapshot(VM.snapshot(TIME + number), {}, notes=f"number {number}")
    source = DirectorySource(writer.path, DirectoryLimits(parsed_manifests=limit))
    for count in (6, parsed_again):
        read.clear()
        assert [info.notes for info in snapshots(source)] == [f"number {number}" for number in range(6)]
        assert read.count(MANIFEST.filename) == count


def test_an_unchanged_manifest_is_parsed_once(writer: DatastoreWriter, read: list[str]) -> None:
    add(writer)
    source = DirectorySource(writer.path)
    first = snapshots(source)
    read.clear()
    assert [info.files for info in snapshots(source)] == [info.files for info in first]
    assert read == ["owner"]
