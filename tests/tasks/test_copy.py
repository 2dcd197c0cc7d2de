"""Copying out: files with holes, what is never overwritten, pipes, devices, and what failure leaves."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, OutputError, SourceError, UsageError
from pbsfs.chunks.limits import DEFAULT, FetchLimits
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Image
from pbsfs.reader.reader import open_reader
from pbsfs.tasks.image.copy import DEFAULT_PIECES, Pieces, copy_blob, copy_image
from pbsfs.tasks.image.opening import open_target
from pbsfs.tasks.image.target import Target
from tests.support import made
from tests.support.needs import need_loop, need_root
from tests.support.run import in_trio, run, until
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img"
SNAPSHOT = made.snapshot()
CONTENT = made.image(1, "0rr00t0", tail=512)
SMALL = Pieces(size=CHUNK_SIZE)


def nobody_asks(_count: int) -> None:
    """What the progress is told to when nobody watches it."""


@asynccontextmanager
async def an_image(
    content: bytes,
    *,
    chunk_size: int = CHUNK_SIZE,
    source: MemorySource | None = None,
    limits: FetchLimits = DEFAULT,
) -> AsyncIterator[Image]:
    source = source or MemorySource()
    info = source.add(SNAPSHOT, {f"{NAME}.fidx": content}, chunk_size=chunk_size)
    async with open_reader(source, limits=limits) as reader:
        yield await reader.open_image(info, file_of(info, f"{NAME}.fidx"))


async def export(
    content: bytes,
    dest: Path,
    *,
    force: bool = False,
    advance: Callable[[int], None] = nobody_asks,
    pieces: Pieces = DEFAULT_PIECES,
) -> None:
    async with an_image(content) as image:
        with open_target(dest, NAME, image.size, force=force) as target:
            await copy_image(image, target, advance, pieces)


def holes_of(path: Path) -> list[tuple[int, int]]:
    """The ranges of a file that its file system has no data for."""
    holes = []
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            start = file.seek(at, os.SEEK_HOLE)
            try:
                at = file.seek(start, os.SEEK_DATA) if start < end else end
            except OSError:  # a hole up to the end
                at = end
            if start < end:
                holes.append((start, at))
    return holes


def is_clean(directory: Path, *names: str) -> bool:
    return sorted(path.name for path in directory.iterdir()) == sorted(names)


# --- a regular file


@given(kinds=st.text("rt0", max_size=8), tail=st.sampled_from([0, 1, 512, 4096]))
def test_a_file_gets_the_bytes_of_the_image_and_its_holes(
    tmp_path_factory: pytest.TempPathFactory, kinds: str, tail: int
) -> None:
    content = made.image(1, kinds, tail=tail)
    dest = tmp_path_factory.mktemp("export") / "out.img"
    run(lambda: export(content, dest))
    assert dest.read_bytes() == content
    assert is_clean(dest.parent, "out.img")
    with_data = sum(CHUNK_SIZE for kind in kinds if kind != "0") + tail
    assert dest.stat().st_blocks * 512 <= with_data + 2 * 4096
    expected: list[tuple[int, int]] = []
    for number, kind in enumerate(kinds):
        start, end = number * CHUNK_SIZE, (number + 1) * CHUNK_SIZE
        if kind == "0" and expected and expected[-1][1] == start:
            expected[-1] = (expected[-1][0], end)
        elif kind == "0":
            expected.append((start, end))
    assert holes_of(dest) == expected


@in_trio
async def test_images_of_large_chunks_are_copied_in_pieces(tmp_path: Path) -> None:
    chunk_size = 2 * DEFAULT_PIECES.size
    content = made.image(1, "t0t", chunk_size=chunk_size, tail=700)
    done: list[int] = []
    async with an_image(content, chunk_size=chunk_size) as image:
        with open_target(tmp_path / "out", NAME, image.size, force=False) as target:
            await copy_image(image, target, done.append)
    assert (tmp_path / "out").read_bytes() == content
    assert done == [DEFAULT_PIECES.size] * 2 + [chunk_size] + [DEFAULT_PIECES.size] * 2 + [700]


@in_trio
async def test_the_cache_of_a_copy_has_room_for_what_is_fetched_ahead_and_as_much_again(
    tmp_path: Path,
) -> None:
    content = made.image(1, "tt")
    async with an_image(content) as image:
        store = image.store
        assert store.cache.room > 2 * store.limits.max_window
        with open_target(tmp_path / "out", NAME, image.size, force=False) as target:
            await copy_image(image, target, nobody_asks)
        assert store.cache.room == 2 * store.limits.max_window
        assert store.window_limit == store.limits.max_window
    assert (tmp_path / "out").read_bytes() == content


@in_trio
async def test_pieces_of_several_chunks_are_written_without_joining_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = made.image(1, "rt0rrrtr0r", tail=700)
    cached: set[int] = set()
    written: list[int] = []
    real = Target.write

    def write(target: Target, offset: int, data: Buffer) -> None:
        cached.update(id(kept) for kept in image.store.cache._chunks.values())
        if len(data) == CHUNK_SIZE:
            written.append(id(data.obj if isinstance(data, memoryview) else data))
        real(target, offset, data)

    monkeypatch.setattr(Target, "write", write)
    async with an_image(content) as image:
        with open_target(tmp_path / "out", NAME, image.size, force=False) as target:
            await copy_image(image, target, nobody_asks, Pieces(size=16 * CHUNK_SIZE))
        assert (tmp_path / "out").read_bytes() == content
        assert len(written) == 8
        assert set(written) <= cached


@in_trio
async def test_progress_is_told_of_every_byte_once_it_is_written(tmp_path: Path) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        assert (tmp_path / "out.part").read_bytes()[:done] == CONTENT[:done]

    await export(CONTENT, tmp_path / "out", advance=advance)
    assert done == len(CONTENT)


@in_trio
async def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    async with an_image(CONTENT) as image:
        with open_target(dest, NAME, image.size, force=False) as target:
            await copy_image(image, target, nobody_asks)
            assert is_clean(tmp_path, "out.part")
    assert is_clean(tmp_path, "out")
    assert stat.S_IMODE(dest.stat().st_mode) == 0o600


@in_trio
async def test_an_existing_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    dest.write_bytes(b"precious")
    with pytest.raises(OutputError, match="out exists; remove it, or overwrite it with --force"):
        await export(CONTENT, dest)
    assert dest.read_bytes() == b"precious"
    assert is_clean(tmp_path, "out")


@in_trio
async def test_force_replaces_an_existing_file_but_only_when_all_is_written(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    dest.write_bytes(b"old" * (1 << 20))
    await export(CONTENT, dest, force=True, advance=lambda _count: _is_old(dest))
    assert dest.read_bytes() == CONTENT
    assert is_clean(tmp_path, "out")


def _is_old(path: Path) -> None:
    assert path.read_bytes() == b"old" * (1 << 20)


@in_trio
async def test_what_is_left_of_an_earlier_export_is_refused_and_force_removes_it(tmp_path: Path) -> None:
    dest, part = tmp_path / "out", tmp_path / "out.part"
    part.write_bytes(b"left")
    with pytest.raises(OutputError, match=r"out\.part is left from an earlier export"):
        await export(CONTENT, dest)
    assert part.read_bytes() == b"left"
    assert is_clean(tmp_path, "out.part")
    await export(CONTENT, dest, force=True)
    assert dest.read_bytes() == CONTENT
    assert is_clean(tmp_path, "out")


@in_trio
async def test_force_writes_through_no_link_that_a_part_may_be(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    for link in (os.symlink, os.link):
        precious.write_bytes(b"precious")
        link(precious, tmp_path / "out.part")
        await export(CONTENT, tmp_path / "out", force=True)
        assert precious.read_bytes() == b"precious"
        assert (tmp_path / "out").read_bytes() == CONTENT
        assert is_clean(tmp_path, "out", "precious")


@in_trio
async def test_force_writes_to_what_a_link_points_to_and_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (there := tmp_path / "there" / "disk").write_bytes(b"old")
    (tmp_path / "inner").symlink_to("there/disk")
    (link := tmp_path / "link").symlink_to("inner")
    with pytest.raises(OutputError, match="link exists; remove it, or overwrite it with --force"):
        await export(CONTENT, link)
    async with an_image(CONTENT) as image:
        with open_target(link, NAME, image.size, force=True) as target:
            assert (there.with_name("disk.part")).exists()
            assert target.map_file == tmp_path / "link.map"
            await copy_image(image, target, nobody_asks)
    assert link.is_symlink()
    assert (tmp_path / "inner").is_symlink()
    assert there.read_bytes() == CONTENT
    assert is_clean(tmp_path, "there", "inner", "link")
    assert is_clean(tmp_path / "there", "disk")


@pytest.mark.parametrize("end", ["nowhere", "link"])
@in_trio
async def test_force_makes_nothing_where_a_link_leads_nowhere(tmp_path: Path, end: str) -> None:
    (link := tmp_path / "link").symlink_to(end)
    with pytest.raises(OutputError, match="link is a symbolic link to a missing file; remove it"):
        await export(CONTENT, link, force=True)
    assert is_clean(tmp_path, "link")
    assert link.is_symlink()


@pytest.mark.root
def test_force_writes_to_the_device_that_a_link_points_to(device: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(device)
    run(lambda: export(CONTENT, link, force=True))
    assert link.is_symlink()
    with device.open("rb") as file:
        assert file.read(len(CONTENT)) == CONTENT


@in_trio
async def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        await export(CONTENT, tmp_path / "out")
    assert is_clean(tmp_path, "out")


@pytest.mark.parametrize("has_links", [True, False])
@in_trio
async def test_a_file_that_came_up_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    dest = tmp_path / "out"
    if not has_links:
        _no_links(monkeypatch)

    def come_up(_count: int) -> None:
        dest.write_bytes(b"precious")

    with pytest.raises(OutputError, match="out exists"):
        await export(CONTENT, dest, advance=come_up)
    assert dest.read_bytes() == b"precious"
    assert is_clean(tmp_path, "out")


def _no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(_source: Path, _dest: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@in_trio
async def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_links(monkeypatch)
    await export(CONTENT, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == CONTENT
    assert is_clean(tmp_path, "out")


@pytest.mark.parametrize("force", [True, False])
@in_trio
async def test_into_a_directory_the_file_goes_under_its_own_name(tmp_path: Path, force: bool) -> None:
    await export(CONTENT, tmp_path, force=force)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert is_clean(tmp_path, NAME)


@in_trio
async def test_a_directory_of_the_file_s_own_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        await export(CONTENT, tmp_path)
    assert is_clean(tmp_path, NAME)


@in_trio
async def test_a_place_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*/nowhere/out: No such file or directory"):
        await export(CONTENT, tmp_path / "nowhere" / "out")


@in_trio
async def test_a_small_file_is_copied_too(tmp_path: Path) -> None:
    with open_target(tmp_path, "qemu-server.conf", 9, force=False) as target:
        await copy_blob(b"cores: 2\n", target)
    assert (tmp_path / "qemu-server.conf").read_bytes() == b"cores: 2\n"


# --- failure


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


# --- how it reads


class Stuck(Target):
    """Writes nothing before `go` is set, and then fails with `error` if there is one."""

    def __init__(self, path: Path, error: OSError | None = None) -> None:
        super().__init__(os.open(path, os.O_CREAT | os.O_WRONLY), "out")
        self.go = threading.Event()
        self.error = error

    def write(self, offset: int, data: Buffer) -> None:
        self.go.wait(30)
        if self.error is not None:
            raise self.error
        super().write(offset, data)

    def hole(self, offset: int, length: int) -> None:
        raise AssertionError("there is none")


async def copy_until_stuck(
    content: bytes, target: Stuck, patch: pytest.MonkeyPatch
) -> tuple[list[int], Exception | None]:
    """Copies to `target`, which goes on when nothing more is read.

    Returns the offsets that were read, in order, and the error that it ended with.
    """
    pieces: list[int] = []
    failure: Exception | None = None
    real = Handle.read_parts

    async def read(handle: Handle, offset: int, size: int) -> list[Buffer]:
        pieces.append(offset)
        return await real(handle, offset, size)

    async def release() -> None:
        try:
            # One piece is being written, some are queued, and one is in the reader's hand.
            await until(lambda: len(pieces) >= SMALL.queued + 2)
            await until(lambda: not image.store._fetches)
            await wait_all_tasks_blocked()
            assert len(pieces) == SMALL.queued + 2
        finally:
            target.go.set()

    patch.setattr(Handle, "read_parts", read)
    async with an_image(content) as image, trio.open_nursery() as nursery:
        nursery.start_soon(release)
        try:
            await copy_image(image, target, nobody_asks, SMALL)
        except Exception as error:
            failure = error
        finally:
            target.close()
    return pieces, failure


def test_reading_goes_on_while_writing_and_stays_little_ahead(tmp_path: Path) -> None:
    content = made.image(1, "r" * 12)
    with pytest.MonkeyPatch.context() as patch:
        pieces, failure = run(lambda: copy_until_stuck(content, Stuck(tmp_path / "out"), patch))
    assert failure is None
    assert pieces == list(range(0, len(content), CHUNK_SIZE))
    assert (tmp_path / "out").read_bytes() == content


def test_when_writing_fails_its_error_is_told_though_reading_fails_of_it(tmp_path: Path) -> None:
    content = made.image(1, "r" * 12)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for _ in range(10):  # the order in which tasks go on is left to chance
        with pytest.MonkeyPatch.context() as patch:
            _pieces, failure = run(lambda: copy_until_stuck(content, Stuck(tmp_path / "out", error), patch))
        assert failure is error


def test_data_is_read_in_pieces_that_end_where_a_chunk_of_a_usual_image_does(tmp_path: Path) -> None:
    content = made.image(1, "0rrrr0rr")
    done: list[int] = []
    pieces = Pieces(size=2 * CHUNK_SIZE)
    run(lambda: export(content, tmp_path / "out", advance=done.append, pieces=pieces))
    assert [count // CHUNK_SIZE for count in done] == [1, 1, 2, 1, 1, 2]


def test_holes_on_the_way_do_not_end_the_read_ahead(tmp_path: Path) -> None:
    content = made.image(1, "r0000" * 12)
    limits = FetchLimits(reorder_distance=CHUNK_SIZE, evidence=CHUNK_SIZE, max_window=4 * CHUNK_SIZE)
    source = MemorySource()

    async def main() -> None:
        async with an_image(content, source=source, limits=limits) as image:
            source.hold(image.index.digest(5))  # the second piece of data
            with open_target(tmp_path / "out", NAME, image.size, force=False) as target:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(copy_image, image, target, nobody_asks, SMALL)
                    await until(lambda: image.index.digest(5) in source.fetched)
                    await wait_all_tasks_blocked()
                    ahead = {image.index.digest(number) for number in (10, 15, 20)}
                    assert ahead <= set(source.fetched)
                    assert image.store.sequential_readers == 1
                    nursery.cancel_scope.cancel()
            assert image.store.sequential_readers == 0

    run(main)


# --- pipes


@contextmanager
def fifo_reader(path: Path, size: int) -> Iterator[list[bytes]]:
    """A reader in a thread of its own, which reads `size` bytes and goes away."""
    os.mkfifo(path)
    got: list[bytes] = []
    # Open before anybody writes, who would be told else that nobody reads.
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)

    def read() -> None:
        with open(reading, "rb", buffering=0) as file:
            writer = select.poll()
            writer.register(file, select.POLLIN)
            writer.poll()  # without one, reading finds the end at once
            left = size
            while left and (data := file.read(min(left, 1 << 16))):
                got.append(data)
                left -= len(data)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield got
    finally:
        thread.join()


@contextmanager
def descriptors_restored() -> Iterator[None]:
    """Closes what a stream target leaves open for a write that may still be stuck."""
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    yield
    for path in list(Path("/proc/self/fd").iterdir()):
        if path.name not in before and path.exists():
            os.close(int(path.name))


def test_a_pipe_gets_every_byte_in_order_holes_as_zeros(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with descriptors_restored(), fifo_reader(pipe, len(CONTENT)) as got:
        run(lambda: export(CONTENT, pipe))
    assert b"".join(got) == CONTENT
    assert is_clean(tmp_path, "pipe")


@pytest.mark.parametrize("kinds", ["r" * 12, "0" * 12])
def test_a_pipe_whose_reader_goes_away_ends_the_copy(tmp_path: Path, kinds: str) -> None:
    pipe = tmp_path / "pipe"
    with descriptors_restored(), fifo_reader(pipe, 1000) as got, pytest.raises(BrokenPipeError):
        run(lambda: export(made.image(1, kinds), pipe))
    assert len(b"".join(got)) == 1000


def test_a_copy_into_a_pipe_that_nobody_reads_can_be_cancelled(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    started, ended = threading.Event(), threading.Event()
    chunk_size = 1 << 20  # more than the pipe takes

    async def main() -> None:
        content = made.image(1, "rr", chunk_size=chunk_size)
        async with an_image(content, chunk_size=chunk_size) as image, trio.open_nursery() as nursery:
            with open_target(pipe, NAME, image.size, force=False) as target:
                real = target.write

                def write(offset: int, data: Buffer) -> None:
                    started.set()
                    try:
                        real(offset, data)
                    finally:
                        ended.set()

                monkey.setattr(target, "write", write)
                nursery.start_soon(copy_image, image, target, nobody_asks)
                await until(started.is_set)
                nursery.cancel_scope.cancel()

    with descriptors_restored(), pytest.MonkeyPatch.context() as monkey:
        run(main)
        assert not ended.is_set()  # the write is still stuck, and nobody waited for it
        os.close(reader)
        assert ended.wait(30)


def test_standard_output_may_be_the_target(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run(lambda: export(CONTENT, Path("-")))
    assert capfdbinary.readouterr().out == CONTENT
    os.fstat(1)  # and stays open


def test_a_terminal_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda _fd: True)
    with pytest.raises(OutputError, match="standard output is a terminal"):
        run(lambda: export(CONTENT, Path("-")))


# --- block devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 chunks that holds other data already."""
    need_loop()
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xa5" * (16 * CHUNK_SIZE))
    found = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    )
    path = Path(found.stdout.strip())
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.root
@pytest.mark.parametrize("by_ioctl", [True, False])
@pytest.mark.parametrize("tail", [0, 512, 700])
def test_a_device_reads_as_the_image_stale_data_in_holes_is_gone(
    device: Path, monkeypatch: pytest.MonkeyPatch, by_ioctl: bool, tail: int
) -> None:
    if not by_ioctl:

        def ioctl(*_arguments: object) -> int:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(fcntl, "ioctl", ioctl)
    content = made.image(1, "0r00rt0") + bytes(tail)
    run(lambda: export(content, device, force=True))
    after = device.read_bytes()
    assert after[: len(content)] == content
    assert after[len(content) :] == b"\xa5" * (16 * CHUNK_SIZE - len(content))


