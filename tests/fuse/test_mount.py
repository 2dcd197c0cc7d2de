"""The life of a mount: how it is set up, what the kernel is told, and how starting can fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pbsfs.base.errors import NotFoundError, SourceError
from pbsfs.fuse.mountpoint import mounted_at
from tests.support.foreground import foreground
from tests.support.manager import manager
from tests.support.mounts import cleaned_up, is_free, mounted, serving
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, error_of, pbsfs, run
from tests.support.stocked import CONFIGURATION, IMAGE, Stocked, stock
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


def options_of(place: Path) -> tuple[str, str, set[str]]:
    """Source, type and options in the mount table."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, where, kind, options, *_rest = line.split(" ")
        if where == str(place):
            return source.replace("\\040", " "), kind, set(options.split(","))
    raise AssertionError(f"{place} is not in the mount table")


def test_the_mount_table_tells_what_is_mounted(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        source, kind, options = options_of(mount.place)
        assert source == f"datastore directory {stocked.path}"
        assert kind == "fuse.pbsfs"
        assert options >= {"ro", "nosuid", "nodev", "default_permissions"}
        assert "allow_other" not in options


def test_a_service_manager_is_told_when_the_mount_answers_and_when_it_ends(
    stocked: Stocked, tmp_path: Path
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    command = ("mount", "--foreground", "--datastore-dir", stocked.path, place)
    with manager(tmp_path) as listening, cleaned_up(place):
        env = environment(NOTIFY_SOCKET=listening.address)
        with foreground(*command, env=env) as running:
            status = f"STATUS=datastore directory {stocked.path} is mounted at {place}"
            assert listening.told() == ["READY=1", status]
            assert (place / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]
            assert running.stop() == 0
            assert listening.told() == ["STOPPING=1"]
            assert running.errors() == []


def test_what_a_service_manager_is_told_is_not_for_children(stocked: Stocked, tmp_path: Path) -> None:
    with manager(tmp_path) as listening:
        told = environment(NOTIFY_SOCKET=listening.address)
        need_fuse()
        (place := tmp_path / "m").mkdir()
        with cleaned_up(place):
            done = pbsfs(
                "mount", "--datastore-dir", stocked.path, "--log-file", tmp_path / "log", place, env=told
            )
            assert done.returncode == 0
            (process,) = serving(place)
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{process}/environ").read_bytes()
            assert pbsfs("umount", place).returncode == 0
            wait_until(lambda: is_free(place), "it ends")
        assert (tmp_path / "log").read_text() == ""


def test_mount_options_are_passed_on(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "-o", "noexec", "-o", "ro,noatime,nofail") as mount:
        assert options_of(mount.place)[2] >= {"ro", "noexec", "noatime"}


def test_the_tree_starts_at_the_namespace(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--ns", "prod") as mount:
        assert os.listdir(mount.place) == ["vm"]
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]


def test_two_mounts_of_one_datastore_do_not_meet(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "a") as first:
        with mounted(stocked.path, tmp_path / "b") as second:
            assert (second / IMAGE).read_bytes() == stocked.contents[IMAGE]
        assert second.has_ended()
        assert (first / IMAGE).read_bytes() == stocked.contents[IMAGE]


def test_a_read_only_datastore_can_be_mounted(stocked: Stocked, tmp_path: Path) -> None:
    def everything() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in stocked.path.rglob("*")}

    parts = list(stocked.path.rglob("*"))
    for part in parts:
        part.chmod(0o500 if part.is_dir() else 0o400)
    before = everything()
    try:
        with mounted(stocked.path, tmp_path / "m") as mount:
            for path, content in stocked.contents.items():
                assert (mount / path).read_bytes() == content
        assert everything() == before
    finally:
        for part in parts:
            part.chmod(0o700)


def test_the_background_process_holds_on_to_nothing_of_the_caller(stocked: Stocked, tmp_path: Path) -> None:
    need_fuse()
    (cwd := tmp_path / "cwd").mkdir()
    (place := tmp_path / "m").mkdir()
    command = [PBSFS, "mount", "--datastore-dir", "../datastore", "--log-file", "../log", "../m"]
    with cleaned_up(place):
        # Ends only when nobody holds the other end of the pipes.
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, timeout=30, check=True, env=environment()
        )
        assert (done.stdout, done.stderr) == (b"", b"")
        assert (place / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]
        assert (tmp_path / "log").exists()
        shutil.rmtree(cwd)
        assert (place / IMAGE).read_bytes() == stocked.contents[IMAGE]


