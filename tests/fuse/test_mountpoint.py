"""Where may be mounted and what is refused, and how a mount is found and ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.base.errors import MountError
from pbsfs.fuse import mountpoint
from pbsfs.fuse.mountpoint import check_usable, mounted_at, mounts, unmount
from tests.support.mounts import mounted, refusal
from tests.support.needs import need, need_root
from tests.support.program import error_of, pbsfs
from tests.support.stocked import CONFIGURATION, Stocked, stock
from tests.support.waiting import wait_until

NONEMPTY = ("-o", "nonempty")


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory."""
    (path := tmp_path / "place").mkdir()
    return path


@contextmanager
def shown_at(place: Path, *how: str | Path) -> Iterator[Path]:
    """Mounts something else, by arguments of mount(8), at `place`."""
    need_root("mount other file systems")
    need("mount", "umount")
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *how, place], check=True, timeout=30)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=30)


# --- what is refused, with exit status 7 and the reason


def test_a_missing_directory_is_refused_with_what_to_do(stocked: Stocked, tmp_path: Path) -> None:
    text = refusal(tmp_path / "none", "--datastore-dir", stocked.path)
    assert text == f"mount point {tmp_path}/none: No such file or directory; make it with mkdir"


def test_what_is_not_a_directory_is_refused(stocked: Stocked, tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    text = refusal(file, "--datastore-dir", stocked.path)
    assert text == f"mount point {file} is not a directory; name an empty one"
    assert "Not a directory" in refusal(file / "below", "--datastore-dir", stocked.path)


def test_a_directory_that_is_not_empty_is_refused(stocked: Stocked, place: Path) -> None:
    (place / "something").touch()
    text = refusal(place, "--datastore-dir", stocked.path)
    assert text.startswith(f"mount point {place} is not empty")
    assert "-o nonempty" in text


@pytest.mark.parametrize("below", ["", "vm", "vm/100/2023-11-14T22:13:20Z", ".chunks"])
def test_inside_the_datastore_is_refused(stocked: Stocked, below: str) -> None:
    inside = stocked.path / below
    text = refusal(inside, "--datastore-dir", stocked.path, *NONEMPTY)
    assert text.startswith(f"mount point {inside} is inside the datastore {stocked.path}")


def test_an_empty_directory_inside_the_datastore_is_refused(stocked: Stocked) -> None:
    (empty := stocked.path / "host" / "empty").mkdir()
    assert "is inside the datastore" in refusal(empty, "--datastore-dir", stocked.path)


def test_above_the_datastore_is_refused(tmp_path: Path) -> None:
    stocked = stock(tmp_path / "a" / "b" / "datastore")
    for above in (tmp_path / "a" / "b", tmp_path / "a", tmp_path):
        text = refusal(above, "--datastore-dir", stocked.path, *NONEMPTY)
        assert text.startswith(f"mount point {above} contains the datastore {stocked.path}")


def test_symbolic_links_are_no_way_around(stocked: Stocked, tmp_path: Path) -> None:
    (into := tmp_path / "into").symlink_to(stocked.path / "vm")
    (alias := tmp_path / "alias").symlink_to(stocked.path)
    assert "is inside the datastore" in refusal(into, "--datastore-dir", stocked.path, *NONEMPTY)
    assert "is inside the datastore" in refusal(into / "100", "--datastore-dir", stocked.path, *NONEMPTY)
    assert "is inside the datastore" in refusal(stocked.path / "vm", "--datastore-dir", alias, *NONEMPTY)
    assert "contains the datastore" in refusal(tmp_path, "--datastore-dir", alias, *NONEMPTY)


def test_bind_mounts_are_no_way_around(tmp_path: Path) -> None:
    if mounted_at(Path("/")) is None:
        pytest.skip("the root of this environment is no mount (a chroot), so binds can't be told apart")
    stocked = stock(tmp_path / "above" / "datastore")
    source = ("--datastore-dir", stocked.path, *NONEMPTY)
    with shown_at(tmp_path / "whole", "--bind", stocked.path) as whole:
        assert "is inside the datastore" in refusal(whole, *source)
        assert "is inside the datastore" in refusal(whole / "vm" / "100", *source)
        assert "is inside the datastore" in refusal(stocked.path / "vm", "--datastore-dir", whole, *NONEMPTY)
    with shown_at(tmp_path / "part", "--bind", stocked.path / "vm") as part:
        assert "is inside the datastore" in refusal(part, *source)
        assert "is inside the datastore" in refusal(part / "100", *source)
    with shown_at(tmp_path / "parent", "--bind", stocked.path.parent) as parent:
        assert "contains the datastore" in refusal(parent, *source)
        assert "is inside the datastore" in refusal(parent / "datastore" / "ct", *source)


@pytest.mark.mount
def test_beside_the_datastore_is_fine(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "datastore-2") as mount:
        assert (mount / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]


@pytest.mark.mount
def test_what_is_mounted_already_is_refused(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        for options in ((), NONEMPTY):
            text = refusal(mount.place, "--datastore-dir", stocked.path, *options)
            assert text.startswith(f"{mount.place} is already mounted (type fuse.pbsfs)")
        assert (mount / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]


def test_an_empty_file_system_of_another_kind_is_refused_unless_asked(
    stocked: Stocked, tmp_path: Path
) -> None:
    with shown_at(tmp_path / "other", "-t", "tmpfs", "none") as other:
        text = refusal(other, "--datastore-dir", stocked.path)
        assert text.startswith(f"{other} is already mounted (type tmpfs)")
        assert check_usable(other, datastore=stocked.path, nonempty=True) == other


@pytest.mark.mount
def test_what_a_killed_process_left_is_refused_with_the_command_that_clears_it(
    stocked: Stocked, tmp_path: Path
) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        mount.signal(signal.SIGKILL)
        wait_until(mount.is_dead, "the process is gone")
        for options in ((), NONEMPTY):
            text = refusal(mount.place, "--datastore-dir", stocked.path, *options)
            assert "a mount of a process that has died is left here" in text
            assert f"clear it with: pbsfs umount {mount.place} " in text
        assert pbsfs("umount", mount.place).returncode == 0
        with mounted(stocked.path, mount.place) as again:
            assert (again / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]


# --- names


@pytest.mark.mount
@pytest.mark.parametrize("name", ["with space", "comma,and\\backslash", "tab\tand\nnewline", "ünï", "-dash"])
def test_any_name_of_a_directory_can_be_mounted_on(tmp_path: Path, name: str) -> None:
    stocked = stock(tmp_path / f"store {name}")
    with mounted(stocked.path, tmp_path / name) as mount:
        assert (mount / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]
        assert pbsfs("umount", mount.place).returncode == 0
        wait_until(mount.has_ended, "it ends")


@pytest.mark.mount
def test_links_and_relative_paths_name_a_mount_too(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("m")
    for name in ("m", "./m/", "link"):
        with mounted(stocked.path, tmp_path / "m") as mount:
            done = pbsfs("umount", name, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, "")
            wait_until(mount.has_ended, "it ends")


# --- the mount table


def test_the_mount_table_is_read_with_its_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        b"30 22 8:1 /home/a\\040b /mnt/x\\134y rw shared:1 master:2 - ext4 /dev/sda1 rw\n"
        b"31 22 0:50 / /mnt/m\\012\xff ro,nosuid - fuse.pbsfs datastore\\040directory ro\n"
        b"32 22 0:51 / /mnt/x\\134y ro,nosuid - tmpfs none rw\n"
    )
    monkeypatch.setattr(mountpoint, "MOUNTINFO", table)
    assert [(m.device, str(m.root), os.fsencode(m.path), m.type) for m in mounts()] == [
        ("8:1", "/", b"/", "ext4"),
        ("8:1", "/home/a b", b"/mnt/x\\y", "ext4"),
        ("0:50", "/", b"/mnt/m\n\xff", "fuse.pbsfs"),
        ("0:51", "/", b"/mnt/x\\y", "tmpfs"),
    ]
    on_top = mounted_at(Path("/mnt/x\\y"))
    assert on_top is not None
    assert on_top.type == "tmpfs"
    assert mounted_at(Path("/mnt")) is None


# --- ending a mount


def test_an_automount_can_be_mounted_on_and_is_not_looked_into(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that looks into it would wait for the mount that it is to make itself."""
    (place / "file").touch()
    table = place.with_name("mountinfo")
    for kind in ("autofs", "tmpfs"):
        table.write_text(f"1 1 0:9 / {place} rw - {kind} systemd-1 rw,direct\n")
        monkeypatch.setattr(mountpoint, "MOUNTINFO", table)
        if kind == "autofs":
            assert check_usable(place, datastore=None, nonempty=False) == place
        else:
            with pytest.raises(MountError, match="already mounted"):
                check_usable(place, datastore=None, nonempty=False)


def test_what_is_not_mounted_is_not_unmounted(place: Path) -> None:
    with pytest.raises(MountError, match="is not mounted"):
        unmount(place)
    with pytest.raises(MountError, match="missing does not exist"):
        unmount(place / "missing")


def test_what_is_not_ours_is_not_unmounted(tmp_path: Path) -> None:
    with shown_at(tmp_path / "other", "-t", "tmpfs", "none") as other:
        assert "type tmpfs" in error_of(pbsfs("umount", other), 7)
        assert mounted_at(other)


@pytest.mark.mount
def test_only_the_mount_on_top_is_unmounted(stocked: Stocked, tmp_path: Path) -> None:
    with (
        shown_at(tmp_path / "m", "-t", "tmpfs", "none") as place,
        mounted(stocked.path, place, *NONEMPTY) as mount,
    ):
        assert pbsfs("umount", place).returncode == 0
        below = mounted_at(place)
        assert below is not None
        assert below.type == "tmpfs"
        wait_until(lambda: not mount.is_running(), "the process ends")