@pytest.mark.root
def test_a_device_is_not_touched_without_force(device: Path) -> None:
    before = hashlib.sha256(device.read_bytes()).digest()
    with pytest.raises(OutputError, match="is a block device; use --force to overwrite"):
        run(lambda: export(CONTENT, device))
    assert hashlib.sha256(device.read_bytes()).digest() == before


@pytest.mark.root
def test_a_device_that_is_too_small_is_not_touched(device: Path) -> None:
    before = hashlib.sha256(device.read_bytes()).digest()
    content = made.image(1, "r" * 16, tail=1)
    with pytest.raises(OutputError, match=f"has {16 * CHUNK_SIZE} bytes, the image needs {len(content)}"):
        run(lambda: export(content, device, force=True))
    assert hashlib.sha256(device.read_bytes()).digest() == before


@pytest.mark.root
def test_a_device_in_use_is_refused(device: Path) -> None:
    holder = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount or a volume group holds it
    try:
        with pytest.raises(OutputError, match="Device or resource busy"):
            run(lambda: export(CONTENT, device, force=True))
    finally:
        os.close(holder)


# --- two at once


@pytest.mark.parametrize("force", [True, False])
@in_trio
async def test_a_part_that_another_export_writes_is_refused_and_left_to_it(
    tmp_path: Path, force: bool
) -> None:
    dest = tmp_path / "out"
    async with an_image(CONTENT) as image:
        with open_target(dest, NAME, image.size, force=True) as target:
            with pytest.raises(OutputError, match=r"out\.part: another export is writing it; wait"):
                await export(made.image(9, "r"), dest, force=force)
            assert is_clean(tmp_path, "out.part")
            await copy_image(image, target, nobody_asks)
    assert dest.read_bytes() == CONTENT
    assert is_clean(tmp_path, "out")


