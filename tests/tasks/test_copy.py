"""Copies in files: their holes and names, what is never overwritten, and two that write at once."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import OutputError, UsageError
from pbsfs.reader.buffers import Buffer
from pbsfs.tasks.image.copy import DEFAULT_PIECES, Pieces, copy_blob, copy_image
from pbsfs.tasks.image.opening import open_target
from pbsfs.tasks.image.target import Target
from tests.support import made
from tests.support.run import in_trio, run
from tests.support.sources import CHUNK_SIZE
from tests.tasks.copies import (
    CONTENT,
    NAME,
    an_image,
    export,
    is_clean,
    nobody_asks,
)


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
async def test_the_cache_of_a_copy_has_room_for_what_is_fetched_ahead_and_a_little_more(
    tmp_path: Path,
) -> None:
    content = made.image(1, "tt")
    async with an_image(content) as image:
        store = image.store
        assert store.cache.room > 2 * store.limits.max_window
        with open_target(tmp_path / "out", NAME, image.size, force=False) as target:
            await copy_image(image, target, nobody_asks)
        assert store.cache.room == store.limits.max_window * 5 // 4
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
