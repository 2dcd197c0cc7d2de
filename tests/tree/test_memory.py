"""What the tree keeps in memory, and what it is charged for."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pbsfs.reader.reader import open_reader
from pbsfs.runtime.memory import MemoryLimitError
from pbsfs.tree import Directory, Tree
from pbsfs.tree.namespaces import GROUP_SIZE
from pbsfs.tree.node import (
    HOLDER,
    KEPT_DIRECTORIES,
    NAME_SIZE,
)
from pbsfs.tree.snapshots import FILE_SIZE, MOST_SNAPSHOTS, READING_SIZE, SNAPSHOT_SIZE
from tests.support import made
from tests.support.made import DAY, TIME
from tests.support.run import in_trio
from tests.support.sources import MemorySource
from tests.tree.trees import (
    CONF,
    DAYS,
    IMAGE,
    all_paths,
    file_stat,
    filled,
    image,
    many_groups,
    shown,
)


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
