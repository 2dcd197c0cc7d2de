"""Rough handling: what is killed, unmounted or taken away under load ends, and hangs nobody."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.mounts import Mounted, fails_with, is_running, mounted, opened, refusal
from tests.support.needs import need
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

IMAGE = "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"
CHUNK = 4 << 20
CHUNKS = 40
SMALL_CACHE = ("--cache-size", "32M", "--refresh", "0.1")
"""Much less than the image, so that readers need the datastore all the time."""

READERS = 4


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore that takes little room, with an image of 160 MiB."""
    base = tmp_path_factory.mktemp("template")
    image = base / "image"
    with image.open("wb") as file:
        for number in range(CHUNKS):
            file.write(b"%064d" % number * (CHUNK // 64))
    DatastoreWriter(base / "datastore").add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": image})
    image.unlink()
    return base / "datastore"


@pytest.fixture
def datastore(template: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return shutil.copytree(template, tmp_path / "datastore")


@contextmanager
def load(mount: Mounted) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Readers that go on until a read fails, past the kernel's cache; none is left behind."""
    script = 'while dd if="$0" of=/dev/null bs=256k iflag=direct status=none; do :; done; exit 9'
    with ExitStack() as stack:
        readers = []
        for _ in range(READERS):
            reader = stack.enter_context(
                subprocess.Popen(
                    ["sh", "-c", script, str(mount / IMAGE)],
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # a group of its own, to kill the shell with its dd
                )
            )
            stack.callback(_kill_group, reader.pid)
            readers.append(reader)
        wait_until(lambda: all(_has_read(reader.pid) for reader in readers), "all readers read")
        yield readers


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _has_read(pid: int) -> bool:
    """Whether a child of the shell `pid` has read some MiB."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return any(int(Path(f"/proc/{child}/io").read_text().split()[1]) > 4 << 20 for child in children)
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end_with_an_error(readers: list[subprocess.Popen[bytes]]) -> None:
    for reader in readers:
        _nothing, errors = reader.communicate(timeout=30)
        assert reader.returncode == 9
        assert b"dd: " in errors


def read_first(mount: Mounted) -> bytes:
    with opened(mount / IMAGE) as fd:
        return os.pread(fd, 64, 0)


# --- readers


def test_a_reader_that_is_killed_in_mid_read_goes_at_once(datastore: Path, tmp_path: Path) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        # Once a file was closed, the kernel knows that closing takes no answer.
        assert read_first(mount) == b"%064d" % 0
        with subprocess.Popen(["cat", str(mount / IMAGE)], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            assert len(reader.stdout.read(CHUNK)) == CHUNK
            mount.signal(signal.SIGSTOP)  # stands for storage that does not answer
            os.set_blocking(reader.stdout.fileno(), False)
            wchan = Path(f"/proc/{reader.pid}/wchan")

            def waits_for_the_mount() -> bool:
                reader.stdout.read(1 << 20)  # type: ignore[union-attr]
                return "pipe" not in wchan.read_text() and wchan.read_text() != "0"

            wait_until(waits_for_the_mount, "the reader waits for data")
            reader.kill()
            assert reader.wait(timeout=20) == -signal.SIGKILL
            assert not is_running(reader.pid)
            mount.signal(signal.SIGCONT)
        assert read_first(mount) == b"%064d" % 0
        output_of("cmp", str(mount / IMAGE), str(mount / IMAGE))


def test_readers_that_are_killed_leave_the_mount_as_it_was(datastore: Path, tmp_path: Path) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        for _ in range(3):
            with load(mount) as readers:
                for reader in readers:
                    os.killpg(reader.pid, signal.SIGKILL)
                for reader in readers:
                    assert reader.wait(timeout=30) == -signal.SIGKILL
        assert read_first(mount) == b"%064d" % 0
        wait_until(lambda: pbsfs("umount", mount.place).returncode == 0, "nothing is open any more")


# --- the process


def test_a_killed_mount_ends_its_readers_and_can_be_cleared(datastore: Path, tmp_path: Path) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        with load(mount) as readers:
            mount.signal(signal.SIGKILL)
            all_end_with_an_error(readers)
        wait_until(mount.is_dead, "the process is gone")
        assert fails_with(errno.ENOTCONN, lambda: os.listdir(mount.place))
        text = refusal(mount.place, "--datastore-dir", datastore)
        assert f"pbsfs umount {mount.place}" in text
        done = pbsfs("umount", mount.place)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not mount.is_mounted()
        with mounted(datastore, mount.place) as again:
            assert read_first(again) == b"%064d" % 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_unmounts_and_ends_everybody(
    datastore: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        with load(mount) as readers, opened(mount / IMAGE) as fd:
            mount.signal(number)
            wait_until(mount.has_ended, "it is unmounted, and the process ends")
            all_end_with_an_error(readers)
            assert fails_with(errno.ENOTCONN, lambda: os.pread(fd, 10, 0))
        assert os.listdir(mount.place) == []


# --- umount


def test_umount_under_load_is_refused_and_disturbs_nobody(datastore: Path, tmp_path: Path) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount, load(mount) as readers:
        text = error_of(pbsfs("umount", mount.place), 7)
        assert "busy" in text
        assert "--lazy" in text
        assert mount.is_mounted()
        assert all(reader.poll() is None for reader in readers)


def test_lazy_umount_under_load_lets_open_files_finish(datastore: Path, tmp_path: Path) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        with load(mount) as readers, opened(mount / IMAGE) as fd:
            done = pbsfs("umount", "--lazy", mount.place)
            assert (done.returncode, done.stderr) == (0, "")
            assert not mount.is_mounted()
            all_end_with_an_error(readers)  # when they open the file the next time
            assert os.pread(fd, 64, CHUNK) == b"%064d" % 1
            assert mount.is_running()
        wait_until(mount.has_ended, "the process ends with the last open file")


def test_every_way_to_unmount_ends_the_process(datastore: Path, tmp_path: Path) -> None:
    ways = [[PBSFS, "umount"], ["fusermount3", "-u"], ["fusermount3", "-u", "-z"]]
    ways += [["umount"], ["umount", "-l"]] if os.geteuid() == 0 else []
    need("fusermount3")
    for number, way in enumerate(ways):
        with mounted(datastore, tmp_path / str(number)) as mount:
            assert read_first(mount) == b"%064d" % 0
            output_of(*way, mount.place)
            wait_until(mount.has_ended, f"{way} ends the process")


# --- the datastore


@pytest.mark.parametrize("leaves", ["nothing", "an empty directory"])
def test_a_datastore_that_goes_away_is_an_error_and_nothing_hangs(
    datastore: Path, tmp_path: Path, leaves: str
) -> None:
    away = tmp_path / "away"
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        with load(mount) as readers:
            datastore.rename(away)
            if leaves == "an empty directory":
                datastore.mkdir()
            all_end_with_an_error(readers)
        for path in ("", "vm", "vm/100", "vm/100/2023-11-14T22:13:20Z"):
            wait_until(lambda p=path: fails_with(errno.EIO, lambda: os.listdir(mount / p)), "it is EIO")  # type: ignore[misc]
        assert mount.is_mounted()
        os.statvfs(mount.place)
        if leaves == "an empty directory":
            datastore.rmdir()
        away.rename(datastore)
        wait_until(lambda: not fails_with(errno.EIO, lambda: os.listdir(mount / "vm/100")), "it is back")
        assert read_first(mount) == b"%064d" % 0
        output_of("dd", f"if={mount / IMAGE}", f"of={os.devnull}", "bs=1M", "status=none")
        assert mount.log_lines()


def test_a_datastore_that_is_removed_is_an_error_and_the_mount_can_be_ended(
    datastore: Path, tmp_path: Path
) -> None:
    with mounted(datastore, tmp_path / "m", *SMALL_CACHE) as mount:
        with load(mount) as readers:
            shutil.rmtree(datastore)
            all_end_with_an_error(readers)
        wait_until(lambda: fails_with(errno.EIO, lambda: os.listdir(mount.place)), "it is EIO")
        assert pbsfs("umount", mount.place).returncode == 0
        wait_until(mount.has_ended, "it ends")
        assert mount.log_lines()
