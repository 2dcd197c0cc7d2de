"""`pbsfs demo`, by the real program: for root and for other users, whatever their PATH is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pbsfs.base.names import ROOT_NAMESPACE, Group
from pbsfs.testing.demo import DAY, DISK_SIZE, FIRST_BACKUP, GREETING, make_datastore, make_disks
from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, error_of, output_of, run

pytestmark = pytest.mark.mount

USERS_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
"""What Debian's /etc/profile sets for users: without /usr/sbin, where mke2fs is."""

UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""What lets root write to no file whose mode forbids it, as with other users."""


@pytest.mark.parametrize("prefix", [[], UNPRIVILEGED], ids=["", "held to modes"])
def test_it_shows_everything_and_leaves_nothing(tmp_path: Path, prefix: list[str]) -> None:
    need_fuse()
    need("setpriv")
    if os.geteuid() != 0:
        prefix = []  # every other user is held to modes anyway
    told = environment(PATH=USERS_PATH, TMPDIR=str(tmp_path), PBS_REPOSITORY="nobody@pam@nowhere:store")
    said = output_of(*prefix, PBSFS, "demo", env=told)
    assert said.endswith("Everything came back as it was stored.\n")
    assert said.count("equal to the original") == 2
    assert said.count("Hello from inside the backup.\n") == 3
    assert "/files/vm/100/latest/scsi0-p1/hello.txt\nHello from inside the backup.\nThis is day 3.\n" in said
    assert list(tmp_path.iterdir()) == []


def test_its_data_is_three_states_of_a_disk_and_a_backup_of_each(tmp_path: Path) -> None:
    disks = make_disks(tmp_path)
    contents = [disk.read_bytes() for disk in disks]
    assert [len(content) for content in contents] == [DISK_SIZE] * 3
    assert all(content[510:512] == b"\x55\xaa" and GREETING.encode() in content for content in contents)
    assert len(set(contents)) == 3
    stored = make_datastore(tmp_path / "store", disks)
    assert 0 < stored < DISK_SIZE  # what the disks share is stored once
    group = Group(ROOT_NAMESPACE, "vm", "100")
    for day, content in enumerate(contents):
        path = f"{group.snapshot(FIRST_BACKUP + day * DAY)}/drive-scsi0.img"
        copy = tmp_path / f"copy-{day}"
        output_of(PBSFS, "export", "--datastore-dir", tmp_path / "store", path, copy)
        assert copy.read_bytes() == content


def test_without_a_directory_to_write_it_says_what_to_set() -> None:
    # tempfile tries more directories than TMPDIR, all of which root may write.
    code = (
        "import sys, tempfile, click\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc']\n"
        "from pbsfs.cli import main\n"
        "main()"
    )
    python = sys.executable
    done = run([python, "-c", code, "demo"], env=environment(PATH=USERS_PATH))
    text = error_of(done, 8)
    assert text.startswith("no directory for temporary files: No usable temporary directory")
    assert text.endswith("; set TMPDIR to one that you may write")
