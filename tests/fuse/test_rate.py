"""A mount that fetches little in a second: reads wait, and all else answers."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.support.mounts import mounted
from tests.support.stocked import CONFIGURATION, IMAGE, stock
from tests.support.waiting import wait_until


@pytest.mark.mount
def test_reads_wait_and_the_mount_answers_and_ends(tmp_path: Path) -> None:
    stocked = stock(tmp_path / "datastore")
    failed: list[OSError] = []
    with mounted(stocked.path, tmp_path / "m", "--limit-rate", "1") as mount:
        assert (mount / CONFIGURATION).stat().st_size  # the manifest takes minutes of the limit

        def read() -> None:
            try:
                (mount / IMAGE).read_bytes()
            except OSError as error:
                failed.append(error)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        wait_until(lambda: "open_files" in (mount / ".pbsfs/stats").read_text(), "it answers")
        assert os.listdir(mount / "vm/100")
        assert reading.is_alive()
        mount.signal(signal.SIGTERM)
        reading.join(30)
    assert not reading.is_alive()
    assert failed
