"""The files in the vendor's own archives, through a mount: every field of every entry."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.mounts import Mounted, fails_with, mounted
from tests.support.program import output_of
from tests.support.truth import ARCHIVES, FILES, Archive, differences, names_below, truth

pytestmark = [pytest.mark.golden, pytest.mark.mount]

KEY = str(golden.ROOT / "keys" / "plain.json")
FIRST = ARCHIVES[0]

each_archive = pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.path)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    place = tmp_path_factory.mktemp("files") / "m"
    with mounted(
        FILES / "datastore", place, "--keyfile", KEY, "-o", "noignore_permissions", files=True
    ) as found:
        yield found


@each_archive
def test_every_field_of_every_entry_is_as_it_was(mount: Mounted, archive: Archive) -> None:
    assert len(truth(archive)) > 20
    assert differences(mount / f"files/{archive.path}", archive) == []


@each_archive
def test_a_copy_is_as_it_was(mount: Mounted, archive: Archive, tmp_path: Path) -> None:
    output_of("cp", "-a", str(mount / f"files/{archive.path}"), str(tmp_path / "copy"))
    assert differences(tmp_path / "copy", archive) == []


def test_tar_restores_what_was(mount: Mounted, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    form = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner"]
    with subprocess.Popen(
        ["tar", "-C", mount / f"files/{FIRST.path}", "-c", "--format=pax", *form, "."], stdout=subprocess.PIPE
    ) as packing:
        subprocess.run(
            ["tar", "-C", tmp_path / "copy", "-xp", *form], stdin=packing.stdout, check=True, timeout=60
        )
    # GNU tar warns of sockets and leaves them out.
    left_out = {f"{path!r} is missing" for path, entry in truth(FIRST).items() if entry["t"] == 0o140000}
    assert left_out
    assert set(differences(tmp_path / "copy", FIRST)) == left_out


def test_the_tree_beside_files_stays_as_it_is(mount: Mounted) -> None:
    assert set(os.listdir(mount.place)) == {"ct", "files", "host", "vm"}
    assert set(os.listdir(mount / "ct/210/latest")) == {
        "pct.conf",
        "root.pxar",
        "catalog.pcat1",
        "index.json",
    }
    assert set(os.listdir(mount / "files/ct/210/latest")) == {"pct.conf", "root", "index.json"}


def test_files_are_left_out_where_nobody_wants_them(tmp_path: Path) -> None:
    with mounted(FILES / "datastore", tmp_path / "m", "-o", "nofiles", files=True) as plain:
        assert set(os.listdir(plain.place)) == {"ct", "host", "vm"}
        assert fails_with(errno.ENOENT, lambda: os.listdir(plain / "files"))


def test_where_permissions_are_ignored_all_files_belong_to_the_owner_of_the_mount(tmp_path: Path) -> None:
    with mounted(
        FILES / "datastore", tmp_path / "m", "-o", "ignore_permissions,uid=1234,gid=4321", files=True
    ) as other:
        root = other / f"files/{FIRST.path}"
        for path, entry in truth(FIRST).items():
            status = os.lstat(os.path.join(os.fsencode(root), path))
            assert (status.st_uid, status.st_gid) == (1234, 4321)
            if entry["t"] != 0o120000:
                readable = 0o500 if entry["t"] == 0o040000 else 0o400
                assert status.st_mode & 0o7777 == entry["m"] | readable


def test_without_its_key_an_archive_is_shown_but_not_opened(tmp_path: Path) -> None:
    with mounted(FILES / "datastore", tmp_path / "m", files=True) as keyless:
        snapshot = keyless / "files/host/laptop/2024-11-07T17:20:00Z"
        assert "home" in os.listdir(snapshot)
        assert os.lstat(snapshot / "home").st_mode & 0o170000 == 0o040000
        assert fails_with(errno.EACCES, lambda: os.listdir(snapshot / "home"))
        assert any("a8:f4" in line or "key" in line for line in keyless.log_lines())


def test_the_archive_of_excluded_files_has_the_list_of_them(mount: Mounted) -> None:
    (archive,) = [archive for archive in ARCHIVES if archive.excluded]
    root = mount / f"files/{archive.path}"
    assert b".pxarexclude-cli" in names_below(root)
    assert (root / ".pxarexclude-cli").read_text().splitlines() == ["*.log", "/many/file-0000*"]
