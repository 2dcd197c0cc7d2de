"""The file system's handlers, called as the kernel would, without a mount."""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import errno
import logging
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from stat import S_ISDIR
from typing import Any, cast
from weakref import ref

import pyfuse3
import pytest
import trio
from trio.testing import MockClock

from pbsfs.base.errors import NotFoundError
from pbsfs.base.names import Archive, Group, Snapshot
from pbsfs.fuse.attributes import Ownership, attributes_of, entry_of
from pbsfs.fuse.inodes import ROOT, InodeTable
from pbsfs.fuse.operations import Operations
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import SnapshotInfo, Usage
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.tree import Directory, File, SnapshotDirectory, Stat, Tree
from tests.support import damage, made
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    LOG,
    NEWER_IMAGE,
    SECOND,
    Stocked,
    stock,
)

NOBODY = cast(pyfuse3.RequestContext, None)  # handlers don't look at who asks: the kernel does
TOKEN = cast(pyfuse3.ReaddirToken, None)
REFRESH = 7.0


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


def serve(
    stocked: Stocked,
    work: Callable[[Operations], Awaitable[None]],
    *,
    source: type[DirectorySource] = DirectorySource,
    refresh: float = REFRESH,
    clock: trio.abc.Clock | None = None,
) -> None:
    """Runs `work` on the operations of a datastore; what it raises comes out as it is."""

    async def run() -> None:
        async with open_reader(source(stocked.path)) as reader:
            await work(Operations(Tree(reader, refresh=refresh), Ownership(11, 22, 0o007)))

    trio.run(run, clock=clock)


async def find(operations: Operations, path: str) -> pyfuse3.EntryAttributes:
    """Looks up `path`, step by step from the root."""
    entry = await operations.getattr(ROOT, NOBODY)
    for name in path.split("/"):
        entry = await operations.lookup(entry.st_ino, name.encode(), NOBODY)
    return entry


async def open_file(operations: Operations, path: str) -> tuple[int, pyfuse3.FileInfo]:
    inode = (await find(operations, path)).st_ino
    info = await operations.open(inode, os.O_RDONLY, NOBODY)
    return info.fh, info


async def fails_with(number: int, action: Awaitable[Any]) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await action
    assert caught.value.errno == number, os.strerror(caught.value.errno)


