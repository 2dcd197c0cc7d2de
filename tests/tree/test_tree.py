"""The tree: what it shows, how fresh it is, what it costs the source, and what a stat tells."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, KeyRequiredError, NotFoundError, SourceError, UsageError
from pbsfs.base.names import ROOT_NAMESPACE, Archive, Namespace, Snapshot
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.reader import open_reader
from pbsfs.runtime.memory import MemoryLimitError
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo
from pbsfs.tree import BlobFile, Directory, ImageFile, Latest, Listing, Node, SnapshotDirectory, Stat, Tree
from pbsfs.tree.namespaces import GROUP_SIZE
from pbsfs.tree.node import (
    AHEAD,
    DIRECTORY_MODE,
    HOLDER,
    IN_ONE_GO,
    KEPT_DIRECTORIES,
    LINK_MODE,
    NAME_SIZE,
    nanoseconds,
)
from pbsfs.tree.snapshots import FILE_SIZE, MOST_SNAPSHOTS, READING_SIZE, SNAPSHOT_SIZE
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE, MemorySource

IMAGE = "drive-scsi0.img"
CONF = b"cores: 2\n" * 100
CONTENT = made.image(1, "r00t", tail=512)
DATA_SIZE = 2 * CHUNK_SIZE + 512
FILES = {f"{IMAGE}.fidx": CONTENT, "qemu-server.conf.blob": CONF}
DAYS = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z", "2023-11-16T22:13:20Z"]
PROD = Namespace(("prod",))
DEEP = Namespace(("prod", "db"))


def filled(*, cheap_files: bool = True) -> MemorySource:
    source = MemorySource(cheap_files=cheap_files)
    for day in (0, 1):
        source.add(made.snapshot("100", time=TIME + day * DAY), FILES)
    source.add(made.snapshot("9", type="host"), {"root.pxar.didx": CONTENT}, client_log=b"log\n")
    source.add(made.snapshot("200", type="ct", namespace=PROD), {"root.pxar.didx": b"x"})
    source.add(made.snapshot("300", namespace=DEEP), FILES)
    return source


@asynccontextmanager
async def shown(
    source: MemorySource, root: Namespace = ROOT_NAMESPACE, *, refresh: float = 5.0, with_key: bool = False
) -> AsyncIterator[Tree]:
    keys = {made.KEY.fingerprint: made.KEY} if with_key else {}
    async with open_reader(source, keys=keys) as reader:
        yield Tree(reader, root, refresh=refresh)


def file_stat(size: int, data_size: int, time: int, *, exact: bool = True) -> Stat:
    return Stat(size, data_size, mtime_ns=time * 10**9, exact=exact)


def directory_stat(time: int | None = None) -> Stat:
    return Stat(mode=DIRECTORY_MODE, mtime_ns=nanoseconds(time))


async def directory(tree: Tree, path: str) -> Directory:
    node = await tree.find(path)
    assert isinstance(node, Directory)
    return node


async def image(tree: Tree, path: str) -> ImageFile:
    node = await tree.find(path)
    assert isinstance(node, ImageFile)
    return node


async def small_file(tree: Tree, path: str) -> BlobFile:
    node = await tree.find(path)
    assert isinstance(node, BlobFile)
    return node


async def latest(tree: Tree, path: str) -> Latest:
    node = await (await directory(tree, path)).child(b"latest")
    assert isinstance(node, Latest)
    return node


async def names(tree: Tree, path: str) -> list[str]:
    return [name.decode() for name in await (await directory(tree, path)).children()]


async def all_paths(node: Node) -> list[str]:
    paths = [str(node)]
    if isinstance(node, Directory):
        for child in (await node.children()).values():
            paths += await all_paths(child)
    return paths


# --- structure


@in_trio
async def test_the_tree_shows_namespaces_types_groups_snapshots_and_files() -> None:
    async with shown(filled()) as tree:
        assert await all_paths(tree.root) == [
            "/",
            "vm",
            "vm/100",
            f"vm/100/{DAYS[0]}",
            f"vm/100/{DAYS[0]}/drive-scsi0.img",
            f"vm/100/{DAYS[0]}/qemu-server.conf",
            f"vm/100/{DAYS[0]}/index.json",
            f"vm/100/{DAYS[1]}",
            f"vm/100/{DAYS[1]}/drive-scsi0.img",
            f"vm/100/{DAYS[1]}/qemu-server.conf",
            f"vm/100/{DAYS[1]}/index.json",
            "vm/100/latest",
            "host",
            "host/9",
            f"host/9/{DAYS[0]}",
            f"host/9/{DAYS[0]}/root.pxar",
            f"host/9/{DAYS[0]}/index.json",
            f"host/9/{DAYS[0]}/client.log",
            "host/9/latest",
            "ns",
            "ns/prod",
            "ns/prod/ct",
            "ns/prod/ct/200",
            f"ns/prod/ct/200/{DAYS[0]}",
            f"ns/prod/ct/200/{DAYS[0]}/root.pxar",
            f"ns/prod/ct/200/{DAYS[0]}/index.json",
            "ns/prod/ct/200/latest",
            "ns/prod/ns",
            "ns/prod/ns/db",
            "ns/prod/ns/db/vm",
            "ns/prod/ns/db/vm/300",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}/drive-scsi0.img",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}/qemu-server.conf",
            f"ns/prod/ns/db/vm/300/{DAYS[0]}/index.json",
            "ns/prod/ns/db/vm/300/latest",
        ]


@in_trio
async def test_a_tree_may_be_rooted_at_a_namespace() -> None:
    async with shown(filled(), PROD) as tree:
        assert await names(tree, "") == ["ct", "ns"]
        assert await names(tree, "ns/db/vm/300") == [DAYS[0], "latest"]
        assert (await image(tree, f"ns/db/vm/300/latest/{IMAGE}")).info.snapshot.group.namespace == DEEP


@in_trio
async def test_an_empty_source_is_an_empty_directory() -> None:
    async with shown(MemorySource()) as tree:
        assert await tree.root.children() == {}
        assert await tree.root.stat() == directory_stat()


@in_trio
async def test_files_read_as_what_was_backed_up() -> None:
    async with shown(filled()) as tree:
        opened = await (await image(tree, f"vm/100/latest/{IMAGE}")).open()
        assert await opened.read(0, 1 << 20) == CONTENT
        assert await (await small_file(tree, "vm/100/latest/qemu-server.conf")).read() == CONF
        stream = await (await image(tree, "host/9/latest/root.pxar")).open()
        assert await stream.read(0, 1 << 20) == CONTENT


@in_trio
async def test_files_whose_names_collide_are_all_there() -> None:
    stored = ["x.img.blob.blob", "x.img.fidx", "x.img.blob", "x.img.didx"]
    for order in (stored, stored[::-1], stored[2:] + stored[:2]):
        source = MemorySource()
        source.add(made.snapshot(), {name: name.encode() for name in order})
        async with shown(source) as tree:
            found = await (await directory(tree, "vm/100/latest")).children()
            files = {
                node.file.archive.filename
                for node in found.values()
                if isinstance(node, (BlobFile, ImageFile))
            }
            assert files == {*stored, "index.json.blob"}
            assert b"x.img" in found
            for name in stored:  # and each can be had by its stored name
                node = await tree.find(f"vm/100/latest/{name}")
                assert isinstance(node, (BlobFile, ImageFile))
                assert node.file.archive.filename == name


# --- latest


@in_trio
async def test_latest_is_the_newest_snapshot_and_moves_on() -> None:
    source = filled()
    async with shown(source) as tree:
        link = await latest(tree, "vm/100")
        assert await link.target() == DAYS[1].encode()
        assert await link.stat() == Stat(
            len(DAYS[1]), mode=LINK_MODE, mtime_ns=(TIME + DAY) * 10**9, target=DAYS[1].encode()
        )
        source.add(made.snapshot("100", time=TIME + 2 * DAY), FILES)
        assert await link.target() == DAYS[1].encode()
        await trio.sleep(5)
        assert await link.target() == DAYS[2].encode()
        del source.infos[made.snapshot("100", time=TIME + 2 * DAY)]
        await trio.sleep(5)
        assert await link.target() == DAYS[1].encode()


def broken(snapshot: Snapshot) -> SnapshotInfo:
    return SnapshotInfo(snapshot, (), error="unreadable manifest: CRC mismatch")


@in_trio
async def test_a_broken_snapshot_is_shown_with_its_error_and_is_never_latest() -> None:
    source = filled()
    newest = made.snapshot("100", time=TIME + 2 * DAY)
    source.infos[newest] = broken(newest)
    async with shown(source) as tree:
        assert await names(tree, "vm/100") == [*DAYS, "latest"]
        node = await directory(tree, f"vm/100/{DAYS[2]}")
        with pytest.raises(DamageError, match=rf"{DAYS[2]}: unreadable manifest: CRC mismatch"):
            await node.children()
        with pytest.raises(DamageError):
            await tree.find(f"vm/100/{DAYS[2]}/{IMAGE}")
        assert (await node.stat()).mtime_ns == (TIME + 2 * DAY) * 10**9
        assert (await node.facts())["error"] == "unreadable manifest: CRC mismatch"
        assert await (await latest(tree, "vm/100")).target() == DAYS[1].encode()


@in_trio
async def test_a_group_of_broken_snapshots_only_has_no_latest() -> None:
    source = MemorySource()
    source.infos[made.snapshot()] = broken(made.snapshot())
    async with shown(source) as tree:
        assert await names(tree, "vm/100") == [DAYS[0]]
        with pytest.raises(NotFoundError, match="there is no 'latest'"):
            await tree.find("vm/100/latest")


@in_trio
async def test_a_link_that_leads_nowhere_any_more_says_so() -> None:
    source = MemorySource()
    source.add(made.snapshot(), FILES)
    async with shown(source) as tree:
        link = await latest(tree, "vm/100")
        source.infos[made.snapshot()] = broken(made.snapshot())
        await trio.sleep(5)
        with pytest.raises(NotFoundError, match="there is no finished snapshot"):
            await link.target()
        assert await link.stat() == Stat(mode=LINK_MODE, exact=False)


# --- freshness


@in_trio
async def test_new_snapshots_groups_and_namespaces_appear_within_the_refresh_time() -> None:
    source = filled()
    async with shown(source, refresh=7) as tree:
        before = await all_paths(tree.root)
        source.add(made.snapshot("100", time=TIME + 2 * DAY), FILES)
        source.add(made.snapshot("101"), FILES)
        source.add(made.snapshot("1", namespace=Namespace(("test",))), FILES)
        source.add(made.snapshot("7", type="ct"), FILES)
        await trio.sleep(6.9)
        assert await all_paths(tree.root) == before
        await trio.sleep(0.1)
        assert {
            f"vm/100/{DAYS[2]}",
            "vm/101",
            f"vm/101/{DAYS[0]}/{IMAGE}",
            "ns/test/vm/1",
            "ct/7",
        } <= set(await all_paths(tree.root))


@in_trio
async def test_what_was_forgotten_goes() -> None:
    source = filled()
    async with shown(source) as tree:
        await all_paths(tree.root)
        for snapshot in list(source.infos):
            if (
                snapshot.group.type == "host"
                or snapshot.time > TIME
                or snapshot.group.namespace != ROOT_NAMESPACE
            ):
                del source.infos[snapshot]
        await trio.sleep(5)
        assert await names(tree, "") == ["vm"]
        assert await names(tree, "vm/100") == [DAYS[0], "latest"]
        with pytest.raises(NotFoundError):
            await tree.find("host/9")


@in_trio
async def test_what_did_not_change_stays_the_same_node() -> None:
    source = filled()
    paths = [
        "vm",
        "vm/100",
        f"vm/100/{DAYS[0]}",
        f"vm/100/{DAYS[0]}/{IMAGE}",
        "ns",
        "ns/prod",
        "ns/prod/ns/db/vm",
    ]
    async with shown(source) as tree:
        before = [await tree.find(path) for path in paths]
        link = await latest(tree, "vm/100")
        source.add(made.snapshot("100", time=TIME + 2 * DAY), FILES)
        await trio.sleep(60)
        after = [await tree.find(path) for path in paths]
        assert [a is b for a, b in zip(before, after, strict=True)] == [True] * len(paths)
        assert await latest(tree, "vm/100") is link


@in_trio
async def test_a_snapshot_that_changed_is_a_new_node_with_the_new_facts() -> None:
    source = filled()
    snapshot = made.snapshot("100")
    async with shown(source) as tree:
        before = await tree.find(f"vm/100/{DAYS[0]}")
        source.infos[snapshot] = replace(source.infos[snapshot], notes="keep this one")
        await trio.sleep(5)
        after = await tree.find(f"vm/100/{DAYS[0]}")
        assert after is not before
        assert (await after.facts())["notes"] == "keep this one"


@in_trio
async def test_a_group_tells_the_newest_of_itself_though_it_is_the_same_node() -> None:
    source = filled()
    async with shown(source) as tree:
        group = await tree.find("vm/100")
        assert (await group.stat()).mtime_ns == (TIME + DAY) * 10**9
        source.add(made.snapshot("100", time=TIME + 2 * DAY), FILES)
        await trio.sleep(5)
        assert await tree.find("vm/100") is group
        assert (await group.stat()).mtime_ns == (TIME + 2 * DAY) * 10**9
        assert (await group.facts())["backup_count"] == "3"


@in_trio
async def test_a_listing_that_fails_is_tried_again_at_once_and_loses_no_nodes() -> None:
    source = filled()
    async with shown(source) as tree:
        group = await directory(tree, "vm/100")
        before = await group.child(DAYS[0].encode())
        await trio.sleep(5)
        source.fail("snapshots", SourceError("no answer"))
        with pytest.raises(SourceError, match="no answer"):
            await group.children()
        assert await group.child(DAYS[0].encode()) is before


# --- what it costs


@in_trio
async def test_all_who_list_a_directory_at_once_share_one_listing() -> None:
    source = filled()
    async with shown(source) as tree:
        group = await directory(tree, "vm/100")
        gate = source.hold("snapshots")
        listings: list[Listing] = []

        async def list_it() -> None:
            listings.append(await group.children())

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(list_it)
            await wait_all_tasks_blocked()
            gate.set()
        assert len(listings) == 10
        assert all(listing == listings[0] for listing in listings)
    assert source.calls["snapshots"] == 1


@in_trio
async def test_all_who_wait_for_a_listing_share_its_failure() -> None:
    source = filled()
    async with shown(source) as tree:
        group = await directory(tree, "vm/100")
        gate = source.hold("snapshots")
        source.fail("snapshots", SourceError("no answer"))

        async def list_it() -> None:
            with pytest.raises(SourceError, match="no answer"):
                await group.children()

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(list_it)
            await wait_all_tasks_blocked()
            gate.set()
        assert source.calls["snapshots"] == 1
        assert await group.children(), "a later listing asks again"


@in_trio
async def test_who_gives_up_listing_does_not_spoil_it_for_the_others() -> None:
    source = filled()
    async with shown(source) as tree:
        gate = source.hold("groups")
        with trio.move_on_after(1) as scope:
            await tree.root.children()
        assert scope.cancelled_caught
        gate.set()
        assert list(await tree.root.children()) == [b"vm", b"host", b"ns"]


@in_trio
async def test_a_namespace_is_asked_for_its_groups_once_however_many_types_are_looked_at() -> None:
    source = filled()
    async with shown(source) as tree:
        for path in ("", "vm", "host", "ns"):
            await names(tree, path)
        assert source.calls == {"groups": 1, "namespaces": 1}
        await names(tree, "ns/prod")
        assert source.calls == {"groups": 2, "namespaces": 2}
        await names(tree, "vm/100")
        assert source.calls == {"groups": 2, "namespaces": 2, "snapshots": 1}


@in_trio
async def test_what_is_in_a_snapshot_and_its_images_cost_nothing_once_the_group_is_listed() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        await names(tree, "vm/100")
        before = dict(source.calls)
        for child in (await (await directory(tree, f"vm/100/{DAYS[0]}")).children()).values():
            await child.glance()
            if isinstance(child, ImageFile):
                await child.stat()
                await child.facts()
        assert source.calls == before


@in_trio
async def test_the_blobs_of_a_snapshot_are_asked_for_once_and_side_by_side() -> None:
    source = filled(cheap_files=False)
    source.add(made.snapshot("100"), FILES | {"a.blob": b"a" * 999, "b.blob": b"b" * 999})
    async with shown(source) as tree:
        children = (await (await directory(tree, f"vm/100/{DAYS[0]}")).children()).values()
        blobs = [node for node in children if isinstance(node, BlobFile)]
        assert len(blobs) == 4
        await tree.reader.version(made.snapshot("100"), 5)
        assert source.calls["fetch_file"] == 1  # the manifest
        gate = source.hold("fetch_file")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blobs[0].stat)
            await wait_all_tasks_blocked()
            assert source.calls["fetch_file"] == 4  # and the three others
            for node in blobs:
                nursery.start_soon(node.stat)
            await wait_all_tasks_blocked()
            gate.set()
        assert source.calls["fetch_file"] == 4
        for node in blobs:
            stat = await node.stat()
            assert (stat.exact, stat.size) == (True, len(await node.read()))


@in_trio
async def test_the_sizes_of_blobs_are_kept_as_long_as_the_manifest_is_the_same() -> None:
    source = filled(cheap_files=False)
    async with shown(source, refresh=5) as tree:
        conf = await small_file(tree, f"vm/100/{DAYS[0]}/qemu-server.conf")
        assert (await conf.stat()).size == len(CONF)
        assert source.calls["fetch_file"] == 2
        await trio.sleep(5)
        assert (await conf.stat()).size == len(CONF)
        assert source.calls["fetch_file"] == 3  # the manifest, which is the same
        source.add(made.snapshot("100"), FILES | {"qemu-server.conf.blob": b"x" * 2000})
        stored = source.files[made.snapshot("100"), conf.file.archive]
        conf.file = replace(conf.file, size=len(stored), csum=None)  # as where the sizes are the same
        assert (await conf.stat()).size == len(CONF)
        await trio.sleep(5)
        assert (await conf.stat()).size == 2000


@in_trio
async def test_who_gives_up_a_stat_does_not_spoil_it_for_the_others() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        conf = await small_file(tree, f"vm/100/{DAYS[0]}/qemu-server.conf")
        gate = source.hold("fetch_file")
        with trio.move_on_after(1) as scope:
            await conf.stat()
        assert scope.cancelled_caught
        gate.set()
        assert (await conf.stat()).size == len(CONF)


@in_trio
async def test_a_blob_that_cannot_be_read_has_its_listed_size_and_is_tried_again_after_refresh() -> None:
    source = filled(cheap_files=False)
    async with shown(source, refresh=5) as tree:
        conf = await small_file(tree, f"vm/100/{DAYS[0]}/qemu-server.conf")
        place = made.snapshot("100"), conf.file.archive
        for broken in (b"rubbish", None):
            whole = source.files.pop(place)
            if broken is not None:
                source.files[place] = broken
            await trio.sleep(5)
            for _ in range(3):
                assert await conf.stat() == file_stat(conf.file.size, conf.file.size, TIME, exact=False)
            with pytest.raises(DamageError):
                await conf.read()
            source.files[place] = whole
        await trio.sleep(5)
        source.fail("fetch_file", SourceError("no answer"))
        assert not (await conf.stat()).exact
        calls = source.calls["fetch_file"]
        assert not (await conf.stat()).exact
        assert source.calls["fetch_file"] == calls  # a source that is away is not asked at every stat
        await trio.sleep(5)
        assert await conf.stat() == file_stat(len(CONF), len(CONF), TIME)


@in_trio
async def test_a_stat_of_a_known_directory_asks_nothing_however_old_the_listing() -> None:
    source = filled()
    async with shown(source) as tree:
        nodes = [await tree.find(path) for path in ("", "vm", "vm/100", f"vm/100/{DAYS[0]}", "ns", "ns/prod")]
        before = dict(source.calls)
        await trio.sleep(1000)
        for node in nodes:
            await node.stat()
        assert source.calls == before


# --- stat


@in_trio
async def test_directories_have_the_time_of_the_newest_backup_inside() -> None:
    async with shown(filled()) as tree:
        assert await tree.root.stat() == directory_stat()
        assert await (await tree.find("vm")).stat() == directory_stat(TIME + DAY)
        assert await (await tree.find("vm/100")).stat() == directory_stat(TIME + DAY)
        assert await (await tree.find(f"vm/100/{DAYS[0]}")).stat() == directory_stat(TIME)
        assert await (await tree.find("ns")).stat() == directory_stat()
        assert await (await tree.find("ns/prod")).stat() == directory_stat()


@in_trio
async def test_a_node_is_found_at_its_path_without_following_links() -> None:
    async with shown(filled()) as tree:
        assert await tree.at(b"") is tree.root
        for path in ("vm", "vm/100", "vm/100/latest", f"vm/100/{DAYS[0]}/index.json", "ns/prod"):
            assert (await tree.at(path.encode())).path == path.encode()
        for path in ("vm/9", f"vm/100/{DAYS[0]}/index.json/x", "vm/100/latest/index.json"):
            with pytest.raises(NotFoundError):
                await tree.at(path.encode())


@in_trio
async def test_a_type_without_any_backup_has_no_time() -> None:
    class Empty(MemorySource):
        async def groups(self, namespace: Namespace) -> list[GroupInfo]:
            return [replace(info, last_backup=None) for info in await super().groups(namespace)]

    source = Empty()
    source.add(made.snapshot(), FILES)
    async with shown(source) as tree:
        assert (await (await tree.find("vm")).stat()).mtime_ns is None
        assert (await (await tree.find("vm/100")).stat()).mtime_ns is None


@in_trio
async def test_a_cheap_source_tells_exact_sizes_at_once_and_is_asked_once() -> None:
    source = filled()
    async with shown(source) as tree:
        disk = await tree.find(f"vm/100/{DAYS[0]}/{IMAGE}")
        conf = await tree.find(f"vm/100/{DAYS[0]}/qemu-server.conf")
        for _ in range(2):
            assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)
            assert await conf.stat() == file_stat(len(CONF), len(CONF), TIME)
    assert source.calls["fetch_file"] == 2
    assert source.calls["fetch_chunk"] == 0


@in_trio
async def test_a_dear_source_is_asked_for_blobs_at_a_stat_and_for_images_when_they_are_opened() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        disk = await image(tree, f"vm/100/{DAYS[0]}/{IMAGE}")
        conf = await small_file(tree, f"vm/100/{DAYS[0]}/qemu-server.conf")
        manifest = await small_file(tree, f"vm/100/{DAYS[0]}/index.json")
        log = await small_file(tree, f"host/9/{DAYS[0]}/client.log")
        assert await disk.stat() == file_stat(len(CONTENT), len(CONTENT), TIME, exact=False)
        stored = conf.file.size
        assert await conf.glance() == file_stat(stored, stored, TIME, exact=False)
        assert source.calls["fetch_file"] == 0
        assert await conf.stat() == await conf.glance() == file_stat(len(CONF), len(CONF), TIME)
        size = len(await manifest.read())
        assert await manifest.stat() == file_stat(size, size, TIME)
        assert await log.stat() == file_stat(4, 4, TIME)
        await disk.open()
        assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)


@pytest.mark.parametrize("filename", [f"{IMAGE}.fidx", "qemu-server.conf.blob"])
@in_trio
async def test_a_damaged_file_has_a_stat_and_opening_it_says_what_is_wrong(filename: str) -> None:
    source = filled()
    snapshot = made.snapshot("100")
    source.files[snapshot, Archive(filename)] = b"rubbish"
    async with shown(source) as tree:
        node = await tree.find(f"vm/100/{DAYS[0]}/{filename}")
        assert isinstance(node, (BlobFile, ImageFile))
        assert await node.stat() == file_stat(node.file.size, node.file.size, TIME)
        await node.facts()
        with pytest.raises(DamageError):
            await (node.open() if isinstance(node, ImageFile) else node.read())


@in_trio
async def test_a_file_that_was_repaired_has_an_exact_stat_once_it_is_opened() -> None:
    source = filled()
    place = made.snapshot("100"), Archive(f"{IMAGE}.fidx")
    whole = source.files[place]
    source.files[place] = b"rubbish"
    async with shown(source) as tree:
        disk = await image(tree, f"vm/100/{DAYS[0]}/{IMAGE}")
        await disk.stat()
        source.files[place] = whole
        await disk.open()
        assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)


@in_trio
async def test_a_source_that_fails_during_a_stat_is_asked_again_by_the_next() -> None:
    source = filled()
    async with shown(source) as tree:
        disk = await tree.find(f"vm/100/{DAYS[0]}/{IMAGE}")
        source.fail("fetch_file", SourceError("no answer"))
        assert await disk.stat() == file_stat(len(CONTENT), len(CONTENT), TIME, exact=False)
        assert await disk.stat() == file_stat(len(CONTENT), DATA_SIZE, TIME)


@in_trio
async def test_an_encrypted_file_without_its_key_has_a_stat_and_cannot_be_opened() -> None:
    source = MemorySource()
    source.add(made.snapshot(), FILES, crypt_mode=CryptMode.ENCRYPT, key=made.KEY)
    async with shown(source) as tree:
        disk = await image(tree, f"vm/100/latest/{IMAGE}")
        assert await disk.stat() == file_stat(len(CONTENT), len(CONTENT), TIME)
        with pytest.raises(KeyRequiredError, match=made.KEY.fingerprint):
            await disk.open()
        conf = await small_file(tree, "vm/100/latest/qemu-server.conf")
        assert (await conf.stat()).size == conf.file.size
        with pytest.raises(KeyRequiredError, match=made.KEY.fingerprint):
            await conf.read()
    async with shown(source, with_key=True) as tree:
        assert await (await tree.find(f"vm/100/latest/{IMAGE}")).stat() == file_stat(
            len(CONTENT), DATA_SIZE, TIME
        )
        assert (await (await tree.find("vm/100/latest/qemu-server.conf")).stat()).size == len(CONF)


# --- finding


@in_trio
async def test_paths_are_found_with_links_empty_steps_and_stored_names() -> None:
    async with shown(filled()) as tree:
        newest = await tree.find(f"vm/100/{DAYS[1]}/{IMAGE}")
        for path in (
            f"vm/100/latest/{IMAGE}",
            f"/vm//100/./latest/{IMAGE}/",
            f"vm/100/latest/{IMAGE}.fidx",
        ):
            assert await tree.find(path) is newest
        assert await tree.find("") is tree.root
        assert await tree.find("/") is tree.root
        followed = await tree.find("vm/100/latest")
        assert isinstance(followed, SnapshotDirectory)
        assert followed.name == DAYS[1].encode()


@in_trio
async def test_what_is_not_there_is_told_with_what_is() -> None:
    async with shown(filled()) as tree:
        for path, text in (
            ("vn", "/: there is no 'vn'; there is vm, host, ns"),
            ("vm/101", "vm: there is no '101'; there is 100"),
            (
                f"vm/100/latest/{IMAGE}x",
                f"{DAYS[1]}: there is no '{IMAGE}x'; there is {IMAGE}, qemu-server.conf",
            ),
            (f"vm/100/latest/{IMAGE}/x", f"{IMAGE} is not a directory"),
        ):
            with pytest.raises(NotFoundError) as caught:
                await tree.find(path)
            assert text in str(caught.value)
        with pytest.raises(NotFoundError, match="vm: there is no '101'"):
            await (await directory(tree, "vm")).child(b"101")
    async with shown(MemorySource()) as tree:
        with pytest.raises(NotFoundError, match="there is nothing"):
            await tree.find("vm")


@in_trio
async def test_many_names_are_not_all_told() -> None:
    source = MemorySource()
    for number in range(20):
        source.add(made.snapshot(str(100 + number)), {})
    async with shown(source) as tree:
        with pytest.raises(NotFoundError, match=r"100, .*, 107, … \(20 in all\)$"):
            await tree.find("vm/1")


@pytest.mark.parametrize("path", ["..", "vm/..", "vm/../host", "vm/100/latest/.."])
@in_trio
async def test_steps_up_are_refused(path: str) -> None:
    async with shown(filled()) as tree:
        with pytest.raises(UsageError, match="no meaning"):
            await tree.find(path)


# --- facts


@in_trio
async def test_facts_tell_what_people_ask_about_a_node() -> None:
    source = MemorySource()
    source.add(
        made.snapshot(namespace=DEEP),
        FILES,
        crypt_mode=CryptMode.ENCRYPT,
        key=made.KEY,
        notes="before the upgrade",
        verify_state="ok",
        protected=True,
    )
    group = {"namespace": "prod/db", "backup_type": "vm", "backup_id": "100", "owner": "root@pam"}
    snapshot = group | {
        "backup_time": DAYS[0],
        "protected": "true",
        "key_fingerprint": made.KEY.fingerprint,
        "verify_state": "ok",
        "notes": "before the upgrade",
    }
    async with shown(source, with_key=True) as tree:

        async def facts(path: str) -> dict[str, str]:
            return await (await tree.find(path)).facts()

        top = "ns/prod/ns/db"
        assert await facts(top) == {"namespace": "prod/db"}
        assert await facts("ns") == {"namespace": ""}
        assert await facts(f"{top}/vm") == {"namespace": "prod/db", "backup_type": "vm"}
        assert await facts(f"{top}/vm/100") == group | {"backup_count": "1", "last_backup": DAYS[0]}
        node = await tree.find(f"{top}/vm/100/latest")
        assert isinstance(node, SnapshotDirectory)
        size = sum(file.size for file in node.info.files)
        assert await node.facts() == snapshot | {"size": str(size), "crypt_mode": "encrypt"}
        assert await facts(f"{top}/vm/100/latest/{IMAGE}") == snapshot | {
            "archive": f"{IMAGE}.fidx",
            "crypt_mode": "encrypt",
            "size": str(len(CONTENT)),
            "chunk_size": str(CHUNK_SIZE),
        }
        assert await facts(f"{top}/vm/100/latest/qemu-server.conf") == snapshot | {
            "archive": "qemu-server.conf.blob",
            "crypt_mode": "encrypt",
            "size": str(len(CONF)),
        }
        assert await (await latest(tree, f"{top}/vm/100")).facts() == {}


@in_trio
async def test_facts_of_a_snapshot_tell_where_its_files_differ() -> None:
    source = MemorySource()
    info = source.add(made.snapshot(), {"a.img.fidx": b"a", "b.img.fidx": b"b"})
    files = [
        replace(file, crypt_mode=CryptMode.ENCRYPT) if n == 0 else file for n, file in enumerate(info.files)
    ]
    source.infos[made.snapshot()] = replace(info, files=tuple(files))
    log = FileInfo(Archive("client.log.blob"), 5, None)
    source.infos[made.snapshot("101")] = SnapshotInfo(made.snapshot("101"), (log,))
    async with shown(source) as tree:
        facts = await (await tree.find("vm/100/latest")).facts()
        assert facts["crypt_mode"] == "mixed"
        assert facts["protected"] == "false"
        assert facts["verify_state"] == "none"
        assert "notes" not in facts
        assert "crypt_mode" not in await (await tree.find("vm/101/latest")).facts()


@in_trio
async def test_facts_of_a_file_on_a_dear_source_open_nothing() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        facts = await (await tree.find(f"vm/100/latest/{IMAGE}")).facts()
        assert facts["size"] == str(len(CONTENT))
        assert "chunk_size" not in facts
    assert source.calls["fetch_file"] == 0


# --- a snapshot that is made again, and a listing that does not show it


@in_trio
async def test_a_file_made_again_with_the_same_size_opens_with_its_new_content_after_refresh() -> None:
    source = filled(cheap_files=False)
    async with shown(source, refresh=5) as tree:
        disk = await image(tree, f"vm/100/{DAYS[0]}/{IMAGE}")
        disk.file = replace(disk.file, csum=None)  # as a server lists it
        old = await disk.open()
        assert await old.read(0, 1 << 20) == CONTENT
        content = made.image(2, "0rtr", tail=512)
        source.add(made.snapshot("100"), FILES | {f"{IMAGE}.fidx": content})
        await trio.sleep(5)
        new = await disk.open()
        assert await new.read(0, 1 << 20) == content
        assert (await disk.stat()).data_size == 3 * CHUNK_SIZE + 512
        assert await old.read(0, 1 << 20) == CONTENT


# --- walks through many directories


def many_groups(*, groups: int = 40) -> tuple[MemorySource, list[str]]:
    source = MemorySource(cheap_files=False)
    for number in range(groups):
        source.add(made.snapshot(f"{number:03}"), {})
    return source, [f"vm/{number:03}" for number in range(groups)]


@in_trio
async def test_groups_that_are_listed_in_order_are_listed_side_by_side() -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        groups = [await directory(tree, path) for path in paths]
        for group in groups[:2]:
            await group.children()
        assert source.calls["snapshots"] == 2
        gate = source.hold("snapshots")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(groups[2].children)
            await wait_all_tasks_blocked()
            assert source.calls["snapshots"] == 2 + AHEAD
            gate.set()
        for group in groups:
            assert DAYS[0].encode() in await group.children()
        assert source.calls["snapshots"] == len(groups)


@pytest.mark.parametrize("step", [-1, 0, AHEAD + 1])
@in_trio
async def test_groups_in_another_order_are_not_listed_ahead(step: int) -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        order = paths[::-1] if step < 0 else paths[::step] if step else [paths[0], paths[20], paths[3]]
        for path in order:
            await names(tree, path)
        assert source.calls["snapshots"] == len(order)


@in_trio
async def test_a_slow_walk_lists_nothing_that_goes_out_of_date_before_it_is_wanted() -> None:
    source, paths = many_groups()
    async with shown(source, refresh=5) as tree:
        for path in paths[:10]:
            await names(tree, path)
            await trio.sleep(5)
        assert source.calls["snapshots"] == 10


@in_trio
async def test_a_group_that_cannot_be_listed_ahead_says_so_when_it_is_wanted() -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        groups = [await directory(tree, path) for path in paths]
        for group in groups[:2]:
            await group.children()
        source.fail("snapshots", *[SourceError("no answer")] * AHEAD)
        with pytest.raises(SourceError, match="no answer"):
            await groups[2].children()
        for group in groups:
            assert await group.children()


@in_trio
async def test_namespaces_that_are_listed_in_order_are_listed_side_by_side() -> None:
    source = MemorySource()
    for number in range(20):
        source.add(made.snapshot(namespace=Namespace((f"n{number:02}",))), {})
    async with shown(source) as tree:
        for number in range(2):
            await names(tree, f"ns/n{number:02}")
        before = source.calls["groups"]
        await names(tree, "ns/n02")
        assert source.calls["groups"] == before + AHEAD


@in_trio
async def test_a_large_group_is_listed_without_holding_up_other_tasks() -> None:
    source = MemorySource(cheap_files=False)
    first = source.add(made.snapshot(), FILES)
    for number in range(20_000):
        snapshot = made.snapshot(time=TIME + number)
        source.infos[snapshot] = replace(first, snapshot=snapshot)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with shown(source) as tree, trio.open_nursery() as nursery:
        group = await directory(tree, "vm/100")
        nursery.start_soon(others)
        assert len(await group.children()) == 20_001
        nursery.cancel_scope.cancel()
    assert turns >= 20_000 // IN_ONE_GO


@in_trio
async def test_a_look_up_in_a_type_with_many_groups_makes_no_new_listing() -> None:
    source, paths = many_groups()
    async with shown(source) as tree:
        vm = await directory(tree, "vm")
        values = (await vm.children()).values_by_name
        await names(tree, paths[3])
        assert (await vm.children()).values_by_name is values


@in_trio
async def test_the_blobs_of_snapshots_that_are_looked_at_in_order_are_asked_for_side_by_side() -> None:
    source = MemorySource(cheap_files=False)
    for day in range(30):
        source.add(made.snapshot(time=TIME + day * DAY), {})
    async with shown(source) as tree:
        children = list((await (await directory(tree, "vm/100")).children()).values())
        manifests = [await small_file(tree, f"{node}/index.json") for node in children[:-1]]
        for manifest in manifests[:2]:
            assert (await manifest.stat()).exact
        assert source.calls["fetch_file"] == 2
        gate = source.hold("fetch_file")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manifests[2].stat)
            await wait_all_tasks_blocked()
            assert source.calls["fetch_file"] == 2 + AHEAD
            gate.set()
        for manifest in manifests:
            assert (await manifest.stat()).exact
        assert source.calls["fetch_file"] == len(manifests)


# --- what is kept in memory


@in_trio
async def test_a_walk_leaves_only_the_directories_that_were_used_last() -> None:
    source = MemorySource(cheap_files=False)
    for group in range(20):
        for day in range(50):
            source.add(made.snapshot(str(group), time=TIME + day * DAY), {})
    async with shown(source) as tree:
        assert len(await all_paths(tree.root)) == 2 + 20 * (2 + 50 * 2)
        # Each holds the directories above it, and nothing below it.
        assert len(tree) <= KEPT_DIRECTORIES + 3


@in_trio
async def test_listings_are_charged_by_their_names_until_nothing_uses_them() -> None:
    source, _names = many_groups(groups=600)
    async with shown(source) as tree:
        memory = tree.reader.store.memory
        assert memory.charged(HOLDER) == 0
        await (await tree.at(b"vm")).children()  # type: ignore[attr-defined]
        listed = memory.charged(HOLDER)
        assert listed >= 600 * (GROUP_SIZE + NAME_SIZE)
        for name in list(await (await tree.at(b"vm")).children())[:KEPT_DIRECTORIES]:  # type: ignore[attr-defined]
            await (await tree.at(b"vm/" + name)).children()  # type: ignore[attr-defined]
        walked = memory.charged(HOLDER)
        assert walked >= listed + (KEPT_DIRECTORIES - 10) * (NAME_SIZE + SNAPSHOT_SIZE + FILE_SIZE)
        big = memory.charge("open files", memory.limit, passing=True)
        memory.reclaim()
        gc.collect()
        assert memory.charged(HOLDER) <= 600 * GROUP_SIZE + 3 * NAME_SIZE  # only what the root itself lists
        assert len(tree) == 0
        del big


@in_trio
async def test_memory_is_charged_for_a_list_while_it_is_read_whatever_the_server_claims() -> None:
    source, _names = many_groups(groups=1)
    gate = source.hold("snapshots")
    async with shown(source) as tree:
        group = await tree.find("vm/000")
        assert isinstance(group, Directory)
        memory = tree.reader.store.memory
        before = memory.charged(HOLDER)
        for count in (1, 1 << 62):
            group._info = replace(group._info, snapshot_count=count)  # type: ignore[attr-defined]
            group._fresh_until = 0
            group.parent._values[b"000"] = group._info  # type: ignore[attr-defined,union-attr]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group.children)
                await wait_all_tasks_blocked()
                assert memory.charged(HOLDER) == before + min(count, MOST_SNAPSHOTS) * READING_SIZE
                nursery.cancel_scope.cancel()
            assert memory.charged(HOLDER) == before
        gate.set()
        await group.children()
        assert before < memory.charged(HOLDER) < before + READING_SIZE


@in_trio
async def test_a_listing_that_fits_once_is_refreshed_and_kept_out_when_it_grows_too_large() -> None:
    source, _names = many_groups(groups=600)
    async with open_reader(source, cache_size=0) as reader:
        tree, memory = Tree(reader, refresh=0.0), reader.store.memory
        assert len(await tree.root.children()) == 1
        listed = memory.charged(HOLDER)
        memory.limit = listed + 1000
        for _ in range(3):
            assert len(await tree.root.children()) == 1
            assert memory.charged(HOLDER) == listed
        memory.limit = listed - 1
        small = memory.charge("open files", 1)
        with pytest.raises(MemoryLimitError):
            await tree.root.children()
        assert memory.charged() == small.size
        assert not tree.root.listing()


@in_trio
async def test_a_listing_that_does_not_fit_is_refused_and_leaves_nothing_behind() -> None:
    source, _names = many_groups(groups=600)
    async with open_reader(source, cache_size=0, open_limit=100_000) as reader:
        tree = Tree(reader)
        blob = reader.store.memory.charge("open files", 1000)
        with pytest.raises(MemoryLimitError, match=r"^/: the \d+ bytes of its listing do not fit in memory"):
            await tree.at(b"vm")
        assert reader.store.memory.charged() == blob.size
        assert not tree.root.groups
        blob.resize(0)
        reader.store.memory.limit = 10_000_000
        assert len(await (await tree.at(b"vm")).children()) == 600  # type: ignore[attr-defined]


@in_trio
async def test_a_node_that_is_in_use_stays_the_same_object_however_many_others_are_listed() -> None:
    source = filled()
    for group in range(2 * KEPT_DIRECTORIES):
        source.add(made.snapshot(str(1000 + group)), {})
    path = f"vm/100/{DAYS[0]}/{IMAGE}"
    async with shown(source) as tree:
        used = await image(tree, path)
        await all_paths(tree.root)
        assert await tree.find(path) is used


@in_trio
async def test_sizes_that_were_learned_outlive_the_nodes_of_the_files() -> None:
    source = filled(cheap_files=False)
    async with shown(source) as tree:
        path = f"vm/100/{DAYS[0]}/qemu-server.conf"
        assert (await (await tree.find(path)).stat()).size == len(CONF)
        calls = dict(source.calls)
        assert await (await tree.find(path)).glance() == file_stat(len(CONF), len(CONF), TIME)
        assert source.calls == calls


# --- names that are not text


@in_trio
async def test_names_are_bytes_and_need_not_be_text() -> None:
    class Odd(Directory):
        async def list_values(self) -> list[tuple[bytes, object]]:
            return [(b"caf\xe9", 1), (b"line\nbreak", 2)]

        def make(self, name: bytes, value: int) -> Node:
            return Odd(self.tree, self, name)

    async with shown(MemorySource()) as tree:
        odd = Odd(tree, None, b"")
        node = await odd.child(b"caf\xe9")
        assert (node.name, node.path, str(node)) == (b"caf\xe9", b"caf\xe9", "caf\\xe9")
        assert isinstance(node, Odd)
        assert (await node.child(b"line\nbreak")).path == b"caf\xe9/line\nbreak"
        with pytest.raises(NotFoundError, match="there is no 'na"):
            await odd.child(b"na\xefve")
