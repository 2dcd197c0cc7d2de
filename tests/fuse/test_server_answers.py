"""Mounts of a server that answers with errors: what passes is waited for, and never shown as damage."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support import damage
from tests.support.mounts import cleaned_up, fails_with, mounted, opened, read_at
from tests.support.needs import need_fuse
from tests.support.program import PBSFS, environment
from tests.support.server import ReferenceServer, Status, texts
from tests.support.serving import access, serving
from tests.support.stocked import CHUNK, CONFIGURATION, IMAGE, Stocked, stock
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

ZERO = ("--on-damage", "zero")
SOON = ("--retry-timeout", "0.3")
CHUNKS, INDEX = "/chunk", "/download?file-name=drive"


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


@pytest.fixture
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found


@pytest.mark.parametrize("text", [texts.AWAY, texts.PASSING_CHUNKS[0], texts.INTERRUPTED])
def test_an_object_store_that_is_away_is_an_error_and_never_zeros(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path, text: str
) -> None:
    with mounted(access(server), tmp_path / "m", *ZERO, *SOON) as mount:
        fault = server.faults.add(Status(match=CHUNKS, status=400, text=text, times=None))
        assert fails_with(errno.EIO, lambda: read_at(mount / IMAGE, 0, 10))
        assert fault.hits > 1
        assert os.getxattr(mount / IMAGE, "user.pbs.damaged_ranges") == b""
        server.faults.clear()
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
        assert not any("zeros" in line for line in mount.log_lines())


def test_a_read_waits_for_an_object_store_that_comes_back(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    with mounted(access(server), tmp_path / "m", *ZERO) as mount:
        fault = server.faults.add(Status(match=CHUNKS, status=400, text=texts.AWAY, times=None, skip=1))
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append((mount / IMAGE).read_bytes()))
        reader.start()
        fault.wait()
        server.faults.clear()
        reader.join(30)
        assert found == [stocked.contents[IMAGE]]
        mount.log_lines()


def test_an_index_that_the_server_can_not_open_for_want_of_descriptors_is_not_missing(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    with mounted(access(server), tmp_path / "m", *ZERO, *SOON) as mount:
        server.faults.add(Status(match=INDEX, status=400, text=texts.PASSING_FILES[0], times=None))
        assert fails_with(errno.EIO, lambda: (mount / IMAGE).open("rb"))
        lines = mount.log_lines()
        assert any("Too many open files" in line for line in lines)
        assert not any("missing" in line for line in lines)
        server.faults.clear()
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]


HURRY = """
import pbsfs.fuse.operations, pbsfs.reader.damage
pbsfs.reader.damage.ZEROS_LAST = 0.2
pbsfs.fuse.zeros.ZEROS_LOOKED_AT = 0.05
"""
"""Runs at the start of each Python: what takes a minute by the clock takes less in this test."""


def test_what_was_repaired_is_seen_in_a_file_that_stays_open(stocked: Stocked, tmp_path: Path) -> None:
    content = stocked.contents[IMAGE]
    chunk = stocked.writer.chunk_path(hashlib.sha256(content[CHUNK : 2 * CHUNK]).digest())
    whole = chunk.read_bytes()
    damage.flip_bit(chunk, 8 * 500)
    (tmp_path / "hurry").mkdir()
    (tmp_path / "hurry" / "sitecustomize.py").write_text(HURRY)
    # Not from a server in this process: it could not answer while this thread reads from the mapping.
    told = environment(PYTHONPATH=str(tmp_path / "hurry"))
    with mounted(told, tmp_path / "m", *ZERO, "--datastore-dir", str(stocked.path)) as mount:
        with opened(mount / IMAGE) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[CHUNK : 2 * CHUNK] == bytes(CHUNK)
            assert os.pread(fd, CHUNK, CHUNK) == bytes(CHUNK)
            damage.replace(chunk, whole)
            wait_until(lambda: os.pread(fd, len(content), 0) == content, "the file shows the repair")
            wait_until(lambda: mapped[:] == content, "so does its mapping")
        assert len(mount.log_lines()) == 1


# --- the start


def test_a_mount_that_starts_waits_for_maintenance_to_end_and_says_so(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    server.faults.add(Status(match="/namespace", status=400, text=texts.MAINTENANCE[2], times=None))
    command = [PBSFS, "mount", "--log-file", str(tmp_path / "log"), str(place)]
    with (
        cleaned_up(place),
        subprocess.Popen(command, env=access(server), stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("pbsfs: WARNING: opening ")
        assert "S3 refresh maintenance mode: new bucket; trying again" in line
        assert not mounted_at(place)
        server.faults.clear()
        assert process.wait(30) == 0
        assert (place / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]
        assert "available again" in process.stderr.read()
        assert "trying again" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("how", [(), ("--foreground",)], ids=["background", "foreground"])
def test_a_mount_that_waits_at_its_start_can_be_stopped(
    server: ReferenceServer, tmp_path: Path, how: tuple[str, ...]
) -> None:
    need_fuse()
    (place := tmp_path / "m").mkdir()
    server.faults.add(Status(match="/namespace", status=400, text=texts.MAINTENANCE[1], times=None))
    command = [PBSFS, "mount", *how, "--log-file", str(tmp_path / "log"), str(place)]
    with (
        cleaned_up(place),
        subprocess.Popen(command, env=access(server), stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        assert "offline maintenance mode" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert not mounted_at(place)
