"""ext2, ext3 and ext4: golden disks in every field."""

from __future__ import annotations

import pytest

from pbsfs.contents.base import Stream
from pbsfs.disks.ext.reader import Ext, recognise
from pbsfs.disks.volume import Disk, Mapped, Segment, Volume, part_of
from tests.support.disks import GoldenDisk, MemoryDisk, differences, lines_of

LVM = 231424 * 512 + (1 << 20)
"""Where the extents of the first disk's physical volume begin; those of the second begin at 1 MiB."""

LE = 4 << 20


def server(name: str) -> tuple[Volume, list[Stream]]:
    """A volume of the golden server, put together by hand, and the disks that it lies on."""
    disks = [GoldenDisk(320, "drive-scsi0"), GoldenDisk(320, "drive-scsi1")]
    first, second = Disk(disks[0], 0), Disk(disks[1], 1)
    if name == "boot":
        return part_of(first, 100352 * 512, 131072 * 512), [*disks]
    if name == "root":
        return part_of(first, LVM, 32 * LE), [*disks]
    if name == "grown":
        parts = [
            Segment(0, 10 * LE, first, LVM + 124 * LE),
            Segment(10 * LE, 16 * LE, second, (1 << 20) + 8 * LE),
        ]
        return Mapped(26 * LE, parts), [*disks]
    stripe = 64 << 10
    parts = [
        Segment(
            number * stripe,
            stripe,
            (first, second)[number % 2],
            (LVM + 116 * LE, 1 << 20)[number % 2] + number // 2 * stripe,
        )
        for number in range(16 * LE // stripe)
    ]
    return Mapped(16 * LE, parts), [*disks]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "kind", "journal"),
    [
        ("boot", "ext4", "clean"),
        ("root", "ext4", "clean"),
        ("grown", "ext3", "clean"),
        ("stripe", "ext4", "clean"),
    ],
)
def test_every_field_of_the_server_is_as_the_kernel_shows_it(name: str, kind: str, journal: str) -> None:
    volume, disks = server(name)
    assert recognise(volume)
    found = Ext(volume)
    assert found.kind == kind
    assert found.facts()["journal"] == journal
    assert differences(found, disks, lines_of(f"server.{name}")) == []


@pytest.mark.golden
def test_every_field_of_an_ext2_is_as_the_kernel_shows_it() -> None:
    disk = GoldenDisk(321, "drive-sata0")
    found = Ext(part_of(Disk(disk), 489472 * 512, 98304 * 512))
    assert found.kind == "ext2"
    assert found.facts() == {
        "label": "",
        "uuid": "780e2a28-71b3-4f3e-87a1-5e760b180e8c",
        "journal": "none",
    }
    assert differences(found, [disk], lines_of("windows.p6")) == []


@pytest.mark.golden
def test_a_disk_that_was_copied_while_mounted_is_as_after_replay() -> None:
    disk = GoldenDisk(322, "drive-virtio1")
    found = Ext(Disk(disk))
    assert found.facts()["journal"] == "replayed: 110 blocks of 237 transactions"
    assert differences(found, [disk], lines_of("ext4-open.whole")) == []


@pytest.mark.parametrize("size", [0, 1, 1024, 1081, 4096])
def test_other_content_is_not_recognised(size: int) -> None:
    assert not recognise(Disk(MemoryDisk(bytes(size))))
    assert not recognise(Disk(MemoryDisk(b"\xff" * size)))
