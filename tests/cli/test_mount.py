"""`pbsfs mount`, as far as the command line goes: what it accepts, and how it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.fuse.inodes import ROOT
from pbsfs.fuse.mountpoint import mounted_at
from tests.support.mounts import cleaned_up, mounted, serving
from tests.support.needs import need_autofs, need_fuse, need_root
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.stocked import CONFIGURATION, FIRST, IMAGE, NEWER_IMAGE, SECOND, Stocked, stock
from tests.support.waiting import wait_until


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    (tmp_path / "m").mkdir()
    return stock(tmp_path / "datastore")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-o", "uid=me"], "uid=me"),
        (["-o", "umask=8"], "umask=8"),
        (["-o", "fancy"], "fancy"),
        (["-o", "rw"], "read-only"),
        (["-o", "ro,remount"], "remount"),
        (["--cache-size", "lots"], "lots"),
        (["--cache-size", "1M"], "least is 32M"),
        (["--ns", "a//b"], "name of a namespace"),
    ],
)
def test_wrong_options_are_status_2(
    stocked: Stocked, tmp_path: Path, options: list[str], reason: str
) -> None:
    for way in ([], ["--foreground"]):
        done = pbsfs("mount", "--datastore-dir", stocked.path, *way, *options, tmp_path / "m")
        assert reason in error_of(done, 2)
    assert not mounted_at(tmp_path / "m")


def test_a_source_has_to_be_named(tmp_path: Path) -> None:
    (place := tmp_path / "m").mkdir()
    assert "--datastore-dir or PBSFS_DATASTORE_DIR" in error_of(pbsfs("mount", place), 2)


@pytest.mark.mount
def test_a_dash_before_the_mount_point_is_no_option(stocked: Stocked, tmp_path: Path) -> None:
    need_fuse()
    (place := tmp_path / "-o").mkdir()
    with cleaned_up(place):
        log = tmp_path / "log"
        done = pbsfs("mount", "--log-file", log, "--datastore-dir", stocked.path, "--", "-o", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert (place / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]
        assert pbsfs("umount", "--", "-o", cwd=tmp_path).returncode == 0


@pytest.mark.mount
def test_in_the_foreground_it_logs_to_standard_error_and_ends_with_the_mount(
    stocked: Stocked, tmp_path: Path
) -> None:
    need_fuse()
    place = tmp_path / "m"
    command = [PBSFS, "mount", "-f", "--log-level", "info", "--datastore-dir", str(stocked.path), str(place)]
    with (
        cleaned_up(place),
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process,
    ):
        try:
            wait_until((place / "vm").exists, "it is mounted")
            assert pbsfs("umount", place).returncode == 0
            _nothing, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"{place} was unmounted" in errors


@pytest.mark.mount
def test_without_a_log_file_or_syslog_the_log_is_a_file_of_the_users(
    stocked: Stocked, tmp_path: Path
) -> None:
    need_fuse()
    if os.path.exists("/dev/log"):
        pytest.skip("there is a syslog here")
    place, state = tmp_path / "m", tmp_path / "state"
    with cleaned_up(place):
        done = pbsfs(
            *("mount", "--datastore-dir", stocked.path, "--log-level", "info", place),
            env=environment(XDG_STATE_HOME=str(state)),
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert pbsfs("umount", place).returncode == 0
        log = state / "pbsfs" / "log" / "mount.log"
        wait_until(lambda: log.exists() and "was unmounted" in log.read_text(), "the log tells of the end")


@pytest.mark.mount
def test_the_end_of_the_callers_terminal_does_not_end_the_mount(stocked: Stocked, tmp_path: Path) -> None:
    need_root("look into a process that keeps its memory to itself")
    with mounted(stocked.path, tmp_path / "m") as mount:
        status = Path(f"/proc/{mount.pid}/stat").read_text().rpartition(")")[2].split()
        assert int(status[3]) == mount.pid  # leads a session of its own
        assert int(status[4]) == 0  # without a terminal
        assert {os.readlink(f"/proc/{mount.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
        assert os.readlink(f"/proc/{mount.pid}/cwd") == "/"
        mount.signal(signal.SIGTERM)
        wait_until(mount.has_ended, "it ends")


def test_modules_in_the_current_directory_are_not_run(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('a stranger ran')\n")
    (tmp_path / "pbsfs").mkdir()
    place = tmp_path / "mnt"
    place.mkdir()
    with cleaned_up(place):
        done = pbsfs("mount", "--datastore-dir", stocked.path, place, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.mount
def test_secrets_that_are_not_used_are_not_inherited_either(stocked: Stocked, tmp_path: Path) -> None:
    need_root("look into a process that keeps its memory to itself")
    names = ("PBS_PASSWORD", "PBS_ENCRYPTION_PASSWORD", "PBS_MASTER_KEY_PASSWORD")
    told = environment(PBSFS_DATASTORE_DIR=str(stocked.path), **dict.fromkeys(names, "geheim"))
    with mounted(told, tmp_path / "m") as mount:
        seen = Path(f"/proc/{mount.pid}/environ").read_bytes()
        assert b"PATH=" in seen
        assert b"geheim" not in seen


@pytest.mark.mount
def test_a_directory_of_the_environment_is_kept_apart_from_the_mount_point(stocked: Stocked) -> None:
    (place := stocked.path / "m").mkdir()
    done = pbsfs("mount", place, env=environment(PBSFS_DATASTORE_DIR=str(stocked.path)))
    assert "is inside the datastore" in error_of(done, 7)


def test_a_part_of_the_tree_can_be_the_root(stocked: Stocked, tmp_path: Path) -> None:
    options = ["--subtree", "/vm/100/latest/", "-o", "fsname=a\\,b \\\\ c"]
    with mounted(stocked.path, tmp_path / "m", *options) as mount:
        assert os.listdir(mount.place) == output_of(PBSFS, "ls", mount.place).split()
        assert "drive-scsi0.img" in os.listdir(mount.place)
        assert (mount / "drive-scsi0.img").read_bytes() == stocked.contents[NEWER_IMAGE]
        assert os.stat(mount.place).st_ino == ROOT
        assert NEWER_IMAGE in output_of(PBSFS, "info", mount / "drive-scsi0.img")
        shown = output_of("findmnt", "-n", "-o", "SOURCE", "--raw", mount.place)
        assert shown == "a,b\\x20\\x5c\\x20c\n"


def test_the_mount_table_names_the_part_of_the_tree(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--subtree", "vm/100") as mount:
        shown = output_of("findmnt", "-n", "-o", "SOURCE,FSTYPE", "--raw", mount.place)
        assert shown == f"datastore\\x20directory\\x20{stocked.path}:vm/100 fuse.pbsfs\n"
        assert sorted(os.listdir(mount.place)) == sorted(
            [*(path.rpartition("/")[2] for path in (FIRST, SECOND)), "latest"]
        )
        assert (mount / "latest/drive-scsi0.img").read_bytes() == stocked.contents[NEWER_IMAGE]


@pytest.mark.parametrize(
    ("subtree", "status", "reason"),
    [
        ("vm/4711", 3, "vm: there is no '4711'"),
        (IMAGE, 2, f"{IMAGE} is not a directory; mount the directory that it is in"),
        ("vm/../ct", 2, "'..' has no meaning here"),
    ],
)
def test_only_a_directory_of_the_tree_can_be_the_root(
    stocked: Stocked, tmp_path: Path, subtree: str, status: int, reason: str
) -> None:
    for way in ([], ["--foreground"]):
        done = pbsfs("mount", "--datastore-dir", stocked.path, *way, "--subtree", subtree, tmp_path / "m")
        assert reason in error_of(done, status)
    assert not mounted_at(tmp_path / "m")


AUTOFS_READY = 0x9360  # AUTOFS_IOC_READY of linux/auto_fs.h: the mount is there, for those that wait


@contextmanager
def automount(place: Path) -> Iterator[int]:
    """A direct automount at `place`, of which the processes of this group are the daemon.

    Yields the pipe with the kernel's requests. Source: the kernel's Documentation/filesystems/autofs.rst.
    """
    reading, writing = os.pipe()
    options = f"fd={writing},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    command = ["mount", "-i", "-t", "autofs", "-o", options, "tests", str(place)]
    try:
        subprocess.run(command, pass_fds=[writing], check=True)
        os.close(writing)
        try:
            yield reading
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    finally:
        os.close(reading)  # sets free what waits


@pytest.mark.mount
@pytest.mark.root
def test_an_automount_can_be_mounted_on_for_a_program_that_waits(stocked: Stocked, tmp_path: Path) -> None:
    """As systemd does it for x-systemd.automount, with mount(8) in its own process group."""
    need_autofs()
    need_fuse()
    place = tmp_path / "m"
    with automount(place) as requests, cleaned_up(place):
        daemon = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        with subprocess.Popen(["ls", place], stdout=subprocess.PIPE, start_new_session=True) as waiting:
            try:
                token = int.from_bytes(os.read(requests, 4096)[8:12], sys.byteorder)
                command = ("mount", "--datastore-dir", stocked.path, "--log-file", tmp_path / "log", place)
                done = pbsfs(*command, timeout=20)
                assert (done.returncode, done.stderr) == (0, "")
                fcntl.ioctl(daemon, AUTOFS_READY, token)
                shown, _nothing = waiting.communicate(timeout=20)
            finally:
                os.close(daemon)
                waiting.kill()
        assert b"vm" in shown.split()
        (pid,) = serving(place)
        assert os.getsid(pid) == pid  # the end of the caller's terminal does not end it
        assert pbsfs("umount", place).returncode == 0
