"""`pbsfs demo`, by the real program: for root and for other users, whatever their PATH is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.needs import need, need_fuse
from tests.support.program import PBSFS, environment, output_of

pytestmark = pytest.mark.mount

USERS_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
"""What Debian's /etc/profile sets for users: without /usr/sbin, where mke2fs and debugfs are."""

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
    assert said.endswith("All of it came back as it was stored.\n")
    assert said.count("equal to the original") == 2
    assert "Hello from inside the backup.\n" in said
    assert list(tmp_path.iterdir()) == []