class _Listed(list[tuple[str, int, int]]):
    """What readdir replied: name, inode and place; takes `room` entries at a time, as the kernel does."""

    room = 1000

    def reply(self, _token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        if self.room == 0:
            return False
        self.room -= 1
        self.append((name.decode(), entry.st_ino, next_id))
        return True


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> _Listed:
    listed = _Listed()
    monkeypatch.setattr(pyfuse3, "readdir_reply", listed.reply)
    return listed


# --- names and attributes


def test_attributes_are_those_of_the_tree(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        image = await find(operations, IMAGE)
        assert (image.st_mode, image.st_uid, image.st_gid, image.st_nlink) == (0o100440, 11, 22, 1)
        assert (image.st_size, image.st_blocks) == (8 * CHUNK + 1536, (5 * CHUNK + 1536) // 512)
        assert image.st_mtime_ns == image.st_ctime_ns == image.st_atime_ns == made.TIME * 10**9
        assert image.st_blksize == 1 << 20
        assert 0 < image.attr_timeout <= REFRESH
        again = await operations.getattr(image.st_ino, NOBODY)
        assert (again.st_ino, again.st_size) == (image.st_ino, image.st_size)
        group = await find(operations, "vm/100")
        assert group.st_mode == 0o40550
        assert (await find(operations, "vm/100/latest")).st_mode == 0o120777

    serve(stocked, work)


def test_attributes_show_what_archives_have() -> None:
    stat = Stat(mode=0o020666, mtime_ns=-1, uid=0, gid=5, nlink=3, rdev=os.makedev(1, 3))
    entry = entry_of(attributes_of(stat, 99, Ownership(11, 22, 0o007), default_mtime_ns=1, lasts=2.0))
    assert (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_nlink) == (0o020666, 0, 5, 3)
    assert (entry.st_rdev, entry.st_ino, entry.entry_timeout) == (os.makedev(1, 3), 99, 2.0)
    assert entry.st_mtime_ns == entry.st_ctime_ns == entry.st_atime_ns == -1
    others = Ownership(11, 22, 0o007, as_stored=False)
    for mode, shown in ((0o100000, 0o100400), (0o104711, 0o104711), (0o040011, 0o040511)):
        entry = entry_of(
            attributes_of(Stat(mode=mode, uid=0, gid=5), 99, others, default_mtime_ns=1, lasts=2.0)
        )
        assert (entry.st_mode, entry.st_uid, entry.st_gid) == (shown, 11, 22)
    link = entry_of(
        attributes_of(Stat(mode=0o120777), 99, Ownership(11, 22, 0o007), default_mtime_ns=1, lasts=0)
    )
    assert (link.st_mode, link.st_mtime_ns) == (0o120777, 1)


def test_names_are_kept_as_long_as_the_listing_that_they_come_from(stocked: Stocked) -> None:
    clock = MockClock()

    async def work(operations: Operations) -> None:
        await find(operations, "vm/100")
        clock.jump(2)
        await find(operations, FIRST)  # the group is listed only now
        clock.jump(1)
        image = await find(operations, IMAGE)
        assert (image.entry_timeout, image.attr_timeout) == (REFRESH - 1, REFRESH - 1)
        snapshot = await find(operations, FIRST)
        assert (snapshot.entry_timeout, snapshot.attr_timeout) == (REFRESH - 1, REFRESH - 1)
        group = await find(operations, "vm/100")
        assert (group.entry_timeout, group.attr_timeout) == (REFRESH - 3, REFRESH - 3)

    serve(stocked, work, clock=clock)


def test_a_name_that_is_not_there_is_enoent_and_logs_nothing(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        group = (await find(operations, "vm/100")).st_ino
        for name in (b"2001-01-01T00:00:00Z", b"drive-scsi0.img.fidx", b"...", b"\xff", b"x" * 255):
            await fails_with(errno.ENOENT, operations.lookup(group, name, NOBODY))

    serve(stocked, work)


def test_lookups_are_counted_until_forgotten(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        vm = (await find(operations, "vm")).st_ino
        assert (await find(operations, "vm")).st_ino == vm
        assert len(operations.inodes) == 2
        await operations.forget([(vm, 1)])
        assert (await operations.getattr(vm, NOBODY)).st_ino == vm
        await operations.forget([(vm, 1)])
        assert len(operations.inodes) == 1
        await fails_with(errno.ENOENT, operations.getattr(vm, NOBODY))

    serve(stocked, work)


def test_what_the_kernel_forgets_leaves_the_memory(stocked: Stocked, listed: _Listed) -> None:
    async def walk(operations: Operations, inode: int) -> None:
        before = len(listed)
        fh = await operations.opendir(inode, NOBODY)
        await operations.readdir(fh, 0, TOKEN)
        await operations.releasedir(fh)
        for _name, child, _id in listed[before + 2 :]:
            if S_ISDIR((await operations.getattr(child, NOBODY)).st_mode):
                await walk(operations, child)

    async def work(operations: Operations) -> None:
        await walk(operations, ROOT)
        nodes = {number: ref(inode.node) for number, inode in operations.inodes._inodes.items()}
        assert all(node() is not None for node in nodes.values())
        await operations.forget([(number, 1 << 20) for number in nodes if number != ROOT])
        left = [node for node in (ref() for ref in nodes.values()) if node is not None]
        # The directories that the source was asked for, and those above them: none of the files.
        assert left
        assert all(isinstance(node, Directory) and not isinstance(node, SnapshotDirectory) for node in left)

    serve(stocked, work)


def test_a_number_is_found_again_after_it_was_forgotten(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        for path in ("vm", "vm/100/latest", FIRST, IMAGE, CONFIGURATION):
            number = (await find(operations, path)).st_ino
            parent = (await find(operations, path.rpartition("/")[0])).st_ino if "/" in path else ROOT
            known = [number for number in operations.inodes._inodes if number != ROOT]
            await operations.forget([(number, 1 << 20) for number in known])
            assert len(operations.inodes) == 1
            found = await operations.lookup(number, b".", NOBODY)
            assert (found.st_ino, found.generation) == (number, 0)
            assert operations.inodes[number].node.path == path.encode()
            assert (await operations.lookup(number, b"..", NOBODY)).st_ino == parent
        assert (await operations.lookup(ROOT, b".", NOBODY)).st_ino == ROOT
        assert (await operations.lookup(ROOT, b"..", NOBODY)).st_ino == ROOT
        await fails_with(errno.ENOENT, operations.lookup(12345, b".", NOBODY))

    serve(stocked, work)


def test_a_number_that_its_path_does_not_have_any_more_is_not_found(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        operations.inodes._forgotten[4711] = IMAGE.encode()
        await fails_with(errno.ENOENT, operations.lookup(4711, b".", NOBODY))
        assert len(operations.inodes) == 1

    serve(stocked, work)


def test_a_number_of_what_is_gone_is_not_found(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        number = (await find(operations, IMAGE)).st_ino
        shutil.rmtree(stocked.path / FIRST)
        await fails_with(errno.ENOENT, operations.lookup(number, b".", NOBODY))
        await fails_with(errno.ENOENT, operations.lookup(number, b"..", NOBODY))

    serve(stocked, work, refresh=0)


def test_a_lookup_that_fails_is_not_counted(stocked: Stocked, caplog: pytest.LogCaptureFixture) -> None:
    async def work(operations: Operations) -> None:
        vm = (await find(operations, "vm")).st_ino
        known = len(operations.inodes)
        await fails_with(errno.ENOENT, operations.lookup(vm, b"999", NOBODY))
        assert len(operations.inodes) == known

    serve(stocked, work)


def test_only_links_are_read_as_links_and_only_directories_have_children(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        latest = (await find(operations, "vm/100/latest")).st_ino
        assert await operations.readlink(latest, NOBODY) == b"2023-11-15T22:13:20Z"
        image = (await find(operations, IMAGE)).st_ino
        await fails_with(errno.EINVAL, operations.readlink(image, NOBODY))
        await fails_with(errno.ENOTDIR, operations.lookup(image, b"x", NOBODY))
        await fails_with(errno.ENOTDIR, operations.opendir(image, NOBODY))
        await fails_with(errno.EISDIR, operations.open(ROOT, os.O_RDONLY, NOBODY))

    serve(stocked, work)


# --- directories


def test_a_listing_has_everything_with_its_inode_and_counts_as_lookups(
    stocked: Stocked, listed: _Listed
) -> None:
    async def work(operations: Operations) -> None:
        parent, group = (await find(operations, "vm")).st_ino, (await find(operations, "vm/100")).st_ino
        before = len(operations.inodes)
        fh = await operations.opendir(group, NOBODY)
        await operations.readdir(fh, 0, TOKEN)
        await operations.releasedir(fh)
        names = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "latest"]
        assert [name for name, _inode, _id in listed] == [".", "..", *names]
        assert [inode for _name, inode, _id in listed[:2]] == [group, parent]
        assert len(operations.inodes) == before + 3
        for name, inode, _id in listed[2:]:
            assert (await operations.getattr(inode, NOBODY)).st_ino == inode
            assert (await operations.lookup(group, name.encode(), NOBODY)).st_ino == inode

    serve(stocked, work)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_listing_in_pieces_skips_and_repeats_nothing(stocked: Stocked, listed: _Listed, room: int) -> None:
    async def work(operations: Operations) -> None:
        fh = await operations.opendir((await find(operations, FIRST)).st_ino, NOBODY)
        place, count = 0, -1
        while count < len(listed):
            count, listed.room = len(listed), room
            await operations.readdir(fh, place, TOKEN)
            place = listed[-1][2]
        names = [".", "..", "client.log", "drive-scsi0.img", "index.json", "qemu-server.conf"]
        assert sorted(name for name, _inode, _id in listed) == names

    serve(stocked, work)


def test_what_was_not_replied_is_not_counted_as_a_lookup(stocked: Stocked, listed: _Listed) -> None:
    async def work(operations: Operations) -> None:
        fh = await operations.opendir((await find(operations, FIRST)).st_ino, NOBODY)
        before, listed.room = len(operations.inodes), 3
        await operations.readdir(fh, 0, TOKEN)
        assert len(operations.inodes) == before + 1

    serve(stocked, work)


@pytest.mark.parametrize("error", [NotFoundError("gone"), None])
def test_a_listing_that_breaks_off_counts_no_lookups(
    stocked: Stocked, listed: _Listed, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    async def work(operations: Operations) -> None:
        fh = await operations.opendir((await find(operations, FIRST)).st_ino, NOBODY)
        before, real = len(operations.inodes), File.stat
        scope = trio.CancelScope()

        async def stat(node: File) -> Stat:
            if len(listed) < 4:
                return await real(node)
            if error is not None:
                raise error
            scope.cancel()
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(File, "stat", stat)
        with scope:
            await fails_with(errno.ENOENT, operations.readdir(fh, 0, TOKEN))
        assert scope.cancelled_caught == (error is None)
        assert len(listed) == 4  # so two entries had been prepared
        assert len(operations.inodes) == before

    serve(stocked, work)


def test_an_open_listing_stays_as_it_was(stocked: Stocked, listed: _Listed) -> None:
    async def work(operations: Operations) -> None:
        fh = await operations.opendir((await find(operations, "vm/100")).st_ino, NOBODY)
        shutil.rmtree(stocked.path / SECOND)
        await operations.readdir(fh, 0, TOKEN)
        assert "2023-11-15T22:13:20Z" in [name for name, _inode, _id in listed]
        await fails_with(errno.ENOENT, find(operations, SECOND))

    serve(stocked, work, refresh=0)


# --- files


def test_any_range_reads_as_the_original(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        places = random.Random(1)
        for path, content in stocked.contents.items():
            fh, _info = await open_file(operations, path)
            for _ in range(60):
                offset, size = places.randrange(len(content) + 20), places.randrange(1, 3 * CHUNK)
                assert bytes(await operations.read(fh, offset, size)) == content[offset : offset + size]
            await operations.release(fh)

    serve(stocked, work)


def test_every_kind_of_writing_is_refused(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        image = (await find(operations, IMAGE)).st_ino
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            await fails_with(errno.EROFS, operations.open(image, flags, NOBODY))
        refusing: list[Callable[..., Awaitable[Any]]] = [
            *(operations.setattr, operations.mknod, operations.mkdir, operations.unlink),
            *(operations.rmdir, operations.symlink, operations.rename, operations.link),
            *(operations.create, operations.write, operations.setxattr, operations.removexattr),
        ]
        for refuse in refusing:
            await fails_with(errno.EROFS, refuse(ROOT, b"name"))

    serve(stocked, work)


def test_content_is_kept_in_the_kernel_unless_it_changed(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        for path in (IMAGE, CONFIGURATION, ARCHIVE):
            for _ in range(2):
                fh, info = await open_file(operations, path)
                assert info.keep_cache
                assert not info.direct_io
                await operations.release(fh)
        replace_first(stocked)
        for path in (IMAGE, CONFIGURATION):
            fh, info = await open_file(operations, path)
            assert not info.keep_cache
            assert not info.direct_io
            assert await operations.read(fh, 0, 100) == b"other"
            assert (await open_file(operations, path))[1].keep_cache

    serve(stocked, work, refresh=0)


def replace_first(stocked: Stocked) -> None:
    shutil.rmtree(stocked.path / FIRST)
    stocked.writer.add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": b"other", "qemu-server.conf.blob": b"other"}
    )


def test_a_file_that_is_open_when_it_is_made_again_keeps_its_inode(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        before = await find(operations, IMAGE)
        info = await operations.open(before.st_ino, os.O_RDONLY, NOBODY)
        replace_first(stocked)
        new = await find(operations, IMAGE)
        assert new.st_ino != before.st_ino
        assert (await operations.getattr(before.st_ino, NOBODY)).st_size == before.st_size
        assert (await operations.getattr(new.st_ino, NOBODY)).st_size == len(b"other")
        fh, opened = await open_file(operations, IMAGE)
        assert (opened.direct_io, opened.keep_cache) == (False, True)
        assert await operations.read(fh, 0, 100) == b"other"
        assert await operations.read(info.fh, 0, 100) == stocked.contents[IMAGE][:100]
        await operations.release(info.fh)
        again = await find(operations, IMAGE)
        assert again.st_ino == before.st_ino  # as ever
        known = len(operations.inodes)
        await operations.forget([(before.st_ino, 2), (new.st_ino, 2)])
        assert len(operations.inodes) == known - 2

    serve(stocked, work, refresh=0)


def test_the_page_cache_is_left_to_files_that_are_open_with_the_content_of_before(stocked: Stocked) -> None:
    path = stocked.path / f"{CONFIGURATION}.blob"

    async def work(operations: Operations) -> None:
        before, _info = await open_file(operations, CONFIGURATION)
        second, _info = await open_file(operations, CONFIGURATION)
        content = stocked.contents[CONFIGURATION].swapcase()
        again_first(stocked, content)
        new, info = await open_file(operations, CONFIGURATION)
        assert info.direct_io
        assert await operations.read(new, 0, 1 << 20) == content
        assert await operations.read(before, 0, 1 << 20) == stocked.contents[CONFIGURATION]
        await operations.release(before)
        assert (await open_file(operations, CONFIGURATION))[1].direct_io
        await operations.release(second)
        info = (await open_file(operations, CONFIGURATION))[1]
        assert (info.direct_io, info.keep_cache) == (False, False)
        assert (await open_file(operations, CONFIGURATION))[1].keep_cache

    def again_first(stocked: Stocked, content: bytes) -> None:
        """As a server lists it: nothing shows that it is another one."""
        size = path.stat().st_size
        shutil.rmtree(stocked.path / FIRST)
        files = {"drive-scsi0.img.fidx": stocked.contents[IMAGE], "qemu-server.conf.blob": content}
        stocked.writer.add_snapshot(made.snapshot(), files, chunk_size=CHUNK)
        assert path.stat().st_size == size

    serve(stocked, work, source=_LikeServer, refresh=0)


class _Remote(DirectorySource):
    """A source for which looking into a file costs too much for a stat."""

    cheap_files = False


class _LikeServer(_Remote):
    """One that lists no checksums either."""

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        return [
            replace(info, files=tuple(replace(file, csum=None) for file in info.files), notes=None)
            for info in await super().snapshots(group)
        ]


def test_the_holes_of_an_image_are_known_when_it_was_opened(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        image = await find(operations, IMAGE)
        size = 8 * CHUNK + 1536
        assert (image.st_size, image.st_blocks, image.attr_timeout) == (size, size // 512, 0)
        _fh, info = await open_file(operations, IMAGE)
        assert not info.direct_io
        image = await operations.getattr(image.st_ino, NOBODY)
        assert (image.st_size, image.st_blocks) == (size, (5 * CHUNK + 1536) // 512)
        assert image.attr_timeout == REFRESH

    serve(stocked, work, source=_Remote)


def test_a_blob_that_is_looked_up_has_its_exact_size(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        for path in (CONFIGURATION, LOG):
            entry = await find(operations, path)
            assert entry.st_size == len(stocked.contents[path])
            assert entry.attr_timeout > 0
            fh, info = await open_file(operations, path)
            assert not info.direct_io
            assert await operations.read(fh, 0, 1 << 20) == stocked.contents[path]

    serve(stocked, work, source=_Remote)


def test_a_blob_that_is_only_listed_is_not_asked_for_and_its_attributes_are_not_kept(
    stocked: Stocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, pyfuse3.EntryAttributes] = {}

    def reply(_token: object, name: bytes, entry: pyfuse3.EntryAttributes, _next_id: int) -> bool:
        found[name.decode()] = entry
        return True

    async def work(operations: Operations) -> None:
        fetched: list[Archive] = []
        source = operations._tree.reader.source
        fetch_file = source.fetch_file

        async def noted(snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
            fetched.append(archive)
            return await fetch_file(snapshot, archive, limit)

        monkeypatch.setattr(source, "fetch_file", noted)
        monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
        directory = (await find(operations, FIRST)).st_ino
        for known in (False, True):
            fh = await operations.opendir(directory, NOBODY)
            await operations.readdir(fh, 0, TOKEN)
            await operations.releasedir(fh)
            assert bool(fetched) is known
            entry = found["qemu-server.conf"]
            assert (entry.attr_timeout > 0) is known
            assert (entry.st_size == len(stocked.contents[CONFIGURATION])) is known
            entry = await operations.getattr(entry.st_ino, NOBODY)
            assert entry.st_size == len(stocked.contents[CONFIGURATION])
        assert len(fetched) == 3

    serve(stocked, work, source=_Remote)


def test_a_blob_that_was_told_with_a_wrong_size_is_read_past_the_page_cache(stocked: Stocked) -> None:
    path = stocked.path / f"{CONFIGURATION}.blob"
    whole = path.read_bytes()

    async def work(operations: Operations) -> None:
        damage.flip_bit(path, 8 * 20)
        entry = await find(operations, CONFIGURATION)
        assert (entry.st_size, entry.attr_timeout) == (len(whole), 0)  # as it was listed
        damage.replace(path, whole)
        fh = await operations.open(entry.st_ino, os.O_RDONLY, NOBODY)
        assert fh.direct_io
        content = stocked.contents[CONFIGURATION]
        assert await operations.read(fh.fh, 0, 1 << 20) == content
        assert (await operations.getattr(entry.st_ino, NOBODY)).st_size == len(content)

    serve(stocked, work, source=_Remote)


def test_seeking_tells_holes_from_data(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        fh, _info = await open_file(operations, IMAGE)  # rr00tr0r and a tail
        assert operations.seek(0, 0, os.SEEK_HOLE, fh) == 2 * CHUNK
        assert operations.seek(0, 2 * CHUNK, os.SEEK_DATA, fh) == 4 * CHUNK
        for offset in (-1, 8 * CHUNK + 1536, 1 << 62):
            with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                operations.seek(0, offset, os.SEEK_DATA, fh)
        fh, _info = await open_file(operations, LOG)
        size = len(stocked.contents[LOG])
        assert operations.seek(0, 3, os.SEEK_DATA, fh) == 3
        assert operations.seek(0, 3, os.SEEK_HOLE, fh) == size
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            operations.seek(0, size, os.SEEK_HOLE, fh)

    serve(stocked, work)


def test_seeking_data_in_a_hole_at_the_end_is_enxio(stocked: Stocked) -> None:
    path = stocked.writer.add_snapshot(
        made.snapshot("7"), {"d.img.fidx": made.image(1, "r00")}, chunk_size=CHUNK
    )

    async def work(operations: Operations) -> None:
        fh, _info = await open_file(operations, f"{path.relative_to(stocked.path)}/d.img")
        assert operations.seek(0, 5, os.SEEK_HOLE, fh) == CHUNK
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            operations.seek(0, CHUNK, os.SEEK_DATA, fh)

    serve(stocked, work)


# --- extended attributes, the file system


def test_attributes_have_one_prefix_and_all_that_are_listed_can_be_read(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        image = (await find(operations, IMAGE)).st_ino
        names = await operations.listxattr(image, NOBODY)
        assert b"user.pbs.owner" in names
        for name in names:
            assert name.startswith(b"user.pbs.")
            await operations.getxattr(image, name, NOBODY)
        assert await operations.getxattr(image, b"user.pbs.verify_state", NOBODY) == b"ok"
        for name in (b"owner", b"user.owner", b"security.capability", b"user.pbs.", b"user.pbs.\xff"):
            await fails_with(pyfuse3.ENOATTR, operations.getxattr(image, name, NOBODY))

    serve(stocked, work)


def test_statfs_asks_nothing_of_the_source(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        shutil.rmtree(stocked.path)
        answer = await operations.statfs(NOBODY)
        assert (answer.f_blocks, answer.f_bfree, answer.f_bavail) == (0, 0, 0)
        assert (answer.f_bsize, answer.f_frsize, answer.f_namemax) == (4096, 4096, 255)

    serve(stocked, work)


class _Measured(DirectorySource):
    """A source whose space is known."""

    async def usage(self) -> Usage:
        return Usage(total=10 << 40, used=(4 << 40) + 1, available=5 << 40)


def test_statfs_has_the_space_of_the_source_and_no_inodes(stocked: Stocked) -> None:
    async def work(operations: Operations) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(operations.space.keep)
            await trio.testing.wait_all_tasks_blocked()
            answer = await operations.statfs(NOBODY)
            assert answer.f_blocks * answer.f_frsize == 10 << 40
            assert answer.f_bfree * answer.f_frsize == (6 << 40) - 4096
            assert answer.f_bavail * answer.f_frsize == 5 << 40
            assert (answer.f_files, answer.f_ffree, answer.f_favail) == (0, 0, 0)
            nursery.cancel_scope.cancel()

    serve(stocked, work, source=_Measured)


# --- errors


def test_damage_is_eio_and_logged_once(stocked: Stocked, caplog: pytest.LogCaptureFixture) -> None:
    chunk = stocked.contents[IMAGE][:CHUNK]
    digest = stocked.writer.add_chunk(chunk)
    damage.truncate(stocked.writer.chunk_path(digest), 100)

    async def work(operations: Operations) -> None:
        fh, _info = await open_file(operations, IMAGE)
        for _ in range(3):
            await fails_with(errno.EIO, operations.read(fh, 0, 10))
            await fails_with(errno.EIO, operations.read(fh, CHUNK - 1, 2))
            assert (
                bytes(await operations.read(fh, CHUNK, 100)) == stocked.contents[IMAGE][CHUNK : CHUNK + 100]
            )

    serve(stocked, work)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert digest.hex() in record.getMessage()
    assert IMAGE in record.getMessage()
    caplog.clear()


def test_a_missing_key_is_eacces_and_a_warning(stocked: Stocked, caplog: pytest.LogCaptureFixture) -> None:
    async def work(operations: Operations) -> None:
        inode = (await find(operations, ENCRYPTED)).st_ino
        for _ in range(3):
            await fails_with(errno.EACCES, operations.open(inode, os.O_RDONLY, NOBODY))

    serve(stocked, work)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert made.KEY.fingerprint in record.getMessage()
    caplog.clear()


def test_a_source_that_is_gone_is_eio_and_logged(stocked: Stocked, caplog: pytest.LogCaptureFixture) -> None:
    async def work(operations: Operations) -> None:
        group = (await find(operations, "vm/100")).st_ino
        latest = (await find(operations, "vm/100/latest")).st_ino
        image = (await find(operations, IMAGE)).st_ino
        shutil.rmtree(stocked.path)
        await fails_with(errno.EIO, operations.opendir(ROOT, NOBODY))
        await fails_with(errno.EIO, operations.opendir(group, NOBODY))
        await fails_with(errno.EIO, operations.lookup(group, b"latest", NOBODY))
        await fails_with(errno.EIO, operations.readlink(latest, NOBODY))
        await fails_with(errno.EIO, operations.open(image, os.O_RDONLY, NOBODY))
        assert (await operations.getattr(image, NOBODY)).st_size == 8 * CHUNK + 1536

    serve(stocked, work, refresh=0)
    assert caplog.records
    assert all(str(stocked.path) in record.getMessage() for record in caplog.records)
    caplog.clear()


class _Buggy(DirectorySource):
    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        raise ZeroDivisionError("a bug")


def test_a_bug_is_eio_and_never_ends_the_mount(
    stocked: Stocked, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(operations: Operations) -> None:
        fh, _info = await open_file(operations, NEWER_IMAGE)
        await fails_with(errno.EIO, operations.read(fh, CHUNK, 10))
        await fails_with(errno.EIO, operations.read(987654, 0, 10))
        await fails_with(errno.EIO, operations.release(987654))
        monkeypatch.setattr(InodeTable, "number", lambda *_: 1 / 0)
        await fails_with(errno.EIO, operations.getattr(ROOT, NOBODY))

    serve(stocked, work, source=_Buggy)
    assert any("a bug" in str(r.exc_info) or "a bug" in r.getMessage() for r in caplog.records)
    caplog.clear()
