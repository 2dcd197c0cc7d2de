"""What is booted, found in a tree without QEMU."""

from __future__ import annotations

from pathlib import Path

import trio

from pbsfs.boot.backup import Backup, find_backup
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Tree
from tests.support import made
from tests.support.stocked import FIRST

SIZES = {"drive-scsi0.img.fidx": 4096, "drive-virtio1.img.fidx": 8192, "drive-efidisk0.img.fidx": 512}
CONFIGURATION = b"boot: order=virtio1\nmemory: 64\n"


def found(path: Path, *paths: str) -> list[Backup]:
    async def main() -> list[Backup]:
        async with open_reader(DirectorySource(path)) as reader:
            return [await find_backup(Tree(reader), name) for name in paths]

    return trio.run(main)


def test_a_snapshot_has_all_its_disks_and_an_image_is_one(tmp_path: Path) -> None:
    files = {name: bytes(size) for name, size in SIZES.items()}
    DatastoreWriter(tmp_path).add_snapshot(made.snapshot(), files | {"qemu-server.conf.blob": CONFIGURATION})
    whole, latest, one = found(tmp_path, FIRST, "vm/100/latest", f"{FIRST}/drive-scsi0.img")
    assert whole == latest
    assert whole.snapshot == one.snapshot == FIRST
    assert whole.machine.disks == ("virtio1", "scsi0")
    assert one.machine.disks == ("scsi0",)
    assert {whole.machine.memory, one.machine.memory} == {64}
    assert {whole.machine.efi_variables, one.machine.efi_variables} == {512}
