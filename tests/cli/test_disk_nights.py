"""`pbsfs find`, `diff`, `versions` and `verify` of files in disk images, over the nights of a machine."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from pbsfs.disks.host import MOST_PROCESSES
from pbsfs.formats.index import FixedIndex
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tasks.find import Condition, Match, Search
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Directory, Tree
from tests.support import made
from tests.support.disks import ext4_of, partitioned
from tests.support.program import PBSFS, error_of, output_of, pbsfs

DAYS = [f"2023-11-{14 + day}T22:13:20Z" for day in range(3)]
NIGHTS = [f"files/vm/100/{day}" for day in DAYS]
FSTAB = "LABEL=none /srv ext4 rw 0 2\n"


def tree(place: Path, files: dict[str, str]) -> Path:
    """A directory with `files`, whose times say nothing of when it was made."""
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    for made_now in [*place.rglob("*"), place]:
        os.utime(made_now, (made.TIME, made.TIME))
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three nights: files changed in the second, and the disk has partitions in the third."""
    place = tmp_path_factory.mktemp("nights")
    old = {"etc/fstab": FSTAB, "etc/hosts": "one\n", "etc/old": "", "same": "s" * 5000}
    new = {"etc/fstab": FSTAB + "# more\n", "etc/hosts": "two\n", "etc/new": "", "same": "s" * 5000}
    first = ext4_of(tree(place / "first", old), place / "one.img")
    second = ext4_of(tree(place / "second", new), place / "two.img")
    writer = DatastoreWriter(place / "store")
    for night, image in enumerate([first, second, partitioned(second)]):
        snapshot = made.snapshot(time=made.TIME + night * made.DAY)
        writer.add_snapshot(snapshot, {"drive-scsi0.img.fidx": image}, chunk_size=1 << 20)
    return writer.path


def without_table(store: Path, place: Path) -> Path:
    """A copy of the datastore in which the partition table of the last night is damaged."""
    shutil.copytree(store, place)
    writer = DatastoreWriter(place)
    last = writer.snapshot_path(made.snapshot(time=made.TIME + 2 * made.DAY))
    index = FixedIndex((last / "drive-scsi0.img.fidx").read_bytes())
    writer.chunk_path(index.digest(0)).unlink()
    return place


def rows_of(store: Path, *arguments: str, status: int = 0) -> Any:
    done = pbsfs(*arguments, "--json", "--datastore-dir", store)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def changes(report: dict[str, Any]) -> dict[str, Any]:
    return {row["path"]: row.get("fields") or row["change"] for row in report["changes"]}


def test_find_reports_each_file_of_a_disk_once(store: Path) -> None:
    found = output_of(PBSFS, "find", "--datastore-dir", store, "--name", "fstab", "files/vm").splitlines()
    volumes = ["scsi0", "scsi0", "scsi0-p1"]
    assert found == [f"{night}/{volume}/etc/fstab" for night, volume in zip(NIGHTS, volumes, strict=True)]
    for place in (f"{NIGHTS[0]}/guest", f"{NIGHTS[0]}/guest/etc"):
        found = output_of(PBSFS, "find", "--datastore-dir", store, "--name", "fstab", place).splitlines()
        assert found == [f"{NIGHTS[0]}/guest/etc/fstab"]


def test_diff_of_two_nights_in_files_compares_the_files_on_the_disks(store: Path) -> None:
    expected = {
        "scsi0/etc/fstab": ["size"],
        "scsi0/etc/new": "added",
        "scsi0/etc/old": "removed",
    }
    assert changes(rows_of(store, "diff", NIGHTS[0], NIGHTS[1])) == expected
    found = changes(rows_of(store, "diff", "--content", NIGHTS[0], NIGHTS[1]))
    assert found == expected | {"scsi0/etc/hosts": ["content"]}
    inside = changes(rows_of(store, "diff", f"{NIGHTS[0]}/guest", f"{NIGHTS[1]}/guest"))
    assert inside == {path.removeprefix("scsi0/"): how for path, how in expected.items()}


def test_info_on_a_guest_shows_no_size_of_a_volume(store: Path) -> None:
    assert "archive_size" not in rows_of(store, "info", f"{NIGHTS[0]}/guest")
    assert int(rows_of(store, "info", f"{NIGHTS[0]}/scsi0")["archive_size"]) > 0


def test_diff_of_two_nights_beside_files_compares_the_images(store: Path) -> None:
    found = rows_of(store, "diff", f"vm/100/{DAYS[0]}", f"vm/100/{DAYS[1]}")
    (row,) = found["changes"]
    assert row["path"] == "drive-scsi0.img"
    assert row["ranges"]


def test_diff_lists_other_volumes_on_the_same_disk(store: Path) -> None:
    assert changes(rows_of(store, "diff", NIGHTS[1], NIGHTS[2])) == {
        "scsi0": "removed",
        "scsi0-p1": "added",
        "scsi0-p2.txt": "added",
    }


def test_versions_of_a_file_on_a_disk(store: Path) -> None:
    rows = rows_of(store, "versions", "files/vm/100/latest/scsi0/etc/fstab")
    assert [(row["first"], row["exists"], row.get("changes")) for row in rows] == [
        (DAYS[0], True, []),
        (DAYS[1], True, ["size"]),
        (DAYS[2], False, None),
    ]
    rows = rows_of(store, "versions", "--content", "files/vm/100/latest/guest/etc/hosts")
    assert [(row["first"], row["snapshots"], row["changes"]) for row in rows] == [
        (DAYS[0], 1, []),
        (DAYS[1], 2, ["content"]),
    ]


