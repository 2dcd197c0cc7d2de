"""ext2, ext3, ext4 and XFS after random histories of operations, as the kernel shows them after replay."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError
from pbsfs.disks.ext.reader import Ext
from pbsfs.disks.filesystem import FileSystem
from pbsfs.disks.volume import Disk
from pbsfs.disks.xfs.reader import Xfs
from tests.support.disks import FileDisk, differences, image_from
from tests.support.histories import moments, run, shown
from tests.support.needs import need, need_loop

EXT = (
    "-t ext4",
    "-t ext4 -b 1024 -J size=1",
    "-t ext4 -b 1024 -J size=1 -O ^metadata_csum,^64bit",
    "-t ext4 -O inline_data,ea_inode,large_dir -I 512 -J size=4",
    "-t ext4 -b 1024 -O inline_data,metadata_csum_seed -I 256 -J size=2",
    "-t ext4 -b 2048 -O bigalloc -C 16384 -J size=2",
    "-t ext4 -b 1024 -O meta_bg,^resize_inode -g 1024 -J size=1",
    "-t ext4 -O orphan_file -J size=4",
    "-t ext4 -O ^dir_index,^flex_bg,uninit_bg,^metadata_csum -J size=4",
    "-t ext4 -O ^extents,^64bit -b 1024 -J size=1",
    "-t ext4 -O sparse_super2,^resize_inode,ea_inode -J size=4",
    "-t ext3 -b 1024 -J size=1",
    "-t ext3 -I 128 -J size=4",
)
"""What mke2fs makes, with journals that are small enough to go round."""

_COARSE = 5  # CLOCK_REALTIME_COARSE, of which file systems take their times

EXT_OPTIONS = (
    "",
    "data=journal",
    "data=writeback",
    "journal_checksum",
    "data=writeback,journal_async_commit",
    "nodelalloc",
)

XFS = (
    "",
    "-b size=1024 -m rmapbt=1,reflink=1",
    "-m reflink=0,finobt=0,bigtime=0 -i sparse=0",
    "-m rmapbt=1 -i nrext64=1,size=1024",
    "-n size=65536 -d agcount=8 -l size=16m --unsupported",
    "-b size=2048 -i size=1024,maxpct=5",
    "-m inobtcount=1,rmapbt=1 -l size=14m -d agcount=1 --unsupported",
    "-l size=8m,su=32k -b size=1024 --unsupported",
    "-l size=13m,version=2,sunit=64 -n size=8192 --unsupported",
    "-s size=4096 -l size=12m --unsupported",
)
"""What mkfs.xfs makes; the smaller logs, which go round, it makes only when it is told to."""

XFS_OPTIONS = ("", "logbsize=32k", "logbsize=256k", "wsync", "inode64,swalloc")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is such a file system: the many flushes of a history wait for a disk's."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.root
@pytest.mark.parametrize("number", range(52))
def test_ext_is_as_the_kernel_shows_it_after_replay(number: int, place: Path, tmp_path: Path) -> None:
    need_loop()
    need("mke2fs")
    form = EXT[number % len(EXT)]
    image = image_from(place / "image", 64 << 20)
    run("mke2fs", "-q", "-F", *form.split(), image)
    compare("ext4", Ext, number, form, EXT_OPTIONS, image, tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("number", range(50))
def test_xfs_is_as_the_kernel_shows_it_after_replay(number: int, place: Path, tmp_path: Path) -> None:
    need_loop()
    need("mkfs.xfs")
    form = XFS[number % len(XFS)]
    image = image_from(place / "image", 320 << 20)
    run("mkfs.xfs", "-q", *form.split(), image)
    compare("xfs", Xfs, number, form, XFS_OPTIONS, image, tmp_path)


def compare(
    kind: str,
    reader: type[FileSystem],
    number: int,
    form: str,
    options: tuple[str, ...],
    image: Path,
    keep: Path,
) -> None:
    """`keep`: the directory that gets the image of a failure."""
    chance = random.Random(f"{kind} {number}")
    option = chance.choice(options)
    heavy = chance.random() < 0.3
    with closing(moments(image, image.with_name("mount"), kind, option, chance, heavy=heavy)) as found:
        for moment, copy in found:
            replayed = copy.with_name("replayed")
            run("cp", "--sparse=always", copy, replayed)
            began = time.clock_gettime_ns(_COARSE)
            truth = shown(replayed, image.with_name("view"), kind)
            # files of which the kernel completed the truncation have the time at which it did that
            touched = [path for path, fields in truth.items() if began <= fields["mt"] <= time.time_ns()]
            disk = FileDisk(copy)
            contents = reader(Disk(disk))
            journal = contents.facts()["journal"]
            try:
                found_wrong = differences(contents, [disk], truth)
            except DamageError as error:
                found_wrong = [str(error)]
            times = tuple(f"{path!r}: mt is " for path in touched)
            wrong = [line for line in found_wrong if not line.startswith(times)]
            if wrong or journal.startswith("not replayed"):
                run("cp", "--sparse=always", copy, keep / "image")
                told = f"history {number}, {form!r}, mounted with {option!r}, {moment}: see {keep}/image"
                pytest.fail("\n".join([told, journal, *wrong[:20]]))
