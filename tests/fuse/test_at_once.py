"""Requests that are answered without a task of pyfuse3's, and those that are not."""

from __future__ import annotations

from pbsfs.fuse import shim  # isort: skip - before pyfuse3, see there

import errno
import mmap
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
import trio
import trio.testing

from pbsfs.fuse.attributes import Ownership
from pbsfs.fuse.inodes import ROOT
from pbsfs.fuse.operations import Operations
from pbsfs.reader.reader import open_reader
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree import Tree
from pbsfs.tree.entries import LASTS
from tests.contents.trees import directory, file
from tests.support import made
from tests.support.mounts import mounted

NOBODY = cast(pyfuse3.RequestContext, None)
ARCHIVE = "files/ct/200/2023-11-14T22:13:20Z/root"
ACL = b"system.posix_acl_access"
FILES = {
    b"f%03d" % number: made.image(number, "r", tail=number * 37)[-number * 37 - 1 :] for number in range(120)
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    files: list[Node] = [file(name, data) for name, data in FILES.items()]
    written = write(directory(b"", *files, file(b"x", b"X", xattrs={b"user.a": b"1"})), split=True)
    assert written.payload is not None
    writer = DatastoreWriter(tmp_path / "store")
    writer.add_snapshot(
        made.snapshot("200", type="ct"),
        {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload},
    )
    return writer.path


def serve(
    store: Path, work: Callable[[Operations], Awaitable[None]], clock: trio.abc.Clock | None = None
) -> None:
    async def run() -> None:
        async with open_reader(DirectorySource(store)) as reader:
            await work(Operations(Tree(reader, files=True), Ownership(1, 2, 0), {"user.own": b"here"}))

    trio.run(run, clock=clock)


async def number_of(operations: Operations, name: str) -> int:
    number = ROOT
    for part in f"{ARCHIVE}/{name}".strip("/").split("/"):
        number = (await operations.lookup(number, part.encode(), NOBODY)).st_ino
    return number


def test_a_file_whose_place_is_in_memory_is_opened_read_and_closed(store: Path) -> None:
    async def work(operations: Operations) -> None:
        first, second = await number_of(operations, "f003"), await number_of(operations, "f004")
        slow = (await operations.open(first, os.O_RDONLY, NOBODY)).fh  # fetches the chunk
        opened = operations.open_at_once(second, os.O_RDONLY)
        assert opened is not None
        fh, keep_cache = opened
        assert keep_cache
        assert fh != slow
        content = FILES[b"f004"]
        assert bytes(operations.read_at_once(fh, 0, 1 << 20) or b"") == content
        assert bytes(operations.read_at_once(fh, 7, 9) or b"") == content[7:16]
        assert operations.read_at_once(fh, len(content), 9) == b""
        operations.release_at_once(fh)
        with pytest.raises(KeyError):
            operations.read_at_once(fh, 0, 1)
        assert bytes(await operations.read(slow, 0, 1 << 20)) == FILES[b"f003"]

    serve(store, work)


def test_what_has_to_wait_or_fails_is_left_to_pyfuse3(store: Path) -> None:
    async def work(operations: Operations) -> None:
        inode = await number_of(operations, "f003")
        assert operations.open_at_once(inode, os.O_RDONLY) is None  # nothing of the payload is in memory
        await operations.open(inode, os.O_RDONLY, NOBODY)
        assert operations.open_at_once(inode, os.O_WRONLY) is None
        assert operations.open_at_once(inode, os.O_RDONLY | os.O_TRUNC) is None
        assert operations.open_at_once(ROOT, os.O_RDONLY) is None

    serve(store, work)


def test_entries_that_are_in_memory_are_looked_up(store: Path) -> None:
    async def work(operations: Operations) -> None:
        root = await number_of(operations, "")
        assert operations.lookup_at_once(root, b"f003") is None  # the directory was not listed
        slow = await operations.lookup(root, b"f003", NOBODY)
        found = operations.lookup_at_once(root, b"f004")
        assert found is not None
        assert operations.inodes[found.inode].lookups == 1
        assert found.size == len(FILES[b"f004"])
        assert found.lasts == found.entry_lasts == LASTS
        again = await operations.lookup(root, b"f004", NOBODY)
        assert (again.st_ino, again.st_mode, again.st_mtime_ns) == (found.inode, found.mode, found.mtime_ns)
        assert operations.getattr_at_once(found.inode) == found
        operations.forget_at_once(found.inode)
        assert operations.inodes[found.inode].lookups == 1
        assert operations.inodes[slow.st_ino].lookups == 1
        assert operations.lookup_at_once(root, b"missing") is None
        assert operations.lookup_at_once(ROOT, b"files") is None
        assert operations.getattr_at_once(ROOT) is None

    serve(store, work)


def test_entries_last_although_nobody_asked_for_the_snapshot_again(store: Path) -> None:
    """A program whose working directory is in an archive asks for nothing above it."""
    clock = trio.testing.MockClock()

    async def work(operations: Operations) -> None:
        root = await number_of(operations, "")
        await operations.lookup(root, b"f003", NOBODY)
        clock.jump(3600)
        found = operations.lookup_at_once(root, b"f003")
        assert found is not None
        assert found.entry_lasts == LASTS

    serve(store, work, clock)


def test_an_attribute_is_missing_only_where_that_is_known(store: Path) -> None:
    async def work(operations: Operations) -> None:
        plain, attributed = await number_of(operations, "f001"), await number_of(operations, "x")
        assert operations.lacks_xattr(plain, ACL)
        assert not operations.lacks_xattr(plain, b"user.own")
        assert not operations.lacks_xattr(attributed, ACL)
        assert not operations.lacks_xattr(ROOT, ACL)

    serve(store, work)


class _Failing:
    """Handlers that fail, as they do for handles and inodes that are not known."""

    def __getattr__(self, _name: str) -> object:
        raise ZeroDivisionError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_handlers", _Failing())


def test_an_error_is_left_to_pyfuse3_without_a_word(
    failing: None, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert shim._lookup(1, None, None) == 0
    assert shim._getattr(1, None) == 0
    assert shim._open(1, 0, [0]) == -1
    assert shim._read(0, 1, 0, 10) == 0
    assert shim._release(1) == 0
    assert shim._lacks_xattr(1, None) == 0
    assert not caplog.records
    assert capfd.readouterr().err == ""


@pytest.mark.mount
def test_many_readers_at_once_get_every_file(store: Path, tmp_path: Path) -> None:
    with mounted(store, tmp_path / "m", files=True) as mount:
        root = mount / ARCHIVE
        found: list[dict[bytes, bytes]] = []

        def read_all() -> None:
            contents = {}
            for name in FILES:
                fd = os.open(os.fsencode(root) + b"/" + name, os.O_RDONLY)
                try:
                    contents[name] = os.read(fd, 1 << 20)
                    with pytest.raises(OSError, match="No data") as caught:
                        os.getxattr(fd, ACL.decode())
                    assert caught.value.errno == errno.ENODATA
                finally:
                    os.close(fd)
            found.append(contents)

        threads = [threading.Thread(target=read_all) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [FILES] * 6
        assert os.getxattr(root / "x", "user.a") == b"1"
        # The other tasks of the loop still get their turn, and an open file does not keep the mount.
        with (root / "f003").open("rb"):
            assert sorted(os.listdir(root)) == sorted([*map(os.fsdecode, FILES), "x"])


@pytest.mark.mount
def test_a_hole_is_zeros_whatever_the_size_of_the_read(tmp_path: Path) -> None:
    """Replies of a few sizes are sent from little memory, and cut where a chunk with data begins."""
    kib, mib = 1 << 10, 1 << 20
    data = made.image(1, "r" + "0" * 63 + "r", chunk_size=64 * kib, tail=5000)
    writer = DatastoreWriter(tmp_path / "store")
    (tmp_path / "image").write_bytes(data)
    images = {"drive-scsi0.img.fidx": tmp_path / "image"}
    writer.add_snapshot(made.snapshot("100"), images, chunk_size=64 * kib)
    sizes = [4 * kib, 12 * kib, 16 * kib, 20 * kib, 64 * kib, 100 * kib, mib - 4 * kib, mib, 3 * mib]
    with mounted(tmp_path / "store", tmp_path / "m") as mount:
        fd = os.open(mount / f"{made.snapshot('100')}/drive-scsi0.img", os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 3 * mib) as memory, memoryview(memory) as target:
                for size in sizes:
                    for offset in (0, 64 * kib, 68 * kib, mib, len(data) // (4 * kib) * 4 * kib - size):
                        memory[:] = b"x" * len(memory)  # what the kernel did not fill is not zeros
                        done = os.preadv(fd, [target[:size]], offset)
                        assert done == min(size, len(data) - offset)
                        assert target[:done] == data[offset : offset + done]
        finally:
            os.close(fd)
