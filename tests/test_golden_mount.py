"""A mount of the vendor's own data, read by the tools that people use."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.golden import Original
from tests.support.mounts import Mounted, fails_with, mounted, opened, read_at
from tests.support.needs import need, need_loop
from tests.support.program import output_of
from tests.support.sums import sum_of, sum_of_stream
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.golden, pytest.mark.mount]

READABLE = [original for original in golden.originals() if not original.encrypted]
ENCRYPTED = [original for original in golden.originals() if original.encrypted]
SMALL = [original for original in READABLE if original.size < 10 << 20]
DISK = "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"
SPARSE = "vm/105/2023-11-14T23:13:24Z/drive-sata0.img"
PARTITION = 2048 * 512
MIB = 1 << 20

each_readable = pytest.mark.parametrize("original", READABLE, ids=lambda original: original.path)
each_small = pytest.mark.parametrize("original", SMALL, ids=lambda original: original.path)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount in which nothing may fail, so that nothing may be logged."""
    with mounted(golden.DATASTORE, tmp_path_factory.mktemp("golden") / "m") as found:
        yield found


@pytest.fixture(scope="module")
def disk(mount: Mounted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A verified copy of `DISK`, outside of the mount."""
    copy = tmp_path_factory.mktemp("disk") / "disk.img"
    output_of("cp", str(mount / DISK), str(copy))
    assert sum_of(copy) == next(original.sha256 for original in READABLE if original.path == DISK)
    yield copy
    copy.unlink()


def forget(path: Path) -> None:
    """The kernel drops what it has cached of a file."""
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def sum_by_dd(path: Path, *how: str) -> str:
    """The checksum of what dd reads, without what the kernel had."""
    forget(path)
    with subprocess.Popen(["dd", f"if={path}", "status=none", *how], stdout=subprocess.PIPE) as dd:
        assert dd.stdout is not None
        found = sum_of_stream(dd.stdout)
        assert dd.wait(timeout=60) == 0
    return found


def test_there_is_every_kind_of_original() -> None:
    assert len(READABLE) > 15
    assert len(ENCRYPTED) > 5
    assert len(SMALL) > 8
    assert {DISK, SPARSE} <= {original.path for original in READABLE}


# --- every byte


@each_readable
def test_cp_gets_the_original(mount: Mounted, tmp_path: Path, original: Original) -> None:
    copy = tmp_path / "copy"
    output_of("cp", str(mount / original.path), str(copy))
    assert copy.stat().st_size == original.size
    assert sum_of(copy) == original.sha256
    copy.unlink()


@each_readable
def test_dd_with_large_blocks_gets_the_original(mount: Mounted, original: Original) -> None:
    assert sum_by_dd(mount / original.path, "bs=1M") == original.sha256


@each_small
def test_dd_with_sectors_gets_the_original(mount: Mounted, original: Original) -> None:
    assert sum_by_dd(mount / original.path, "bs=512") == original.sha256


def test_dd_with_pages_gets_the_original(mount: Mounted) -> None:
    expected = {original.path: original.sha256 for original in READABLE}
    assert sum_by_dd(mount / DISK, "bs=4k") == expected[DISK]


def test_random_reads_get_the_original(mount: Mounted, disk: Path) -> None:
    forget(mount / DISK)
    content, places = disk.read_bytes(), random.Random(17)
    with opened(mount / DISK) as fd:
        for _ in range(500):
            offset = places.randrange(len(content) + 100)
            size = places.choice([1, 511, 512, 4096, 4097, 100_000, 3 * MIB])
            assert os.pread(fd, size, offset) == content[offset : offset + size], (offset, size)


def test_eight_readers_at_once_get_the_originals(mount: Mounted) -> None:
    large = [original for original in READABLE if original.size < 100 * MIB]
    chosen = sorted(large, key=lambda original: -original.size)[:7]
    chosen.append(chosen[0])  # two of one file
    assert len(chosen) == 8
    for original in chosen:
        forget(mount / original.path)
    readers = [
        subprocess.Popen(["sha256sum", str(mount / original.path)], stdout=subprocess.PIPE, text=True)
        for original in chosen
    ]
    found = []
    for reader in readers:
        with reader:
            found.append(reader.communicate(timeout=60)[0].split()[0])
    assert found == [original.sha256 for original in chosen]


def test_eight_random_readers_of_one_image_get_the_original(mount: Mounted, disk: Path) -> None:
    forget(mount / DISK)
    content = disk.read_bytes()

    def read(seed: int) -> bool:
        places = random.Random(seed)
        with opened(mount / DISK) as fd:
            for _ in range(60):
                offset, size = places.randrange(len(content)), places.randrange(1, 300_000)
                if os.pread(fd, size, offset) != content[offset : offset + size]:
                    return False
        return True

    with ThreadPoolExecutor(8) as readers:
        assert all(readers.map(read, range(8)))


# --- what is encrypted


def test_encrypted_files_are_listed_with_their_size_and_refused_with_their_key(tmp_path: Path) -> None:
    with mounted(golden.DATASTORE, tmp_path / "m") as mount:
        images = [original for original in ENCRYPTED if original.path.endswith((".img", ".pxar"))]
        assert len(images) > 4
        for original in images:
            assert (mount / original.path).stat().st_size == original.size
        for original in ENCRYPTED:
            assert Path(original.path).name in os.listdir((mount / original.path).parent)
            assert fails_with(errno.EACCES, lambda path=original.path: (mount / path).open("rb"))  # type: ignore[misc]
        lines = mount.log_lines()
        assert len(lines) == len(ENCRYPTED)
        for original in ENCRYPTED:
            (line,) = [line for line in lines if original.path in line]
            key = json.loads((golden.ROOT / "keys" / f"{original.key}.json").read_text())
            assert key["fingerprint"] in line


# --- holes


def test_du_and_ls_show_the_sparse_image_as_a_few_mib(mount: Mounted) -> None:
    image = str(mount / SPARSE)
    assert int(output_of("du", "-m", "--apparent-size", image).split()[0]) == 1024
    assert int(output_of("du", "-m", image).split()[0]) == 8
    assert int(output_of("ls", "-s", "--block-size=1M", image).split()[0]) == 8


def test_cp_makes_a_sparse_copy(mount: Mounted, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for how in ("auto", "always"):
        output_of("cp", f"--sparse={how}", str(mount / SPARSE), str(copy))
        assert copy.stat().st_size == 1 << 30
        assert copy.stat().st_blocks * 512 <= 9 * MIB
        copy.unlink()  # it has the mode of the image: only root could write over it


def test_lseek_finds_what_is_there(mount: Mounted) -> None:
    with opened(mount / SPARSE) as fd:
        data = os.lseek(fd, 0, os.SEEK_DATA)
        assert data == 300 * MIB  # to the chunk
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        assert hole == data + 4 * MIB
        last = os.lseek(fd, hole, os.SEEK_DATA)
        assert last == (1 << 30) - 4 * MIB
        assert os.lseek(fd, last, os.SEEK_HOLE) == 1 << 30


def test_qemu_img_sees_the_holes(mount: Mounted) -> None:
    need("qemu-img")
    text = output_of("qemu-img", "map", "-f", "raw", "--output=json", str(mount / SPARSE))
    runs = [(run["start"], run["length"]) for run in json.loads(text) if run["data"]]
    assert runs == [(300 * MIB, 4 * MIB), ((1 << 30) - 4 * MIB, 4 * MIB)]


def test_nbdkit_serves_a_mounted_image_and_its_holes(mount: Mounted) -> None:
    need("nbdkit", "nbdinfo")
    served = ["nbdkit", "--readonly", "-U", "-", "file", str(mount / SPARSE), "--run"]
    assert json.loads(output_of(*served, 'nbdinfo --json "$uri"'))["exports"][0]["export-size"] == 1 << 30
    text = output_of(*served, 'nbdinfo --map --json "$uri"')
    runs = [(run["offset"], run["length"]) for run in json.loads(text) if run["type"] == 0]
    assert runs == [(300 * MIB, 4 * MIB), ((1 << 30) - 4 * MIB, 4 * MIB)]


def test_nbdkit_serves_the_original(mount: Mounted) -> None:
    need("nbdkit", "nbdcopy")
    served = ["nbdkit", "--readonly", "-U", "-", "file", str(mount / DISK), "--run"]
    expected = next(original.sha256 for original in READABLE if original.path == DISK)
    assert output_of(*served, 'nbdcopy "$uri" - | sha256sum').split()[0] == expected


# --- the file system inside


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A read-only loop device over the partition; its nodes by partition number are not needed."""
    name = output_of(
        *("losetup", "--read-only", "--find", "--show", "--offset", str(PARTITION), str(image))
    ).strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True, timeout=30)


