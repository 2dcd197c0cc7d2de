"""What the tree asks its source for, and what it shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.tree import BlobFile, ImageFile, Listing
from tests.support import made
from tests.support.made import TIME
from tests.support.run import in_trio
from tests.tree.trees import (
    CONF,
    DAYS,
    FILES,
    directory,
    file_stat,
    filled,
    names,
    shown,
    small_file,
)


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
