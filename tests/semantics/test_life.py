"""What docs/semantics.md promises from mount to umount: a test for each promise, by its name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support.mounts import cleaned_up, fails_with, mounted, opened, refusal
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.server import ReferenceServer
from tests.support.serving import SECRET, TOKEN, access, serving
from tests.support.stocked import (
    CHUNK,
    CONFIGURATION,
    IMAGE,
    Stocked,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


def test_mount_returns_when_it_answers(own: Stocked, tmp_path: Path) -> None:
    place = tmp_path / "m"
    for _ in range(3):
        with mounted(own.path, place):  # which sees to the status
            assert mounted_at(place)
            assert (place / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]


def test_mount_failures_have_a_reason_and_a_status(own: Stocked, tmp_path: Path) -> None:
    (place := tmp_path / "m").mkdir()
    (empty := tmp_path / "empty").mkdir()
    source = ("--datastore-dir", own.path)

    def refused(status: int, *arguments: str | Path) -> str:
        with cleaned_up(place):
            text = error_of(pbsfs("mount", "--log-file", os.devnull, *arguments), status)
            assert not mounted_at(place)
        return text

    assert "rw" in refused(2, *source, "-o", "rw", place)
    assert "16M" in refused(2, *source, "--cache-size", "16M", place)
    assert "--datastore-dir" in refused(2, place)
    assert "nowhere" in refused(3, *source, "--ns", "nowhere", place)
    assert "nowhere" in refused(3, *source, "--ns", "nowhere", "--foreground", place)
    assert str(empty) in refused(4, "--datastore-dir", empty, place)
    assert "not a directory" in refused(7, *source, own.path / ".chunks" / ".." / f"{IMAGE}.fidx")
    with serving(own.path) as server, cleaned_up(place):
        for told, status in ((access(server, secret="wrong"), 10), (access(server, PBS_FINGERPRINT=""), 12)):
            told["XDG_CONFIG_HOME"] = str(tmp_path)
            error_of(pbsfs("mount", "--log-file", os.devnull, place, env=told), status)
            assert not mounted_at(place)


def test_mount_points_in_the_way_are_refused(own: Stocked, tmp_path: Path) -> None:
    source = ("--datastore-dir", own.path)
    file = tmp_path / "file"
    file.touch()
    assert "not a directory" in refusal(file, *source)
    assert "is inside the datastore" in refusal(own.path / "vm/100", *source, "-o", "nonempty")
    assert "contains the datastore" in refusal(tmp_path, *source, "-o", "nonempty")
    (full := tmp_path / "full").mkdir()
    (full / "file").touch()
    assert "is not empty" in refusal(full, *source)
    with mounted(own.path, full, "-o", "nonempty") as mount:
        assert "already mounted" in refusal(mount.place, *source, "-o", "nonempty")
        assert sorted(os.listdir(full)) == ["ct", "ns", "vm"]


def test_umount_tells_how_it_went(own: Stocked, tmp_path: Path) -> None:
    assert "not mounted" in error_of(pbsfs("umount", tmp_path), 7)
    assert "not a pbsfs mount" in error_of(pbsfs("umount", "/proc"), 7)
    with mounted(own.path, tmp_path / "m") as mount:
        with (mount / IMAGE).open("rb"):
            text = error_of(pbsfs("umount", mount.place), 7)
            assert "busy; close what is open there, or use --lazy" in text
            assert "--lazy" in text
            assert mount.is_mounted()
        done = pbsfs("umount", mount.place)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not mount.is_mounted()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_mount(own: Stocked, tmp_path: Path, number: signal.Signals) -> None:
    need_fuse()
    place = tmp_path / "m"
    place.mkdir()
    command = [PBSFS, "mount", "--foreground", "--datastore-dir", str(own.path), str(place)]
    with (
        cleaned_up(place),
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process,
    ):
        try:
            wait_until((place / "vm").exists, "it is mounted")
            with opened(place / IMAGE) as fd:
                process.send_signal(number)
                _nothing, errors = process.communicate(timeout=20)
                assert fails_with(errno.ENOTCONN, lambda: os.pread(fd, 1, 5 * CHUNK))
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert not mounted_at(place)


def test_any_umount_ends_the_process(own: Stocked, tmp_path: Path) -> None:
    commands = [[PBSFS, "umount"], ["fusermount3", "-u"]]
    commands += [["umount"]] if os.geteuid() == 0 else []
    need("fusermount3")
    for number, command in enumerate(commands):
        with mounted(own.path, tmp_path / str(number)) as mount:
            with (mount / IMAGE).open("rb"):
                assert run([*command, mount.place]).returncode != 0
                assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
            output_of(*command, mount.place)
            wait_until(mount.has_ended, f"{command} ends the process")
    with mounted(own.path, tmp_path / "lazy") as mount:
        with (mount / IMAGE).open("rb") as file:
            output_of(PBSFS, "umount", "--lazy", mount.place)
            assert not mount.is_mounted()
            assert file.read() == own.contents[IMAGE]
            assert mount.is_running()
        wait_until(mount.has_ended, "the process ends with the last open file")


def test_a_killed_mount_is_reported_and_cleared(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m") as mount:
        with opened(mount / IMAGE) as fd:
            mount.signal(signal.SIGKILL)
            wait_until(mount.is_dead, "the process is gone")
            assert fails_with(errno.ENOTCONN, lambda: os.listdir(mount.place))
            assert fails_with(errno.ENOTCONN, lambda: os.pread(fd, 1, 5 * CHUNK))
        text = refusal(mount.place, "--datastore-dir", own.path)
        assert f"pbsfs umount {mount.place}" in text
        assert pbsfs("umount", mount.place).returncode == 0
        assert not mount.is_mounted()
        assert mount.place.is_dir()


def test_what_a_mount_did_can_be_read(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    with mounted(access(server, TOKEN), tmp_path / "m") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert ".pbsfs" not in os.listdir(mount.place)
        found = subprocess.run(["find", mount.place, "-maxdepth", "1"], capture_output=True, check=True)
        assert b".pbsfs" not in found.stdout
        server.go_down()
        names = {"stats", "errors", "version"}
        assert set(os.listdir(mount / ".pbsfs")) == names
        text = {name: (mount / f".pbsfs/{name}").read_text() for name in names}
        numbers = dict(line.split(" ") for line in text["stats"].splitlines())
        assert int(numbers["bytes_served"]) >= len(own.contents[IMAGE])
        assert int(numbers["sessions_opened"]) >= 1
        assert {(mount / f".pbsfs/{name}").stat().st_size for name in names} == {0}
        assert not any(SECRET in shown for shown in text.values())


def test_a_reader_can_be_killed(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m") as mount:
        mount.signal(signal.SIGSTOP)  # stands for storage that does not answer
        with subprocess.Popen(["cat", str(mount / IMAGE)], stdout=subprocess.DEVNULL) as reader:
            wchan = Path(f"/proc/{reader.pid}/wchan")
            wait_until(lambda: "fuse" in wchan.read_text() or "request" in wchan.read_text(), "it waits")
            reader.kill()
            mount.signal(signal.SIGCONT)
            assert reader.wait(timeout=20) == -signal.SIGKILL
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
