"""What docs/semantics.md promises of mounts from a server: a test for each promise, by its name."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pbsfs.base.names import Namespace
from tests.support import made
from tests.support.mounts import SOON, Mounted, fails_with, mounted, opened
from tests.support.program import PBSFS, output_of, pbsfs
from tests.support.server import READER, ReferenceServer
from tests.support.server.releases import PBS_4
from tests.support.serving import SECRET, STORE, access, serving
from tests.support.stocked import (
    CHUNK,
    CONFIGURATION,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    LAYOUT,
    LOG,
    NEWER_IMAGE,
    SECOND,
    Stocked,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


def test_what_a_server_has_not_told_is_learned_by_opening(
    server: ReferenceServer, own: Stocked, tmp_path: Path
) -> None:
    size = len(own.contents[IMAGE])
    with mounted(access(server), tmp_path / "m") as mount:

        def told(path: str) -> tuple[int, int]:
            found = (mount / path).stat()
            return found.st_size, found.st_blocks

        assert told(IMAGE) == (size, -(-size // 512))
        for path, content in own.contents.items():
            assert (mount / path).stat().st_size == len(content)
            assert (mount / path).read_bytes() == content
        assert told(IMAGE) == (size, (len(LAYOUT.replace("0", "")) * CHUNK + 1536) // 512)
        for path, content in own.contents.items():  # from the kernel's cache now
            assert (mount / path).read_bytes() == content
    with mounted(access(server), tmp_path / "m2") as mount:
        output_of("cp", str(mount / IMAGE), str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == own.contents[IMAGE]
        assert (tmp_path / "copy").stat().st_blocks * 512 < size - 2 * CHUNK
        with (mount / NEWER_IMAGE).open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == CHUNK


MAP = """
import mmap, os, sys
fd = os.open(sys.argv[2], os.O_RDONLY)
with mmap.mmap(fd, 0, getattr(mmap, sys.argv[1]), mmap.PROT_READ) as found:
    sys.stdout.buffer.write(found)
"""


def test_files_can_be_mapped_and_sent(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    def mapped(path: Path, flags: str) -> bytes:
        # In a process of its own: the server here could not answer while Python waits for a page.
        command = [sys.executable, "-c", MAP, flags, str(path)]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout

    def sent(path: Path) -> bytes:
        with opened(path) as fd, (tmp_path / "sent").open("wb") as out:
            while os.sendfile(out.fileno(), fd, None, 1 << 20):
                pass
        return (tmp_path / "sent").read_bytes()

    for read in (partial(mapped, flags="MAP_SHARED"), partial(mapped, flags="MAP_PRIVATE"), sent):
        for source in (own.path, access(server)):
            with mounted(source, tmp_path / "m") as mount:
                for path, content in own.contents.items():
                    os.listdir((mount / path).parent)  # from which the kernel has lengths that are not exact
                    assert read(mount / path) == content


def test_looking_opens_no_session(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    # A busy machine answers late, and pbsfs then opens more sessions, as for a distant server.
    with mounted(access(server), tmp_path / "m", "--connections", "1") as mount:
        for directory, _names, files in os.walk(mount.place):
            for name in (*files, "."):
                path = Path(directory, name)
                path.stat()
                for attribute in os.listxattr(path):
                    os.getxattr(path, attribute)
        assert os.getxattr(mount / FIRST, "user.pbs.notes") == b"before the upgrade"
        assert fails_with(errno.ENODATA, lambda: os.getxattr(mount / IMAGE, "user.pbs.chunk_size"))
        for blob_file in (CONFIGURATION, LOG, f"{FIRST}/index.json", f"{SECOND}/index.json"):
            assert (mount / blob_file).read_bytes()
        assert server.sessions.all() == []
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert [str(session.snapshot) for session in server.sessions.all()] == [FIRST]


def test_a_server_that_is_away_is_waited_for(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    def listing(mount: Mounted) -> list[str]:
        return os.listdir(mount / "vm/100")

    def logged(mount: Mounted, words: str) -> bool:
        return any(words in line for line in mount.log_lines())

    with mounted(access(server), tmp_path / "m", *SOON) as mount, ThreadPoolExecutor(2) as readers:
        names = listing(mount)
        server.go_down()
        read = readers.submit((mount / IMAGE).read_bytes)
        wait_until(lambda: logged(mount, "trying again"), "it is tried again")
        listed = readers.submit(listing, mount)
        assert not read.done()
        server.come_back()
        assert read.result(30) == own.contents[IMAGE]
        assert listed.result(30) == names
        assert logged(mount, "available again")
    with mounted(access(server), tmp_path / "m2", *SOON, "--retry-timeout", "0.5") as mount:
        assert listing(mount) == names
        server.go_down()
        assert fails_with(errno.EIO, lambda: (mount / IMAGE).open("rb"))
        wait_until(
            lambda: fails_with(errno.EIO, lambda: listing(mount)), "the listing is too old to be shown"
        )
        server.come_back()
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert listing(mount) == names
        assert logged(mount, "Connection refused")


def test_a_group_without_snapshots_is_empty(own: Stocked, tmp_path: Path) -> None:
    (own.path / "vm" / "199").mkdir()
    (own.path / "vm" / "199" / "owner").write_text("tester@pbs\n")
    with (
        serving(own.path, release=PBS_4) as server,
        mounted(access(server), tmp_path / "m", "--refresh", "600") as mount,
    ):
        assert os.listdir(mount / "vm/199") == []
        assert fails_with(errno.ENOENT, lambda: os.listdir(mount / "vm/198"))
        for command in (["ls", "-lR"], ["find"], ["du", "-a"]):
            output_of(*command, str(mount.place))
        assert pbsfs("verify", env=access(server)).returncode in (0, 5)  # 5: keys are missing
        assert "backup_count:    0" in output_of(PBSFS, "info", "vm/199", env=access(server))


def test_what_is_forbidden_is_left_out(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    store, token = f"/datastore/{STORE}", "reader@pbs!some"
    seeing = frozenset({"Datastore.Modify"})  # that it is there, and no more
    for namespace in ("closed", "hidden"):
        content = {"a.img.fidx": own.contents[IMAGE]}
        own.writer.add_snapshot(made.snapshot(namespace=Namespace((namespace,))), content)
    grants = {f"{store}/prod": READER, f"{store}/closed": seeing}
    server.accounts.grant("reader@pbs", store, READER | seeing)  # a token has no more than its user
    server.add_token(token, SECRET, grants=grants)
    with mounted(access(server, token, SECRET), tmp_path / "m", *SOON) as mount:
        assert os.listdir(mount.place) == ["ns"]
        assert sorted(os.listdir(mount / "ns")) == ["closed", "prod"]
        for _ in range(2):
            assert fails_with(errno.EACCES, lambda: os.listdir(mount / "ns/closed"))
        assert (mount / IN_NAMESPACE).read_bytes() == own.contents[IN_NAMESPACE]
        assert fails_with(errno.ENOENT, (mount / "ns/hidden").stat)
        lines = mount.log_lines()
        assert len([line for line in lines if f"on {store}/closed" in line]) == 1
        assert len([line for line in lines if f"on {store}" in line]) == len(lines) == 2
