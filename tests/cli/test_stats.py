"""`pbsfs stats`: what a mount did."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest

from pbsfs.testing.archives import Node
from tests.support.mounts import mounted
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.small_archive import archive_with
from tests.support.stocked import CONFIGURATION, Stocked
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


def test_the_numbers_are_printed_for_people_and_programs(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert (mount / CONFIGURATION).read_bytes()
        found = json.loads(output_of(PBSFS, "stats", "--json", mount.place))
        assert found["reads"] >= 1
        assert isinstance(found["reads"], int)
        lines = output_of(PBSFS, "stats", mount.place).splitlines()
        assert [line.split()[0] for line in lines] == list(found)
        assert f"{found['cache_limit_bytes']}  (256 MiB)" in "\n".join(lines)
        assert len({len(line.split("  (")[0]) for line in lines}) == 1  # aligned
        assert max(map(len, lines)) < 80


def test_what_is_no_mount_is_an_error(stocked: Stocked, tmp_path: Path) -> None:
    assert "is not mounted; " in error_of(pbsfs("stats", tmp_path), 7)
    assert "does not exist; " in error_of(pbsfs("stats", tmp_path / "none"), 7)
    assert "/proc is not a pbsfs mount (type proc); " in error_of(pbsfs("stats", "/proc"), 7)
    with mounted(stocked.path, tmp_path / "m") as mount:
        mount.signal(signal.SIGKILL)
        wait_until(mount.is_dead, "it is dead")
        error = error_of(pbsfs("stats", mount.place), 7)
        assert f"its process has died; clear it with: pbsfs umount {mount.place}" in error


def test_a_file_of_the_backup_is_not_taken_for_numbers(tmp_path: Path) -> None:
    own = Node(b".pbsfs", children=[Node(b"stats", stat.S_IFREG | 0o644, data=b"reads \x1b[2J\n")])
    place = archive_with(tmp_path / "store", own)
    with mounted(tmp_path / "store", tmp_path / "m", "--subtree", place, files=True) as mount:
        error = error_of(pbsfs("stats", mount.place), 7)
        assert "its .pbsfs/stats is a file of the backup; send SIGUSR1" in error
