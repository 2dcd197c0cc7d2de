"""The files in the golden disk images, through a mount and restored: every field of every entry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.mounts import Mounted, mounted
from tests.support.program import PBSFS, output_of
from tests.support.truth import FILES, Archive, differences

pytestmark = [pytest.mark.golden, pytest.mark.mount]

KEY = str(golden.ROOT / "keys" / "plain.json")

VOLUMES = [
    Archive("vm/320/latest/scsi0-p2", "server.boot"),
    Archive("vm/320/latest/vg--sys5-root", "server.root"),
    Archive("vm/320/latest/vg--sys5-var", "server.var"),
    Archive("vm/320/latest/vg--sys5-stripe", "server.stripe"),
    Archive("vm/320/latest/vg--sys5-grown", "server.grown"),
    Archive("vm/321/latest/sata0-p6", "windows.p6"),
    Archive("vm/322/latest/virtio0", "btrfs.whole"),
    Archive("vm/322/latest/virtio1", "ext4-open.whole"),
    Archive("vm/322/latest/virtio2", "xfs-open.whole"),
    Archive("vm/322/latest/vgthin5-home", "thin.home"),
    Archive("vm/323/latest/vgthin5-home", "thin.home", "plain"),
]


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    place = tmp_path_factory.mktemp("disks") / "m"
    with mounted(
        FILES / "datastore", place, "--keyfile", KEY, "-o", "noignore_permissions", files=True
    ) as found:
        yield found


@pytest.mark.parametrize("volume", VOLUMES, ids=lambda volume: volume.truth)
def test_every_field_of_every_entry_is_as_it_was(mount: Mounted, volume: Archive) -> None:
    assert differences(mount / f"files/{volume.path}", volume) == []


@pytest.mark.parametrize("volume", [v for v in VOLUMES if "open" in v.truth], ids=lambda volume: volume.truth)
def test_a_restore_is_as_it_was(volume: Archive, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root restores owners and devices")
    datastore = str(FILES / "datastore")
    output_of(PBSFS, "export", "--datastore-dir", datastore, f"files/{volume.path}", str(tmp_path / "copy"))
    assert differences(tmp_path / "copy", volume) == []


def test_what_was_replayed_is_told() -> None:
    told = output_of(
        PBSFS, "info", "--datastore-dir", str(FILES / "datastore"), "files/vm/322/latest/virtio1"
    )
    assert "file_system:     ext4" in told
    assert "journal:         replayed: 110 blocks of 237 transactions" in told


def test_the_tree_beside_files_stays_as_it_is(mount: Mounted) -> None:
    assert "drive-virtio0.img" in os.listdir(mount / "vm/322/latest")
    assert {"guest", "virtio0", "virtio1", "virtio2"} <= set(os.listdir(mount / "files/vm/322/latest"))


def test_what_is_not_read_is_a_note(mount: Mounted) -> None:
    assert "LUKS" in (mount / "files/vm/321/latest/sata0-p7.txt").read_text()
