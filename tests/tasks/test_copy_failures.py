"""What a copy that fails, or is cancelled, leaves: nothing, and the file that was there before."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, OutputError, SourceError
from pbsfs.tasks.image.copy import copy_image
from pbsfs.tasks.image.opening import open_target
from tests.support import made
from tests.support.needs import need_root
from tests.support.run import in_trio, run
from tests.support.sources import CHUNK_SIZE, MemorySource
from tests.tasks.copies import (
    CONTENT,
    NAME,
    SMALL,
    an_image,
    export,
    is_clean,
    nobody_asks,
)


@pytest.mark.parametrize("force", [True, False])
@in_trio
async def test_damage_ends_the_copy_and_leaves_neither_file_nor_part(tmp_path: Path, force: bool) -> None:
    source = MemorySource()
    (tmp_path / "other").touch()
    async with an_image(CONTENT, source=source) as image:
        source.damage(image.index.digest(2), 1000)
        with (
            pytest.raises(DamageError, match=image.index.digest(2).hex()),
            open_target(tmp_path / "out", NAME, image.size, force=force) as target,
        ):
            await copy_image(image, target, nobody_asks)
        assert image.store.sequential_readers == 0
    assert is_clean(tmp_path, "other")


@in_trio
async def test_force_and_a_failure_leave_the_old_file_as_it_was(tmp_path: Path) -> None:
    source = MemorySource()
    (tmp_path / "out").write_bytes(b"old")
    async with an_image(CONTENT, source=source) as image:
        source.fail("fetch_chunk", SourceError("no answer"))
        with (
            pytest.raises(SourceError, match="no answer"),
            open_target(tmp_path / "out", NAME, image.size, force=True) as target,
        ):
            await copy_image(image, target, nobody_asks)
    assert (tmp_path / "out").read_bytes() == b"old"
    assert is_clean(tmp_path, "out")


def full_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Makes the disk full once `room` bytes are written."""
    real = os.pwrite
    left = room

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, data[:left], offset)
        left -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("room", [0, 1000, CHUNK_SIZE + 7])
def test_a_full_disk_is_told_and_no_part_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    content = made.image(1, "rr0rrr0rr0rrr")
    for _ in range(10):  # reader and writer may fail in either order
        with monkeypatch.context() as patch:
            full_after(patch, room)
            with pytest.raises(OutputError, match=r"cannot write .*out: No space left on device; free some"):
                run(lambda: export(content, tmp_path / "out", pieces=SMALL))
        assert is_clean(tmp_path)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:5000], offset))
    run(lambda: export(CONTENT, tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.root
def test_a_file_system_that_is_really_full_is_told_and_no_part_stays(tmp_path: Path) -> None:
    need_root("mount a small file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], check=True)
    try:
        with pytest.raises(OutputError, match="No space left on device; free some"):
            run(lambda: export(made.image(1, "r" * 16), tmp_path / "out"))
        assert is_clean(tmp_path)
        run(lambda: export(made.image(1, "0" * 100 + "r"), tmp_path / "out"))  # holes take no room
        assert (tmp_path / "out").stat().st_size == 101 * CHUNK_SIZE
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_failing_sync_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="Input/output error"):
        run(lambda: export(CONTENT, tmp_path / "out"))
    assert is_clean(tmp_path)


@in_trio
async def test_a_copy_that_is_cancelled_leaves_no_part(tmp_path: Path) -> None:
    source = MemorySource()
    async with an_image(CONTENT, source=source) as image:
        source.hold(image.index.digest(2))
        scope = trio.CancelScope()

        async def cancel() -> None:
            await wait_all_tasks_blocked()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            with scope, open_target(tmp_path / "out", NAME, image.size, force=False) as target:
                await copy_image(image, target, nobody_asks)
        assert scope.cancelled_caught
        assert image.store.sequential_readers == 0
    assert is_clean(tmp_path)


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), ValueError("any")])
def test_whatever_ends_the_copy_no_part_stays(tmp_path: Path, error: Exception) -> None:
    def advance(_count: int) -> None:
        raise error  # as showing the progress may

    with pytest.raises(type(error)):
        run(lambda: export(CONTENT, tmp_path / "out", advance=advance))
    assert is_clean(tmp_path)


def test_no_descriptor_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    run(lambda: export(CONTENT, tmp_path / "first"))
    before = open_files()
    run(lambda: export(CONTENT, tmp_path / "second"))
    with pytest.raises(OutputError):
        run(lambda: export(CONTENT, tmp_path / "second"))

    def ftruncate(_fd: int, _size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    with pytest.raises(OutputError, match="File too large"):
        run(lambda: export(CONTENT, tmp_path / "third"))
    assert open_files() == before
    assert is_clean(tmp_path, "first", "second")
