"""What docs/semantics.md promises of what a mount costs: a test for each promise, by its name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.large import large_images
from tests.support.mounts import SOON, Mounted, mounted
from tests.support.needs import need_root
from tests.support.program import output_of
from tests.support.serving import access, serving
from tests.support.stocked import (
    IMAGE,
    Stocked,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


def test_the_kernel_keeps_what_was_read(own: Stocked, tmp_path: Path) -> None:
    def written(pid: int) -> int:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("wchar")).split()[1])

    need_root("see what the process of a mount writes")
    size = len(own.contents[IMAGE])
    with mounted(own.path, tmp_path / "m") as mount:
        before = written(mount.pid)
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        between = written(mount.pid)
        assert between - before > size  # so this is where reading can be seen
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert written(mount.pid) - between < size // 10


def test_statfs_needs_no_storage(own: Stocked, tmp_path: Path) -> None:
    def is_told(mount: Mounted) -> bool:
        found, real = os.statvfs(mount.place), os.statvfs(own.path)
        assert (found.f_files, found.f_ffree, found.f_namemax) == (0, 0, 255)
        assert found.f_flag & os.ST_RDONLY
        if found.f_blocks == 0:
            assert (found.f_bfree, found.f_bavail) == (0, 0)
            return False
        assert found.f_blocks * found.f_frsize == real.f_blocks * real.f_frsize // 4096 * 4096
        assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
        return True

    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        wait_until(lambda: is_told(mount), "the space is known")
        shown = output_of("df", "--output=itotal,iused,iavail,ipcent", str(mount.place))
        assert shown.splitlines()[1].split() == ["0", "0", "0", "-"]
        before = os.statvfs(mount.place)
        own.path.rename(tmp_path / "away")
        assert os.statvfs(mount.place) == before
        assert not mount.log_lines()
        (tmp_path / "away").rename(own.path)
    with serving(own.path) as server, mounted(access(server), tmp_path / "m2") as mount:
        wait_until(lambda: is_told(mount), "the space is known")


def test_read_ahead_is_raised(mount: Mounted) -> None:
    need_root("set the read-ahead of a mount")
    entry = mounted_at(mount.place)
    assert entry is not None
    assert Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text().strip() == "1024"


def peak_of(pid: int) -> int:
    """Bytes of memory that a process took at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def test_memory_is_bounded(writer: DatastoreWriter, tmp_path: Path) -> None:
    cache, extra, chunk, count = 32 << 20, 150 << 20, 4 << 20, 110
    assert count * chunk > cache + extra  # else reading it all could not break the promise
    image = tmp_path / "image"
    with image.open("wb") as file:
        for number in range(count):
            file.write(b"%064d" % number * (chunk // 64))
    writer.add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": image})
    with mounted(writer.path, tmp_path / "m", "--cache-size", "32M") as mount:
        output_of("dd", f"if={mount / IMAGE}", f"of={os.devnull}", "bs=1M")
        assert peak_of(mount.pid) < cache + extra, f"{peak_of(mount.pid) >> 20} MiB"


def test_memory_of_open_files_is_bounded(writer: DatastoreWriter, tmp_path: Path) -> None:
    cache, extra, limit, count, size = 32 << 20, 150 << 20, 256 << 20, 150, 1 << 40
    data = b"data" * (1 << 20)
    places = large_images(writer, data, size=size, count=count)
    blobs = [f"{made.snapshot(backup_id=name)}/big" for name in ("701", "702", "703")]
    for name in ("701", "702", "703"):
        writer.add_snapshot(made.snapshot(backup_id=name), {"big.blob": bytes(100 << 20)})
    assert count * size // len(data) * 32 > 2 * (cache + extra + limit)
    with mounted(writer.path, tmp_path / "m", "--cache-size", "32M") as mount:
        with contextlib.ExitStack() as stack:
            for place in blobs[:2] * 5:
                content = stack.enter_context((mount / place).open("rb"))
                assert os.pread(content.fileno(), 4, 50 << 20) == bytes(4)
            with pytest.raises(OSError, match="Cannot allocate memory"):
                (mount / blobs[2]).open("rb")
            assert "close some files" in mount.log_lines()[-1]
        assert (mount / blobs[2]).read_bytes() == bytes(100 << 20)
        files = [os.open(mount / place, os.O_RDONLY) for place in places]
        try:
            for offset in (5, size - 5000):  # all tables were dropped and fetched again by the second
                for file in files:
                    assert os.pread(file, 4, offset) == (data * 2)[offset % 4 :][:4]
                    assert os.lseek(file, 0, os.SEEK_HOLE) == size
        finally:
            for file in files:
                os.close(file)
        assert peak_of(mount.pid) < cache + extra + limit, f"{peak_of(mount.pid) >> 20} MiB"


def test_memory_is_bounded_with_many_open_images_and_long_listings(
    writer: DatastoreWriter, tmp_path: Path
) -> None:
    cache, extra, limit, count, size, names = 64 << 20, 150 << 20, 256 << 20, 200, 1 << 39, 100_000
    data = b"data" * (1 << 20)
    places = large_images(writer, data, size=size, count=count)
    (writer.path / "ct").mkdir(exist_ok=True)
    for number in range(names):
        os.mkdir(f"{writer.path}/ct/{number + 100}")
    assert count * size // len(data) * 32 > cache + extra + limit
    # On a busy machine all of this takes minutes.
    with mounted(writer.path, tmp_path / "m", "--cache-size", "64M", lifetime=600) as mount:
        files = [os.open(mount / place, os.O_RDONLY) for place in places]
        try:
            assert sum(entry.is_dir() for entry in os.scandir(mount / "ct")) == names
            for number, file in enumerate(files):
                assert os.pread(file, 4, 5) == data[1:5], number
            assert len(os.listdir(mount / "ct")) == names
            for file in files:
                assert os.pread(file, 4, size - 5000) == data[:4]
        finally:
            for file in files:
                os.close(file)
        assert peak_of(mount.pid) < cache + limit + extra, f"{peak_of(mount.pid) >> 20} MiB"
