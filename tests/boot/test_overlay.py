"""Overlays for what the guest writes, made by the real qemu-img."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pbsfs.base.errors import OutputError, UsageError
from pbsfs.boot.overlay import Drives
from tests.support.needs import need
from tests.support.program import output_of

FIRST, SECOND = "drive-scsi0.img", "drive-scsi1.img"


@pytest.fixture(autouse=True)
def _programs() -> None:
    need("qemu-img", "nbdkit")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Files in the place of exports: qemu-img looks at what an overlay is made on."""
    for name in (FIRST, SECOND):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    return tmp_path


def drives(images: Path, keep: Path | None, first: str = FIRST) -> Drives:
    return Drives(lambda image: f"file:{images / image}", first, keep)


def test_without_a_file_qemu_discards_the_writes(images: Path) -> None:
    wanted = [f"file=file:{images}/{FIRST}", "format=raw", "snapshot=on"]
    assert drives(images, None).of_disk("scsi0") == wanted
    assert drives(images, None).of_image(FIRST) == wanted


def test_the_overlays_of_a_machine_that_never_ran_are_removed_and_no_others(images: Path) -> None:
    keep = images / "keep.qcow2"
    machine = drives(images, keep)
    assert machine.of_disk("scsi0") == [f"file={keep}", "format=qcow2"]
    assert machine.of_disk("scsi1") == [f"file={images}/keep-drive-scsi1.qcow2", "format=qcow2"]
    assert f"file:{images}/{FIRST}" in output_of("qemu-img", "info", keep)
    machine.keep_new()
    machine.remove_new()
    (images / "keep-drive-scsi1.qcow2").unlink()
    again = drives(images, keep)
    for disk in ("scsi0", "scsi1"):
        again.of_disk(disk)
    again.remove_new()
    assert keep.exists()
    assert not (images / "keep-drive-scsi1.qcow2").exists()


def test_an_overlay_of_another_image_is_refused(images: Path) -> None:
    keep = images / "keep.qcow2"
    machine = drives(images, keep)
    machine.of_image(FIRST)
    machine.keep_new()
    before = keep.read_bytes()
    with pytest.raises(
        UsageError, match=f"is an overlay of .*{FIRST}, not of this backup; boot that, or name"
    ):
        drives(images, keep, SECOND).of_image(SECOND)
    assert keep.read_bytes() == before


def test_an_overlay_that_cannot_be_made_is_an_error_that_names_it(images: Path) -> None:
    for name in ("no/folder", "x" * 300):
        with pytest.raises(OutputError, match=f"--keep .*{os.path.basename(name)}: "):
            drives(images, images / name).of_image(FIRST)
