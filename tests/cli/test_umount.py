"""`pbsfs umount`, as far as the command line goes; tests/fuse has what it does to mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mounts import mounted, opened
from tests.support.program import error_of, pbsfs
from tests.support.stocked import IMAGE, Stocked
from tests.support.waiting import wait_until


def test_what_is_not_mounted_is_status_7(tmp_path: Path) -> None:
    assert error_of(pbsfs("umount", tmp_path), 7).startswith(f"{tmp_path} is not mounted; ")
    assert error_of(pbsfs("umount", tmp_path / "none"), 7).startswith(f"{tmp_path}/none does not exist; ")


def test_other_file_systems_are_left_alone() -> None:
    text = error_of(pbsfs("umount", "--lazy", "/proc"), 7)
    assert text.startswith("/proc is not a pbsfs mount (type proc); ")


@pytest.mark.mount
def test_the_mounts_that_it_would_end_are_named(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        for other in ("/", tmp_path, tmp_path / "none"):
            text = error_of(pbsfs("umount", other), 7)
            assert "name a mount point of pbsfs: " in text
            assert str(mount.place) in text or "in all)" in text


@pytest.mark.mount
def test_a_busy_mount_stays_and_the_way_out_is_named(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        with opened(mount / IMAGE):
            text = error_of(pbsfs("umount", mount.place), 7)
            assert text.startswith(f"cannot unmount {mount.place}: ")
            assert text.endswith("; close what is open there, or use --lazy")
            assert mount.is_mounted()
            done = pbsfs("umount", "--lazy", mount.place)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert not mount.is_mounted()
        wait_until(mount.has_ended, "it ends with the last open file")


@pytest.mark.mount
def test_a_path_inside_a_mount_is_not_the_mount(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert "is not mounted" in error_of(pbsfs("umount", mount / "vm"), 7)
        assert mount.is_mounted()