@pytest.mark.root
def test_the_file_system_inside_an_image_can_be_mounted(mount: Mounted, tmp_path: Path) -> None:
    need_loop()
    (place := tmp_path / "inside").mkdir()
    with loop_device(mount / DISK) as device:
        output_of("mount", "-t", "ext4", "-o", "ro,noload", device, str(place))
        try:
            found = [path for path in place.rglob("*") if path.is_file()]
            assert len(found) > 1
            assert sum(len(path.read_bytes()) for path in found) > 1 << 16
        finally:
            subprocess.run(["umount", place], check=True, timeout=30)
    # The kernel lets go of a loop device's file a moment later.
    wait_until(lambda: str(mount.place) not in output_of("losetup", "-a"), "the loop device is gone")


# --- another way to the same bytes


def test_sectors_at_the_end_of_an_image_are_exact(mount: Mounted, disk: Path) -> None:
    content = disk.read_bytes()
    assert len(content) % 4096 == 1536
    for offset in (len(content) - 1536, len(content) - 1, len(content) - 5000):
        assert read_at(mount / DISK, offset, 1 << 20) == content[offset:]
    assert read_at(mount / DISK, len(content), 10) == b""


def test_a_bucket_is_mounted_like_any_datastore(tmp_path: Path) -> None:
    bucket, key = golden.ROOT / "bucket", golden.ROOT / "keys" / "plain.json"
    with mounted(bucket / "gbucket", tmp_path / "m", "--keyfile", str(key)) as mount:
        for row in (bucket / "checksums.tsv").read_text().splitlines():
            wanted, size, path, *_rest = row.split("\t")
            assert (mount / path).stat().st_size == int(size)
            assert sum_of(mount / path) == wanted
        assert os.listdir(mount / "ns/prod/ns/void") == []
        assert (mount / "host/pad/latest/home.pxar").read_bytes()  # encrypted
