"""FAT12, FAT16 and FAT32: golden volumes, volumes that mkfs.vfat and mtools made, and hostile ones."""

from __future__ import annotations

import pytest

from pbsfs.contents.base import Entry
from pbsfs.disks.fat.fat import Fat
from pbsfs.disks.volume import Disk, part_of
from tests.support.disks import GoldenDisk, differences, lines_of

WRITTEN = {"names/🎉party": "names/\uf389party", "names/e\u0301.nfd": "names/e.nfd"}
"""Two names that mtools, which made the golden volumes, did not write as they were: it cut the first one's
letter to 16 bits, and left out the second one's accent."""


@pytest.mark.golden
@pytest.mark.parametrize(
    ("vm", "drive", "start", "sectors", "form", "truth"),
    [
        (320, "drive-scsi0", 2048, 98304, "FAT32", "server.efi"),
        (321, "drive-sata0", 389120, 98304, "FAT16", "windows.p5"),
    ],
)
def test_golden_volumes(vm: int, drive: str, start: int, sectors: int, form: str, truth: str) -> None:
    disk = GoldenDisk(vm, drive)
    volume = part_of(Disk(disk), start * 512, sectors * 512)
    assert Fat.recognise(volume)
    fat = Fat(volume)
    assert fat.facts()["form"] == form
    lines = {
        WRITTEN.get(path.decode(), path.decode()).encode(): line for path, line in lines_of(truth).items()
    }
    assert differences(fat, [disk], lines, but="m,mt,u,g") == []
    for path, entry in fat.walk(fat.root):
        assert isinstance(entry, Entry)
        assert abs(entry.mtime_ns - lines[path]["mt"]) <= 2_000_000_000, path
