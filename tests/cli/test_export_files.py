"""`pbsfs export files/… DEST`: the vendor's own archives are restored as they were, in every field."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.needs import need_root
from tests.support.program import PBSFS, output_of, pbsfs
from tests.support.truth import ARCHIVES, FILES, Archive, differences, truth

pytestmark = pytest.mark.golden

KEY = str(golden.ROOT / "keys" / "plain.json")
FIRST = ARCHIVES[0]
SPLIT = ARCHIVES[2]


def export(path: str, dest: Path, *options: str) -> None:
    place = ["--datastore-dir", str(FILES / "datastore"), "--keyfile", KEY]
    assert output_of(PBSFS, "export", *place, *options, f"files/{path}", str(dest)) == ""


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.path)
def test_every_field_of_every_entry_is_as_it_was(archive: Archive, tmp_path: Path) -> None:
    need_root("restore owners and devices")
    export(archive.path, tmp_path / "copy")
    assert len(truth(archive)) > 20
    assert differences(tmp_path / "copy", archive) == []


@pytest.mark.parametrize("archive", [FIRST, SPLIT], ids=["version-1", "version-2"])
def test_a_directory_and_a_file_of_an_archive_are_restored_alone(archive: Archive, tmp_path: Path) -> None:
    need_root("restore owners and devices")
    export(f"{archive.path}/etc", tmp_path / "etc")
    below = Archive(archive.path, archive.truth, below=b"etc")
    assert differences(tmp_path / "etc", below, but=frozenset("n")) == []
    file = next(path for path, entry in truth(below).items() if path and "h" in entry and entry["n"] == 1)
    export(f"{archive.path}/etc/{os.fsdecode(file)}", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "etc" / os.fsdecode(file)).read_bytes()
    assert (tmp_path / "one").stat().st_mtime_ns == truth(below)[file]["mt"]
    assert (tmp_path / "one").stat().st_mode & 0o7777 == truth(below)[file]["m"]


def test_sparse_files_stay_sparse(tmp_path: Path) -> None:
    for archive in (FIRST, SPLIT):
        export(archive.path, tmp_path / "copy")
        large = [path for path, entry in truth(archive).items() if "h" in entry and entry["s"] > 4 << 20]
        sparse = [
            path
            for path in large
            if os.lstat(os.path.join(os.fsencode(tmp_path / "copy"), path)).st_blocks * 512
            < truth(archive)[path]["s"] // 2
        ]
        assert sparse
        shutil.rmtree(tmp_path / "copy")


def test_without_its_key_nothing_is_restored(tmp_path: Path) -> None:
    encrypted = next(archive for archive in ARCHIVES if archive.key)
    done = pbsfs(
        "export", "--datastore-dir", FILES / "datastore", f"files/{encrypted.path}", tmp_path / "copy"
    )
    assert done.returncode == 5
    assert not list(tmp_path.iterdir())
