"""XFS: golden disks, disks that mkfs.xfs and the kernel made, and damaged ones."""

from __future__ import annotations

import pytest

from pbsfs.disks.volume import Disk, Volume, part_of
from pbsfs.disks.xfs.reader import Xfs
from tests.support.disks import GoldenDisk, MemoryDisk, differences, lines_of

VAR = 253_755_392
"""Where the logical volume `var` begins on its disk, in one piece."""

VAR_SIZE = 320 << 20


@pytest.mark.golden
def test_a_disk_copied_while_mounted_is_as_the_kernel_recovers_it() -> None:
    disk = GoldenDisk(322, "drive-virtio2")
    xfs = Xfs(Disk(disk))
    assert xfs.facts()["journal"] == "replayed: 237 transactions"
    assert differences(xfs, [disk], lines_of("xfs-open.whole")) == []


@pytest.mark.golden
def test_a_volume_that_was_unmounted_is_as_the_kernel_shows_it() -> None:
    disk = GoldenDisk(320, "drive-scsi0")
    xfs = Xfs(part_of(Disk(disk), VAR, VAR_SIZE))
    assert xfs.facts()["journal"] == "clean"
    assert differences(xfs, [disk], lines_of("server.var")) == []


@pytest.mark.parametrize("size", [0, 3, 4, 511, 512, 70_000])
def test_what_is_not_xfs_is_not_recognised(size: int) -> None:
    volume: Volume = Disk(MemoryDisk(bytes(size)))
    assert not Xfs.recognise(volume)
