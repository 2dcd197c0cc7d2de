"""btrfs: the golden disk against the truth."""

from __future__ import annotations

import pytest

from pbsfs.disks.btrfs.btrfs import Btrfs
from pbsfs.disks.volume import Disk
from tests.support.disks import GoldenDisk, differences, lines_of


@pytest.mark.golden
def test_every_field_of_the_golden_disk() -> None:
    disk = GoldenDisk(322, "drive-virtio0")
    assert Btrfs.recognise(Disk(disk))
    contents = Btrfs(Disk(disk))
    assert contents.facts() == {
        "label": "data",
        "uuid": "58567017-621b-4d46-92a8-1a20d932d813",
        "journal": "clean",
        "checksums": "crc32c",
        "data checksums": "verified only for compressed data and data in stripes",
        "devices": "1 of 1",
    }
    assert not differences(contents, [disk], lines_of("btrfs.whole"))