@pytest.mark.parametrize("place", ["", "/scsi0", "/guest"])
def test_diff_takes_nothing_for_removed_that_damage_may_hide(store: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(store, tmp_path / "store")
    writer = DatastoreWriter(tmp_path / "store")
    second = writer.snapshot_path(made.snapshot(time=made.TIME + made.DAY))
    index = FixedIndex((second / "drive-scsi0.img.fidx").read_bytes())
    writer.chunk_path(index.digest(1)).unlink()  # it has the directories, and not the superblock
    done = pbsfs("diff", "--datastore-dir", writer.path, NIGHTS[0] + place, NIGHTS[1] + place)
    assert done.returncode == 6
    assert not [line for line in done.stdout.splitlines() if line.startswith(("-", "+"))], done.stdout
    (line,) = done.stderr.splitlines()
    assert "missing" in line
    assert not line.startswith("pbsfs: :")


def test_what_cannot_be_read_is_not_taken_for_absent(store: Path, tmp_path: Path) -> None:
    damaged = without_table(store, tmp_path / "store")
    report = rows_of(damaged, "diff", NIGHTS[1], NIGHTS[2], status=6)
    assert changes(report) == {}
    rows = rows_of(damaged, "versions", f"{NIGHTS[1]}/scsi0/etc/old", status=6)
    assert [(row["first"], row["last"], row["exists"]) for row in rows] == [
        (DAYS[0], DAYS[0], True),
        (DAYS[1], DAYS[1], False),
    ]
    # What is not read may have the file too.
    done = pbsfs("versions", "--datastore-dir", store, f"{NIGHTS[2]}/scsi0-p2/etc/hosts")
    assert done.returncode == 6
    assert f"{NIGHTS[2]}: scsi0-p2.txt: luks: encrypted" in done.stderr


def test_versions_sends_a_path_beside_files_there(store: Path) -> None:
    done = pbsfs("versions", "--datastore-dir", store, "vm/100/latest/scsi0/etc/hosts")
    hint = f"the files on its disks are below {NIGHTS[2]}"
    assert error_of(done, 3).endswith(f"there is no 'scsi0'; there is drive-scsi0.img, index.json; {hint}")


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--format", "tar")])
def test_a_snapshot_is_not_restored_without_its_files(
    store: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Only the manifest would be left of it."""
    done = pbsfs("export", *options, "--datastore-dir", store, NIGHTS[2], tmp_path / "restored")
    problem = "pbsfs exports one archive or volume at a time"
    there = f"{NIGHTS[2]}/scsi0-p1, {NIGHTS[2]}/guest"
    assert error_of(done, 2) == f"{NIGHTS[2]}: {problem}; name one: {there}"
    assert not (tmp_path / "restored").exists()


def test_verify_counts_each_file_of_a_disk_once(store: Path) -> None:
    report = rows_of(store, "verify", NIGHTS[0])
    assert (report["files"], report["damaged"]) == (5, [])  # four on the volume, and the manifest


class Started:
    """The parser processes that were started since. `at_once`: how many of them ran at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.at_once = 0
        self._start = subprocess.Popen
        monkeypatch.setattr("pbsfs.disks.host.subprocess.Popen", self._starting)

    def _starting(self, *arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = self._start(*arguments, **options)
        self.processes.append(process)
        self.at_once = max(self.at_once, sum(one.poll() is None for one in self.processes))
        return process


def test_find_over_many_nights_runs_few_processes_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ext4_of(tree(tmp_path / "tree", {"etc/fstab": FSTAB}), tmp_path / "image", size=4 << 20)
    writer = DatastoreWriter(tmp_path / "store")
    nights = MOST_PROCESSES + 4
    for night in range(nights):
        snapshot = made.snapshot(time=made.TIME + night * made.DAY)
        writer.add_snapshot(snapshot, {"drive-scsi0.img.fidx": image})
    started = Started(monkeypatch)
    matches: list[Match] = []

    async def find() -> None:
        async with open_reader(DirectorySource(writer.path)) as reader:
            shown = Tree(reader, files=True)
            search = Search(Condition(names=(re.compile(b"fstab"),)))
            await search.run([await shown.find("files/vm")], matches.extend)
            assert search.failed == []

    trio.run(find)
    gc.collect()
    assert len(matches) == nights
    assert started.at_once <= MOST_PROCESSES
    assert len(started.processes) == nights
    assert all(process.returncode is not None for process in started.processes)


def test_a_snapshot_that_many_look_into_opens_its_disks_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch)

    async def look() -> None:
        async with open_reader(DirectorySource(store)) as reader:
            snapshot = await Tree(reader, files=True).find(NIGHTS[0])
            assert isinstance(snapshot, Directory)
            async with trio.open_nursery() as nursery:
                for _task in range(4):
                    nursery.start_soon(snapshot.children)
            assert set(await snapshot.children()) == {b"guest", b"index.json", b"scsi0"}

    trio.run(look)
    assert len(started.processes) == 1