@in_trio
async def test_who_was_refused_gets_in_when_the_other_is_done_or_has_failed(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    with pytest.raises(ValueError, match="any"), open_target(dest, NAME, 9, force=True):
        raise ValueError("any")
    await export(CONTENT, dest, force=True)
    await export(CONTENT[:700], dest, force=True)
    assert dest.read_bytes() == CONTENT[:700]


@pytest.mark.parametrize("step", ["fcntl", "fstat"])
def test_a_part_that_was_taken_for_a_left_over_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    # Between making the part and locking it, another may find it without a lock, and begin anew.
    part = tmp_path / "out.part"
    module = {"fcntl": fcntl, "fstat": os}[step]
    real = getattr(module, step)

    def meanwhile(fd: int, *arguments: int) -> object:
        if step == "fcntl" or os.readlink(f"/proc/self/fd/{fd}") == str(part):
            part.unlink()
            part.write_bytes(b"another's")
        return real(fd, *arguments)

    monkeypatch.setattr(module, step, meanwhile)
    with (
        pytest.raises(OutputError, match=r"out\.part: another export is writing it; wait"),
        open_target(tmp_path / "out", NAME, 9, force=True),
    ):
        pass
    monkeypatch.undo()
    assert part.read_bytes() == b"another's"
    assert is_clean(tmp_path, "out.part")


@in_trio
async def test_where_a_file_system_has_no_locks_it_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, _command: int, _lock: bytes) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    (tmp_path / "out.part").write_bytes(b"left")
    await export(CONTENT, tmp_path / "out", force=True)
    assert (tmp_path / "out").read_bytes() == CONTENT


