"""File handles on real mounts: what an NFS server's clients come back with, after the kernel forgot it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.handles import FileHandle, drop_caches
from tests.support.mounts import Mounted, fails_with, mounted
from tests.support.needs import need_root
from tests.support.stocked import CONFIGURATION, FIRST, IMAGE, Stocked, stock
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    need_root("open files by handle, and make the kernel drop what it keeps")
    return stock(tmp_path / "datastore")


@contextmanager
def by_handle(handle: FileHandle, mount: Mounted, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = handle.open(mount.place, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def test_a_handle_opens_what_the_kernel_forgot(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--refresh", "0") as mount:
        paths = ["", "vm", "vm/100", FIRST, IMAGE, CONFIGURATION]
        handles = {path: FileHandle(mount / path) for path in paths}
        numbers = {path: os.stat(mount / path).st_ino for path in paths}
        for _ in range(2):
            drop_caches()
            for path, handle in reversed(handles.items()):
                with by_handle(handle, mount) as fd:
                    assert os.fstat(fd).st_ino == numbers[path]
                    if stat.S_ISDIR(os.fstat(fd).st_mode):
                        assert sorted(os.listdir(fd)) == sorted(os.listdir(mount / path))
                    else:
                        assert read(fd) == stocked.contents[path]


def test_a_directory_that_was_opened_by_handle_has_its_parent(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        handle, parent = FileHandle(mount / FIRST), os.stat(mount / "vm/100").st_ino
        drop_caches()
        with by_handle(handle, mount) as fd:
            assert os.stat("..", dir_fd=fd).st_ino == parent
            assert os.stat("../../..", dir_fd=fd).st_ino == os.stat(mount.place).st_ino
            assert os.readlink(f"/proc/self/fd/{fd}") == str(mount / FIRST)


def test_a_link_has_a_handle_of_its_own(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        handle = FileHandle(mount / "vm/100/latest")
        drop_caches()
        with by_handle(handle, mount, os.O_PATH | os.O_NOFOLLOW) as fd:
            assert stat.S_ISLNK(os.fstat(fd).st_mode)
            assert os.readlink("", dir_fd=fd) == os.readlink(mount / "vm/100/latest")


def test_a_handle_of_what_is_gone_is_stale(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", "--refresh", "0.1") as mount:
        handles = [FileHandle(mount / IMAGE), FileHandle(mount / FIRST)]
        shutil.rmtree(stocked.path / FIRST)
        wait_until(lambda: not (mount / FIRST).exists(), "it is gone")
        drop_caches()
        assert fails_with(errno.ESTALE, lambda: handles[0].open(mount.place))
        assert fails_with(errno.ESTALE, lambda: handles[1].open(mount.place))


def test_a_handle_of_an_earlier_mount_is_stale_until_its_path_was_seen(
    stocked: Stocked, tmp_path: Path
) -> None:
    with mounted(stocked.path, tmp_path / "m") as mount:
        root, image = FileHandle(mount.place), FileHandle(mount / IMAGE)
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert fails_with(errno.ESTALE, lambda: image.open(mount.place))
        with by_handle(root, mount) as fd:
            assert sorted(os.listdir(fd)) == sorted(os.listdir(mount.place))
        os.stat(mount / IMAGE)
        drop_caches()
        with by_handle(image, mount) as fd:
            assert read(fd) == stocked.contents[IMAGE]