def test_the_log_tells_of_the_end_where_it_is_asked_for(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--log-level", "info") as mount:
        mount.signal(signal.SIGTERM)
        wait_until(mount.has_ended, "it ends")
        assert any("unmounting on SIGTERM" in line for line in mount.log_lines())
    with mounted(stocked.path, tmp_path / "m2", "--log-level", "info") as mount:
        assert pbsfs("umount", mount.place).returncode == 0
        wait_until(mount.has_ended, "it ends")
        assert any("was unmounted" in line for line in mount.log_lines())


def test_what_the_kernel_refuses_is_told_in_its_words(stocked: Stocked, tmp_path: Path) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir(mode=0o500)  # fusermount3 wants to be able to write there
    command: list[str | Path] = [
        PBSFS,
        "mount",
        "--datastore-dir",
        stocked.path,
        "--log-file",
        os.devnull,
        place,
    ]
    if os.geteuid() == 0:  # has to be without the right to mount, to be refused
        need("setpriv")
        command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *command]
    with cleaned_up(place):
        text = error_of(run(command), 7)
    assert text.startswith(f"cannot mount on {place}: fusermount3: ")


def test_a_mount_that_was_told_to_stop_while_it_starts_leaves_nothing(
    stocked: Stocked, tmp_path: Path
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    log = tmp_path / "log"
    command = [PBSFS, "mount", "--datastore-dir", str(stocked.path), "--log-file", str(log), str(place)]
    for number in (signal.SIGINT, signal.SIGTERM):
        log.unlink(missing_ok=True)
        with cleaned_up(place):
            # A terminal's Ctrl-C reaches the whole group; the process in the background is in its own.
            with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as process:
                wait_until(log.exists, "it is about to start the process")
                process.send_signal(number)
                _nothing, errors = process.communicate(timeout=30)
            assert b"Traceback" not in errors
            assert process.returncode in (0, 128 + number)  # 0: it was faster
            if process.returncode:
                # Where the signal came before it knew the process, that one finds nobody to report to.
                wait_until(lambda: is_free(place), "nothing is left")


def test_a_directory_that_is_no_datastore_is_refused(tmp_path: Path) -> None:
    (place := tmp_path / "m").mkdir()
    (empty := tmp_path / "empty").mkdir()
    (file := tmp_path / "file").touch()
    for source, reason in (
        (empty, "is not a datastore"),
        (file, "is not a directory"),
        (tmp_path / "none", "No such file"),
    ):
        assert reason in error_of(pbsfs("mount", "--datastore-dir", source, place), SourceError.exit_status)
        assert not mounted_at(place)


def test_a_namespace_that_does_not_exist_is_refused(stocked: Stocked, tmp_path: Path) -> None:
    (place := tmp_path / "m").mkdir()
    done = pbsfs("mount", "--datastore-dir", stocked.path, "--ns", "prod/none", place)
    assert "none" in error_of(done, NotFoundError.exit_status)
    assert not mounted_at(place)


def test_a_log_file_that_cannot_be_written_is_told_at_once(stocked: Stocked, tmp_path: Path) -> None:
    (place := tmp_path / "m").mkdir()
    log = tmp_path / "none" / "log"
    text = error_of(pbsfs("mount", "--datastore-dir", stocked.path, "--log-file", log, place), 2)
    assert text == f"cannot write the log file {log}: No such file or directory; name another"
    assert not mounted_at(place)
