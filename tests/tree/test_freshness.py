"""How fresh the tree is: what appears, goes and changes while it is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from pbsfs.base.errors import NotFoundError, SourceError
from pbsfs.base.names import ROOT_NAMESPACE, Namespace
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE
from tests.tree.trees import (
    CONTENT,
    DAYS,
    FILES,
    IMAGE,
    all_paths,
    directory,
    filled,
    image,
    latest,
    names,
    shown,
)


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