@in_trio
async def test_what_is_no_file_in_the_place_of_a_part_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.part")
    await export(CONTENT, tmp_path / "out", force=True)
    assert (tmp_path / "out").read_bytes() == CONTENT
    (tmp_path / "second.part").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*second: Is a directory"):
        await export(CONTENT, tmp_path / "second", force=True)


@pytest.mark.parametrize(
    ("before", "wanted", "found"),
    [
        (None, None, 0o600),
        (None, 0o640, 0o640),
        (0o600, None, 0o600),
        (0o664, None, 0o664),
        (0o664, 0o600, 0o600),
        (None, 0o440, 0o440),
    ],
)
@in_trio
async def test_a_copy_is_for_its_owner_only_unless_told_otherwise(
    tmp_path: Path, before: int | None, wanted: int | None, found: int
) -> None:
    dest = tmp_path / "out"
    if before is not None:
        dest.touch()
        dest.chmod(before)
    with open_target(dest, NAME, 9, force=True, mode=wanted) as target:
        assert stat.S_IMODE((tmp_path / "out.part").stat().st_mode) == found | 0o600
        await copy_blob(b"nine byte", target)
    assert stat.S_IMODE(dest.stat().st_mode) == found


def test_a_mode_without_a_new_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for dest in (Path("-"), tmp_path / "pipe"):
        with (
            pytest.raises(UsageError, match="--mode requires a file"),
            open_target(dest, NAME, 1, force=False, mode=0o600),
        ):
            pass


@in_trio
async def test_a_hole_is_zeroed_in_pieces_between_which_a_copy_can_end() -> None:
    zeroed: list[tuple[int, int]] = []
    done: list[int] = []

    class Device(Target):
        hole_piece = 4 * CHUNK_SIZE

        def hole(self, offset: int, length: int) -> None:
            zeroed.append((offset, length))

    async with an_image(bytes(10 * CHUNK_SIZE)) as image:
        await copy_image(image, Device(-1, "device"), done.append)
    assert zeroed == [(0, 4 * CHUNK_SIZE), (4 * CHUNK_SIZE, 4 * CHUNK_SIZE), (8 * CHUNK_SIZE, 2 * CHUNK_SIZE)]
    assert done == [length for _offset, length in zeroed]
