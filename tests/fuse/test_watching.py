"""What a mount says of itself: the directory `.pbsfs`, and the line that SIGUSR1 logs."""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import errno
import hashlib
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
import trio

from pbsfs import __version__
from pbsfs.fuse.attributes import Ownership
from pbsfs.fuse.inodes import ROOT
from pbsfs.fuse.operations import Operations
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.archives import Node
from pbsfs.tree import Directory, Tree
from tests.support import damage
from tests.support.mounts import Mounted, fails_with, mounted
from tests.support.serving import PASSWORD, access, serving
from tests.support.small_archive import archive_with
from tests.support.stocked import CHUNK, ENCRYPTED, FIRST, IMAGE, Stocked, stock
from tests.support.waiting import wait_until

NOBODY = cast(pyfuse3.RequestContext, None)


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


def numbers(mount: Mounted) -> dict[str, float]:
    lines = (mount / ".pbsfs/stats").read_text().splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines)}


def change(mount: Mounted, before: dict[str, float]) -> dict[str, float]:
    """The numbers that are not what they were, and by how much."""
    return {name: value - before[name] for name, value in numbers(mount).items() if value != before[name]}


@pytest.mark.mount
def test_reads_of_a_directory_source_are_counted(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert set(os.listdir(mount / ".pbsfs")) == {"stats", "errors", "version"}
        before = numbers(mount)
        assert before["fetches"] == before["sessions"] == 0
        with open(mount / IMAGE, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert len(os.pread(file.fileno(), 4096, 0)) == 4096
            found = change(mount, before)
            assert found["cache_misses"] >= found["fetches"] == found["fetches_within_10s"] == 1
            assert found["bytes_served"] >= 4096
            assert found["bytes_fetched"] > 0 < found["fetch_seconds"] < 60
            assert found["open_files"] == 1
            assert found["cache_bytes"] == CHUNK
            assert os.pread(file.fileno(), 4096, 8192)
            assert change(mount, before)["cache_hits"] > found.get("cache_hits", 0)
        assert numbers(mount)["resident_bytes"] > 1 << 20
        assert f"pbsfs {__version__}\n" in (mount / ".pbsfs/version").read_text()


@pytest.mark.mount
def test_sessions_of_a_server_are_counted(stocked: Stocked, tmp_path: Path) -> None:
    with serving(stocked.path) as server, mounted(access(server), tmp_path / "m") as mount:
        assert numbers(mount)["sessions_opened"] == 0
        assert (mount / IMAGE).read_bytes()
        found = numbers(mount)
        assert found["sessions"] >= 1 <= found["sessions_opened"]
        assert found["bytes_fetched"] > 0
        for name in ("stats", "errors", "version"):
            assert PASSWORD not in (mount / f".pbsfs/{name}").read_text()
        server.drop_connections()
        wait_until(lambda: numbers(mount)["sessions"] == 0, "the sessions end")


@pytest.mark.mount
def test_errors_are_counted_and_listed(stocked: Stocked, tmp_path: Path) -> None:
    digest = hashlib.sha256(stocked.contents[IMAGE][:CHUNK]).digest()
    damage.flip_bit(stocked.writer.chunk_path(digest), 8 * 1000)
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert (mount / ".pbsfs/errors").read_text() == ""
        assert fails_with(errno.EIO, (mount / IMAGE).read_bytes)
        assert fails_with(errno.EACCES, (mount / ENCRYPTED).read_bytes)
        found = numbers(mount)
        assert found["errors_damage"] >= 1 <= found["errors_key"]
        assert found["errors_internal"] == found["errors_source"] == 0
        logged = [line.split(" ", 3)[2:] for line in mount.log_lines()]
        shown = [line.split(" ", 2)[1:] for line in (mount / ".pbsfs/errors").read_text().splitlines()]
        assert shown == logged


@pytest.mark.mount
def test_what_a_server_that_is_down_costs_is_counted(stocked: Stocked, tmp_path: Path) -> None:
    options = ("--retry-timeout", "2")
    with serving(stocked.path) as server, mounted(access(server), tmp_path / "m", *options) as mount:
        os.listdir(mount / FIRST)
        server.go_down()
        assert fails_with(errno.EIO, (mount / IMAGE).read_bytes)
        found = numbers(mount)
        assert found["retries"] >= 2 > found["outages"] > 0
        assert found["errors_source"] >= 1 > found["errors_damage"] == found["sessions"]
        assert any("trying again" in line for line in mount.log_lines())
        assert "trying again" in (mount / ".pbsfs/errors").read_text()


@pytest.mark.mount
def test_processes_that_read_disks_are_counted(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", files=True) as mount:
        assert numbers(mount)["parsers_started"] == 0
        os.listdir(mount / f"files/{FIRST}")
        found = numbers(mount)
        assert (found["parsers"], found["parsers_started"], found["parsers_failed"]) == (1, 1, 0)


@pytest.mark.mount
def test_programs_that_walk_through_a_mount_do_not_see_it(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert (mount / ".pbsfs").is_dir()
        assert ".pbsfs" not in os.listdir(mount.place)
        found = subprocess.run(["find", mount.place], capture_output=True, text=True, check=True).stdout
        assert IMAGE in found
        assert ".pbsfs" not in found
        for path in ("vm/.pbsfs", ".pbsfs/.pbsfs", ".pbsfs/other"):
            assert fails_with(errno.ENOENT, (mount / path).stat)
        assert fails_with(errno.EROFS, lambda: (mount / ".pbsfs/stats").write_text("0"))


@pytest.mark.mount
def test_sigusr1_logs_the_numbers_whatever_the_level_of_the_log(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--log-level", "error") as mount:
        mount.signal(signal.SIGUSR1)
        wait_until(mount.log_lines, "it is logged")
        (line,) = mount.log_lines()
        assert f" INFO {mount.place}: uptime_seconds=" in line
        assert " cache_hits=0 " in line
        assert mount.is_mounted()
        assert (mount / ".pbsfs/errors").read_text() == ""


@pytest.mark.parametrize("own", [True, False], ids=["a directory of its own", "none"])
def test_a_file_of_the_backup_is_shown_instead(tmp_path: Path, own: bool) -> None:
    children = [Node(b".pbsfs", children=[Node(b"backed up", stat.S_IFREG | 0o644)])] if own else []
    place = archive_with(tmp_path / "store", Node(b"x", stat.S_IFREG | 0o644), *children)

    async def main() -> None:
        async with open_reader(DirectorySource(tmp_path / "store")) as reader:
            tree = Tree(reader, files=True)
            root = await tree.find(place)
            assert isinstance(root, Directory)
            operations = Operations(tree, Ownership(1, 2, 0), root=root)
            found = await operations.lookup(ROOT, b".pbsfs", NOBODY)
            name, missing = (b"backed up", b"stats") if own else (b"stats", b"backed up")
            await operations.lookup(found.st_ino, name, NOBODY)
            with pytest.raises(pyfuse3.FUSEError):
                await operations.lookup(found.st_ino, missing, NOBODY)

    trio.run(main)


def test_file_handles_find_it_again(stocked: Stocked) -> None:
    async def main() -> None:
        async with open_reader(DirectorySource(stocked.path)) as reader:
            tree = Tree(reader)
            root = await tree.find("vm")
            assert isinstance(root, Directory)
            operations = Operations(tree, Ownership(1, 2, 0), root=root)
            directory = await operations.lookup(ROOT, b".pbsfs", NOBODY)
            file = await operations.lookup(directory.st_ino, b"stats", NOBODY)
            await operations.forget([(file.st_ino, 1), (directory.st_ino, 1)])
            for number in (file.st_ino, directory.st_ino):
                assert (await operations.lookup(number, b".", NOBODY)).st_ino == number
            assert (await operations.lookup(file.st_ino, b"..", NOBODY)).st_ino == directory.st_ino
            assert (await operations.lookup(directory.st_ino, b"..", NOBODY)).st_ino == ROOT

    trio.run(main)
