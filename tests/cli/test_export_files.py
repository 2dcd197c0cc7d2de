"""`pbsfs export files/… DEST`: the vendor's own archives are restored as they were, in every field."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support import golden
from tests.support.needs import need, need_another_user, need_root
from tests.support.program import PBSFS, output_of, pbsfs, run
from tests.support.serving import access, serving
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


@pytest.mark.parametrize("archive", [FIRST, SPLIT], ids=["version-1", "version-2"])
def test_another_user_gets_all_that_a_user_may_set(archive: Archive) -> None:
    need_another_user()
    need("setpriv")
    with TemporaryDirectory() as folder, serving(FILES / "datastore") as server:
        os.chmod(folder, 0o755)  # and a relative path, so that what is above does not matter
        place = Path(folder) / "place"
        place.mkdir()
        os.chown(place, 65534, 65534)
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        command = [*drop, PBSFS, "export", f"files/{archive.path}", "place/out"]
        done = run(command, cwd=folder, env=access(server, HOME=str(place)))
        assert done.returncode == 0
        assert [line.split(":")[1].split(" could not restore ")[1] for line in done.stderr.splitlines()] == [
            f"the owner of {len(truth(archive)) - 8} entries",
            "4 set-user-ID or set-group-ID bits",
            "2 special files (device, FIFO, socket)",
            "the capabilities of 3 files",
        ]
        expected = set()
        for path, entry in truth(archive).items():
            if entry["t"] in (stat.S_IFCHR, stat.S_IFBLK):
                expected.add((path, "is missing"))
            if entry["t"] == stat.S_IFREG and entry["m"] & (stat.S_ISUID | stat.S_ISGID):
                expected.add((path, "m is"))
            if b"security.capability".hex() in entry["x"]:
                expected.add((path, "x is"))
        found = differences(place / "out", archive, but=frozenset("ug"))
        assert len(found) == len(expected) > 5
        for path, what in expected:
            assert any(line.startswith(f"{path!r}") and what in line for line in found)
